//! What a machine should have on which strangers' code runs, beyond what makes it work: each with its cure. Read, never changed.

use std::path::Path;

use super::preflight::Finding;

pub fn all() -> Vec<Finding> {
    let root = Path::new("/");
    vec![forwarding(root), clock(), hyperthreads(root), same_pages(root), swap(root), processor(root)]
}

fn read(root: &Path, path: &str) -> String {
    std::fs::read_to_string(root.join(path)).unwrap_or_default().trim().to_owned()
}

fn forwarding(root: &Path) -> Finding {
    match read(root, "proc/sys/net/ipv4/ip_forward").as_str() {
        "1" => Finding::ok("ip_forward", "on"),
        _ => Finding::warn(
            "ip_forward",
            "off; the agent turns it on when it starts",
            "keep it on, so that nothing turns it off again: net.ipv4.ip_forward=1 in /etc/sysctl.d",
        ),
    }
}

fn clock() -> Finding {
    // SAFETY: all fields of timex may be zero, which asks and changes nothing.
    let mut time: libc::timex = unsafe { std::mem::zeroed() };
    // SAFETY: the pointer is to a whole structure.
    let state = unsafe { libc::adjtimex(&raw mut time) };
    if state == libc::TIME_ERROR || time.status & libc::STA_UNSYNC != 0 {
        return Finding::warn(
            "clock",
            "nothing keeps it right",
            "apt-get install chrony: tokens and certificates have times, and guests take theirs from here",
        );
    }
    Finding::ok("clock", "kept right")
}

fn hyperthreads(root: &Path) -> Finding {
    match read(root, "sys/devices/system/cpu/smt/active").as_str() {
        "1" => Finding::warn(
            "SMT",
            "on: two guests may share a core, and what one does shows in the other's timing",
            "for strangers' code turn it off: echo off > /sys/devices/system/cpu/smt/control, and nosmt for the kernel",
        ),
        _ => Finding::ok("SMT", "off"),
    }
}

fn same_pages(root: &Path) -> Finding {
    match read(root, "sys/kernel/mm/ksm/run").as_str() {
        "" | "0" | "2" => Finding::ok("KSM", "off"),
        _ => Finding::warn(
            "KSM",
            "on: pages that are the same in two guests are shared, which one can find out about the other",
            "echo 2 > /sys/kernel/mm/ksm/run",
        ),
    }
}

fn swap(root: &Path) -> Finding {
    let areas = read(root, "proc/swaps").lines().count().saturating_sub(1);
    if areas == 0 {
        return Finding::ok("swap", "none");
    }
    Finding::warn(
        "swap",
        format!("{areas} in use: guests' memory may come to lie on disk, and guests become slow instead of refused"),
        "swapoff -a and take it out of /etc/fstab, or encrypt it",
    )
}

fn processor(root: &Path) -> Finding {
    let place = root.join("sys/devices/system/cpu/vulnerabilities");
    let mut open: Vec<String> = std::fs::read_dir(place)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| std::fs::read_to_string(entry.path()).is_ok_and(|text| text.starts_with("Vulnerable")))
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    open.sort();
    if open.is_empty() {
        return Finding::ok("processor", "no hole that the kernel leaves open");
    }
    Finding::warn(
        "processor",
        format!("the kernel does nothing about {}", open.join(", ")),
        "update kernel and microcode (apt-get install intel-microcode or amd64-microcode), and leave mitigations on",
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::preflight::Grade;

    #[test]
    fn a_machine_for_strangers_is_told_from_another() {
        let dir = tempfile::tempdir().unwrap();
        let put = |path: &str, text: &str| {
            let at = dir.path().join(path);
            std::fs::create_dir_all(at.parent().unwrap()).unwrap();
            std::fs::write(at, text).unwrap();
        };
        let grades =
            || [forwarding, hyperthreads, same_pages, swap, processor].map(|look| look(dir.path()).grade == Grade::Ok);
        assert_eq!(grades(), [false, true, true, true, true], "a kernel without these files has none of it");
        put("proc/sys/net/ipv4/ip_forward", "1\n");
        put("sys/devices/system/cpu/smt/active", "1\n");
        put("sys/kernel/mm/ksm/run", "1\n");
        put("proc/swaps", "Filename Type Size Used Priority\n/dev/sda2 partition 1 0 -2\n");
        put("sys/devices/system/cpu/vulnerabilities/mds", "Vulnerable: Clear CPU buffers attempted, no microcode\n");
        put("sys/devices/system/cpu/vulnerabilities/meltdown", "Mitigation: PTI\n");
        assert_eq!(grades(), [true, false, false, false, false]);
        assert!(processor(dir.path()).found.ends_with("about mds"));
        put("sys/devices/system/cpu/smt/active", "0\n");
        put("sys/kernel/mm/ksm/run", "0\n");
        put("proc/swaps", "Filename Type Size Used Priority\n");
        put("sys/devices/system/cpu/vulnerabilities/mds", "Not affected\n");
        assert_eq!(grades(), [true; 5]);
    }
}
