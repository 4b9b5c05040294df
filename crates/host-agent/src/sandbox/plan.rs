//! Decides what to do next for one sandbox: a pure function of what is wished, what is there and the time.
//!
//! ```text
//!  create:  reserve -> network -> cgroup -> disk -> memory -> start -> health -> template -> init -> commit
//!  pause:   begin -> quiet -> save -> seal                                                          seal is the commit
//!  snapshot: begin -> quiet -> save -> continue -> thaw -> seal -> commit                           it goes on running
//!  revert:  discard -> continue -> thaw -> commit                            of a pause or a snapshot that did not come about
//!  park:    begin -> guest -> microvm -> network -> cgroup -> files -> settle                       after a pause or a failed resume
//!  fail:    begin -> guest -> microvm -> network -> cgroup -> files -> settle
//!  kill:    begin -> guest -> microvm -> network -> cgroup -> files -> tombstone -> directory
//! ```
//!
//! The executor does the first step and asks again, so a kill that arrives in the middle of a create needs no special case.

use std::time::Instant;

use model::ids::SnapshotId;
use model::sandbox::{Desired, Kept};

use super::state::{Failure, Generation};

/// The steps of a create, in order. Each may be repeated, and each is undone by the step of the same object in [`Down`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Create {
    /// Takes a network slot and writes down that everything that follows may exist.
    Reserve,
    Network,
    Cgroup,
    Disk,
    Memory,
    Start,
    Health,
    /// Leaves the booted state of its template behind, if nobody has yet.
    Template,
    Init,
    /// Writes down that it runs; only then is the create acknowledged.
    Commit,
}

impl Create {
    pub const ALL: [Self; 10] = [
        Self::Reserve,
        Self::Network,
        Self::Cgroup,
        Self::Disk,
        Self::Memory,
        Self::Start,
        Self::Health,
        Self::Template,
        Self::Init,
        Self::Commit,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Reserve => "reserve",
            Self::Network => "network",
            Self::Cgroup => "cgroup",
            Self::Disk => "disk",
            Self::Memory => "memory",
            Self::Start => "start",
            Self::Health => "health",
            Self::Template => "template",
            Self::Init => "init",
            Self::Commit => "commit",
        }
    }
}

/// The steps to a saved state, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Pause {
    /// Looks whether there is room, and writes down that a saved state is being made.
    Begin,
    /// The guest and the host let go of each other: idle connections end, users' processes stand still, disks are flushed.
    Quiet,
    /// vCPUs stop; device state, memory and disk go into files that are not valid yet.
    Save,
    /// They become valid, all at once: from here on the sandbox is paused, whatever happens.
    Seal,
}

impl Pause {
    pub const ALL: [Self; 4] = [Self::Begin, Self::Quiet, Self::Save, Self::Seal];

    pub fn name(self) -> &'static str {
        match self {
            Self::Begin => "begin",
            Self::Quiet => "quiet",
            Self::Save => "save",
            Self::Seal => "seal",
        }
    }
}

/// The steps to a snapshot of a sandbox that goes on running, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Snapshot {
    /// Looks whether there is room, and writes down that the guest may come to stand still for it.
    Begin,
    /// As of a pause.
    Quiet,
    /// vCPUs stop; device state, memory and disk go into files that are not valid yet.
    Save,
    Continue,
    /// Users' processes go on.
    Thaw,
    /// The files become valid, all at once.
    Seal,
    Commit,
}

impl Snapshot {
    pub const ALL: [Self; 7] =
        [Self::Begin, Self::Quiet, Self::Save, Self::Continue, Self::Thaw, Self::Seal, Self::Commit];

    pub fn name(self) -> &'static str {
        match self {
            Self::Begin => "begin",
            Self::Quiet => "quiet",
            Self::Save => "save",
            Self::Continue => "continue",
            Self::Thaw => "thaw",
            Self::Seal => "seal",
            Self::Commit => "commit",
        }
    }
}

/// The steps by which a sandbox goes on running after a pause or a snapshot that did not come about, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Revert {
    Discard,
    Continue,
    Thaw,
    Commit,
}

impl Revert {
    pub const ALL: [Self; 4] = [Self::Discard, Self::Continue, Self::Thaw, Self::Commit];

    pub fn name(self) -> &'static str {
        match self {
            Self::Discard => "discard",
            Self::Continue => "continue",
            Self::Thaw => "thaw",
            Self::Commit => "commit",
        }
    }
}

/// The steps that take a run down, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Down {
    /// Writes down why: from here on nothing brings the run back.
    Begin,
    /// Closes the clients of the guest, so that no request waits for a guest that is gone.
    Guest,
    Microvm,
    Network,
    Cgroup,
    Files,
    /// Failed or paused: writes down that nothing is left but what the customer may want back.
    Settle,
    /// Killed: a small file that outlives the sandbox.
    Tombstone,
    Directory,
}

impl Down {
    /// Also of a sandbox that is paused.
    pub const FAIL: [Self; 7] =
        [Self::Begin, Self::Guest, Self::Microvm, Self::Network, Self::Cgroup, Self::Files, Self::Settle];
    pub const KILL: [Self; 8] = [
        Self::Begin,
        Self::Guest,
        Self::Microvm,
        Self::Network,
        Self::Cgroup,
        Self::Files,
        Self::Tombstone,
        Self::Directory,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Begin => "begin",
            Self::Guest => "guest",
            Self::Microvm => "microvm",
            Self::Network => "network",
            Self::Cgroup => "cgroup",
            Self::Files => "files",
            Self::Settle => "settle",
            Self::Tombstone => "tombstone",
            Self::Directory => "directory",
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    Create(Create),
    /// The create took longer than it may: from here on it is taken down.
    GiveUp,
    Pause(Pause),
    Snapshot(Snapshot),
    /// The snapshot of a sandbox that is paused.
    Copy,
    Revert(Revert),
    Park(Down),
    Fail(Down),
    Kill(Down),
}

impl Step {
    /// What it is a part of.
    pub fn verb(self) -> &'static str {
        match self {
            Self::Create(_) => "create",
            Self::GiveUp => "give_up",
            Self::Pause(_) => "pause",
            Self::Snapshot(_) => "snapshot",
            Self::Copy => "copy",
            Self::Revert(_) => "revert",
            Self::Park(_) => "park",
            Self::Fail(_) => "fail",
            Self::Kill(_) => "kill",
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Create(create) => create.name(),
            Self::GiveUp => "give_up",
            Self::Pause(pause) => pause.name(),
            Self::Snapshot(snapshot) => snapshot.name(),
            Self::Copy => "copy",
            Self::Revert(revert) => revert.name(),
            Self::Park(down) | Self::Fail(down) | Self::Kill(down) => down.name(),
        }
    }
}

/// For what a microVM stood still, and what has come to nothing.
#[derive(Debug, Clone, PartialEq)]
pub enum Undone {
    Pause { to: Generation, failure: Failure },
    Snapshot,
}

/// What is there of a sandbox, as far as its actor knows.
#[derive(Debug, Clone, PartialEq)]
pub enum Progress {
    Absent,
    Making {
        done: Option<Create>,
        give_up_at: Instant,
    },
    Running,
    /// The saved state `to` is being made.
    Pausing {
        to: Generation,
        kept: Kept,
        done: Option<Pause>,
    },
    /// The snapshot `to` is being made, and it goes on running.
    Snapshotting {
        to: SnapshotId,
        done: Option<Snapshot>,
    },
    /// It is to go on running, because `what` did not come about.
    Reverting {
        what: Undone,
        done: Option<Revert>,
    },
    /// Paused; the run that there was, or that was to be, is taken down.
    Parking {
        generation: Generation,
        failure: Option<Failure>,
        done: Option<Down>,
    },
    Paused {
        generation: Generation,
        /// Why it does not run although that was wished.
        failure: Option<Failure>,
    },
    /// Paused, and the snapshot `to` is made of its saved state.
    Copying {
        to: SnapshotId,
        generation: Generation,
        failure: Option<Failure>,
    },
    /// To be taken down, because of `failure`.
    Failing {
        failure: Failure,
        done: Option<Down>,
    },
    Failed {
        failure: Failure,
    },
    Killing {
        done: Option<Down>,
    },
    Killed,
}

/// The steps that are left, in order; none when the wish is fulfilled or cannot be.
pub fn plan(desired: Desired, progress: &Progress, now: Instant) -> Vec<Step> {
    match (desired, progress) {
        (_, Progress::Killed) => Vec::new(),
        // A kill that began is final, whatever is wished.
        (_, Progress::Killing { done }) => rest(&Down::KILL, *done).map(Step::Kill).collect(),
        (Desired::Killed, _) => Down::KILL.into_iter().map(Step::Kill).collect(),
        // Half of a failed run must be gone before anything else is made of it.
        (_, Progress::Failing { done, .. }) => rest(&Down::FAIL, *done).map(Step::Fail).collect(),
        // Nothing turns back in the middle: neither a pause for a wish to run, nor a start for a wish to pause.
        (_, Progress::Pausing { done, .. }) => rest(&Pause::ALL, *done).map(Step::Pause).collect(),
        (_, Progress::Snapshotting { done, .. }) => rest(&Snapshot::ALL, *done).map(Step::Snapshot).collect(),
        (_, Progress::Copying { .. }) => vec![Step::Copy],
        (_, Progress::Reverting { done, .. }) => rest(&Revert::ALL, *done).map(Step::Revert).collect(),
        (_, Progress::Parking { done, .. }) => rest(&Down::FAIL, *done).map(Step::Park).collect(),
        (_, Progress::Making { give_up_at, .. }) if now >= *give_up_at => vec![Step::GiveUp],
        (_, Progress::Making { done, .. }) => rest(&Create::ALL, *done).map(Step::Create).collect(),
        (_, Progress::Absent) => Create::ALL.into_iter().map(Step::Create).collect(),
        (Desired::Paused, Progress::Running) => Pause::ALL.into_iter().map(Step::Pause).collect(),
        (Desired::Running, Progress::Running) => Vec::new(),
        // A wish to run what is paused begins with its absence: the actor sees to that, once for each wish.
        (_, Progress::Paused { .. } | Progress::Failed { .. }) => Vec::new(),
    }
}

fn rest<S: Copy + PartialEq>(all: &[S], done: Option<S>) -> impl Iterator<Item = S> {
    let next = done.and_then(|done| all.iter().position(|step| *step == done)).map_or(0, |position| position + 1);
    all[next..].iter().copied()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::state::FailureKind;
    use super::*;

    fn failure() -> Failure {
        Failure { kind: FailureKind::Create, reason: "x".to_owned(), cause: Default::default() }
    }

    #[test]
    fn the_table() {
        let now = Instant::now();
        let later = now + Duration::from_secs(1);
        let making = |done| Progress::Making { done, give_up_at: later };
        let failing = |done| Progress::Failing { failure: failure(), done };
        let killing = |done| Progress::Killing { done };
        let failed = Progress::Failed { failure: failure() };
        let to = Generation(3);
        let pausing = |done| Progress::Pausing { to, kept: Kept::Memory, done };
        let reverting = |done| Progress::Reverting { what: Undone::Pause { to, failure: failure() }, done };
        let snapshot = SnapshotId(Default::default());
        let snapshotting = |done| Progress::Snapshotting { to: snapshot, done };
        let copying = Progress::Copying { to: snapshot, generation: to, failure: None };
        let parking = |done| Progress::Parking { generation: to, failure: None, done };
        let paused = Progress::Paused { generation: to, failure: None };
        use Desired::{Killed, Paused, Running};
        for (desired, progress, first, count) in [
            (Paused, Progress::Absent, Some(Step::Create(Create::Reserve)), 10),
            (Paused, making(None), Some(Step::Create(Create::Reserve)), 10),
            (Paused, Progress::Running, Some(Step::Pause(Pause::Begin)), 4),
            (Paused, pausing(Some(Pause::Quiet)), Some(Step::Pause(Pause::Save)), 2),
            (Running, pausing(None), Some(Step::Pause(Pause::Begin)), 4),
            (Paused, reverting(None), Some(Step::Revert(Revert::Discard)), 4),
            (Running, reverting(Some(Revert::Continue)), Some(Step::Revert(Revert::Thaw)), 2),
            (Running, snapshotting(None), Some(Step::Snapshot(Snapshot::Begin)), 7),
            (Paused, snapshotting(Some(Snapshot::Save)), Some(Step::Snapshot(Snapshot::Continue)), 4),
            (Killed, snapshotting(Some(Snapshot::Save)), Some(Step::Kill(Down::Begin)), 8),
            (
                Running,
                Progress::Reverting { what: Undone::Snapshot, done: None },
                Some(Step::Revert(Revert::Discard)),
                4,
            ),
            (Paused, copying.clone(), Some(Step::Copy), 1),
            (Killed, copying, Some(Step::Kill(Down::Begin)), 8),
            (Paused, parking(None), Some(Step::Park(Down::Begin)), 7),
            (Running, parking(Some(Down::Files)), Some(Step::Park(Down::Settle)), 1),
            (Paused, paused.clone(), None, 0),
            (Running, paused.clone(), None, 0),
            (Killed, paused, Some(Step::Kill(Down::Begin)), 8),
            (Killed, pausing(Some(Pause::Save)), Some(Step::Kill(Down::Begin)), 8),
            (Killed, parking(Some(Down::Begin)), Some(Step::Kill(Down::Begin)), 8),
            (Running, Progress::Absent, Some(Step::Create(Create::Reserve)), 10),
            (Running, making(None), Some(Step::Create(Create::Reserve)), 10),
            (Running, making(Some(Create::Disk)), Some(Step::Create(Create::Memory)), 6),
            (Running, making(Some(Create::Init)), Some(Step::Create(Create::Commit)), 1),
            (Running, making(Some(Create::Commit)), None, 0),
            (Running, Progress::Making { done: None, give_up_at: now }, Some(Step::GiveUp), 1),
            (Running, Progress::Running, None, 0),
            (Running, failing(None), Some(Step::Fail(Down::Begin)), 7),
            (Running, failing(Some(Down::Files)), Some(Step::Fail(Down::Settle)), 1),
            (Running, failed.clone(), None, 0),
            (Running, killing(Some(Down::Begin)), Some(Step::Kill(Down::Guest)), 7),
            (Running, Progress::Killed, None, 0),
            (Killed, Progress::Absent, Some(Step::Kill(Down::Begin)), 8),
            (Killed, making(Some(Create::Start)), Some(Step::Kill(Down::Begin)), 8),
            (Killed, Progress::Making { done: None, give_up_at: now }, Some(Step::Kill(Down::Begin)), 8),
            (Killed, Progress::Running, Some(Step::Kill(Down::Begin)), 8),
            // What the failure took down already is taken down once more: each step may be repeated.
            (Killed, failing(Some(Down::Network)), Some(Step::Kill(Down::Begin)), 8),
            (Killed, failed, Some(Step::Kill(Down::Begin)), 8),
            (Killed, killing(Some(Down::Files)), Some(Step::Kill(Down::Tombstone)), 2),
            (Killed, killing(Some(Down::Directory)), None, 0),
            (Killed, Progress::Killed, None, 0),
        ] {
            let steps = plan(desired, &progress, now);
            assert_eq!(steps.first().copied(), first, "{desired} {progress:?}");
            assert_eq!(steps.len(), count, "{desired} {progress:?}");
        }
    }

    #[test]
    fn whatever_is_made_is_taken_down_on_both_ways_out() {
        for down in [Down::Guest, Down::Microvm, Down::Network, Down::Cgroup, Down::Files] {
            assert!(Down::FAIL.contains(&down) && Down::KILL.contains(&down));
        }
    }
}
