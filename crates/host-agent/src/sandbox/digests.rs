//! What a saved state's large files hold, by digests of their pieces of a MiB: a bit that has turned, a file that is another's or was cut
//! is noticed before the guest runs on with it.
//!
//! They are made after the state is acknowledged, so a state of which the host went down right after it has none; it is loaded all the
//! same. Of memory all data is covered. Of the disk that is covered which differs from what the run had begun with, and what was covered
//! there; the rest is the template's.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::generation::{Files, GenerationError, identity};
use crate::disk::extents::{self, PIECE};
use crate::disk::is_store;
use crate::durable;
use crate::sealed;

const FORMAT: u32 = 1;
/// A MiB of a file takes 75 bytes of this: enough for half a TiB.
const BYTES_MAX: u64 = 64 * 1024 * 1024;
/// More would take the processors from those who wait for something.
const CHECKERS_MAX: usize = 4;
/// States whose digests wait to be made.
const WAITING_MAX: usize = 64;

type Pieces = BTreeMap<u64, String>;

#[derive(Debug, Default, Serialize, Deserialize)]
struct Digests {
    /// Of the state that they are of, so that they are not taken for another's.
    device: String,
    memory: Pieces,
    disk: Pieces,
}

/// What a state's files were cloned from, held open: it may be removed meanwhile.
#[derive(Debug, Default)]
pub struct Before {
    memory: Option<File>,
    disk: Option<File>,
    digests: Digests,
}

impl Before {
    /// Of the state that a run had begun with. What cannot be read now is as good as gone.
    pub fn of_state(files: &Files) -> Self {
        let open = |path: &Path| File::open(path).ok();
        let is_its_own = |digests: &Digests| identity(files).is_ok_and(|device| device == digests.device);
        let digests = read(files).ok().flatten().filter(is_its_own);
        Self {
            // Without its digests all of the memory is covered anew.
            memory: open(&files.memory()).filter(|_| digests.is_some()),
            disk: open(&files.disk()),
            digests: digests.unwrap_or_default(),
        }
    }

    /// Of a run that was booted: the file that its disk was cloned from.
    pub fn of_base(disk: Option<File>) -> Self {
        Self { disk, ..Self::default() }
    }
}

/// States whose digests are to be made. Nobody waits for them, so they wait for one another, without a thread; of what is too much
/// nothing is made, because each one that waits holds its files open.
#[derive(Debug, Clone)]
pub struct Queue {
    places: Arc<Semaphore>,
    turn: Arc<Semaphore>,
}

impl Default for Queue {
    fn default() -> Self {
        Self::new(WAITING_MAX)
    }
}

impl Queue {
    fn new(places: usize) -> Self {
        Self { places: Arc::new(Semaphore::new(places)), turn: Arc::new(Semaphore::new(1)) }
    }

    /// A state that goes before its turn has none. `hold` is kept until they are made. False: too many wait.
    pub fn push(&self, files: Files, before: Before, of: String, hold: impl Send + 'static) -> bool {
        let Ok(place) = self.places.clone().try_acquire_owned() else {
            warn!("{of} stays without digests: too many saved states wait for theirs");
            return false;
        };
        let turn = self.turn.clone();
        // What it makes is whole or not there: whatever ends it leaves nothing to be undone.
        tokio::spawn(async move {
            let turn = turn.acquire_owned().await;
            let make = move || {
                let _held = (place, turn, hold);
                match write(&files, &before) {
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                    Err(error) => warn!("{of} stays without digests: {error}"),
                    Ok(()) => debug!("{of} has digests"),
                }
            };
            let _ = tokio::task::spawn_blocking(make).await;
        });
        true
    }
}

/// Makes the digests of a valid state. Reads what has changed, so it takes a second for each GiB of that.
fn write(files: &Files, before: &Before) -> io::Result<()> {
    let disk = File::open(files.disk())?;
    // Without a device state it is of the disk alone.
    let memory = match files.device().try_exists()? {
        true => {
            let memory = File::open(files.memory())?;
            let covered = match &before.memory {
                Some(earlier) => extents::differing(&memory, earlier)?,
                None => extents::data(&memory)?,
            };
            renewed(&memory, &before.digests.memory, &covered)?
        }
        false => Pieces::new(),
    };
    let on_disk = match &before.disk {
        // What device-mapper keeps beside a base shares nothing with it.
        _ if is_store(&disk)? && before.digests.disk.is_empty() => extents::data(&disk)?,
        Some(earlier) => extents::differing(&disk, earlier)?,
        None => BTreeSet::new(),
    };
    let digests = Digests { device: identity(files)?, memory, disk: renewed(&disk, &before.digests.disk, &on_disk)? };
    durable::write(&files.digests(), &sealed::encode(FORMAT, &digests), 0o600)
}

fn renewed(file: &File, before: &Pieces, changed: &BTreeSet<u64>) -> io::Result<Pieces> {
    let mut pieces = before.clone();
    let mut buffer = vec![0; PIECE as usize];
    for piece in changed {
        // Beyond the end of a file that has become shorter there is nothing.
        match digest(file, *piece, &mut buffer)? {
            Some(digest) => pieces.insert(*piece, digest),
            None => pieces.remove(piece),
        };
    }
    Ok(pieces)
}

/// Whether the files hold what the state held when its digests were made; false when it has none, and when nobody waits any more. `memory`
/// and `disk`: the state's own, or clones of them.
pub fn check(files: &Files, memory: &Path, disk: &Path, given_up: &CancellationToken) -> Result<bool, GenerationError> {
    let Some(digests) = read(files)? else { return Ok(false) };
    if digests.device != identity(files).map_err(GenerationError::Read)? {
        return Err(GenerationError::Damaged("its digests are of another one".to_owned()));
    }
    // One that was made flat holds the same in another form.
    let length = |path: &Path| path.metadata().ok().map(|about| about.len());
    let own_disk = files.disk();
    let is_another = length(disk).zip(length(&own_disk)).is_some_and(|(one, own)| one != own);
    let disk = if is_another { &own_disk } else { disk };
    let wanted: Vec<(&str, &Path, u64, &str)> = [("memory", memory, &digests.memory), ("disk", disk, &digests.disk)]
        .into_iter()
        .flat_map(|(what, path, pieces)| {
            pieces.iter().map(move |(piece, digest)| (what, path, *piece, digest.as_str()))
        })
        .collect();
    let checkers = std::thread::available_parallelism().map_or(1, |cores| cores.get().min(CHECKERS_MAX));
    let share = wanted.len().div_ceil(checkers).max(1);
    std::thread::scope(|scope| {
        let checks: Vec<_> = wanted.chunks(share).map(|part| scope.spawn(|| check_pieces(part, given_up))).collect();
        checks.into_iter().try_for_each(|check| check.join().expect("checking does not panic"))
    })?;
    Ok(!given_up.is_cancelled())
}

fn check_pieces(wanted: &[(&str, &Path, u64, &str)], given_up: &CancellationToken) -> Result<(), GenerationError> {
    let mut buffer = vec![0; PIECE as usize];
    let mut open: Option<(&Path, File)> = None;
    for (what, path, piece, expected) in wanted {
        if given_up.is_cancelled() {
            return Ok(());
        }
        if open.as_ref().is_none_or(|(of, _)| of != path) {
            open = Some((path, File::open(path).map_err(GenerationError::Read)?));
        }
        let Some((_, file)) = &open else { continue };
        if digest(file, *piece, &mut buffer).map_err(GenerationError::Read)?.as_deref() != Some(expected) {
            return Err(GenerationError::Damaged(format!("its {what} differs from its digest at {piece} MiB")));
        }
    }
    Ok(())
}

fn read(files: &Files) -> Result<Option<Digests>, GenerationError> {
    let bytes = match durable::read(&files.digests(), BYTES_MAX) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other.map_err(GenerationError::Read)?,
    };
    let damaged = |broken| GenerationError::Damaged(format!("its digests: {broken}"));
    sealed::decode(FORMAT, &bytes).map(Some).map_err(damaged)
}

/// None beyond the end.
fn digest(file: &File, piece: u64, buffer: &mut [u8]) -> io::Result<Option<String>> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read_at(&mut buffer[filled..], piece * PIECE + filled as u64)? {
            0 => break,
            count => filled += count,
        }
    }
    Ok((filled > 0).then(|| blake3::hash(&buffer[..filled]).to_hex().to_string()))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::PathBuf;

    use model::sandbox::Kept;

    use super::*;
    use crate::sandbox::generation;
    use crate::sandbox::state::{Generation, Spec};

    const MEMORY: u64 = 5 * PIECE + 4096;

    /// As a save leaves it: with holes, and the last piece not a whole one.
    fn state(dir: &Path, number: u64) -> Files {
        let place = dir.join(format!("gen-{number:05}"));
        fs::create_dir(&place).unwrap();
        let files = generation::sealed_files(dir, Generation(number));
        fs::write(files.device(), format!("device {number}")).unwrap();
        for (path, size) in [(files.memory(), MEMORY), (files.disk(), 3 * PIECE)] {
            let file = File::create_new(path).unwrap();
            file.set_len(size).unwrap();
            for at in [0, 2 * PIECE + 100, size - 8] {
                file.write_all_at(b"data", at).unwrap();
            }
            file.sync_all().unwrap();
        }
        files
    }

    fn own(files: &Files) -> Result<bool, GenerationError> {
        check(files, &files.memory(), &files.disk(), &CancellationToken::new())
    }

    fn damage(path: &PathBuf, harm: impl FnOnce(&File)) {
        harm(&File::options().write(true).open(path).unwrap());
    }

    #[test]
    fn a_turned_bit_and_a_file_of_another_are_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let base = File::create_new(dir.path().join("base")).unwrap();
        base.set_len(3 * PIECE).unwrap();
        let files = state(dir.path(), 1);
        assert!(!own(&files).unwrap(), "it has none yet");
        write(&files, &Before::of_base(Some(base))).unwrap();
        assert!(own(&files).unwrap());
        for path in [files.memory(), files.disk()] {
            let whole = fs::read(&path).unwrap();
            let last = whole.len() as u64;
            for (harm, at) in [(b"Data", 0), (b"dat\0", 2 * PIECE + 100), (b"datA", last - 8)] {
                damage(&path, |file| file.write_all_at(harm, at).unwrap());
                assert!(matches!(own(&files), Err(GenerationError::Damaged(_))), "{path:?} at {at}");
                fs::write(&path, &whole).unwrap();
            }
            damage(&path, |file| file.set_len(last - 4096).unwrap());
            assert!(matches!(own(&files), Err(GenerationError::Damaged(_))));
            fs::write(&path, &whole).unwrap();
            assert!(own(&files).unwrap());
        }
        let other = state(dir.path(), 2);
        write(&other, &Before::default()).unwrap();
        assert!(own(&other).unwrap());
        fs::copy(other.digests(), files.digests()).unwrap();
        assert!(matches!(own(&files), Err(GenerationError::Damaged(_))), "they are another's");
        fs::write(files.digests(), "nonsense").unwrap();
        assert!(matches!(own(&files), Err(GenerationError::Damaged(_))));
    }

    #[test]
    fn what_was_covered_stays_covered_and_what_has_changed_is_covered_anew() {
        let dir = tempfile::tempdir().unwrap();
        let first = state(dir.path(), 1);
        write(&first, &Before::default()).unwrap();
        let before = Before::of_state(&first);
        // As the next state does, it shares with this one what has not changed, where the file system can.
        let second = state(dir.path(), 2);
        for (from, to) in [(first.memory(), second.memory()), (first.disk(), second.disk())] {
            fs::copy(from, &to).unwrap();
            damage(&to, |file| file.write_all_at(b"new", PIECE + 5).unwrap());
        }
        fs::remove_dir_all(dir.path().join("gen-00001")).unwrap();
        write(&second, &before).unwrap();
        assert!(own(&second).unwrap());
        for path in [second.memory(), second.disk()] {
            for at in [PIECE + 5, 2 * PIECE + 100] {
                let whole = fs::read(&path).unwrap();
                damage(&path, |file| file.write_all_at(b"x", at).unwrap());
                assert!(matches!(own(&second), Err(GenerationError::Damaged(_))), "{path:?} at {at}");
                fs::write(&path, &whole).unwrap();
            }
        }
    }

    /// The disk alone, then memory again: what the guest had in memory before is nothing to go by.
    #[test]
    fn a_state_without_memory_has_digests_of_its_disk() {
        let dir = tempfile::tempdir().unwrap();
        let first = state(dir.path(), 1);
        write(&first, &Before::default()).unwrap();
        let second = state(dir.path(), 2);
        for file in [second.memory(), second.device()] {
            fs::remove_file(file).unwrap();
        }
        let making = generation::begin(dir.path(), Generation(4)).unwrap();
        fs::rename(second.disk(), making.disk()).unwrap();
        fs::remove_dir_all(dir.path().join("gen-00002")).unwrap();
        let about = generation::About {
            kept: Kept::Disk,
            is_quiet: true,
            parent: None,
            vmm: microvm::Stamp {
                driver: String::new(),
                version: String::new(),
                isolation: String::new(),
                tsc_khz: 0,
                cpu: String::new(),
            },
            spec: &Spec::unknown(),
            envd_version: "",
            control_token: "",
        };
        generation::seal(dir.path(), Generation(4), &about).unwrap();
        let second = generation::sealed_files(dir.path(), Generation(4));
        damage(&second.disk(), |file| file.write_all_at(b"new", PIECE + 5).unwrap());
        write(&second, &Before::of_state(&first)).unwrap();
        assert!(own(&second).unwrap() && read(&second).unwrap().unwrap().memory.is_empty());
        damage(&second.disk(), |file| file.write_all_at(b"old", PIECE + 5).unwrap());
        assert!(matches!(own(&second), Err(GenerationError::Damaged(_))));
        damage(&second.disk(), |file| file.write_all_at(b"new", PIECE + 5).unwrap());
        let third = state(dir.path(), 3);
        write(&third, &Before::of_state(&second)).unwrap();
        assert!(own(&third).unwrap());
        damage(&third.memory(), |file| file.write_all_at(b"x", 0).unwrap());
        assert!(matches!(own(&third), Err(GenerationError::Damaged(_))));
    }

    #[tokio::test]
    async fn those_that_wait_take_no_thread_and_are_only_so_many() {
        let dir = tempfile::tempdir().unwrap();
        let queue = Queue::new(2);
        let turn = queue.turn.clone().acquire_owned().await.unwrap();
        let all: Vec<Files> = (1..=3).map(|number| state(dir.path(), number)).collect();
        let push = |files: &Files| queue.push(files.clone(), Before::default(), "it".to_owned(), ());
        assert!(push(&all[0]) && push(&all[1]));
        assert!(!push(&all[2]), "there are as many as may wait");
        drop(turn);
        let _both = queue.places.acquire_many(2).await.unwrap();
        assert!(own(&all[0]).unwrap() && own(&all[1]).unwrap() && !own(&all[2]).unwrap());
    }

    #[test]
    fn whoever_gives_up_leaves_nobody_reading() {
        let dir = tempfile::tempdir().unwrap();
        let files = state(dir.path(), 1);
        write(&files, &Before::default()).unwrap();
        let given_up = CancellationToken::new();
        given_up.cancel();
        assert!(!check(&files, Path::new("/nowhere"), Path::new("/nowhere"), &given_up).unwrap());
    }
}
