//! `wrenn down`: ends the platform of a directory with all its sandboxes, and leaves nothing in the kernel. It works also when nothing
//! of the platform runs any more, and when `wrenn up` was killed.

use std::path::{Path, PathBuf};
use std::process::{ExitCode, Stdio};
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::json;
use tokio::process::Command;

use crate::credentials::Options;
use crate::failure::{Doing as _, Failure};
use crate::output::{Format, show};
use crate::platform::state::UpState;
use crate::platform::{layout, objects, postgres};

/// `up` takes at most 45 s.
const UP_END_MAX: Duration = Duration::from_secs(60);
const KILLED_END_MAX: Duration = Duration::from_secs(10);
/// A hundred sandboxes, one after the other, on a busy machine.
const STOP_ALL_MAX: Duration = Duration::from_secs(300);

#[derive(clap::Args)]
pub struct Arguments {
    /// Remove the platform's data too: database, images, snapshots, credentials.
    #[arg(long)]
    purge: bool,
}

pub async fn run(arguments: &Arguments, options: &Options, format: Format) -> Result<ExitCode, Failure> {
    let dir = options.dir()?;
    take_down(&dir, arguments.purge).await?;
    let what = json!({"dir": dir, "down": true, "purged": arguments.purge});
    show(format, &what, |_| {
        let data = if arguments.purge { "its data is removed" } else { "its data is kept" };
        format!("the platform in {} is down; {data}", dir.display())
    })?;
    Ok(ExitCode::SUCCESS)
}

pub async fn take_down(dir: &Path, purge: bool) -> Result<(), Failure> {
    if !dir.is_dir() {
        return Err(Failure::new(format!("there is no platform in {}: no such directory", dir.display())));
    }
    if !is_platform(dir) {
        return Err(Failure::new(format!(
            "{} does not look like a platform's directory; nothing was done",
            dir.display()
        )));
    }
    let state = UpState::read(dir);
    if let Some(up) = state.running() {
        up.signal(Signal::SIGTERM);
        if !up.wait_end(UP_END_MAX).await {
            eprintln!(
                "wrenn: `wrenn up` (process {}) did not end within {} s and is killed",
                up.pid,
                UP_END_MAX.as_secs()
            );
            up.signal(Signal::SIGKILL);
            up.wait_end(KILLED_END_MAX).await;
        }
    }
    let Some(_lock) = layout::lock(dir)? else {
        return Err(Failure::new(format!("another `wrenn up` or `wrenn down` is at work in {}", dir.display())));
    };
    for identity in state.programs.values() {
        if identity.signal(Signal::SIGKILL) {
            identity.wait_end(KILLED_END_MAX).await;
        }
    }
    let tag = objects::tag(dir);
    if tag.is_some() {
        stop_all(dir).await?;
    }
    postgres::stop(dir).await;
    UpState { up: None, programs: Default::default(), ..UpState::read(dir) }.write(dir)?;
    let left = objects::count(dir, tag.as_deref());
    if !left.is_empty() {
        let left: Vec<String> =
            left.iter().map(|(kind, number)| format!("{number} {}", kind.replace('_', " "))).collect();
        return Err(Failure::new(format!(
            "something is left of the platform in {}: {}",
            dir.display(),
            left.join(", ")
        )));
    }
    if purge { remove_data(dir) } else { Ok(()) }
}

fn is_platform(dir: &Path) -> bool {
    // A name alone proves nothing: other directories have a file `secret` too.
    objects::tag(dir).is_some() || UpState::is_there(dir)
}

/// The host agent's own way of ending everything: it knows what it made.
async fn stop_all(dir: &Path) -> Result<(), Failure> {
    let mut command = Command::new(layout::program("wrenn-agent")?);
    command
        .arg("--stop-all")
        .env("WRENN_DIR", dir)
        .env("PATH", layout::search_path())
        .current_dir(dir)
        .stdin(Stdio::null())
        .kill_on_drop(true);
    let output = tokio::time::timeout(STOP_ALL_MAX, command.output())
        .await
        .map_err(|_| Failure::new(format!("wrenn-agent --stop-all did not end within {} s", STOP_ALL_MAX.as_secs())))?
        .doing(|| "start wrenn-agent".to_owned())?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let lines: Vec<&str> = said.lines().collect();
    Err(Failure::new(format!(
        "wrenn-agent --stop-all ended with {}:\n{}",
        output.status,
        lines[lines.len().saturating_sub(15)..].join("\n")
    )))
}

/// What a platform keeps in its directory. All three programs write there.
const OURS: [&str; 24] = [
    "agent-id",
    "agent-vmm.json",
    "agent.lock",
    "ca.pem",
    "cli.json",
    "dev-registration-token",
    "host-cert.pem",
    "host-key.pem",
    "host-pending.json",
    "host-ticket",
    "host-token",
    "images",
    "kernels",
    "logs",
    "pool",
    "pool.img",
    "postgres",
    "sandboxes",
    "secret",
    "snapshots",
    "up.json",
    "up.lock",
    "wrenn-agent.ready",
    "wrenn-cp.ready",
];

/// Only names that are the platform's, so that a directory that holds other things keeps them; the directory goes when it is empty.
fn remove_data(dir: &Path) -> Result<(), Failure> {
    let entries = std::fs::read_dir(dir).doing(|| format!("list {}", dir.display()))?;
    for entry in entries.flatten() {
        if is_ours(&entry.file_name().to_string_lossy()) {
            remove(&entry.path())?;
        }
    }
    match std::fs::remove_dir(dir) {
        Err(error) if error.kind() == std::io::ErrorKind::DirectoryNotEmpty => {
            eprintln!("wrenn: {} holds files that are not the platform's; they are kept", dir.display());
            Ok(())
        }
        // It may be a mount point, or lie where this user may not remove it.
        Err(error) if error.kind() == std::io::ErrorKind::ResourceBusy => Ok(()),
        other => other.doing(|| format!("remove {}", dir.display())),
    }
}

/// Also what was being written when its program was killed: `.secret.123`, `up.tmp`, `wrenn-cp.123.tmp`, `.reflink-probe.tmp`.
fn is_ours(name: &str) -> bool {
    let stem = |name: &str| name.split('.').next().unwrap_or_default().to_owned();
    let unfinished = name.strip_suffix(".tmp").or_else(|| name.strip_prefix('.'));
    OURS.contains(&name)
        || unfinished.is_some_and(|rest| {
            let rest = stem(rest.trim_start_matches('.'));
            rest.starts_with("reflink-probe") || OURS.iter().any(|ours| stem(ours) == rest)
        })
}

fn remove(place: &PathBuf) -> Result<(), Failure> {
    let is_folder = place.symlink_metadata().is_ok_and(|metadata| metadata.is_dir());
    let removed = if is_folder { std::fs::remove_dir_all(place) } else { std::fs::remove_file(place) };
    match removed {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        other => other.doing(|| format!("remove {}", place.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_directory_of_something_else_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("precious"), "x").unwrap();
        let failure = take_down(dir.path(), true).await.unwrap_err();
        assert!(failure.message().contains("nothing was done"), "{}", failure.message());
        std::fs::write(dir.path().join("secret"), "x").unwrap();
        let failure = take_down(dir.path(), true).await.unwrap_err();
        assert!(failure.message().contains("nothing was done"), "a file's name is no proof: {}", failure.message());
        remove_data(dir.path()).unwrap();
        assert!(dir.path().join("precious").exists());
        assert!(!dir.path().join("secret").exists());
    }

    #[test]
    fn only_the_platforms_own_names_are_removed() {
        for name in [
            "secret",
            ".secret.4711",
            "up.json",
            "up.tmp",
            "wrenn-cp.12.tmp",
            ".reflink-probe-clone.tmp",
            "pool.img.tmp",
        ] {
            assert!(is_ours(name), "{name}");
        }
        for name in ["agents", "pool-backup", "host-list", "up.sh", "secrets", ".bashrc", "ca.crt", "other.tmp"] {
            assert!(!is_ours(name), "{name}");
        }
    }
}
