//! The rate of the host's time stamp counter, which an emulated guest sees as its own.

use std::time::{Duration, Instant};

/// Long enough that the noise of two readings (below a microsecond) is some millionths.
const INTERVAL: Duration = Duration::from_millis(40);
/// A reading that was interrupted between its halves is thrown away; the narrowest of so many is taken.
const TRIES: usize = 20;

/// In kHz. Blocks for 40 ms.
pub fn measure_khz() -> u64 {
    let (first, began) = read();
    std::thread::sleep(INTERVAL);
    let (second, ended) = read();
    let nanoseconds = ended.duration_since(began).as_nanos();
    let ticks = u128::from(second.wrapping_sub(first));
    u64::try_from(ticks * 1_000_000 / nanoseconds.max(1)).unwrap_or(0)
}

/// The counter and the monotonic clock at (nearly) one instant.
fn read() -> (u64, Instant) {
    (0..TRIES)
        .map(|_| {
            let before = counter();
            let now = Instant::now();
            let after = counter();
            (after.wrapping_sub(before), (before + after.wrapping_sub(before) / 2, now))
        })
        .min_by_key(|(width, _)| *width)
        .map(|(_, reading)| reading)
        .expect("there is at least one try")
}

fn counter() -> u64 {
    // SAFETY: every x86-64 CPU has the instruction, and no kernel that runs microVMs forbids it.
    unsafe { core::arch::x86_64::_rdtsc() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_measurements_agree() {
        let (a, b) = (measure_khz(), measure_khz());
        assert!(a > 500_000, "{a} kHz");
        assert!(a.abs_diff(b) * 1000 < a, "{a} and {b} kHz differ by more than a thousandth");
    }
}
