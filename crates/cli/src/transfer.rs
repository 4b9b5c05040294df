//! What is sent up: it may last for hours, and only standing still ends it.

use indicatif::ProgressBar;

use crate::client::SILENCE_MAX;
use crate::failure::Failure;

/// Of a file's content, for each piece that is sent.
pub const CHUNK: usize = 64 << 10;

/// What `transfer` gives, or an error when `bar` stands still for [`SILENCE_MAX`]. Without a `length` (standard input) silence is the
/// writer's own affair.
pub async fn while_moving<T>(
    bar: &ProgressBar,
    length: Option<u64>,
    transfer: impl Future<Output = T>,
) -> Result<T, Failure> {
    let watch = async {
        if length.is_none() {
            std::future::pending::<()>().await;
        }
        let mut last = bar.position();
        loop {
            tokio::time::sleep(SILENCE_MAX).await;
            if bar.position() == last {
                return;
            }
            last = bar.position();
        }
    };
    tokio::select! {
        done = transfer => Ok(done),
        () = watch => Err(Failure::new(format!("not a byte has moved for {} s", SILENCE_MAX.as_secs()))),
    }
}
