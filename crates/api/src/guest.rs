//! Host agent <-> envd: the Connect services of the guest, and the plain HTTP bodies beside them.
//!
//! Everything that comes from a guest is hostile input: whoever reads these types bounds sizes and times by himself. The guest's
//! control routes (`/init`, `/snapshot/prepare`) are the host's alone: they ask for [`CONTROL_TOKEN_HEADER`].
//!
//! The generated clients (`process::ProcessClient`, `filesystem::FilesystemClient`) run over any `connectrpc::client::ClientTransport`:
//! `ServiceTransport::new(service)` makes one of a tower service that takes a request to a body, and that service may connect wherever
//! it likes, such as by a socket made in a sandbox's network namespace.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

include!(concat!(env!("OUT_DIR"), "/guest/_connectrpc.rs"));

/// envd's port in every guest.
pub const PORT: u16 = 49983;
/// The version that published SDKs judge envd's abilities by (file metadata, watch entries, stdin: 0.6.13 has them all).
pub const VERSION: &str = "0.6.13";
/// The user's token of this incarnation; every route but `/health` and the control routes asks for it.
pub const ACCESS_TOKEN_HEADER: &str = "x-access-token";
/// The host's own token; given by the first `/init` after a boot, asked for by every later control call.
pub const CONTROL_TOKEN_HEADER: &str = "x-control-token";
/// Shown by the host on every call: a connection that has not shown the present incarnation is reset by `/init`.
pub const INCARNATION_HEADER: &str = "x-incarnation";
/// Of `process.Process/Connect`: how many bytes of output, of all channels together, the caller has had already; absent, it has had
/// none. The answer's says where the output that it brings begins: later than asked when envd has not kept so much.
pub const OUTPUT_FROM_HEADER: &str = "x-output-from";
/// Of the answer to `/snapshot/prepare`: `yes` when all that was written before is on the disk, `no` when that takes longer than
/// prepare may.
pub const DISK_FLUSHED_HEADER: &str = "x-disk-flushed";
/// Header of the answer to `/init`.
pub const VERSION_HEADER: &str = "x-envd-version";

/// Body of `POST /init`: who this guest is now. 204 when all of it has been applied; 409 when it is of an earlier incarnation; 500 when
/// the clock, the random numbers or the machine id could not be set, and then nothing else has changed: ask again.
#[derive(Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Init {
    /// Another one than before means: this guest has just been started or restored.
    pub incarnation: String,
    pub access_token: String,
    pub control_token: String,
    /// The host's time, RFC 3339 with nanoseconds.
    pub timestamp: String,
    /// 32 random bytes, base64.
    pub entropy: String,
    pub env_vars: BTreeMap<String, String>,
    /// Empty: root.
    pub default_user: String,
    /// Empty: the user's home.
    pub default_workdir: String,
    pub hostname: String,
    pub sandbox_id: String,
    pub template_id: String,
}

/// One file that `POST /files` has written.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct WrittenFile {
    pub path: String,
    pub name: String,
    #[serde(rename = "type")]
    pub kind: String,
    /// What the upload's `X-Metadata-` headers said.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub metadata: BTreeMap<String, String>,
}

/// Answer of `GET /metrics`. Sizes in bytes unless the name says MiB.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Metrics {
    /// Unix seconds.
    pub ts: i64,
    pub cpu_count: u32,
    /// Percent of all vCPUs together since the previous look.
    pub cpu_used_pct: f32,
    pub mem_total: u64,
    pub mem_used: u64,
    pub mem_cache: u64,
    pub mem_total_mib: u64,
    pub mem_used_mib: u64,
    pub disk_used: u64,
    pub disk_total: u64,
}

/// One of the answer of `GET /ports`, a list in order of ports: somebody listens in the guest. envd's own are not among them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct OpenPort {
    pub port: u16,
    /// Where: `0.0.0.0`, `::`, `127.0.0.1` and the like.
    pub address: String,
    /// 0 when it is not known.
    pub pid: u32,
    /// Name of the process, as its owner chose it; empty when it is not known.
    pub process: String,
    /// On loopback, and reachable at the guest's own address because envd stands in for it there.
    pub is_forwarded: bool,
}

/// Answer of `GET /activity`: sums since the guest's boot, which only grow. Two answers that are alike, but for what asking costs, are of
/// a guest in which nothing happened between them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Activity {
    /// Time that all CPUs together have worked.
    pub cpu_ms: u64,
    /// Received and sent, loopback apart.
    pub network_bytes: u64,
    /// Read and written, by whole disks.
    pub disk_bytes: u64,
    /// Taken by processes from their callers: standard input and terminals.
    pub input_bytes: u64,
    /// Started by envd and running now.
    pub processes: u32,
}

/// Body of every plain HTTP error of envd.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Fault {
    /// The HTTP status again.
    pub code: u16,
    pub message: String,
}
