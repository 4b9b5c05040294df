//! A guest whose whole system is this test program: packed into an initramfs with the libraries and the few programs that it runs.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use microvm::qemu::{Accelerator, Qemu};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};

const MEMORY_MIB: u32 = 1536;
const PROGRAMS: [&str; 1] = ["/usr/sbin/mkfs.xfs"];

pub struct Lab {
    kernel: PathBuf,
    modules: PathBuf,
}

/// What `xtask lab` and `xtask images` have made. What is missing is said.
pub fn find() -> Option<Lab> {
    if !rustix::process::geteuid().is_root() {
        println!("SKIPPED: making device nodes needs root");
        return None;
    }
    let cache = || Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache/wrenn/current"));
    let place = std::env::var_os("WRENN_TEST_ARTIFACTS").map(PathBuf::from).or_else(cache)?;
    let modules = place.join("lab");
    let Ok(version) = fs::read_to_string(modules.join("version")) else {
        println!("SKIPPED: no modules in {}: run `cargo run -p xtask -- lab`", modules.display());
        return None;
    };
    let kernel = place.join(format!("kernels/vmlinux-{version}"));
    if !kernel.exists() {
        println!("SKIPPED: no kernel {}: run `make images`", kernel.display());
        return None;
    }
    Some(Lab { kernel, modules })
}

impl Lab {
    /// Boots a guest in which this program runs one test; gives what it said.
    pub fn run(&self, test: &str, time_max: Duration) -> String {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        self.furnish(&root);
        let initramfs = dir.path().join("initramfs");
        let packed = Command::new("sh")
            .args(["-c", "find . | cpio --quiet -o -H newc > ../initramfs"])
            .current_dir(&root)
            .status()
            .unwrap();
        assert!(packed.success(), "pack the guest");
        let console = dir.path().join("console");
        // What a guest that measures it by itself on a busy machine hangs at.
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let tsc_khz = runtime.block_on(Qemu::new(None, Accelerator::Tcg)).unwrap().tsc_khz();
        let line = format!(
            "console=ttyS0 reboot=t panic=-1 tsc_early_khz={tsc_khz} tsc=reliable mitigations=off no_timer_check quiet \
             PATH=/usr/sbin:/usr/bin RUST_BACKTRACE=0 \
             -- --exact {test} --include-ignored --nocapture --test-threads=1"
        );
        let mut guest = Command::new("qemu-system-x86_64")
            .args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-cpu", "max", "-smp", "1"])
            .args(["-M", "microvm,x-option-roms=off,isa-serial=on,rtc=on,acpi=on,pit=off,pic=off"])
            .args(["-accel", "tcg,thread=multi,tb-size=64", "-m", &MEMORY_MIB.to_string()])
            .args(["-object", "rng-random,id=r0,filename=/dev/urandom", "-device", "virtio-rng-device,rng=r0"])
            .args(["-chardev", &format!("file,id=c0,path={}", console.display()), "-serial", "chardev:c0"])
            .arg("-kernel")
            .arg(&self.kernel)
            .arg("-initrd")
            .arg(&initramfs)
            .args(["-append", &line])
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let end = Instant::now() + time_max;
        while guest.try_wait().unwrap().is_none() {
            if Instant::now() > end {
                guest.kill().unwrap();
                guest.wait().unwrap();
                panic!("the guest did not end; it said:\n{}", String::from_utf8_lossy(&fs::read(&console).unwrap()));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        String::from_utf8_lossy(&fs::read(console).unwrap()).into_owned()
    }

    fn furnish(&self, root: &Path) {
        for name in ["dev", "proc", "sys", "tmp", "run", "modules", "data", "usr/sbin", "usr/bin"] {
            fs::create_dir_all(root.join(name)).unwrap();
        }
        let mode = Mode::from_bits_truncate(0o600);
        mknod(&root.join("dev/console"), SFlag::S_IFCHR, mode, makedev(5, 1)).unwrap();
        for entry in fs::read_dir(&self.modules).unwrap() {
            let entry = entry.unwrap();
            fs::copy(entry.path(), root.join("modules").join(entry.file_name())).unwrap();
        }
        let own = std::env::current_exe().unwrap();
        let mut libraries = BTreeSet::new();
        for (program, to) in
            [(own.as_path(), "init")].into_iter().chain(PROGRAMS.map(|path| (Path::new(path), &path[1..])))
        {
            let to = root.join(to);
            let stripped = Command::new("strip").arg("-o").arg(&to).arg(program).status().unwrap();
            assert!(stripped.success(), "strip {}", program.display());
            fs::set_permissions(&to, fs::Permissions::from_mode(0o755)).unwrap();
            libraries.extend(libraries_of(program));
        }
        for library in libraries {
            let to = root.join(library.strip_prefix("/").unwrap());
            fs::create_dir_all(to.parent().unwrap()).unwrap();
            fs::copy(&library, to).unwrap();
        }
    }
}

/// As the loader finds them, itself among them.
fn libraries_of(program: &Path) -> Vec<PathBuf> {
    let output = Command::new("ldd").arg(program).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    said.split_whitespace().filter(|word| word.starts_with('/')).map(PathBuf::from).collect()
}
