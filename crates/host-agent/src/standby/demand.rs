//! How many standbys of one kind are worth having: as many as were asked for in the busiest moments of late.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// A kind that nobody has asked for in so long has none.
const MEMORY: Duration = Duration::from_secs(600);
/// What comes within so short a time comes before more can be made.
const MOMENT: Duration = Duration::from_secs(3);
/// More than any host keeps ready.
const NOTED_MAX: usize = 256;

#[derive(Debug, Default)]
pub struct Demand {
    /// The oldest first.
    asked: VecDeque<Instant>,
}

impl Demand {
    pub fn note(&mut self, now: Instant) {
        self.forget(now);
        if self.asked.len() == NOTED_MAX {
            self.asked.pop_front();
        }
        self.asked.push_back(now);
    }

    /// The most that were asked for within one moment; 0 when that was too long ago.
    pub fn wanted(&mut self, now: Instant) -> usize {
        self.forget(now);
        let mut most = 0;
        let mut first = 0;
        for (last, at) in self.asked.iter().enumerate() {
            while self.asked[first] + MOMENT < *at {
                first += 1;
            }
            most = most.max(last - first + 1);
        }
        most
    }

    /// It was asked for in more than one moment.
    pub fn has_come_back(&self) -> bool {
        let span = self.asked.front().zip(self.asked.back()).map(|(first, last)| *last - *first);
        span.is_some_and(|span| span > MOMENT)
    }

    /// Later than any that nobody ever asked for.
    pub fn last(&self) -> Option<Instant> {
        self.asked.back().copied()
    }

    fn forget(&mut self, now: Instant) {
        while self.asked.pop_front_if(|at| *at + MEMORY < now).is_some() {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wants_what_the_busiest_moment_took_and_forgets() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut demand = Demand::default();
        assert_eq!((demand.wanted(start), demand.last()), (0, None));
        for seconds in [0, 10, 20] {
            assert_eq!(demand.has_come_back(), seconds == 20, "{seconds}");
            demand.note(at(seconds));
        }
        assert_eq!(demand.wanted(at(20)), 1);
        for _ in 0..3 {
            demand.note(at(21));
        }
        // With the one of a second before.
        assert_eq!(demand.wanted(at(60)), 4);
        demand.note(at(600));
        assert_eq!(demand.wanted(at(620)), 4);
        assert_eq!(demand.wanted(at(622)), 1);
        assert_eq!(demand.wanted(at(1201)), 0);
        for _ in 0..2 * NOTED_MAX {
            demand.note(at(1300));
        }
        assert_eq!(demand.wanted(at(1300)), NOTED_MAX);
    }
}
