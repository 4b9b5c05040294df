//! Delivers what was written into the outbox, on every replica. What is due is taken for a while, so that no two deliver it at once, and
//! what a replica had taken when it was killed is taken by another when that while is over.

use std::time::Duration;

use chrono::Utc;
use futures::{StreamExt as _, stream};
use rand::Rng as _;
use store::StoreError;
use store::outbox::Taken;
use tracing::warn;

use crate::app::App;
use crate::hints::again_and_again;
use crate::mail::{self, Undelivered};

/// Taken at once, and delivered at the same time: well within a lease.
const BATCH_MAX: usize = 16;
/// After so many tries it is given up, which is after about a day.
const ATTEMPTS_MAX: i32 = 150;
const AGAIN_FIRST: Duration = Duration::from_secs(2);
const AGAIN_MAX: Duration = Duration::from_secs(600);

/// For as long as the replica lives.
pub async fn deliver(app: App) {
    again_and_again(&app, "the outbox", &app.outbox, || all_due(&app)).await;
}

async fn all_due(app: &App) -> Result<(), StoreError> {
    loop {
        let limit = i64::try_from(BATCH_MAX).expect("a small number");
        let taken = app.store.take_outgoing(limit).await?;
        let is_last = taken.len() < BATCH_MAX;
        let done: Vec<Result<(), StoreError>> =
            stream::iter(taken).map(|taken| one(app, taken)).buffer_unordered(BATCH_MAX).collect().await;
        done.into_iter().collect::<Result<(), StoreError>>()?;
        if is_last || app.stop.is_cancelled() {
            return Ok(());
        }
    }
}

async fn one(app: &App, taken: Taken) -> Result<(), StoreError> {
    if taken.expires_at <= Utc::now() {
        return given_up(app, &taken, "its time was over").await;
    }
    match attempt(app, &taken).await {
        Ok(()) => {
            let _ = crashpoint::hit("cp.outbox.delivered");
            app.store.outgoing_delivered(&taken).await
        }
        Err(Undelivered::Never(problem)) => given_up(app, &taken, &problem).await,
        Err(Undelivered::Later(problem)) if taken.attempts >= ATTEMPTS_MAX => given_up(app, &taken, &problem).await,
        Err(Undelivered::Later(problem)) => {
            let after = pause_after(taken.attempts);
            let (id, seconds) = (taken.id, after.as_secs());
            warn!("{} {id} was not delivered, and is tried again in {seconds} s: {problem}", taken.kind);
            app.store.put_off_outgoing(&taken, after).await
        }
    }
}

async fn attempt(app: &App, taken: &Taken) -> Result<(), Undelivered> {
    match taken.kind.as_str() {
        mail::KIND => {
            let never = || Undelivered::Never("it was sealed by another secret, or is damaged".to_owned());
            let letter = mail::opened(&app.secret, taken).map_err(|_| never())?;
            app.accounts.mail.deliver(&letter).await
        }
        // A newer program wrote it, and delivers it.
        other => Err(Undelivered::Later(format!("this program does not know what {other} is"))),
    }
}

async fn given_up(app: &App, taken: &Taken, problem: &str) -> Result<(), StoreError> {
    warn!("{} {} is given up after {} tries: {problem}", taken.kind, taken.id, taken.attempts);
    app.store.give_up_outgoing(taken, problem).await
}

/// How long to wait after so many tries.
pub fn pause_after(attempts: i32) -> Duration {
    pause(attempts, rand::rng().random::<f64>())
}

/// Twice as long each time, and not the same for all that failed together. `random` is from 0 to 1.
fn pause(attempts: i32, random: f64) -> Duration {
    let doubled = AGAIN_FIRST.saturating_mul(1 << attempts.saturating_sub(1).clamp(0, 16));
    doubled.min(AGAIN_MAX).mul_f64(0.5 + random / 2.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_and_end_growing() {
        assert_eq!(pause(1, 1.0), AGAIN_FIRST);
        assert_eq!(pause(2, 1.0), AGAIN_FIRST * 2);
        assert_eq!(pause(2, 0.0), AGAIN_FIRST);
        assert_eq!(pause(i32::MAX, 1.0), AGAIN_MAX);
        assert_eq!(pause(0, 1.0), AGAIN_FIRST);
    }
}
