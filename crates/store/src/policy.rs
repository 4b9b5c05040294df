//! When a sandbox pauses or ends by itself, and when it runs again by itself.

use model::sandbox::OnTimeout;

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
