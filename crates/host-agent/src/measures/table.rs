//! Every metric of the host agent. docs/how-to/monitoring.md says the same, which a test compares.

use telemetry::{Kind, Label, Metric, Words};

/// From a rename to a create that boots under emulation.
const STEP_BOUNDS: &[f64] =
    &[0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0];
const CALL_BOUNDS: &[f64] = &[0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];

pub const STATES: &[&str] =
    &["starting", "running", "pausing", "paused", "resuming", "killing", "killed", "failed", "lost"];
pub const VERBS: &[&str] = &["create", "give_up", "pause", "snapshot", "copy", "revert", "park", "fail", "kill"];
pub const CALLS: &[&str] = &[
    "EnsureRunning",
    "EnsurePaused",
    "EnsureKilled",
    "EnsureSnapshot",
    "RemoveSnapshot",
    "GetSandbox",
    "ListSandboxes",
    "Exec",
    "StartProcess",
    "ConnectProcess",
    "SendInput",
    "CloseStdin",
    "ResizeTerminal",
    "ListProcesses",
    "SignalProcess",
    "ReadFile",
    "WriteFile",
    "GetConsole",
    "GetHost",
];
/// What is counted of the machine; what cannot be counted is not told.
pub const OBJECTS: &[&str] = &[
    "sandboxes",
    "microvms",
    "disk_devices",
    "cgroups",
    "mounts",
    "loops",
    "sandbox_dirs",
    "run_dirs",
    "agent_fds",
    "agent_threads",
    "namespaces",
    "links",
    "taps",
    "nft_tables",
];
const STEPS: &[&str] = &[
    "reserve",
    "network",
    "cgroup",
    "disk",
    "memory",
    "start",
    "health",
    "template",
    "init",
    "commit",
    "begin",
    "quiet",
    "save",
    "seal",
    "continue",
    "thaw",
    "discard",
    "guest",
    "microvm",
    "files",
    "settle",
    "tombstone",
    "directory",
    "give_up",
    "copy",
];

const fn of(name: &'static str, words: &'static [&'static str]) -> Label {
    Label { name, words: Words::Of(words) }
}

const fn counter(name: &'static str, labels: &'static [Label], help: &'static str) -> Metric {
    Metric { name, kind: Kind::Counter, labels, help, guards: None }
}

const fn gauge(name: &'static str, labels: &'static [Label], help: &'static str) -> Metric {
    Metric { name, kind: Kind::Gauge, labels, help, guards: None }
}

const fn guarding(metric: Metric, invariants: &'static str) -> Metric {
    Metric { guards: Some(invariants), ..metric }
}

pub const TABLE: &[Metric] = &[
    telemetry::BUILD,
    telemetry::SCRAPE_COMPLETE,
    telemetry::PANICS,
    gauge("wrenn_agent_sandboxes", &[of("state", STATES)], "Sandboxes of this host"),
    Metric {
        name: "wrenn_agent_step_duration_seconds",
        kind: Kind::Seconds(STEP_BOUNDS),
        labels: &[of("verb", VERBS), of("step", STEPS), of("outcome", &["done", "failed"])],
        help: "Steps of creates, pauses, snapshots and of taking down",
        guards: None,
    },
    Metric {
        name: "wrenn_agent_call_duration_seconds",
        kind: Kind::Seconds(CALL_BOUNDS),
        labels: &[of("call", CALLS), of("outcome", &["ok", "refused", "unavailable", "failed"])],
        help: "Calls of the control plane up to the head of the answer",
        guards: None,
    },
    gauge("wrenn_agent_link_up", &[], "1 when the control plane took the last heartbeat, else 0"),
    counter("wrenn_agent_heartbeats_total", &[of("outcome", &["taken", "failed"])], "Heartbeats that were sent"),
    gauge("wrenn_agent_disk_bytes", &[of("what", &["total", "free"])], "The pool's file system"),
    gauge("wrenn_agent_memory_bytes", &[of("what", &["total", "available"])], "The machine's memory"),
    gauge("wrenn_agent_standbys", &[], "MicroVMs that stand by for creates"),
    gauge("wrenn_agent_objects", &[of("kind", OBJECTS)], "What this agent has on the machine"),
    guarding(
        counter("wrenn_agent_sandbox_exits_total", &[], "Sandboxes whose microVM ended although nobody wished it"),
        "I10",
    ),
    guarding(
        gauge(
            "wrenn_agent_quarantined_sandboxes",
            &[],
            "Directories of sandboxes that cannot be acted on and were moved away, never deleted",
        ),
        "I6 I7",
    ),
    guarding(counter("wrenn_agent_leaked_total", &[], "VMMs of no sandbox that were found and ended"), "I15"),
    guarding(
        counter(
            "wrenn_agent_stale_commands_refused_total",
            &[],
            "Calls that were refused because a newer wish, or a higher epoch of this host, is known",
        ),
        "I9 I35",
    ),
    guarding(
        counter(
            "wrenn_agent_snapshot_corrupt_total",
            &[],
            "Saved states that were not loaded because they are damaged",
        ),
        "I7",
    ),
    guarding(
        counter("wrenn_agent_pause_rollback_total", &[], "Pauses that did not come about; the sandboxes go on running"),
        "I1",
    ),
];
