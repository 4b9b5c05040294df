//! Refusals, in the words of the real program: drivers match on them.

use std::fmt::Display;
use std::io;

use hyper::StatusCode;

#[derive(Debug)]
pub struct Fault {
    pub status: StatusCode,
    pub message: String,
    /// The process is not to be used any more: it answers, then it ends.
    pub fatal: bool,
}

impl Fault {
    pub fn new(message: impl Into<String>) -> Self {
        Self { status: StatusCode::BAD_REQUEST, message: message.into(), fatal: false }
    }

    pub fn too_large(message: impl Into<String>) -> Self {
        Self { status: StatusCode::PAYLOAD_TOO_LARGE, ..Self::new(message) }
    }

    pub fn fatal(self) -> Self {
        Self { fatal: true, ..self }
    }

    pub fn json(cause: impl Display) -> Self {
        Self::new(format!("An error occurred when deserializing the json body of a request: {cause}."))
    }

    pub fn path(method: impl Display, path: impl Display) -> Self {
        Self::new(format!("Invalid request method and/or path: {method} {path}."))
    }

    pub fn after_start() -> Self {
        Self::new("The requested operation is not supported after starting the microVM.")
    }

    pub fn before_start() -> Self {
        Self::new("The requested operation is not supported before starting the microVM.")
    }
}

/// An error of the system as the static program prints it: its C library has another word for a busy device.
pub fn os_text(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::EBUSY) => format!("Resource busy (os error {})", libc::EBUSY),
        _ => error.to_string(),
    }
}
