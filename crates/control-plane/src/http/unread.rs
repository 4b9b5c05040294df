//! Bodies that nobody reads to their end. A connection that is closed while its client still sends is reset, and the client loses the
//! answer that was on its way, most often a refusal. So what is left is read and dropped, within bounds, while the answer is sent.

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, header};
use http_body_util::BodyExt as _;
use hyper::body::{Body, Frame, Incoming, SizeHint};

const BYTES_MAX: usize = 64 * 1024 * 1024;
const TIME_MAX: Duration = Duration::from_secs(10);

/// A request's body; what is left of it when it is dropped is read by a task of its own.
pub struct ReadToEnd {
    /// Taken by the drop.
    body: Option<Incoming>,
    has_ended: bool,
    /// A client that waits to be told to go on sends nothing, and is told so by the first read.
    waits: bool,
}

impl ReadToEnd {
    pub fn new(body: Incoming, headers: &HeaderMap) -> Self {
        Self { body: Some(body), has_ended: false, waits: headers.contains_key(header::EXPECT) }
    }
}

impl Body for ReadToEnd {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        self.waits = false;
        let Some(body) = self.body.as_mut() else { return Poll::Ready(None) };
        let frame = ready!(Pin::new(body).poll_frame(cx));
        self.has_ended |= !matches!(frame, Some(Ok(_)));
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.body.as_ref().map_or_else(SizeHint::default, Body::size_hint)
    }
}

impl Drop for ReadToEnd {
    fn drop(&mut self) {
        let is_over = self.has_ended || self.waits || self.is_end_stream();
        let (false, Some(mut body), Ok(runtime)) = (is_over, self.body.take(), tokio::runtime::Handle::try_current())
        else {
            return;
        };
        // It ends with its connection, which waits for it.
        runtime.spawn(tokio::time::timeout(TIME_MAX, async move {
            let mut bytes = 0;
            while let Some(Ok(frame)) = body.frame().await {
                bytes += frame.data_ref().map_or(0, Bytes::len);
                if bytes > BYTES_MAX {
                    break;
                }
            }
        }));
    }
}
