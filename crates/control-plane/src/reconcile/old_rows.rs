//! Removes what has served its time: idempotency keys after a day, ended operations after a week.

use store::StoreError;

use crate::app::App;

pub async fn run(app: App) -> Result<(), StoreError> {
    app.store.purge_idempotency().await?;
    app.store.purge_operations().await?;
    Ok(())
}
