//! What the agent counts of itself, and what it looks up for whoever reads its metrics.

mod table;

use std::sync::Arc;
use std::time::Duration;

use metrics::{counter, gauge, histogram};

use crate::agent::Agent;
use crate::heartbeat::Link;
use crate::sandbox::plan::Step;
use crate::sandbox::state::Cause;
use crate::sandbox::steps::{StepError, blocking};

pub use table::{CALLS, OBJECTS, STATES, TABLE, VERBS};

pub fn step(step: Step, took: Duration, result: &Result<(), StepError>) {
    let outcome = if result.is_ok() { "done" } else { "failed" };
    let labels = [("verb", step.verb()), ("step", step.name()), ("outcome", outcome)];
    histogram!("wrenn_agent_step_duration_seconds", &labels).record(took);
    if let Err(error) = result
        && error.cause() == Cause::Damaged
    {
        counter!("wrenn_agent_snapshot_corrupt_total").increment(1);
    }
}

/// `path` is that of the request, `status` that of its answer.
pub fn call(path: &str, status: http::StatusCode, took: Duration) {
    let name = path.rsplit('/').next().unwrap_or_default();
    // Others are nobody's words.
    let Some(call) = CALLS.iter().find(|call| **call == name) else { return };
    let outcome = match status.as_u16() {
        ..400 => "ok",
        503 => "unavailable",
        400..500 => "refused",
        500.. => "failed",
    };
    histogram!("wrenn_agent_call_duration_seconds", "call" => *call, "outcome" => outcome).record(took);
}

pub fn heartbeat(outcome: &'static str) {
    counter!("wrenn_agent_heartbeats_total", "outcome" => outcome).increment(1);
}

pub fn sandbox_exited() {
    counter!("wrenn_agent_sandbox_exits_total").increment(1);
}

pub fn leaked() {
    counter!("wrenn_agent_leaked_total").increment(1);
}

pub fn stale_refused() {
    counter!("wrenn_agent_stale_commands_refused_total").increment(1);
}

pub fn pause_rolled_back() {
    counter!("wrenn_agent_pause_rollback_total").increment(1);
}

/// Looks up what is told of the host; false when not all could be.
pub async fn look(agent: Arc<Agent>) -> bool {
    let views = agent.sandboxes.list();
    for state in STATES {
        let found = views.iter().filter(|view| view.observed.as_str() == *state).count();
        gauge!("wrenn_agent_sandboxes", "state" => *state).set(telemetry::counted(found));
    }
    let is_up = *agent.link.borrow() == Link::Attached;
    gauge!("wrenn_agent_link_up").set(if is_up { 1.0 } else { 0.0 });
    let context = agent.sandboxes.context();
    let standbys = context.standbys.as_ref().map_or(0, |standbys| standbys.ready());
    gauge!("wrenn_agent_standbys").set(telemetry::counted(standbys));
    let journal = context.journal.clone();
    let quarantined = blocking(move || journal.quarantined()).await;
    gauge!("wrenn_agent_quarantined_sandboxes")
        .set(quarantined.as_ref().map_or(f64::NAN, |found| telemetry::counted(*found)));
    let room = (context.room)().await;
    let mib = |mib: u64| mib as f64 * f64::from(1 << 20);
    gauge!("wrenn_agent_memory_bytes", "what" => "total").set(mib(room.memory_total_mib));
    gauge!("wrenn_agent_memory_bytes", "what" => "available").set(mib(room.memory_available_mib));
    gauge!("wrenn_agent_disk_bytes", "what" => "total").set(mib(room.disk_total_mib));
    gauge!("wrenn_agent_disk_bytes", "what" => "free").set(mib(room.disk_free_mib));
    let objects = agent.objects().await;
    for kind in OBJECTS {
        let found = objects.get(*kind).map_or(f64::NAN, |count| *count as f64);
        gauge!("wrenn_agent_objects", "kind" => *kind).set(found);
    }
    quarantined.is_ok()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::sandbox::plan::{Create, Down, Pause, Revert, Snapshot};

    #[test]
    fn names_are_one_each_and_say_their_unit() {
        assert_eq!(telemetry::misnamed(TABLE), Vec::<&str>::new());
    }

    #[test]
    fn every_step_has_its_words_in_the_table() {
        let metric = TABLE.iter().find(|metric| metric.name == "wrenn_agent_step_duration_seconds").unwrap();
        let words = |label: &str| match metric.labels.iter().find(|known| known.name == label).unwrap().words {
            telemetry::Words::Of(words) => words,
            telemetry::Words::Open(_) => panic!("{label} is open"),
        };
        let mut steps: Vec<Step> = vec![Step::GiveUp, Step::Copy];
        steps.extend(Create::ALL.map(Step::Create));
        steps.extend(Pause::ALL.map(Step::Pause));
        steps.extend(Snapshot::ALL.map(Step::Snapshot));
        steps.extend(Revert::ALL.map(Step::Revert));
        steps.extend(Down::FAIL.map(Step::Fail));
        steps.extend(Down::FAIL.map(Step::Park));
        steps.extend(Down::KILL.map(Step::Kill));
        for step in &steps {
            assert!(words("verb").contains(&step.verb()), "{step:?}");
            assert!(words("step").contains(&step.name()), "{step:?}");
        }
        let used: BTreeSet<&str> = steps.iter().map(|step| step.name()).collect();
        assert_eq!(used, words("step").iter().copied().collect());
    }
}
