//! How many requests are taken from one sender, and for one team: a bucket for each, that fills at a steady rate and holds twice what a
//! second fills. Known in memory alone, of each replica for itself: it keeps one sender from taking all of a replica, and sells nothing;
//! what is sold are quotas.
//!
//! A sender's bucket is looked at before the database is asked who they are, so that being refused costs next to nothing.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Mutex, PoisonError};

use axum::response::{IntoResponse as _, Response};
use http::{HeaderMap, HeaderName};
use model::ids::{TeamId, UserId};
use tokio::time::Instant;

use super::credentials::Credential;
use super::errors::ApiError;
use crate::rate_settings::Rates;
use crate::secrets::sha256;

/// Senders that are known at once: 64 bytes each. Beyond that all begin anew, which gives each no more than what one bucket holds.
const SENDERS_MAX: usize = 65_536;
/// A bucket holds what so many seconds fill.
const BURST_SEC: f64 = 2.0;

pub const HEADERS: [HeaderName; 3] = [
    HeaderName::from_static("ratelimit-limit"),
    HeaderName::from_static("ratelimit-remaining"),
    HeaderName::from_static("ratelimit-reset"),
];

/// Requests a second.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rate(f64);

impl Rate {
    /// None for 0: no limit.
    pub fn per_sec(requests: u32) -> Option<Self> {
        (requests > 0).then(|| Self(requests.into()))
    }

    fn holds(self) -> f64 {
        self.0 * BURST_SEC
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Sender {
    /// The digest of what a request shows.
    Credential([u8; 32]),
    Person(UserId),
    Team(TeamId),
}

struct Bucket {
    left: f64,
    at: Instant,
}

/// How a bucket stands after a request.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Standing {
    limit: f64,
    left: f64,
    /// Seconds until it is full again.
    full_in_sec: f64,
}

impl Standing {
    pub fn write(self, headers: &mut HeaderMap) {
        let values = [self.limit, self.left.max(0.0), self.full_in_sec.ceil()];
        for (name, value) in HEADERS.into_iter().zip(values) {
            headers.insert(name, whole(value).into());
        }
    }
}

/// It was one too many.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TooMany {
    standing: Standing,
    again_in_sec: f64,
}

impl TooMany {
    pub fn response(self) -> Response {
        let again = u32::try_from(whole(self.again_in_sec.ceil()).max(1)).unwrap_or(u32::MAX);
        let mut response = ApiError::too_many_requests(again).into_response();
        self.standing.write(response.headers_mut());
        response
    }
}

pub struct Limits {
    rates: Rates,
    buckets: Mutex<HashMap<Sender, Bucket>>,
}

impl Limits {
    pub fn new(rates: Rates) -> Self {
        Self { rates, buckets: Mutex::default() }
    }

    /// Before it is known whether the credential is good for anything.
    pub fn of_credential(&self, credential: &Credential, now: Instant) -> Result<Option<Standing>, TooMany> {
        let digest = match credential {
            Credential::Key(hash) | Credential::Cookie { hash, .. } => *hash,
            Credential::Token(token) => sha256(token.as_bytes()),
        };
        self.take(self.rates.per_key, Sender::Credential(digest), now)
    }

    /// A person may have many sessions.
    pub fn of_person(&self, person: UserId, now: Instant) -> Result<Option<Standing>, TooMany> {
        self.take(self.rates.per_key, Sender::Person(person), now)
    }

    pub fn of_team(&self, team: TeamId, now: Instant) -> Result<Option<Standing>, TooMany> {
        self.take(self.rates.per_team, Sender::Team(team), now)
    }

    fn take(&self, rate: Option<Rate>, sender: Sender, now: Instant) -> Result<Option<Standing>, TooMany> {
        let Some(rate) = rate else { return Ok(None) };
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        if buckets.len() >= SENDERS_MAX && !buckets.contains_key(&sender) {
            buckets.retain(|_, bucket| (now - bucket.at).as_secs_f64() < BURST_SEC);
            if buckets.len() >= SENDERS_MAX {
                buckets.clear();
            }
        }
        let bucket = match buckets.entry(sender) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(new) => new.insert(Bucket { left: rate.holds(), at: now }),
        };
        let since = now.saturating_duration_since(bucket.at).as_secs_f64();
        bucket.left = (bucket.left + since * rate.0).min(rate.holds());
        bucket.at = bucket.at.max(now);
        let is_taken = bucket.left >= 1.0;
        if is_taken {
            bucket.left -= 1.0;
        }
        let left = bucket.left;
        drop(buckets);
        let standing = Standing { limit: rate.0, left: left.floor(), full_in_sec: (rate.holds() - left) / rate.0 };
        if is_taken { Ok(Some(standing)) } else { Err(TooMany { standing, again_in_sec: (1.0 - left) / rate.0 }) }
    }
}

/// Rates and seconds: small, and not negative.
fn whole(value: f64) -> u64 {
    value.max(0.0) as u64
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn limits(per_key: u32) -> Limits {
        Limits::new(Rates { per_key: Rate::per_sec(per_key), per_team: None })
    }

    #[test]
    fn a_bucket_gives_two_seconds_at_once_and_then_its_rate() {
        let (limits, now) = (limits(10), Instant::now());
        let key = Credential::Key([1; 32]);
        let taken = |at| (0..100).filter(|_| limits.of_credential(&key, at).is_ok()).count();
        assert_eq!(taken(now), 20);
        let refused = limits.of_credential(&key, now).unwrap_err();
        assert_eq!(refused.response().status(), 429);
        assert!(refused.again_in_sec <= 0.1 && refused.standing.left == 0.0);
        assert_eq!(taken(now + Duration::from_secs(1)), 10);
        assert_eq!(taken(now + Duration::from_secs(60)), 20);
        // An instant that was taken before another one and comes after it.
        assert_eq!(taken(now), 0);
        // Others are not touched by it.
        assert!(limits.of_credential(&Credential::Key([2; 32]), now).is_ok());
        assert_eq!(limits.of_team(TeamId(uuid::Uuid::nil()), now), Ok(None));
    }

    #[test]
    fn what_is_known_of_senders_has_a_bound() {
        let (limits, now) = (limits(10), Instant::now());
        for number in 0..SENDERS_MAX as u64 + 1000 {
            let mut hash = [0; 32];
            hash[..8].copy_from_slice(&number.to_be_bytes());
            assert!(limits.of_credential(&Credential::Key(hash), now).is_ok());
        }
        assert!(limits.buckets.lock().unwrap().len() <= SENDERS_MAX);
    }
}
