//! Files in a sandbox. What they are called and who may is the guest's to know: here it is checked that what is asked can be asked at all.

mod content;
mod list;
mod make;
mod put;
mod read;
mod remove;
mod rename;
mod stat;
mod write;

use api::host;
use api::v1::files::{FileEntry, OneFileEntry};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::agents::AgentError;
use crate::app::App;
use crate::http::errors::ApiError;

const PATH_BYTES_MAX: usize = 4096;
const USER_BYTES_MAX: usize = 128;

pub fn router() -> OpenApiRouter<App> {
    OpenApiRouter::new()
        .routes(routes!(read::read))
        .routes(routes!(read::stream_read))
        .routes(routes!(write::write))
        .routes(routes!(write::stream_write))
        .routes(routes!(content::content, put::put))
        .routes(routes!(list::list))
        .routes(routes!(stat::stat))
        .routes(routes!(make::mkdir))
        .routes(routes!(rename::rename))
        .routes(routes!(remove::remove))
}

/// For administrators, by the platform's own team's sandboxes: what their pages need.
pub fn admin_router() -> OpenApiRouter<App> {
    OpenApiRouter::new()
        .routes(routes!(read::read))
        .routes(routes!(write::write))
        .routes(routes!(list::list))
        .routes(routes!(make::mkdir))
        .routes(routes!(remove::remove))
}

fn check_path(field: &str, path: &str) -> Result<(), ApiError> {
    if path.is_empty() || path.len() > PATH_BYTES_MAX || path.contains('\0') {
        return Err(ApiError::invalid(field, "must have 1 to 4096 bytes and no NUL"));
    }
    Ok(())
}

/// Empty: the sandbox's default user.
fn user(named: Option<String>) -> Result<String, ApiError> {
    let named = named.unwrap_or_default();
    if named.len() > USER_BYTES_MAX || named.contains(|c: char| c == ':' || c.is_control()) {
        return Err(ApiError::invalid("user", "must be the name of a user in the sandbox"));
    }
    Ok(named)
}

fn shown(entry: host::FileEntry) -> FileEntry {
    FileEntry {
        name: entry.name,
        path: entry.path,
        kind: entry.r#type,
        size: entry.size,
        mode: entry.mode,
        permissions: entry.permissions,
        owner: entry.owner,
        group: entry.group,
        modified_at: entry.modified_at,
        symlink_target: entry.symlink_target,
    }
}

fn one(entry: Option<host::FileEntry>) -> Result<axum::Json<OneFileEntry>, ApiError> {
    let entry = entry.ok_or_else(|| AgentError::Misbehaved { message: "an answer without its file".to_owned() })?;
    Ok(axum::Json(OneFileEntry { entry: shown(entry) }))
}
