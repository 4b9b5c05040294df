//! The first process of a guest whose kernel has its drivers as modules: loads them, mounts the root disk, brings up the network, and
//! hands over to the init that the kernel command line names.
//!
//! It does every mount that the system needs by itself: under software emulation each fork of a shell script costs 40 ms. It reads
//! nothing but `/modules/order` of its own archive and the kernel command line, and knows nothing of Wrenn but the fixed addresses of a
//! sandbox's network. A kernel with everything built in does not need it.

use std::ffi::{CStr, CString};
use std::time::{Duration, Instant};

/// Addresses of every sandbox's guest: the same in all, so that a restored guest keeps its own.
const GUEST: [u8; 4] = [169, 254, 0, 21];
const GATEWAY: [u8; 4] = [169, 254, 0, 22];
const NETMASK: [u8; 4] = [255, 255, 255, 252];
/// The root disk appears within milliseconds of its driver; a machine without one shall say so and end.
const DISK_LIMIT: Duration = Duration::from_secs(10);
const DEFAULT_INIT: &str = "/sbin/wrenn-init";

fn main() {
    let failed = run();
    eprintln!("initramfs: {failed}");
    // PID 1 must not return: a pause lets the console drain, then the kernel panics and the VMM ends.
    std::thread::sleep(Duration::from_millis(100));
}

/// Ends only with the step that failed.
fn run() -> String {
    for (kind, at, options) in [("devtmpfs", "/dev", "mode=0755"), ("proc", "/proc", ""), ("sysfs", "/sys", "")] {
        let _ = std::fs::create_dir(at);
        if let Err(e) = mount(kind, at, kind, 0, options) {
            return format!("mount {at}: {e}");
        }
    }
    load_modules();
    if let Err(e) = bring_up_network() {
        eprintln!("initramfs: network: {e}");
    }
    let began = Instant::now();
    while !std::path::Path::new("/dev/vda").exists() {
        if began.elapsed() > DISK_LIMIT {
            return "no /dev/vda".to_owned();
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    let _ = std::fs::create_dir("/newroot");
    if let Err(e) = mount("/dev/vda", "/newroot", "ext4", libc::MS_NOATIME, "") {
        return format!("mount /dev/vda: {e}");
    }
    for (kind, at, flags, options) in [
        ("devpts", "/dev/pts", libc::MS_NOSUID | libc::MS_NOEXEC, "gid=5,mode=620,ptmxmode=666"),
        ("tmpfs", "/dev/shm", libc::MS_NOSUID | libc::MS_NODEV, "mode=1777"),
        ("cgroup2", "/sys/fs/cgroup", libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC, "nsdelegate"),
        ("tmpfs", "/newroot/run", libc::MS_NOSUID | libc::MS_NODEV, "mode=0755"),
        ("tmpfs", "/newroot/tmp", libc::MS_NOSUID | libc::MS_NODEV, "mode=1777"),
    ] {
        let _ = std::fs::create_dir(at);
        if let Err(e) = mount(kind, at, kind, flags, options) {
            eprintln!("initramfs: mount {at}: {e}");
        }
    }
    for at in ["/dev", "/proc", "/sys"] {
        if let Err(e) = mount(at, &format!("/newroot{at}"), "", libc::MS_MOVE, "") {
            return format!("move {at}: {e}");
        }
    }
    let init = init_path(&std::fs::read_to_string("/newroot/proc/cmdline").unwrap_or_default());
    // The archive's own files stay in memory for ever unless they are removed before the root is left.
    let _ = std::fs::remove_dir_all("/modules");
    let _ = std::fs::remove_file("/init");
    let entered = std::env::set_current_dir("/newroot")
        .and_then(|()| mount(".", "/", "", libc::MS_MOVE, ""))
        .and_then(|()| check(chroot_here()))
        .and_then(|()| std::env::set_current_dir("/"));
    if let Err(e) = entered {
        return format!("enter the root disk: {e}");
    }
    use std::os::unix::process::CommandExt as _;
    let failed = std::process::Command::new(&init)
        .env_clear()
        .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
        .exec();
    format!("exec {init}: {failed}")
}

fn init_path(command_line: &str) -> String {
    command_line.split_whitespace().find_map(|word| word.strip_prefix("init=")).unwrap_or(DEFAULT_INIT).to_owned()
}

/// A module that does not load is said and passed over: without KVM, for example, `ptp_kvm` has no device.
fn load_modules() {
    for name in std::fs::read_to_string("/modules/order").unwrap_or_default().lines() {
        let path = format!("/modules/{name}");
        match std::fs::File::open(&path) {
            Ok(file) => {
                use std::os::fd::AsRawFd as _;
                // SAFETY: the descriptor is open and the parameter string ends with NUL.
                let loaded =
                    check(unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), c"".as_ptr(), 0) }
                        as libc::c_int);
                if let Err(e) = loaded
                    && !name.starts_with("ptp_kvm")
                {
                    eprintln!("initramfs: {name}: {e}");
                }
            }
            Err(e) => eprintln!("initramfs: {path}: {e}"),
        }
    }
}

fn bring_up_network() -> std::io::Result<()> {
    // SAFETY: a plain system call; the descriptor is closed below.
    let socket = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    check(socket)?;
    let done = interface(socket, c"lo", None)
        .and_then(|()| interface(socket, c"eth0", Some((GUEST, NETMASK))))
        .and_then(|()| {
            // SAFETY: all fields of rtentry may be zero.
            let mut route: libc::rtentry = unsafe { std::mem::zeroed() };
            route.rt_dst = inet([0, 0, 0, 0]);
            route.rt_genmask = inet([0, 0, 0, 0]);
            route.rt_gateway = inet(GATEWAY);
            route.rt_flags = libc::RTF_UP | libc::RTF_GATEWAY;
            // SAFETY: the argument is a whole rtentry.
            check(unsafe { libc::ioctl(socket, libc::SIOCADDRT, &route) })
        });
    // SAFETY: the descriptor is ours and is not used again.
    unsafe { libc::close(socket) };
    done
}

fn interface(socket: libc::c_int, name: &CStr, address: Option<([u8; 4], [u8; 4])>) -> std::io::Result<()> {
    // SAFETY: all fields of ifreq may be zero.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.to_bytes()) {
        *to = *from as libc::c_char;
    }
    if let Some((address, netmask)) = address {
        for (call, value) in [(libc::SIOCSIFADDR, address), (libc::SIOCSIFNETMASK, netmask)] {
            request.ifr_ifru.ifru_addr = inet(value);
            // SAFETY: the argument is a whole ifreq.
            check(unsafe { libc::ioctl(socket, call, &request) })?;
        }
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: the argument is a whole ifreq.
    check(unsafe { libc::ioctl(socket, libc::SIOCSIFFLAGS, &request) })
}

fn inet(address: [u8; 4]) -> libc::sockaddr {
    // SAFETY: all fields of sockaddr may be zero.
    let mut out: libc::sockaddr = unsafe { std::mem::zeroed() };
    out.sa_family = libc::AF_INET as libc::sa_family_t;
    // The port is the first two bytes of the data, the address the next four.
    for (to, from) in out.sa_data[2..6].iter_mut().zip(address) {
        *to = from as libc::c_char;
    }
    out
}

fn mount(source: &str, target: &str, kind: &str, flags: libc::c_ulong, options: &str) -> std::io::Result<()> {
    let text = |text: &str| CString::new(text).expect("mount arguments hold no NUL");
    let (source, target, kind, options) = (text(source), text(target), text(kind), text(options));
    // SAFETY: all four strings end with NUL and live until the call is over.
    check(unsafe { libc::mount(source.as_ptr(), target.as_ptr(), kind.as_ptr(), flags, options.as_ptr().cast()) })
}

fn chroot_here() -> libc::c_int {
    // SAFETY: the path ends with NUL.
    unsafe { libc::chroot(c".".as_ptr()) }
}

fn check(result: libc::c_int) -> std::io::Result<()> {
    if result < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_names_the_init() {
        assert_eq!(init_path("console=ttyS0 init=/sbin/other quiet"), "/sbin/other");
        assert_eq!(init_path("console=ttyS0 quiet"), DEFAULT_INIT);
    }
}
