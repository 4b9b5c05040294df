//! What is sent to people: links with a token that works once.

use chrono::{DateTime, TimeDelta, Utc};
use model::ids::UserId;
use store::account_tokens::{NewAccountToken, Purpose};
use store::outbox::Outgoing;

use crate::app::App;
use crate::secrets::random_32;
use crate::{mail, tokens};

const ACTIVATION_LIFE: TimeDelta = TimeDelta::minutes(30);
const RESET_LIFE: TimeDelta = TimeDelta::minutes(15);
/// After it, what has happened is no news.
const NOTICE_LIFE: TimeDelta = TimeDelta::days(1);

pub struct Link {
    pub token: String,
    pub url: String,
    pub expires_at: DateTime<Utc>,
}

/// A link for a person, and what is kept of it.
pub fn account_link(app: &App, user: UserId, purpose: Purpose) -> (Link, NewAccountToken) {
    let (page, life) = match purpose {
        Purpose::Activation => ("activate", ACTIVATION_LIFE),
        Purpose::PasswordReset => ("reset-password", RESET_LIFE),
    };
    let (token, hash) = tokens::opaque(&random_32());
    let expires_at = Utc::now() + life;
    let link = Link { url: page_url(app, page, &token), token, expires_at };
    (link, NewAccountToken { user, purpose, hash, expires_at })
}

/// After the `#`: that part is sent to no server, so no log has it.
pub fn page_url(app: &App, page: &str, token: &str) -> String {
    let mut url = app.accounts.public_url.clone();
    if let Ok(mut segments) = url.path_segments_mut() {
        segments.pop_if_empty().push(page);
    }
    url.set_fragment(Some(&format!("token={token}")));
    url.into()
}

/// The mail with a link.
pub fn mail(app: &App, to: &str, purpose: Purpose, link: &Link) -> Outgoing {
    let (subject, text) = match purpose {
        Purpose::Activation => (
            "Activate your Wrenn account",
            "Somebody made an account with this address. If it was you, follow this link within 30 minutes",
        ),
        Purpose::PasswordReset => (
            "Reset your Wrenn password",
            "Somebody asked for a new password for this address. If it was you, follow this link within 15 minutes",
        ),
    };
    mail::outgoing(&app.secret, to, subject, &format!("{text}: {}\n", link.url), link.expires_at)
}

/// The mail that says what has happened, to whom it concerns.
pub fn notice(app: &App, to: &str, subject: &str, text: &str) -> Outgoing {
    mail::outgoing(&app.secret, to, subject, text, Utc::now() + NOTICE_LIFE)
}
