//! A mail server that says what a test wants it to, with a certificate that nobody but the test vouches for.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use control_plane::mail::Security;
use rustls_pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::io::{AsyncBufReadExt as _, AsyncRead, AsyncWrite, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio_rustls::TlsAcceptor;

/// What becomes of one conversation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    Take,
    /// Said instead of a greeting's answer.
    Greeting(&'static str),
    /// Said of whom it is for.
    Recipient(&'static str),
    /// Said when all of it was sent.
    Data(&'static str),
    /// Nothing is ever said.
    Hang,
}

pub struct Server {
    pub port: u16,
    pub security: Security,
    pub certificate_file: PathBuf,
    mails: mpsc::Receiver<String>,
    shared: Arc<Shared>,
    _dir: tempfile::TempDir,
}

struct Shared {
    security: Security,
    tls: TlsAcceptor,
    verdicts: Mutex<VecDeque<Verdict>>,
    conversations: AtomicUsize,
    plain_secrets: AtomicUsize,
    mails: mpsc::Sender<String>,
}

impl Server {
    pub async fn start(security: Security) -> Self {
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let certificate_file = dir.path().join("ca.pem");
        std::fs::write(&certificate_file, made.cert.pem()).unwrap();
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(made.signing_key.serialize_der()));
        let config = rustls::ServerConfig::builder()
            .with_no_client_auth()
            .with_single_cert(vec![made.cert.der().clone()], key)
            .unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (sender, mails) = mpsc::channel(1000);
        let shared = Arc::new(Shared {
            security,
            tls: TlsAcceptor::from(Arc::new(config)),
            verdicts: Mutex::default(),
            conversations: AtomicUsize::new(0),
            plain_secrets: AtomicUsize::new(0),
            mails: sender,
        });
        let serving = shared.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serving.clone().serve(stream));
            }
        });
        Self { port, security, certificate_file, mails, shared, _dir: dir }
    }

    /// Of the conversations to come; after these all are taken.
    pub fn next(&self, verdicts: impl IntoIterator<Item = Verdict>) {
        *self.shared.verdicts.lock().unwrap() = verdicts.into_iter().collect();
    }

    /// All that was said in the conversation in which a mail was taken.
    pub async fn mail(&mut self, within: Duration) -> String {
        tokio::time::timeout(within, self.mails.recv()).await.expect("a mail in time").expect("the server serves")
    }

    pub fn nothing_came(&mut self) -> bool {
        self.mails.try_recv().is_err()
    }

    pub fn conversations(&self) -> usize {
        self.shared.conversations.load(Ordering::SeqCst)
    }

    /// How often something of a mail was said before TLS, where there was to be TLS.
    pub fn plain_secrets(&self) -> usize {
        self.shared.plain_secrets.load(Ordering::SeqCst)
    }
}

impl Shared {
    async fn serve(self: Arc<Self>, stream: TcpStream) {
        if self.security == Security::Tls {
            let Ok(stream) = self.tls.accept(stream).await else { return };
            self.converse(stream, true, true).await;
            return;
        }
        let Some(plain) = self.converse(stream, false, true).await else { return };
        let Ok(stream) = self.tls.accept(plain).await else { return };
        self.converse(stream, true, false).await;
    }

    /// The stream when TLS is to begin on it.
    async fn converse<S: AsyncRead + AsyncWrite + Unpin>(&self, stream: S, is_tls: bool, greets: bool) -> Option<S> {
        let mut stream = BufReader::new(stream);
        let mut verdict = Verdict::Take;
        let is_real = is_tls || self.security == Security::None;
        if is_real {
            self.conversations.fetch_add(1, Ordering::SeqCst);
            verdict = self.verdicts.lock().unwrap().pop_front().unwrap_or(Verdict::Take);
        }
        if verdict == Verdict::Hang {
            std::future::pending::<()>().await;
        }
        if greets {
            stream.write_all(b"220 test\r\n").await.ok()?;
        }
        let (mut said, mut is_data) = (String::new(), false);
        loop {
            let mut line = String::new();
            if stream.read_line(&mut line).await.ok()? == 0 {
                return None;
            }
            said.push_str(&line);
            let word = line.trim_end();
            if !is_real && ["MAIL", "RCPT", "DATA"].iter().any(|begins| word.starts_with(begins)) {
                self.plain_secrets.fetch_add(1, Ordering::SeqCst);
            }
            let answer = match word {
                "." if is_data => {
                    is_data = false;
                    match verdict {
                        Verdict::Data(refusal) => refusal,
                        _ => {
                            self.mails.send(said.clone()).await.ok()?;
                            "250 taken"
                        }
                    }
                }
                _ if is_data => continue,
                "STARTTLS" => {
                    stream.write_all(b"220 go on\r\n").await.ok()?;
                    return Some(stream.into_inner());
                }
                "DATA" => {
                    is_data = true;
                    "354 go on"
                }
                "QUIT" => return None,
                _ if word.starts_with("EHLO") => match verdict {
                    Verdict::Greeting(refusal) => refusal,
                    _ if is_real => "250 localhost",
                    _ => "250-localhost\r\n250 STARTTLS",
                },
                _ if word.starts_with("RCPT") => match verdict {
                    Verdict::Recipient(refusal) => refusal,
                    _ => "250 fine",
                },
                _ => "250 fine",
            };
            stream.write_all(format!("{answer}\r\n").as_bytes()).await.ok()?;
        }
    }
}
