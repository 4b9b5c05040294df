//! When a sandbox pauses or ends by itself, and when it runs again by itself.

use model::sandbox::{Kept, OnTimeout};

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Policy {
    /// Of running; 0: for ever.
    pub timeout_sec: i64,
    pub on_timeout: OnTimeout,
    /// Of being idle; 0: for ever. Its end is that of `on_timeout`.
    pub idle_timeout_sec: i64,
    /// Paused with its memory, it runs again when a call needs that.
    pub auto_resume: bool,
}

/// What is none stays as it is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PolicyChange {
    pub timeout_sec: Option<i64>,
    pub on_timeout: Option<OnTimeout>,
    pub idle_timeout_sec: Option<i64>,
    pub auto_resume: Option<bool>,
}

impl Policy {
    pub fn with(self, change: &PolicyChange) -> Self {
        Self {
            timeout_sec: change.timeout_sec.unwrap_or(self.timeout_sec),
            on_timeout: change.on_timeout.unwrap_or(self.on_timeout),
            idle_timeout_sec: change.idle_timeout_sec.unwrap_or(self.idle_timeout_sec),
            auto_resume: change.auto_resume.unwrap_or(self.auto_resume),
        }
    }
}

/// The words of the columns `on_timeout` and `timeout_keeps`.
pub(crate) fn words(on_timeout: OnTimeout) -> (&'static str, &'static str) {
    let first = if on_timeout == OnTimeout::Kill { "kill" } else { "pause" };
    (first, on_timeout.kept().unwrap_or_default().as_str())
}

/// None: they are no such words.
pub(crate) fn on_timeout(word: &str, keeps: &str) -> Option<OnTimeout> {
    match (word.parse().ok()?, keeps.parse().ok()?) {
        (OnTimeout::Pause, Kept::Disk) => Some(OnTimeout::PauseDisk),
        (other, _) => Some(other),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_words_say_what_they_were_made_of() {
        for policy in [OnTimeout::Kill, OnTimeout::Pause, OnTimeout::PauseDisk] {
            let (word, keeps) = words(policy);
            assert_eq!(on_timeout(word, keeps), Some(policy));
            assert!(matches!(word, "kill" | "pause"), "older control planes know no other");
        }
        assert_eq!((on_timeout("x", "memory"), on_timeout("pause", "x")), (None, None));
    }
}
