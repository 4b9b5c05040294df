//! How this host runs microVMs: with KVM where a real boot has proved it, else by emulation. The proof takes seconds, so it is kept until
//! the machine boots again or the VMM is another one.

use std::path::{Path, PathBuf};

use microvm::KernelImage;
use microvm::qemu::{Accelerator, Qemu};
use serde::{Deserialize, Serialize};
use tracing::{info, warn};

use crate::durable;
use crate::sandbox::steps::blocking;
use crate::template;

#[derive(Serialize, Deserialize, PartialEq)]
struct Proof {
    boot_id: String,
    vmm_version: String,
    kernel: String,
    kvm: bool,
}

/// What an earlier look found, if nothing has changed since.
pub fn known(dir: &Path, vmm_version: &str) -> Option<Accelerator> {
    let proof: Proof = serde_json::from_slice(&durable::read(&path(dir), 4096).ok()?).ok()?;
    let same = proof.boot_id == boot_id()? && proof.vmm_version == vmm_version && proof.kernel == kernel(dir)?.version;
    same.then_some(if proof.kvm { Accelerator::Kvm } else { Accelerator::Tcg })
}

/// Boots a guest to find out. Without a guest kernel nothing can be proved, and nothing is kept.
pub async fn find_out(dir: &Path, vmm_version: &str) -> Accelerator {
    if let Some(accelerator) = known(dir, vmm_version) {
        return accelerator;
    }
    let Some(found) = kernel(dir) else {
        warn!("there is no guest kernel below {}; until there is one, sandboxes cannot start", dir.display());
        return Accelerator::Tcg;
    };
    let image = KernelImage { vmlinux: found.image, initramfs: found.initramfs };
    let begin = std::time::Instant::now();
    let accelerator = Qemu::probe(None, &image).await;
    let kvm = accelerator == Accelerator::Kvm;
    info!(kvm, duration_ms = begin.elapsed().as_millis(), "looked whether KVM boots a guest here");
    if let Some(boot_id) = boot_id() {
        let proof = Proof { boot_id, vmm_version: vmm_version.to_owned(), kernel: found.version, kvm };
        let bytes = serde_json::to_vec(&proof).expect("a proof has only text");
        let path = path(dir);
        if let Err(error) = blocking(move || durable::write(&path, &bytes, 0o644)).await {
            warn!("the next start will look for KVM again: {error}");
        }
    }
    accelerator
}

fn path(dir: &Path) -> PathBuf {
    dir.join("agent-vmm.json")
}

fn kernel(dir: &Path) -> Option<template::Kernel> {
    template::newest_kernel(dir)
}

fn boot_id() -> Option<String> {
    microvm::process::boot_id().ok()
}
