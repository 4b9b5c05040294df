//! The handlers of the public API v1: one file for each endpoint.

pub mod api_keys;
pub mod audit;
pub mod auth;
pub mod hosts;
pub mod invitations;
mod links;
pub mod me;
pub mod oauth;
pub mod quotas;
pub mod sandboxes;
pub mod snapshots;
pub mod teams;
pub mod users;

use std::future::Future;

use store::StoreError;

use super::errors::ApiError;
use crate::app::App;

/// Runs a state change in a task of its own: a client that leaves changes nothing.
fn detached<T: Send + 'static>(
    app: &App,
    change: impl Future<Output = Result<T, StoreError>> + Send + 'static,
) -> impl Future<Output = Result<T, ApiError>> {
    let task = app.tracker.spawn(change);
    async move {
        match task.await {
            Ok(done) => Ok(done?),
            Err(_) => Err(ApiError::internal()),
        }
    }
}
