//! Processes under a uid of this agent that belong to no sandbox: VMMs whose journals are gone. Removed when two looks a minute or more
//! apart have seen them, so that nothing that is just being made is touched.
//!
//! A VMM whose sandbox lies in quarantine belongs to a customer, whatever became of its journal: it is told of and left alone, until
//! somebody takes its directory out of quarantine or ends everything by `--stop-all`.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{error, warn};

use crate::ground::Ground as _;
use crate::measures;
use crate::real_ground::RealGround;
use crate::sandbox::Sandboxes;
use crate::sandbox::steps::blocking;
use crate::sweep;

/// Between looks; the grace decides, this only bounds how late it is noticed.
const LOOK_EVERY: Duration = Duration::from_secs(30);

pub async fn watch(ground: Arc<RealGround>, sandboxes: Arc<Sandboxes>, grace: Duration, stop: CancellationToken) {
    let mut seen: HashMap<u32, Instant> = HashMap::new();
    let mut told: BTreeSet<u32> = BTreeSet::new();
    let every = LOOK_EVERY.min(grace.max(Duration::from_millis(100)));
    loop {
        tokio::select! {
            () = tokio::time::sleep(every) => {}
            () = stop.cancelled() => return,
        }
        let tag = sandboxes.context().tag.clone();
        let uids = tag.uids();
        let living = match blocking(move || sweep::living(uids)).await {
            Ok(living) => living,
            Err(cause) => {
                warn!("look for processes without a sandbox: {cause}");
                continue;
            }
        };
        // Asked after the look: what was made meanwhile has an owner by now.
        let owned = sandboxes.uids();
        let set_aside = match sandboxes.set_aside().await {
            Ok(uids) => uids,
            // Nobody is ended while it is not known who must not be.
            Err(cause) => {
                warn!("look for sandboxes in quarantine: {cause}");
                continue;
            }
        };
        let unowned: BTreeSet<u32> = living.difference(&owned).copied().collect();
        for uid in unowned.intersection(&set_aside).copied() {
            if told.insert(uid) {
                error!(
                    uid,
                    "a microVM of uid {uid} lives and its sandbox is in quarantine; it is left alone, an operator must look"
                );
            }
        }
        let now = Instant::now();
        let strangers: BTreeSet<u32> = unowned.difference(&set_aside).copied().collect();
        seen.retain(|uid, _| strangers.contains(uid));
        for uid in strangers {
            let first = *seen.entry(uid).or_insert(now);
            if now.duration_since(first) < grace {
                continue;
            }
            match ground.sweep(uid).await {
                Ok(()) => {
                    error!(uid, "a process of uid {uid} belonged to no sandbox and was ended");
                    measures::leaked();
                    if let Some(slot) = tag.slot(uid)
                        && let Err(cause) = ground.detach_disk(slot).await
                    {
                        warn!(uid, cause = %cause.cause, "{cause}");
                    }
                    let sandboxes = sandboxes.clone();
                    ground.remove_orphan_groups(move |name| sandboxes.has_group(name)).await;
                }
                Err(cause) => error!(uid, "a process of uid {uid} belongs to no sandbox and cannot be ended: {cause}"),
            }
        }
    }
}
