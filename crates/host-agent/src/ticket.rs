//! The ticket that the last answer to a heartbeat brought, in `host-ticket`: shown in the next heartbeat, it tells the control plane how old
//! this disk is, so that a copy of it is known as one.
//!
//! It is shown from when it is on the disk, so that an agent that dies never knows less than it has said. One that is not written yet, or
//! cannot be, is issued once more when the one before is shown again.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tracing::warn;

use crate::durable;

const FILE_BYTES_MAX: u64 = 4096;
/// A disk that hangs must not keep the host from saying that it lives.
const WRITE_TIME_MAX: Duration = Duration::from_secs(5);

/// The content of `host-ticket`.
#[derive(Serialize, Deserialize)]
struct Kept {
    format: u32,
    /// Registered anew, a machine is another host.
    host_id: String,
    ticket: String,
}

#[derive(Debug)]
pub struct Ticket {
    path: PathBuf,
    host_id: String,
    /// Empty before the first.
    shown: Mutex<String>,
    /// Held while one is written: behind a write that hangs no second one is begun.
    writing: Arc<tokio::sync::Mutex<()>>,
}

impl Ticket {
    /// Of this host. What cannot be read counts as none: the control plane decides what that means.
    pub fn load(dir: &Path, host_id: &str) -> Arc<Self> {
        let path = dir.join("host-ticket");
        let kept = durable::read(&path, FILE_BYTES_MAX)
            .and_then(|bytes| serde_json::from_slice::<Kept>(&bytes).map_err(io::Error::from));
        let shown = match kept {
            Ok(kept) if kept.host_id == host_id => kept.ticket,
            Ok(_) => String::new(),
            Err(error) => {
                if error.kind() != io::ErrorKind::NotFound {
                    warn!("{} is of no use: {error}", path.display());
                }
                String::new()
            }
        };
        Arc::new(Self { path, host_id: host_id.to_owned(), shown: Mutex::new(shown), writing: Arc::default() })
    }

    pub fn shown(&self) -> String {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Returns when it is on the disk, or after five seconds. The write goes on if the caller does not.
    pub async fn keep(self: &Arc<Self>, ticket: String) {
        if ticket == self.shown() {
            return;
        }
        let Ok(turn) = self.writing.clone().try_lock_owned() else { return };
        let kept = self.clone();
        let write = tokio::task::spawn_blocking(move || {
            let _turn = turn;
            match kept.write(&ticket) {
                Ok(()) => *kept.shown.lock().unwrap_or_else(PoisonError::into_inner) = ticket,
                Err(error) => warn!("{} was not written: {error}", kept.path.display()),
            }
        });
        if tokio::time::timeout(WRITE_TIME_MAX, write).await.is_err() {
            warn!("writing {} takes longer than {WRITE_TIME_MAX:?}", self.path.display());
        }
    }

    fn write(&self, ticket: &str) -> io::Result<()> {
        crashpoint::hit("ticket.heard")?;
        let kept = Kept { format: 1, host_id: self.host_id.clone(), ticket: ticket.to_owned() };
        durable::write(&self.path, &serde_json::to_vec(&kept)?, 0o600)?;
        crashpoint::hit("ticket.written")?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn one_is_shown_from_when_it_is_on_the_disk() {
        let dir = tempfile::tempdir().unwrap();
        let ticket = Ticket::load(dir.path(), "host-1");
        assert_eq!(ticket.shown(), "");
        ticket.keep("1.a".to_owned()).await;
        assert_eq!(ticket.shown(), "1.a");
        assert_eq!(Ticket::load(dir.path(), "host-1").shown(), "1.a");
        assert_eq!(Ticket::load(dir.path(), "host-2").shown(), "", "another host's");
        // Nothing can be written there any more.
        std::fs::create_dir(dir.path().join("host-ticket.tmp")).unwrap();
        ticket.keep("2.b".to_owned()).await;
        assert_eq!(ticket.shown(), "1.a");
        std::fs::remove_dir(dir.path().join("host-ticket.tmp")).unwrap();
        ticket.keep("2.b".to_owned()).await;
        assert_eq!(Ticket::load(dir.path(), "host-1").shown(), "2.b");
        std::fs::write(dir.path().join("host-ticket"), "{").unwrap();
        assert_eq!(Ticket::load(dir.path(), "host-1").shown(), "");
    }
}
