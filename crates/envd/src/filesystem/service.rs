//! `filesystem.Filesystem`: stat, make, move, list, remove, watch.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use api::guest::filesystem as wire;
use connectrpc::{ConnectError, RequestContext, Response, ServiceRequest, ServiceResult, ServiceStream};

use rustix::fs::{Dir, Mode, OFlags};
use wire::watch_dir_response::{KeepAlive, StartEvent};

use super::entry::Owners;
use super::path::resolve;
use super::temporary::Kind;
use super::watch::{Refused, Wanted, Watch, Watchers};
use super::{entry, open, transfer};
use crate::server::Guest;
use crate::users::{self, Account};

/// Entries that one listing may have; a client that wants more lists deeper directories one by one.
const ENTRIES_MAX: usize = 20_000;
const DEPTH_MAX: u32 = 64;
/// Seconds without an event after which a watching client is told that all is well, when it does not ask for another interval.
const KEEPALIVE_DEFAULT: u64 = 90;
const KEEPALIVE_HEADER: &str = "keepalive-ping-interval";

pub struct Service {
    guest: Arc<Guest>,
    watchers: Watchers,
}

impl Service {
    pub fn new(guest: Arc<Guest>) -> Self {
        Self { guest, watchers: Watchers::default() }
    }

    fn account(&self, ctx: &RequestContext) -> Result<Account, ConnectError> {
        users::of_request(ctx.headers(), &self.guest.session.default_user())
            .map_err(|e| ConnectError::unauthenticated(e.to_string()))
    }

    fn path(&self, path: &str, account: &Account) -> Result<PathBuf, ConnectError> {
        if path.is_empty() || path.contains('\0') {
            return Err(ConnectError::invalid_argument("path is empty or contains NUL"));
        }
        Ok(resolve(path, account, &self.guest.session.default_workdir()))
    }

    async fn watch(&self, ctx: &RequestContext, mut wanted: Wanted) -> Result<Watch, ConnectError> {
        let account = self.account(ctx)?;
        let path = self.path(&wanted.path.to_string_lossy(), &account)?;
        wanted.path.clone_from(&path);
        self.watchers.watch(&account, wanted).await.map_err(|refused| match refused {
            Refused::TooMany => ConnectError::resource_exhausted(refused.to_string()),
            Refused::NetworkMount => ConnectError::invalid_argument(format!("{refused}: {}", path.display())),
            Refused::Watch(cause) => failed(&cause, &path),
        })
    }
}

/// The text of an error that concerns a path, with the right code.
fn failed(error: &io::Error, path: &Path) -> ConnectError {
    let shown = path.display();
    match error.raw_os_error() {
        Some(libc::ENOENT) => ConnectError::not_found(format!("path not found: {shown}")),
        Some(libc::EEXIST) => ConnectError::already_exists(format!("path already exists: {shown}")),
        Some(libc::EACCES | libc::EPERM | libc::EROFS) => {
            ConnectError::permission_denied(format!("permission denied: {shown}"))
        }
        Some(libc::ENOTDIR) => ConnectError::invalid_argument(format!("path is not a directory: {shown}")),
        Some(libc::EXDEV | libc::ENOTEMPTY | libc::EBUSY | libc::ETXTBSY) => {
            ConnectError::failed_precondition(format!("{error}: {shown}"))
        }
        Some(libc::ENAMETOOLONG | libc::ELOOP | libc::EINVAL | libc::EISDIR) => {
            ConnectError::invalid_argument(format!("{error}: {shown}"))
        }
        Some(libc::ENOSPC | libc::EDQUOT) => {
            ConnectError::resource_exhausted(format!("not enough disk space: {shown}"))
        }
        None if error.get_ref().is_some_and(|inner| inner.is::<transfer::Refused>()) => {
            ConnectError::failed_precondition(format!("{error}: {shown}"))
        }
        _ => ConnectError::internal(format!("{error}: {shown}")),
    }
}

impl wire::Filesystem for Service {
    async fn stat(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, wire::StatRequest>,
    ) -> ServiceResult<wire::StatResponse> {
        let account = self.account(&ctx)?;
        let path = self.path(&request.to_owned_message().path, &account)?;
        let at = path.clone();
        let entry =
            users::acting_as(&account, move || entry::describe(&at, &at)).await.map_err(|e| failed(&e, &path))?;
        Response::ok(wire::StatResponse { entry: entry.into(), ..Default::default() })
    }

    async fn make_dir(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, wire::MakeDirRequest>,
    ) -> ServiceResult<wire::MakeDirResponse> {
        let account = self.account(&ctx)?;
        let path = self.path(&request.to_owned_message().path, &account)?;
        let at = path.clone();
        let made = users::acting_as(&account, move || {
            match fs::metadata(&at) {
                Ok(there) if there.is_dir() => return Err(io::Error::from_raw_os_error(libc::EEXIST)),
                Ok(_) => return Err(io::Error::from_raw_os_error(libc::ENOTDIR)),
                Err(_) => fs::create_dir_all(&at)?,
            }
            entry::describe(&at, &at)
        });
        let entry = made.await.map_err(|e| failed(&e, &path))?;
        Response::ok(wire::MakeDirResponse { entry: entry.into(), ..Default::default() })
    }

    async fn r#move(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, wire::MoveRequest>,
    ) -> ServiceResult<wire::MoveResponse> {
        let account = self.account(&ctx)?;
        let request = request.to_owned_message();
        let (from, to) = (self.path(&request.source, &account)?, self.path(&request.destination, &account)?);
        let shown = from.clone();
        let moved = users::acting_as(&account, move || {
            fs::symlink_metadata(&from)?;
            if let Some(parent) = to.parent() {
                fs::create_dir_all(parent)?;
            }
            match fs::rename(&from, &to) {
                Err(e) if e.raw_os_error() == Some(libc::EXDEV) => transfer::between_file_systems(&from, &to)?,
                renamed => renamed?,
            }
            entry::describe(&to, &to)
        });
        let entry = moved.await.map_err(|e| failed(&e, &shown))?;
        Response::ok(wire::MoveResponse { entry: entry.into(), ..Default::default() })
    }

    async fn list_dir(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, wire::ListDirRequest>,
    ) -> ServiceResult<wire::ListDirResponse> {
        let account = self.account(&ctx)?;
        let request = request.to_owned_message();
        let path = self.path(&request.path, &account)?;
        let depth = request.depth.clamp(1, DEPTH_MAX);
        let at = path.clone();
        let listed = users::acting_as(&account, move || {
            let dir = open::open(&at, OFlags::RDONLY | OFlags::DIRECTORY)?;
            let mut entries = Vec::new();
            list(dir.as_fd(), &at, depth, &mut Owners::default(), &mut entries)?;
            Ok(entries)
        });
        let entries = listed.await.map_err(|e| match e.raw_os_error() {
            Some(libc::E2BIG) => {
                ConnectError::resource_exhausted(format!("more than {ENTRIES_MAX} entries below {}", path.display()))
            }
            _ => failed(&e, &path),
        })?;
        Response::ok(wire::ListDirResponse { entries, ..Default::default() })
    }

    async fn remove(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, wire::RemoveRequest>,
    ) -> ServiceResult<wire::RemoveResponse> {
        let account = self.account(&ctx)?;
        let path = self.path(&request.to_owned_message().path, &account)?;
        let base = resolve(".", &account, &self.guest.session.default_workdir());
        let at = path.clone();
        let kept = [base, account.home.clone()];
        let removed = users::acting_as(&account, move || match fs::symlink_metadata(&at) {
            // `/`, home, the default directory and what holds them: never what somebody meant.
            _ if kept.iter().any(|kept| kept.starts_with(&at)) => Err(io::Error::from_raw_os_error(libc::EINVAL)),
            Ok(there) if there.is_dir() => {
                // The same, however they are spelled.
                let real = fs::canonicalize(&at)?;
                let holds = |kept: &PathBuf| fs::canonicalize(kept).is_ok_and(|kept| kept.starts_with(&real));
                if real.parent().is_none() || kept.iter().any(holds) {
                    return Err(io::Error::from_raw_os_error(libc::EINVAL));
                }
                fs::remove_dir_all(&real)
            }
            Ok(_) => fs::remove_file(&at),
            // Gone already is what was asked for.
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(e) => Err(e),
        });
        removed.await.map_err(|e| failed(&e, &path))?;
        Response::ok(wire::RemoveResponse::default())
    }

    async fn watch_dir(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, wire::WatchDirRequest>,
    ) -> ServiceResult<ServiceStream<wire::WatchDirResponse>> {
        let request = request.to_owned_message();
        let wanted = Wanted {
            path: request.path.into(),
            recursive: request.recursive,
            include_entry: request.include_entry,
            allow_network_mounts: request.allow_network_mounts,
        };
        let watch = self.watch(&ctx, wanted).await?;
        let asked = ctx.header(KEEPALIVE_HEADER).and_then(|value| value.to_str().ok()?.parse().ok());
        let keepalive = asked.filter(|seconds| (1..=3600).contains(seconds)).unwrap_or(KEEPALIVE_DEFAULT);
        Ok(Response::stream(events_of(watch, Duration::from_secs(keepalive))))
    }

    async fn create_watcher(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, wire::CreateWatcherRequest>,
    ) -> ServiceResult<wire::CreateWatcherResponse> {
        let request = request.to_owned_message();
        let wanted = Wanted {
            path: request.path.into(),
            recursive: request.recursive,
            include_entry: request.include_entry,
            allow_network_mounts: request.allow_network_mounts,
        };
        let watch = self.watch(&ctx, wanted).await?;
        Response::ok(wire::CreateWatcherResponse { watcher_id: self.watchers.keep(watch), ..Default::default() })
    }

    async fn get_watcher_events(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, wire::GetWatcherEventsRequest>,
    ) -> ServiceResult<wire::GetWatcherEventsResponse> {
        let events = self.watchers.events(&request.to_owned_message().watcher_id).await;
        let events = events.ok_or_else(unknown_watcher)?;
        Response::ok(wire::GetWatcherEventsResponse { events, ..Default::default() })
    }

    async fn remove_watcher(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, wire::RemoveWatcherRequest>,
    ) -> ServiceResult<wire::RemoveWatcherResponse> {
        if !self.watchers.remove(&request.to_owned_message().watcher_id) {
            return Err(unknown_watcher());
        }
        Response::ok(wire::RemoveWatcherResponse::default())
    }
}

fn unknown_watcher() -> ConnectError {
    ConnectError::not_found("watcher not found")
}

/// `start`, then what happens; `keepalive` when nothing has for so long. Ends with the directory.
fn events_of(
    watch: Watch,
    keepalive: Duration,
) -> impl futures::Stream<Item = Result<wire::WatchDirResponse, ConnectError>> + Send {
    futures::stream::unfold((watch, true), move |(mut watch, is_first)| async move {
        let event: wire::__buffa::oneof::watch_dir_response::Event = if is_first {
            StartEvent::default().into()
        } else {
            match tokio::time::timeout(keepalive, watch.next()).await {
                Err(_) => KeepAlive::default().into(),
                Ok(event) => event?.into(),
            }
        };
        Some((Ok(wire::WatchDirResponse { event: Some(event), ..Default::default() }), (watch, false)))
    })
}

/// Links below the top are not followed; entries keep the prefix that was asked for.
fn list(
    dir: BorrowedFd<'_>,
    shown: &Path,
    depth: u32,
    owners: &mut Owners,
    entries: &mut Vec<wire::EntryInfo>,
) -> io::Result<()> {
    let mut names: Vec<OsString> = Vec::new();
    for name in Dir::read_from(dir)? {
        let name = name?;
        let name = OsStr::from_bytes(name.file_name().to_bytes());
        if name == "." || name == ".." || Kind::of(name).is_some() {
            continue;
        }
        if names.len() + entries.len() >= ENTRIES_MAX {
            return Err(io::Error::from_raw_os_error(libc::E2BIG));
        }
        names.push(name.to_owned());
    }
    names.sort();
    for name in names {
        if entries.len() >= ENTRIES_MAX {
            return Err(io::Error::from_raw_os_error(libc::E2BIG));
        }
        let (name, shown) = (Path::new(&name), shown.join(&name));
        // An entry may vanish between the listing and the look.
        let Ok(entry) = entry::describe_at(dir, name, &shown, owners) else { continue };
        let descends = depth > 1 && !entry.is_symlink && entry.r#type == wire::FileType::FILE_TYPE_DIRECTORY;
        entries.push(entry);
        if !descends {
            continue;
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW;
        // A directory that may not be read is listed itself and has no entries here.
        let Ok(below) = open::open_at(dir, name, flags, Mode::empty()).map(File::from) else { continue };
        match list(below.as_fd(), &shown, depth - 1, owners, entries) {
            Err(e) if e.raw_os_error() == Some(libc::E2BIG) => return Err(e),
            _ => {}
        }
    }
    Ok(())
}
