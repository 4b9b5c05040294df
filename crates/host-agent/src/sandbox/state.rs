//! What is written down of one sandbox, and what of it callers see.
//!
//! ```text
//!  (nothing) -> Making -> Running -> Failed          every arrow is a durable write, made before what it announces
//!      ^         ^ |       ^ | |       |
//!      |         | +-> Failed <--------+ (again Making, if it never ran)
//!      |         |         v |
//!      |       Paused <- Pausing                       the commit of a pause is the rename of its generation, between the two
//!      |         |       Snapshotting, like Pausing, from Running and back
//!      |         |           |         |
//!      +---------+-----------+---------+-> Killing -> (a tombstone)
//! ```
//!
//! All names of a run's objects follow from its slot, the sandbox's id, the incarnation and the agent's tag, so one write of
//! `Making` announces every step of a create, and whoever finds it can undo whatever was done of it.

use std::collections::BTreeMap;
use std::time::Duration;

use model::ids::{Incarnation, SandboxId, SnapshotId};
use model::sandbox::{Kept, Observed};
use model::shape::TemplateName;
use serde::{Deserialize, Serialize};

use crate::admission::Need;

/// Which wish a sandbox stands at.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fence {
    pub epoch: u64,
    pub revision: u64,
    pub operation: String,
}

/// What the sandbox is made of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spec {
    #[serde(with = "text")]
    pub template: TemplateName,
    pub vcpus: u8,
    pub memory_mib: u32,
    pub disk_mib: u32,
    pub envs: BTreeMap<String, String>,
    /// Empty: the template's own.
    pub default_user: String,
    pub team: String,
    /// What it begins with instead of the template; its shape is the snapshot's.
    #[serde(default, skip_serializing_if = "Option::is_none", with = "optional_text")]
    pub snapshot: Option<SnapshotId>,
}

impl Spec {
    /// Of a sandbox that is killed before anybody said what it is.
    pub fn unknown() -> Self {
        Self {
            template: "unknown".parse().expect("it is a name"),
            vcpus: 0,
            memory_mib: 0,
            disk_mib: 0,
            envs: BTreeMap::new(),
            default_user: String::new(),
            team: String::new(),
            snapshot: None,
        }
    }

    /// What it may come to need of the host.
    pub fn need(&self) -> Need {
        Need { memory_mib: self.memory_mib, disk_mib: self.disk_mib }
    }
}

/// The number of a saved state of one sandbox. They are counted from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Generation(pub u64);

/// One run of the microVM: everything that names what it has on the host.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
pub struct Run {
    #[serde(with = "text")]
    pub incarnation: Incarnation,
    pub slot: u16,
    pub uid: u32,
    /// Shown to envd with every request; envd learns it at `/init`.
    pub access_token: String,
    /// Given to envd by the first `/init` and shown with every later control call: the host's own, no user of the guest has it.
    pub control_token: String,
    /// Absent until the VMM was started.
    pub process: Option<microvm::ProcessRecord>,
    /// The saved state that it began with; none when it was booted.
    #[serde(default)]
    pub generation: Option<Generation>,
    /// The snapshot that it began with; none when it was booted, or has a saved state of its own.
    #[serde(default, skip_serializing_if = "Option::is_none", with = "optional_text")]
    pub snapshot: Option<SnapshotId>,
    /// The booted state of its template that it began with, by its key; none when it was booted, or has a saved state of its own.
    #[serde(default)]
    pub template_generation: Option<String>,
    /// What envd said of itself at `/init`.
    #[serde(default)]
    pub envd_version: String,
    /// It was booted from the disk of what it began with, of which there is no memory.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub from_disk: bool,
    /// What it was before it was this sandbox's; none of a microVM that was started for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub standby: Option<WasStandby>,
}

/// A microVM that had been made ahead.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WasStandby {
    /// Of its control group.
    pub name: String,
    /// By which the guest knew its host.
    pub control_token: String,
}

impl Run {
    /// The name of its control group.
    pub fn group(&self, id: &SandboxId) -> String {
        self.standby.as_ref().map_or_else(|| id.to_string(), |standby| standby.name.clone())
    }

    /// It began with a saved state, its own or another's: its memory is shared with that until it is saved itself.
    pub fn is_restored(&self) -> bool {
        !self.from_disk && (self.generation.is_some() || self.snapshot.is_some() || self.template_generation.is_some())
    }
}

impl std::fmt::Debug for Run {
    // By hand, because the tokens must not come into a log.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Run").field("incarnation", &self.incarnation).field("slot", &self.slot).finish_non_exhaustive()
    }
}

/// Why a sandbox is not what was asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    pub kind: FailureKind,
    /// A sentence for a person; no host paths, no secrets.
    pub reason: String,
    #[serde(default)]
    pub cause: Cause,
}

/// What programs can tell apart of why.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Cause {
    #[default]
    Other,
    NoDisk,
    NoRoom,
    /// The saved state is whole and does not fit this host.
    Incompatible,
    /// The saved state is not whole.
    Damaged,
}

impl Cause {
    /// A word of the contract with the control plane.
    pub fn word(self) -> &'static str {
        match self {
            Self::Other => "",
            Self::NoDisk => api::host::CAUSE_NO_DISK,
            Self::NoRoom => api::host::CAUSE_NO_ROOM,
            Self::Incompatible => api::host::CAUSE_INCOMPATIBLE,
            Self::Damaged => api::host::CAUSE_DAMAGED,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureKind {
    /// The agent ended in the middle of the create. The same wish, sent again, starts anew.
    Interrupted,
    /// A step of the create failed. A new wish may start anew.
    Create,
    /// It ran and its microVM ended. It never comes back as a fresh guest under the same id.
    Exited,
    /// A pause did not come about, and the sandbox goes on running.
    Pause,
    /// A snapshot did not come about, and the sandbox is what it was.
    Snapshot,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "is")]
pub enum Phase {
    /// Everything that `run` names may exist.
    Making {
        run: Run,
    },
    Running {
        run: Run,
    },
    /// The saved state `to` is being made. Where it is whole, the sandbox is paused.
    Pausing {
        run: Run,
        to: Generation,
    },
    /// It may stand still for a snapshot. What there is of that is valid or goes; the sandbox goes on.
    Snapshotting {
        run: Run,
    },
    /// With `leftovers`, what they name may still exist.
    Paused {
        generation: Generation,
        /// Why it does not run although that was wished.
        failure: Option<Failure>,
        leftovers: Option<Run>,
    },
    /// With `leftovers`, what they name may still exist.
    Failed {
        failure: Failure,
        leftovers: Option<Run>,
    },
    Killing {
        run: Option<Run>,
    },
}

impl Phase {
    /// Of a new sandbox, before it is anything: made, not resumed and not taken over.
    pub fn is_begun(&self) -> bool {
        matches!(self, Self::Making { run } if run.generation.is_none() && run.standby.is_none())
    }

    pub fn run(&self) -> Option<&Run> {
        match self {
            Self::Making { run } | Self::Running { run } | Self::Pausing { run, .. } | Self::Snapshotting { run } => {
                Some(run)
            }
            Self::Paused { leftovers: run, .. } | Self::Failed { leftovers: run, .. } | Self::Killing { run } => {
                run.as_ref()
            }
        }
    }
}

/// The content of `state.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    #[serde(with = "text")]
    pub id: SandboxId,
    /// The tag of the agent that made it: a state file of another agent is not ours to act on.
    pub tag: String,
    pub fence: Fence,
    pub spec: Spec,
    pub phase: Phase,
}

/// What remains of a killed sandbox, so that a late wish cannot bring it back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tombstone {
    #[serde(with = "text")]
    pub id: SandboxId,
    pub fence: Fence,
}

/// What callers see of a sandbox. Published by its actor; reading it costs no message.
#[derive(Debug, Clone, PartialEq)]
pub struct View {
    pub id: SandboxId,
    pub observed: Observed,
    pub reason: String,
    pub cause: Cause,
    pub fence: Fence,
    pub incarnation: Option<Incarnation>,
    pub steps: Vec<(&'static str, Duration)>,
    /// What its last saved state is of; none without one, and where that is not known.
    pub kept: Option<Kept>,
    /// The address by which the host reaches the guest; empty when there is none.
    pub host_ip: String,
    pub envd_version: String,
    /// 0 when nobody said.
    pub vcpus: u8,
    /// Its VMM's process; none while there is none.
    pub process: Option<microvm::ProcessRecord>,
    /// The last accepted wish has come to its end, good or bad.
    pub settled: bool,
}

/// Ids and names as text.
mod text {
    use std::fmt::Display;
    use std::str::FromStr;

    use serde::{Deserialize as _, Deserializer, Serializer, de};

    pub fn serialize<T: Display, S: Serializer>(value: &T, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(value)
    }

    pub fn deserialize<'de, T, D>(deserializer: D) -> Result<T, D::Error>
    where
        T: FromStr<Err: Display>,
        D: Deserializer<'de>,
    {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

/// The same of what may be absent.
mod optional_text {
    use std::fmt::Display;
    use std::str::FromStr;

    use serde::{Deserialize as _, Deserializer, Serializer, de};

    pub fn serialize<T: Display, S: Serializer>(value: &Option<T>, serializer: S) -> Result<S::Ok, S::Error> {
        match value {
            Some(value) => serializer.collect_str(value),
            None => serializer.serialize_none(),
        }
    }

    pub fn deserialize<'de, T, D>(deserializer: D) -> Result<Option<T>, D::Error>
    where
        T: FromStr<Err: Display>,
        D: Deserializer<'de>,
    {
        let text = Option::<String>::deserialize(deserializer)?;
        text.map(|text| text.parse().map_err(de::Error::custom)).transpose()
    }
}
