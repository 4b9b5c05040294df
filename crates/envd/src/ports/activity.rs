//! What has happened in the guest since it was booted. Only sums: whoever judges idleness compares two answers.

use std::fs;

use api::guest::Activity;

use crate::process::input;
use crate::server::Guest;

/// What the kernel counts CPU time in, for user programs on every architecture that we run on.
const TICK_MS: u64 = 10;
const SECTOR_BYTES: u64 = 512;

pub fn sample(guest: &Guest) -> Activity {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let (busy, _) = crate::metrics::cpu_times(&read("/proc/stat"));
    Activity {
        cpu_ms: busy * TICK_MS,
        network_bytes: network_bytes(&read("/proc/net/dev")),
        disk_bytes: disk_bytes(&read("/proc/diskstats")),
        input_bytes: input::bytes_given(),
        processes: u32::try_from(guest.table.running().len()).unwrap_or(u32::MAX),
    }
}

/// Received and sent, of all interfaces but loopback. Lines like `eth0: bytes packets ...`, 8 numbers received and 8 sent.
fn network_bytes(table: &str) -> u64 {
    let line = |line: &str| {
        let (name, numbers) = line.split_once(':')?;
        let numbers: Vec<u64> = numbers.split_whitespace().filter_map(|number| number.parse().ok()).collect();
        (name.trim() != "lo").then_some(numbers.first()? + numbers.get(8)?)
    };
    table.lines().filter_map(line).sum()
}

/// Read and written, of whole disks. Lines like `254 0 vda reads merged sectors ms writes merged sectors ...`.
fn disk_bytes(table: &str) -> u64 {
    let line = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let name = *fields.get(2)?;
        // What sits on others (partitions, loop and mapped devices) would count twice.
        let is_whole = name.strip_prefix("vd").is_some_and(|disk| !disk.ends_with(|c: char| c.is_ascii_digit()));
        let sectors = |at: usize| fields.get(at).and_then(|field| field.parse::<u64>().ok());
        is_whole.then_some((sectors(5)? + sectors(9)?) * SECTOR_BYTES)
    };
    table.lines().filter_map(line).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_kernels_lines() {
        let network = "Inter-|   Receive  |  Transmit\n face |bytes packets|bytes packets\n    lo: 9 1 0 0 0 0 0 0 9 1 0 0 0 0 0 0\n  eth0: 100 1 0 0 0 0 0 0 20 1 0 0 0 0 0 0\n";
        assert_eq!(network_bytes(network), 120);
        let disks =
            " 254 0 vda 10 0 4 0 5 0 2 0 0 0 0\n 254 1 vda1 10 0 4 0 5 0 2 0 0 0 0\n 7 0 loop0 1 0 8 0 0 0 0 0 0 0 0\n";
        assert_eq!(disk_bytes(disks), 6 * 512);
        assert_eq!((network_bytes("x: y"), disk_bytes("1 2 vda")), (0, 0));
    }
}
