//! The one place that turns what went wrong into Connect codes and the reasons of the contract.

use api::host;
use connectrpc::{ConnectError, ErrorCode};
use model::sandbox::Observed;
use tracing::error;

use crate::guest::GuestError;
use crate::measures;
use crate::sandbox::WishError;
use crate::sandbox::fence::Refusal;
use crate::sandbox::state::Cause;

pub fn wish(cause: WishError) -> ConnectError {
    match &cause {
        WishError::Refused(Refusal::Stale { .. }) | WishError::StaleEpoch { .. } => {
            measures::stale_refused();
            host::error(ErrorCode::FailedPrecondition, host::STALE_GENERATION, cause)
        }
        WishError::Refused(Refusal::Invalid(_)) => ConnectError::invalid_argument(cause.to_string()),
        WishError::UnknownSandbox => host::error(ErrorCode::NotFound, host::UNKNOWN_SANDBOX, cause),
        WishError::UnknownTemplate(_) => host::error(ErrorCode::NotFound, host::UNKNOWN_TEMPLATE, cause),
        WishError::NoRoom(_) => host::error(ErrorCode::ResourceExhausted, host::NO_ROOM, cause),
        WishError::Busy => ConnectError::unavailable(cause.to_string()),
        WishError::Restarting | WishError::Stopping => host::error(ErrorCode::Unavailable, host::NOT_READY, cause),
        WishError::NoState(_) => host::error(ErrorCode::FailedPrecondition, host::NOT_RUNNING, cause),
        WishError::NotSaved(failure) => match failure.cause {
            Cause::NoDisk => host::error(ErrorCode::ResourceExhausted, host::NO_DISK, cause),
            _ => host::error(ErrorCode::Internal, host::NOT_SAVED, cause),
        },
        WishError::SnapshotRemoved => host::error(ErrorCode::NotFound, host::UNKNOWN_SNAPSHOT, cause),
        WishError::Snapshot(error) => {
            error!(cause = ?error, "a call failed: {cause}");
            ConnectError::internal("the host cannot read or write its files")
        }
        WishError::Journal(journal) => {
            error!(cause = ?journal, "a call failed: {journal}");
            ConnectError::internal("the host cannot read or write its state")
        }
    }
}

pub fn guest(cause: GuestError) -> ConnectError {
    match cause {
        GuestError::Refused { code, message } => ConnectError::new(code, message),
        GuestError::Fault(_) => ConnectError::new(host::GUEST_FAULT, cause.to_string()),
        GuestError::Gone => host::error(ErrorCode::FailedPrecondition, host::NOT_RUNNING, cause),
    }
}

pub fn not_running(observed: Observed) -> ConnectError {
    host::error(ErrorCode::FailedPrecondition, host::NOT_RUNNING, format!("the sandbox is {observed}"))
}

pub fn unknown_sandbox() -> ConnectError {
    host::error(ErrorCode::NotFound, host::UNKNOWN_SANDBOX, "this host has no such sandbox")
}

pub fn not_ready(why: &str) -> ConnectError {
    host::error(ErrorCode::Unavailable, host::NOT_READY, why)
}

pub fn console(cause: microvm::Error) -> ConnectError {
    error!("the console cannot be read: {cause}");
    ConnectError::unavailable("the console cannot be read")
}
