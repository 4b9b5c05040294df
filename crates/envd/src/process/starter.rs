//! The thread that starts processes, one after the other.
//!
//! A start may hang: reading the program or entering the directory waits for a mount whose server is gone. It hangs a thread then, never
//! the runtime, and after a short while the next starts get a thread of their own. A start that takes too long is given up and its child
//! is killed.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::{Mutex, Semaphore, oneshot};
use tokio::time::timeout;

/// A start that takes longer lets the others go ahead. Most take a millisecond.
const SERIAL_TIME_MAX: Duration = Duration::from_millis(250);
/// A start that takes longer is given up: a program on a slow disk is there by then.
const TIME_MAX: Duration = Duration::from_secs(10);
/// Threads that may hang in a start; with more of them the others wait for their turn.
const HANGING_MAX: usize = 16;
/// What the standard library and the users' database need.
const STACK_BYTES: usize = 256 * 1024;

#[derive(Debug, thiserror::Error)]
pub enum NotStarted {
    #[error("start a thread")]
    Thread(#[source] io::Error),
    #[error("the start hangs: a directory or the program cannot be read")]
    Hangs,
    #[error("the start panicked")]
    Panicked,
}

type Work = Box<dyn FnOnce() + Send>;

pub struct Starter {
    /// The thread whose turn it is; `None` before the first start and after one was left alone.
    thread: Mutex<Option<mpsc::SyncSender<Work>>>,
    hanging: Arc<Semaphore>,
}

impl Starter {
    pub fn new() -> Self {
        Self { thread: Mutex::default(), hanging: Arc::new(Semaphore::new(HANGING_MAX)) }
    }

    /// Runs `work` on the thread, in the context of this runtime. `work` leaves its child's number in what it is given as soon as there
    /// is one.
    pub async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Progress) -> T + Send + 'static,
    ) -> Result<T, NotStarted> {
        let progress = Arc::new(Progress::default());
        let (answer, mut result) = oneshot::channel();
        let runtime = Handle::current();
        let work: Work = {
            let progress = progress.clone();
            Box::new(move || {
                let _context = runtime.enter();
                let _ = answer.send(work(&progress));
            })
        };
        let mut thread = self.thread.lock().await;
        let sender = match thread.take() {
            Some(sender) => sender,
            None => new_thread().map_err(NotStarted::Thread)?,
        };
        // It has none now, unless it hangs while no other may be left alone: that one is not waited for.
        *thread = match sender.try_send(work) {
            Ok(()) => Some(sender),
            Err(mpsc::TrySendError::Full(_)) => {
                *thread = Some(sender);
                return Err(NotStarted::Hangs);
            }
            Err(mpsc::TrySendError::Disconnected(_)) => return Err(NotStarted::Panicked),
        };
        if let Ok(done) = timeout(SERIAL_TIME_MAX, &mut result).await {
            return done.map_err(|_| NotStarted::Panicked);
        }
        let hanging = self.hanging.clone().try_acquire_owned().ok();
        let mut turn = Some(thread);
        if hanging.is_some()
            && let Some(mut thread) = turn.take()
        {
            // Without its sender the thread ends with this work.
            *thread = None;
        }
        let done = timeout(TIME_MAX, &mut result).await;
        drop(turn);
        match done {
            Ok(done) => done.map_err(|_| NotStarted::Panicked),
            Err(_) => {
                progress.kill();
                if let Some(hanging) = hanging {
                    // It counts until it hangs no more, which may be never.
                    tokio::spawn(async move {
                        let _ = result.await;
                        drop(hanging);
                    });
                }
                Err(NotStarted::Hangs)
            }
        }
    }
}

impl Default for Starter {
    fn default() -> Self {
        Self::new()
    }
}

fn new_thread() -> io::Result<mpsc::SyncSender<Work>> {
    let (sender, works) = mpsc::sync_channel::<Work>(1);
    std::thread::Builder::new().name("starter".to_owned()).stack_size(STACK_BYTES).spawn(move || {
        for work in works {
            // Whoever waits for it hears that nothing comes; the thread is still good.
            let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
        }
    })?;
    Ok(sender)
}

/// How far a child is on its way to its program; the child writes it itself.
#[derive(Debug, Default)]
pub struct Progress {
    pid: AtomicI32,
    entering: AtomicBool,
}

impl Progress {
    /// For the kernel, to write the child's number to.
    pub fn pid(&self) -> *mut i32 {
        self.pid.as_ptr()
    }

    /// In the child, around the step into its directory.
    pub fn entering(&self, entering: bool) {
        self.entering.store(entering, Ordering::SeqCst);
    }

    /// Whether the child was about to enter its directory when it said its last word.
    pub fn was_entering(&self) -> bool {
        self.entering.load(Ordering::SeqCst)
    }

    fn kill(&self) {
        let pid = self.pid.load(Ordering::SeqCst);
        if pid > 0 {
            // SAFETY: the child is not collected before its start returns, so the number is its own.
            unsafe { libc::kill(pid, libc::SIGKILL) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_start_that_hangs_lets_the_others_go_ahead() {
        let starter = Starter::new();
        assert_eq!(starter.run(|_| 1).await.unwrap(), 1);
        let (go, hang) = mpsc::channel::<()>();
        let hanging = starter.run(move |_| hang.recv().is_ok());
        let others = async {
            for n in 0..100 {
                assert_eq!(starter.run(move |_| n).await.unwrap(), n);
            }
            go.send(()).unwrap();
        };
        let (hung, ()) = tokio::join!(hanging, others);
        assert!(hung.unwrap());
        let panicked = starter.run(|_| -> u32 { std::panic::resume_unwind(Box::new("on purpose")) }).await;
        assert!(matches!(panicked, Err(NotStarted::Panicked)));
        assert_eq!(starter.run(|_| 2).await.unwrap(), 2);
    }
}
