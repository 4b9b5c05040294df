//! What the real VMM was seen to answer, one row a test. They run against the simulator, or against the binary that
//! `WRENN_FIRECRACKER_BIN` names, with the kernel of `WRENN_TEST_KERNEL`. A row that cannot run says why.

#[path = "../host/mod.rs"]
mod host;

mod before_start;
mod loads;
mod network;
mod protocol;
mod running;
mod simulated;
mod snapshots;
mod vmm;
