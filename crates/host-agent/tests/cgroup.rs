//! Control groups on the real kernel: the limits bind, and nothing stays. Needs root and some controller; without it says so.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use host_agent::cgroup::{Cgroups, Limits};
use nix::fcntl::{Flock, FlockArg};

/// No agent's: those are random. Always the same, so that a run finds what a run before it left when it was killed.
const TAG: &str = "7e57c901";
const DIR: &str = "/var/tmp/wrenn-cgroup-test";

struct Host {
    cgroups: Cgroups,
    /// One test at a time, also between programs.
    _turn: Flock<std::fs::File>,
}

impl Host {
    fn new() -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: not root");
            return None;
        }
        std::fs::create_dir_all(DIR).unwrap();
        let lock = std::fs::File::create(format!("{DIR}/lock")).unwrap();
        let turn = Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, e)| e).unwrap();
        open().close().unwrap();
        let cgroups = open();
        eprintln!("{}: {:?}", cgroups.driver(), cgroups.notes());
        Some(Self { cgroups, _turn: turn })
    }

    fn has(&self, controller: &str) -> bool {
        let driver = self.cgroups.driver();
        let has = driver == "v2" || driver.contains(controller);
        if !has {
            eprintln!("skipped: no controller {controller}");
        }
        has
    }

    /// A shell that enters the sandbox's groups and then does the work.
    fn inside(&self, id: &str, work: &str) -> Command {
        let mut shell = Command::new("sh");
        let enter = format!("for entrance in \"$@\"; do echo $$ > \"$entrance\" || exit 9; done; set --; {work}");
        shell.args(["-c", &enter, "sh"]).args(self.cgroups.entrances(id)).stdin(Stdio::null());
        shell.stdout(Stdio::piped()).stderr(Stdio::null());
        shell
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let closed = self.cgroups.close();
        assert!(closed.is_ok() || std::thread::panicking(), "{closed:?}");
    }
}

fn open() -> Cgroups {
    Cgroups::open(DIR.as_ref(), TAG)
}

fn id(n: u128) -> String {
    format!("group-{n}")
}

const LIMITS: Limits = Limits { vcpus: 1, memory_mib: 128 };

fn statistic(cgroups: &Cgroups, id: &str, file: &str, name: &str) -> u64 {
    let entrances = cgroups.entrances(id);
    let text = entrances.iter().find_map(|path| std::fs::read_to_string(path.with_file_name(file)).ok()).unwrap();
    let line = text.lines().find(|line| line.starts_with(name)).unwrap();
    line.split_whitespace().last().unwrap().parse().unwrap()
}

#[test]
fn memory_is_bounded() {
    let Some(host) = Host::new() else { return };
    if !host.has("memory") {
        return;
    }
    host.cgroups.ensure(&id(1), LIMITS).unwrap();
    host.cgroups.ensure(&id(1), LIMITS).unwrap();
    // Twice what the sandbox and its VMM may have; `tail` keeps it all, because it is one line.
    let work = |mib: u32| format!("head -c {mib}M /dev/zero | tail -n 1 | wc -c");
    let output = host.inside(&id(1), &work(768)).output().unwrap();
    assert_ne!(String::from_utf8_lossy(&output.stdout).trim(), (768_u32 << 20).to_string());
    let output = host.inside(&id(1), &work(100)).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), (100_u32 << 20).to_string());
    host.cgroups.release(&id(1)).unwrap();
}

#[test]
fn processes_are_bounded() {
    let Some(host) = Host::new() else { return };
    if !host.has("pids") {
        return;
    }
    host.cgroups.ensure(&id(1), LIMITS).unwrap();
    // 97 and no more, the shell among them.
    let work = "exec 1>&2; n=0; while [ $n -lt 200 ]; do sleep 60 & n=$((n+1)); done";
    let status = host.inside(&id(1), work).status().unwrap();
    let entrances = host.cgroups.entrances(&id(1));
    let living: BTreeSet<i32> =
        std::fs::read_to_string(entrances.last().unwrap()).unwrap().lines().map(|line| line.parse().unwrap()).collect();
    for pid in &living {
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(*pid), nix::sys::signal::Signal::SIGKILL);
    }
    assert!(!status.success() && (50..=97).contains(&living.len()), "{status} with {}", living.len());
    // Waits for what is just ending.
    host.cgroups.release(&id(1)).unwrap();
}

#[test]
fn processors_are_bounded() {
    let Some(host) = Host::new() else { return };
    if !host.has("cpu") {
        return;
    }
    // Of no vCPU: half a core remains, less than even a busy machine gives to two loops.
    host.cgroups.ensure(&id(1), Limits { vcpus: 0, ..LIMITS }).unwrap();
    let work = "for n in 1 2; do (i=0; while [ $i -lt 400000 ]; do i=$((i+1)); done) & done; wait";
    assert!(host.inside(&id(1), work).status().unwrap().success());
    let throttled = statistic(&host.cgroups, &id(1), "cpu.stat", "nr_throttled");
    let periods = statistic(&host.cgroups, &id(1), "cpu.stat", "nr_periods");
    eprintln!("throttled in {throttled} of {periods} periods");
    assert!(throttled > 0);
    host.cgroups.release(&id(1)).unwrap();
}

#[test]
fn groups_of_no_sandbox_go_and_others_stay() {
    let Some(host) = Host::new() else { return };
    let trees = host.cgroups.entrances(&id(1)).len();
    if trees == 0 {
        eprintln!("skipped: no controllers");
        return;
    }
    for n in 1..=3 {
        host.cgroups.ensure(&id(n), LIMITS).unwrap();
    }
    let mut busy = host.inside(&id(3), "echo in; exec sleep 60").spawn().unwrap();
    let mut word = [0; 3];
    std::io::Read::read_exact(busy.stdout.as_mut().unwrap(), &mut word).unwrap();
    // The next start of the agent.
    let next = open();
    assert_eq!(next.groups().len(), 3 * trees);
    assert_eq!(next.remove_orphans(|name| name == id(1)), trees);
    let left: BTreeSet<PathBuf> = next.groups().into_iter().collect();
    assert_eq!(left.len(), 2 * trees, "{left:?}");
    // Another agent's are not seen.
    let other = Cgroups::open(&PathBuf::from(DIR).join("other-does-not-exist"), "7e57c902");
    assert!(other.groups().is_empty());
    other.close().unwrap();
    busy.kill().unwrap();
    busy.wait().unwrap();
    next.release(&id(3)).unwrap();
    next.release(&id(3)).unwrap();
    next.release(&id(1)).unwrap();
    assert!(next.groups().is_empty());
}
