//! What is in a sandbox's directories, relayed.

use api::host::{
    FileEntry, ListFilesRequest, ListFilesResponse, MakeDirectoryRequest, MakeDirectoryResponse, MoveFileRequest,
    MoveFileResponse, RemoveFileRequest, RemoveFileResponse, StatFileRequest, StatFileResponse,
};
use connectrpc::ConnectError;

use super::errors;
use super::files::check;
use crate::guest::{Entry, EntryKind, Guest};

pub async fn list(guest: &Guest, request: ListFilesRequest) -> Result<ListFilesResponse, ConnectError> {
    check(&request.path, &request.user)?;
    let listed = guest.list_files(&request.path, &request.user, request.depth).await.map_err(errors::guest)?;
    Ok(ListFilesResponse { entries: listed.into_iter().map(shown).collect(), ..Default::default() })
}

pub async fn stat(guest: &Guest, request: StatFileRequest) -> Result<StatFileResponse, ConnectError> {
    check(&request.path, &request.user)?;
    let entry = guest.stat_file(&request.path, &request.user).await.map_err(errors::guest)?;
    Ok(StatFileResponse { entry: shown(entry).into(), ..Default::default() })
}

pub async fn make(guest: &Guest, request: MakeDirectoryRequest) -> Result<MakeDirectoryResponse, ConnectError> {
    check(&request.path, &request.user)?;
    let entry = guest.make_directory(&request.path, &request.user).await.map_err(errors::guest)?;
    Ok(MakeDirectoryResponse { entry: shown(entry).into(), ..Default::default() })
}

pub async fn rename(guest: &Guest, request: MoveFileRequest) -> Result<MoveFileResponse, ConnectError> {
    check(&request.from, &request.user)?;
    check(&request.to, &request.user)?;
    let entry = guest.move_file(&request.from, &request.to, &request.user).await.map_err(errors::guest)?;
    Ok(MoveFileResponse { entry: shown(entry).into(), ..Default::default() })
}

pub async fn remove(guest: &Guest, request: RemoveFileRequest) -> Result<RemoveFileResponse, ConnectError> {
    check(&request.path, &request.user)?;
    guest.remove_file(&request.path, &request.user).await.map_err(errors::guest)?;
    Ok(RemoveFileResponse::default())
}

fn shown(entry: Entry) -> FileEntry {
    let kind = match entry.kind {
        EntryKind::File => "file",
        EntryKind::Directory => "directory",
        EntryKind::Symlink => "symlink",
    };
    FileEntry {
        name: entry.name,
        path: entry.path,
        r#type: kind.to_owned(),
        size: entry.size,
        mode: entry.mode,
        permissions: entry.permissions,
        owner: entry.owner,
        group: entry.group,
        modified_at: entry.modified_at,
        symlink_target: entry.symlink_target,
        ..Default::default()
    }
}
