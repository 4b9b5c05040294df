//! What every driver promises ([`promises`]), by the same tests over the fake, over real QEMU microVMs, and over Firecracker: a simulation
//! of its API, and the real program when `WRENN_FIRECRACKER_BIN` and `WRENN_JAILER_BIN` name one.
//!
//! All but the fake need root; QEMU needs the artifacts of `make images` too (in `WRENN_TEST_ARTIFACTS`, else `current` in the cache). Where
//! something is missing the test says so and does not count as a pass of anything.

#[path = "../artifacts/mod.rs"]
mod artifacts;
mod bench;
mod firecracker;
mod promises;
mod qemu;

use bench::Bench;
use microvm::fake::Fake;

#[tokio::test]
async fn the_fake_keeps_the_promises() {
    let bench = Bench::plain();
    promises::lives_and_ends(&Fake::new(), &bench).await;
    promises::fails_cleanly(&Fake::new(), &bench).await;
}
