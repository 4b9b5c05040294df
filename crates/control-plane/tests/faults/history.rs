//! Is there an order of these calls, each between its beginning and its end, in which every answer is right? The search of Wing and Gong
//! with the memory of Lowe, for one sandbox, whose whole state is what was last wished.

use std::collections::HashMap;
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
    /// What is wished after it, when its answer is right; none when it is not, or there was none.
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
            Said::Unknown => None,
        }
    }
}

/// The events that have no such order, when there is none. `first` is what was wished before them.
pub fn contradiction(first: Wished, events: &[Event]) -> Option<Vec<Event>> {
    let mut events = events.to_vec();
    events.sort_by_key(|event| event.began);
    let (unknown, answered): (Vec<Event>, Vec<Event>) = events.iter().partition(|event| event.said == Said::Unknown);
    let begun = |call| unknown.iter().filter(|event| event.call == call).map(|event| event.began).collect();
    let spare = Spare { pauses: begun(Call::Pause), resumes: begun(Call::Resume), kills: begun(Call::Kill) };
    if is_ordered(&answered, &spare, first) { None } else { Some(events) }
}

/// When calls began of which nobody knows whether they were heard: each may have happened once, at any time since, or never. Those of a kind
/// differ in nothing else, so it is enough to count how many were used; else each would double what is to be searched.
struct Spare {
    pauses: Vec<Instant>,
    resumes: Vec<Instant>,
    kills: Vec<Instant>,
}

/// Of the pauses and resumes.
type Used = [usize; 2];

impl Spare {
    /// What may have been wished before the next call, if one of these came in between; two of them would lead nowhere else.
    fn around(&self, wished: Wished, used: Used, until: Instant) -> Vec<(Wished, Used)> {
        let is_left = |begun: &[Instant], used: usize| begun.get(used).is_some_and(|began| *began <= until);
        let [pauses, resumes] = used;
        let mut states = vec![(wished, used)];
        match wished {
            Wished::Running if is_left(&self.pauses, pauses) => states.push((Wished::Paused, [pauses + 1, resumes])),
            Wished::Paused if is_left(&self.resumes, resumes) => states.push((Wished::Running, [pauses, resumes + 1])),
            _ => {}
        }
        if wished != Wished::Killed && is_left(&self.kills, 0) {
            states.push((Wished::Killed, used));
        }
        states
    }
}

fn is_ordered(events: &[Event], spare: &Spare, wished: Wished) -> bool {
    // Where the search has been, and with how few of the spare ones.
    let mut known: HashMap<(Vec<u64>, Wished), Vec<Used>> = HashMap::new();
    let mut open = vec![(vec![0_u64; events.len().div_ceil(64)], wished, [0, 0])];
    while let Some((done, wished, used)) = open.pop() {
        let been = known.entry((done.clone(), wished)).or_default();
        if been.iter().any(|[pauses, resumes]| *pauses <= used[0] && *resumes <= used[1]) {
            continue;
        }
        been.push(used);
        let is_done = |number: usize| done[number / 64] >> (number % 64) & 1 == 1;
        let left = || events.iter().enumerate().filter(|(number, _)| !is_done(*number));
        // Whatever began after something else had ended comes after it.
        let Some(first_end) = left().map(|(_, event)| event.ended).min() else { return true };
        for (before, used) in spare.around(wished, used, first_end) {
            for (number, event) in left().filter(|(_, event)| event.began <= first_end) {
                if let Some(then) = event.after(before) {
                    let mut next = done.clone();
                    next[number / 64] |= 1 << (number % 64);
                    open.push((next, then, used));
                }
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

    /// As when the database was away for a while: nobody knows of hundreds.
    #[test]
    fn many_unanswered_calls_are_judged_in_no_time() {
        use Call::{Get, Pause, Resume};
        use Said::{Is, Unknown, Yes};
        use Wished::{Paused, Running};
        let mut events = Vec::new();
        for at in 0..400 {
            events.push((if at % 2 == 0 { Pause } else { Resume }, Unknown, at, at + 5));
            events.push((Get, Is(if at % 3 == 0 { Paused } else { Running }), at, at + 8));
        }
        assert!(contradiction(Running, &history(&events)).is_none());
        // One of each is left, and three changes are seen.
        let last = [(Pause, Yes, 9000, 9001), (Get, Is(Running), 9002, 9003), (Get, Is(Paused), 9004, 9005)];
        let more = [(Get, Is(Running), 9006, 9007)];
        let few = [(Pause, Unknown, 0, 1), (Resume, Unknown, 0, 1)];
        assert!(contradiction(Running, &history(&[&few[..], &last[..]].concat())).is_none());
        assert!(contradiction(Running, &history(&[&few[..], &last[..], &more[..]].concat())).is_some());
    }
}
