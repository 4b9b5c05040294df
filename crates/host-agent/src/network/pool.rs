//! The agent's slots: some ready, some in use, the rest free numbers. Ready ones are made ahead in the background.

use std::collections::{BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use super::{Doorway, NetworkConfig, NetworkError, Slot, SlotId, namespace, outer, slot};

/// From a slot's release to its number's next use: longer than a socket of ours lives on to its guest that is gone (`doorway`), with what
/// it still has to say.
const REST: Duration = Duration::from_secs(30);

/// Whoever has just taken a ready one has the processors first, as long as there are others: most of a create by restore is over by then.
const AFTER_TAKEN: Duration = Duration::from_millis(100);

pub struct Network {
    tag: String,
    outer: String,
    rules: Mutex<Rules>,
    premade: usize,
    doorway: Doorway,
    numbers: Mutex<Numbers>,
    wanted: Notify,
    closed: CancellationToken,
}

/// What is in force.
struct Rules {
    deny: Vec<String>,
    /// The host's, as the kernel told them when they were loaded.
    host: String,
}

impl Rules {
    /// Blocks.
    fn load(tag: &str, deny: Vec<String>) -> Result<Self, NetworkError> {
        outer::ensure(tag, &deny)?;
        let tool = |cause| NetworkError::Tool { what: "read the host's rules", cause };
        Ok(Self { host: outer::host_rules(tag).map_err(tool)?, deny })
    }
}

#[derive(Default)]
struct Numbers {
    ready: VecDeque<SlotId>,
    /// Handed out, or in the making, or in removal.
    taken: BTreeSet<SlotId>,
    /// Those of them that are being made ahead.
    ahead: BTreeSet<SlotId>,
    /// Those of them that were ready when they were handed out: nobody has to look whether their making came to its end.
    whole: BTreeSet<SlotId>,
    /// Those of which something is still being removed, after `release_soon`.
    leaving: BTreeSet<SlotId>,
    /// Given back, until when they rest; the first ends first.
    resting: VecDeque<(Instant, SlotId)>,
    /// Goes round all numbers, so that one that was just given back comes last.
    next: u16,
}

impl Numbers {
    fn free(&mut self, now: Instant) -> Option<SlotId> {
        while self.resting.pop_front_if(|(until, _)| *until <= now).is_some() {}
        for _ in 0..SlotId::MAX {
            self.next = self.next % SlotId::MAX + 1;
            let slot = SlotId::new(self.next).expect("within the range");
            let rests = self.resting.iter().any(|(_, resting)| *resting == slot);
            let is_used = self.taken.contains(&slot) || self.ready.contains(&slot) || self.leaving.contains(&slot);
            if !is_used && !rests {
                self.taken.insert(slot);
                return Some(slot);
            }
        }
        None
    }
}

impl Network {
    /// Makes or finds the outer namespace, leaves the slots in use alone, removes the other own ones, and makes the first ready ones.
    pub async fn open(config: NetworkConfig) -> Result<Arc<Self>, NetworkError> {
        let NetworkConfig { tag, premade, in_use, deny } = config;
        let outer = outer::name(&tag);
        let kept = in_use.clone();
        let (doorway, rules, stuck) = blocking({
            let (tag, outer) = (tag.clone(), outer.clone());
            move || {
                let rules = Rules::load(&tag, deny)?;
                let mut stuck = BTreeSet::new();
                for name in namespace::names(&format!("{outer}-")) {
                    let number = name.rsplit('-').next().and_then(|number| number.parse().ok()).and_then(SlotId::new);
                    if let Some(slot) = number
                        && !kept.contains(&slot)
                        && let Err(error) = slot::remove(&tag, &outer, slot)
                    {
                        // Its number is given to nobody; what runs in others is waiting to be taken up.
                        warn!("the network slot {slot} of nobody stays: {error}");
                        stuck.insert(slot);
                    }
                }
                let doorway = Doorway::open(&outer)
                    .map_err(|cause| NetworkError::Io { what: "enter the outer namespace", cause })?;
                Ok((doorway, rules, stuck))
            }
        })
        .await?;
        // Another run begins elsewhere in the circle, so that addresses are not given again soon after a restart.
        let next = u16::try_from(std::process::id() % u32::from(SlotId::MAX)).unwrap_or(0);
        let taken = in_use.union(&stuck).copied().collect();
        let numbers = Numbers { taken, next, ..Numbers::default() };
        let network = Arc::new(Self {
            tag,
            outer,
            rules: Mutex::new(rules),
            premade,
            doorway,
            numbers: Mutex::new(numbers),
            wanted: Notify::new(),
            closed: CancellationToken::new(),
        });
        for _ in 0..premade {
            // Sandboxes that run are waiting to be taken up: what is only made ahead must not be in their way.
            if let Err(error) = network.make_one_ready().await {
                warn!("a network slot could not be made ahead: {error}");
                break;
            }
        }
        info!(premade, "network of agent {} is open", network.tag);
        Ok(network)
    }

    /// Loads the rules of host and outer namespace anew where the host's are not what they were, or other addresses are to be denied. Slots
    /// that exist keep the list they were made with; the outer namespace and the host have the new one.
    pub async fn guard(&self, deny: Vec<String>) -> Result<(), NetworkError> {
        let (tag, before) = (self.tag.clone(), {
            let rules = self.rules.lock().unwrap_or_else(PoisonError::into_inner);
            (rules.deny.clone(), rules.host.clone())
        });
        let loaded = blocking(move || {
            // A table that is gone cannot be listed.
            let is_whole = outer::host_rules(&tag).is_ok_and(|now| now == before.1);
            if !is_whole {
                error!("another program has removed or changed this agent's nft table on the host; it is loaded anew");
            }
            if is_whole && deny == before.0 { Ok(None) } else { Rules::load(&tag, deny).map(Some) }
        })
        .await?;
        if let Some(loaded) = loaded {
            *self.rules.lock().unwrap_or_else(PoisonError::into_inner) = loaded;
        }
        Ok(())
    }

    /// Keeps slots ready until the network is closed. For a tracked task.
    pub async fn keep_ready(self: Arc<Self>) {
        loop {
            tokio::select! {
                () = self.closed.cancelled() => return,
                () = self.wanted.notified() => {}
            }
            let begin = Instant::now() + AFTER_TAKEN;
            while !self.lock().ready.is_empty() && Instant::now() < begin {
                tokio::select! {
                    () = self.closed.cancelled() => return,
                    () = self.wanted.notified() => {}
                    () = tokio::time::sleep_until(begin) => {}
                }
            }
            while self.lock().ready.len() < self.premade && !self.closed.is_cancelled() {
                if let Err(e) = self.make_one_ready().await {
                    warn!("a network slot could not be made ahead: {e}");
                    break;
                }
            }
        }
    }

    async fn make_one_ready(&self) -> Result<(), NetworkError> {
        let slot = {
            let mut numbers = self.lock();
            let slot = numbers.free(Instant::now()).ok_or(NetworkError::Exhausted)?;
            numbers.ahead.insert(slot);
            slot
        };
        let made = self.make(slot).await;
        if made.is_err() {
            // Half a slot would be in nobody's books. Where it cannot be removed now, the number's next use does it.
            let (tag, outer) = (self.tag.clone(), self.outer.clone());
            if let Err(error) = blocking(move || slot::remove(&tag, &outer, slot)).await {
                warn!("half of the network slot {slot} stays: {error}");
            }
        }
        let mut numbers = self.lock();
        numbers.taken.remove(&slot);
        numbers.ahead.remove(&slot);
        made.map(|()| numbers.ready.push_back(slot))
    }

    async fn make(&self, slot: SlotId) -> Result<(), NetworkError> {
        let deny = self.rules.lock().unwrap_or_else(PoisonError::into_inner).deny.clone();
        let (tag, outer) = (self.tag.clone(), self.outer.clone());
        blocking(move || slot::make(&tag, &outer, slot, &deny)).await
    }

    /// A number, in memory only; a ready one when there is one. The caller writes it down before it uses the slot.
    pub fn reserve(&self) -> Result<SlotId, NetworkError> {
        let mut numbers = self.lock();
        let slot = match numbers.ready.pop_front() {
            Some(slot) => {
                numbers.taken.insert(slot);
                numbers.whole.insert(slot);
                slot
            }
            None => numbers.free(Instant::now()).ok_or(NetworkError::Exhausted)?,
        };
        drop(numbers);
        self.wanted.notify_one();
        Ok(slot)
    }

    /// Takes a number that a journal names; false when it is taken already.
    pub fn claim(&self, slot: SlotId) -> bool {
        let mut numbers = self.lock();
        numbers.ready.retain(|ready| *ready != slot);
        numbers.taken.insert(slot)
    }

    /// The slot, made now when it was not ready. Repeatable.
    pub async fn ensure(&self, slot: SlotId) -> Result<Slot, NetworkError> {
        let tag = self.tag.clone();
        let was_ready = self.lock().whole.contains(&slot);
        if !blocking(move || Ok(if was_ready { slot::exists(&tag, slot) } else { slot::is_whole(&tag, slot) })).await? {
            self.make(slot).await?;
        }
        Ok(self.slot(slot))
    }

    pub fn slot(&self, slot: SlotId) -> Slot {
        Slot { id: slot, namespace: slot.namespace(&self.tag) }
    }

    /// Removes the slot's namespace with everything in it. The number stays taken. Repeatable.
    pub async fn release(&self, slot: SlotId) -> Result<(), NetworkError> {
        self.lock().whole.remove(&slot);
        let (tag, outer) = (self.tag.clone(), self.outer.clone());
        blocking(move || slot::remove(&tag, &outer, slot)).await
    }

    /// The same, for a caller that somebody waits for: what is outside of the namespace, and of no use without it, goes a moment later. An
    /// agent that ends before leaves it to the kernel.
    pub async fn release_soon(self: &Arc<Self>, slot: SlotId) -> Result<(), NetworkError> {
        self.lock().whole.remove(&slot);
        let tag = self.tag.clone();
        let was_there = blocking(move || slot::remove_namespace(&tag, slot)).await?;
        let network = self.clone();
        self.lock().leaving.insert(slot);
        tokio::task::spawn_blocking(move || {
            slot::remove_ends(&network.outer, slot, was_there);
            network.lock().leaving.remove(&slot);
        });
        Ok(())
    }

    /// Gives a number back that was released, when nothing names it any more. It rests before its next use.
    pub fn free(&self, slot: SlotId) {
        let mut numbers = self.lock();
        if numbers.taken.remove(&slot) {
            numbers.resting.push_back((Instant::now() + REST, slot));
        }
        drop(numbers);
        self.wanted.notify_one();
    }

    pub(super) fn tag(&self) -> &str {
        &self.tag
    }

    /// Slots that are ready for nobody in particular, or being made so.
    pub(super) fn ahead(&self) -> BTreeSet<SlotId> {
        let numbers = self.lock();
        numbers.ready.iter().chain(&numbers.ahead).copied().collect()
    }

    pub fn doorway(&self) -> &Doorway {
        &self.doorway
    }

    /// Removes everything of this agent from the kernel's network: only when no sandbox is left.
    pub async fn close_all(&self) -> Result<(), NetworkError> {
        self.closed.cancel();
        remove_all(self.tag.clone()).await
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Numbers> {
        self.numbers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// For an agent that does not run: everything of its tag.
pub async fn remove_all(tag: String) -> Result<(), NetworkError> {
    blocking(move || {
        let outer = outer::name(&tag);
        for name in namespace::names(&format!("{outer}-")) {
            if let Some(slot) = name.rsplit('-').next().and_then(|number| number.parse().ok()).and_then(SlotId::new) {
                slot::remove(&tag, &outer, slot)?;
            }
        }
        outer::remove(&tag)
    })
    .await
}

pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, NetworkError> + Send + 'static,
) -> Result<T, NetworkError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(e) => Err(NetworkError::Io { what: "network work panicked", cause: std::io::Error::other(e) }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_that_was_given_back_rests() {
        let now = Instant::now();
        let slot = |n| SlotId::new(n).unwrap();
        let mut numbers = Numbers { next: 4, ..Numbers::default() };
        numbers.resting.push_back((now + REST, slot(5)));
        assert_eq!(numbers.free(now), Some(slot(6)));
        numbers.next = 4;
        assert_eq!(numbers.free(now + REST), Some(slot(5)));
        assert!(numbers.resting.is_empty());
    }
}
