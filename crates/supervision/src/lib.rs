//! What a program and who starts it say to each other: that it serves, that it lives, that it ends (systemd's protocol; where nobody has
//! asked, nothing is said), and the names of the settings that it is given. Used by control plane, host agent and CLI.

pub mod settings;

use std::time::Duration;

use sd_notify::NotifyState;
use tracing::{error, warn};

/// It serves.
pub fn ready() {
    say(NotifyState::Ready);
}

/// It has begun to end.
pub fn ending() {
    say(NotifyState::Stopping);
}

/// Says again and again that this program's runtime still runs its tasks, for as long as it does: a runtime whose threads are all blocked
/// runs this one no more, and the manager ends and starts the program. Never returns where that is wished, else at once.
pub async fn keep_alive() {
    keep_alive_while(|| None).await;
}

/// As [`keep_alive`], for as long as `stuck` names nothing, too: of a program whose runtime runs and which does its work no more.
pub async fn keep_alive_while(stuck: impl Fn() -> Option<&'static str>) {
    let Some(limit) = sd_notify::watchdog_enabled() else { return };
    let mut every = tokio::time::interval(pace(limit));
    let mut told = None;
    loop {
        every.tick().await;
        let stuck = stuck();
        match stuck {
            None => say(NotifyState::Watchdog),
            Some(name) if told != stuck => {
                error!("{name} is stuck; the service manager is no longer told that this program lives")
            }
            Some(_) => {}
        }
        told = stuck;
    }
}

/// Twice would do; a machine that is far overloaded gets another chance.
fn pace(limit: Duration) -> Duration {
    (limit / 3).max(Duration::from_millis(1))
}

fn say(state: NotifyState<'_>) {
    if let Err(error) = sd_notify::notify(&[state]) {
        warn!("the service manager was not told: {error}");
    }
}
