//! What this machine can do, found out by doing it: QEMU's version, and whether KVM boots a kernel. A device node that opens proves
//! nothing: there are machines on which it opens, runs a vCPU, and never gets through a kernel's start.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::io::AsyncReadExt as _;
use tokio::process::Command;
use tokio::time::{Instant, timeout_at};

use super::command::Accelerator;
use super::landlock;
use crate::{Error, KernelImage, proof};

const VERSION_LIMIT: Duration = Duration::from_secs(10);
/// Of processor time, for when nobody is left to end it: some times what a vCPU and its VMM can use in that time.
const CPU: libc::rlimit = libc::rlimit { rlim_cur: 20, rlim_max: 20 };

/// The full path of a program: what may be opened beside it depends on where it is.
pub fn find(binary: &Path) -> Result<PathBuf, Error> {
    let places: Vec<PathBuf> = if binary.components().count() > 1 {
        vec![binary.to_owned()]
    } else {
        std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()).map(|place| place.join(binary)).collect()
    };
    let found = places.into_iter().find_map(|path| path.canonicalize().ok().filter(|path| path.is_file()));
    found.ok_or_else(|| Error::Start {
        reason: format!("find {}", binary.display()),
        cause: std::io::ErrorKind::NotFound.into(),
    })
}

pub async fn version(binary: &Path) -> Result<String, Error> {
    let mut command = Command::new(binary);
    command.arg("--version").stdin(Stdio::null()).kill_on_drop(true);
    let output = tokio::time::timeout(VERSION_LIMIT, command.output())
        .await
        .map_err(|_| Error::Silent { command: "--version", limit: VERSION_LIMIT })?
        .map_err(|cause| Error::Start { reason: format!("run {}", binary.display()), cause })?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    parse_version(&text).ok_or_else(|| Error::Stillborn(format!("{} --version printed no version", binary.display())))
}

/// `7.2.22 (Debian 1:7.2+dfsg-7)` from `QEMU emulator version 7.2.22 (Debian ...)`: saved states are good for one build only.
fn parse_version(text: &str) -> Option<String> {
    let (_, version) = text.lines().next()?.split_once("version ")?;
    version.starts_with(|c: char| c.is_ascii_digit()).then(|| version.trim().to_owned())
}

pub async fn accelerator(binary: &Path, kernel: &KernelImage) -> Accelerator {
    if let Err(reason) = kvm_access() {
        tracing::info!("no KVM: {reason}");
        return Accelerator::Tcg;
    }
    if boots_by_kvm(binary, kernel).await { Accelerator::Kvm } else { Accelerator::Tcg }
}

/// How a VMM's own user may open `/dev/kvm`: as anybody, or as one of the group that is answered. Why not, if not: for root alone is for no
/// VMM, because none runs as root.
pub fn kvm_access() -> Result<Option<u32>, String> {
    let about = std::fs::metadata(landlock::KVM).map_err(|e| format!("{}: {e}", landlock::KVM))?;
    let may = |bits: u32| about.mode() & bits == bits;
    match about.gid() {
        _ if may(0o006) => Ok(None),
        group @ 1.. if may(0o060) => Ok(Some(group)),
        _ => Err(format!(
            "{} is open to root alone (mode {:o}); give it to a group: chgrp kvm, chmod 660",
            landlock::KVM,
            about.mode() & 0o7777
        )),
    }
}

async fn boots_by_kvm(binary: &Path, kernel: &KernelImage) -> bool {
    let mut command = Command::new(binary);
    command
        .args([
            "-nodefaults",
            "-no-user-config",
            "-no-reboot",
            "-display",
            "none",
            "-accel",
            "kvm",
            "-cpu",
            "host",
            "-m",
            "128",
        ])
        .args(["-M", "microvm,x-option-roms=off,isa-serial=on,rtc=on,acpi=on,pit=off,pic=off"])
        .args(["-serial", "stdio", "-append", "console=ttyS0 panic=-1 reboot=t", "-kernel"])
        .arg(&kernel.vmlinux);
    if let Some(initramfs) = &kernel.initramfs {
        command.arg("-initrd").arg(initramfs);
    }
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).kill_on_drop(true);
    let parent = std::process::id();
    // SAFETY: plain system calls on memory of the closure's own.
    unsafe { command.pre_exec(move || end_with(parent)) };
    let Ok(mut child) = command.spawn() else { return false };
    let Some(mut console) = child.stdout.take() else { return false };
    let deadline = Instant::now() + proof::BOOT_LIMIT;
    let mut seen = Vec::new();
    let mut piece = [0; 4096];
    let booted = loop {
        match timeout_at(deadline, console.read(&mut piece)).await {
            Ok(Ok(count @ 1..)) => seen.extend_from_slice(&piece[..count]),
            _ => break false,
        }
        let text = String::from_utf8_lossy(&seen);
        if proof::is_booted(&text) {
            break true;
        }
        if seen.len() > 1 << 20 {
            break false;
        }
    };
    // Killed and collected here, so that no guest is left when the answer is given.
    let _ = child.kill().await;
    booted
}

/// A guest that spins must not outlive an agent that was killed and can collect nothing. Between fork and exec.
fn end_with(parent: u32) -> std::io::Result<()> {
    let check = |result: libc::c_int| if result < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) };
    // SAFETY: plain system calls; the pointer is to a constant.
    unsafe {
        check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL))?;
        check(libc::setrlimit(libc::RLIMIT_CPU, &CPU))?;
        // It may have ended before the first of the two.
        if libc::getppid().cast_unsigned() != parent {
            return Err(std::io::Error::from_raw_os_error(libc::ESRCH));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_version() {
        let text = "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)\nCopyright\n";
        assert_eq!(parse_version(text).as_deref(), Some("7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)"));
        assert_eq!(parse_version("bash: no such file"), None);
    }
}
