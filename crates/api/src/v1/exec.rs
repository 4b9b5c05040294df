//! Commands: collected or left to run (`POST /v1/sandboxes/{id}/exec`), streamed (`GET /v1/sandboxes/{id}/exec/stream`, WebSocket), heard
//! later (`GET /v1/sandboxes/{id}/processes/{selector}/stream`, WebSocket).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Exec {
    /// The program, looked up in PATH. With no `args` and a blank in it, it is run by `/bin/sh -c`.
    pub cmd: String,
    #[serde(default)]
    pub args: Vec<String>,
    /// Seconds; 0 or absent: 30, and of a command in the background: no limit. The process is killed at its end (504
    /// `deadline_exceeded`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_sec: Option<i64>,
    #[serde(default)]
    pub envs: BTreeMap<String, String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cwd: Option<String>,
    /// The sandbox's default user when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// True: it is answered when the process runs (202), and the process goes on by itself.
    #[serde(default)]
    pub background: bool,
    /// By which the process is found while it runs, beside its pid: 1 to 64 printable characters without `/`, not all of them digits.
    /// Absent, in the background: `proc-` and eight hex digits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tag: Option<String>,
}

/// A process that was left to run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ExecStarted {
    pub sandbox_id: String,
    pub cmd: String,
    pub pid: u32,
    pub tag: String,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ExecOutcome {
    pub sandbox_id: String,
    pub cmd: String,
    pub stdout: String,
    pub stderr: String,
    /// -1 when a signal ended it.
    pub exit_code: i32,
    pub duration_ms: i64,
    /// `utf-8`, or `base64` for both streams when either is not UTF-8.
    pub encoding: String,
    /// True when either stream went beyond 10 MiB and was cut there.
    #[serde(default)]
    pub truncated: bool,
}

/// What a client sends on the stream: `start` first; of a process that runs already, `stop` alone. Text frames with JSON.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ExecClientFrame {
    Start {
        cmd: String,
        #[serde(default)]
        args: Vec<String>,
        #[serde(default)]
        envs: BTreeMap<String, String>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        cwd: Option<String>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        user: Option<String>,
        /// Seconds; absent or 0: no limit.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        timeout_sec: Option<i64>,
        /// `base64`: every `data` is base64, so that binary output stays what it is.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        encoding: Option<String>,
    },
    /// Ends the stream and leaves the process alone.
    Stop,
}

/// What the server sends, of a command and of a process that runs already. After `exit` or a fatal `error` it closes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ExecServerFrame {
    Start {
        pid: u32,
        /// Of a process that runs already: position of the first byte that follows, as `from` of another stream takes it. Positions count
        /// the bytes of all its output together.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        output_from: Option<u64>,
    },
    Stdout {
        data: String,
    },
    Stderr {
        data: String,
    },
    Exit {
        exit_code: i32,
    },
    Error {
        code: String,
        data: String,
        fatal: bool,
    },
}
