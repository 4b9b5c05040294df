//! The making and the end of one standby.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use crashpoint::hit;
use microvm::{Microvm, Start};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::{Husk, Standby, Standbys};
use crate::durable;
use crate::ground::Places;
use crate::guest::rehearse;
use crate::machines::{MachineError, Order};
use crate::sandbox::digests;
use crate::sandbox::generation::{GenerationError, verified};
use crate::sandbox::shelf::{GENERATION, Lease};
use crate::sandbox::state::Spec;
use crate::sandbox::steps::{Context, StepError, blocking, token};
use crate::sandbox::template_generations::makes;

/// The second goes ways that the first does not: then there is an identity before it.
const REHEARSALS: usize = 2;
/// What a guest still does after its answer; it stands still then.
const SETTLE_TIME: Duration = Duration::from_millis(50);
/// How often the end of one is tried at a time.
const END_TRIES: u32 = 5;
const END_AGAIN: Duration = Duration::from_millis(200);

impl Standbys {
    pub(super) async fn make(&self, context: &Context, lease: Lease, spec: &Spec) -> Result<Standby, StepError> {
        let slot = context.ground.reserve_slot()?;
        self.lock().slots.insert(slot);
        let husk = Husk::new(&self.folder, slot, context.tag.uid(slot));
        let made = fill(context, &lease, spec, &husk).await;
        match made {
            Ok((microvm, control_token)) => {
                let key = lease.key().to_owned();
                Ok(Standby { body: husk, microvm, control_token, key, told_at: SystemTime::now() })
            }
            Err(error) => {
                self.end_husk(context, &husk).await;
                Err(error)
            }
        }
    }

    pub async fn end(&self, context: &Context, standby: Standby) {
        if let Err(error) = standby.microvm.kill().await {
            warn!("end a standby: {error}");
        }
        self.end_husk(context, &standby.body).await;
    }

    /// What is left after some tries is tried again later: its slot stays in the books until nothing is.
    pub(super) async fn end_husk(&self, context: &Context, husk: &Husk) {
        for _ in 0..END_TRIES {
            match take_down(context, husk).await {
                Ok(()) => {
                    self.lock().slots.remove(&husk.slot);
                    return;
                }
                Err(error) => {
                    warn!(cause = error.causes(), "end a standby: {error}");
                    tokio::time::sleep(END_AGAIN).await;
                }
            }
        }
        self.lock().stuck.push(husk.clone());
    }
}

/// The directory goes before the slot does: it says whose the slot is.
async fn take_down(context: &Context, husk: &Husk) -> Result<(), StepError> {
    context.ground.sweep(husk.uid).await?;
    context.ground.detach_disk(husk.slot).await?;
    let place = husk.place.clone();
    blocking(move || durable::remove_tree(&place)).await.map_err(StepError::Files)?;
    context.ground.release_cgroup(&husk.name).await?;
    context.ground.release_network(husk.slot).await?;
    context.ground.free_slot(husk.slot);
    Ok(())
}

async fn fill(
    context: &Context,
    lease: &Lease,
    spec: &Spec,
    husk: &Husk,
) -> Result<(Arc<dyn Microvm>, String), StepError> {
    let ground = &context.ground;
    let places = Places::new(&husk.place, &husk.incarnation);
    let (place, run) = (husk.place.clone(), places.run.clone());
    let made = blocking(move || -> io::Result<()> {
        DirBuilder::new().mode(0o700).create(place)?;
        fs::create_dir_all(run)
    });
    made.await.map_err(StepError::Files)?;
    let vmm = context.machines.driver().await?;
    let (origin, shape, of_template) = (lease.place().to_owned(), spec.clone(), spec.snapshot.is_none());
    let (files, manifest) = blocking(move || {
        verified(&origin, GENERATION, &shape, &|saved| {
            if of_template { makes(vmm.as_ref(), saved) } else { vmm.loads(saved) }
        })
    })
    .await?;
    if spec.snapshot.is_some() && !manifest.is_quiet {
        return Err(StepError::Generation(GenerationError::Incompatible("what runs in it would run on".to_owned())));
    }
    ground.ensure_network(husk.slot).await?;
    ground.ensure_cgroup(&husk.name, spec).await?;
    ground.restore_disk(&files.disk(), &places.disk, husk.uid).await?;
    ground.clone_file(&files.memory(), &places.memory, husk.uid).await?;
    if !lease.is_checked() {
        let (files, places) = (files.clone(), places.clone());
        let reading = CancellationToken::new();
        if blocking(move || digests::check(&files, &places.memory, &places.disk, &reading)).await? {
            lease.note_checked();
        }
    }
    hit("standby.start.before")?;
    let load = Some(Start::Load { device: files.device(), made_by: Some(manifest.vmm.clone()) });
    let order = Order { group: &husk.name, spec, slot: husk.slot, uid: husk.uid, places: &places, load };
    let microvm = context.machines.start(order).await?;
    hit("standby.start.after")?;
    let rehearsed = tokio::select! {
        rehearsed = acquaint(context, husk, &microvm, manifest.control_token, spec.snapshot.is_some()) => rehearsed,
        how = microvm.exited() => Err(StepError::Ended(how.to_string())),
    };
    if rehearsed.is_err() {
        microvm.kill().await.map_err(MachineError::Kill)?;
    }
    let control_token = rehearsed?;
    hit("standby.stop.after")?;
    Ok((microvm, control_token))
}

/// The guest stands still afterwards. Gives the token by which it knows its host.
async fn acquaint(
    context: &Context,
    husk: &Husk,
    microvm: &Arc<dyn Microvm>,
    known_by: String,
    has_users: bool,
) -> Result<String, StepError> {
    microvm.continue_vcpus().await.map_err(MachineError::Continue)?;
    let mut known_by = known_by;
    for _ in 0..REHEARSALS {
        let secret = token()?;
        rehearse(context.ground.dial(husk.slot), &known_by, &secret, has_users).await.map_err(StepError::Init)?;
        known_by = secret;
    }
    tokio::time::sleep(SETTLE_TIME).await;
    microvm.stop_vcpus().await.map_err(MachineError::Continue)?;
    Ok(known_by)
}
