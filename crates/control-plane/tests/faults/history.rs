//! Is there an order of these calls, each between its beginning and its end, in which every answer is right? The search of Wing and Gong
//! with the memory of Lowe, for one sandbox, whose whole state is what was last wished.

use std::collections::HashSet;
use std::time::Instant;

/// What was last wished of a sandbox: all that an answer depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Wished {
    Running,
    Paused,
    Killed,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Call {
    Pause,
    Resume,
    Kill,
    Get,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Said {
    /// Done, or under way.
    Yes,
    /// Not in this state.
    No,
    /// Of a get.
    Is(Wished),
    /// Nobody knows whether it was heard, or when it will be.
    Unknown,
}

#[derive(Debug, Clone, Copy)]
pub struct Event {
    pub call: Call,
    pub said: Said,
    pub began: Instant,
    pub ended: Instant,
}

impl Event {
    /// What is wished after it, when its answer is right; none when it is not.
    fn after(&self, wished: Wished) -> Option<Wished> {
        use Wished::{Killed, Paused, Running};
        let done = match self.call {
            Call::Pause if wished != Killed => Some(Paused),
            Call::Resume if wished != Killed => Some(Running),
            Call::Kill => Some(Killed),
            _ => None,
        };
        match self.said {
            Said::Yes => done,
            Said::No => done.is_none().then_some(wished),
            Said::Is(is) => (is == wished).then_some(wished),
            Said::Unknown => Some(done.unwrap_or(wished)),
        }
    }
}

/// The events that have no such order, when there is none. `first` is what was wished before them.
pub fn contradiction(first: Wished, events: &[Event]) -> Option<Vec<Event>> {
    let mut events = events.to_vec();
    events.sort_by_key(|event| event.began);
    let mut known = HashSet::new();
    let none = vec![0_u64; events.len().div_ceil(64)];
    if is_ordered(&events, none, first, &mut known) { None } else { Some(events) }
}

fn is_ordered(events: &[Event], begun: Vec<u64>, wished: Wished, known: &mut HashSet<(Vec<u64>, Wished)>) -> bool {
    let mut open = vec![(begun, wished)];
    while let Some((done, wished)) = open.pop() {
        if !known.insert((done.clone(), wished)) {
            continue;
        }
        let is_done = |number: usize| done[number / 64] >> (number % 64) & 1 == 1;
        let left = || events.iter().enumerate().filter(|(number, _)| !is_done(*number));
        // What nobody answered need not have happened.
        if left().all(|(_, event)| event.said == Said::Unknown) {
            return true;
        }
        // Whatever began after something else had ended comes after it.
        let first_end = left().filter(|(_, e)| e.said != Said::Unknown).map(|(_, e)| e.ended).min();
        for (number, event) in left().filter(|(_, event)| first_end.is_none_or(|end| event.began <= end)) {
            if let Some(then) = event.after(wished) {
                let mut next = done.clone();
                next[number / 64] |= 1 << (number % 64);
                open.push((next, then));
            }
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn history(events: &[(Call, Said, u64, u64)]) -> Vec<Event> {
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        events
            .iter()
            .map(|&(call, said, began, ended)| Event { call, said, began: at(began), ended: at(ended) })
            .collect()
    }

    #[test]
    fn histories_with_and_without_an_order() {
        use Call::{Get, Kill, Pause, Resume};
        use Said::{Is, No, Unknown, Yes};
        use Wished::{Killed, Paused, Running};
        let right: [&[(Call, Said, u64, u64)]; 6] = [
            &[(Pause, Yes, 0, 1), (Get, Is(Paused), 2, 3), (Resume, Yes, 4, 5), (Get, Is(Running), 6, 7)],
            // Two at once: either order.
            &[(Pause, Yes, 0, 9), (Resume, Yes, 0, 9), (Get, Is(Paused), 10, 11)],
            &[(Pause, Yes, 0, 9), (Resume, Yes, 0, 9), (Get, Is(Running), 10, 11)],
            &[(Kill, Yes, 0, 9), (Pause, No, 1, 2), (Get, Is(Killed), 3, 4)],
            // Not heard, or heard late.
            &[(Pause, Unknown, 0, 1), (Get, Is(Running), 2, 3), (Get, Is(Paused), 4, 5)],
            &[(Kill, Unknown, 0, 1), (Get, Is(Running), 2, 3)],
        ];
        for events in right {
            assert!(contradiction(Running, &history(events)).is_none(), "{events:?}");
        }
        let wrong: [&[(Call, Said, u64, u64)]; 6] = [
            &[(Pause, Yes, 0, 1), (Get, Is(Running), 2, 3)],
            // Nothing comes back from a kill.
            &[(Kill, Yes, 0, 1), (Get, Is(Running), 2, 3)],
            &[(Kill, Yes, 0, 1), (Resume, Yes, 2, 3)],
            &[(Pause, No, 0, 1)],
            &[(Pause, Unknown, 0, 1), (Get, Is(Paused), 2, 3), (Get, Is(Running), 4, 5)],
            &[(Get, Is(Paused), 0, 1), (Pause, Yes, 2, 3)],
        ];
        for events in wrong {
            assert!(contradiction(Running, &history(events)).is_some(), "{events:?}");
        }
    }
}
