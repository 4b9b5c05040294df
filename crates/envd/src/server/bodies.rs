//! The bodies of calls that are being read, bounded for all connections together: each one is held whole until it is understood.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;

/// Eight calls of the largest size at once; a sandbox may have 128 MiB in all.
const BYTES_MAX: usize = 32 * 1024 * 1024;

#[derive(Debug, Default)]
pub struct Bodies {
    taken: AtomicUsize,
}

impl Bodies {
    /// One request's share, of which it never holds more than `most` at once.
    pub fn share(self: &Arc<Self>, most: usize) -> Arc<Share> {
        Arc::new(Share { bodies: self.clone(), most, taken: AtomicUsize::new(0), is_refused: AtomicBool::new(false) })
    }
}

/// Lives as long as the request's messages are held.
#[derive(Debug)]
pub struct Share {
    bodies: Arc<Bodies>,
    most: usize,
    taken: AtomicUsize,
    is_refused: AtomicBool,
}

impl Share {
    /// Whether the request failed for want of room.
    pub fn is_refused(&self) -> bool {
        self.is_refused.load(Ordering::Relaxed)
    }

    fn take(&self, bytes: usize) -> bool {
        let taken = self.taken.load(Ordering::Relaxed);
        let more = bytes.min(self.most.saturating_sub(taken));
        let all = self.bodies.taken.fetch_add(more, Ordering::Relaxed) + more;
        self.taken.store(taken + more, Ordering::Relaxed);
        let fits = all <= BYTES_MAX;
        self.is_refused.store(!fits, Ordering::Relaxed);
        fits
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.bodies.taken.fetch_sub(self.taken.load(Ordering::Relaxed), Ordering::Relaxed);
    }
}

#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    #[error("read the body")]
    Read(#[from] hyper::Error),
    #[error("too many bytes of other calls are under way")]
    Refused,
}

/// A body that counts.
pub struct Counted {
    pub body: Incoming,
    pub share: Arc<Share>,
}

impl Body for Counted {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let frame = match ready!(Pin::new(&mut self.body).poll_frame(context)) {
            None => return Poll::Ready(None),
            Some(frame) => frame?,
        };
        if !self.share.take(frame.data_ref().map_or(0, Bytes::len)) {
            return Poll::Ready(Some(Err(BodyError::Refused)));
        }
        Poll::Ready(Some(Ok(frame)))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_shares_together_are_bounded_and_come_back() {
        let bodies = Arc::<Bodies>::default();
        let first = bodies.share(usize::MAX);
        assert!(first.take(BYTES_MAX - 10));
        let (small, large) = (bodies.share(10), bodies.share(20));
        // A stream of messages holds no more than one of them.
        assert!(small.take(8) && small.take(1000) && !small.is_refused());
        assert!(!large.take(20) && large.is_refused());
        drop(first);
        assert!(bodies.share(usize::MAX).take(1000));
        drop((small, large));
        assert_eq!(bodies.taken.load(Ordering::Relaxed), 0);
    }
}
