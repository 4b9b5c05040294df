//! Users of the guest: who a request acts as, and acting as them.
//!
//! A request names its user by Basic auth or acts as the sandbox's default user. A name that the guest does not know is refused: there
//! is no fall-back to root.

use std::collections::HashMap;
use std::ffi::CString;
use std::fs::Metadata;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, UNIX_EPOCH};

use base64::Engine as _;
use http::HeaderMap;
use nix::unistd::{Gid, Uid, User};
use tokio::sync::Semaphore;

/// Threads at work with files for requests at once. A request waits for its turn: the guest's disk is not faster by more of them, and a
/// file system that hangs (FUSE) takes no more than these.
const THREADS_MAX: usize = 32;
/// Trees are walked by recursion, with small frames and a bound on the depth.
const STACK_BYTES: usize = 512 * 1024;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Account {
    pub name: String,
    pub uid: u32,
    pub gid: u32,
    /// Supplementary groups, the primary one among them.
    pub groups: Vec<u32>,
    pub home: PathBuf,
    pub shell: PathBuf,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UnknownUser {
    /// The text is what published clients show.
    #[error("invalid username: '{0}'")]
    Name(String),
    #[error("malformed Authorization header")]
    Header,
}

/// The account that a request names, or the default user's.
pub fn of_request(headers: &HeaderMap, default: &str) -> Result<Account, UnknownUser> {
    by_name(named(headers)?.as_deref().unwrap_or(default))
}

/// The name in a request, if there is one.
pub(crate) fn named(headers: &HeaderMap) -> Result<Option<String>, UnknownUser> {
    let Some(value) = headers.get(http::header::AUTHORIZATION) else { return Ok(None) };
    let value = value.to_str().map_err(|_| UnknownUser::Header)?;
    let encoded = value.strip_prefix("Basic ").ok_or(UnknownUser::Header)?;
    let decoded = base64::engine::general_purpose::STANDARD.decode(encoded.trim()).map_err(|_| UnknownUser::Header)?;
    let decoded = String::from_utf8(decoded).map_err(|_| UnknownUser::Header)?;
    let name = decoded.split(':').next().unwrap_or_default();
    Ok((!name.is_empty()).then(|| name.to_owned()))
}

pub fn by_name(name: &str) -> Result<Account, UnknownUser> {
    let unknown = || UnknownUser::Name(name.chars().filter(|c| !c.is_control()).take(64).collect());
    if name.is_empty() || name.contains(['\0', '/', ':', '\n']) {
        return Err(unknown());
    }
    static KNOWN: Mutex<Option<Known>> = Mutex::new(None);
    let stamp = Stamp::now();
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(account) =
        known.as_ref().filter(|known| Some(&known.stamp) == stamp.as_ref()).and_then(|it| it.accounts.get(name))
    {
        return Ok(account.clone());
    }
    let account = read_account(name).ok_or_else(unknown)?;
    if let Some(stamp) = stamp {
        let known = match &mut *known {
            Some(known) if known.stamp == stamp && known.accounts.len() < KNOWN_MAX => known,
            other => other.insert(Known { stamp, accounts: HashMap::new() }),
        };
        known.accounts.insert(name.to_owned(), account.clone());
    }
    Ok(account)
}

/// Accounts remembered at once.
const KNOWN_MAX: usize = 16;
/// Of users and their groups.
const DATABASES: [&str; 3] = ["/etc/passwd", "/etc/group", "/etc/nsswitch.conf"];
/// Changes within one tick of the kernel's coarse clock look like one.
const STAMP_AGE_MIN: Duration = Duration::from_secs(1);

/// Accounts as they are while the databases have one stamp: each start of a process asks for one, and reading two files takes longer than
/// the rest of its way.
struct Known {
    stamp: Stamp,
    accounts: HashMap<String, Account>,
}

/// Device, inode, size and time of the last change of each database; all zeros for one that is not there.
#[derive(PartialEq, Eq)]
struct Stamp([(u64, u64, u64, i64, i64); DATABASES.len()]);

impl Stamp {
    /// `None` while a change is so young that another one could follow unseen.
    fn now() -> Option<Self> {
        let is_old = |meta: &Metadata| {
            let changed = UNIX_EPOCH + Duration::from_secs(meta.ctime().unsigned_abs());
            changed.elapsed().is_ok_and(|age| age > STAMP_AGE_MIN)
        };
        let mut stamp = [(0, 0, 0, 0, 0); DATABASES.len()];
        for (path, stamp) in DATABASES.iter().zip(&mut stamp) {
            match std::fs::metadata(path) {
                Ok(meta) if is_old(&meta) => {
                    *stamp = (meta.dev(), meta.ino(), meta.len(), meta.ctime(), meta.ctime_nsec());
                }
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                _ => return None,
            }
        }
        Some(Self(stamp))
    }
}

fn read_account(name: &str) -> Option<Account> {
    let user = User::from_name(name).ok().flatten()?;
    let c_name = CString::new(name).ok()?;
    let groups = nix::unistd::getgrouplist(&c_name, user.gid).unwrap_or_else(|_| vec![user.gid]);
    Some(Account {
        name: name.to_owned(),
        uid: user.uid.as_raw(),
        gid: user.gid.as_raw(),
        groups: groups.into_iter().map(Gid::as_raw).collect(),
        home: user.dir,
        shell: user.shell,
    })
}

/// `root`, or the number when no name is known.
pub fn user_name(uid: u32) -> String {
    User::from_uid(Uid::from_raw(uid)).ok().flatten().map_or_else(|| uid.to_string(), |user| user.name)
}

pub fn group_name(gid: u32) -> String {
    nix::unistd::Group::from_gid(Gid::from_raw(gid)).ok().flatten().map_or_else(|| gid.to_string(), |group| group.name)
}

/// Runs blocking file work with the file rights of `account`, on a thread that ends with it: a thread whose rights were changed is never
/// given other work.
pub async fn acting_as<T: Send + 'static>(
    account: &Account,
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    static THREADS: Semaphore = Semaphore::const_new(THREADS_MAX);
    let permit = THREADS.acquire().await.map_err(|_| io::Error::other("the threads are closed"))?;
    let (answer, result) = tokio::sync::oneshot::channel();
    detached(account, move || {
        let done = work();
        // The thread is as good as gone: whoever waits for one may have it before the answer is read.
        drop(permit);
        // Nobody waits any more when the request was dropped: the work has been done all the same.
        let _ = answer.send(done);
        Ok(())
    })?;
    // Without an answer the thread could not take the rights, or it panicked.
    result.await.map_err(|_| io::Error::from_raw_os_error(libc::EPERM))?
}

/// Runs `work` with the account's rights on a thread of its own, for which nobody waits. It is not run when the rights cannot be had.
pub fn detached(account: &Account, work: impl FnOnce() -> io::Result<()> + Send + 'static) -> io::Result<()> {
    let account = account.clone();
    std::thread::Builder::new().name("as-user".to_owned()).stack_size(STACK_BYTES).spawn(move || {
        if let Err(e) = assume_file_rights(&account).and_then(|()| work()) {
            eprintln!("envd: as {}: {e}", account.name);
        }
    })?;
    Ok(())
}

/// Changes what this thread may do with files. The raw calls, because libc's wrappers change every thread of the process.
fn assume_file_rights(account: &Account) -> io::Result<()> {
    if effective_uid() != 0 {
        // Without privileges (tests) everybody acts as who they are.
        return if effective_uid() == account.uid { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::EPERM)) };
    }
    // SAFETY: the list is valid for its length; the calls change this thread alone.
    unsafe {
        if libc::syscall(libc::SYS_setgroups, account.groups.len(), account.groups.as_ptr()) != 0 {
            return Err(io::Error::last_os_error());
        }
        libc::syscall(libc::SYS_setfsgid, account.gid);
        libc::syscall(libc::SYS_setfsuid, account.uid);
        // setfs*id report no errors: asking again with an id that cannot be gives the one in force.
        let in_force = (libc::syscall(libc::SYS_setfsuid, -1), libc::syscall(libc::SYS_setfsgid, -1));
        if in_force != (i64::from(account.uid), i64::from(account.gid)) {
            return Err(io::Error::from_raw_os_error(libc::EPERM));
        }
        libc::umask(0o022);
    }
    Ok(())
}

fn effective_uid() -> u32 {
    // SAFETY: geteuid has no effects.
    unsafe { libc::geteuid() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(authorization: &str) -> HeaderMap {
        HeaderMap::from_iter([(http::header::AUTHORIZATION, authorization.parse().unwrap())])
    }

    #[test]
    fn a_request_acts_as_the_named_or_the_default_user() {
        let basic = |text: &str| headers(&format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(text)));
        assert_eq!(of_request(&HeaderMap::new(), "root").unwrap().uid, 0);
        assert_eq!(of_request(&basic("nobody:"), "root").unwrap().name, "nobody");
        assert_eq!(of_request(&basic(":"), "root").unwrap().uid, 0);
        assert_eq!(of_request(&basic("root123:"), "root"), Err(UnknownUser::Name("root123".into())));
        for bad in ["Bearer x", "Basic %%%", "Basic /w=="] {
            assert_eq!(of_request(&headers(bad), "root"), Err(UnknownUser::Header), "{bad}");
        }
    }

    #[tokio::test]
    async fn file_work_has_so_many_threads_and_no_more() {
        use std::sync::Arc;
        use std::sync::atomic::{AtomicUsize, Ordering};

        let account = by_name(&user_name(effective_uid())).unwrap();
        let [busy, most] = [(); 2].map(|()| Arc::new(AtomicUsize::new(0)));
        let all = (0..THREADS_MAX * 8).map(|_| {
            let (busy, most) = (busy.clone(), most.clone());
            acting_as(&account, move || {
                most.fetch_max(busy.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                std::thread::sleep(std::time::Duration::from_millis(2));
                busy.fetch_sub(1, Ordering::SeqCst);
                Ok(())
            })
        });
        futures::future::try_join_all(all).await.unwrap();
        assert!((2..=THREADS_MAX).contains(&most.load(Ordering::SeqCst)), "{most:?}");
    }

    #[test]
    fn strange_names_are_unknown() {
        for name in ["", "a/b", "a:b", "no\nbody", "4294967295"] {
            assert!(by_name(name).is_err(), "{name:?}");
        }
    }
}
