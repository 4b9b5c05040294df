//! The one owner of a sandbox on this host: takes wishes, asks [`plan`] what is next, has it done, and says what is true.
//!
//! Wishes are taken at any time, also while a step runs; a step of a create is told to stop when a kill arrives. A step is never
//! dropped in the middle. When the task dies by a panic, its supervisor starts it again from the journal (`supervisor`).

use std::sync::Arc;
use std::time::{Duration, Instant};

use microvm::Microvm;
use model::ids::SnapshotId;
use model::sandbox::{Desired, Kept, Observed};
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::console::{self, Console};
use super::fence::{Refusal, Verdict, Wish};
use super::plan::{Create, Down, Pause, Progress, Revert, Snapshot, Step, Undone, plan};
use super::state::{Cause, Failure, FailureKind, Fence, Generation, Spec, View};
use super::steps::{Body, StepError};
use crate::control_plane::BackOff;
use crate::guest::Guest;
use crate::measures;

/// Wishes that wait for the actor. More callers than this for one sandbox are told to come again.
pub const MAILBOX_MAX: usize = 32;
/// Who waits for a snapshot of one sandbox: each of its forks does.
const SNAPSHOTS_WAITING_MAX: usize = 256;
/// The longest that a create may take, by invariant I14.
pub(super) const CREATE_TIME_MAX: Duration = Duration::from_secs(120);
const DOWN_BACK_OFF_FIRST: Duration = Duration::from_millis(100);
const DOWN_BACK_OFF_MAX: Duration = Duration::from_secs(5);

pub enum Message {
    Run {
        fence: Fence,
        spec: Spec,
        reply: oneshot::Sender<Result<(), Refusal>>,
    },
    Pause {
        fence: Fence,
        kept: Kept,
        reply: oneshot::Sender<Result<(), Refusal>>,
    },
    Kill {
        fence: Fence,
        reply: oneshot::Sender<Result<(), Refusal>>,
    },
    /// Answered at the end.
    Snapshot {
        id: SnapshotId,
        reply: SnapshotReply,
    },
}

type SnapshotReply = oneshot::Sender<Result<(), NotTaken>>;

/// Why there is no snapshot.
#[derive(Debug, Clone)]
pub enum NotTaken {
    /// Only what runs or is paused has a state to be saved.
    State(Observed),
    /// As many wait as may.
    Busy,
    Failed(Failure),
}

/// What the actor shows without being asked.
#[derive(Clone)]
pub struct Published {
    pub view: View,
    /// The clients of the guest; only while it runs.
    pub guest: Option<Arc<Guest>>,
    pub microvm: Option<Arc<dyn Microvm>>,
    /// Of the present or the last microVM; of a sandbox that was killed there is none.
    pub console: Option<Arc<Console>>,
    /// The user of its VMM, while there is or may be one.
    pub uid: Option<u32>,
}

pub struct Actor {
    mailbox: mpsc::Receiver<Message>,
    published: watch::Sender<Published>,
    changed: Arc<Notify>,
    body: Body,
    mind: Mind,
}

/// The part that may change while a step runs.
struct Mind {
    wish: Wish,
    progress: Progress,
    /// Begin anew as soon as what failed, or was paused, is taken down.
    restart: bool,
    /// Of the pause that is wished.
    kept: Kept,
    /// Why it runs although a pause was wished.
    refusal: Option<Failure>,
    /// What is written down is not that it runs, at this revision.
    unwritten: bool,
    /// The create under way was begun by an earlier agent, which may have acknowledged it.
    may_have_run: bool,
    steps: Vec<(&'static str, Duration)>,
    /// Snapshots that are wished, and who waits for them.
    snapshots: Vec<(SnapshotId, SnapshotReply)>,
    /// Said once what came of it is published.
    answers: Vec<(SnapshotReply, Result<(), NotTaken>)>,
}

impl Actor {
    /// The actor and what it shows, which is true from the first moment on.
    pub fn new(
        mailbox: mpsc::Receiver<Message>,
        changed: Arc<Notify>,
        body: Body,
        wish: Wish,
        progress: Progress,
    ) -> (Self, watch::Receiver<Published>) {
        let mind = Mind {
            may_have_run: matches!(progress, Progress::Making { .. }),
            wish,
            progress,
            restart: false,
            kept: Kept::Memory,
            refusal: None,
            unwritten: false,
            steps: Vec::new(),
            snapshots: Vec::new(),
            answers: Vec::new(),
        };
        let settled = plan(mind.wish.desired, &mind.progress, Instant::now()).is_empty();
        let (published, receiver) = watch::channel(show(&mind, &body, settled));
        (Self { mailbox, published, changed, body, mind }, receiver)
    }

    /// Ends when the sandbox is killed or `stop` is cancelled. What runs goes on running.
    pub async fn run(mut self, stop: CancellationToken) {
        let mut back_off = BackOff::new(DOWN_BACK_OFF_FIRST, DOWN_BACK_OFF_MAX);
        let mut resume_at = None;
        loop {
            if self.mind.restart && matches!(self.mind.progress, Progress::Failed { .. } | Progress::Paused { .. }) {
                self.mind.restart = false;
                self.mind.progress = Progress::Absent;
            }
            let mut steps = plan(self.mind.wish.desired, &self.mind.progress, Instant::now());
            if steps.is_empty() && self.mind.begin_snapshot(self.body.generation()) {
                steps = plan(self.mind.wish.desired, &self.mind.progress, Instant::now());
            }
            self.publish(steps.is_empty());
            for (reply, answer) in self.mind.answers.drain(..) {
                let _ = reply.send(answer);
            }
            if self.mind.progress == Progress::Killed || stop.is_cancelled() {
                // Whoever waits for a snapshot hears that the actor has ended.
                return;
            }
            let (Some(step), false) = (steps.first().copied(), resume_at.is_some_and(|at| at > Instant::now())) else {
                self.idle(resume_at, &stop).await;
                if resume_at.is_some_and(|at| at <= Instant::now()) {
                    resume_at = None;
                }
                continue;
            };
            match self.perform(step).await {
                Ok(()) => {
                    back_off.reset();
                    self.mind.advance(step, self.body.generation());
                }
                Err(error) => {
                    if self.mind.stumble(step, &error, self.body.id(), self.body.generation()) {
                        resume_at = Some(Instant::now() + back_off.next(rand::random()));
                    }
                }
            }
        }
    }

    /// Nothing to do now: waits for a wish, the end of the microVM, or the time to try again.
    async fn idle(&mut self, resume_at: Option<Instant>, stop: &CancellationToken) {
        if self.mind.unwritten && self.mind.progress == Progress::Running {
            // Tried again at each turn until it is done: what stands there instead may say that it is only being made.
            match self.body.note_running(&self.mind.wish).await {
                Ok(()) => self.mind.unwritten = false,
                Err(error) => {
                    warn!(sandbox.id = %self.body.id(), "that the sandbox runs is not written down yet: {error}")
                }
            }
        }
        let sleep = async {
            match resume_at {
                Some(at) => tokio::time::sleep_until(at.into()).await,
                None => std::future::pending().await,
            }
        };
        let running = matches!(self.mind.progress, Progress::Running | Progress::Reverting { .. });
        let look = async {
            tokio::time::sleep(console::LOOK_EVERY).await;
            self.body.console_text().await;
        };
        tokio::select! {
            biased;
            () = stop.cancelled() => {}
            message = self.mailbox.recv() => match message {
                Some(message) => self.mind.take(message, &self.published),
                // The registry is gone, and with it whoever could wish something.
                None => stop.cancelled().await,
            },
            how = self.body.exited(), if running => {
                let reason = how;
                let console = self.body.console_text().await;
                warn!(sandbox.id = %self.body.id(), console, "sandbox {} failed: {reason}", self.body.id());
                measures::sandbox_exited();
                self.mind.fail(FailureKind::Exited, reason, Cause::Other, None);
            }
            () = sleep => {}
            () = look, if running => {}
        }
    }

    /// Does one step while wishes are still taken.
    async fn perform(&mut self, step: Step) -> Result<(), StepError> {
        let begin = Instant::now();
        if matches!(step, Step::Create(Create::Reserve) | Step::Fail(Down::Begin) | Step::Kill(Down::Begin)) {
            self.mind.steps.clear();
        }
        if step == Step::Create(Create::Reserve) {
            self.mind.may_have_run = false;
            self.mind.progress = Progress::Making { done: None, give_up_at: begin + CREATE_TIME_MAX };
            self.publish(false);
        }
        if matches!(step, Step::Snapshot(Snapshot::Begin) | Step::Copy) {
            self.mind.steps.clear();
        }
        if step == Step::Pause(Pause::Begin) {
            self.mind.steps.clear();
            self.mind.progress =
                Progress::Pausing { to: self.body.next_generation(), kept: self.mind.kept, done: None };
            self.publish(false);
        }
        let give_up_at = match self.mind.progress {
            Progress::Making { give_up_at, .. } => give_up_at,
            _ => begin + CREATE_TIME_MAX,
        };
        let stop = CancellationToken::new();
        let (wish, progress) = (self.mind.wish.clone(), self.mind.progress.clone());
        let result = {
            let work = self.body.perform(step, &wish, &progress, give_up_at, &stop);
            tokio::pin!(work);
            loop {
                tokio::select! {
                    biased;
                    result = &mut work => break result,
                    Some(message) = self.mailbox.recv() => {
                        self.mind.take(message, &self.published);
                        if self.mind.wish.desired == Desired::Killed {
                            stop.cancel();
                        }
                    }
                }
            }
        };
        measures::step(step, begin.elapsed(), &result);
        if let Step::Create(Create::Commit) = step {
            self.mind.unwritten = self.mind.wish.fence != wish.fence || self.body.is_behind();
        }
        if let Step::Create(_) | Step::Pause(_) | Step::Snapshot(_) | Step::Copy | Step::Kill(_) = step {
            self.mind.steps.push((step.name(), begin.elapsed()));
        }
        // A part of it.
        match (step, &result) {
            (Step::Pause(Pause::Save) | Step::Snapshot(Snapshot::Continue), Ok(())) => {
                self.mind.steps.push(("stopped", self.body.stopped()));
            }
            (Step::Create(Create::Start), Ok(())) => self.mind.steps.push(("microvm", self.body.started())),
            _ => {}
        }
        result
    }

    fn publish(&mut self, settled: bool) {
        let now = show(&self.mind, &self.body, settled);
        let (before, uid) = {
            let published = self.published.borrow();
            (published.view.clone(), published.uid)
        };
        if before == now.view && uid == now.uid {
            return;
        }
        if before.observed != now.view.observed {
            info!(sandbox.id = %now.view.id, observed = %now.view.observed, "sandbox {} is {}", now.view.id, now.view.observed);
        }
        if before.observed != now.view.observed || before.fence != now.view.fence {
            self.changed.notify_one();
        }
        self.published.send_replace(now);
    }
}

fn show(mind: &Mind, body: &Body, settled: bool) -> Published {
    let (observed, failure) = match &mind.progress {
        Progress::Absent | Progress::Making { .. } if body.generation().is_some() => (Observed::Resuming, None),
        Progress::Absent | Progress::Making { .. } => (Observed::Starting, None),
        Progress::Running => (Observed::Running, mind.refusal.as_ref()),
        Progress::Snapshotting { .. } | Progress::Reverting { what: Undone::Snapshot, .. } => (Observed::Running, None),
        Progress::Pausing { .. } | Progress::Reverting { .. } | Progress::Parking { failure: None, .. } => {
            (Observed::Pausing, None)
        }
        Progress::Copying { .. } => (Observed::Paused, None),
        Progress::Parking { failure, .. } => (Observed::Resuming, failure.as_ref()),
        Progress::Paused { failure, .. } => (Observed::Paused, failure.as_ref()),
        Progress::Failing { failure, .. } | Progress::Failed { failure } => (Observed::Failed, Some(failure)),
        Progress::Killing { .. } => (Observed::Killing, None),
        Progress::Killed => (Observed::Killed, None),
    };
    let view = View {
        id: body.id().clone(),
        observed,
        reason: failure.map(|failure| failure.reason.clone()).unwrap_or_default(),
        cause: failure.map(|failure| failure.cause).unwrap_or_default(),
        fence: mind.wish.fence.clone(),
        incarnation: body.incarnation().cloned(),
        steps: mind.steps.clone(),
        kept: body.kept(),
        host_ip: body.host_ip(),
        envd_version: body.envd_version(),
        vcpus: mind.wish.spec.vcpus,
        process: body.process(),
        settled: settled && !mind.restart,
    };
    Published {
        view,
        guest: body.guest().filter(|_| observed == Observed::Running).cloned(),
        microvm: body.microvm().cloned(),
        console: Some(body.console().clone()),
        uid: body.uid(),
    }
}

impl Mind {
    fn take(&mut self, message: Message, published: &watch::Sender<Published>) {
        let (verdict, reply) = match message {
            Message::Snapshot { id, reply } => {
                if self.snapshots.len() < SNAPSHOTS_WAITING_MAX {
                    self.snapshots.push((id, reply));
                } else {
                    let _ = reply.send(Err(NotTaken::Busy));
                }
                return;
            }
            Message::Run { fence, spec, reply } => {
                let verdict = self.wish.judge_run(&self.progress, &fence, &spec);
                match verdict {
                    Ok(Verdict::Restart) => {
                        self.restart = true;
                        self.wish.spec = spec;
                        self.wish.desired = Desired::Running;
                        self.raise(fence);
                    }
                    Ok(Verdict::Advance) => {
                        self.wish.desired = Desired::Running;
                        self.raise(fence);
                    }
                    _ => {}
                }
                (verdict, reply)
            }
            Message::Pause { fence, kept, reply } => {
                let verdict = self.wish.judge_pause(&self.progress, &fence);
                match verdict {
                    Ok(Verdict::Pause) => {
                        self.wish.desired = Desired::Paused;
                        self.kept = kept;
                        self.restart = false;
                        self.raise(fence);
                    }
                    Ok(Verdict::Advance) => self.raise(fence),
                    _ => {}
                }
                (verdict, reply)
            }
            Message::Kill { fence, reply } => {
                let verdict = self.wish.judge_kill(&fence);
                if verdict.is_ok() {
                    self.wish.desired = Desired::Killed;
                    self.restart = false;
                    self.raise(fence);
                }
                (verdict, reply)
            }
        };
        if matches!(verdict, Ok(Verdict::Restart | Verdict::Advance | Verdict::Pause | Verdict::Kill)) {
            self.refusal = None;
            // Before the caller hears that its wish was taken: else it would take the end of the wish before for the end of its own.
            published.send_modify(|published| {
                published.view.settled = false;
                published.view.fence = self.wish.fence.clone();
            });
        }
        // The caller may have gone; its wish stands all the same.
        let _ = reply.send(verdict.map(drop));
    }

    /// Nothing else is to be done: the next snapshot that somebody waits for, if there can be one.
    fn begin_snapshot(&mut self, last: Option<Generation>) -> bool {
        // Who has left wants none.
        self.snapshots.retain(|(_, reply)| !reply.is_closed());
        let Some(&(to, _)) = self.snapshots.first() else { return false };
        self.progress = match (&self.progress, last) {
            (Progress::Running, _) => Progress::Snapshotting { to, done: None },
            (Progress::Paused { failure, .. }, Some(generation)) => {
                Progress::Copying { to, generation, failure: failure.clone() }
            }
            (other, _) => {
                let state = match other {
                    Progress::Killing { .. } | Progress::Killed => Observed::Killed,
                    _ => Observed::Failed,
                };
                for (_, reply) in self.snapshots.drain(..) {
                    let _ = reply.send(Err(NotTaken::State(state)));
                }
                return false;
            }
        };
        true
    }

    fn answer_snapshot(&mut self, id: SnapshotId, answer: &Result<(), NotTaken>) {
        let asked = self.snapshots.extract_if(.., |(of, _)| *of == id);
        self.answers.extend(asked.map(|(_, reply)| (reply, answer.clone())));
    }

    fn raise(&mut self, fence: Fence) {
        self.unwritten |= self.wish.fence != fence;
        self.wish.fence = fence;
    }

    /// `last`: what failed was to bring that saved state back, and the sandbox is paused in it again.
    fn fail(&mut self, kind: FailureKind, reason: String, cause: Cause, last: Option<Generation>) {
        let failure = Failure { kind, reason, cause };
        self.progress = match last {
            Some(generation) => {
                if self.wish.desired == Desired::Running {
                    self.wish.desired = Desired::Paused;
                }
                Progress::Parking { generation, failure: Some(failure), done: None }
            }
            None => Progress::Failing { failure, done: None },
        };
    }

    /// One that may have run keeps its disk, and no fresh guest takes its place.
    fn kind_of_failed_create(&self) -> FailureKind {
        if self.may_have_run { FailureKind::Exited } else { FailureKind::Create }
    }

    fn advance(&mut self, step: Step, last: Option<Generation>) {
        if step == Step::GiveUp {
            let reason = format!("it did not run within {} s", CREATE_TIME_MAX.as_secs());
            return self.fail(self.kind_of_failed_create(), reason, Cause::Other, last);
        }
        let reverted = matches!(step, Step::Revert(Revert::Commit));
        if let (true, Progress::Reverting { what: Undone::Pause { failure, .. }, .. }) = (reverted, &self.progress) {
            measures::pause_rolled_back();
            self.refusal = Some(failure.clone());
        }
        if let (
            Step::Snapshot(Snapshot::Commit) | Step::Copy,
            &(Progress::Snapshotting { to, .. } | Progress::Copying { to, .. }),
        ) = (step, &self.progress)
        {
            self.answer_snapshot(to, &Ok(()));
        }
        let progress = std::mem::replace(&mut self.progress, Progress::Absent);
        self.progress = match (step, progress) {
            (Step::Create(Create::Commit), _) => Progress::Running,
            (Step::Create(create), Progress::Making { give_up_at, .. }) => {
                Progress::Making { done: Some(create), give_up_at }
            }
            (Step::Pause(Pause::Seal), Progress::Pausing { to, .. }) => {
                Progress::Parking { generation: to, failure: None, done: None }
            }
            (Step::Pause(pause), Progress::Pausing { to, kept, .. }) => {
                Progress::Pausing { to, kept, done: Some(pause) }
            }
            (Step::Revert(Revert::Commit), _) => Progress::Running,
            (Step::Snapshot(Snapshot::Commit), _) => Progress::Running,
            (Step::Snapshot(snapshot), Progress::Snapshotting { to, .. }) => {
                Progress::Snapshotting { to, done: Some(snapshot) }
            }
            (Step::Copy, Progress::Copying { generation, failure, .. }) => Progress::Paused { generation, failure },
            (Step::Revert(revert), Progress::Reverting { what, .. }) => {
                Progress::Reverting { what, done: Some(revert) }
            }
            (Step::Park(Down::Settle), Progress::Parking { generation, failure, .. }) => {
                Progress::Paused { generation, failure }
            }
            (Step::Park(down), Progress::Parking { generation, failure, .. }) => {
                Progress::Parking { generation, failure, done: Some(down) }
            }
            (Step::Fail(Down::Settle), Progress::Failing { failure, .. }) => Progress::Failed { failure },
            (Step::Fail(down), Progress::Failing { failure, .. }) => Progress::Failing { failure, done: Some(down) },
            (Step::Kill(Down::Directory), _) => Progress::Killed,
            (Step::Kill(down), _) => Progress::Killing { done: Some(down) },
            (_, other) => other,
        };
    }

    /// A step failed. True when it has to be tried again after a pause.
    fn stumble(&mut self, step: Step, error: &StepError, id: &model::ids::SandboxId, last: Option<Generation>) -> bool {
        match step {
            Step::Pause(_) if self.wish.desired == Desired::Killed => false,
            Step::Pause(pause) => {
                warn!(sandbox.id = %id, step = pause.name(), cause = error.causes(), "sandbox {id} is not paused, at {}: {error}", pause.name());
                if let Progress::Pausing { to, .. } = self.progress {
                    let failure = Failure { kind: FailureKind::Pause, reason: error.public(), cause: error.cause() };
                    self.progress = Progress::Reverting { what: Undone::Pause { to, failure }, done: None };
                }
                self.wish.desired = Desired::Running;
                self.restart = false;
                false
            }
            Step::Snapshot(_) | Step::Copy => {
                warn!(sandbox.id = %id, step = step.name(), cause = error.causes(), "there is no snapshot of sandbox {id}, at {}: {error}", step.name());
                let failure = Failure { kind: FailureKind::Snapshot, reason: error.public(), cause: error.cause() };
                match self.progress.clone() {
                    Progress::Snapshotting { to, .. } => {
                        self.answer_snapshot(to, &Err(NotTaken::Failed(failure)));
                        self.progress = Progress::Reverting { what: Undone::Snapshot, done: None };
                    }
                    Progress::Copying { to, generation, failure: before } => {
                        self.answer_snapshot(to, &Err(NotTaken::Failed(failure)));
                        self.progress = Progress::Paused { generation, failure: before };
                    }
                    _ => {}
                }
                false
            }
            Step::Revert(revert) => {
                warn!(sandbox.id = %id, step = revert.name(), cause = error.causes(), "that sandbox {id} goes on will be tried again: {error}");
                true
            }
            Step::Create(_) if self.wish.desired == Desired::Killed => false,
            Step::Create(create) => {
                warn!(sandbox.id = %id, step = create.name(), cause = error.causes(), "sandbox {id} failed at {}: {error}", create.name());
                self.fail(self.kind_of_failed_create(), error.public(), error.cause(), last);
                false
            }
            // Taking down is repeated until it is done: nothing may be left behind.
            Step::Park(down) | Step::Fail(down) | Step::Kill(down) => {
                warn!(sandbox.id = %id, step = down.name(), cause = error.causes(), "taking down sandbox {id} will be tried again: {error}");
                true
            }
            Step::GiveUp => false,
        }
    }
}
