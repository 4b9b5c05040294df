//! What can go wrong with a guest, told apart by whose fault it is.

use connectrpc::{ConnectError, ErrorCode};

#[derive(Debug, Clone, thiserror::Error)]
pub enum GuestError {
    /// The caller asked for something that the guest rightly refuses.
    #[error("{message}")]
    Refused { code: ErrorCode, message: String },
    /// envd does not answer, answers nonsense or denies us: nobody's fault but the guest's.
    #[error("the sandbox's guest agent misbehaves: {0}")]
    Fault(String),
    /// The incarnation ended while the call was under way.
    #[error("the sandbox ended")]
    Gone,
}

/// Longest text of a guest that is passed on.
const TEXT_CHARACTERS_MAX: usize = 300;

/// The client library says its own complaints about an answer with the codes that a guest may use too; these words tell them apart.
/// A guest that uses them blames itself.
const OWN_WORDS: [&str; 4] = ["exceeds limit", "failed to decode", "client-side deadline", "request timeout"];

impl From<ConnectError> for GuestError {
    fn from(error: ConnectError) -> Self {
        let message = printable(error.message.as_deref().unwrap_or_default());
        if OWN_WORDS.iter().any(|words| message.contains(words)) {
            return Self::Fault(message);
        }
        match error.code {
            // What envd says by a code of its own about what was asked.
            ErrorCode::InvalidArgument
            | ErrorCode::NotFound
            | ErrorCode::AlreadyExists
            | ErrorCode::PermissionDenied
            | ErrorCode::FailedPrecondition
            | ErrorCode::ResourceExhausted
            | ErrorCode::DeadlineExceeded
            | ErrorCode::OutOfRange => Self::Refused { code: error.code, message },
            // The protocol of published clients says an unknown user by this code; a wrong token has another text.
            ErrorCode::Unauthenticated if message.starts_with("invalid username") => {
                Self::Refused { code: ErrorCode::InvalidArgument, message }
            }
            code => Self::Fault(format!("{}: {message}", code.as_str())),
        }
    }
}

/// The first characters of a guest's text, without control characters.
pub fn printable(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(TEXT_CHARACTERS_MAX).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_answers_about_the_request_are_the_callers_fault() {
        let of = |error: ConnectError| GuestError::from(error);
        assert!(matches!(of(ConnectError::not_found("no")), GuestError::Refused { code: ErrorCode::NotFound, .. }));
        assert!(matches!(
            of(ConnectError::unauthenticated("invalid username: 'x'")),
            GuestError::Refused { code: ErrorCode::InvalidArgument, .. }
        ));
        for fault in [
            ConnectError::unauthenticated("token"),
            ConnectError::internal("x"),
            ConnectError::unknown("x"),
            ConnectError::unavailable("x"),
            ConnectError::unimplemented("x"),
            ConnectError::resource_exhausted("message size 9 exceeds limit 4"),
            ConnectError::invalid_argument("failed to decode proto: x"),
            ConnectError::deadline_exceeded("client-side deadline exceeded"),
        ] {
            assert!(matches!(of(fault), GuestError::Fault(_)));
        }
    }

    #[test]
    fn a_guests_text_is_cut() {
        assert_eq!(printable("a\u{1b}[31mb\n"), "a[31mb");
        assert_eq!(printable(&"ä".repeat(1000)).chars().count(), TEXT_CHARACTERS_MAX);
    }
}
