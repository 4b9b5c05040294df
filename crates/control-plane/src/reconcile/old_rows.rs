//! Removes what has served its time: idempotency keys after a day, ended operations after a week, sessions and links when their time is over.

use store::StoreError;

use crate::app::App;

pub async fn run(app: App) -> Result<(), StoreError> {
    app.store.purge_idempotency().await?;
    app.store.purge_operations().await?;
    app.store.purge_sessions().await?;
    app.store.purge_account_tokens().await?;
    app.store.purge_sign_ups().await?;
    app.store.purge_invitations().await?;
    app.store.purge_attempts().await?;
    app.store.purge_outbox().await?;
    Ok(())
}
