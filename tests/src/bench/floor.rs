//! The bare microVM, driven by `xtask bare-vmm` with the kernel and the image that the platform itself uses. It boots when it is asked to,
//! so that bare boots and creates stand on the same load.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use whole_machine::platform;

/// A boot with its restores, after the first one has copied the image.
const RUN_MAX: Duration = Duration::from_secs(180);

/// In milliseconds; boot and restore to the guest's first answer.
pub struct Life {
    pub boot: f64,
    pub restore: f64,
    /// To the guest's word that it has taken on who it is: of one that was nobody before, and of one that was somebody.
    pub restore_first: f64,
    pub restore_again: f64,
    /// Until it is on the disk.
    pub pause: f64,
    /// The vCPUs' part of it.
    pub pause_stopped: f64,
    /// Of each that was restored at the same time as the others, if that was asked for.
    pub restore_burst: Vec<f64>,
}

pub struct BareVmm {
    child: Child,
    /// Closed, it ends the program, which then takes down what it made.
    asks: ChildStdin,
    answers: Lines<BufReader<ChildStdout>>,
}

impl BareVmm {
    /// `isolation`: how the platform runs its sandboxes, which the floor must do too, as far as it can.
    /// `burst`: how many are restored at the same time at the end of each life.
    pub fn start(dir: &Path, isolation: &str, memory_mib: u32, runs_max: usize, burst: usize) -> Result<Self> {
        let accelerator = accelerator(isolation)?;
        let (kernel, initramfs) = kernel(&dir.join("kernels"))?;
        let mut command = Command::new(platform::program("xtask"));
        command
            .args(["bare-vmm", "--on-request", "--json", "--accel", accelerator, "--dir", "/var/tmp", "--kernel"])
            .arg(kernel);
        command.arg("--rootfs").arg(dir.join("images/minimal/rootfs.ext4"));
        command.args(["--mem", &memory_mib.to_string(), "--runs", &runs_max.to_string()]);
        command.args(["--burst", &burst.to_string()]);
        if initramfs.is_file() {
            command.arg("--initrd").arg(initramfs);
        }
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().context("start xtask bare-vmm")?;
        let asks = child.stdin.take().expect("it is a pipe");
        let answers = BufReader::new(child.stdout.take().expect("it is a pipe")).lines();
        Ok(Self { child, asks, answers })
    }

    /// A boot, and pauses and restores after it.
    pub async fn life(&mut self) -> Result<Life> {
        self.asks.write_all(b"\n").await.context("ask for a bare boot")?;
        let line = self.line().await?;
        let times: BTreeMap<String, Vec<f64>> =
            serde_json::from_str(&line).with_context(|| format!("the bare microVM says {line:?}"))?;
        let mean = |name: &str| -> Result<f64> {
            let all = times.get(name).filter(|all| !all.is_empty()).with_context(|| format!("no {name} in {line}"))?;
            Ok(all.iter().sum::<f64>() / all.len() as f64)
        };
        Ok(Life {
            boot: mean("boot")?,
            restore: mean("restore")?,
            restore_first: mean("restore_first")?,
            restore_again: mean("restore_again")?,
            pause: mean("pause_stopped")? + mean("pause_fsync")?,
            pause_stopped: mean("pause_stopped")?,
            restore_burst: times.get("restore_burst").cloned().unwrap_or_default(),
        })
    }

    /// It judges its own figures: a slow floor must not flatter.
    pub async fn finish(mut self) -> Result<()> {
        drop(self.asks);
        while let Ok(Ok(Some(_))) = tokio::time::timeout(RUN_MAX, self.answers.next_line()).await {}
        let status =
            tokio::time::timeout(RUN_MAX, self.child.wait()).await.context("the bare microVM does not end")??;
        ensure!(status.success(), "the floor is no floor: see above");
        Ok(())
    }

    async fn line(&mut self) -> Result<String> {
        let line = tokio::time::timeout(RUN_MAX, self.answers.next_line()).await;
        line.context("the bare microVM does not boot")??.context("the bare microVM ended early: see above")
    }
}

/// Of QEMU, as which the bare microVM runs.
fn accelerator(isolation: &str) -> Result<&'static str> {
    match isolation {
        "qemu/emulated" => Ok("tcg"),
        // Beside sandboxes of Firecracker it is a floor of another make.
        "qemu/kvm" | "firecracker/kvm" => Ok("kvm"),
        other => anyhow::bail!("there is no bare microVM for the isolation {other:?}"),
    }
}

/// Which VMM the floors beside sandboxes of that isolation are measured with.
pub fn name(isolation: &str) -> Result<String> {
    Ok(format!("QEMU ({})", accelerator(isolation)?))
}

/// The newest `vmlinux-<semver>`, which is what the agent takes, and the initramfs that belongs to it.
fn kernel(folder: &Path) -> Result<(PathBuf, PathBuf)> {
    let entries = std::fs::read_dir(folder).with_context(|| format!("read {}", folder.display()))?;
    let names = entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
    let newest = names
        .filter_map(|name| Some((version(name.strip_prefix("vmlinux-")?)?, name)))
        .max()
        .with_context(|| format!("no kernel in {}", folder.display()))?;
    let initramfs = newest.1.replacen("vmlinux", "initramfs", 1);
    Ok((folder.join(&newest.1), folder.join(initramfs)))
}

fn version(text: &str) -> Option<[u64; 3]> {
    let numbers: Vec<u64> = text.split('.').map(|part| part.parse().ok()).collect::<Option<_>>()?;
    numbers.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_kernel_is_taken() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["vmlinux-6.1.9", "vmlinux-6.1.20", "vmlinux-6.1.publish.tmp", "initramfs-6.1.20", "vmlinux-6.2"] {
            std::fs::write(dir.path().join(name), "").unwrap();
        }
        let (image, initramfs) = kernel(dir.path()).unwrap();
        assert_eq!((image, initramfs), (dir.path().join("vmlinux-6.1.20"), dir.path().join("initramfs-6.1.20")));
    }
}
