//! Counts the hosts that are silent, and puts the brake on when most of them fell silent together (`store::silence`). Tells teams when hosts
//! of theirs have gone, and when they are back.
//!
//! A replica that has just started, or that stood still itself, has heard nobody: what it concludes from that is nothing, until the hosts
//! have had time for two heartbeats.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use store::StoreError;
use store::silence::{Listened, Weighed};
use tokio::time::Instant;
use tracing::{error, info};

use crate::app::App;

pub const EVERY: Duration = Duration::from_secs(5);
/// After a longer gap between two looks this program itself stood still.
const GAP_MAX: Duration = Duration::from_secs(20);

/// Since when this replica has listened without a gap.
#[derive(Debug)]
pub struct Watch(Mutex<(Instant, Instant)>);

impl Watch {
    pub fn new(now: Instant) -> Self {
        Self(Mutex::new((now, now)))
    }

    fn listened(&self, now: Instant, grace: Duration) -> Listened {
        let mut watch = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (since, last) = *watch;
        let since = if now - last > GAP_MAX { now } else { since };
        *watch = (since, now);
        if now - since >= grace { Listened::Enough } else { Listened::NotYet }
    }

    /// Without the database nobody could be heard, whatever was said.
    fn was_deaf(&self, now: Instant) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = (now, now);
    }
}

pub async fn run(app: App) -> Result<(), StoreError> {
    let looked = look(&app).await;
    if looked.is_err() {
        app.watch.was_deaf(Instant::now());
    }
    looked
}

async fn look(app: &App) -> Result<(), StoreError> {
    let listened = app.watch.listened(Instant::now(), app.silence_grace);
    match app.store.weigh_silence(listened).await? {
        Weighed::On(silence) => error!(
            silent = silence.silent,
            hosts = silence.hosts,
            "{} of {} hosts fell silent together: nothing is ended, failed or removed by what is heard of hosts until half of them are back",
            silence.silent,
            silence.hosts
        ),
        Weighed::Off(silence) => {
            info!(silent = silence.silent, hosts = silence.hosts, "most hosts are heard of again");
        }
        Weighed::Same(_) => {}
    }
    let marked = app.store.mark_team_hosts(listened).await?;
    for host in marked.gone {
        info!(host.id = %host, "host {host} of a team is heard of no more");
    }
    for host in marked.back {
        info!(host.id = %host, "host {host} of a team is heard of again");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn its_own_sleep_is_not_the_hosts_silence() {
        let began = Instant::now();
        let watch = Watch::new(began);
        let grace = Duration::from_secs(60);
        let look = |second: u64| watch.listened(began + Duration::from_secs(second), grace);
        for second in (5..60).step_by(5) {
            assert_eq!(look(second), Listened::NotYet, "{second}");
        }
        assert_eq!(look(65), Listened::Enough);
        // Ten minutes pass while it stands still.
        assert_eq!(look(665), Listened::NotYet);
        for second in (670..725).step_by(5) {
            assert_eq!(look(second), Listened::NotYet, "{second}");
        }
        assert_eq!(look(726), Listened::Enough);
        watch.was_deaf(began + Duration::from_secs(730));
        assert_eq!(look(735), Listened::NotYet);
        assert_eq!(look(750), Listened::NotYet);
        assert_eq!(look(765), Listened::NotYet);
        assert_eq!(look(780), Listened::NotYet);
        assert_eq!(look(791), Listened::Enough);
    }
}
