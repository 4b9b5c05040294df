//! The normal path and the repair path: carries out wishes, and finds what nobody carries out.
//!
//! A reconciler takes no input, may run twice at once, and bounds its work. Its loop survives whatever one run ends in.

mod absent_sandboxes;
pub mod driver;
mod expired_sandboxes;
mod run;
pub mod silent_hosts;
mod snapshots;

use std::future::Future;
use std::time::Duration;

use futures::FutureExt as _;
use rand::Rng as _;
use store::StoreError;
use tokio::time::Instant;
use tracing::{error, warn};

use crate::app::App;
use crate::channels::deliver;
use crate::{builds, events, outbox};

/// How long it takes at least until a fail-over of the database is followed.
const PRIMARY_EVERY: Duration = Duration::from_secs(2);
/// How often it is looked for what is this replica's and not worked on.
const FORGOTTEN_EVERY: Duration = Duration::from_secs(2);
const EXPIRED_EVERY: Duration = Duration::from_secs(1);
const UNFULFILLED_EVERY: Duration = Duration::from_secs(10);
const ABSENT_EVERY: Duration = Duration::from_secs(2);
const UNWANTED_SNAPSHOTS_EVERY: Duration = Duration::from_secs(1);
const ENDED_BUILDS_EVERY: Duration = Duration::from_secs(2);
const OLD_ROWS_EVERY: Duration = Duration::from_secs(600);
/// A quarter of a day is summed up so long after its end at the latest, but for what it takes to settle.
const USAGE_EVERY: Duration = Duration::from_secs(300);
const CLIENT_CERTIFICATE_EVERY: Duration = Duration::from_secs(86_400);
const PRESENCE_CHECK_EVERY: Duration = Duration::from_secs(5);

/// A run asks a hundred hosts at most, most of which answer at once.
const RUN_TIME_MAX: Duration = Duration::from_secs(120);
const JITTER_MAX: f64 = 1.2;

pub fn start(app: &App) {
    let tracker = &app.tracker;
    tracker.spawn(app.outcomes.clone().listen(app.driver.clone(), app.end.clone()));
    tracker.spawn(every(app.clone(), "client_certificate", CLIENT_CERTIFICATE_EVERY, |app| async move {
        match app.authority.client_config(chrono::Utc::now()) {
            Ok(config) => app.agents.renew(&config),
            Err(cause) => error!("the certificate for calls to hosts cannot be renewed: {cause}"),
        }
        Ok(())
    }));
    tracker.spawn(every(app.clone(), "primary", PRIMARY_EVERY, |app| async move {
        app.store.follow_primary().await;
        Ok(())
    }));
    if app.roles.api {
        tracker.spawn(events::read(app.clone()));
    }
    if !app.roles.workers {
        return;
    }
    tracker.spawn(presence(app.clone()));
    tracker.spawn(driver::claim(app.clone()));
    tracker.spawn(every(app.clone(), "forgotten_operations", FORGOTTEN_EVERY, driver::put_down_forgotten));
    tracker.spawn(outbox::deliver(app.clone()));
    tracker.spawn(deliver::deliver(app.clone()));
    tracker.spawn(builds::work(app.clone()));
    tracker.spawn(every(app.clone(), "ended_builds", ENDED_BUILDS_EVERY, builds::clean));
    tracker.spawn(every(app.clone(), "expired_sandboxes", EXPIRED_EVERY, expired_sandboxes::run));
    tracker.spawn(every(app.clone(), "unfulfilled", UNFULFILLED_EVERY, |app| async move {
        app.store.reopen_unfulfilled().await.map(drop)
    }));
    tracker.spawn(every(app.clone(), "absent_sandboxes", ABSENT_EVERY, absent_sandboxes::run));
    tracker.spawn(every(app.clone(), "unwanted_snapshots", UNWANTED_SNAPSHOTS_EVERY, snapshots::remove_unwanted));
    tracker.spawn(every(app.clone(), "silent_hosts", silent_hosts::EVERY, silent_hosts::run));
    tracker.spawn(every(app.clone(), "old_rows", OLD_ROWS_EVERY, |app| async move {
        app.store.remove_old_rows(app.audit_kept_days).await
    }));
    tracker.spawn(every(app.clone(), "usage", USAGE_EVERY, |app| async move {
        app.store.sum_stretches(chrono::Utc::now()).await
    }));
}

/// Runs a reconciler for ever, with jitter, so that replicas do not run it at the same instant.
async fn every<F, Run>(app: App, name: &'static str, period: Duration, run: F)
where
    F: Fn(App) -> Run,
    Run: Future<Output = Result<(), StoreError>> + Send,
{
    let mut was_down = false;
    app.runs.expect(name, period, period.mul_f64(JITTER_MAX) + RUN_TIME_MAX + Duration::from_secs(30));
    loop {
        let jitter = 0.8 + (JITTER_MAX - 0.8) * rand::rng().random::<f64>();
        tokio::select! {
            () = app.stop.cancelled() => return,
            () = tokio::time::sleep(period.mul_f64(jitter)) => {}
        }
        let began = Instant::now();
        let bounded = tokio::time::timeout(RUN_TIME_MAX, std::panic::AssertUnwindSafe(run(app.clone())).catch_unwind());
        let ended = match bounded.await {
            Ok(ended) => ended,
            Err(_) => {
                // What it wrote stands, and the next run goes on with the rest.
                warn!("reconciler {name} took longer than {RUN_TIME_MAX:?} and begins anew");
                app.runs.ended(name, "failed", began.elapsed());
                continue;
            }
        };
        let outcome = match &ended {
            Ok(Ok(())) => "ok",
            Ok(Err(cause)) if cause.is_unavailable() => "unavailable",
            Ok(Err(_)) => "failed",
            Err(_) => "panicked",
        };
        app.runs.ended(name, outcome, began.elapsed());
        match ended {
            Ok(Ok(())) => was_down = false,
            // Said once: the database is away for all of them, and for long.
            Ok(Err(cause)) if cause.is_unavailable() => {
                if !std::mem::replace(&mut was_down, true) {
                    warn!("reconciler {name} waits for the database");
                }
            }
            Ok(Err(cause)) => error!(error = ?cause, "reconciler {name}: {cause}"),
            Err(_) => error!("reconciler {name} panicked and goes on"),
        }
    }
}

/// Holds this replica's lock for as long as the process lives.
async fn presence(app: App) {
    loop {
        let held = async {
            match app.store.be_present(app.replica).await {
                Ok(presence) => presence.held(PRESENCE_CHECK_EVERY).await,
                Err(error) => error,
            }
        };
        tokio::select! {
            () = app.end.cancelled() => return,
            _ = held => {}
        }
        tokio::select! {
            () = app.end.cancelled() => return,
            () = tokio::time::sleep(Duration::from_secs(1)) => {}
        }
    }
}
