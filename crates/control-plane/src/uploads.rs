//! A file on its way into a sandbox.

use std::time::Duration;

use api::host::__buffa::oneof::write_file_request::Part;
use api::host::{CHUNK_BYTES, WriteFileEnd, WriteFileHead, WriteFileRequest};
use bytes::Bytes;
use futures::{Stream, StreamExt as _};
use model::ids::SandboxId;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use crate::agents::{Agent, AgentError};
use crate::http::errors::ApiError;

/// After its last byte, for the guest to write and name the file.
const FINISH_TIME_MAX: Duration = Duration::from_secs(120);
/// Pieces on their way; whoever sends waits for the guest.
const PIECES_MAX: usize = 4;

/// Which file.
pub struct Target {
    pub sandbox: SandboxId,
    pub path: String,
    pub user: String,
}

/// Sends the file to the host as it comes. Only the end mark makes it a file: whatever breaks off before leaves nothing.
pub async fn relay(
    agent: &Agent,
    target: Target,
    source: impl Stream<Item = Result<Bytes, ApiError>>,
    bytes_max: u64,
) -> Result<(), ApiError> {
    let mut source = std::pin::pin!(source);
    let (pieces, receiver) = mpsc::channel(PIECES_MAX);
    let call = agent.write_file(ReceiverStream::new(receiver));
    let mut call = std::pin::pin!(call);
    let feed = async {
        let Target { sandbox, path, user } = target;
        let head = WriteFileHead { sandbox_id: sandbox.to_string(), path, user, ..Default::default() };
        let mut next = Some(Part::from(head));
        let mut size = 0u64;
        loop {
            if let Some(part) = next.take()
                && pieces.send(WriteFileRequest { part: Some(part), ..Default::default() }).await.is_err()
            {
                // The call has ended; it says why.
                return Ok(());
            }
            let Some(chunk) = source.next().await.transpose()? else { break };
            size = size.saturating_add(u64::try_from(chunk.len()).unwrap_or(u64::MAX));
            if size > bytes_max {
                return Err(ApiError::too_large(bytes_max));
            }
            for piece in chunk.chunks(CHUNK_BYTES) {
                let request = WriteFileRequest { part: Some(Part::Chunk(piece.to_vec())), ..Default::default() };
                if pieces.send(request).await.is_err() {
                    return Ok(());
                }
            }
        }
        let end = WriteFileRequest { part: Some(Part::from(WriteFileEnd::default())), ..Default::default() };
        let _ = pieces.send(end).await;
        drop(pieces);
        Ok::<(), ApiError>(())
    };
    tokio::select! {
        answered = call.as_mut() => return answered.map(drop).map_err(|error| AgentError::from(error).into()),
        fed = feed => fed?,
    }
    let answered = tokio::time::timeout(FINISH_TIME_MAX, call).await;
    answered
        .map_err(|_| ApiError::deadline_exceeded("the sandbox did not finish writing the file"))?
        .map_err(AgentError::from)?;
    Ok(())
}
