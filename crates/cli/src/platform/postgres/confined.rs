//! Runs a PostgreSQL program as user `postgres` in a mount namespace of its own.
//!
//! Two reasons. The cluster may lie where that user may not go (below a directory that is root's alone), so its folder is mounted in a
//! short, open place that only the server sees. And a namespace that holds copies of other mounts would keep alive what hosts unmount
//! (network namespaces, pools), so all mounts but the few that PostgreSQL needs are taken away in it.
//!
//! This program calls itself for it, before it has threads, because a namespace belongs to a thread. It refuses to run as root what it
//! was given: it always gives its user away first.

use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{Gid, Uid, User, setgid, setgroups, setuid};

use crate::failure::{Doing as _, Failure};
use crate::platform::layout;

/// The hidden first argument; then: what to mount, where, the program, its arguments.
const CALL: &str = "postgres-confined";
const USER: &str = "postgres";
/// What PostgreSQL needs to see. Everything else that is mounted is taken away.
const SEEN: [&str; 6] = ["/", "/usr", "/etc", "/dev/shm", "/tmp", "/proc"];

/// The user that the server runs as; none when this program is not root, and the server runs as its user.
pub fn user() -> Result<Option<User>, Failure> {
    if !nix::unistd::geteuid().is_root() {
        return Ok(None);
    }
    let user = User::from_name(USER).doing(|| format!("look up the user {USER}"))?;
    user.map(Some)
        .ok_or_else(|| Failure::new(format!("there is no user {USER}: install postgresql with scripts/setup")))
}

/// Where the server sees `WRENN_DIR/postgres`.
pub fn mount_point(dir: &Path) -> PathBuf {
    if nix::unistd::geteuid().is_root() { layout::socket_dir(dir).join("cluster") } else { dir.join("postgres") }
}

/// A command that runs `program` as the server's user.
pub fn command(dir: &Path, program: &Path) -> Result<tokio::process::Command, Failure> {
    if user()?.is_none() {
        return Ok(tokio::process::Command::new(program));
    }
    let me = std::env::current_exe().doing(|| "find this program's own file".to_owned())?;
    let mut command = tokio::process::Command::new(me);
    command.arg(CALL).arg(dir.join("postgres")).arg(mount_point(dir)).arg(program);
    // Nothing of this program's environment is the server's business.
    command.env_clear().env("PATH", "/usr/local/bin:/usr/bin:/bin").env("LC_ALL", "C").current_dir("/");
    Ok(command)
}

/// Called first of all by `main`: when this is the hidden call, it becomes the other program and does not come back.
pub fn main() -> Option<ExitCode> {
    let mut arguments = std::env::args_os().skip(1);
    if arguments.next()?.to_str()? != CALL {
        return None;
    }
    let (Some(from), Some(to), Some(program)) = (arguments.next(), arguments.next(), arguments.next()) else {
        eprintln!("wrenn: {CALL} is called by `wrenn up` alone");
        return Some(ExitCode::from(crate::failure::EXIT_USAGE));
    };
    let error = match enter(Path::new(&from), Path::new(&to)) {
        Ok(()) => std::process::Command::new(&program).args(arguments).exec().to_string(),
        Err(failure) => failure.message(),
    };
    eprintln!("wrenn: start {}: {error}", Path::new(&program).display());
    Some(ExitCode::FAILURE)
}

fn enter(from: &Path, to: &Path) -> Result<(), Failure> {
    let user = user()?.ok_or_else(|| Failure::new("only root can give its user away"))?;
    let none = None::<&str>;
    unshare(CloneFlags::CLONE_NEWNS).doing(|| "make a mount namespace".to_owned())?;
    // Nothing that is done here may be seen outside.
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
        .doing(|| "close the mount namespace".to_owned())?;
    mount(Some(from), to, none, MsFlags::MS_BIND, none)
        .doing(|| format!("mount {} on {}", from.display(), to.display()))?;
    let mut needed: Vec<PathBuf> = SEEN.iter().map(PathBuf::from).collect();
    needed.push(to.to_owned());
    for place in mounted()?.into_iter().rev() {
        if !needed.iter().any(|needed| needed.starts_with(&place)) {
            // What cannot be taken away was taken away with its parent.
            let _ = umount2(&place, MntFlags::MNT_DETACH);
        }
    }
    give_away(user.uid, user.gid)
}

fn give_away(uid: Uid, gid: Gid) -> Result<(), Failure> {
    // `ssl-cert`, which Debian adds to the user, opens nothing that is used here.
    setgroups(&[gid]).doing(|| "drop the groups".to_owned())?;
    setgid(gid).doing(|| "change the group".to_owned())?;
    setuid(uid).doing(|| "change the user".to_owned())?;
    nix::sys::prctl::set_no_new_privs().doing(|| "give up new privileges".to_owned())
}

fn mounted() -> Result<Vec<PathBuf>, Failure> {
    let text = std::fs::read_to_string("/proc/self/mountinfo").doing(|| "list the mounts".to_owned())?;
    Ok(text.lines().filter_map(|line| line.split(' ').nth(4)).map(unescaped).collect())
}

/// The kernel writes blank, tab, newline and backslash as three octal digits.
fn unescaped(text: &str) -> PathBuf {
    let mut plain = text.to_owned();
    for (code, sign) in [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")] {
        plain = plain.replace(code, sign);
    }
    plain.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_in_mountinfo_are_read_back() {
        assert_eq!(unescaped("/a\\040b\\134c"), PathBuf::from("/a b\\c"));
    }
}
