//! Builds of templates of the platform: by a recipe in a sandbox of the platform's team, of which a snapshot is the template.
//!
//! ```text
//!   take one (lease) -> sandbox -> archive -> pre-build -> recipe -> healthcheck -> post-build -> snapshot (an operation)
//! ```
//!
//! A replica that dies leaves its lease: another takes the build, from its beginning. What ended builds leave is found by [`clean`].

mod guest;
mod log;
mod maker;
pub(crate) mod recipe;
mod run;

use std::sync::Arc;

use store::StoreError;
use store::audit::Actor;
use store::wishes::KillWish;
use tokio::sync::Semaphore;

use crate::app::App;
use crate::hints::again_and_again;
use crate::reconcile::driver;

pub use run::steps;

/// On one replica. Most of the time they wait for a guest.
const AT_ONCE: usize = 2;

/// In the audit log.
pub const ACTOR: &str = "builds";

/// For as long as the replica lives.
pub async fn work(app: App) {
    let room = Arc::new(Semaphore::new(AT_ONCE));
    again_and_again(&app, "the taking of builds", &app.builds, || take(&app, &room)).await;
}

async fn take(app: &App, room: &Arc<Semaphore>) -> Result<(), StoreError> {
    while let Ok(place) = room.clone().try_acquire_owned() {
        let Some(build) = app.store.take_build().await? else { return Ok(()) };
        let _ = crashpoint::hit("cp.build.taken");
        let app = app.clone();
        app.clone().tracker.spawn(async move {
            run::run(&app, build).await;
            drop(place);
            app.builds.hint();
        });
    }
    Ok(())
}

/// Ends those of which nothing can come, and what ended ones have left.
pub async fn clean(app: App) -> Result<(), StoreError> {
    app.store.let_ready_snapshots_take_their_place().await?;
    app.store.fail_lost_builds().await?;
    for (team, sandbox) in app.store.sandboxes_of_ended_builds().await? {
        let wished = app.store.wish_killed(team, &sandbox, &app.lease(), &Actor::platform(ACTOR)).await?;
        if let KillWish::Opened(operation) = wished {
            driver::work(&app, operation, None);
        }
    }
    Ok(())
}
