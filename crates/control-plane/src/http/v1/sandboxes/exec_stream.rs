//! `GET /v1/sandboxes/{id}/exec/stream` (WebSocket): runs a command and sends its output as it comes.
//!
//! What is wrong before the upgrade is an HTTP error; afterwards it is one `error` frame. The command's output waits for the client, and
//! a client that takes nothing for [`SEND_TIME_MAX`] is let go. The command itself goes on when the client leaves.

use std::time::Duration;

use api::host::__buffa::oneof::exec_response::Event;
use api::v1::errors::ErrorBody;
use api::v1::exec::{Exec, ExecClientFrame, ExecServerFrame};
use axum::extract::State;
use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::extract::ws::{CloseFrame, Message, WebSocket, WebSocketUpgrade};
use axum::response::Response;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use futures::{StreamExt as _, TryStreamExt as _};
use model::ids::SandboxId;
use tokio_util::sync::CancellationToken;

use super::exec::{Events, events, request};
use crate::agents::{Agent, AgentError};
use crate::app::App;
use crate::http::access::Caller;
use crate::http::body::Id;
use crate::http::errors::ApiError;
use crate::http::rights::{self, Grant};
use crate::measures::Counted;

const MESSAGE_BYTES_MAX: usize = 1024 * 1024;
const START_TIME_MAX: Duration = Duration::from_secs(30);
const SEND_TIME_MAX: Duration = Duration::from_secs(60);
const PING_EVERY: Duration = Duration::from_secs(20);
/// For the last frame, when the rights are lost.
const END_TIME_MAX: Duration = Duration::from_secs(5);
/// Frames that say nothing we know, before the connection is closed.
const NONSENSE_MAX: u32 = 10;

const NORMAL: u16 = 1000;
const POLICY: u16 = 1008;
/// Of the range that is everybody's own: who has opened it may no longer.
const UNAUTHORIZED: u16 = 4401;
const RESTART: u16 = 1012;
const TRY_LATER: u16 = 1013;

#[utoipa::path(get, path = "/{id}/exec/stream", tag = "sandboxes", params(("id" = String, Path)),
    responses((status = 101, description = "frames as ExecClientFrame and ExecServerFrame"), (status = 404, body = ErrorBody),
        (status = 409, body = ErrorBody)))]
pub async fn exec_stream(
    State(app): State<App>,
    caller: Caller,
    grant: Grant,
    Id(id): Id<SandboxId>,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Result<Response, ApiError> {
    let upgrade = upgrade.map_err(|error| ApiError::invalid("", format!("is not a WebSocket upgrade: {error}")))?;
    let agent = super::awake(&app, &caller, &id).await?;
    let stop = app.stop.clone();
    Ok(upgrade
        .max_message_size(MESSAGE_BYTES_MAX)
        .max_frame_size(MESSAGE_BYTES_MAX)
        .on_upgrade(move |socket| async move {
            let _counted = Counted::exec_stream();
            let rights = CancellationToken::new();
            let session = Session { socket, stop, rights: rights.clone(), nonsense: 0 };
            // The look at the rights ends with the session, and the session soon after the rights.
            tokio::select! {
                () = session.run(&agent, &id) => {}
                () = async { rights::lost(&app, &grant).await; rights.cancel(); tokio::time::sleep(END_TIME_MAX).await } => {}
            }
        }))
}

struct Session {
    socket: WebSocket,
    stop: CancellationToken,
    /// Cancelled when whoever opened it may no longer.
    rights: CancellationToken,
    nonsense: u32,
}

/// The connection is over, by whoever's will.
struct Over;

/// The start frame's contents.
struct Start {
    exec: Exec,
    is_base64: bool,
}

impl Session {
    async fn run(mut self, agent: &Agent, id: &SandboxId) {
        let (rights, stop) = (self.rights.clone(), self.stop.clone());
        let start = tokio::select! {
            start = tokio::time::timeout(START_TIME_MAX, self.start()) => start,
            () = rights.cancelled() => return self.close(UNAUTHORIZED, "unauthorized").await,
            () = stop.cancelled() => return self.close(RESTART, "the control plane restarts").await,
        };
        let Ok(Ok(start)) = start else { return self.close(POLICY, "no start").await };
        let encoder = Encoder::new(start.is_base64);
        let timeout_sec = start.exec.timeout_sec.unwrap_or(0);
        let opened = match request(id, start.exec, timeout_sec) {
            Ok(request) => tokio::select! {
                // First: what this replica does at its end breaks connections to hosts, too.
                biased;
                () = stop.cancelled() => return self.close(RESTART, "the control plane restarts").await,
                () = rights.cancelled() => return self.close(UNAUTHORIZED, "unauthorized").await,
                opened = events(agent, request) => opened.map_err(ApiError::from),
            },
            Err(error) => Err(error),
        };
        match opened {
            Ok(events) => self.relay(events, encoder).await,
            Err(error) => self.fail(&error).await,
        }
    }

    async fn start(&mut self) -> Result<Start, Over> {
        loop {
            match self.receive().await? {
                Some(ExecClientFrame::Start { cmd, args, envs, cwd, user, timeout_sec, encoding }) => {
                    let is_base64 = encoding.as_deref() == Some("base64");
                    return Ok(Start {
                        exec: Exec { cmd, args, timeout_sec, envs, cwd, user, ..Exec::default() },
                        is_base64,
                    });
                }
                Some(ExecClientFrame::Stop) => return Err(Over),
                None => {}
            }
        }
    }

    async fn relay(mut self, events: Events, mut encoder: Encoder) {
        let mut events = events.map_err(AgentError::from);
        let (stop, rights) = (self.stop.clone(), self.rights.clone());
        let mut ping = tokio::time::interval(PING_EVERY);
        ping.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let event = tokio::select! {
                biased;
                () = stop.cancelled() => return self.close(RESTART, "the control plane restarts").await,
                () = rights.cancelled() => return self.close(UNAUTHORIZED, "unauthorized").await,
                frame = self.socket.recv() => match self.understand(frame).await {
                    Ok(Some(ExecClientFrame::Stop)) | Err(Over) => return self.close(NORMAL, "stopped").await,
                    Ok(Some(ExecClientFrame::Start { .. })) => {
                        let error = ApiError::wrong_state("a command runs on this connection already", "started");
                        if self.send_error(&error, false).await.is_err() { return }
                        continue;
                    }
                    Ok(None) => continue,
                },
                _ = ping.tick() => match self.send(Message::Ping(bytes::Bytes::new())).await {
                    Ok(()) => continue,
                    Err(Over) => return,
                },
                // Last: a command that talks without end must not keep the rest from being heard.
                event = events.next() => event,
            };
            let (frames, is_end) = match event {
                Some(Ok(event)) => match event.event {
                    Some(Event::Start(start)) => {
                        (vec![ExecServerFrame::Start { pid: start.pid, output_from: None }], false)
                    }
                    Some(Event::Stdout(bytes)) => (encoder.stdout(&bytes), false),
                    Some(Event::Stderr(bytes)) => (encoder.stderr(&bytes), false),
                    Some(Event::End(end)) => {
                        let mut frames = encoder.rest();
                        frames.push(ExecServerFrame::Exit { exit_code: if end.exited { end.exit_code } else { -1 } });
                        (frames, true)
                    }
                    Some(Event::Keepalive(_)) | None => (Vec::new(), false),
                },
                Some(Err(error)) => return self.fail(&error.into()).await,
                None => {
                    let message = "the stream of a command ended without its end".to_owned();
                    return self.fail(&AgentError::Misbehaved { message }.into()).await;
                }
            };
            for frame in frames {
                let text = serde_json::to_string(&frame).expect("frames are JSON");
                if self.send(Message::Text(text.into())).await.is_err() {
                    return self.close(TRY_LATER, "the client takes nothing").await;
                }
            }
            if is_end {
                return self.close(NORMAL, "ended").await;
            }
        }
    }

    async fn receive(&mut self) -> Result<Option<ExecClientFrame>, Over> {
        let frame = self.socket.recv().await;
        self.understand(frame).await
    }

    async fn understand(
        &mut self,
        frame: Option<Result<Message, axum::Error>>,
    ) -> Result<Option<ExecClientFrame>, Over> {
        let parsed = match frame {
            Some(Ok(Message::Text(text))) => serde_json::from_str(&text).ok(),
            Some(Ok(Message::Ping(_) | Message::Pong(_))) => return Ok(None),
            Some(Ok(Message::Binary(_))) => None,
            Some(Ok(Message::Close(_)) | Err(_)) | None => return Err(Over),
        };
        if parsed.is_none() {
            self.nonsense += 1;
            if self.nonsense > NONSENSE_MAX {
                return Err(Over);
            }
            let error = ApiError::invalid("", "the frame is not one of: start, stop");
            self.send_error(&error, false).await?;
        }
        Ok(parsed)
    }

    async fn send(&mut self, message: Message) -> Result<(), Over> {
        match tokio::time::timeout(SEND_TIME_MAX, self.socket.send(message)).await {
            Ok(Ok(())) => Ok(()),
            _ => Err(Over),
        }
    }

    async fn send_error(&mut self, error: &ApiError, fatal: bool) -> Result<(), Over> {
        let frame = ExecServerFrame::Error { code: error.code().to_owned(), data: error.message().to_owned(), fatal };
        self.send(Message::Text(serde_json::to_string(&frame).expect("frames are JSON").into())).await
    }

    async fn fail(mut self, error: &ApiError) {
        if self.send_error(error, true).await.is_ok() {
            self.close(NORMAL, "failed").await;
        }
    }

    async fn close(mut self, code: u16, reason: &'static str) {
        let _ = self.send(Message::Close(Some(CloseFrame { code, reason: reason.into() }))).await;
    }
}

/// Bytes into JSON strings. Characters that are split between pieces are put together; what is not UTF-8 becomes U+FFFD, unless the
/// client asked for base64.
struct Encoder {
    is_base64: bool,
    stdout: Vec<u8>,
    stderr: Vec<u8>,
}

impl Encoder {
    fn new(is_base64: bool) -> Self {
        Self { is_base64, stdout: Vec::new(), stderr: Vec::new() }
    }

    fn stdout(&mut self, bytes: &[u8]) -> Vec<ExecServerFrame> {
        text(self.is_base64, &mut self.stdout, bytes).map(|data| ExecServerFrame::Stdout { data }).into_iter().collect()
    }

    fn stderr(&mut self, bytes: &[u8]) -> Vec<ExecServerFrame> {
        text(self.is_base64, &mut self.stderr, bytes).map(|data| ExecServerFrame::Stderr { data }).into_iter().collect()
    }

    /// Halves of characters that never came whole.
    fn rest(&mut self) -> Vec<ExecServerFrame> {
        let rest = |held: &mut Vec<u8>| {
            (!held.is_empty()).then(|| String::from_utf8_lossy(&std::mem::take(held)).into_owned())
        };
        let stdout = rest(&mut self.stdout).map(|data| ExecServerFrame::Stdout { data });
        let stderr = rest(&mut self.stderr).map(|data| ExecServerFrame::Stderr { data });
        stdout.into_iter().chain(stderr).collect()
    }
}

/// The text of what was held back and the new bytes; an unfinished character at the end is held back.
fn text(is_base64: bool, held: &mut Vec<u8>, bytes: &[u8]) -> Option<String> {
    if is_base64 {
        return Some(STANDARD.encode(bytes));
    }
    held.extend_from_slice(bytes);
    let whole = held.len() - unfinished(held);
    let rest = held.split_off(whole);
    let text = String::from_utf8_lossy(held).into_owned();
    *held = rest;
    (!text.is_empty()).then_some(text)
}

/// How many bytes at the end may be the beginning of a character.
fn unfinished(bytes: &[u8]) -> usize {
    let tail = &bytes[bytes.len().saturating_sub(3)..];
    for start in 0..tail.len() {
        if let Err(error) = std::str::from_utf8(&tail[start..])
            && error.error_len().is_none()
            && error.valid_up_to() == 0
        {
            return tail.len() - start;
        }
    }
    0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn characters_that_are_split_between_pieces_come_whole() {
        let mut encoder = Encoder::new(false);
        let bytes = "aé€😀".as_bytes();
        let mut said = String::new();
        for byte in bytes {
            for frame in encoder.stdout(&[*byte]) {
                if let ExecServerFrame::Stdout { data } = frame {
                    said.push_str(&data);
                }
            }
        }
        assert_eq!(said, "aé€😀");
        assert!(encoder.rest().is_empty());
    }

    #[test]
    fn what_is_not_text_is_marked_and_never_held_for_ever() {
        let mut encoder = Encoder::new(false);
        assert_eq!(encoder.stdout(b"a\xffb"), [ExecServerFrame::Stdout { data: "a\u{fffd}b".to_owned() }]);
        assert!(encoder.stdout(b"\xe2\x82").is_empty());
        assert_eq!(encoder.rest(), [ExecServerFrame::Stdout { data: "\u{fffd}".to_owned() }]);
        assert_eq!(Encoder::new(true).stderr(b"\xff"), [ExecServerFrame::Stderr { data: "/w==".to_owned() }]);
    }
}
