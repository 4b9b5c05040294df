//! Delivers notifications, on every replica: of each channel one at a time, in the order in which things happened.
//!
//! What is not delivered is tried again for most of an hour, and then left out; the channel says why. A replica that is killed between the
//! delivery and the note of it delivers twice: receivers know a notification by its id.

use api::v1::channels::News;
use chrono::Utc;
use futures::{StreamExt as _, stream};
use store::StoreError;
use store::channels::Notification;
use tracing::warn;

use super::guard::CallError;
use super::provider::{Config, Provider};
use crate::app::App;
use crate::hints::again_and_again;
use crate::outbox;

/// Taken at once, and delivered at the same time: well within a lease.
const BATCH_MAX: usize = 64;
/// With pauses that double from two seconds to ten minutes.
const ATTEMPTS_MAX: i32 = 12;

/// For as long as the replica lives.
pub async fn deliver(app: App) {
    again_and_again(&app, "the delivery of notifications", &app.notifications, || all_due(&app)).await;
}

async fn all_due(app: &App) -> Result<(), StoreError> {
    loop {
        let limit = i64::try_from(BATCH_MAX).expect("a small number");
        let taken = app.store.take_notifications(limit).await?;
        // Where one was delivered, the next of its channel may be due.
        let is_last = taken.is_empty();
        let done: Vec<Result<(), StoreError>> =
            stream::iter(taken).map(|taken| one(app, taken)).buffer_unordered(BATCH_MAX).collect().await;
        done.into_iter().collect::<Result<(), StoreError>>()?;
        if is_last || app.stop.is_cancelled() {
            return Ok(());
        }
    }
}

async fn one(app: &App, notification: Notification) -> Result<(), StoreError> {
    let Notification { taken, channel, .. } = &notification;
    if taken.expires_at <= Utc::now() {
        return app.store.outgoing_delivered(taken).await;
    }
    let problem = match attempt(app, &notification).await {
        Ok(()) => {
            app.store.outgoing_delivered(taken).await?;
            return app.store.note_delivery(*channel, None).await;
        }
        Err(problem) => problem,
    };
    app.store.note_delivery(*channel, Some(&problem)).await?;
    if taken.attempts >= ATTEMPTS_MAX {
        warn!("{channel}: a notification is left out after {} tries: {problem}", taken.attempts);
        return app.store.outgoing_delivered(taken).await;
    }
    app.store.put_off_outgoing(taken, outbox::pause_after(taken.attempts)).await
}

/// Why it was not delivered, for the team that the channel is of.
async fn attempt(app: &App, notification: &Notification) -> Result<(), String> {
    let damaged = || "what is kept of the channel cannot be read; set its configuration anew".to_owned();
    let provider: Provider = notification.provider.parse().map_err(|_| damaged())?;
    let name = sealed_name(&notification.channel.to_string());
    let config = app.secret.open(&notification.config, &name).map_err(|_| damaged())?;
    let config: Config = serde_json::from_slice(&config).map_err(|_| damaged())?;
    let news: News = serde_json::from_slice(&notification.taken.sealed).map_err(|_| damaged())?;
    let request = provider.request(&config, notification.taken.id, &news).ok_or_else(damaged)?;
    app.guarded.call(request).await.map_err(|error: CallError| error.to_string())
}

/// The name under which a channel's configuration is sealed: another channel's does not open.
pub fn sealed_name(channel: &str) -> String {
    format!("channel {channel}")
}
