//! Control plane <-> host agent: Connect over mutual TLS, generated from `proto/hostagent/v1/hostagent.proto`.
//!
//! Who calls: only clients with a certificate of the platform's authority and the common name [`CONTROL_PLANE_NAME`]. Every state change
//! is an "ensure" with a fence, and may be sent twice.
//!
//! Errors carry Connect codes. What a code alone does not tell stands in front of the message as one word and a colon, which
//! [`reason`] reads.

include!(concat!(env!("OUT_DIR"), "/host/_connectrpc.rs"));

pub use hostagent::v1::*;

use connectrpc::{ConnectError, ErrorCode};

/// The common name of the control plane's client certificates.
pub const CONTROL_PLANE_NAME: &str = "wrenn-cp";

/// Ends the name that a host's certificate bears beside its address: `<host id>.<this>`. Nothing resolves it.
pub const HOST_NAME_SUFFIX: &str = "hosts.wrenn.internal";

/// What the certificate of this host bears, and no other's: an address may be another machine's by tomorrow.
pub fn host_name(id: impl std::fmt::Display) -> String {
    format!("{id}.{HOST_NAME_SUFFIX}")
}

/// Largest message in either direction; bulk bytes go in chunks of [`CHUNK_BYTES`].
pub const MESSAGE_BYTES_MAX: usize = 4 * 1024 * 1024;

/// Largest piece of a file or of output in one message.
pub const CHUNK_BYTES: usize = 256 * 1024;

/// Of the answer to `ListFiles`, which is not made in pieces: twenty thousand entries, with paths of some two hundred bytes.
pub const LISTING_BYTES_MAX: usize = 8 * 1024 * 1024;
/// What such an answer may make its reader allocate beyond its own bytes.
pub const LISTING_ELEMENT_BYTES_MAX: usize = 32 * 1024 * 1024;

/// The guest, or envd in it, misbehaved: no fault of the caller nor of the host. The public API answers 502 `agent_error`.
pub const GUEST_FAULT: ErrorCode = ErrorCode::DataLoss;

/// Words of `SandboxState.cause`: the host has no disk for it, or no memory; the saved state does not fit the host, or is not whole.
pub const CAUSE_NO_DISK: &str = "no_disk";
pub const CAUSE_NO_ROOM: &str = "no_room";
pub const CAUSE_INCOMPATIBLE: &str = "incompatible";
pub const CAUSE_DAMAGED: &str = "damaged";

/// With `failed_precondition`: the call carries an older epoch or revision than the agent has seen.
pub const STALE_GENERATION: &str = "stale_generation";
/// With `failed_precondition`: the sandbox does not run now; the message names its state.
pub const NOT_RUNNING: &str = "not_running";
/// With `resource_exhausted`: the host has no room for the sandbox; another host may have.
pub const NO_ROOM: &str = "no_room";
/// With `not_found`: the host has no such sandbox.
pub const UNKNOWN_SANDBOX: &str = "unknown_sandbox";
/// With `not_found`: the host has no such template.
pub const UNKNOWN_TEMPLATE: &str = "unknown_template";
/// With `not_found`: the host has no such snapshot, or it was removed.
pub const UNKNOWN_SNAPSHOT: &str = "unknown_snapshot";
/// With `resource_exhausted`: the host's disk has no room for what was to be saved.
pub const NO_DISK: &str = "no_disk";
/// With `internal`: the state of the sandbox could not be saved; it is what it was.
pub const NOT_SAVED: &str = "not_saved";
/// With `resource_exhausted`: a disk is full, the guest's own.
pub const GUEST_DISK_FULL: &str = "guest_disk_full";
/// With `resource_exhausted`: as many commands and transfers are under way as the sandbox, or the host, may have at once.
pub const TOO_MANY_STREAMS: &str = "too_many_streams";
/// With `unavailable`: the agent still looks for what it had before its start, or is about to end.
pub const NOT_READY: &str = "not_ready";

/// An error whose message begins with a reason.
pub fn error(code: ErrorCode, reason: &str, message: impl std::fmt::Display) -> ConnectError {
    ConnectError::new(code, format!("{reason}: {message}"))
}

/// The reason in front of an error's message and the rest of it; no reason when the message does not begin with a known one.
pub fn reason(message: &str) -> (Option<&'static str>, &str) {
    const REASONS: [&str; 11] = [
        STALE_GENERATION,
        NOT_RUNNING,
        NO_ROOM,
        UNKNOWN_SANDBOX,
        UNKNOWN_TEMPLATE,
        UNKNOWN_SNAPSHOT,
        NO_DISK,
        NOT_SAVED,
        GUEST_DISK_FULL,
        TOO_MANY_STREAMS,
        NOT_READY,
    ];
    for known in REASONS {
        if let Some(rest) = message.strip_prefix(known).and_then(|rest| rest.strip_prefix(": ")) {
            return (Some(known), rest);
        }
    }
    (None, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_come_back() {
        let error = error(ErrorCode::FailedPrecondition, STALE_GENERATION, "revision 3, seen 4");
        let message = error.message.unwrap_or_default();
        assert_eq!(reason(&message), (Some(STALE_GENERATION), "revision 3, seen 4"));
        assert_eq!(reason("disk: full"), (None, "disk: full"));
    }
}
