//! Files in the guest, as streams over plain HTTP. Nothing is kept in memory but the piece under way.

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use connectrpc::client::ClientBody;
use connectrpc::{ConnectError, ErrorCode};
use futures::{Stream, StreamExt as _};
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::{Body, Frame, Incoming};
use serde::Deserialize;
use tokio::sync::watch;
use tokio::time::timeout;
use url::form_urlencoded;

use super::faults::printable;
use super::{Guest, GuestError};

/// Silence longer than this in the middle of a transfer ends it.
const SILENCE_MAX: Duration = Duration::from_secs(120);
/// Largest error or confirmation of a guest.
const ANSWER_BYTES_MAX: usize = 64 * 1024;

/// Longest header of a guest's that is passed on.
const HEADER_BYTES_MAX: usize = 256;

/// What is asked of a file: headers of HTTP, as the client sent them; empty: none.
#[derive(Debug, Clone, Default)]
pub struct FileWanted {
    pub range: String,
    pub if_range: String,
    pub if_none_match: String,
    pub if_modified_since: String,
    /// What would be sent, and no bytes.
    pub head_only: bool,
}

/// What the guest says of a file before its bytes; not believed, only passed on.
#[derive(Debug, Clone, Default)]
pub struct FileHead {
    /// 200, 206, 304 or 416.
    pub status: u16,
    /// Bytes that follow, or would follow.
    pub size: Option<u64>,
    /// Headers of HTTP; empty: none.
    pub content_range: String,
    pub etag: String,
    pub last_modified: String,
    pub has_ranges: bool,
}

/// A file on its way out of the guest.
pub struct FileStream {
    guest: Arc<Guest>,
    /// None when no bytes follow.
    body: Option<Incoming>,
    pub head: FileHead,
    left: Option<u64>,
}

#[derive(Deserialize)]
struct Answer {
    #[serde(default)]
    message: String,
}

impl Guest {
    pub async fn read_file(
        self: &Arc<Self>,
        path: &str,
        user: &str,
        wanted: &FileWanted,
    ) -> Result<FileStream, GuestError> {
        let method = if wanted.head_only { Method::HEAD } else { Method::GET };
        let mut request = self.request(method, path, user);
        for (name, value) in [
            (header::RANGE, &wanted.range),
            (header::IF_RANGE, &wanted.if_range),
            (header::IF_NONE_MATCH, &wanted.if_none_match),
            (header::IF_MODIFIED_SINCE, &wanted.if_modified_since),
        ] {
            if !value.is_empty() {
                request = request.header(name, value);
            }
        }
        let response = self.exchange(request.body(empty()).map_err(|_| bad_path())?).await?;
        let head = head(&response);
        let has_bytes = !wanted.head_only && matches!(head.status, 200 | 206);
        let left = head.size.filter(|_| has_bytes);
        let body = response.into_body();
        if has_bytes {
            return Ok(FileStream { guest: self.clone(), body: Some(body), head, left });
        }
        // Of a refused range it says why; it is read so that the connection can serve again.
        let _ = self.alive(collect(body)).await;
        Ok(FileStream { guest: self.clone(), body: None, head, left })
    }

    /// Writes what `content` gives; when it ends in an error, the guest sees a broken request and the caller that error.
    pub async fn write_file<S>(self: &Arc<Self>, path: &str, user: &str, content: S) -> Result<(), GuestError>
    where
        S: Stream<Item = Result<Bytes, ConnectError>> + Send + 'static,
    {
        // A guest that stops taking bytes must not hold the upload for ever: each piece that it takes moves the clock on.
        let (moved, mut moves) = watch::channel(());
        let frames = content.map(move |piece| {
            moved.send_replace(());
            piece.map(Frame::data)
        });
        let body: ClientBody = BodyExt::boxed(SyncBody(Mutex::new(StreamBody::new(Box::pin(frames)))));
        let request = self
            .request(Method::POST, path, user)
            .header(header::CONTENT_TYPE, "application/octet-stream")
            .body(body)
            .map_err(|_| bad_path())?;
        let answer = self.exchange(request);
        tokio::pin!(answer);
        let response = loop {
            tokio::select! {
                biased;
                answer = &mut answer => break answer?,
                // Closed: the content is over and only the answer is awaited.
                moved = timeout(SILENCE_MAX, moves.changed()) => match moved {
                    Err(_) => return Err(GuestError::Fault("it takes no more of an upload".to_owned())),
                    Ok(Err(_)) => break timeout(SILENCE_MAX, &mut answer)
                        .await
                        .map_err(|_| GuestError::Fault("no answer to an upload".to_owned()))??,
                    Ok(Ok(())) => {}
                },
            }
        };
        // The confirmation says nothing that is not known, but it is read to its end so that the connection can serve again.
        self.alive(collect(response.into_body())).await.map(drop)
    }

    fn request(&self, method: Method, path: &str, user: &str) -> http::request::Builder {
        let mut query = form_urlencoded::Serializer::new(String::new());
        query.append_pair("path", path);
        if !user.is_empty() {
            query.append_pair("username", user);
        }
        let mut request = Request::builder().method(method).uri(format!(
            "http://guest:{}/files?{}",
            super::ENVD_PORT,
            query.finish()
        ));
        for (name, value) in self.headers() {
            request = request.header(name, value);
        }
        request
    }

    /// Sends a request of any length and waits for the head of its answer; an error answer becomes an error.
    async fn exchange(&self, request: Request<ClientBody>) -> Result<Response<Incoming>, GuestError> {
        let upload = *request.method() == Method::POST;
        let head_only = *request.method() == Method::HEAD;
        let client = self.streaming();
        let work = async {
            let answer = client.request(request);
            // An upload takes as long as its source; its silence is watched where the source is read.
            let answer = if upload {
                answer.await
            } else {
                timeout(SILENCE_MAX, answer)
                    .await
                    .map_err(|_| GuestError::Fault("no answer to a file request".to_owned()))?
            };
            answer.map_err(|error| match cause(&error) {
                Some(error) => GuestError::Refused { code: error.code, message: error.message.unwrap_or_default() },
                None => GuestError::Fault(format!("a file request failed: {error}")),
            })
        };
        let response = self.alive(work).await?;
        let status = response.status();
        if status.is_success() || matches!(status, StatusCode::NOT_MODIFIED | StatusCode::RANGE_NOT_SATISFIABLE) {
            return Ok(response);
        }
        if head_only {
            // An answer to HEAD has no text, also when it is a refusal, and nobody will be shown one.
            return Err(refusal(status, "the file cannot be read by this user"));
        }
        let bytes = self.alive(collect(response.into_body())).await.unwrap_or_default();
        let text = serde_json::from_slice::<Answer>(&bytes).map(|answer| answer.message).unwrap_or_default();
        Err(refusal(status, &text))
    }
}

impl FileStream {
    /// The next piece; None at the end. Not cancel-safe: drop the stream with the call.
    pub async fn next(&mut self) -> Result<Option<Bytes>, GuestError> {
        loop {
            let Some(body) = &mut self.body else { return Ok(None) };
            let work = async {
                timeout(SILENCE_MAX, body.frame())
                    .await
                    .map_err(|_| GuestError::Fault("silence in the middle of a file".to_owned()))?
                    .transpose()
                    .map_err(|error| GuestError::Fault(format!("a file broke off: {error}")))
            };
            let Some(frame) = self.guest.alive(work).await? else {
                return match self.left {
                    Some(left) if left > 0 => {
                        Err(GuestError::Fault("a file that is shorter than announced".to_owned()))
                    }
                    _ => Ok(None),
                };
            };
            let Ok(piece) = frame.into_data() else { continue };
            if let Some(left) = &mut self.left {
                *left = left.saturating_sub(u64::try_from(piece.len()).unwrap_or(u64::MAX));
            }
            if !piece.is_empty() {
                return Ok(Some(piece));
            }
        }
    }
}

fn head(response: &Response<Incoming>) -> FileHead {
    let said = |name| {
        let value = response.headers().get(name).and_then(|value: &HeaderValue| value.to_str().ok());
        value.filter(|value| value.len() <= HEADER_BYTES_MAX).unwrap_or_default().to_owned()
    };
    FileHead {
        status: response.status().as_u16(),
        size: said(header::CONTENT_LENGTH).parse().ok(),
        content_range: said(header::CONTENT_RANGE),
        etag: said(header::ETAG),
        last_modified: said(header::LAST_MODIFIED),
        has_ranges: said(header::ACCEPT_RANGES) == "bytes",
    }
}

/// A body that may be shared between threads although its source may not: it is only ever used by the one that owns it.
struct SyncBody<S>(Mutex<StreamBody<Pin<Box<S>>>>);

impl<S: Stream<Item = Result<Frame<Bytes>, ConnectError>>> Body for SyncBody<S> {
    type Data = Bytes;
    type Error = ConnectError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, ConnectError>>> {
        let body = self.get_mut().0.get_mut().unwrap_or_else(PoisonError::into_inner);
        Pin::new(body).poll_frame(cx)
    }
}

/// An answer of at most [`ANSWER_BYTES_MAX`].
async fn collect(body: Incoming) -> Result<Bytes, GuestError> {
    let limited = http_body_util::Limited::new(body, ANSWER_BYTES_MAX);
    match timeout(SILENCE_MAX, limited.collect()).await {
        Ok(Ok(collected)) => Ok(collected.to_bytes()),
        Ok(Err(error)) => Err(GuestError::Fault(format!("an answer broke off: {error}"))),
        Err(_) => Err(GuestError::Fault("an answer without end".to_owned())),
    }
}

fn refusal(status: StatusCode, text: &str) -> GuestError {
    let code = match status.as_u16() {
        400 => ErrorCode::InvalidArgument,
        // A user that the guest does not know; a refused token reads differently.
        401 if text.contains("user") => ErrorCode::InvalidArgument,
        403 => ErrorCode::PermissionDenied,
        404 => ErrorCode::NotFound,
        409 => ErrorCode::FailedPrecondition,
        413 => ErrorCode::OutOfRange,
        507 => ErrorCode::ResourceExhausted,
        other => return GuestError::Fault(format!("status {other}: {}", printable(text))),
    };
    let mut message = printable(text);
    if status.as_u16() == 507 {
        message = format!("{}: {message}", api::host::GUEST_DISK_FULL);
    }
    GuestError::Refused { code, message }
}

fn bad_path() -> GuestError {
    GuestError::Refused { code: ErrorCode::InvalidArgument, message: "the path cannot be sent".to_owned() }
}

fn empty() -> ClientBody {
    connectrpc::client::full_body(Bytes::new())
}

/// The error of the source of an upload, when it is what broke the request.
fn cause(error: &(dyn std::error::Error + 'static)) -> Option<ConnectError> {
    let mut error = error;
    loop {
        if let Some(found) = error.downcast_ref::<ConnectError>() {
            return Some(found.clone());
        }
        error = error.source()?;
    }
}
