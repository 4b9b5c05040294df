//! Pauses or kills sandboxes whose deadline has passed, and those that have been idle for too long.

use store::StoreError;
use tracing::info;

use crate::app::App;

pub async fn run(app: App) -> Result<(), StoreError> {
    let count = app.store.expire_sandboxes().await?;
    if count > 0 {
        info!(count, "{count} sandboxes have reached their deadlines");
        app.driver.wake();
    }
    let count = app.store.end_idle_sandboxes().await?;
    if count > 0 {
        info!(count, "{count} sandboxes have been idle for too long");
        app.driver.wake();
    }
    Ok(())
}
