//! The steps of a snapshot: of a sandbox that goes on running, and of one that is paused. As dumb as those of a create: `steps`.

use std::fs;
use std::time::Instant;

use model::ids::SnapshotId;
use model::sandbox::Kept;

use super::console::BYTES_MAX;
use super::fence::Wish;
use super::generation::{self, About, GenerationError};
use super::plan::Snapshot;
use super::shelf::{GENERATION, Making};
use super::state::{Generation, Phase, Run};
use super::steps::{Body, StepError, blocking};
use super::template_generations::dig;
use crate::machines::MachineError;

impl Body {
    pub(super) async fn snapshot(&mut self, step: Snapshot, to: SnapshotId, wish: &Wish) -> Result<(), StepError> {
        let run = self.run()?.clone();
        let microvm = self.microvm().cloned().ok_or(StepError::NoRun)?;
        match step {
            Snapshot::Begin => {
                // A guest that was booted goes on writing into the file that the snapshot is shared with until that is a copy: for each
                // page it may need another one, and a pool that is full then ends it.
                self.has_room_for_state(if run.is_restored() { 1 } else { 2 }).await?;
                let making = self.begin_snapshot(to).await?;
                self.making = Some(making);
                self.write(wish, Phase::Snapshotting { run }).await?;
            }
            Snapshot::Quiet => self.quieten(&run, Kept::Memory).await?,
            Snapshot::Save => {
                let place = self.making()?.place().to_owned();
                let said = self.console().tail(Some(&microvm), BYTES_MAX).await.unwrap_or_default();
                let files = blocking(move || {
                    let files = generation::begin(&place, GENERATION)?;
                    fs::write(files.console(), said).map_err(GenerationError::Make)?;
                    Ok::<_, StepError>(files)
                })
                .await?;
                let saved = microvm.save(&files.save_target()).await.map_err(MachineError::Save)?;
                self.stopped = saved.stopped;
                let began = Instant::now();
                self.context.ground.save_disk(run.slot, &wish.spec, &self.places(&run).disk, &files.disk()).await?;
                self.stopped = saved.stopped + began.elapsed();
            }
            Snapshot::Continue => {
                let began = Instant::now();
                microvm.continue_vcpus().await.map_err(MachineError::Continue)?;
                self.stopped += began.elapsed();
                tracing::info!(
                    sandbox.id = %self.id(), stopped_ms = self.stopped().as_millis(),
                    "saved snapshot {to} of sandbox {}, which goes on", self.id()
                );
            }
            Snapshot::Thaw => self.thaw(wish, &run).await?,
            Snapshot::Seal => {
                let place = self.making()?.place().to_owned();
                let vmm = self.context.machines.stamp_of(microvm.as_ref()).await?;
                let spec = wish.spec.clone();
                let before = self.before(wish, &run).await;
                let files = generation::sealed_files(&place, GENERATION);
                let is_quiet = self.is_quiet;
                let is_shared = microvm.writes_into_its_file();
                blocking(move || {
                    if is_shared {
                        // The guest goes on writing into the file that this one is shared with.
                        let memory = generation::begun_files(&place, GENERATION).memory();
                        dig(&memory).map_err(GenerationError::Make)?;
                    }
                    let about = About {
                        kept: Kept::Memory,
                        is_quiet,
                        parent: None,
                        vmm,
                        spec: &spec,
                        envd_version: &run.envd_version,
                        control_token: &run.control_token,
                    };
                    generation::seal(&place, GENERATION, &about)
                })
                .await?;
                self.making = None;
                self.undigested = Some((files, before));
            }
            Snapshot::Commit => {
                self.write_running(wish, run).await;
                self.make_digests();
            }
        }
        Ok(())
    }

    /// Of a saved state, which is what a snapshot is.
    pub(super) async fn copy(&self, from: Generation, to: SnapshotId) -> Result<(), StepError> {
        let making = self.begin_snapshot(to).await?;
        let from = generation::sealed_files(&self.directory(), from);
        let ground = self.context.ground.clone();
        let copied = async {
            let place = making.place().to_owned();
            let of = from.clone();
            let (files, kept) = blocking(move || {
                Ok::<_, GenerationError>((generation::begin(&place, GENERATION)?, generation::kept(&of)?))
            })
            .await?;
            let all = [(from.disk(), files.disk()), (from.memory(), files.memory()), (from.device(), files.device())];
            for (from, to) in all.iter().take(if kept == Kept::Disk { 1 } else { 3 }) {
                ground.clone_file(from, to, 0).await?;
            }
            let said = self.console().tail(None, BYTES_MAX).await.unwrap_or_default();
            let place = making.place().to_owned();
            blocking(move || {
                fs::write(files.console(), said).map_err(GenerationError::Make)?;
                generation::seal_copy(&place, GENERATION, &from)
            })
            .await?;
            Ok(())
        };
        let copied = copied.await;
        if copied.is_err() {
            blocking(move || making.abandon()).await;
        }
        copied
    }

    async fn begin_snapshot(&self, to: SnapshotId) -> Result<Making, StepError> {
        let snapshots = self.context.snapshots.clone();
        let begun = blocking(move || snapshots.begin(to)).await.map_err(GenerationError::Make)?;
        begun.ok_or(StepError::SnapshotTaken)
    }

    /// What there is of a snapshot that will not be made.
    pub(super) async fn abandon_snapshot(&mut self) {
        if let Some(making) = self.making.take() {
            blocking(move || making.abandon()).await;
        }
    }

    /// Users' processes go on. That they were not told to is no failure: the guest's own watchdog lets them within seconds.
    pub(super) async fn thaw(&self, wish: &Wish, run: &Run) -> Result<(), StepError> {
        let guest = self.guest().cloned().ok_or(StepError::NoRun)?;
        if let Err(error) = guest.init(&self.init(wish, run)?, &run.control_token).await {
            tracing::warn!(sandbox.id = %self.id(), "the guest was not told to go on: {error}");
        }
        Ok(())
    }

    pub(super) async fn write_running(&self, wish: &Wish, run: Run) {
        if let Err(error) = self.write(wish, Phase::Running { run }).await {
            // What stands there instead says that it stood still: the next start lets it go on, which it does already.
            tracing::warn!(sandbox.id = %self.id(), "that the sandbox goes on was not written down: {error}");
        }
    }
}
