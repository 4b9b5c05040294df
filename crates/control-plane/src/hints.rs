//! Work that waits in the database: looked for when somebody says that there is some, and every second in any case, because hints get lost.

use std::future::Future;
use std::time::Duration;

use futures::FutureExt as _;
use rand::Rng as _;
use store::StoreError;
use tokio::sync::Notify;
use tracing::{error, warn};

use crate::app::App;

/// For what another replica has written, and for what is tried again.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Says that there is something to do.
#[derive(Debug, Default)]
pub struct Hint(Notify);

impl Hint {
    pub fn hint(&self) {
        self.0.notify_one();
    }
}

/// For as long as the replica lives: whatever becomes of it once, it is done again.
pub async fn again_and_again<F: Future<Output = Result<(), StoreError>>>(
    app: &App,
    what: &str,
    hint: &Hint,
    work: impl Fn() -> F,
) {
    let mut is_down = false;
    loop {
        let jitter = 0.8 + 0.4 * rand::rng().random::<f64>();
        tokio::select! {
            () = app.stop.cancelled() => return,
            () = hint.0.notified() => {}
            () = tokio::time::sleep(LOOK_EVERY.mul_f64(jitter)) => {}
        }
        match std::panic::AssertUnwindSafe(work()).catch_unwind().await {
            Ok(Ok(())) => is_down = false,
            // Said once: the database is away, and for longer than a second.
            Ok(Err(error)) if error.is_unavailable() => {
                if !std::mem::replace(&mut is_down, true) {
                    warn!("{what} waits for the database");
                }
            }
            Ok(Err(error)) => error!(error = ?error, "{what}: {error}"),
            Err(_) => error!("{what} panicked and goes on"),
        }
    }
}
