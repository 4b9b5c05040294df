//! The crash points around the steps: `create.<step>.before`, `create.<step>.after`, and so for `pause`, `snapshot`, `park` and `kill`.

use super::plan::{Create, Down, Pause, Snapshot, Step};

pub fn hit(name: &'static str) -> Result<(), crashpoint::Injected> {
    if name.is_empty() { Ok(()) } else { crashpoint::hit(name) }
}

macro_rules! points {
    ($($function:ident($type:ident, $phase:literal) { $($variant:ident = $step:literal),+ $(,)? } [$($also:literal),*])+) => {
        $(fn $function(step: $type) -> [&'static str; 2] {
            match step {
                $($type::$variant => [concat!($phase, ".", $step, ".before"), concat!($phase, ".", $step, ".after")],)+
                #[allow(unreachable_patterns)]
                _ => ["", ""],
            }
        })+
        /// Every crash point of a life, in the order in which they are reached.
        pub const CRASHPOINTS: &[&str] = &[
            $(
                $(concat!($phase, ".", $step, ".before"), concat!($phase, ".", $step, ".after"),)+
                $($also,)*
            )+
        ];
    };
}

points! {
    create_points(Create, "create") {
        Reserve = "reserve", Network = "network", Cgroup = "cgroup", Disk = "disk", Memory = "memory", Start = "start",
        Health = "health", Template = "template", Init = "init", Commit = "commit",
    } []
    snapshot_points(Snapshot, "snapshot") {
        Begin = "begin", Quiet = "quiet", Save = "save", Continue = "continue", Thaw = "thaw", Seal = "seal",
        Commit = "commit",
    } []
    pause_points(Pause, "pause") {
        Begin = "begin", Quiet = "quiet", Save = "save", Seal = "seal",
    } []
    park_points(Down, "park") {
        Begin = "begin", Guest = "guest", Microvm = "microvm", Network = "network", Cgroup = "cgroup", Files = "files",
        Settle = "settle",
    } ["copy.before", "copy.after"]
    kill_points(Down, "kill") {
        Begin = "begin", Guest = "guest", Microvm = "microvm", Network = "network", Cgroup = "cgroup", Files = "files",
        Tombstone = "tombstone", Directory = "directory",
    } []
}

/// What a failed create takes down passes the points of a kill, because it is the same work.
pub fn around(step: Step) -> [&'static str; 2] {
    match step {
        Step::Create(create) => create_points(create),
        Step::Fail(down) | Step::Kill(down) => kill_points(down),
        Step::Pause(pause) => pause_points(pause),
        Step::Snapshot(snapshot) => snapshot_points(snapshot),
        Step::Copy => ["copy.before", "copy.after"],
        Step::Park(down) => park_points(down),
        Step::GiveUp | Step::Revert(_) => ["", ""],
    }
}
