//! Pauses or kills sandboxes whose deadline has passed, and those that have been idle for too long. A deadline is a wish of whoever set it;
//! that something is idle is a host's word, and waits while most hosts are silent.

use store::StoreError;
use tracing::info;

use crate::app::App;

pub async fn run(app: App) -> Result<(), StoreError> {
    let count = app.store.expire_sandboxes().await?;
    if count > 0 {
        info!(count, "{count} sandboxes have reached their deadlines");
        app.driver.wake();
    }
    if app.store.is_braked().await? {
        return Ok(());
    }
    let count = app.store.end_idle_sandboxes().await?;
    if count > 0 {
        info!(count, "{count} sandboxes have been idle for too long");
        app.driver.wake();
    }
    Ok(())
}
