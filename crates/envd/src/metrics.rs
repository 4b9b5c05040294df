//! What the guest uses: CPU since the previous look, memory, and the root disk.

use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

use api::guest::Metrics;

/// Busy and total time of all CPUs at the previous look, in clock ticks.
#[derive(Default)]
pub struct Sampler(Mutex<(u64, u64)>);

impl Sampler {
    pub fn sample(&self) -> Metrics {
        let stat = std::fs::read_to_string("/proc/stat").unwrap_or_default();
        let (busy, total) = cpu_times(&stat);
        let cpu_count = stat.lines().filter(|line| line.starts_with("cpu") && !line.starts_with("cpu ")).count();
        let cpu_used_pct = {
            let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            let (busy_before, total_before) = std::mem::replace(&mut *last, (busy, total));
            let (busy, total) = (busy.saturating_sub(busy_before), total.saturating_sub(total_before));
            if total == 0 { 0.0 } else { 100.0 * busy as f32 / total as f32 }
        };
        let memory = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let bytes = |name: &str| memory_field(&memory, name) * 1024;
        let (mem_total, mem_cache) = (bytes("MemTotal:"), bytes("Cached:"));
        let mem_used = mem_total.saturating_sub(bytes("MemAvailable:"));
        let (disk_used, disk_total) = nix::sys::statvfs::statvfs("/").map_or((0, 0), |disk| {
            let unit = disk.fragment_size();
            let blocks = disk.blocks();
            (blocks.saturating_sub(disk.blocks_free()) * unit, blocks * unit)
        });
        Metrics {
            ts: SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs() as i64),
            cpu_count: u32::try_from(cpu_count).unwrap_or(u32::MAX),
            cpu_used_pct,
            mem_total,
            mem_used,
            mem_cache,
            mem_total_mib: mem_total >> 20,
            mem_used_mib: mem_used >> 20,
            disk_used,
            disk_total,
        }
    }
}

/// Bytes; 0 when the kernel does not say.
pub fn memory_total() -> u64 {
    memory_field(&std::fs::read_to_string("/proc/meminfo").unwrap_or_default(), "MemTotal:") * 1024
}

/// Busy and total ticks of the line `cpu  user nice system idle iowait irq softirq steal ...`.
pub fn cpu_times(stat: &str) -> (u64, u64) {
    let fields: Vec<u64> = stat
        .lines()
        .next()
        .unwrap_or_default()
        .split_whitespace()
        .skip(1)
        .take(8)
        .filter_map(|f| f.parse().ok())
        .collect();
    let total: u64 = fields.iter().sum();
    let idle: u64 = fields.iter().skip(3).take(2).sum();
    (total - idle, total)
}

/// The number of a line like `MemTotal:  123 kB`.
fn memory_field(memory: &str, name: &str) -> u64 {
    memory.lines().find_map(|line| line.strip_prefix(name)?.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_kernels_lines() {
        assert_eq!(cpu_times("cpu  10 0 20 60 10 0 0 0 5 5\ncpu0 1 2 3\n"), (30, 100));
        assert_eq!(cpu_times(""), (0, 0));
        assert_eq!(memory_field("MemTotal:  2048 kB\nCached: 7 kB\n", "Cached:"), 7);
        let sample = Sampler::default().sample();
        assert!(sample.mem_total > 0 && sample.disk_total > 0 && sample.cpu_count > 0);
    }
}
