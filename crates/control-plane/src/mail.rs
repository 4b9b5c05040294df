//! Mail: short texts with a link. By SMTP where that is set; otherwise the text goes to the log of this program, for whoever runs it.
//!
//! A mail that is lost is asked for again: nothing waits for it, and nothing is undone when it cannot be sent.

use std::time::Duration;

use lettre::message::Mailbox;
use lettre::message::header::ContentType;
use lettre::transport::smtp::authentication::Credentials;
use lettre::transport::smtp::client::{Tls, TlsParameters};
use lettre::{AsyncSmtpTransport, AsyncTransport as _, Message, Tokio1Executor};
use tokio_util::task::TaskTracker;
use tracing::{info, warn};

/// For the whole conversation with the server.
const SEND_TIME_MAX: Duration = Duration::from_secs(30);

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

impl Mail {
    pub fn new(smtp: Option<&Smtp>) -> Result<Self, lettre::transport::smtp::Error> {
        let Some(smtp) = smtp else { return Ok(Self::Log) };
        let tls = match smtp.security {
            Security::Starttls => Tls::Required(TlsParameters::new(smtp.host.clone())?),
            Security::Tls => Tls::Wrapper(TlsParameters::new(smtp.host.clone())?),
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

    /// In a task of its own.
    pub fn send(&self, tracker: &TaskTracker, to: &str, subject: &str, text: String) {
        let Self::Smtp { transport, from } = self else {
            info!("mail is not set up (WRENN_SMTP_HOST), so this goes to nobody: {subject}, for {to}: {text}");
            return;
        };
        let message = to.parse::<Mailbox>().map_err(|error| error.to_string()).and_then(|to| {
            let message = Message::builder().from(from.clone()).to(to).subject(subject).header(ContentType::TEXT_PLAIN);
            message.body(text).map_err(|error| error.to_string())
        });
        match message {
            Ok(message) => {
                let transport = transport.clone();
                tracker.spawn(async move {
                    let sent = tokio::time::timeout(SEND_TIME_MAX, transport.send(message)).await;
                    match sent {
                        Ok(Ok(_)) => {}
                        Ok(Err(error)) => warn!("a mail could not be sent: {error}"),
                        Err(_) => warn!("a mail could not be sent within {} s", SEND_TIME_MAX.as_secs()),
                    }
                });
            }
            Err(error) => warn!("a mail could not be written: {error}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};

    use super::*;

    /// A server that takes one mail, and what it was told.
    async fn server(listener: tokio::net::TcpListener) -> String {
        let (stream, _) = listener.accept().await.unwrap();
        let mut stream = BufReader::new(stream);
        stream.write_all(b"220 test\r\n").await.unwrap();
        let (mut said, mut is_data) = (String::new(), false);
        loop {
            let mut line = String::new();
            if stream.read_line(&mut line).await.unwrap() == 0 {
                return said;
            }
            said.push_str(&line);
            let answer: &[u8] = match line.trim_end() {
                "." => {
                    is_data = false;
                    b"250 taken\r\n"
                }
                _ if is_data => continue,
                "DATA" => {
                    is_data = true;
                    b"354 go on\r\n"
                }
                "QUIT" => return said,
                _ => b"250 fine\r\n",
            };
            stream.write_all(answer).await.unwrap();
        }
    }

    #[tokio::test]
    async fn a_mail_reaches_the_server() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let smtp = Smtp {
            host: "127.0.0.1".to_owned(),
            port: listener.local_addr().unwrap().port(),
            security: Security::None,
            credentials: None,
            from: "Wrenn <wrenn@example.org>".parse().unwrap(),
        };
        let mail = Mail::new(Some(&smtp)).unwrap();
        let tracker = TaskTracker::new();
        let served = tokio::spawn(server(listener));
        mail.send(&tracker, "a@example.org", "Welcome", "Follow http://x/#token=1".to_owned());
        tracker.close();
        tracker.wait().await;
        drop(mail);
        let said = served.await.unwrap();
        for part in ["MAIL FROM:<wrenn@example.org>", "RCPT TO:<a@example.org>", "Subject: Welcome", "#token=1"] {
            assert!(said.contains(part), "{part}: {said}");
        }
    }

    #[tokio::test]
    async fn an_address_cannot_add_headers() {
        assert!("a@example.org\r\nBcc: b@example.org".parse::<Mailbox>().is_err());
    }
}
