//! A WebSocket of the public API that lasts: opened with the client's credentials, kept alive by pings, and known to be dead when nothing is
//! heard. What the messages say is the commands' affair.

use std::time::Duration;

use futures::stream::{SplitSink, SplitStream};
use futures::{SinkExt as _, StreamExt as _};
use serde::Serialize;
use tokio::time::{Instant, Interval, timeout, timeout_at};
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::tungstenite::{Bytes, Error as WsError, Message, http};
use url::Url;

use crate::client::Client;
use crate::failure::{Failure, with_causes};

const OPEN_MAX: Duration = Duration::from_secs(30);
pub const PING_EVERY: Duration = Duration::from_secs(20);
/// Three pings without any answer.
const SILENCE_MAX: Duration = Duration::from_secs(70);
/// The server sends at most 1 MiB a message; base64 and JSON come on top.
const MESSAGE_MAX: usize = 4 << 20;

/// Why there is no socket.
pub enum NotOpened {
    /// The server's answer instead of the upgrade.
    Refused(Failure),
    /// Nobody answers just now.
    Away(Failure),
}

impl NotOpened {
    pub fn failure(self) -> Failure {
        match self {
            Self::Refused(failure) | Self::Away(failure) => failure,
        }
    }
}

/// Why there is a socket no more.
#[derive(Debug, thiserror::Error)]
pub enum Lost {
    #[error("closed: {code} {reason}")]
    Closed { code: u16, reason: String },
    #[error("{0}")]
    Broken(String),
}

#[derive(Debug, PartialEq)]
pub enum Heard {
    Text(String),
    Binary(Bytes),
}

type Stream = tokio_tungstenite::WebSocketStream<tokio_tungstenite::MaybeTlsStream<tokio::net::TcpStream>>;

/// Both halves, for those who mostly listen.
pub struct Socket {
    pub saying: Saying,
    pub hearing: Hearing,
    ping: Interval,
}

pub struct Saying(SplitSink<Stream, Message>);

pub struct Hearing {
    stream: SplitStream<Stream>,
    last: Instant,
}

impl Socket {
    /// `url` is that of the route, by `http` or `https`.
    pub async fn open(client: &Client, mut url: Url) -> Result<Self, NotOpened> {
        let scheme = if url.scheme() == "https" { "wss" } else { "ws" };
        url.set_scheme(scheme).expect("http and https may become ws and wss");
        let broken =
            |error: &WsError| Failure::new(format!("no stream from {}: {}", client.base(), with_causes(error)));
        let mut request = url.as_str().into_client_request().map_err(|error| NotOpened::Refused(broken(&error)))?;
        if let Some((name, value)) = client.header() {
            let value =
                http::HeaderValue::from_str(&value).expect("credentials are plain text, checked when they were read");
            request.headers_mut().insert(http::HeaderName::from_static(lower(name)), value);
        }
        let config = WebSocketConfig::default().max_message_size(Some(MESSAGE_MAX)).max_frame_size(Some(MESSAGE_MAX));
        let opening = tokio_tungstenite::connect_async_with_config(request, Some(config), true);
        match timeout(OPEN_MAX, opening).await {
            Ok(Ok((stream, _))) => {
                let (sink, stream) = stream.split();
                let ping = tokio::time::interval_at(Instant::now() + PING_EVERY, PING_EVERY);
                Ok(Self { saying: Saying(sink), hearing: Hearing { stream, last: Instant::now() }, ping })
            }
            // Refused before the upgrade: an ordinary HTTP answer with an ordinary error.
            Ok(Err(WsError::Http(answer))) => {
                let id = answer.headers().get("x-request-id").and_then(|id| id.to_str().ok()).unwrap_or_default();
                let body = answer.body().as_deref().unwrap_or_default();
                let refusal = client.refusal_of(answer.status().as_u16(), id, body);
                Err(match answer.status().is_server_error() {
                    true => NotOpened::Away(refusal),
                    false => NotOpened::Refused(refusal),
                })
            }
            Ok(Err(error)) => Err(NotOpened::Away(broken(&error))),
            Err(_) => {
                let message = format!("no stream from {} within {} s", client.base(), OPEN_MAX.as_secs());
                Err(NotOpened::Away(Failure::new(message)))
            }
        }
    }

    /// The next message, with pings meanwhile. Cancel-safe: what is half read stays in the socket, and a ping that is not sent is missed by nobody.
    pub async fn next(&mut self) -> Result<Heard, Lost> {
        loop {
            tokio::select! {
                heard = self.hearing.next() => return heard,
                _ = self.ping.tick() => {}
            }
            self.saying.ping().await?;
        }
    }

    /// A courtesy, and no reason to wait.
    pub async fn close(mut self) {
        self.saying.close().await;
    }
}

impl Saying {
    pub async fn say(&mut self, frame: &impl Serialize) -> Result<(), Lost> {
        let text = serde_json::to_string(frame).expect("frames are texts and numbers");
        self.send(Message::text(text)).await
    }

    pub async fn bytes(&mut self, bytes: Vec<u8>) -> Result<(), Lost> {
        self.send(Message::Binary(bytes.into())).await
    }

    pub async fn ping(&mut self) -> Result<(), Lost> {
        self.send(Message::Ping(Bytes::new())).await
    }

    pub async fn close(&mut self) {
        let _ = timeout(Duration::from_secs(1), self.0.send(Message::Close(None))).await;
    }

    async fn send(&mut self, message: Message) -> Result<(), Lost> {
        match timeout(SILENCE_MAX, self.0.send(message)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(Lost::Broken(with_causes(&error))),
            Err(_) => Err(Lost::Broken("the control plane takes nothing more from this connection".to_owned())),
        }
    }
}

impl Hearing {
    /// The next message. Whoever calls it sends pings, else silence is taken for an end. Cancel-safe.
    pub async fn next(&mut self) -> Result<Heard, Lost> {
        loop {
            let Ok(message) = timeout_at(self.last + SILENCE_MAX, self.stream.next()).await else {
                return Err(Lost::Broken(format!("the control plane has been silent for {} s", SILENCE_MAX.as_secs())));
            };
            self.last = Instant::now();
            match message {
                Some(Ok(Message::Text(text))) => return Ok(Heard::Text(text.to_string())),
                Some(Ok(Message::Binary(bytes))) => return Ok(Heard::Binary(bytes)),
                Some(Ok(Message::Close(close))) => {
                    let (code, reason) =
                        close.map_or((1005, String::new()), |close| (close.code.into(), close.reason.to_string()));
                    return Err(Lost::Closed { code, reason });
                }
                Some(Ok(_)) => {}
                Some(Err(error)) => return Err(Lost::Broken(with_causes(&error))),
                None => return Err(Lost::Broken("it ended without a word".to_owned())),
            }
        }
    }

    /// Nobody listened for a while, which is not the other side's silence.
    pub fn listen_again(&mut self) {
        self.last = Instant::now();
    }
}

/// `HeaderName::from_static` takes lower case only.
fn lower(name: &'static str) -> &'static str {
    if name == "X-API-Key" { "x-api-key" } else { "authorization" }
}
