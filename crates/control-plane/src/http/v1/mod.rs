//! The handlers of the public API v1: one file for each endpoint.

pub mod api_keys;
pub mod audit;
pub mod auth;
pub mod builds;
pub mod channels;
pub mod events;
pub mod fleet;
pub mod hosts;
pub mod invitations;
mod links;
pub mod me;
pub mod oauth;
pub mod quotas;
pub mod sandboxes;
pub mod snapshots;
pub mod teams;
pub mod templates;
pub mod users;

use std::future::Future;
use std::time::Duration;

use store::StoreError;

use super::errors::ApiError;
use crate::app::App;

/// The caller waits for a state change no longer than this; the change goes on, and whoever asks again finds what became of it.
const CHANGE_TIME_MAX: Duration = Duration::from_secs(20);

/// Runs a state change in a task of its own: a client that leaves changes nothing.
fn detached<T: Send + 'static>(
    app: &App,
    change: impl Future<Output = Result<T, StoreError>> + Send + 'static,
) -> impl Future<Output = Result<T, ApiError>> {
    let task = app.tracker.spawn(change);
    async move {
        match tokio::time::timeout(CHANGE_TIME_MAX, task).await {
            Ok(Ok(done)) => Ok(done?),
            Ok(Err(_)) => Err(ApiError::internal()),
            Err(_) => Err(ApiError::unavailable()),
        }
    }
}
