//! Which wishes are taken: newer ones, the same one again, and a kill over everything.

use model::sandbox::Desired;

use super::plan::Progress;
use super::state::{FailureKind, Fence, Spec};

/// What a sandbox stands at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wish {
    pub desired: Desired,
    pub fence: Fence,
    pub spec: Spec,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing changes: what is there, or under way, is the answer.
    Repeat,
    /// A newer wish for what is there already: only its revision is new.
    Advance,
    /// What failed begins anew; what is paused is resumed.
    Restart,
    Pause,
    Kill,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error(
        "the call stands at epoch {epoch} revision {revision}, the agent has seen {seen_epoch} and {seen_revision}"
    )]
    Stale { epoch: u64, revision: u64, seen_epoch: u64, seen_revision: u64 },
    #[error("{0}")]
    Invalid(&'static str),
}

fn stale(fence: &Fence, seen: &Fence) -> Refusal {
    Refusal::Stale {
        epoch: fence.epoch,
        revision: fence.revision,
        seen_epoch: seen.epoch,
        seen_revision: seen.revision,
    }
}

impl Wish {
    /// May the sandbox be made to run for this call, and what has to be done for it?
    pub fn judge_run(&self, progress: &Progress, fence: &Fence, spec: &Spec) -> Result<Verdict, Refusal> {
        if fence.epoch < self.fence.epoch || fence.revision < self.fence.revision {
            return Err(stale(fence, &self.fence));
        }
        let newer = fence.revision > self.fence.revision;
        if self.desired == Desired::Killed {
            // A kill is final. The same revision cannot wish both.
            return if newer { Ok(Verdict::Repeat) } else { Err(stale(fence, &self.fence)) };
        }
        let failure = match progress {
            Progress::Failing { failure, .. } | Progress::Failed { failure } => Some(failure.kind),
            // A resume that failed is not tried again for the same wish, unless the agent's end was what stopped it.
            Progress::Parking { failure, .. }
            | Progress::Paused { failure, .. }
            | Progress::Copying { failure, .. }
                if *spec == self.spec =>
            {
                let interrupted = failure.as_ref().is_some_and(|failure| failure.kind == FailureKind::Interrupted);
                return Ok(if newer || interrupted { Verdict::Restart } else { Verdict::Repeat });
            }
            // A wish to run during a pause: it is resumed when it is paused.
            Progress::Pausing { .. } if newer && *spec == self.spec => return Ok(Verdict::Restart),
            _ => None,
        };
        let same_spec = *spec == self.spec;
        match failure {
            Some(FailureKind::Interrupted) if newer || same_spec => Ok(Verdict::Restart),
            Some(FailureKind::Create) if newer => Ok(Verdict::Restart),
            _ if !same_spec && !newer => Err(Refusal::Invalid("the operation was sent before with another content")),
            _ if !same_spec => Err(Refusal::Invalid("what a sandbox is made of cannot be changed")),
            _ if newer => Ok(Verdict::Advance),
            _ => Ok(Verdict::Repeat),
        }
    }

    /// May the sandbox be paused for this call?
    pub fn judge_pause(&self, progress: &Progress, fence: &Fence) -> Result<Verdict, Refusal> {
        if fence.epoch < self.fence.epoch || fence.revision < self.fence.revision {
            return Err(stale(fence, &self.fence));
        }
        let newer = fence.revision > self.fence.revision;
        match (self.desired, progress) {
            (Desired::Killed, _) => {
                if newer {
                    Ok(Verdict::Repeat)
                } else {
                    Err(stale(fence, &self.fence))
                }
            }
            (_, Progress::Failing { .. } | Progress::Failed { .. }) if newer => Ok(Verdict::Advance),
            (_, Progress::Failing { .. } | Progress::Failed { .. }) => Ok(Verdict::Repeat),
            (Desired::Paused, _) if newer => Ok(Verdict::Advance),
            (Desired::Paused, _) => Ok(Verdict::Repeat),
            (Desired::Running, _) => Ok(Verdict::Pause),
        }
    }

    pub fn judge_kill(&self, fence: &Fence) -> Result<Verdict, Refusal> {
        if fence.epoch < self.fence.epoch || fence.revision < self.fence.revision {
            return Err(stale(fence, &self.fence));
        }
        Ok(if self.desired == Desired::Killed { Verdict::Repeat } else { Verdict::Kill })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::super::state::Failure;
    use super::*;

    fn fence(epoch: u64, revision: u64, operation: &str) -> Fence {
        Fence { epoch, revision, operation: operation.to_owned() }
    }

    fn spec(memory_mib: u32) -> Spec {
        Spec {
            template: "minimal".parse().unwrap(),
            vcpus: 1,
            memory_mib,
            disk_mib: 1024,
            envs: Default::default(),
            default_user: String::new(),
            team: String::new(),
            snapshot: None,
        }
    }

    fn wish(desired: Desired) -> Wish {
        Wish { desired, fence: fence(2, 5, "a"), spec: spec(256) }
    }

    fn failed(kind: FailureKind) -> Progress {
        Progress::Failed { failure: Failure { kind, reason: String::new(), cause: Default::default() } }
    }

    #[test]
    fn the_table_of_running() {
        let making = Progress::Making { done: None, give_up_at: Instant::now() };
        let stale = Err("stale");
        let invalid = Err("invalid");
        use Desired::{Killed, Running};
        use FailureKind::{Create, Exited, Interrupted};
        for (desired, progress, fence, spec, expected) in [
            (Running, Progress::Running, fence(2, 5, "a"), spec(256), Ok(Verdict::Repeat)),
            (Running, making.clone(), fence(2, 5, "a"), spec(256), Ok(Verdict::Repeat)),
            (Running, Progress::Running, fence(3, 5, "b"), spec(256), Ok(Verdict::Repeat)),
            (Running, Progress::Running, fence(2, 6, "b"), spec(256), Ok(Verdict::Advance)),
            (Running, Progress::Running, fence(1, 9, "b"), spec(256), stale),
            (Running, Progress::Running, fence(2, 4, "a"), spec(256), stale),
            (Running, Progress::Running, fence(2, 5, "a"), spec(512), invalid),
            (Running, Progress::Running, fence(2, 6, "b"), spec(512), invalid),
            (Running, failed(Interrupted), fence(2, 5, "a"), spec(256), Ok(Verdict::Restart)),
            (Running, failed(Interrupted), fence(2, 5, "a"), spec(512), invalid),
            (Running, failed(Interrupted), fence(2, 6, "b"), spec(512), Ok(Verdict::Restart)),
            (Running, failed(Create), fence(2, 5, "a"), spec(256), Ok(Verdict::Repeat)),
            (Running, failed(Create), fence(2, 6, "b"), spec(512), Ok(Verdict::Restart)),
            (Running, failed(Exited), fence(2, 6, "b"), spec(256), Ok(Verdict::Advance)),
            (Killed, Progress::Killing { done: None }, fence(2, 5, "a"), spec(256), stale),
            (Killed, Progress::Killed, fence(2, 6, "b"), spec(256), Ok(Verdict::Repeat)),
        ] {
            let verdict = wish(desired).judge_run(&progress, &fence, &spec).map_err(|refusal| match refusal {
                Refusal::Stale { .. } => "stale",
                Refusal::Invalid(_) => "invalid",
            });
            assert_eq!(verdict, expected, "{desired} {progress:?} {fence:?} {}", spec.memory_mib);
        }
    }

    #[test]
    fn the_table_of_killing() {
        for (desired, fence, expected) in [
            (Desired::Running, fence(2, 6, "k"), Some(Verdict::Kill)),
            (Desired::Running, fence(2, 5, "k"), Some(Verdict::Kill)),
            (Desired::Running, fence(2, 4, "k"), None),
            (Desired::Running, fence(1, 9, "k"), None),
            (Desired::Killed, fence(2, 5, "k"), Some(Verdict::Repeat)),
            (Desired::Killed, fence(9, 9, "k"), Some(Verdict::Repeat)),
        ] {
            assert_eq!(wish(desired).judge_kill(&fence).ok(), expected, "{desired} {fence:?}");
        }
    }
}
