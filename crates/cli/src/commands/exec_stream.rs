//! A command in a sandbox with its output as it comes: `GET /v1/sandboxes/{id}/exec/stream`, a WebSocket.
//!
//! Output travels as base64, so that it arrives byte for byte. A stream may be silent for hours, so a dead server is told by pings.

use std::collections::BTreeMap;
use std::time::Duration;

use api::v1::errors::ErrorObject;
use api::v1::exec::{ExecClientFrame, ExecServerFrame};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use tokio::io::{AsyncWrite, AsyncWriteExt as _};
use tokio::time::timeout;

use crate::client::Client;
use crate::failure::Failure;
use crate::websocket::{Heard, Lost, NotOpened, Socket};

/// A reader that takes nothing of the last bytes for so long gets no more of them.
const FLUSH_MAX: Duration = Duration::from_secs(20);

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
    let url = client.url(&["v1", "sandboxes", sandbox, "exec", "stream"]);
    let mut socket = Socket::open(client, url).await.map_err(NotOpened::failure)?;
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
    socket.saying.say(&start).await.map_err(untold)?;
    loop {
        match frame(socket.next().await.map_err(untold)?)? {
            ExecServerFrame::Start { .. } => {}
            ExecServerFrame::Stdout { data } => write(out, &data).await?,
            ExecServerFrame::Stderr { data } => write(err, &data).await?,
            ExecServerFrame::Exit { exit_code } => {
                let _ = timeout(FLUSH_MAX, async { tokio::join!(out.flush(), err.flush()) }).await;
                socket.close().await;
                return Ok(exit_code);
            }
            ExecServerFrame::Error { code, data, fatal } => {
                let failure = refused(code, data);
                if fatal {
                    return Err(failure);
                }
                eprintln!("wrenn: {}", failure.message());
            }
        }
    }
}

pub fn frame(heard: Heard) -> Result<ExecServerFrame, Failure> {
    let parsed = match &heard {
        Heard::Text(text) => serde_json::from_str(text),
        Heard::Binary(bytes) => serde_json::from_slice(bytes),
    };
    parsed.map_err(|error| Failure::new(format!("a message of the server is not understood: {error}")))
}

/// What an error frame says.
pub fn refused(code: String, message: String) -> Failure {
    Failure::refused(ErrorObject { code, message, request_id: String::new(), details: None })
}

fn untold(lost: Lost) -> Failure {
    Failure::new(format!("the stream ended before the command's end was told ({lost}); it may still run"))
}

pub async fn write(to: &mut (impl AsyncWrite + Unpin), data: &str) -> Result<(), Failure> {
    let bytes = STANDARD
        .decode(data)
        .map_err(|error| Failure::new(format!("output from the server is not base64: {error}")))?;
    let written = async {
        to.write_all(&bytes).await?;
        to.flush().await
    };
    written.await.map_err(|error| Failure::new(format!("write the command's output: {error}")))
}
