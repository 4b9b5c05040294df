//! Commands: collected (`POST /v1/sandboxes/{id}/exec`) and streamed (`GET /v1/sandboxes/{id}/exec/stream`, WebSocket).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Exec {
    /// The program, looked up in PATH. With no `args` and a blank in it, it is run by `/bin/sh -c`.
    pub cmd: String,
    #[serde(default)]
    pub args: Vec<String>,
    /// Seconds; 0 or absent: 30. The process is killed at its end (504 `deadline_exceeded`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_sec: Option<i64>,
    #[serde(default)]
    pub envs: BTreeMap<String, String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cwd: Option<String>,
    /// The sandbox's default user when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
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

/// What a client sends on the stream: `start` first. Text frames with JSON.
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

/// What the server sends. After `exit` or a fatal `error` it closes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ExecServerFrame {
    Start { pid: u32 },
    Stdout { data: String },
    Stderr { data: String },
    Exit { exit_code: i32 },
    Error { code: String, data: String, fatal: bool },
}
