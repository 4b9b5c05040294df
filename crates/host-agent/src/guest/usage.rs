//! Calls for users in one incarnation: whether any is under way, and when the last one was.

use std::sync::{Arc, Mutex, PoisonError};

use tokio::time::Instant;

pub struct Usage(Mutex<State>);

struct State {
    under_way: usize,
    /// Of the last beginning or end; at first, of the incarnation's own.
    last: Instant,
}

/// A call is under way as long as this lives.
pub struct InUse(Arc<Usage>);

impl Usage {
    pub fn new(now: Instant) -> Arc<Self> {
        Arc::new(Self(Mutex::new(State { under_way: 0, last: now })))
    }

    pub fn begin(self: &Arc<Self>) -> InUse {
        self.change(|under_way| under_way + 1);
        InUse(self.clone())
    }

    /// When it was last in use: `now` while a call is under way.
    pub fn last(&self, now: Instant) -> Instant {
        let state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if state.under_way > 0 { now } else { state.last }
    }

    fn change(&self, to: impl Fn(usize) -> usize) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.under_way = to(state.under_way);
        state.last = Instant::now();
    }
}

impl Drop for InUse {
    fn drop(&mut self) {
        self.0.change(|under_way| under_way - 1);
    }
}
