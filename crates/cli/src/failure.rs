//! Why a command failed, as a person reads it and as a script does, and the exit code that goes with it.
//!
//! Exit codes: 1 for failures, 2 for wrong usage, and, as `docker run` does it, 125 when `run` or `exec` failed by themselves, so that
//! every other code is that of the command in the sandbox.

use std::process::ExitCode;

use api::v1::errors::ErrorObject;
use serde_json::json;

use crate::output::Format;

pub const EXIT_USAGE: u8 = 2;
pub const EXIT_OURS: u8 = 125;

#[derive(Debug)]
pub struct Failure {
    kind: Kind,
    exit_code: u8,
}

#[derive(Debug, thiserror::Error)]
enum Kind {
    /// The server said no; its words are the best that there are.
    #[error("{}", told(.0))]
    Refused(Box<ErrorObject>),
    #[error("{0}")]
    Local(String),
}

fn told(error: &ErrorObject) -> String {
    let mut text = error.message.clone();
    let mut marks = vec![error.code.clone()];
    if !error.request_id.is_empty() {
        marks.push(format!("request {}", error.request_id));
    }
    if let Some(field) =
        error.details.as_ref().and_then(|details| details.get("field")).and_then(|field| field.as_str())
        && !text.contains(field)
    {
        text = format!("{field}: {text}");
    }
    format!("{text} ({})", marks.join(", "))
}

impl Failure {
    pub fn refused(error: ErrorObject) -> Self {
        Self { kind: Kind::Refused(Box::new(error)), exit_code: 1 }
    }

    /// `what` is a sentence for a person that says what was being done, what went wrong and, where there is one, the cure.
    pub fn new(what: impl Into<String>) -> Self {
        Self { kind: Kind::Local(what.into()), exit_code: 1 }
    }

    pub fn usage(what: impl Into<String>) -> Self {
        Self { kind: Kind::Local(what.into()), exit_code: EXIT_USAGE }
    }

    #[must_use]
    pub fn exiting(mut self, code: u8) -> Self {
        self.exit_code = code;
        self
    }

    /// The server's code, when it was the server that refused.
    pub fn code(&self) -> Option<&str> {
        match &self.kind {
            Kind::Refused(error) => Some(&error.code),
            Kind::Local(_) => None,
        }
    }

    pub fn message(&self) -> String {
        self.kind.to_string()
    }

    pub fn exit_code(&self) -> ExitCode {
        ExitCode::from(self.exit_code)
    }

    pub fn print(&self, format: Format) {
        match (format, &self.kind) {
            (Format::Human, kind) => eprintln!("wrenn: {kind}"),
            (Format::Json, Kind::Refused(error)) => eprintln!("{}", json!({ "error": error })),
            (Format::Json, Kind::Local(message)) => {
                eprintln!("{}", json!({"error": {"code": "client_error", "message": message}}));
            }
        }
    }
}

/// Says what was being done when something of the system failed.
pub trait Doing<T> {
    fn doing(self, what: impl FnOnce() -> String) -> Result<T, Failure>;
}

impl<T, E: std::error::Error> Doing<T> for Result<T, E> {
    fn doing(self, what: impl FnOnce() -> String) -> Result<T, Failure> {
        self.map_err(|error| Failure::new(format!("{}: {}", what(), with_causes(&error))))
    }
}

/// An error with what lies below it: reqwest's own text hides the cause.
pub fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_names_field_code_and_request() {
        let details = json!({"field": "vcpus"}).as_object().cloned();
        let error = ErrorObject {
            code: "invalid_request".into(),
            message: "must be 1 to 32".into(),
            request_id: "req_1".into(),
            details,
        };
        assert_eq!(Failure::refused(error).message(), "vcpus: must be 1 to 32 (invalid_request, request req_1)");
    }
}
