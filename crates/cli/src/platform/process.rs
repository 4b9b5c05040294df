//! A process that this program did not start, told from another one that has got its number since.

use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

/// How often a condition of another process is looked at while it is waited for.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// A process by number, time of start (in ticks since boot) and boot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    pub pid: i32,
    pub started: u64,
    pub boot_id: String,
}

impl Identity {
    pub fn of(pid: i32) -> Option<Self> {
        let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?.trim().to_owned();
        Some(Self { pid, started: started(pid)?, boot_id })
    }

    /// False for a zombie too: it only waits to be collected.
    pub fn is_alive(&self) -> bool {
        Self::of(self.pid).as_ref() == Some(self)
    }

    /// True when it was alive to get it.
    pub fn signal(&self, signal: Signal) -> bool {
        self.is_alive() && kill(Pid::from_raw(self.pid), signal).is_ok()
    }

    /// True when it ended in time.
    pub async fn wait_end(&self, limit: Duration) -> bool {
        let began = Instant::now();
        while self.is_alive() {
            if began.elapsed() > limit {
                return false;
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
        true
    }
}

/// Field 22 of `/proc/<pid>/stat`; the name in field 2 may hold anything, so counting begins behind its last bracket.
fn started(pid: i32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = stat.get(stat.rfind(')')? + 2..)?.split(' ');
    if matches!(fields.next()?, "Z" | "X") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

/// The process that started it, or took it over.
pub fn parent(pid: i32) -> Option<i32> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.get(stat.rfind(')')? + 2..)?.split(' ').nth(1)?.parse().ok()
}

/// The processes of this machine.
pub fn all() -> Vec<i32> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

pub fn name(pid: i32) -> String {
    std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default().trim().to_owned()
}

/// As whom it runs; none of one that has ended and only waits to be collected.
pub fn user(pid: i32) -> Option<u32> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
    let lives = !field("State:")?.starts_with(['Z', 'X']);
    field("Uid:")?.split_whitespace().next()?.parse().ok().filter(|_| lives)
}

/// True when the process works for the platform of `dir`, by its environment.
pub fn works_for(pid: i32, dir: &Path) -> bool {
    let wanted = [b"WRENN_DIR=", dir.as_os_str().as_encoded_bytes()].concat();
    let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
    environment.split(|byte| *byte == 0).any(|entry| entry == wanted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_process_is_itself_only_while_it_lives() {
        let mut child = std::process::Command::new("sleep").arg("100").spawn().unwrap();
        let identity = Identity::of(child.id() as i32).unwrap();
        assert!(identity.is_alive());
        assert!(!Identity { started: identity.started + 1, ..identity.clone() }.is_alive());
        assert!(!identity.wait_end(Duration::from_millis(50)).await);
        assert!(identity.signal(Signal::SIGKILL));
        assert!(identity.wait_end(Duration::from_secs(5)).await);
        child.wait().unwrap();
        assert!(!identity.signal(Signal::SIGKILL));
    }
}
