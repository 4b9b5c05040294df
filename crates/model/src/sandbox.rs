//! The lifecycle of a sandbox.
//!
//! ```text
//!  desired:   running | paused | killed            what the user asked for, with a revision that grows with each wish
//!  observed:  starting -> running -> pausing -> paused -> resuming -> running
//!             from any of them: killing -> killed, or failed, or lost
//! ```
//!
//! What the API shows is a pure function of the two ([`Status::of`]). A silent host changes neither.

use std::fmt;
use std::str::FromStr;

/// What the user asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Desired {
    Running,
    Paused,
    Killed,
}

/// What becomes of a sandbox when its time is over.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum OnTimeout {
    #[default]
    Kill,
    /// With its memory; resumed, its time begins anew.
    Pause,
    /// Its disk alone; resumed, it boots, and its time begins anew.
    PauseDisk,
}

impl OnTimeout {
    /// What is kept; none when it is killed.
    pub fn kept(self) -> Option<Kept> {
        match self {
            Self::Kill => None,
            Self::Pause => Some(Kept::Memory),
            Self::PauseDisk => Some(Kept::Disk),
        }
    }
}

/// What a pause keeps of a sandbox.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum Kept {
    /// Memory and disk: it goes on where it stood.
    #[default]
    Memory,
    /// The disk alone: it boots.
    Disk,
}

/// What the host last said.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Observed {
    /// No host has taken it up yet, or it is being booted.
    Starting,
    Running,
    Pausing,
    Paused,
    Resuming,
    Killing,
    Killed,
    /// It ended, or never began, by a fault; the reason is kept beside it.
    Failed,
    /// The host that had it says, completely, that it has it no more.
    Lost,
}

/// What clients see. A closed set: published SDKs refuse any other word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Status {
    Starting,
    Running,
    Pausing,
    Paused,
    Resuming,
    Snapshotting,
    Stopping,
    Stopped,
    Error,
    Missing,
}

impl Status {
    pub fn of(desired: Desired, observed: Observed) -> Self {
        match (desired, observed) {
            (_, Observed::Killed) => Self::Stopped,
            (Desired::Killed, _) | (_, Observed::Killing) => Self::Stopping,
            (_, Observed::Failed) => Self::Error,
            (_, Observed::Lost) => Self::Missing,
            (Desired::Paused, Observed::Running) | (_, Observed::Pausing) => Self::Pausing,
            (Desired::Running, Observed::Paused) | (_, Observed::Resuming) => Self::Resuming,
            (_, Observed::Starting) => Self::Starting,
            (Desired::Running, Observed::Running) => Self::Running,
            (Desired::Paused, Observed::Paused) => Self::Paused,
        }
    }

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Pausing => "pausing",
            Self::Paused => "paused",
            Self::Resuming => "resuming",
            Self::Snapshotting => "snapshotting",
            Self::Stopping => "stopping",
            Self::Stopped => "stopped",
            Self::Error => "error",
            Self::Missing => "missing",
        }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A word that is in no state's vocabulary, for example from a newer program.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown {kind} state")]
pub struct UnknownState {
    pub kind: &'static str,
}

macro_rules! words {
    ($type:ident, $kind:literal, $($variant:ident = $word:literal),+ $(,)?) => {
        impl $type {
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $word),+ }
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }

        impl FromStr for $type {
            type Err = UnknownState;

            fn from_str(text: &str) -> Result<Self, UnknownState> {
                match text { $($word => Ok(Self::$variant),)+ _ => Err(UnknownState { kind: $kind }) }
            }
        }
    };
}

words!(OnTimeout, "end of time", Kill = "kill", Pause = "pause", PauseDisk = "pause_disk");
words!(Kept, "kept", Memory = "memory", Disk = "disk");
words!(Desired, "desired", Running = "running", Paused = "paused", Killed = "killed");
words!(
    Observed,
    "observed",
    Starting = "starting",
    Running = "running",
    Pausing = "pausing",
    Paused = "paused",
    Resuming = "resuming",
    Killing = "killing",
    Killed = "killed",
    Failed = "failed",
    Lost = "lost",
);

impl Observed {
    /// Nothing of the sandbox is left on any host and none of it comes back.
    pub fn is_final(self) -> bool {
        matches!(self, Self::Killed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kill_wins_over_everything_and_is_final() {
        for observed in ["starting", "running", "pausing", "paused", "resuming", "killing", "failed", "lost"] {
            let observed: Observed = observed.parse().unwrap();
            assert_eq!(Status::of(Desired::Killed, observed), Status::Stopping);
            assert!(!observed.is_final());
        }
        for desired in [Desired::Running, Desired::Paused, Desired::Killed] {
            assert_eq!(Status::of(desired, Observed::Killed), Status::Stopped);
        }
    }

    #[test]
    fn a_wish_that_is_not_fulfilled_yet_shows_as_under_way() {
        assert_eq!(Status::of(Desired::Running, Observed::Starting), Status::Starting);
        assert_eq!(Status::of(Desired::Running, Observed::Running), Status::Running);
        assert_eq!(Status::of(Desired::Paused, Observed::Running), Status::Pausing);
        assert_eq!(Status::of(Desired::Paused, Observed::Paused), Status::Paused);
        assert_eq!(Status::of(Desired::Running, Observed::Paused), Status::Resuming);
        assert_eq!(Status::of(Desired::Running, Observed::Failed), Status::Error);
        assert_eq!(Status::of(Desired::Running, Observed::Lost), Status::Missing);
    }

    #[test]
    fn words_come_back() {
        assert!("exploded".parse::<Observed>().is_err());
        assert_eq!("killed".parse::<Desired>(), Ok(Desired::Killed));
        assert_eq!(Observed::Lost.to_string(), "lost");
    }
}
