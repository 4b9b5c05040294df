//! Where things lie: the programs beside this one, the files below `WRENN_DIR`, and the short places for sockets.

use std::ffi::OsString;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use sha2::{Digest as _, Sha256};

use crate::failure::{Doing as _, Failure};

/// A program that was built or installed together with this one.
pub fn program(name: &str) -> Result<PathBuf, Failure> {
    let me = std::env::current_exe().doing(|| "find this program's own file".to_owned())?;
    let place = me.with_file_name(name);
    if place.is_file() {
        return Ok(place);
    }
    Err(Failure::new(format!(
        "{name} is not beside {}: build or install the programs together (`make build`)",
        me.display()
    )))
}

/// PATH, and where Debian keeps what root uses: `su` and cron leave those out.
pub fn search_path() -> OsString {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path)
        .chain(["/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from));
    std::env::join_paths(folders).expect("folders of a PATH have no colon in them")
}

/// A program of the system.
pub fn system_program(name: &str) -> Option<PathBuf> {
    std::env::split_paths(&search_path())
        .map(|folder| folder.join(name))
        .find(|place| place.metadata().is_ok_and(|file| file.is_file() && file.permissions().mode() & 0o111 != 0))
}

/// Makes `WRENN_DIR`. Others may pass through it (the VMMs have uids of their own) and see nothing: every secret in it is 0600.
pub fn make_dir(dir: &Path) -> Result<(), Failure> {
    let doing = || format!("make the directory {}", dir.display());
    if !dir.is_dir() {
        std::fs::create_dir_all(dir).doing(doing)?;
        std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o711)).doing(doing)?;
    }
    std::fs::create_dir_all(dir.join("logs")).doing(doing)
}

/// Short, because the path of a unix socket has at most 107 bytes, and the same for the same directory.
pub fn socket_dir(dir: &Path) -> PathBuf {
    let digest = hex::encode(Sha256::digest(dir.as_os_str().as_encoded_bytes()));
    let base = if nix::unistd::geteuid().is_root() {
        PathBuf::from("/run/wrenn")
    } else {
        match std::env::var_os("XDG_RUNTIME_DIR").filter(|place| !place.is_empty()) {
            Some(place) => PathBuf::from(place).join("wrenn"),
            None => PathBuf::from(format!("/tmp/wrenn-{}", nix::unistd::geteuid())),
        }
    };
    base.join(&digest[..12])
}

/// One `wrenn up` or `wrenn down` at a time for a directory. The kernel lets go of it when its holder dies.
pub struct DirLock(#[expect(dead_code, reason = "held for its drop")] Flock<std::fs::File>);

pub fn lock(dir: &Path) -> Result<Option<DirLock>, Failure> {
    let place = dir.join("up.lock");
    let file = std::fs::OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&place)
        .doing(|| format!("open {}", place.display()))?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(Some(DirLock(lock))),
        Err((_, nix::errno::Errno::EWOULDBLOCK)) => Ok(None),
        Err((_, error)) => Err(error).doing(|| format!("lock {}", place.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_locked_once() {
        let dir = tempfile::tempdir().unwrap();
        let first = lock(dir.path()).unwrap();
        assert!(first.is_some());
        assert!(lock(dir.path()).unwrap().is_none());
        drop(first);
        assert!(lock(dir.path()).unwrap().is_some());
    }

    #[test]
    fn sockets_are_short_and_apart() {
        let long = PathBuf::from(format!("/var/{}", "x".repeat(300)));
        assert!(socket_dir(&long).join(".s.PGSQL.5432").as_os_str().len() < 100);
        assert_ne!(socket_dir(&long), socket_dir(Path::new("/var/lib/wrenn")));
    }
}
