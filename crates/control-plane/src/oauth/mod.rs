//! Logging in by other sites: an issuer of OpenID Connect, and GitHub, which is none and has an API instead.
//!
//! ```text
//!   begin: ticket into the browser's cookie, sealed (state, nonce, PKCE verifier) -> the site -> back with code and state
//!   end:   the ticket fits the state, once -> code for tokens -> who it is, as the site has signed it or says it -> an account here
//! ```
//!
//! What comes from a site is an attacker's until its signature, or our own question, says otherwise; what we ask is bounded in time and
//! size, and follows no redirect.

mod github;
mod issuer;
mod outward;
pub mod ticket;

use std::time::Duration;

use store::identities::Claimed;
use tokio::sync::Semaphore;
use url::Url;

use crate::oauth_settings::OauthConfig;
use github::GitHub;
use issuer::Issuer;
use outward::Outward;
pub use outward::may_be_asked;
use ticket::Ticket;

pub const GITHUB: &str = "github";
pub const ISSUER: &str = "oidc";

/// Asked of sites at once by one replica: anybody may begin a login.
const AT_ONCE_MAX: usize = 32;
/// For who comes when so many are.
const WAIT_MAX: Duration = Duration::from_secs(5);
/// Of a name that a site gives.
const NAME_CHARS_MAX: usize = 100;
const SUBJECT_BYTES_MAX: usize = 255;

#[derive(Debug, thiserror::Error)]
pub enum OauthError {
    #[error("the site does not answer: {0}")]
    Away(String),
    #[error("the site did not answer in time")]
    Late,
    /// It answers, and not as it must.
    #[error("the site's answer is wrong: {0}")]
    Wrong(String),
    /// It does not know the code, or no longer.
    #[error("the site does not take the code")]
    Code,
    #[error("too many log in at once")]
    Busy,
}

/// The sites by which one can log in.
pub struct Providers {
    issuer: Option<Issuer>,
    github: Option<GitHub>,
    turns: Semaphore,
}

impl Providers {
    pub fn new(config: &OauthConfig, public_url: &Url) -> Self {
        let back = |provider: &str| back_to(public_url, provider);
        let issuer = config.issuer.clone().map(|site| Issuer::new(site, back(ISSUER), Outward::new()));
        let github = config.github.clone().map(|site| GitHub::new(site, back(GITHUB), Outward::new()));
        Self { issuer, github, turns: Semaphore::new(AT_ONCE_MAX) }
    }

    /// The name of a site that is set up.
    pub fn known(&self, name: &str) -> Option<&'static str> {
        match name {
            ISSUER if self.issuer.is_some() => Some(ISSUER),
            GITHUB if self.github.is_some() => Some(GITHUB),
            _ => None,
        }
    }

    /// Where the browser is to go.
    pub async fn begin(&self, ticket: &Ticket) -> Result<Url, OauthError> {
        let _turn = self.turn().await?;
        match (ticket.provider.as_str(), &self.issuer, &self.github) {
            (ISSUER, Some(issuer), _) => issuer.begin(ticket).await,
            (GITHUB, _, Some(github)) => Ok(github.begin(ticket)),
            _ => Err(OauthError::Wrong("it is not set up any more".to_owned())),
        }
    }

    /// Who has logged in there.
    pub async fn end(&self, ticket: &Ticket, code: &str) -> Result<Claimed, OauthError> {
        let _turn = self.turn().await?;
        let claimed = match (ticket.provider.as_str(), &self.issuer, &self.github) {
            (ISSUER, Some(issuer), _) => issuer.end(ticket, code).await?,
            (GITHUB, _, Some(github)) => github.end(ticket, code).await?,
            _ => return Err(OauthError::Wrong("it is not set up any more".to_owned())),
        };
        if claimed.subject.is_empty() || claimed.subject.len() > SUBJECT_BYTES_MAX {
            return Err(OauthError::Wrong("its name for the person is empty, or too long".to_owned()));
        }
        Ok(Claimed { name: name(&claimed), ..claimed })
    }

    async fn turn(&self) -> Result<tokio::sync::SemaphorePermit<'_>, OauthError> {
        match tokio::time::timeout(WAIT_MAX, self.turns.acquire()).await {
            Ok(Ok(turn)) => Ok(turn),
            _ => Err(OauthError::Busy),
        }
    }
}

/// Below the platform's address.
fn back_to(public_url: &Url, provider: &str) -> Url {
    let mut url = public_url.clone();
    if let Ok(mut segments) = url.path_segments_mut() {
        segments.pop_if_empty().extend(["auth", "oauth", provider, "callback"]);
    }
    url
}

/// What people are called here: what the site calls them, as far as it can be shown.
fn name(claimed: &Claimed) -> String {
    let shown = |text: &str| -> String {
        let plain = text.chars().filter(|c| !c.is_control() && !('\u{202a}'..='\u{202e}').contains(c));
        plain.take(NAME_CHARS_MAX).collect::<String>().trim().to_owned()
    };
    let before_at = claimed.email.as_deref().and_then(|email| email.split('@').next()).unwrap_or("Somebody");
    Some(shown(&claimed.name)).filter(|name| !name.is_empty()).unwrap_or_else(|| shown(before_at))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_such_as_can_be_shown() {
        let of = |text: &str| {
            let email = Some("ada@example.org".to_owned());
            name(&Claimed { provider: GITHUB, subject: "1".to_owned(), email, name: text.to_owned() })
        };
        assert_eq!(of(" Ada\u{202e} \r\nL. "), "Ada L.");
        assert_eq!(of("\u{0}"), "ada");
        assert_eq!(of(&"x".repeat(500)).len(), NAME_CHARS_MAX);
    }

    #[test]
    fn sites_send_people_back_below_the_platforms_address() {
        for (url, expected) in [
            ("https://w.example.org", "https://w.example.org/auth/oauth/oidc/callback"),
            ("https://example.org/api/", "https://example.org/api/auth/oauth/oidc/callback"),
        ] {
            assert_eq!(back_to(&Url::parse(url).unwrap(), ISSUER).as_str(), expected);
        }
    }
}
