//! The command line, and why each flag is on it. Everything that a guest could tell a saved state by stands here, so that a boot and a
//! load of the same shape give the same machine.

use crate::{GUEST_MAC, Shape};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accelerator {
    Kvm,
    /// QEMU's software emulation.
    Tcg,
}

/// Names of what has been opened for QEMU: numbers of inherited descriptors and paths through them.
#[derive(Debug, Clone)]
pub struct Opened {
    pub control: i32,
    pub tap: Option<i32>,
    pub disk: String,
    pub memory: String,
    pub what: Beginning,
}

#[derive(Debug, Clone)]
pub enum Beginning {
    Boot { kernel: String, initramfs: Option<String>, arguments: String },
    Load { device: i32 },
}

/// Translated code per vCPU thread in MiB. Without a bound it grew to 655 MiB after some hundred programs; 32 costs a quarter more time.
const TCG_CACHE_MIB: u32 = 64;
const ON_DISK_ERRORS: &str = "werror=report,rerror=report";

pub fn arguments(accelerator: Accelerator, shape: Shape, opened: &Opened, tsc_khz: u64) -> Vec<String> {
    let mut line: Vec<String> = Vec::new();
    let mut add = |words: &[&str]| line.extend(words.iter().map(|word| (*word).to_owned()));
    add(&["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"]);
    // ACPI tells the stock kernel of its devices. Under ACPI the old timer and interrupt chips are not needed; the clock chip is: without
    // it a boot costs 1.5 s more.
    add(&["-M", "microvm,x-option-roms=off,isa-serial=on,rtc=on,acpi=on,pit=off,pic=off,memory-backend=m0"]);
    // Virtio 1.0, as other VMMs have it.
    add(&["-global", "virtio-mmio.force-legacy=false"]);
    match accelerator {
        Accelerator::Kvm => add(&["-accel", "kvm", "-cpu", "host"]),
        Accelerator::Tcg => add(&["-accel", &format!("tcg,thread=multi,tb-size={TCG_CACHE_MIB}"), "-cpu", "max"]),
    }
    add(&["-smp", &shape.vcpus.to_string(), "-m", &shape.memory_mib.to_string()]);
    // No new programs, no new rights, no old system calls.
    add(&["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"]);
    // A boot writes the memory into its file, so that saving it is a clone of the file; a load never changes the file it came from.
    let share = if matches!(opened.what, Beginning::Boot { .. }) { "on" } else { "off" };
    add(&[
        "-object",
        &format!("memory-backend-file,id=m0,size={}M,mem-path={},share={share}", shape.memory_mib, opened.memory),
    ]);
    // The format is said, never probed: a guest writes its disk as it likes. What the host cannot read or write is the guest's error: by
    // QEMU's own choice a full file system would stop the vCPUs until somebody continues them, and nobody would.
    let drive = format!("id=d0,file={},if=none,format=raw,cache=writeback,discard=unmap,{ON_DISK_ERRORS}", opened.disk);
    add(&["-drive", &drive]);
    add(&["-device", "virtio-blk-device,drive=d0"]);
    if let Some(tap) = opened.tap {
        add(&[
            "-netdev",
            &format!("tap,id=n0,fd={tap}"),
            "-device",
            &format!("virtio-net-device,netdev=n0,mac={GUEST_MAC}"),
        ]);
    }
    add(&["-object", "rng-random,id=r0,filename=/dev/urandom", "-device", "virtio-rng-device,rng=r0"]);
    add(&[
        "-chardev",
        &format!("socket,id=q0,server=on,wait=off,fd={}", opened.control),
        "-mon",
        "chardev=q0,mode=control",
    ]);
    // A ring inside QEMU: bounded, and it outlives whoever reads it.
    add(&["-chardev", "ringbuf,id=c0,size=65536", "-serial", "chardev:c0"]);
    match &opened.what {
        Beginning::Boot { kernel, initramfs, arguments } => {
            add(&["-kernel", kernel]);
            if let Some(initramfs) = initramfs {
                add(&["-initrd", initramfs]);
            }
            add(&["-append", &kernel_line(accelerator, tsc_khz, arguments)]);
        }
        // The stream is that of `xen-save-devices-state`, which has no section that tells the machine's configuration.
        Beginning::Load { device } => {
            add(&["-S", "-global", "migration.send-configuration=off", "-incoming", &format!("fd:{device}")])
        }
    }
    line
}

/// `tsc_early_khz`: on a busy host the kernel cannot calibrate the counter and hangs for ever.
fn kernel_line(accelerator: Accelerator, tsc_khz: u64, more: &str) -> String {
    let common =
        "console=ttyS0 reboot=t panic=-1 root=/dev/vda rw rootfstype=ext4 random.trust_cpu=on 8250.nr_uarts=1 quiet";
    let emulated = match accelerator {
        // The CPU's faults are not in an emulated CPU, and their cures would be emulated too.
        Accelerator::Tcg => format!(" tsc_early_khz={tsc_khz} tsc=reliable mitigations=off no_timer_check"),
        Accelerator::Kvm => String::new(),
    };
    format!("{common}{emulated} {more}").trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(what: Beginning, tap: Option<i32>) -> String {
        let opened = Opened { control: 3, tap, disk: "/proc/self/fd/4".into(), memory: "/proc/self/fd/5".into(), what };
        arguments(Accelerator::Tcg, Shape { vcpus: 2, memory_mib: 256 }, &opened, 2_596_118).join(" ")
    }

    #[test]
    fn a_boot_shares_its_memory_and_a_load_does_not() {
        let boot = line(
            Beginning::Boot { kernel: "k".into(), initramfs: Some("i".into()), arguments: "init=/x".into() },
            Some(7),
        );
        assert!(
            boot.contains("share=on")
                && boot.contains("-initrd i")
                && boot.contains("fd=7")
                && boot.contains("init=/x")
        );
        assert!(boot.contains("tsc_early_khz=2596118") && boot.contains("tb-size=64") && !boot.contains("-incoming"));
        let load = line(Beginning::Load { device: 9 }, None);
        assert!(
            load.contains("share=off")
                && load.contains("-incoming fd:9")
                && load.contains("-S")
                && !load.contains("-kernel")
        );
        assert!(!load.contains("netdev"));
        for line in [boot, load] {
            assert!(line.contains("-sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"));
            assert!(line.contains("format=raw"));
            assert!(line.contains("werror=report,rerror=report"));
        }
    }
}
