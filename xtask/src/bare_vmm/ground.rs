//! What the bare microVM stands on: a directory with reflinks, and a network namespace with a tap. Both go when they are dropped; what a
//! killed run left is removed by the next one.

use std::fs::{self, File};
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context as _, Result, ensure};

use super::machine;
use crate::run;

pub const GUEST: Ipv4Addr = Ipv4Addr::new(169, 254, 0, 21);
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(169, 254, 0, 22);
pub const GUEST_MAC: &str = "02:fc:00:00:00:05";
const TAP_MAC: &str = "02:fc:00:00:00:06";
const LOCK: &str = "/run/lock/wrenn-bare-vmm";
/// linux/if_tun.h: _IOW('T', 202, int), and the flags for an Ethernet tap without a header of the kernel's.
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const IFF_TAP_NO_PI: libc::c_short = 0x1002;
/// The smallest XFS that mkfs makes without complaint is 300 MiB; logs and metadata stay below this.
const XFS_OVERHEAD_MIB: u64 = 1024;

static ENDING: AtomicBool = AtomicBool::new(false);

/// SIGINT and SIGTERM end the run at its next wait, so that everything is taken down.
pub fn end_on_signals() {
    extern "C" fn remember(_: libc::c_int) {
        ENDING.store(true, Ordering::Relaxed);
    }
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        // SAFETY: the handler only stores into an atomic.
        unsafe { libc::signal(signal, remember as *const () as libc::sighandler_t) };
    }
}

pub fn ending() -> bool {
    ENDING.load(Ordering::Relaxed)
}

/// Names and addresses are fixed, so two runs at a time would take each other's away (and slow each other down).
pub fn only_one() -> Result<File> {
    let lock = File::create(LOCK).with_context(|| format!("create {LOCK}"))?;
    ensure!(lock.try_lock().is_ok(), "another bare-vmm is running on this machine");
    Ok(lock)
}

pub struct Ground {
    /// A mounted XFS of our own, if there was need of one.
    mounted: Option<PathBuf>,
    /// Removed when this is dropped, after the unmount.
    scratch: tempfile::TempDir,
    place: PathBuf,
    base: PathBuf,
}

impl Ground {
    pub fn make(dir: &Path, rootfs: &Path, memory_mib: u32) -> Result<Self> {
        fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
        remove_leftovers(dir)?;
        let scratch = tempfile::Builder::new().prefix("bare-vmm-").tempdir_in(dir)?;
        let mut ground = Self { mounted: None, place: scratch.path().to_owned(), base: PathBuf::new(), scratch };
        if !reflinks(&ground.place)? {
            ground.mount_own(fs::metadata(rootfs)?.len() >> 20, memory_mib.into())?;
        }
        ground.base = ground.place.join("base.ext4");
        run::output(Command::new("cp").arg("--sparse=always").arg(rootfs).arg(&ground.base))?;
        machine::sync(&ground.base)?;
        Ok(ground)
    }

    fn mount_own(&mut self, disk_mib: u64, memory_mib: u64) -> Result<()> {
        let (image, at) = (self.scratch.path().join("pool.xfs"), self.scratch.path().join("pool"));
        eprintln!("{} has no reflinks: an XFS of its own is made there", self.scratch.path().display());
        // Sparse: base, and of disks and memory files never more than three at a time that are written to for long.
        File::create(&image)?.set_len((disk_mib * 4 + memory_mib * 3 + XFS_OVERHEAD_MIB) << 20)?;
        run::output(Command::new("mkfs.xfs").args(["-q", "-m", "reflink=1"]).arg(&image))?;
        fs::create_dir(&at)?;
        run::output(Command::new("mount").args(["-o", "loop"]).arg(&image).arg(&at))?;
        self.place.clone_from(&at);
        self.mounted = Some(at);
        Ok(())
    }

    pub fn place(&self) -> &Path {
        &self.place
    }

    /// The copy of the rootfs that disks are cloned from.
    pub fn base(&self) -> &Path {
        &self.base
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        if let Some(at) = &self.mounted
            && let Err(e) = run::output(Command::new("umount").arg(at))
        {
            eprintln!("{e:#}");
        }
    }
}

/// Of a run that was killed: the lock says that none is alive.
fn remove_leftovers(dir: &Path) -> Result<()> {
    for entry in fs::read_dir(dir)?.flatten() {
        if entry.file_name().to_string_lossy().starts_with("bare-vmm-") {
            quietly(Command::new("umount").arg(entry.path().join("pool")));
            fs::remove_dir_all(entry.path()).with_context(|| format!("remove {}", entry.path().display()))?;
        }
    }
    Ok(())
}

fn reflinks(dir: &Path) -> Result<bool> {
    let (a, b) = (dir.join("probe-a"), dir.join("probe-b"));
    fs::write(&a, [1; 4096])?;
    let cloned = machine::clone(&a, &b).is_ok();
    fs::remove_file(&a)?;
    fs::remove_file(&b)?;
    Ok(cloned)
}

/// Of one machine. There are as many as machines run at the same time.
pub struct Network {
    number: u8,
}

impl Network {
    /// `number`: below 120.
    pub fn make(number: u8) -> Result<Self> {
        // From here on dropping it cleans up, also after half of the script.
        let network = Self { number };
        network.remove();
        let (netns, outside, link) = (network.netns(), network.outside(), format!("bare{number}"));
        let [ours, theirs] = [0, 1].map(|end| Ipv4Addr::new(10, 12, 250, 2 * number + end));
        let script = format!(
            r#"
            ip netns add {netns}
            ip link add {link} type veth peer name peer0 netns {netns}
            ip addr add {ours}/31 dev {link}; ip link set {link} up
            ip -n {netns} addr add {theirs}/31 dev peer0; ip -n {netns} link set peer0 up; ip -n {netns} link set lo up
            ip -n {netns} route add default via {ours}
            ip -n {netns} tuntap add dev tap0 mode tap
            ip -n {netns} link set tap0 address {TAP_MAC}; ip -n {netns} addr add {GATEWAY}/30 dev tap0; ip -n {netns} link set tap0 up
            ip -n {netns} neigh replace {GUEST} lladdr {GUEST_MAC} dev tap0 nud permanent
            ip netns exec {netns} sysctl -qw net.ipv4.ip_forward=1
            ip route replace {outside}/32 via {theirs}
            ip netns exec {netns} nft 'table ip floor {{
                chain pre {{ type nat hook prerouting priority dstnat; ip daddr {outside} dnat to {GUEST}; }}
                chain post {{ type nat hook postrouting priority srcnat; oifname "tap0" masquerade; }}
            }}'
            "#
        );
        run::output(Command::new("sh").args(["-ec", &script]))?;
        Ok(network)
    }

    fn remove(&self) {
        quietly(Command::new("ip").args(["netns", "del", &self.netns()]));
        quietly(Command::new("ip").args(["link", "del", &format!("bare{}", self.number)]));
        quietly(Command::new("ip").args(["route", "del", &format!("{}/32", self.outside())]));
    }

    fn netns(&self) -> String {
        format!("bare-floor-{}", self.number)
    }

    /// By which the host reaches the guest.
    pub fn outside(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, 11, 250, 1 + self.number)
    }

    /// The tap, opened inside the namespace: QEMU stays outside and needs no capability.
    pub fn tap(&self) -> Result<OwnedFd> {
        let netns = self.netns();
        // A thread of its own, which ends: whoever has entered a namespace must do nothing else.
        let opened = std::thread::spawn(move || open_tap(&netns)).join().expect("opening a tap does not panic");
        opened.context("open the tap")
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        self.remove();
    }
}

fn open_tap(netns: &str) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Request {
        name: [u8; 16],
        flags: libc::c_short,
        rest: [u8; 22],
    }
    let there = File::open(format!("/run/netns/{netns}"))?;
    // SAFETY: a plain system call on an open descriptor; it concerns this thread only.
    if unsafe { libc::setns(there.as_raw_fd(), libc::CLONE_NEWNET) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a plain system call with a constant path.
    let tap = unsafe { libc::open(c"/dev/net/tun".as_ptr(), libc::O_RDWR | libc::O_NONBLOCK | libc::O_CLOEXEC) };
    if tap < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just opened and is owned by nothing else.
    let tap = unsafe { OwnedFd::from_raw_fd(tap) };
    let mut request = Request { name: [0; 16], flags: IFF_TAP_NO_PI, rest: [0; 22] };
    request.name[..4].copy_from_slice(b"tap0");
    // SAFETY: the argument is as large as an ifreq and outlives the call.
    if unsafe { libc::ioctl(tap.as_raw_fd(), TUNSETIFF, &raw mut request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(tap)
}

/// For what may well not be there.
fn quietly(command: &mut Command) {
    let _ = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status();
}
