//! The steps of a pause, of going on when it does not come about, and of what a resume loads. As dumb as those of a create: `steps`.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use microvm::Start;
use model::sandbox::Kept;

use super::digests::Before;
use super::fence::Wish;
use super::generation::{self, About, Files};
use super::plan::{Pause, Revert, Undone};
use super::shelf::GENERATION;
use super::state::{Generation, Phase, Run};
use super::steps::{Body, StepError, blocking};
use crate::guest::{Guest, GuestError};
use crate::machines::MachineError;

/// What a saved state may take beside the pages that the microVM has changed.
const SLACK_MIB: u64 = 64;
/// For `/init` of a guest that was restored, repeated or not. Shorter than the watchdog in the guest, which lets users' processes go on
/// after 15 s: they must not run as who they were.
const INIT_TRIES_TIME_MAX: Duration = Duration::from_secs(10);
/// A guest whose first answer takes longer is told the time once more.
const CLOCK_BEHIND_MAX: Duration = Duration::from_millis(500);

/// A saved state that a run begins with.
pub struct Origin {
    place: PathBuf,
    generation: Generation,
}

impl Origin {
    pub fn files(&self) -> Files {
        generation::sealed_files(&self.place, self.generation)
    }
}

impl Body {
    /// The number that the next saved state gets.
    pub fn next_generation(&self) -> Generation {
        Generation(self.generation().map_or(1, |last| last.0 + 1))
    }

    pub(super) async fn pause(
        &mut self,
        step: Pause,
        to: Generation,
        kept: Kept,
        wish: &Wish,
    ) -> Result<(), StepError> {
        let run = self.run()?.clone();
        let microvm = self.microvm().cloned().ok_or(StepError::NoRun)?;
        let directory = self.directory();
        match step {
            Pause::Begin => {
                self.has_room_for_state(if kept == Kept::Memory { 1 } else { 0 }).await?;
                self.write(wish, Phase::Pausing { run, to }).await?;
            }
            Pause::Quiet => self.quieten(&run, kept).await?,
            Pause::Save if kept == Kept::Disk => {
                let files = blocking(move || generation::begin(&directory, to)).await?;
                let began = Instant::now();
                // What it was writing is in the file when this returns.
                microvm.stop_vcpus().await.map_err(MachineError::Save)?;
                self.context.ground.save_disk(run.slot, &wish.spec, &self.places(&run).disk, &files.disk()).await?;
                self.stopped = began.elapsed();
                tracing::info!(
                    sandbox.id = %self.id(), stopped_ms = self.stopped().as_millis(),
                    "saved the disk of sandbox {}", self.id()
                );
            }
            Pause::Save => {
                let files = blocking(move || generation::begin(&directory, to)).await?;
                let saved = microvm.save(&files.save_target()).await.map_err(MachineError::Save)?;
                self.context.ground.save_disk(run.slot, &wish.spec, &self.places(&run).disk, &files.disk()).await?;
                self.stopped = saved.stopped;
                tracing::info!(
                    sandbox.id = %self.id(),
                    copied_bytes = saved.copied_bytes,
                    stopped_ms = saved.stopped.as_millis(),
                    "saved the state of sandbox {}", self.id()
                );
            }
            Pause::Seal => {
                let vmm = self.context.machines.stamp_of(microvm.as_ref()).await?;
                let spec = wish.spec.clone();
                // Held open: what the run had begun with goes when this one is valid.
                let before = self.before(wish, &run).await;
                let files = generation::sealed_files(&directory, to);
                let is_quiet = self.is_quiet;
                blocking(move || {
                    let about = About {
                        kept,
                        is_quiet,
                        parent: run.generation,
                        vmm,
                        spec: &spec,
                        envd_version: &run.envd_version,
                        control_token: &run.control_token,
                    };
                    generation::seal(&directory, to, &about)
                })
                .await?;
                self.keep(to, Some(kept));
                self.undigested = Some((files, before));
            }
        }
        Ok(())
    }

    /// Room for all that the microVM may have in memory, so many times.
    pub(super) async fn has_room_for_state(&self, times: u64) -> Result<(), StepError> {
        let microvm = self.microvm().ok_or(StepError::NoRun)?;
        let wanted = times * (microvm.stats().await.map_err(MachineError::Save)?.rss_bytes >> 20) + SLACK_MIB;
        let mut room = (self.context.room)().await;
        if room.disk_free_mib < wanted {
            self.context.make_room().await;
            room = (self.context.room)().await;
        }
        if room.disk_free_mib < wanted {
            return Err(StepError::NoDisk { wanted, left: room.disk_free_mib });
        }
        Ok(())
    }

    /// The guest and the host let go of each other. Of a guest whose memory is not kept all that it has written must be on its disk.
    pub(super) async fn quieten(&mut self, run: &Run, kept: Kept) -> Result<(), StepError> {
        self.is_quiet = false;
        // What is written now is not written while the guest waits.
        self.context.ground.flush_disk(run.slot, &self.places(run).disk).await?;
        let guest = match self.guest().cloned() {
            None if kept == Kept::Disk => return Err(StepError::NotFlushed),
            None => return Ok(()),
            Some(guest) => guest,
        };
        // First, so that their ends have reached the guest before it stands still.
        guest.close_idle();
        let prepared = guest.prepare(&run.control_token).await;
        self.is_quiet = prepared.is_ok();
        match prepared {
            Ok(true) => {}
            Ok(false) if kept == Kept::Disk => return Err(StepError::NotFlushed),
            Err(error) if kept == Kept::Disk => return Err(StepError::Prepare(error)),
            Ok(false) => tracing::warn!(sandbox.id = %self.id(), "the guest has not flushed its disk in time"),
            // It cannot let its processes stand still: resumed, they would run with another's clock and random numbers.
            Err(error @ GuestError::Refused { .. }) => return Err(StepError::Prepare(error)),
            Err(error) => {
                tracing::warn!(sandbox.id = %self.id(), "the guest does not take part in this: {error}");
            }
        }
        Ok(())
    }

    /// Each step does what it can: the sandbox runs, or its microVM's end is noticed as ever.
    pub(super) async fn revert(&mut self, step: Revert, what: &Undone, wish: &Wish) -> Result<(), StepError> {
        let run = self.run()?.clone();
        match (step, what) {
            (Revert::Discard, Undone::Pause { to, .. }) => {
                let (directory, to) = (self.directory(), *to);
                blocking(move || generation::discard(&directory, to)).await.map_err(StepError::Files)?;
            }
            (Revert::Discard, Undone::Snapshot) => self.abandon_snapshot().await,
            (Revert::Continue, _) => {
                let microvm = self.microvm().cloned().ok_or(StepError::NoRun)?;
                microvm.continue_vcpus().await.map_err(MachineError::Continue)?;
            }
            (Revert::Thaw, _) => self.thaw(wish, &run).await?,
            (Revert::Commit, _) => self.write_running(wish, run).await,
        }
        Ok(())
    }

    /// What this run begins with; none when it is booted.
    pub(super) fn origin(&self, run: &Run) -> Option<Origin> {
        if let Some(generation) = run.generation {
            return Some(Origin { place: self.directory(), generation });
        }
        let place = match (run.snapshot, &run.template_generation, &self.context.template_generations) {
            (Some(id), ..) => self.context.snapshots.place(id),
            (None, Some(key), Some(all)) => all.place(key),
            _ => return None,
        };
        Some(Origin { place, generation: GENERATION })
    }

    /// What the run's files were cloned from.
    pub(super) async fn before(&self, wish: &Wish, run: &Run) -> Before {
        match self.origin(run) {
            Some(origin) => blocking(move || Before::of_state(&origin.files())).await,
            None => Before::of_base(self.context.ground.open_base(&wish.spec).await),
        }
    }

    /// Made when what somebody waits for is done. A state that is resumed or removed sooner has none.
    pub(super) fn make_digests(&mut self) {
        if let Some((files, before)) = self.undigested.take() {
            let of = format!("a saved state of sandbox {}", self.id());
            self.context.digests.push(files, before, of, ());
        }
    }

    /// How a microVM begins with a saved state, if that is one for this host; none when it is booted from the disk of that.
    pub(super) async fn load(&mut self, from: Origin, run: &Run, wish: &Wish) -> Result<Option<Start>, StepError> {
        let driver = self.context.machines.driver().await?;
        let spec = wish.spec.clone();
        let verified =
            blocking(move || generation::verified(&from.place, from.generation, &spec, &|saved| driver.loads(saved)));
        let (files, manifest) = verified.await?;
        if run.from_disk {
            return Ok(None);
        }
        self.known_by = match manifest.control_token.as_str() {
            // A template's guest has no identity yet and takes the first that it hears.
            "" => run.control_token.clone(),
            token => token.to_owned(),
        };
        Ok(Some(Start::Load { device: files.device(), made_by: Some(manifest.vmm) }))
    }

    /// Nothing else speaks with a restored guest before it knows who it is now, so nobody asks for its health first.
    pub(super) async fn introduce(&self, guest: &Guest, init: &api::guest::Init) -> Result<String, StepError> {
        let told = tokio::time::timeout(INIT_TRIES_TIME_MAX, guest.introduce(init, &self.known_by));
        let (version, took) = told.await.map_err(|_| StepError::Silent)?.map_err(StepError::Init)?;
        // Its clock stands at the moment of the question, so it is behind by as long as the first answer took. The second comes at once.
        if took > CLOCK_BEHIND_MAX
            && let Err(error) = guest.init(init, &init.control_token).await
        {
            tracing::warn!(sandbox.id = %self.id(), "the guest's clock may be {took:?} behind: {error}");
        }
        Ok(version)
    }
}
