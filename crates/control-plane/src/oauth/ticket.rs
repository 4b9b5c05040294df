//! A login that has begun at another site, as the browser keeps it: sealed, so that only we can make one and read it, and good for one
//! answer of that site within ten minutes.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use chrono::{DateTime, TimeDelta, Utc};
use serde::{Deserialize, Serialize};
use subtle::ConstantTimeEq as _;
use url::Url;

use crate::secrets::{Secret, random_32};

pub const COOKIE: &str = "wrenn_oauth";
pub const LIFE: TimeDelta = TimeDelta::minutes(10);
const SEALED_AS: &str = "oauth login";
const COOKIE_BYTES_MAX: usize = 4096;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Ticket {
    pub provider: String,
    /// Comes back with the answer: shows that it belongs to this login.
    pub state: String,
    /// Comes back in the ID token: shows that it was made for this login.
    pub nonce: String,
    /// Shown with the code: who has stolen that alone has nothing.
    pub verifier: String,
    pub intent: Intent,
    pub expires_at: DateTime<Utc>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Intent {
    Login,
    Signup,
    /// Of a session: the site's account is to be bound to its person.
    Connect {
        user: String,
        session: String,
    },
}

impl Ticket {
    pub fn new(provider: &str, intent: Intent) -> Self {
        let random = || URL_SAFE_NO_PAD.encode(random_32());
        Self {
            provider: provider.to_owned(),
            state: random(),
            nonce: random(),
            verifier: random(),
            intent,
            expires_at: Utc::now() + LIFE,
        }
    }

    pub fn sealed(&self, secret: &Secret) -> String {
        let plain = serde_json::to_vec(self).expect("texts are JSON");
        URL_SAFE_NO_PAD.encode(secret.seal(&plain, SEALED_AS))
    }

    /// The ticket of a cookie, when it is for this answer.
    pub fn opened(secret: &Secret, cookie: &str, provider: &str, state: &str, now: DateTime<Utc>) -> Option<Self> {
        if cookie.len() > COOKIE_BYTES_MAX {
            return None;
        }
        let sealed = URL_SAFE_NO_PAD.decode(cookie).ok()?;
        let plain = secret.open(&sealed, SEALED_AS).ok()?;
        let ticket: Self = serde_json::from_slice(&plain).ok()?;
        let is_same = bool::from(ticket.state.as_bytes().ct_eq(state.as_bytes()));
        (is_same && ticket.provider == provider && now < ticket.expires_at).then_some(ticket)
    }
}

/// `value` none: the browser forgets it. Lax, because the way back comes from the other site.
pub fn set_cookie(value: Option<&str>, public_url: &Url) -> String {
    let secure = if public_url.scheme() == "https" { "; Secure" } else { "" };
    let (value, life_sec) = value.map_or(("", 0), |value| (value, LIFE.num_seconds()));
    format!("{COOKIE}={value}; Path=/; Max-Age={life_sec}; HttpOnly; SameSite=Lax{secure}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ticket_opens_for_its_own_answer_in_its_time() {
        let secret = Secret::parse(&"ab".repeat(32), "here").unwrap();
        let ticket = Ticket::new("oidc", Intent::Login);
        let (cookie, now) = (ticket.sealed(&secret), Utc::now());
        let opens = |secret: &Secret, cookie: &str, provider: &str, state: &str, now| {
            Ticket::opened(secret, cookie, provider, state, now).is_some()
        };
        assert!(opens(&secret, &cookie, "oidc", &ticket.state, now));
        assert!(!opens(&secret, &cookie, "github", &ticket.state, now), "another site");
        assert!(!opens(&secret, &cookie, "oidc", &ticket.nonce, now), "another state");
        assert!(!opens(&secret, &cookie, "oidc", "", now));
        assert!(!opens(&secret, &cookie, "oidc", &ticket.state, now + LIFE + TimeDelta::seconds(1)), "too late");
        assert!(!opens(&secret, &cookie[1..], "oidc", &ticket.state, now));
        assert!(!opens(&secret, "", "oidc", &ticket.state, now));
        assert!(!opens(&Secret::parse(&"cd".repeat(32), "x").unwrap(), &cookie, "oidc", &ticket.state, now));
        assert!(cookie.len() < 1024 && !cookie.contains(&ticket.state));
    }
}
