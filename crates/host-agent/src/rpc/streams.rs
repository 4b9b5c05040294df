//! How many commands and file transfers may be under way, for one sandbox and for the host: one tenant's streams must take neither the
//! descriptors nor the memory that the others' need. What is beyond is refused at once, not queued: the caller knows better whether it waits.

use std::sync::Arc;

use api::host;
use connectrpc::{ConnectError, ErrorCode};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::guest::{Guest, InUse};

/// Of the whole host. A stream takes two descriptors and, when its reader is slow, a megabyte.
const HOST_MAX: usize = 2048;

pub struct Streams {
    host: Arc<Semaphore>,
}

/// Held as long as a stream is under way.
pub struct Permit {
    _sandbox: OwnedSemaphorePermit,
    _host: OwnedSemaphorePermit,
    _in_use: Option<InUse>,
}

impl Streams {
    pub fn new() -> Self {
        Self { host: Arc::new(Semaphore::new(HOST_MAX)) }
    }

    /// The sandbox is in use as long as the stream is under way.
    pub fn admit(&self, guest: &Guest) -> Result<Permit, ConnectError> {
        Ok(Permit { _in_use: Some(guest.in_use()), ..self.admit_listener(guest)? })
    }

    /// The sandbox is in use whenever something comes by the stream, which whoever relays it says.
    pub fn admit_listener(&self, guest: &Guest) -> Result<Permit, ConnectError> {
        let refused = |whose| {
            let message = format!("as many commands and file transfers are under way as {whose} may have; try again");
            host::error(ErrorCode::ResourceExhausted, host::TOO_MANY_STREAMS, message)
        };
        let sandbox = guest.stream_permit().ok_or_else(|| refused("the sandbox"))?;
        let host = self.host.clone().try_acquire_owned().map_err(|_| refused("its host"))?;
        Ok(Permit { _sandbox: sandbox, _host: host, _in_use: None })
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use futures::future::BoxFuture;
    use model::ids::Incarnation;
    use tokio::net::TcpStream;

    use super::*;
    use crate::guest::Dial;

    struct Nowhere;

    impl Dial for Nowhere {
        fn dial(&self) -> BoxFuture<'static, io::Result<TcpStream>> {
            Box::pin(async { Err(io::ErrorKind::ConnectionRefused.into()) })
        }
    }

    #[test]
    fn one_sandbox_takes_no_more_than_its_share() {
        let guest = |n| Guest::new(Arc::new(Nowhere), Incarnation::from_random(n), "aa");
        let (greedy, modest, streams) = (guest(1), guest(2), Streams::new());
        let mut held: Vec<_> = std::iter::from_fn(|| streams.admit(&greedy).ok()).take(HOST_MAX).collect();
        assert_eq!(held.len(), 64);
        let refused = streams.admit(&greedy).err().unwrap();
        assert_eq!(refused.code, ErrorCode::ResourceExhausted);
        assert!(refused.message.unwrap_or_default().starts_with("too_many_streams: "));
        assert!(streams.admit(&modest).is_ok());
        held.pop();
        assert!(streams.admit(&greedy).is_ok());
        drop(held);
        let guests: Vec<_> = (3..).map(guest).take(HOST_MAX / 64 + 1).collect();
        let all: Vec<_> = guests.iter().flat_map(|guest| std::iter::from_fn(|| streams.admit(guest).ok())).collect();
        assert_eq!(all.len(), HOST_MAX);
    }
}
