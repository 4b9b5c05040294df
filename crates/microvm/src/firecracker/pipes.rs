//! The console, of which the last part is kept. Firecracker writes it into a pipe and drops what finds no room, so the pipe is emptied all
//! the time. A reader that comes anew, after a takeover, goes on with it.

use std::collections::VecDeque;
use std::io;
use std::os::unix::fs::FileTypeExt as _;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::fs::OFlags;
use tokio::io::AsyncReadExt as _;
use tokio::net::unix::pipe::Receiver;
use tokio::task::JoinHandle;

use crate::socket;

const KEPT_BYTES: usize = 64 * 1024;
const LOOK_AGAIN: Duration = Duration::from_millis(20);
const LOOKS: u32 = 500;

/// The end of a pipe's text. Dropping it ends the reading.
pub struct Tail {
    kept: Arc<Mutex<Kept>>,
    reading: JoinHandle<()>,
}

#[derive(Default)]
struct Kept {
    text: VecDeque<u8>,
    /// All that ever came.
    count: u64,
}

impl Tail {
    /// Reads that pipe of the jail. Opened before the VMM opens it: without a reader it could not. For writing as well, so that a pipe
    /// that nobody writes into has no end.
    pub fn open(root: &Path, name: &str) -> io::Result<Self> {
        let pipe = open(root, name)?;
        let kept = Arc::<Mutex<Kept>>::default();
        Ok(Self { reading: tokio::spawn(read(pipe, kept.clone())), kept })
    }

    /// The same after a takeover, in whose course the jail may still be moved: looked for until it is there.
    pub fn follow(root: &Path, name: &'static str) -> Self {
        let (root, kept) = (root.to_owned(), Arc::<Mutex<Kept>>::default());
        let into = kept.clone();
        let reading = tokio::spawn(async move {
            for _ in 0..LOOKS {
                match open(&root, name) {
                    Ok(pipe) => return read(pipe, into).await,
                    Err(_) => tokio::time::sleep(LOOK_AGAIN).await,
                }
            }
        });
        Self { kept, reading }
    }

    /// At most so many of the last bytes.
    pub fn last(&self, bytes: usize) -> Vec<u8> {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.text.range(kept.text.len().saturating_sub(bytes)..).copied().collect()
    }

    /// How many bytes have come.
    pub fn count(&self) -> u64 {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner).count
    }
}

impl Drop for Tail {
    fn drop(&mut self) {
        self.reading.abort();
    }
}

fn open(root: &Path, name: &str) -> io::Result<Receiver> {
    let file = std::fs::File::from(socket::within(root, name, OFlags::RDWR | OFlags::NONBLOCK)?);
    // Its owner may have put something else there.
    if !file.metadata()?.file_type().is_fifo() {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the VMM's pipe is none any more"));
    }
    Receiver::from_file(file)
}

async fn read(mut pipe: Receiver, kept: Arc<Mutex<Kept>>) {
    let mut piece = vec![0; 16 * 1024];
    while let Ok(count) = pipe.read(&mut piece).await {
        let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.count += count as u64;
        kept.text.extend(&piece[..count]);
        let beyond = kept.text.len().saturating_sub(KEPT_BYTES);
        kept.text.drain(..beyond);
    }
}
