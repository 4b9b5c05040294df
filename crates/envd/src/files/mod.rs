//! `/files`: whole files in and out by plain HTTP, streamed, as the target user.

pub(crate) mod conditions;
pub mod download;
pub(crate) mod form;
pub(crate) mod gzip;
mod target;
pub mod upload;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use http::{HeaderMap, Request, StatusCode};

use crate::access::{self, Denied, Signed};
use crate::filesystem::path::resolve;
use crate::server::Guest;
use crate::session::Session;
use crate::users::{self, Account};

/// The parts of a request that both directions share, after its rights were checked.
struct Asked {
    account: Account,
    /// Empty when an upload names its files in the body.
    path: String,
    /// `fsync=true`: an upload is answered when it is on the disk.
    durably: bool,
    workdir: String,
}

impl Asked {
    fn resolved(&self, path: &str) -> PathBuf {
        resolve(path, &self.account, &self.workdir)
    }
}

fn asked<B>(guest: &Arc<Guest>, request: &Request<B>, operation: &str) -> Result<Asked, (StatusCode, String)> {
    let query = Query::of(request.uri().query().unwrap_or_default());
    let (path, user) = (query.field("path").unwrap_or_default(), query.field("username").unwrap_or_default());
    rights(&guest.session, &query, request.headers(), operation, chrono::Utc::now().timestamp())
        .map_err(|denied| (StatusCode::UNAUTHORIZED, denied.to_string()))?;
    if path.contains('\0') {
        return Err((StatusCode::BAD_REQUEST, "path contains NUL".to_owned()));
    }
    let default = guest.session.default_user();
    let account = if user.is_empty() { users::of_request(request.headers(), &default) } else { users::by_name(user) };
    let account = account.map_err(|unknown| (StatusCode::UNAUTHORIZED, unknown.to_string()))?;
    let durably = query.field("fsync") == Some("true");
    Ok(Asked { account, path: path.to_owned(), durably, workdir: guest.session.default_workdir() })
}

/// Of the fields with one name the first counts, also for what is signed.
pub(crate) struct Query(Vec<(String, String)>);

impl Query {
    pub(crate) fn of(query: &str) -> Self {
        Self(url::form_urlencoded::parse(query.as_bytes()).into_owned().collect())
    }

    pub(crate) fn field(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }
}

/// A signature counts for those who show no token.
pub(crate) fn rights(
    session: &Session,
    query: &Query,
    headers: &HeaderMap,
    operation: &str,
    now_unix: i64,
) -> Result<(), Denied> {
    let field = |name| query.field(name).unwrap_or_default();
    match query.field("signature") {
        Some(signature) if !headers.contains_key(api::guest::ACCESS_TOKEN_HEADER) => {
            let (path, user, expires) = (field("path"), field("username"), query.field("signature_expiration"));
            access::signature(session, &Signed { path, operation, user, signature, expires }, now_unix)
        }
        _ => access::user(session, headers),
    }
}

fn status_of(error: &io::Error) -> StatusCode {
    match error.raw_os_error() {
        Some(libc::ENOENT) => StatusCode::NOT_FOUND,
        Some(libc::EACCES | libc::EPERM | libc::EROFS) => StatusCode::FORBIDDEN,
        Some(
            libc::EISDIR
            | libc::ENOTDIR
            | libc::EEXIST
            | libc::ENAMETOOLONG
            | libc::ELOOP
            | libc::EINVAL
            | libc::ENXIO
            | libc::EFBIG,
        ) => StatusCode::BAD_REQUEST,
        Some(libc::ETXTBSY) => StatusCode::CONFLICT,
        Some(libc::EOPNOTSUPP) => StatusCode::NOT_IMPLEMENTED,
        Some(libc::ENOSPC | libc::EDQUOT) => StatusCode::INSUFFICIENT_STORAGE,
        _ => StatusCode::INTERNAL_SERVER_ERROR,
    }
}
