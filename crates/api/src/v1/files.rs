//! Files: `/v1/sandboxes/{id}/files/...`. Whole ones go by `write` (multipart: `path`, perhaps `user`, then `file`), `read` and `content`.
//!
//! A path is absolute, or relative to the home of the user, and so is one that begins with `~/`. Whoever is named as `user` acts, with that
//! user's rights in the sandbox: its default user when nobody is.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ReadFile {
    /// Absolute, or relative to the home of the user.
    pub path: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ListFiles {
    pub path: String,
    /// How many levels: 0 or 1, the directory's own entries; 64 at most, and more is taken for that.
    #[serde(default)]
    pub depth: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
}

/// Of `stat`, `mkdir` and `remove`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct FilePath {
    pub path: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct MoveFile {
    pub from: String,
    /// Its new name, not the directory that it goes into. A file that is there is replaced; a directory only when it is empty.
    pub to: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct FileEntries {
    /// A directory comes before what is in it; the entries of each in the order of their names' bytes.
    pub entries: Vec<FileEntry>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct OneFileEntry {
    pub entry: FileEntry,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct FileEntry {
    pub name: String,
    pub path: String,
    /// `file`, `directory` or `symlink`. A device, a socket and a pipe are files here.
    #[serde(rename = "type")]
    pub kind: String,
    /// Bytes; of a link, of the link itself.
    pub size: i64,
    /// The lowest nine bits, of a link its target's.
    pub mode: u32,
    /// Like `-rw-r--r--`; `d` in front of a directory's and `L` of a link's.
    pub permissions: String,
    pub owner: String,
    pub group: String,
    /// Unix seconds.
    pub modified_at: i64,
    /// Where a link leads in the end; what is written in it, when that leads nowhere.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub symlink_target: Option<String>,
}
