//! A command in a sandbox with its output as it comes: `GET /v1/sandboxes/{id}/exec/stream`, a WebSocket.
//!
//! Output travels as base64, so that it arrives byte for byte. A stream may be silent for hours, so a dead server is told by pings.

use std::collections::BTreeMap;
use std::time::Duration;

use api::v1::errors::ErrorObject;
use api::v1::exec::{ExecClientFrame, ExecServerFrame};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use futures::{SinkExt as _, StreamExt as _};
use tokio::io::{AsyncWrite, AsyncWriteExt as _};
use tokio::time::{Instant, timeout};
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::tungstenite::{Error as WsError, Message, http};

use crate::client::Client;
use crate::failure::{Failure, with_causes};

const OPEN_MAX: Duration = Duration::from_secs(30);
const PING_EVERY: Duration = Duration::from_secs(20);
/// Three pings without any answer.
const SILENCE_MAX: Duration = Duration::from_secs(70);
/// The server sends at most 1 MiB a message; base64 and JSON come on top.
const MESSAGE_MAX: usize = 4 << 20;

#[derive(Debug, Clone, Default)]
pub struct Wanted {
    /// Program and arguments; one word with a blank in it is a shell's.
    pub argv: Vec<String>,
    pub envs: BTreeMap<String, String>,
    pub cwd: Option<String>,
    pub user: Option<String>,
    pub timeout_sec: Option<i64>,
}

/// Runs the command to its end, its output going to `out` and `err` as it comes; gives its exit code.
pub async fn run(
    client: &Client,
    sandbox: &str,
    wanted: Wanted,
    out: &mut (impl AsyncWrite + Unpin),
    err: &mut (impl AsyncWrite + Unpin),
) -> Result<i32, Failure> {
    let mut socket = open(client, sandbox).await?;
    let mut argv = wanted.argv.into_iter();
    let start = ExecClientFrame::Start {
        cmd: argv.next().ok_or_else(|| Failure::usage("no command"))?,
        args: argv.collect(),
        envs: wanted.envs,
        cwd: wanted.cwd,
        user: wanted.user,
        timeout_sec: wanted.timeout_sec,
        encoding: Some("base64".to_owned()),
    };
    let start = serde_json::to_string(&start).expect("texts and numbers are JSON");
    within(SILENCE_MAX, socket.send(Message::text(start))).await?;
    let mut ping = tokio::time::interval_at(Instant::now() + PING_EVERY, PING_EVERY);
    let mut heard = Instant::now();
    loop {
        // Both branches may lose without harm: a tick is a tick, and `next` keeps a half-read message in the socket.
        let message = tokio::select! {
            message = socket.next() => message,
            _ = ping.tick() => {
                if heard.elapsed() > SILENCE_MAX {
                    return Err(Failure::new(format!("the control plane has been silent for {} s", SILENCE_MAX.as_secs())));
                }
                within(SILENCE_MAX, socket.send(Message::Ping(bytes::Bytes::new()))).await?;
                continue;
            }
        };
        heard = Instant::now();
        let frame = match message {
            Some(Ok(Message::Text(text))) => serde_json::from_str::<ExecServerFrame>(&text)
                .map_err(|error| Failure::new(format!("a message of the server is not understood: {error}")))?,
            Some(Ok(Message::Close(close))) => {
                let why = close.map(|close| format!(": {} {}", close.code, close.reason)).unwrap_or_default();
                return Err(Failure::new(format!(
                    "the stream was closed before the command's end was told{why}; it may still run"
                )));
            }
            Some(Ok(_)) => continue,
            Some(Err(error)) => {
                let cause = with_causes(&error);
                return Err(Failure::new(format!(
                    "the stream broke before the command's end was told ({cause}); it may still run"
                )));
            }
            None => {
                return Err(Failure::new("the stream ended before the command's end was told; it may still run"));
            }
        };
        match frame {
            ExecServerFrame::Start { .. } => {}
            ExecServerFrame::Stdout { data } => write(out, &data).await?,
            ExecServerFrame::Stderr { data } => write(err, &data).await?,
            ExecServerFrame::Exit { exit_code } => {
                let _ = timeout(PING_EVERY, async { tokio::join!(out.flush(), err.flush()) }).await;
                let _ = timeout(Duration::from_secs(1), socket.close(None)).await;
                return Ok(exit_code);
            }
            ExecServerFrame::Error { code, data, fatal } => {
                let failure =
                    Failure::refused(ErrorObject { code, message: data, request_id: String::new(), details: None });
                if fatal {
                    return Err(failure);
                }
                eprintln!("wrenn: {}", failure.message());
            }
        }
    }
}

type Socket = tokio_tungstenite::WebSocketStream<tokio_tungstenite::MaybeTlsStream<tokio::net::TcpStream>>;

async fn open(client: &Client, sandbox: &str) -> Result<Socket, Failure> {
    let mut url = client.url(&["v1", "sandboxes", sandbox, "exec", "stream"]);
    let scheme = if url.scheme() == "https" { "wss" } else { "ws" };
    url.set_scheme(scheme).expect("http and https may become ws and wss");
    let mut request = url.as_str().into_client_request().map_err(|error| broken(&error))?;
    if let Some((name, value)) = client.header() {
        let value =
            http::HeaderValue::from_str(&value).expect("credentials are plain text, checked when they were read");
        request.headers_mut().insert(http::HeaderName::from_static(lower(name)), value);
    }
    let config = WebSocketConfig::default().max_message_size(Some(MESSAGE_MAX)).max_frame_size(Some(MESSAGE_MAX));
    let opening = tokio_tungstenite::connect_async_with_config(request, Some(config), true);
    match timeout(OPEN_MAX, opening).await {
        Ok(Ok((socket, _))) => Ok(socket),
        // Refused before the upgrade: an ordinary HTTP answer with an ordinary error.
        Ok(Err(WsError::Http(answer))) => {
            let id = answer.headers().get("x-request-id").and_then(|id| id.to_str().ok()).unwrap_or_default();
            Err(client.refusal_of(answer.status().as_u16(), id, answer.body().as_deref().unwrap_or_default()))
        }
        Ok(Err(error)) => Err(broken(&error)),
        Err(_) => Err(Failure::new(format!("no stream from {} within {} s", client.base(), OPEN_MAX.as_secs()))),
    }
}

/// `HeaderName::from_static` takes lower case only.
fn lower(name: &'static str) -> &'static str {
    if name == "X-API-Key" { "x-api-key" } else { "authorization" }
}

async fn within(limit: Duration, sending: impl Future<Output = Result<(), WsError>>) -> Result<(), Failure> {
    match timeout(limit, sending).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(broken(&error)),
        Err(_) => Err(Failure::new("the control plane takes nothing more from this connection")),
    }
}

fn broken(error: &WsError) -> Failure {
    Failure::new(format!("the stream to the control plane broke: {}", with_causes(error)))
}

async fn write(to: &mut (impl AsyncWrite + Unpin), data: &str) -> Result<(), Failure> {
    let bytes = STANDARD
        .decode(data)
        .map_err(|error| Failure::new(format!("output from the server is not base64: {error}")))?;
    let written = async {
        to.write_all(&bytes).await?;
        to.flush().await
    };
    written.await.map_err(|error| Failure::new(format!("write the command's output: {error}")))
}
