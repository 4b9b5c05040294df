//! Has this host room for one more sandbox? Asked before anything is made; what is promised is counted until the sandbox is gone.
//!
//! The control plane places by its own books; this is the last word, because only the host knows what it has.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use model::ids::SandboxId;

/// Memory that stays with the host itself and its page cache.
const MEMORY_RESERVE_MIB: u64 = 512;
/// Room in the pool that no new sandbox gets: running ones must be able to write, and states to be written down.
const DISK_RESERVE_MIB: u64 = 1024;
/// Disks are thin and most guests fill little of theirs, so of each disk's size one part in so many is counted. A pool that becomes full
/// all the same gives its guests write errors and stops none.
const DISK_OVERCOMMIT: u64 = 16;

/// What the host has at this moment; nothing by default, so that nothing is admitted on a guess.
#[derive(Debug, Clone, Copy, Default)]
pub struct Room {
    pub memory_total_mib: u64,
    pub memory_available_mib: u64,
    pub disk_total_mib: u64,
    pub disk_free_mib: u64,
}

/// What a sandbox may come to need.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Need {
    pub memory_mib: u32,
    pub disk_mib: u32,
}

impl Need {
    fn memory(self) -> u64 {
        self.memory_mib.into()
    }

    /// Its memory lies in the pool too, and that is written whole.
    fn pool(self) -> u64 {
        self.memory() + u64::from(self.disk_mib) / DISK_OVERCOMMIT
    }
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoRoom {
    #[error("this host runs as many sandboxes as it may ({max})")]
    Sandboxes { max: usize },
    #[error("{wanted} MiB of memory do not fit on this host: {left} MiB are left")]
    Memory { wanted: u64, left: u64 },
    #[error("a sandbox that may take {wanted} MiB of disk does not fit on this host: {left} MiB are left")]
    Disk { wanted: u64, left: u64 },
}

#[derive(Debug)]
pub struct Admission {
    sandboxes_max: usize,
    promised: Mutex<HashMap<SandboxId, Promise>>,
}

#[derive(Debug, Clone, Copy)]
struct Promise {
    need: Need,
    /// What of it is not taken yet, and so still counts as free.
    coming: Coming,
}

#[derive(Debug, Clone, Copy)]
struct Coming {
    memory: u64,
    pool: u64,
}

impl Coming {
    /// Nothing is made.
    fn all(need: Need) -> Self {
        Self { memory: need.memory(), pool: need.pool() }
    }

    /// Its files are made. Of one that was restored the memory in the pool is shared: its own comes when it is paused.
    fn after(need: Need, is_unsaved: bool) -> Self {
        Self { memory: 0, pool: if is_unsaved { need.memory() } else { 0 } }
    }
}

impl Admission {
    pub fn new(sandboxes_max: usize) -> Self {
        Self { sandboxes_max, promised: Mutex::default() }
    }

    /// Promises the sandbox what it needs, or says why not. A sandbox that has a promise keeps it.
    pub fn admit(&self, id: &SandboxId, need: Need, room: Room) -> Result<(), NoRoom> {
        let mut promised = self.lock();
        if promised.contains_key(id) {
            return Ok(());
        }
        if promised.len() >= self.sandboxes_max {
            return Err(NoRoom::Sandboxes { max: self.sandboxes_max });
        }
        // Twice each: by what was promised, whether or not it is used, and by what there is, less what is promised and not taken yet.
        let all = |part: fn(Need) -> u64| promised.values().map(|promise| part(promise.need)).sum::<u64>();
        let coming = |part: fn(Coming) -> u64| promised.values().map(|promise| part(promise.coming)).sum::<u64>();
        let left = |total: u64, free: u64, reserve: u64, part: fn(Need) -> u64, coming: u64| {
            let unpromised = total.saturating_sub(reserve).saturating_sub(all(part));
            unpromised.min(free.saturating_sub(reserve).saturating_sub(coming))
        };
        let wanted = need.memory();
        let coming_memory = coming(|coming| coming.memory);
        let memory =
            left(room.memory_total_mib, room.memory_available_mib, MEMORY_RESERVE_MIB, Need::memory, coming_memory);
        if wanted > memory {
            return Err(NoRoom::Memory { wanted, left: memory });
        }
        let coming_pool = coming(|coming| coming.pool);
        let disk = left(room.disk_total_mib, room.disk_free_mib, DISK_RESERVE_MIB, Need::pool, coming_pool);
        if need.pool() > disk {
            return Err(NoRoom::Disk { wanted: need.pool(), left: disk });
        }
        promised.insert(id.clone(), Promise { need, coming: Coming::all(need) });
        Ok(())
    }

    /// Whether it is only what there is at this moment, and not what was promised, that leaves it no room.
    pub fn is_within_promises(&self, need: Need, room: Room) -> bool {
        let promised = self.lock();
        let fits = |total: u64, reserve: u64, part: fn(Need) -> u64| {
            let all: u64 = promised.values().map(|promise| part(promise.need)).sum();
            part(need) <= total.saturating_sub(reserve).saturating_sub(all)
        };
        fits(room.disk_total_mib, DISK_RESERVE_MIB, Need::pool)
            && fits(room.memory_total_mib, MEMORY_RESERVE_MIB, Need::memory)
    }

    /// What was there before this start keeps its promise, whatever there is.
    pub fn remember(&self, id: &SandboxId, need: Need, is_unsaved: bool) {
        self.lock().insert(id.clone(), Promise { need, coming: Coming::after(need, is_unsaved) });
    }

    /// The sandbox's files take their room from now on. `is_unsaved`: its memory is in no file yet, and takes its room when it is saved.
    pub fn made(&self, id: &SandboxId, is_unsaved: bool) {
        if let Some(promise) = self.lock().get_mut(id) {
            promise.coming = Coming::after(promise.need, is_unsaved);
        }
    }

    pub fn release(&self, id: &SandboxId) {
        self.lock().remove(id);
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<SandboxId, Promise>> {
        self.promised.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn room() -> Room {
        Room { memory_total_mib: 4096, memory_available_mib: 3500, disk_total_mib: 12_000, disk_free_mib: 10_000 }
    }

    fn need(memory_mib: u32) -> Need {
        Need { memory_mib, disk_mib: 0 }
    }

    #[test]
    fn counts_what_was_promised() {
        let admission = Admission::new(3);
        let id = |n| SandboxId::from_random(n);
        admission.admit(&id(1), need(2048), room()).unwrap();
        admission.admit(&id(1), need(2048), room()).unwrap();
        admission.made(&id(1), false);
        let refused = admission.admit(&id(2), need(2048), room()).unwrap_err();
        assert_eq!(refused, NoRoom::Memory { wanted: 2048, left: 1536 });
        admission.release(&id(1));
        admission.admit(&id(2), need(2048), room()).unwrap();
        admission.admit(&id(3), need(128), room()).unwrap();
        admission.admit(&id(4), need(128), room()).unwrap();
        assert_eq!(admission.admit(&id(5), need(128), room()), Err(NoRoom::Sandboxes { max: 3 }));
    }

    #[test]
    fn keeps_a_reserve_of_memory_and_disk() {
        let admission = Admission::new(3);
        let id = SandboxId::from_random(1);
        let busy = Room { memory_available_mib: 700, ..room() };
        assert!(matches!(admission.admit(&id, need(256), busy), Err(NoRoom::Memory { left: 188, .. })));
        let full = Room { disk_free_mib: 1100, ..room() };
        assert_eq!(admission.admit(&id, need(256), full), Err(NoRoom::Disk { wanted: 256, left: 76 }));
        assert!(admission.is_within_promises(need(256), full) && admission.is_within_promises(need(256), busy));
        assert!(!admission.is_within_promises(need(256), Room { memory_total_mib: 700, ..busy }));
        assert!(!admission.is_within_promises(need(256), Room { disk_total_mib: 1200, ..full }));
        assert!(matches!(admission.admit(&id, need(1 << 20), room()), Err(NoRoom::Memory { .. })));
    }

    #[test]
    fn creates_at_the_same_time_are_not_promised_the_same_room() {
        let admission = Admission::new(10);
        let id = |n| SandboxId::from_random(n);
        let room = Room { memory_available_mib: 1600, disk_free_mib: 1624, ..room() };
        admission.admit(&id(1), need(512), room).unwrap();
        // Neither has taken any of it yet.
        assert_eq!(admission.admit(&id(2), need(512), room), Err(NoRoom::Disk { wanted: 512, left: 88 }));
        let larger = Room { disk_free_mib: 10_000, ..room };
        admission.admit(&id(2), need(512), larger).unwrap();
        assert_eq!(admission.admit(&id(3), need(512), larger), Err(NoRoom::Memory { wanted: 512, left: 64 }));
        // Of one that was restored the pool's part is still to come, and of another's nothing.
        let full = Room { memory_available_mib: 10_000, ..room };
        admission.made(&id(2), true);
        admission.made(&id(1), true);
        assert_eq!(admission.admit(&id(3), need(512), full), Err(NoRoom::Disk { wanted: 512, left: 0 }));
        admission.made(&id(2), false);
        // What is taken is not free any more and counts once.
        admission.made(&id(1), false);
        admission.admit(&id(3), need(512), larger).unwrap();
    }

    #[test]
    fn thin_disks_count_though_nothing_of_them_is_written() {
        let admission = Admission::new(10);
        let id = |n| SandboxId::from_random(n);
        let thin = Need { memory_mib: 128, disk_mib: 65_536 };
        for n in 1..=2 {
            admission.admit(&id(n), thin, room()).unwrap();
            admission.made(&id(n), false);
        }
        assert_eq!(admission.admit(&id(3), thin, room()), Err(NoRoom::Disk { wanted: 4224, left: 2528 }));
        admission.release(&id(1));
        admission.admit(&id(3), thin, room()).unwrap();
    }
}
