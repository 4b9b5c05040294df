//! Kills sandboxes whose deadline has passed.

use store::StoreError;
use tracing::info;

use crate::app::App;

pub async fn run(app: App) -> Result<(), StoreError> {
    let count = app.store.expire_sandboxes().await?;
    if count > 0 {
        info!(count, "{count} sandboxes have reached their deadlines");
        app.driver.wake();
    }
    Ok(())
}
