//! The end of a guest's console, kept beside the sandbox's journal until the sandbox is gone: the VMM has it only while it lives, and
//! reading takes it out of the VMM. Bounded; what a guest wrote between the last look and its own end is lost.

use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use microvm::Microvm;
use tokio::sync::Mutex;
use tracing::warn;

use super::steps::blocking;
use crate::durable;

/// As much as the drivers keep.
pub const BYTES_MAX: usize = 64 * 1024;
/// Between looks at a running guest. A look costs a third of a millisecond; a thousand sandboxes a thirtieth of a core.
pub const LOOK_EVERY: Duration = Duration::from_secs(10);
const FILE: &str = "console";

pub struct Console {
    path: PathBuf,
    text: Mutex<Text>,
}

#[derive(Default)]
struct Text {
    is_loaded: bool,
    /// Of earlier runs of the agent with the same microVM.
    before: Vec<u8>,
    whole: Vec<u8>,
}

impl Console {
    /// In the sandbox's directory.
    pub fn new(directory: PathBuf) -> Self {
        Self { path: directory.join(FILE), text: Mutex::default() }
    }

    /// A new microVM has said nothing yet.
    pub async fn clear(&self) -> io::Result<()> {
        let mut text = self.text.lock().await;
        *text = Text { is_loaded: true, ..Text::default() };
        let path = self.path.clone();
        blocking(move || durable::remove(&path)).await
    }

    /// A microVM that begins where another one stood: what that one has said comes first.
    pub async fn follow(&self, earlier: PathBuf) {
        let mut text = self.text.lock().await;
        // As below: nothing depends on it.
        let kept = blocking(move || durable::read(&earlier, 2 * BYTES_MAX as u64)).await.unwrap_or_default();
        self.keep(kept.clone()).await;
        *text = Text { is_loaded: true, before: kept.clone(), whole: kept };
    }

    /// The last bytes, of a living or a dead microVM. What is new is written down, so that it outlives the microVM and this agent.
    ///
    /// Cancel-safe: what was taken out of the VMM is kept also when nobody waits for it any more.
    pub async fn tail(
        self: &Arc<Self>,
        microvm: Option<&Arc<dyn Microvm>>,
        bytes: usize,
    ) -> Result<Vec<u8>, microvm::Error> {
        let (console, microvm) = (self.clone(), microvm.cloned());
        // A task, so that it goes on; the driver's own deadline ends it.
        let whole = tokio::spawn(async move { console.look(microvm).await }).await;
        let broken = |cause| microvm::Error::Io { what: "read the console", cause };
        let whole = whole.map_err(|error| broken(io::Error::other(error)))??;
        Ok(last(&whole, bytes).to_vec())
    }

    async fn look(&self, microvm: Option<Arc<dyn Microvm>>) -> Result<Vec<u8>, microvm::Error> {
        let mut text = self.text.lock().await;
        if !text.is_loaded {
            let path = self.path.clone();
            // A file that cannot be read is as good as none: it is a help for people, nothing depends on it.
            let kept = blocking(move || durable::read(&path, 2 * BYTES_MAX as u64)).await.unwrap_or_default();
            *text = Text { is_loaded: true, before: kept.clone(), whole: kept };
        }
        if let Some(microvm) = microvm {
            let live = microvm.console_tail(BYTES_MAX).await?;
            let whole = last(&[&text.before[..], &live].concat(), BYTES_MAX).to_vec();
            if whole != text.whole {
                self.keep(whole.clone()).await;
                text.whole = whole;
            }
        }
        Ok(text.whole.clone())
    }

    async fn keep(&self, whole: Vec<u8>) {
        let path = self.path.clone();
        let written = blocking(move || {
            // Neither synced nor exact: it must not cost more than it is worth.
            let temporary = path.with_extension("tmp");
            let mut options = std::fs::File::options();
            options.write(true).create(true).truncate(true).mode(0o600).open(&temporary)?.write_all(&whole)?;
            std::fs::rename(&temporary, &path)
        });
        if let Err(error) = written.await {
            warn!("the console {} was not kept: {error}", self.path.display());
        }
    }
}

fn last(text: &[u8], bytes: usize) -> &[u8] {
    &text[text.len().saturating_sub(bytes)..]
}
