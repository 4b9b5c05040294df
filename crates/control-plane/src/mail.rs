//! Mail: short texts with a link. By SMTP where that is set; otherwise the text goes to the log of this program, for whoever runs it.
//!
//! A mail is a row of the outbox, written with what it is about; [`crate::outbox`] hands it to [`Mail::deliver`].

use std::path::PathBuf;
use std::time::Duration;

use chrono::{DateTime, Utc};
use lettre::message::Mailbox;
use lettre::message::header::ContentType;
use lettre::transport::smtp;
use lettre::transport::smtp::authentication::Credentials;
use lettre::transport::smtp::client::{Certificate, Tls, TlsParameters};
use lettre::{AsyncSmtpTransport, AsyncTransport as _, Message, Tokio1Executor};
use serde::{Deserialize, Serialize};
use store::outbox::{Outgoing, Taken};
use tracing::info;
use uuid::Uuid;

use crate::secrets::{CannotOpen, Secret};

/// By which rows of the outbox say that they are mail.
pub const KIND: &str = "mail";
/// For the whole conversation with the server.
const SEND_TIME_MAX: Duration = Duration::from_secs(30);
/// Answers that speak of us and not of the mail (RFC 4954: credentials that are wrong, missing or too weak): the operator mends that.
const OF_CREDENTIALS: [&str; 5] = ["454", "530", "534", "535", "538"];

#[derive(Clone)]
pub enum Mail {
    Smtp { transport: Box<AsyncSmtpTransport<Tokio1Executor>>, from: Mailbox },
    Log,
}

/// A server for mail, as it is set.
#[derive(Debug, Clone)]
pub struct Smtp {
    pub host: String,
    pub port: u16,
    pub security: Security,
    pub credentials: Option<(String, String)>,
    pub from: Mailbox,
    /// Certificates that are trusted beside the system's, in PEM.
    pub ca_file: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Security {
    /// Plain at first, then TLS: refused where the server has none.
    Starttls,
    /// TLS from the first byte.
    Tls,
    /// No TLS, for a server on the same machine.
    None,
}

impl Security {
    pub fn port(self) -> u16 {
        match self {
            Self::Starttls => 587,
            Self::Tls => 465,
            Self::None => 25,
        }
    }
}

/// What a row of the outbox holds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Letter {
    pub to: String,
    pub subject: String,
    pub text: String,
}

#[derive(Debug, thiserror::Error)]
pub enum MailSetup {
    #[error("read {path} (WRENN_SMTP_CA_FILE)")]
    CaFile {
        path: PathBuf,
        #[source]
        cause: std::io::Error,
    },
    #[error("set up mail (WRENN_SMTP_HOST, WRENN_SMTP_CA_FILE)")]
    Tls(#[source] smtp::Error),
}

#[derive(Debug, thiserror::Error)]
pub enum Undelivered {
    /// It may go better in a while.
    #[error("{0}")]
    Later(String),
    /// It never goes.
    #[error("{0}")]
    Never(String),
}

/// A mail for the outbox. After its time it helps nobody.
pub fn outgoing(secret: &Secret, to: &str, subject: &str, text: &str, expires_at: DateTime<Utc>) -> Outgoing {
    let id = Uuid::now_v7();
    let letter = Letter { to: to.to_owned(), subject: subject.to_owned(), text: text.to_owned() };
    let plain = serde_json::to_vec(&letter).expect("texts are JSON");
    Outgoing { id, kind: KIND, sealed: secret.seal(&plain, &name(id)), expires_at }
}

/// What [`outgoing`] has sealed.
pub fn opened(secret: &Secret, taken: &Taken) -> Result<Letter, CannotOpen> {
    let plain = secret.open(&taken.sealed, &name(taken.id))?;
    serde_json::from_slice(&plain).map_err(|_| CannotOpen)
}

fn name(id: Uuid) -> String {
    format!("outbox {id}")
}

impl Mail {
    /// Otherwise it goes to the log.
    pub fn is_sent(&self) -> bool {
        matches!(self, Self::Smtp { .. })
    }

    pub fn new(smtp: Option<&Smtp>) -> Result<Self, MailSetup> {
        let Some(smtp) = smtp else { return Ok(Self::Log) };
        let tls = match smtp.security {
            Security::Starttls => Tls::Required(trusting(smtp)?),
            Security::Tls => Tls::Wrapper(trusting(smtp)?),
            Security::None => Tls::None,
        };
        let mut builder = AsyncSmtpTransport::<Tokio1Executor>::builder_dangerous(smtp.host.as_str())
            .port(smtp.port)
            .tls(tls)
            .timeout(Some(SEND_TIME_MAX));
        if let Some((user, password)) = smtp.credentials.clone() {
            builder = builder.credentials(Credentials::new(user, password));
        }
        Ok(Self::Smtp { transport: Box::new(builder.build()), from: smtp.from.clone() })
    }

    pub async fn deliver(&self, letter: &Letter) -> Result<(), Undelivered> {
        let Letter { to, subject, text } = letter;
        let Self::Smtp { transport, from } = self else {
            info!("mail is not set up (WRENN_SMTP_HOST), so this goes to nobody: {subject}, for {to}: {text}");
            return Ok(());
        };
        let never = |error: &dyn std::fmt::Display| Undelivered::Never(format!("it cannot be written: {error}"));
        let to: Mailbox = to.parse().map_err(|error| never(&error))?;
        let message =
            Message::builder().from(from.clone()).to(to).subject(subject.as_str()).header(ContentType::TEXT_PLAIN);
        let message = message.body(text.clone()).map_err(|error| never(&error))?;
        match tokio::time::timeout(SEND_TIME_MAX, transport.send(message)).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) if is_final(&error) => Err(Undelivered::Never(said(&error))),
            Ok(Err(error)) => Err(Undelivered::Later(said(&error))),
            Err(_) => Err(Undelivered::Later(format!("the server took more than {} s", SEND_TIME_MAX.as_secs()))),
        }
    }
}

fn trusting(smtp: &Smtp) -> Result<TlsParameters, MailSetup> {
    let mut builder = TlsParameters::builder(smtp.host.clone());
    if let Some(path) = &smtp.ca_file {
        let pem = std::fs::read(path).map_err(|cause| MailSetup::CaFile { path: path.clone(), cause })?;
        builder = builder.add_root_certificate(Certificate::from_pem(&pem).map_err(MailSetup::Tls)?);
    }
    builder.build_rustls().map_err(MailSetup::Tls)
}

fn is_final(error: &smtp::Error) -> bool {
    let code = error.status().map(|code| code.to_string()).unwrap_or_default();
    error.is_permanent() && !OF_CREDENTIALS.contains(&code.as_str())
}

/// With its causes, which say what a person needs to know.
fn said(error: &smtp::Error) -> String {
    let mut said = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        said = format!("{said}: {inner}");
        cause = inner.source();
    }
    said
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_cannot_add_headers() {
        assert!("a@example.org\r\nBcc: b@example.org".parse::<Mailbox>().is_err());
    }

    #[test]
    fn a_letter_opens_in_its_own_row_only() {
        let secret = Secret::parse(&"ab".repeat(32), "here").unwrap();
        let Outgoing { id, sealed, expires_at, .. } = outgoing(&secret, "a@b.org", "Hello", "#token=1", Utc::now());
        assert!(!String::from_utf8_lossy(&sealed).contains("token"));
        let taken = |id| Taken { id, kind: KIND.to_owned(), sealed: sealed.clone(), expires_at, attempts: 1 };
        assert_eq!(opened(&secret, &taken(id)).unwrap().text, "#token=1");
        assert!(opened(&secret, &taken(Uuid::nil())).is_err());
        assert!(opened(&Secret::parse(&"cd".repeat(32), "here").unwrap(), &taken(id)).is_err());
    }
}
