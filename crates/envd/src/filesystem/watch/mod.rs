//! Watching directories: inotify's events under the names that clients know, as the user who asks.
//!
//! Each watch is a thread with its user's rights to files and an inotify instance of its own; it ends when its handle is dropped. Its
//! queue is bounded: when nobody takes events the thread waits, the kernel's own queue fills up, and what is lost then is said by an
//! event of unspecified type for `.`; clients that do not know it skip it.
//!
//! ```text
//!  inotify -> tree (which directory is which, what has been seen already) -> queue -> stream of WatchDir
//!                                                                               \-> GetWatcherEvents, which asks for a last look first
//! ```

mod raw;
mod tree;

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, mpsc as control};
use std::time::Duration;

use api::guest::filesystem::FilesystemEvent;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::time::Instant;

use crate::users::{self, Account};
use tree::Tree;

/// Watches at once. The kernel lets one user have 128 inotify instances, and processes of the guest want some of them.
const WATCHES_MAX: usize = 64;
/// Events that wait in envd for whoever watches; as many again and more (16384) wait in the kernel.
const QUEUE_MAX: usize = 2048;
/// Events of one `GetWatcherEvents`; the next one brings the rest.
const ANSWER_MAX: usize = 20_000;
/// A watcher that nobody has asked for so long gives up its place when another one needs it.
const FORGOTTEN: Duration = Duration::from_secs(600);
/// How often it is seen whether the second half of a rename is overdue.
const RENAME_LOOK: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };

#[derive(Debug, thiserror::Error)]
pub enum Refused {
    #[error("too many watches")]
    TooMany,
    #[error("this is a network mount, which does not tell of changes made elsewhere")]
    NetworkMount,
    #[error("watch the directory")]
    Watch(#[source] io::Error),
}

#[derive(Clone)]
pub struct Wanted {
    pub path: PathBuf,
    pub recursive: bool,
    pub include_entry: bool,
    pub allow_network_mounts: bool,
}

/// Ends the watch when dropped.
pub struct Watch {
    events: mpsc::Receiver<FilesystemEvent>,
    thread: Handle,
    _place: OwnedSemaphorePermit,
}

impl Watch {
    /// Cancel-safe. `None` when the watched directory is gone.
    pub async fn next(&mut self) -> Option<FilesystemEvent> {
        self.events.recv().await
    }

    /// What has happened until now.
    async fn take_all(&mut self) -> Vec<FilesystemEvent> {
        let mut taken = Vec::new();
        let mut looked = self.thread.look();
        while taken.len() < ANSWER_MAX {
            tokio::select! {
                // What came before the look was finished is in the queue before the answer is.
                biased;
                event = self.events.recv() => match event {
                    Some(event) => taken.push(event),
                    None => break,
                },
                _ = &mut looked => {
                    while let Ok(event) = self.events.try_recv() {
                        taken.push(event);
                    }
                    break;
                }
            }
        }
        taken
    }
}

/// Speaks to the watching thread: by a queue, and by an eventfd that it polls. One who looks waits before he looks again, so that the
/// queue holds no more than there are requests.
struct Handle {
    looks: Option<control::Sender<oneshot::Sender<()>>>,
    wake: Arc<OwnedFd>,
}

impl Handle {
    /// Answered, or dropped with the thread, when all events up to now are in the queue.
    fn look(&self) -> oneshot::Receiver<()> {
        let (done, answer) = oneshot::channel();
        if let Some(looks) = &self.looks {
            let _ = looks.send(done);
        }
        self.wake();
        answer
    }

    fn wake(&self) {
        // Fails only when the counter is full, and then the thread is awake.
        let _ = rustix::io::write(&*self.wake, &1u64.to_ne_bytes());
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.looks = None;
        self.wake();
    }
}

/// All watches of the guest, and those of them that are asked by id.
pub struct Watchers {
    places: Arc<Semaphore>,
    polled: Mutex<HashMap<String, Polled>>,
}

struct Polled {
    watch: Arc<tokio::sync::Mutex<Watch>>,
    asked: Instant,
}

impl Default for Watchers {
    fn default() -> Self {
        Self { places: Arc::new(Semaphore::new(WATCHES_MAX)), polled: Mutex::default() }
    }
}

impl Watchers {
    /// Returns when everything below the directory is watched.
    pub async fn watch(&self, account: &Account, wanted: Wanted) -> Result<Watch, Refused> {
        let place = match self.places.clone().try_acquire_owned() {
            Ok(place) => place,
            Err(_) => {
                self.forget();
                self.places.clone().try_acquire_owned().map_err(|_| Refused::TooMany)?
            }
        };
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let wake = Arc::new(wake.map_err(|e| Refused::Watch(e.into()))?);
        let (looks, asked) = control::channel();
        let (queue, events) = mpsc::channel(QUEUE_MAX);
        let (started, start) = oneshot::channel();
        let watch = Watch { events, thread: Handle { looks: Some(looks), wake: wake.clone() }, _place: place };
        users::detached(account, move || match Tree::watch(&wanted) {
            Ok(mut tree) => {
                let _ = started.send(Ok(()));
                follow(&mut tree, &asked, &wake, &queue)
            }
            Err(refused) => {
                let _ = started.send(Err(refused));
                Ok(())
            }
        })
        .map_err(Refused::Watch)?;
        start.await.unwrap_or_else(|_| Err(Refused::Watch(io::Error::from_raw_os_error(libc::EPERM))))?;
        Ok(watch)
    }

    /// The id under which the watch can be asked.
    pub fn keep(&self, watch: Watch) -> String {
        use std::hash::{BuildHasher as _, Hasher as _};
        // The standard library keys its hashers by the kernel's randomness; a restored guest has its watchers still.
        let id = format!("w{:016x}", std::hash::RandomState::new().build_hasher().finish());
        let polled = Polled { watch: Arc::new(tokio::sync::Mutex::new(watch)), asked: Instant::now() };
        self.polled().insert(id.clone(), polled);
        id
    }

    /// `None` when there is no such watcher.
    pub async fn events(&self, id: &str) -> Option<Vec<FilesystemEvent>> {
        let watch = {
            let mut polled = self.polled();
            let polled = polled.get_mut(id)?;
            polled.asked = Instant::now();
            polled.watch.clone()
        };
        Some(watch.lock().await.take_all().await)
    }

    pub fn remove(&self, id: &str) -> bool {
        self.polled().remove(id).is_some()
    }

    fn forget(&self) {
        self.polled().retain(|_, polled| polled.asked.elapsed() < FORGOTTEN);
    }

    fn polled(&self) -> std::sync::MutexGuard<'_, HashMap<String, Polled>> {
        self.polled.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Until the handle or the directory is gone.
fn follow(
    tree: &mut Tree,
    looks: &control::Receiver<oneshot::Sender<()>>,
    wake: &OwnedFd,
    queue: &mpsc::Sender<FilesystemEvent>,
) -> io::Result<()> {
    loop {
        let patience = tree.awaits_rename().then_some(&RENAME_LOOK);
        {
            let mut sources = [PollFd::new(tree.inotify(), PollFlags::IN), PollFd::new(wake, PollFlags::IN)];
            match poll(&mut sources, patience) {
                Err(rustix::io::Errno::INTR) => continue,
                ready => ready?,
            };
        }
        // Before the events: what is asked for is a look from now on.
        let _ = rustix::io::read(wake, &mut [0; 8]);
        let mut answers = Vec::new();
        loop {
            match looks.try_recv() {
                Ok(answer) => answers.push(answer),
                Err(control::TryRecvError::Empty) => break,
                Err(control::TryRecvError::Disconnected) => return Ok(()),
            }
        }
        while let Some(events) = tree.read()? {
            for event in events {
                if queue.blocking_send(event).is_err() {
                    return Ok(());
                }
            }
        }
        tree.give_up_renames();
        for answer in answers {
            let _ = answer.send(());
        }
        if tree.is_gone() {
            return Ok(());
        }
    }
}
