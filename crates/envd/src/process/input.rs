//! The way of input to a process: one writer per process, which takes whole messages in order.
//!
//! A caller that gives up, or whose connection breaks, leaves either all of its message in the queue or nothing. Closing is a message
//! too, so that it never overtakes input.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::io::{AsyncWrite, AsyncWriteExt as _};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};
use tokio::time::timeout;

use super::output::Ended;

/// Bytes that may wait for a process; a larger message waits alone.
const WAITING_BYTES_MAX: u32 = 256 * 1024;
/// Messages that may wait: small ones cost too.
const WAITING_MAX: usize = 1024;
/// Writing to a process that does not read its input waits this long.
const PATIENCE: Duration = Duration::from_secs(30);

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NotTaken {
    #[error("the process has no open input of this kind")]
    Closed,
    #[error("the process does not read its input")]
    Late,
}

enum Message {
    Bytes { bytes: Vec<u8>, written: oneshot::Sender<()>, _room: OwnedSemaphorePermit },
    Close,
}

/// Of all processes, since envd started.
static GIVEN: AtomicU64 = AtomicU64::new(0);

/// How many bytes processes were given: somebody typing is no idleness.
pub fn bytes_given() -> u64 {
    GIVEN.load(Ordering::Relaxed)
}

/// The queue of one process.
#[derive(Debug)]
pub struct Input {
    queue: mpsc::Sender<Message>,
    room: Arc<Semaphore>,
}

impl Input {
    /// Its writer ends when the process has `ended`, when it reads no more, or when its input is closed.
    pub fn of(pipe: impl AsyncWrite + Unpin + Send + 'static, ended: watch::Receiver<Option<Ended>>) -> Self {
        let (queue, messages) = mpsc::channel(WAITING_MAX);
        tokio::spawn(write(pipe, messages, ended));
        Self { queue, room: Arc::new(Semaphore::new(WAITING_BYTES_MAX as usize)) }
    }

    /// Returns when the process's pipe or terminal has taken all of it. A message that was taken into the queue is written also when
    /// nobody waits any more.
    pub async fn give(&self, bytes: Vec<u8>) -> Result<(), NotTaken> {
        let work = async {
            let size = u32::try_from(bytes.len()).unwrap_or(WAITING_BYTES_MAX).clamp(1, WAITING_BYTES_MAX);
            let room = self.room.clone().acquire_many_owned(size).await.map_err(|_| NotTaken::Closed)?;
            let (written, is_written) = oneshot::channel();
            let message = Message::Bytes { bytes, written, _room: room };
            self.queue.send(message).await.map_err(|_| NotTaken::Closed)?;
            is_written.await.map_err(|_| NotTaken::Closed)
        };
        timeout(PATIENCE, work).await.unwrap_or(Err(NotTaken::Late))
    }

    /// After what waits already; does not wait for it to be read. Closed already is fine.
    pub async fn close(&self) -> Result<(), NotTaken> {
        let work = async {
            // The way that input takes, so that it stays behind input whose room is not there yet.
            let Ok(_room) = self.room.acquire().await else { return };
            let _ = self.queue.send(Message::Close).await;
        };
        timeout(PATIENCE, work).await.map_err(|_| NotTaken::Late)
    }
}

async fn write(
    mut pipe: impl AsyncWrite + Unpin,
    mut messages: mpsc::Receiver<Message>,
    mut ended: watch::Receiver<Option<Ended>>,
) {
    let work = async {
        while let Some(Message::Bytes { bytes, written, .. }) = messages.recv().await {
            if pipe.write_all(&bytes).await.is_err() {
                return;
            }
            GIVEN.fetch_add(bytes.len() as u64, Ordering::Relaxed);
            let _ = written.send(());
        }
    };
    tokio::select! {
        () = work => {}
        // Somebody else may hold the other side and never read it.
        _ = ended.wait_for(Option::is_some) => {}
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt as _;

    use super::*;

    #[tokio::test]
    async fn a_caller_that_gives_up_leaves_a_whole_message_or_none_and_close_comes_after() {
        let (pipe, mut reader) = tokio::io::duplex(10);
        let (_ended, on_end) = watch::channel(None);
        let input = Input::of(pipe, on_end);
        let first = "a".repeat(100_000);
        // Given up with ten bytes written.
        let given_up = timeout(Duration::from_millis(20), input.give(first.clone().into_bytes())).await;
        assert!(given_up.is_err());
        let second = input.give(b"second".to_vec());
        let reading = async {
            input.close().await.unwrap();
            let mut all = String::new();
            reader.read_to_string(&mut all).await.unwrap();
            all
        };
        let (second, all) = tokio::join!(second, reading);
        assert_eq!((second, all == format!("{first}second")), (Ok(()), true));
        assert_eq!(input.give(b"late".to_vec()).await, Err(NotTaken::Closed));
        assert_eq!(input.close().await, Ok(()));
    }

    #[tokio::test]
    async fn the_end_of_the_process_ends_its_writer() {
        let (pipe, _reader) = tokio::io::duplex(10);
        let (ended, on_end) = watch::channel(None);
        let input = Input::of(pipe, on_end);
        let (given, ()) = tokio::join!(input.give(vec![0; 100]), async {
            tokio::task::yield_now().await;
            ended.send_replace(Some(Ended { code: 0, signal: None }));
        });
        assert_eq!(given, Err(NotTaken::Closed));
    }
}
