//! What happens when an actor dies: it is logged as an error and started again from its journal, after a pause. Until then the sandbox is
//! shown as it was last, keeps its slot and its user, and wishes for it are told to come again.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt as _;
use model::ids::SandboxId;
use tracing::error;

use super::Sandboxes;
use super::actor::Actor;
use crate::control_plane::BackOff;

const RESTART_PAUSE: Duration = Duration::from_secs(1);
/// For a journal that cannot be read.
const RESTART_PAUSE_MAX: Duration = Duration::from_secs(60);

pub async fn supervise(sandboxes: Arc<Sandboxes>, id: SandboxId, actor: Actor) {
    let end = AssertUnwindSafe(actor.run(sandboxes.stop.clone())).catch_unwind().await;
    if end.is_ok() {
        sandboxes.forget(&id);
        sandboxes.context.changed.notify_one();
        return;
    }
    sandboxes.hold(&id);
    error!(sandbox.id = %id, "the task of sandbox {id} died; it is taken up again from its journal");
    let mut pause = BackOff::new(RESTART_PAUSE, RESTART_PAUSE_MAX);
    loop {
        tokio::select! {
            () = tokio::time::sleep(pause.next(rand::random()).max(RESTART_PAUSE)) => {}
            () = sandboxes.stop.cancelled() => return,
        }
        match sandboxes.take_up_again(&id).await {
            Ok(()) => return,
            Err(error) => error!(sandbox.id = %id, "sandbox {id} is not taken up again yet: {error}"),
        }
    }
}
