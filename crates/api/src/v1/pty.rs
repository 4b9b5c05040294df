//! Terminals: `GET /v1/sandboxes/{id}/pty` (WebSocket). Text frames with JSON for what is said here; what is typed and shown goes in binary
//! frames, or, for clients that want it, as base64 in `input` and `output`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What a client sends: `start` or `connect` first.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum PtyClientFrame {
    Start {
        /// Absent or empty: `/bin/bash`. With no `args` and a blank in it, it is run by `/bin/sh -c`.
        #[serde(default, skip_serializing_if = "String::is_empty")]
        cmd: String,
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        args: Vec<String>,
        /// 1 to 1000; 0 or absent: 80.
        #[serde(default)]
        cols: i64,
        /// 1 to 1000; 0 or absent: 24.
        #[serde(default)]
        rows: i64,
        #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
        envs: BTreeMap<String, String>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        cwd: Option<String>,
        /// The sandbox's default user when absent or empty.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        user: Option<String>,
    },
    Connect {
        /// As `started` named it.
        tag: String,
        /// Position in the terminal's output from which on it is sent, as far as it is kept; absent: all that is kept.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        from: Option<u64>,
        /// True: `connected` says where the output begins. (What was published before knows no such frame.)
        #[serde(default)]
        position: bool,
    },
    /// Base64. Whoever sends this is sent `output` in return from then on, unless the query says otherwise.
    Input { data: String },
    /// Both from 1 to 1000.
    Resize { cols: i64, rows: i64 },
    /// SIGKILL.
    Kill,
    /// Says nothing; may answer a `ping`.
    Pong,
}

/// What the server sends. After `exit` or a fatal `error` it closes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum PtyServerFrame {
    /// After `start`.
    Started {
        tag: String,
        pid: u32,
    },
    /// After a `connect` that asks for it.
    Connected {
        pid: u32,
        /// Position of the first byte that follows; absent when the sandbox does not say.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        output_from: Option<u64>,
    },
    /// Base64.
    Output {
        data: String,
    },
    /// -1 when a signal ended it.
    Exit {
        exit_code: i32,
    },
    Error {
        code: String,
        data: String,
        fatal: bool,
    },
    /// Every 30 seconds.
    Ping,
}
