//! What is in the guest's directories: looked at, made, moved, removed. As the user who asks, and with that user's rights, which the guest's
//! kernel knows.

use api::guest::filesystem::{
    EntryInfo, FileType, FilesystemClient, ListDirRequest, MakeDirRequest, MoveRequest, RemoveRequest, StatRequest,
};
use api::host::{LISTING_BYTES_MAX, LISTING_ELEMENT_BYTES_MAX};
use connectrpc::ErrorCode;
use connectrpc::client::{CallOptions, ServiceTransport};

use super::processes::basic;
use super::{Guest, GuestError, HttpClient};

/// Of a name of the guest's, whatever it says.
const TEXT_BYTES_MAX: usize = 4096;
/// How envd begins to say that there is no room.
const NO_ROOM: &str = "not enough disk space";
/// The kernel's words for what envd says of a path that nobody can have meant.
const INVALID: &str = "Invalid argument";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EntryKind {
    /// Also what is none of the others: a device, a socket.
    File,
    Directory,
    Symlink,
}

/// One entry of a directory, as the guest says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub name: String,
    pub path: String,
    pub kind: EntryKind,
    pub size: i64,
    pub mode: u32,
    pub permissions: String,
    pub owner: String,
    pub group: String,
    /// Unix seconds.
    pub modified_at: i64,
    pub symlink_target: Option<String>,
}

impl Guest {
    /// All that is below `path`, down to `depth`. More than fits into one answer is refused, never cut.
    pub async fn list_files(&self, path: &str, user: &str, depth: u32) -> Result<Vec<Entry>, GuestError> {
        let request = ListDirRequest { path: path.to_owned(), depth, ..Default::default() };
        let options =
            options(user).with_max_message_size(LISTING_BYTES_MAX).with_element_memory_limit(LISTING_ELEMENT_BYTES_MAX);
        let work = async {
            let answer = self.filesystem().list_dir_with_options(request, options).await;
            answer.map_err(|error| match GuestError::from(error) {
                // Our own bound: what is asked for is too much, and nobody misbehaves.
                GuestError::Fault(message) if message.contains("exceeds limit") => GuestError::Refused {
                    code: ErrorCode::ResourceExhausted,
                    message: "there is more below it than one answer may hold".to_owned(),
                },
                error => judged(error),
            })
        };
        let answer = self.alive(work).await?;
        Ok(answer.into_owned().entries.into_iter().map(entry).collect())
    }

    pub async fn stat_file(&self, path: &str, user: &str) -> Result<Entry, GuestError> {
        let request = StatRequest { path: path.to_owned(), ..Default::default() };
        let work = async { self.filesystem().stat_with_options(request, options(user)).await.map_err(refused) };
        said(self.alive(work).await?.into_owned().entry.into_option())
    }

    /// With its parents. One that is there already is refused (`AlreadyExists`).
    pub async fn make_directory(&self, path: &str, user: &str) -> Result<Entry, GuestError> {
        let request = MakeDirRequest { path: path.to_owned(), ..Default::default() };
        let work = async { self.filesystem().make_dir_with_options(request, options(user)).await.map_err(refused) };
        said(self.alive(work).await?.into_owned().entry.into_option())
    }

    pub async fn move_file(&self, from: &str, to: &str, user: &str) -> Result<Entry, GuestError> {
        let request = MoveRequest { source: from.to_owned(), destination: to.to_owned(), ..Default::default() };
        let work = async { self.filesystem().r#move_with_options(request, options(user)).await.map_err(refused) };
        said(self.alive(work).await?.into_owned().entry.into_option())
    }

    /// With everything below it. What is not there is refused (`NotFound`): to envd that is no error, so it is looked for first, and two that
    /// remove the same at once may both be told that they have.
    pub async fn remove_file(&self, path: &str, user: &str) -> Result<(), GuestError> {
        self.stat_file(path, user).await?;
        let request = RemoveRequest { path: path.to_owned(), ..Default::default() };
        let work = async { self.filesystem().remove_with_options(request, options(user)).await.map_err(refused) };
        self.alive(work).await.map(drop).map_err(|error| match error {
            GuestError::Refused { code: code @ ErrorCode::InvalidArgument, message }
                if message.starts_with(INVALID) =>
            {
                GuestError::Refused { code, message: "the root, a home, and what holds one are not removed".to_owned() }
            }
            error => error,
        })
    }

    fn filesystem(&self) -> FilesystemClient<ServiceTransport<HttpClient>> {
        FilesystemClient::new(self.transport(self.unary()), self.unary_config())
    }
}

fn options(user: &str) -> CallOptions {
    let options = CallOptions::default();
    if user.is_empty() { options } else { options.with_header("authorization", basic(user)) }
}

fn refused(error: connectrpc::ConnectError) -> GuestError {
    judged(error.into())
}

/// A full disk is told apart from other things of which there are too many.
fn judged(error: GuestError) -> GuestError {
    match error {
        GuestError::Refused { code: code @ ErrorCode::ResourceExhausted, message } if message.starts_with(NO_ROOM) => {
            GuestError::Refused { code, message: format!("{}: {message}", api::host::GUEST_DISK_FULL) }
        }
        error => error,
    }
}

fn said(info: Option<EntryInfo>) -> Result<Entry, GuestError> {
    info.map(entry).ok_or_else(|| GuestError::Fault("an answer about a file without the file".to_owned()))
}

fn entry(info: EntryInfo) -> Entry {
    let kind = match info.r#type.as_known() {
        _ if info.is_symlink => EntryKind::Symlink,
        Some(FileType::FILE_TYPE_SYMLINK) => EntryKind::Symlink,
        Some(FileType::FILE_TYPE_DIRECTORY) => EntryKind::Directory,
        _ => EntryKind::File,
    };
    Entry {
        name: cut(info.name),
        path: cut(info.path),
        kind,
        size: info.size.max(0),
        mode: info.mode & 0o7777,
        permissions: cut(info.permissions),
        owner: cut(info.owner),
        group: cut(info.group),
        modified_at: info.modified_time.into_option().map(|time| time.seconds).unwrap_or_default(),
        symlink_target: info.symlink_target.map(cut),
    }
}

/// Paths are of no use when they are changed, so only what cannot be one is cut.
fn cut(mut text: String) -> String {
    text.truncate(text.floor_char_boundary(TEXT_BYTES_MAX));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_of_three_kinds() {
        for (kind, is_symlink, is) in [
            (FileType::FILE_TYPE_FILE, false, EntryKind::File),
            (FileType::FILE_TYPE_DIRECTORY, false, EntryKind::Directory),
            (FileType::FILE_TYPE_DIRECTORY, true, EntryKind::Symlink),
            (FileType::FILE_TYPE_UNSPECIFIED, true, EntryKind::Symlink),
            (FileType::FILE_TYPE_UNSPECIFIED, false, EntryKind::File),
        ] {
            let info = EntryInfo { r#type: kind.into(), is_symlink, size: -1, ..Default::default() };
            let entry = entry(info);
            assert_eq!((entry.kind, entry.size), (is, 0));
        }
        let long = entry(EntryInfo { name: "ä".repeat(5000), ..Default::default() });
        assert_eq!(long.name.len(), TEXT_BYTES_MAX);
    }

    #[test]
    fn a_full_disk_is_not_a_long_list() {
        let of = |message: &str| match refused(connectrpc::ConnectError::resource_exhausted(message)) {
            GuestError::Refused { message, .. } => message,
            other => panic!("{other}"),
        };
        assert_eq!(of("not enough disk space: /x"), "guest_disk_full: not enough disk space: /x");
        assert_eq!(of("more than 20000 entries below /x"), "more than 20000 entries below /x");
    }
}
