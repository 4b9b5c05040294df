//! What this replica counts of itself, and what it looks up of the platform for whoever reads its metrics.
//!
//! Gauges of the platform are the same on every replica: they come from the database. When that is away they are NaN, so that no rule
//! compares with what was true before.

mod table;

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use axum::extract::MatchedPath;
use axum::response::Response;
use http::Method;
use metrics::{counter, gauge, histogram};
use store::measures::Numbers;
use store::placement::Shortage;
use store::quotas::Quota;
use tokio::time::Instant;

use crate::agents::AgentError;
use crate::app::App;

pub use table::{HOST_STATES, KINDS, RECONCILERS, SANDBOX_STATES, TABLE};

/// A thing that is counted for as long as it is there.
pub struct Counted(metrics::Gauge);

impl Counted {
    fn new(gauge: metrics::Gauge) -> Self {
        gauge.increment(1.0);
        Self(gauge)
    }

    pub fn request() -> Self {
        Self::new(gauge!("wrenn_http_requests_in_flight"))
    }

    pub fn exec_stream() -> Self {
        Self::new(gauge!("wrenn_streams_open", "kind" => "exec"))
    }

    pub fn event_stream() -> Self {
        Self::new(gauge!("wrenn_streams_open", "kind" => "events"))
    }

    pub fn process_stream() -> Self {
        Self::new(gauge!("wrenn_streams_open", "kind" => "process"))
    }

    pub fn terminal() -> Self {
        Self::new(gauge!("wrenn_streams_open", "kind" => "terminal"))
    }

    pub fn file_stream() -> Self {
        Self::new(gauge!("wrenn_streams_open", "kind" => "file"))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.decrement(1.0);
    }
}

/// A request whose answer begins.
pub fn answered(route: Option<&MatchedPath>, method: &Method, response: &Response, took: Duration) {
    let route = route.map_or_else(|| "none".to_owned(), |route| route.as_str().to_owned());
    let method = match method.as_str() {
        "GET" => "GET",
        "POST" => "POST",
        "PUT" => "PUT",
        "PATCH" => "PATCH",
        "DELETE" => "DELETE",
        "HEAD" => "HEAD",
        "OPTIONS" => "OPTIONS",
        _ => "other",
    };
    let status = match response.status().as_u16() {
        ..200 => "1xx",
        200..300 => "2xx",
        300..400 => "3xx",
        400..500 => "4xx",
        500.. => "5xx",
    };
    histogram!("wrenn_http_request_duration_seconds", "route" => route, "method" => method, "status" => status)
        .record(took);
}

pub fn over_quota(quota: Quota) {
    counter!("wrenn_quota_refusals_total", "quota" => quota.as_str()).increment(1);
}

pub fn not_placed(shortage: &Shortage) {
    for dimension in &shortage.0 {
        counter!("wrenn_placement_failures_total", "short" => dimension.as_str()).increment(1);
    }
}

/// By hosts that should have had room.
pub fn refused_by_hosts() {
    counter!("wrenn_placement_failures_total", "short" => "refused").increment(1);
}

pub fn heartbeat(outcome: &'static str) {
    counter!("wrenn_heartbeats_total", "outcome" => outcome).increment(1);
}

pub fn host_call_failed(error: &AgentError) {
    let cause = match error {
        AgentError::Unreachable => "unreachable",
        AgentError::NoAnswer => "no_answer",
        AgentError::NotReady => "not_ready",
        AgentError::Stale => "stale",
        AgentError::NoRoom => "no_room",
        AgentError::UnknownSandbox => "unknown_sandbox",
        AgentError::UnknownTemplate => "unknown_template",
        AgentError::UnknownSnapshot => "unknown_snapshot",
        AgentError::NoDisk => "no_disk",
        AgentError::NotSaved { .. } => "not_saved",
        AgentError::NotRunning => "not_running",
        AgentError::GuestDiskFull => "guest_disk_full",
        AgentError::TooManyStreams => "too_many_streams",
        AgentError::DeadlineExceeded => "deadline_exceeded",
        AgentError::Refused { .. } => "refused",
        AgentError::Misbehaved { .. } => "misbehaved",
    };
    counter!("wrenn_host_call_failures_total", "cause" => cause).increment(1);
}

/// When each reconciler of this replica last ended well.
pub struct Runs {
    ended: Mutex<HashMap<&'static str, Beat>>,
}

struct Beat {
    well: Instant,
    period: Duration,
    /// However it ended.
    turned: Instant,
    turn_max: Duration,
}

impl Runs {
    pub fn new() -> Self {
        Self { ended: Mutex::default() }
    }

    /// It begins to be run; from now on it is late when it is not, and stuck when no run of it ends for `turn_max`.
    pub fn expect(&self, reconciler: &'static str, period: Duration, turn_max: Duration) {
        let now = Instant::now();
        self.lock().insert(reconciler, Beat { well: now, period, turned: now, turn_max });
    }

    /// One whose runs do not end.
    pub fn stuck(&self) -> Option<&'static str> {
        let stuck = |(name, beat): (&&'static str, &Beat)| (beat.turned.elapsed() > beat.turn_max).then_some(*name);
        self.lock().iter().find_map(stuck)
    }

    pub fn ended(&self, reconciler: &'static str, outcome: &'static str, took: Duration) {
        if let Some(beat) = self.lock().get_mut(reconciler) {
            beat.turned = Instant::now();
            if outcome == "ok" {
                beat.well = beat.turned;
            }
        }
        let labels = [("reconciler", reconciler), ("outcome", outcome)];
        histogram!("wrenn_reconciler_run_duration_seconds", &labels).record(took);
    }

    fn tell(&self) {
        for (reconciler, beat) in self.lock().iter() {
            let lag = beat.well.elapsed().saturating_sub(beat.period);
            gauge!("wrenn_reconcile_lag_seconds", "reconciler" => *reconciler).set(lag.as_secs_f64());
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<&'static str, Beat>> {
        self.ended.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for Runs {
    fn default() -> Self {
        Self::new()
    }
}

/// Looks up what is told of the platform; false when the database did not answer.
pub async fn look(app: App) -> bool {
    app.runs.tell();
    let connections = app.store.connections();
    gauge!("wrenn_database_connections", "state" => "used").set(connections.used);
    gauge!("wrenn_database_connections", "state" => "idle").set(connections.idle);
    gauge!("wrenn_database_connections_max").set(connections.max);
    gauge!("wrenn_operations_running").set(telemetry::counted(app.driver.running()));
    // Before the question, in case that nobody waits for its answer.
    gauge!("wrenn_database_up").set(0.0);
    tell(None);
    let numbers = app.store.numbers().await;
    gauge!("wrenn_database_up").set(if numbers.is_ok() { 1.0 } else { 0.0 });
    tell(numbers.as_ref().ok());
    numbers.is_ok()
}

/// None: they are not known.
fn tell(numbers: Option<&Numbers>) {
    let known = |count: Option<i64>| count.map_or(f64::NAN, |count| count as f64);
    let of = |list: fn(&Numbers) -> &[(String, i64)], word: &str| {
        let found = numbers.map(|numbers| list(numbers).iter().find(|(state, _)| state == word));
        known(found.map(|found| found.map_or(0, |(_, count)| *count)))
    };
    for state in HOST_STATES {
        gauge!("wrenn_hosts", "state" => *state).set(of(|numbers| &numbers.hosts, state));
        gauge!("wrenn_team_hosts", "state" => *state).set(of(|numbers| &numbers.team_hosts, state));
    }
    for state in SANDBOX_STATES {
        gauge!("wrenn_sandboxes", "state" => *state).set(of(|numbers| &numbers.sandboxes, state));
    }
    for kind in KINDS {
        let found = numbers.map(|numbers| numbers.operations.iter().find(|operations| operations.kind == *kind));
        let open = found.map(|found| found.map_or(0, |operations| operations.count));
        let oldest = found.map(|found| found.map_or(0.0, |operations| operations.oldest_sec));
        gauge!("wrenn_operations_open", "kind" => *kind).set(known(open));
        gauge!("wrenn_operation_oldest_seconds", "kind" => *kind).set(oldest.unwrap_or(f64::NAN));
    }
    let overdue = numbers.map(|numbers| numbers.operations.iter().map(|operations| operations.overdue).sum());
    gauge!("wrenn_operations_overdue").set(known(overdue));
    gauge!("wrenn_copied_hosts").set(known(numbers.map(|numbers| numbers.copied_hosts)));
    gauge!("wrenn_lost_sandboxes").set(of(|numbers| &numbers.sandboxes, "lost"));
    gauge!("wrenn_unclaimed_sandboxes").set(known(numbers.map(|numbers| numbers.unclaimed)));
    gauge!("wrenn_brake_active").set(known(numbers.map(|numbers| numbers.is_braked.into())));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_one_each_and_say_their_unit() {
        assert_eq!(telemetry::misnamed(TABLE), Vec::<&str>::new());
    }

    #[test]
    fn words_of_labels_are_those_of_the_things() {
        let words = |name: &str, label: &str| -> Vec<&str> {
            let metric = TABLE.iter().find(|metric| metric.name == name).unwrap();
            match metric.labels.iter().find(|known| known.name == label).unwrap().words {
                telemetry::Words::Of(words) => words.to_vec(),
                telemetry::Words::Open(_) => panic!("{name} {label} is open"),
            }
        };
        let quotas: Vec<&str> = Quota::ALL.iter().map(|quota| quota.as_str()).collect();
        assert_eq!(words("wrenn_quota_refusals_total", "quota"), quotas);
        for state in SANDBOX_STATES {
            assert!(state.parse::<model::sandbox::Observed>().is_ok(), "{state}");
        }
    }
}
