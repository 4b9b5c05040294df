//! Saved states that sandboxes begin with and that are no sandbox's own: one generation in a folder of its own for each key.
//!
//! ```text
//!  <pool>/<shelf>/<key>/gen-00001/     a generation like a sandbox's
//! ```
//!
//! Whoever begins with one has it on lease: one that is taken off the shelf meanwhile is removed when the last lease ends.

use std::collections::{HashMap, HashSet};
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tracing::warn;

use super::generation;
use super::state::Generation;
use crate::durable;

/// Each key has one.
pub const GENERATION: Generation = Generation(1);

#[derive(Debug)]
pub struct Shelf {
    folder: PathBuf,
    /// How many are made at the same time.
    at_once: usize,
    books: Arc<Mutex<Books>>,
}

#[derive(Debug, Default)]
struct Books {
    making: HashSet<String>,
    /// How many runs are being begun with each.
    leases: HashMap<String, usize>,
    /// Their large files hold what they did when they were made: looked at once by this agent.
    checked: HashSet<String>,
    /// To be removed when the last lease ends.
    condemned: HashSet<String>,
    /// Being removed: nobody begins with one of them, and nobody makes it anew before it is gone.
    removing: HashSet<String>,
}

impl Books {
    /// It is not all there yet, or is to go.
    fn is_taken(&self, key: &str) -> bool {
        self.making.contains(key) || self.condemned.contains(key) || self.removing.contains(key)
    }
}

/// The place of one that is being made; nobody else makes it meanwhile.
#[derive(Debug)]
pub struct Making {
    key: String,
    place: PathBuf,
    books: Arc<Mutex<Books>>,
}

impl Making {
    pub fn key(&self) -> &str {
        &self.key
    }

    pub fn place(&self) -> &Path {
        &self.place
    }

    /// It will not be made: what there is of it goes, and then somebody else may make it.
    pub fn abandon(self) {
        remove_place(&self.place);
    }
}

impl Drop for Making {
    fn drop(&mut self) {
        let mut books = lock(&self.books);
        books.making.remove(&self.key);
        if books.condemned.contains(&self.key) {
            remove_condemned(books, &self.books, &self.key, &self.place);
        }
    }
}

/// As long as it is held the state stays: a run is being begun with it.
#[derive(Debug)]
pub struct Lease {
    key: String,
    place: PathBuf,
    books: Arc<Mutex<Books>>,
}

impl Lease {
    pub fn key(&self) -> &str {
        &self.key
    }

    pub fn place(&self) -> &Path {
        &self.place
    }

    pub fn is_checked(&self) -> bool {
        lock(&self.books).checked.contains(&self.key)
    }

    pub fn note_checked(&self) {
        lock(&self.books).checked.insert(self.key.clone());
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut books = lock(&self.books);
        let left = books.leases.get(&self.key).map_or(0, |count| count - 1);
        if left > 0 {
            books.leases.insert(self.key.clone(), left);
            return;
        }
        books.leases.remove(&self.key);
        if books.condemned.contains(&self.key) {
            remove_condemned(books, &self.books, &self.key, &self.place);
        }
    }
}

/// Nobody makes it and nobody begins with it any more.
fn remove_condemned(mut marked: MutexGuard<'_, Books>, books: &Arc<Mutex<Books>>, key: &str, place: &Path) {
    marked.condemned.remove(key);
    if !marked.removing.insert(key.to_owned()) {
        return;
    }
    drop(marked);
    let (key, place, books) = (key.to_owned(), place.to_owned(), books.clone());
    // Wherever that is called: removing a file of gigabytes takes its time.
    let removing = std::thread::Builder::new().name("remove".to_owned());
    if let Err(error) = removing.spawn(move || remove_marked(&books, &key, &place)) {
        warn!("remove a saved state: {error}");
    }
}

impl Shelf {
    /// Removes what an earlier agent had half made, and what is not `wanted`.
    pub fn open(folder: PathBuf, at_once: usize, wanted: impl Fn(&str) -> bool) -> io::Result<Self> {
        DirBuilder::new().recursive(true).mode(0o700).create(&folder)?;
        for entry in fs::read_dir(&folder)? {
            let entry = entry?;
            let is_wanted = entry.file_name().to_str().is_some_and(&wanted);
            if !is_wanted || !generation::is_sealed(&entry.path(), GENERATION)? {
                remove(&entry.path())?;
            }
        }
        Ok(Self { folder, at_once, books: Arc::default() })
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }

    pub fn place(&self, key: &str) -> PathBuf {
        self.folder.join(key)
    }

    pub fn is_there(&self, key: &str) -> io::Result<bool> {
        if lock(&self.books).is_taken(key) {
            return Ok(false);
        }
        generation::is_sealed(&self.place(key), GENERATION)
    }

    /// None when there is none, or it is to go.
    pub fn lease(&self, key: &str) -> Option<Lease> {
        let place = self.place(key);
        let mut books = lock(&self.books);
        if books.is_taken(key) || !generation::is_sealed(&place, GENERATION).unwrap_or(false) {
            return None;
        }
        *books.leases.entry(key.to_owned()).or_default() += 1;
        Some(Lease { key: key.to_owned(), place, books: self.books.clone() })
    }

    /// None when it is there, is being made or removed, and when as many are being made as may be.
    pub fn begin(&self, key: &str) -> io::Result<Option<Making>> {
        let place = self.place(key);
        let mut books = lock(&self.books);
        let is_busy = books.making.len() >= self.at_once || books.making.contains(key) || books.removing.contains(key);
        if is_busy || generation::is_sealed(&place, GENERATION)? {
            return Ok(None);
        }
        DirBuilder::new().recursive(true).mode(0o700).create(&place)?;
        durable::sync_directory(&self.folder)?;
        books.making.insert(key.to_owned());
        Ok(Some(Making { key: key.to_owned(), place, books: self.books.clone() }))
    }

    /// Nobody begins with it any more. Who does just now is not disturbed, nor who makes it.
    pub fn remove(&self, key: &str) {
        let mut books = lock(&self.books);
        if books.leases.contains_key(key) || books.making.contains(key) {
            books.condemned.insert(key.to_owned());
        } else if books.removing.insert(key.to_owned()) {
            drop(books);
            remove_marked(&self.books, key, &self.place(key));
        }
    }

    pub fn is_in_use(&self, key: &str) -> bool {
        let books = lock(&self.books);
        books.leases.contains_key(key) || books.making.contains(key)
    }
}

fn remove_marked(books: &Mutex<Books>, key: &str, place: &Path) {
    remove_place(place);
    let mut books = lock(books);
    books.removing.remove(key);
    books.checked.remove(key);
}

fn remove_place(place: &Path) {
    if let Err(error) = remove(place) {
        warn!("remove a saved state: {error}");
    }
}

/// What is there no more from one instant to the next, however long the rest takes.
fn remove(place: &Path) -> io::Result<()> {
    match place.try_exists()? {
        true => generation::discard(place, GENERATION).and_then(|()| durable::remove_tree(place)),
        false => Ok(()),
    }
}

fn lock(books: &Mutex<Books>) -> MutexGuard<'_, Books> {
    books.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    fn put(shelf: &Shelf, key: &str) {
        fs::create_dir_all(shelf.place(key).join("gen-00001")).unwrap();
    }

    fn until_gone(path: &Path) {
        let began = Instant::now();
        while path.exists() {
            assert!(began.elapsed() < Duration::from_secs(10));
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    #[test]
    fn what_is_on_lease_stays_until_the_last_lease_ends() {
        let dir = tempfile::tempdir().unwrap();
        let shelf = Shelf::open(dir.path().join("shelf"), 9, |_| true).unwrap();
        assert!(shelf.lease("a").is_none());
        put(&shelf, "a");
        let leases = [shelf.lease("a").unwrap(), shelf.lease("a").unwrap()];
        assert!(shelf.is_in_use("a") && shelf.is_there("a").unwrap());
        shelf.remove("a");
        assert!(shelf.lease("a").is_none() && !shelf.is_there("a").unwrap());
        let [first, second] = leases;
        drop(first);
        assert!(second.place().join("gen-00001").exists());
        drop(second);
        until_gone(&shelf.place("a"));
        shelf.remove("a");
        put(&shelf, "a");
        shelf.remove("a");
        assert!(!shelf.place("a").exists());
    }

    #[test]
    fn one_makes_it_and_half_of_it_is_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let open = |at_once| Shelf::open(dir.path().join("shelf"), at_once, |key| key != "unwanted").unwrap();
        let shelf = open(1);
        let making = shelf.begin("a").unwrap().unwrap();
        assert!(shelf.begin("a").unwrap().is_none() && shelf.begin("b").unwrap().is_none());
        fs::create_dir(making.place().join("gen-00001.tmp")).unwrap();
        making.abandon();
        assert!(!shelf.place("a").exists());
        // Removed while it is made: it is not there when it is made.
        let making = shelf.begin("a").unwrap().unwrap();
        put(&shelf, "a");
        assert!(!shelf.is_there("a").unwrap() && shelf.lease("a").is_none(), "it is not all there");
        shelf.remove("a");
        assert!(making.place().join("gen-00001").exists());
        drop(making);
        until_gone(&shelf.place("a"));
        let making = shelf.begin("b").unwrap().unwrap();
        put(&shelf, "b");
        drop(making);
        assert!(shelf.begin("b").unwrap().is_none(), "it is there");
        put(&shelf, "unwanted");
        fs::create_dir_all(shelf.place("half").join("gen-00001.tmp")).unwrap();
        let shelf = open(2);
        assert!(shelf.is_there("b").unwrap());
        assert!(!shelf.place("half").exists() && !shelf.place("unwanted").exists());
        let _making = [shelf.begin("c").unwrap().unwrap(), shelf.begin("d").unwrap().unwrap()];
    }
}
