//! Files of a sandbox, relayed in pieces.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use api::host::__buffa::oneof::read_file_response::Part as ReadPart;
use api::host::__buffa::oneof::write_file_request::Part as WritePart;
use api::host::{CHUNK_BYTES, FileHead, ReadFileRequest, ReadFileResponse, WriteFileRequest, WriteFileResponse};
use bytes::Bytes;
use connectrpc::{ConnectError, InboundStream};
use futures::{Stream, StreamExt as _, stream};
use tokio::time::timeout;

use super::errors;
use super::streams::Permit;
use crate::guest::{FileStream, FileWanted, Guest};

/// Silence of the control plane in the middle of an upload.
const SILENCE_MAX: Duration = Duration::from_secs(120);
const PATH_BYTES_MAX: usize = 4096;
/// A list of tags is the longest of them; what a client sends in all is bounded before.
const HEADER_BYTES_MAX: usize = 8 * 1024;

pub async fn read(
    guest: Arc<Guest>,
    permit: Permit,
    request: ReadFileRequest,
) -> Result<impl Stream<Item = Result<ReadFileResponse, ConnectError>> + Send + 'static, ConnectError> {
    check(&request.path, &request.user)?;
    let wanted = wanted(&request)?;
    let file = guest.read_file(&request.path, &request.user, &wanted).await.map_err(errors::guest)?;
    let head = file.head.clone();
    let head = ReadPart::from(FileHead {
        size: head.size,
        status: head.status.into(),
        content_range: head.content_range,
        etag: head.etag,
        last_modified: head.last_modified,
        has_ranges: head.has_ranges,
        ..Default::default()
    });
    let first = ReadFileResponse { part: Some(head), ..Default::default() };
    let rest = stream::unfold(Some((file, Bytes::new(), permit)), |state| async move {
        let (mut file, mut piece, permit) = state?;
        if piece.is_empty() {
            piece = match next(&mut file).await {
                Ok(Some(piece)) => piece,
                Ok(None) => return None,
                Err(error) => return Some((Err(error), None)),
            };
        }
        let chunk = piece.split_to(piece.len().min(CHUNK_BYTES)).to_vec();
        let message = ReadFileResponse { part: Some(ReadPart::Chunk(chunk)), ..Default::default() };
        Some((Ok(message), Some((file, piece, permit))))
    });
    Ok(stream::once(async { Ok(first) }).chain(rest))
}

fn wanted(request: &ReadFileRequest) -> Result<FileWanted, ConnectError> {
    let headers = [&request.range, &request.if_range, &request.if_none_match, &request.if_modified_since];
    if headers.iter().any(|value| value.len() > HEADER_BYTES_MAX || value.contains(|c: char| c.is_control())) {
        return Err(ConnectError::invalid_argument("a condition of the request is too long or cannot be sent"));
    }
    Ok(FileWanted {
        range: request.range.clone(),
        if_range: request.if_range.clone(),
        if_none_match: request.if_none_match.clone(),
        if_modified_since: request.if_modified_since.clone(),
        head_only: request.head_only,
    })
}

async fn next(file: &mut FileStream) -> Result<Option<Bytes>, ConnectError> {
    file.next().await.map_err(errors::guest)
}

pub async fn write(
    guest: impl Fn(&str) -> Result<(Arc<Guest>, Permit), ConnectError>,
    mut requests: InboundStream<WriteFileRequest>,
) -> Result<WriteFileResponse, ConnectError> {
    let head = match receive(&mut requests).await?.and_then(|request| request.part) {
        Some(WritePart::Head(head)) => head,
        _ => return Err(ConnectError::invalid_argument("the first message must be the head")),
    };
    check(&head.path, &head.user)?;
    let (guest, _permit) = guest(&head.sandbox_id)?;
    let size = Arc::new(AtomicU64::new(0));
    let counter = size.clone();
    let content = stream::unfold(Some(requests), move |requests| {
        let counter = counter.clone();
        async move {
            let mut requests = requests?;
            match receive(&mut requests).await {
                Ok(Some(WriteFileRequest { part: Some(WritePart::Chunk(chunk)), .. })) => {
                    counter.fetch_add(u64::try_from(chunk.len()).unwrap_or(0), Ordering::Relaxed);
                    Some((Ok(Bytes::from(chunk)), Some(requests)))
                }
                Ok(Some(WriteFileRequest { part: Some(WritePart::End(_)), .. })) => None,
                Ok(Some(_)) => Some((Err(ConnectError::invalid_argument("only chunks may follow the head")), None)),
                Ok(None) => Some((Err(ConnectError::aborted("the upload broke off")), None)),
                // The guest sees a request that breaks off and keeps nothing of it as the whole file.
                Err(error) => Some((Err(error), None)),
            }
        }
    });
    guest.write_file(&head.path, &head.user, content).await.map_err(errors::guest)?;
    Ok(WriteFileResponse { size: size.load(Ordering::Relaxed), ..Default::default() })
}

async fn receive(requests: &mut InboundStream<WriteFileRequest>) -> Result<Option<WriteFileRequest>, ConnectError> {
    match timeout(SILENCE_MAX, requests.next()).await {
        Ok(Some(message)) => Ok(Some(message?.to_owned_message())),
        Ok(None) => Ok(None),
        Err(_) => Err(ConnectError::deadline_exceeded("the upload stalled")),
    }
}

pub fn check(path: &str, user: &str) -> Result<(), ConnectError> {
    if path.is_empty()
        || path.len() > PATH_BYTES_MAX
        || path.contains('\0')
        || user.len() > 128
        || user.contains(['\0', ':'])
    {
        return Err(ConnectError::invalid_argument("path or user cannot be used"));
    }
    Ok(())
}
