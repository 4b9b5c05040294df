//! Ends every sandbox of one WRENN_DIR, removes its snapshots and takes down what it has in the kernel. For `wrenn down`, when no agent runs.
//!
//! Asked for by a person, so it is the one place that ends sandboxes without a wish of the control plane.

use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;
use tracing::{error, info, warn};

use crate::config::Config;
use crate::gauges::Gauges;
use crate::run::{Base, RunError};
use crate::sandbox::steps::blocking;
use crate::sweep;

/// For one sandbox; all are ended at the same time.
const KILL_TIME_MAX: Duration = Duration::from_secs(60);

pub async fn stop_all(config: Config) -> Result<(), RunError> {
    if !config.dir.join("agent-id").exists() {
        info!("no agent has ever run in {}", config.dir.display());
        return Ok(());
    }
    // No new slots: only what is there is taken down.
    let base = Base::open(Config { slot_pool: 0, standbys: 0, ..config }).await?;
    let sandboxes = base.sandboxes(watch::channel(None).1, 0)?;
    sandboxes.recover().await?;
    let deadline = Instant::now() + KILL_TIME_MAX;
    let views = sandboxes.list();
    let count = views.len();
    let kills = views.into_iter().map(|view| {
        let sandboxes = sandboxes.clone();
        async move { sandboxes.ensure_killed(&view.id, view.fence, deadline).await.map(|view| view.observed) }
    });
    let mut left = 0;
    for result in futures::future::join_all(kills).await {
        match result {
            Ok(model::sandbox::Observed::Killed) => {}
            Ok(observed) => {
                left += 1;
                error!("a sandbox is still {observed}");
            }
            Err(cause) => {
                left += 1;
                error!("a sandbox could not be ended: {cause}");
            }
        }
    }
    sandboxes.stop(Duration::from_secs(1)).await;
    // VMMs of journals that are gone or in quarantine.
    let uids = base.tag.uids();
    for uid in blocking(move || sweep::living(uids)).await.unwrap_or_default() {
        if let Err(cause) = blocking(move || sweep::sweep(uid)).await {
            left += 1;
            error!("processes of uid {uid} could not be ended: {cause}");
        }
    }
    let snapshots = sandboxes.context().snapshots.clone();
    if let Err(cause) = blocking(move || snapshots.remove_all()).await {
        left += 1;
        error!("snapshots could not be removed: {cause}");
    }
    let dir = base.config.dir.clone();
    if let Err(cause) = blocking(move || Gauges::remove_all(&dir)).await {
        warn!("what sandboxes had taken is still written down: {cause}");
    }
    if left > 0 {
        return Err(RunError::Left(left));
    }
    base.ground.close().await?;
    info!(count, "ended {count} sandboxes and took down what they had");
    Ok(())
}
