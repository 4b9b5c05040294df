//! The crash points around the steps: `create.<step>.before`, `create.<step>.after`, `kill.<step>.before`, `kill.<step>.after`.

use super::plan::{Create, Down, Step};

pub fn hit(name: &'static str) -> Result<(), crashpoint::Injected> {
    if name.is_empty() { Ok(()) } else { crashpoint::hit(name) }
}

macro_rules! points {
    ($($function:ident($type:ident, $phase:literal) { $($variant:ident = $step:literal),+ $(,)? })+) => {
        $(fn $function(step: $type) -> [&'static str; 2] {
            match step {
                $($type::$variant => [concat!($phase, ".", $step, ".before"), concat!($phase, ".", $step, ".after")],)+
                #[allow(unreachable_patterns)]
                _ => ["", ""],
            }
        })+
        /// Every crash point of a create and a kill, in the order in which they are reached.
        pub const CRASHPOINTS: &[&str] = &[
            $($(concat!($phase, ".", $step, ".before"), concat!($phase, ".", $step, ".after"),)+)+
        ];
    };
}

points! {
    create_points(Create, "create") {
        Reserve = "reserve", Network = "network", Cgroup = "cgroup", Disk = "disk", Memory = "memory", Start = "start",
        Health = "health", Init = "init", Commit = "commit",
    }
    kill_points(Down, "kill") {
        Begin = "begin", Guest = "guest", Microvm = "microvm", Network = "network", Cgroup = "cgroup", Files = "files",
        Tombstone = "tombstone", Directory = "directory",
    }
}

/// What a failed create takes down passes the points of a kill, because it is the same work.
pub fn around(step: Step) -> [&'static str; 2] {
    match step {
        Step::Create(create) => create_points(create),
        Step::Fail(down) | Step::Kill(down) => kill_points(down),
        Step::GiveUp => ["", ""],
    }
}
