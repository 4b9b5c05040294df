//! One QEMU process by hand: started under a user of its own, spoken to over a socket pair, killed when it is dropped.

use std::fs::{self, File};
use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::fd::{AsRawFd as _, OwnedFd, RawFd};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};

use super::ground::{self, GATEWAY, GUEST, GUEST_MAC, Network};

/// Of nobody else on the machine: the product's users lie far above.
const UID: u32 = 64_999;
const MACHINE: &str = "microvm,x-option-roms=off,isa-serial=on,rtc=on,acpi=on,pit=off,pic=off,memory-backend=m0";
const SANDBOX: &str = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";
const PORT: u16 = 49983;
/// Of one try: a SYN that meets no guest is repeated by the kernel only after a second.
const CONNECT_LIMIT: Duration = Duration::from_millis(20);
const READ_LIMIT: Duration = Duration::from_secs(2);
const INTRODUCTION_LIMIT: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(2);
const QMP_LIMIT: Duration = Duration::from_secs(20);
const QMP_LINE_MAX: u64 = 1 << 20;
const PAGE: usize = 4096;
const PIECE: usize = 1 << 20;
/// linux/fs.h: _IOW(0x94, 9, int)
const FICLONE: libc::c_ulong = 0x4004_9409;
const TSC_INTERVAL: Duration = Duration::from_millis(200);

pub struct Setting {
    pub qemu: PathBuf,
    pub kernel: PathBuf,
    pub initrd: Option<PathBuf>,
    pub init: Option<String>,
    pub memory_mib: u32,
    pub tsc_khz: u64,
    pub accelerator: Accelerator,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Accelerator {
    /// Software emulation.
    Tcg,
    Kvm,
}

pub enum Beginning {
    /// The memory file is written by the guest itself.
    Boot,
    /// The memory file is mapped privately.
    Load { device: PathBuf },
}

pub struct Paused {
    pub stopped: Duration,
    pub synced: Duration,
}

pub struct Machine {
    child: Child,
    began: Instant,
    qmp: BufReader<UnixStream>,
    memory: PathBuf,
    address: Ipv4Addr,
    /// Path, in QEMU, of the file that takes the device state.
    device: String,
    /// What QEMU complains of: shown when something fails. (It always complains that the saved state has no description of itself.)
    log: PathBuf,
}

impl Machine {
    /// `save_to` is made here and takes the device state when the machine is paused.
    pub fn start(
        setting: &Setting,
        network: &Network,
        disk: &Path,
        memory: &Path,
        save_to: &Path,
        beginning: Beginning,
    ) -> Result<Self> {
        let mut handed: Vec<OwnedFd> = Vec::new();
        let mut hand = |descriptor: OwnedFd| {
            handed.push(descriptor);
            handed.last().map_or(-1, |fd| fd.as_raw_fd())
        };
        // Handed over open, so that the directories above need not let that user through.
        let path = |number: RawFd| format!("/proc/self/fd/{number}");
        let disk = path(hand(File::open(disk)?.into()));
        let memory_path = path(hand(File::open(memory)?.into()));
        let device = path(hand(owned(save_to)?.into()));
        let tap = hand(network.tap()?);
        let (ours, theirs) = UnixStream::pair()?;
        let control = hand(theirs.into());
        let share = if matches!(beginning, Beginning::Boot) { "on" } else { "off" };
        let mib = setting.memory_mib;
        let (accelerator, cpu) = match setting.accelerator {
            Accelerator::Tcg => ("tcg,thread=multi,tb-size=64", "max"),
            Accelerator::Kvm => ("kvm", "host"),
        };
        let mut command = Command::new(&setting.qemu);
        command
            .args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-M", MACHINE])
            .args(["-global", "virtio-mmio.force-legacy=false", "-accel", accelerator, "-cpu", cpu])
            .args(["-smp", "1", "-m", &mib.to_string(), "-sandbox", SANDBOX, "-object"])
            .arg(format!("memory-backend-file,id=m0,size={mib}M,mem-path={memory_path},share={share}"))
            .args(["-drive", &format!("id=d0,file={disk},if=none,format=raw,cache=writeback")])
            .args(["-device", "virtio-blk-device,drive=d0", "-netdev", &format!("tap,id=n0,fd={tap}")])
            .args(["-device", &format!("virtio-net-device,netdev=n0,mac={GUEST_MAC}")])
            .args(["-chardev", &format!("socket,id=q0,fd={control}"), "-mon", "chardev=q0,mode=control"])
            .args(["-chardev", "ringbuf,id=c0,size=65536", "-serial", "chardev:c0"]);
        match &beginning {
            Beginning::Boot => {
                command.args(["-kernel", &path(hand(File::open(&setting.kernel)?.into()))]);
                if let Some(initrd) = &setting.initrd {
                    command.args(["-initrd", &path(hand(File::open(initrd)?.into()))]);
                }
                command.args(["-append", &kernel_line(setting)]);
            }
            Beginning::Load { device } => {
                let incoming = hand(File::open(device)?.into());
                command.args(["-S", "-global", "migration.send-configuration=off"]);
                command.args(["-incoming", &format!("fd:{incoming}")]);
            }
        }
        let numbers: Vec<RawFd> = handed.iter().map(|fd| fd.as_raw_fd()).collect();
        let log = save_to.with_extension("log");
        // SAFETY: plain system calls only, on memory made before the fork.
        unsafe { command.pre_exec(move || enter_jail(&numbers)) };
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(File::create(&log)?).env_clear().current_dir("/");
        let began = Instant::now();
        let child = command.spawn().with_context(|| format!("start {}", setting.qemu.display()))?;
        // Ours are closed: a copy of the disk's would keep its lock, one of the tap's would keep it busy.
        drop(handed);
        ours.set_read_timeout(Some(QMP_LIMIT))?;
        ours.set_write_timeout(Some(QMP_LIMIT))?;
        let (memory, address) = (memory.to_owned(), network.outside());
        let mut machine = Self { child, began, qmp: BufReader::new(ours), memory, address, device, log };
        ensure!(machine.line()?.get("QMP").is_some(), "QEMU did not greet");
        machine.ask("qmp_capabilities", json!({}))?;
        if matches!(beginning, Beginning::Load { .. }) {
            while machine.ask("query-status", json!({}))?["status"] == "inmigrate" {
                ensure!(machine.began.elapsed() < QMP_LIMIT, "the saved state is not loaded after {QMP_LIMIT:?}");
                std::thread::sleep(Duration::from_millis(1));
            }
            machine.ask("cont", json!({}))?;
        }
        Ok(machine)
    }

    pub fn ask(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let line = format!("{}\n", json!({"execute": command, "arguments": arguments}));
        self.qmp.get_mut().write_all(line.as_bytes()).with_context(|| command.to_owned())?;
        loop {
            let mut message = self.line().with_context(|| command.to_owned())?;
            if let Some(answer) = message.get_mut("return") {
                return Ok(answer.take());
            }
            if let Some(error) = message.get("error") {
                bail!("{command}: {}", error["desc"]);
            }
        }
    }

    fn line(&mut self) -> Result<Value> {
        let mut line = String::new();
        (&mut self.qmp).take(QMP_LINE_MAX).read_line(&mut line).context("read from QEMU")?;
        serde_json::from_str(&line).with_context(|| format!("QEMU said {line:?}; {}", self.complaints()))
    }

    fn complaints(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default().trim().to_owned()
    }

    /// From just before the spawn to the first complete HTTP answer.
    pub fn answered(&mut self, limit: Duration) -> Result<Duration> {
        let address = self.address;
        self.until(limit, || ask_guest(address))
    }

    /// From just before the spawn to the guest's word that it has taken on who it is, which nobody has asked for anything before. `run` is the
    /// first of its life, or a later one.
    pub fn introduced(&mut self, limit: Duration, run: u32) -> Result<Duration> {
        let address = self.address;
        self.until(limit, || introduce_guest(address, run))
    }

    fn until(&mut self, limit: Duration, ask: impl Fn() -> io::Result<()>) -> Result<Duration> {
        while self.began.elapsed() < limit {
            ensure!(!ground::ending(), "ended by a signal");
            if let Some(status) = self.child.try_wait()? {
                bail!("QEMU ended before the guest answered: {status}; {}", self.complaints());
            }
            match ask() {
                Ok(()) => return Ok(self.began.elapsed()),
                Err(_) => std::thread::sleep(POLL),
            }
        }
        let console = self.ask("ringbuf-read", json!({"device": "c0", "size": 4096}))?;
        bail!("no answer from the guest within {limit:?}; its console: {console}")
    }

    /// Stops the machine and has the device state written.
    pub fn save_device(&mut self) -> Result<()> {
        self.ask("stop", json!({}))?;
        let device = self.device.clone();
        self.ask("xen-save-devices-state", json!({"filename": device}))?;
        Ok(())
    }

    /// Stops the machine; `memory` becomes a flat, complete file.
    pub fn pause(&mut self, memory: &Path) -> Result<Paused> {
        let began = Instant::now();
        self.save_device()?;
        let target = clone(&self.memory, memory)?;
        self.copy_own_pages(&target)?;
        let stopped = began.elapsed();
        let began = Instant::now();
        target.sync_all()?;
        Ok(Paused { stopped, synced: began.elapsed() })
    }

    /// Of the guest's memory, the pages that this process has and its memory file has not.
    fn copy_own_pages(&self, target: &File) -> Result<()> {
        let pid = self.child.id();
        let inode = fs::metadata(&self.memory)?.ino().to_string();
        let pagemap = File::open(format!("/proc/{pid}/pagemap"))?;
        let source = File::open(format!("/proc/{pid}/mem"))?;
        let mut buffer = vec![0; PIECE];
        let mut mappings = 0;
        for line in fs::read_to_string(format!("/proc/{pid}/maps"))?.lines() {
            let fields: Vec<&str> = line.split_whitespace().collect();
            if fields.get(4) != Some(&inode.as_str()) {
                continue;
            }
            mappings += 1;
            let (low, high) = fields[0].split_once('-').context("a line of maps")?;
            let (low, high) = (usize::from_str_radix(low, 16)?, usize::from_str_radix(high, 16)?);
            let in_file = usize::from_str_radix(fields[2], 16)?;
            let mut entries = vec![0; (high - low) / PAGE * 8];
            pagemap.read_exact_at(&mut entries, (low / PAGE * 8) as u64)?;
            let mut page = 0;
            let count = entries.len() / 8;
            let own = |page: usize| {
                let entry = u64::from_ne_bytes(entries[page * 8..page * 8 + 8].try_into().expect("eight bytes"));
                // Swapped, or present and not of the file.
                entry >> 62 & 1 == 1 || (entry >> 63 == 1 && entry >> 61 & 1 == 0)
            };
            while page < count {
                let first = page;
                while page < count && page - first < PIECE / PAGE && own(page) {
                    page += 1;
                }
                if page == first {
                    page += 1;
                    continue;
                }
                let piece = &mut buffer[..(page - first) * PAGE];
                source.read_exact_at(piece, (low + first * PAGE) as u64)?;
                target.write_all_at(piece, (in_file + first * PAGE) as u64)?;
            }
        }
        ensure!(mappings > 0, "QEMU does not map its memory file");
        Ok(())
    }

    pub fn end(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.end();
    }
}

fn kernel_line(setting: &Setting) -> String {
    let init = setting.init.as_ref().map_or_else(String::new, |init| format!("init={init} "));
    format!(
        "console=ttyS0 reboot=t panic=-1 root=/dev/vda rw rootfstype=ext4 {init}\
         ip={GUEST}::{GATEWAY}:255.255.255.252:floor:eth0:off tsc_early_khz={} tsc=reliable mitigations=off \
         no_timer_check random.trust_cpu=on 8250.nr_uarts=1 quiet",
        setting.tsc_khz
    )
}

/// A whole answer of success, on a connection of its own.
fn ask_guest(address: Ipv4Addr) -> io::Result<()> {
    ask(address, READ_LIMIT, || "GET /health HTTP/1.1\r\nHost: guest\r\nConnection: close\r\n\r\n".to_owned())
}

/// What a host tells a guest when it starts or restores it: name, time, random numbers, tokens.
fn introduce_guest(address: Ipv4Addr, run: u32) -> io::Result<()> {
    ask(address, INTRODUCTION_LIMIT, || {
        let body = json!({
            "incarnation": format!("{run:032x}"),
            "accessToken": "a".repeat(64),
            "controlToken": "c".repeat(64),
            "timestamp": chrono::Utc::now().to_rfc3339(),
            "entropy": format!("{}=", "A".repeat(43)),
            "envVars": {},
            "defaultUser": "root",
            "hostname": format!("bare{run}"),
            "sandboxId": format!("bare{run}"),
            "templateId": "minimal",
        })
        .to_string();
        format!(
            "POST /init HTTP/1.1\r\nHost: guest\r\nConnection: close\r\nContent-Type: application/json\r\nX-Control-Token: {}\r\nX-Incarnation: {run:032x}\r\nContent-Length: {}\r\n\r\n{body}",
            "c".repeat(64),
            body.len()
        )
    })
}

fn ask(address: Ipv4Addr, limit: Duration, request: impl Fn() -> String) -> io::Result<()> {
    let mut stream = TcpStream::connect_timeout(&SocketAddr::from((address, PORT)), CONNECT_LIMIT)?;
    stream.set_read_timeout(Some(limit))?;
    stream.write_all(request().as_bytes())?;
    let mut answer = Vec::new();
    stream.take(64 * 1024).read_to_end(&mut answer)?;
    if answer.starts_with(b"HTTP/1.1 2") { Ok(()) } else { Err(io::ErrorKind::InvalidData.into()) }
}

/// Own user, no groups, no capabilities, no new privileges; ends with its parent.
fn enter_jail(handed: &[RawFd]) -> io::Result<()> {
    let check = |result: libc::c_int| if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) };
    // SAFETY: plain system calls, no allocation.
    unsafe {
        for fd in handed {
            check(libc::fcntl(*fd, libc::F_SETFD, 0))?;
        }
        for capability in 0..=63 {
            // Refused for numbers that this kernel does not know.
            libc::prctl(libc::PR_CAPBSET_DROP, capability as libc::c_ulong, 0, 0, 0);
        }
        check(libc::setgroups(0, std::ptr::null()))?;
        check(libc::setresgid(UID, UID, UID))?;
        check(libc::setresuid(UID, UID, UID))?;
        check(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))?;
        // After the change of user, which would take it back.
        check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as libc::c_ulong, 0, 0, 0))
    }
}

/// A new file that belongs to the machine's user.
pub fn owned(path: &Path) -> io::Result<File> {
    let file = File::options().read(true).write(true).create_new(true).mode(0o600).open(path)?;
    std::os::unix::fs::fchown(&file, Some(UID), Some(UID))?;
    Ok(file)
}

/// A reflink of `source`. Always a new file: freeing an old one's extents is slow.
pub fn clone(source: &Path, target: &Path) -> io::Result<File> {
    let source = File::open(source)?;
    let target = owned(target)?;
    // SAFETY: both descriptors are open; the call takes the source's number.
    if unsafe { libc::ioctl(target.as_raw_fd(), FICLONE, source.as_raw_fd()) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(target)
}

pub fn sync(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// The rate that the guest will see: on a busy host it cannot find it out by itself.
pub fn tsc_khz() -> u64 {
    // SAFETY: every x86-64 CPU has the instruction.
    let counter = || unsafe { core::arch::x86_64::_rdtsc() };
    let (began, first) = (Instant::now(), counter());
    std::thread::sleep(TSC_INTERVAL);
    let (took, last) = (began.elapsed(), counter());
    u64::try_from(u128::from(last - first) * 1_000_000 / took.as_nanos()).expect("a rate fits")
}
