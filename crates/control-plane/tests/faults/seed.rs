//! Randomness that can be had again.

use rand::SeedableRng as _;
use rand::rngs::StdRng;

/// A new seed, or that of `WRENN_TEST_SEED`. It is printed, which shows where a test fails.
pub fn seed() -> u64 {
    let seed = match std::env::var("WRENN_TEST_SEED") {
        Ok(text) => text.parse().expect("WRENN_TEST_SEED is a number"),
        Err(_) => rand::random(),
    };
    println!("WRENN_TEST_SEED={seed}");
    seed
}

/// Of one part of a test that has several at once.
pub fn dice(seed: u64, part: u64) -> StdRng {
    StdRng::seed_from_u64(seed.wrapping_add(part.wrapping_mul(0x9e37_79b9_7f4a_7c15)))
}
