//! The files of a build, put into the database piece by piece as they come, where every replica finds them.

use axum::extract::multipart::Field;
use bytes::{Bytes, BytesMut};
use sha2::{Digest as _, Sha256};
use store::builds::{Archive, ArchiveKind};
use uuid::Uuid;

use crate::app::App;
use crate::http::errors::ApiError;
use crate::http::form::within;

const ARCHIVE_BYTES_MAX: u64 = 100 * 1024 * 1024;
/// Of an archive, in the database.
const PIECE_BYTES: usize = 1024 * 1024;

pub struct Sent {
    pub archive: Archive,
    /// In hex.
    pub sha256: String,
}

/// Puts an archive where every replica finds it. None: there is nothing in it.
pub async fn kept(app: &App, mut field: Field<'_>) -> Result<Option<Sent>, ApiError> {
    let id = Uuid::new_v4();
    let stored = stored(app, id, &mut field).await;
    if !matches!(stored, Ok(Some(_))) {
        app.store.remove_archive(id).await?;
    }
    stored
}

async fn stored(app: &App, id: Uuid, field: &mut Field<'_>) -> Result<Option<Sent>, ApiError> {
    let mut digest = Sha256::new();
    let (mut size, mut part, mut kind) = (0u64, 0, None);
    let mut piece = BytesMut::with_capacity(PIECE_BYTES);
    loop {
        let chunk = within(field.chunk()).await?;
        let is_last = chunk.is_none();
        let mut chunk = chunk.unwrap_or_default();
        size += u64::try_from(chunk.len()).unwrap_or(u64::MAX);
        if size > ARCHIVE_BYTES_MAX {
            return Err(ApiError::too_large(ARCHIVE_BYTES_MAX));
        }
        digest.update(&chunk);
        while !chunk.is_empty() || is_last && !piece.is_empty() {
            let room = PIECE_BYTES - piece.len();
            let taken: Bytes = chunk.split_to(room.min(chunk.len()));
            piece.extend_from_slice(&taken);
            if piece.len() == PIECE_BYTES || is_last {
                if part == 0 {
                    kind = Some(archive_kind(&piece)?);
                }
                app.store.put_archive_part(id, part, &piece).await?;
                piece.clear();
                part += 1;
            }
        }
        if is_last {
            break;
        }
    }
    Ok(kind.map(|kind| Sent { archive: Archive { id, kind }, sha256: hex::encode(digest.finalize()) }))
}

/// By how its bytes begin.
fn archive_kind(bytes: &[u8]) -> Result<ArchiveKind, ApiError> {
    if bytes.starts_with(b"\x1f\x8b") {
        Ok(ArchiveKind::Gzip)
    } else if bytes.starts_with(b"PK\x03\x04") {
        Ok(ArchiveKind::Zip)
    } else if bytes.get(257..262) == Some(b"ustar") {
        Ok(ArchiveKind::Tar)
    } else {
        Err(ApiError::invalid("archive", "is neither tar, nor tar.gz, nor zip"))
    }
}
