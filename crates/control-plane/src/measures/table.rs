//! Every metric of the control plane. docs/how-to/monitoring.md says the same, which a test compares.

use telemetry::{Kind, Label, Metric, Words};

/// From an answer out of memory to a create that waits for its sandbox.
const REQUEST_BOUNDS: &[f64] =
    &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0];
/// From a create out of a saved state to a pause that has three minutes.
const OPERATION_BOUNDS: &[f64] =
    &[0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 180.0, 600.0, 3600.0];
const RUN_BOUNDS: &[f64] = &[0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 60.0];

pub const KINDS: &[&str] = &["run", "pause", "resume", "kill", "snapshot", "clean"];
pub const HOST_STATES: &[&str] = &["pending", "active", "draining", "fenced", "silent"];
pub const SANDBOX_STATES: &[&str] =
    &["starting", "running", "pausing", "paused", "resuming", "killing", "failed", "lost"];

const fn of(name: &'static str, words: &'static [&'static str]) -> Label {
    Label { name, words: Words::Of(words) }
}

const fn open(name: &'static str, bound: &'static str) -> Label {
    Label { name, words: Words::Open(bound) }
}

const fn counter(name: &'static str, labels: &'static [Label], help: &'static str) -> Metric {
    Metric { name, kind: Kind::Counter, labels, help, guards: None }
}

const fn gauge(name: &'static str, labels: &'static [Label], help: &'static str) -> Metric {
    Metric { name, kind: Kind::Gauge, labels, help, guards: None }
}

const fn seconds(name: &'static str, bounds: &'static [f64], labels: &'static [Label], help: &'static str) -> Metric {
    Metric { name, kind: Kind::Seconds(bounds), labels, help, guards: None }
}

const fn guarding(metric: Metric, invariants: &'static str) -> Metric {
    Metric { guards: Some(invariants), ..metric }
}

const KIND: Label = of("kind", KINDS);

pub const TABLE: &[Metric] = &[
    telemetry::BUILD,
    telemetry::SCRAPE_COMPLETE,
    telemetry::PANICS,
    // requests
    seconds(
        "wrenn_http_request_duration_seconds",
        REQUEST_BOUNDS,
        &[
            open("route", "the API's routes as they are written in its document, or `none`"),
            of("method", &["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "other"]),
            of("status", &["1xx", "2xx", "3xx", "4xx", "5xx"]),
        ],
        "From a request's arrival to the head of its answer",
    ),
    gauge("wrenn_http_requests_in_flight", &[], "Requests whose answer has not begun"),
    gauge(
        "wrenn_streams_open",
        &[of("kind", &["exec", "process", "terminal", "file", "events"])],
        "Commands, processes and terminals by WebSocket, downloads and listeners of events, that go on now",
    ),
    counter(
        "wrenn_quota_refusals_total",
        &[of("quota", &["sandboxes", "running", "vcpus", "memory_mb", "disk_mb", "creates_per_min"])],
        "Wishes that were refused because the team has as much as it may",
    ),
    counter(
        "wrenn_placement_failures_total",
        &[of("short", &["hosts", "team_hosts", "tags", "cpu", "memory", "disk", "refused"])],
        "Sandboxes that no host took, by each thing that was short; `refused`: hosts that should have had room said no or were not reached",
    ),
    // operations
    seconds(
        store::measures::OPERATION_SECONDS,
        OPERATION_BOUNDS,
        &[KIND, of("outcome", &["done", "failed", "superseded"])],
        "From a wish to its end, over all attempts and replicas",
    ),
    gauge("wrenn_operations_open", &[KIND], "Operations that have not ended, of the whole platform"),
    gauge("wrenn_operation_oldest_seconds", &[KIND], "Age of the oldest operation that has not ended"),
    gauge("wrenn_operations_running", &[], "Operations that this replica works on"),
    guarding(
        gauge("wrenn_operations_overdue", &[], "Operations that are open although their time was over 30 s ago"),
        "I14",
    ),
    counter(
        "wrenn_host_call_failures_total",
        &[of(
            "cause",
            &[
                "unreachable",
                "no_answer",
                "not_ready",
                "stale",
                "no_room",
                "unknown_sandbox",
                "unknown_template",
                "unknown_snapshot",
                "no_disk",
                "not_saved",
                "not_running",
                "guest_disk_full",
                "too_many_streams",
                "deadline_exceeded",
                "refused",
                "misbehaved",
            ],
        )],
        "Calls of host agents that did not end well, by what came of them",
    ),
    // reconcilers
    seconds(
        "wrenn_reconciler_run_duration_seconds",
        RUN_BOUNDS,
        &[RECONCILER, of("outcome", &["ok", "unavailable", "failed", "panicked"])],
        "Runs of reconcilers on this replica; `unavailable`: the database was away",
    ),
    guarding(
        gauge(
            "wrenn_reconcile_lag_seconds",
            &[RECONCILER],
            "Since a reconciler of this replica last ended well, beyond its period",
        ),
        "I10",
    ),
    // database
    gauge("wrenn_database_up", &[], "1 when the database answered for this page, else 0"),
    gauge("wrenn_database_connections", &[of("state", &["used", "idle"])], "Connections of this replica"),
    gauge("wrenn_database_connections_max", &[], "As many as this replica may have"),
    // fleet
    counter(
        "wrenn_heartbeats_total",
        &[of("outcome", &["taken", "differs", "repeated", "old_epoch", "unknown", "fenced", "copy", "failed"])],
        "Heartbeats of hosts; after one that `differs` in its digest comes a list, `repeated` and `old_epoch` say nothing new, `unknown` are of hosts that are none, `fenced` of two machines that speak as one host, `copy` of an old state of a host's disk",
    ),
    gauge(
        "wrenn_hosts",
        &[of("state", HOST_STATES)],
        "Hosts of the platform; `silent`: heard of no more for 90 s; `fenced`: two machines speak as it",
    ),
    gauge(
        "wrenn_team_hosts",
        &[of("state", HOST_STATES)],
        "Hosts of teams' own, which come and go as their teams like",
    ),
    gauge(
        "wrenn_copied_hosts",
        &[],
        "Hosts of the platform of which a copy was heard, with an old state of the disk, and refused; until they are unfenced",
    ),
    gauge(
        "wrenn_sandboxes",
        &[of("state", SANDBOX_STATES)],
        "Sandboxes by what was last observed, without those that were killed",
    ),
    guarding(gauge("wrenn_lost_sandboxes", &[], "Paused sandboxes whose host no longer has them"), "I1 I6"),
    guarding(
        gauge(
            "wrenn_unclaimed_sandboxes",
            &[],
            "Sandboxes that hosts of the platform have and the database does not know; they are left alone",
        ),
        "I6 I10",
    ),
    guarding(
        gauge("wrenn_brake_active", &[], "1 while so many hosts are silent that nothing is concluded from it"),
        "I41",
    ),
];

const RECONCILER: Label = of("reconciler", RECONCILERS);
/// All of them; `claim` takes up operations.
pub const RECONCILERS: &[&str] = &[
    "claim",
    "expired_sandboxes",
    "unfulfilled",
    "absent_sandboxes",
    "unwanted_snapshots",
    "ended_builds",
    "silent_hosts",
    "old_rows",
    "usage",
    "client_certificate",
    "primary",
    "forgotten_operations",
];
