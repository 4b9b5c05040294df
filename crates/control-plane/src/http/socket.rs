//! What the WebSockets of the API have in common: how they are opened, looked at, bounded and closed.
//!
//! What is wrong before the upgrade is an HTTP error; afterwards it is an `error` frame, and a code with which the connection is closed:
//!
//! ```text
//!   1000 it is over, or an error was told     1001 pings are not answered      1002 1007 1009 what came is no WebSocket, no text, too large
//!   1008 nothing sensible was said            1012 this replica ends           1013 the host is away, or the client takes nothing
//!   4401 whoever opened it may no longer      4404 the sandbox is gone         4409 the sandbox does not run any more
//! ```
//!
//! One task has the socket. It hears, sends and does its work at once, so that a client that takes nothing still is heard, and what comes
//! from a host waits for the client: only one piece of it is under way, and a client that has not taken it for [`SEND_TIME_MAX`] is let go.

use std::task::Poll;
use std::time::Duration;

use api::host::ExecResponse;
use api::v1::exec::ExecServerFrame;
use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::extract::ws::{CloseFrame, Message, Utf8Bytes, WebSocket, WebSocketUpgrade};
use axum::response::Response;
use bytes::Bytes;
use connectrpc::ConnectError;
use futures::stream::BoxStream;
use futures::{Sink as _, SinkExt as _, StreamExt as _, future};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::time::{Instant, Interval, MissedTickBehavior, interval, sleep_until, timeout};
use tokio_tungstenite::tungstenite;
use tokio_util::sync::CancellationToken;

use super::errors::ApiError;
use super::rights::{self, Grant};
use crate::agents::AgentError;
use crate::app::App;
use crate::measures::Counted;

/// What a host tells of a process.
pub type Events = BoxStream<'static, Result<ExecResponse, ConnectError>>;
pub type Upgrade = Result<WebSocketUpgrade, WebSocketUpgradeRejection>;

const MESSAGE_BYTES_MAX: usize = 1024 * 1024;
/// What is read of one: what is only a little too large is read to its end, so that the client hears why it is closed.
const MESSAGE_BYTES_READ: usize = 2 * MESSAGE_BYTES_MAX;
/// Held by each connection for as long as it lives, idle or not; the library's own is sixteen times that.
const BUFFER_BYTES: usize = 8 * 1024;
const SEND_TIME_MAX: Duration = Duration::from_secs(60);
/// For the first frame of a client.
const START_TIME_MAX: Duration = Duration::from_secs(30);
const PING_EVERY: Duration = Duration::from_secs(20);
/// Pings after which nothing at all was heard: the next would be one too many.
const UNANSWERED_MAX: u32 = 3;
/// For the last frame, when the rights are lost.
const END_TIME_MAX: Duration = Duration::from_secs(5);
/// After our close: what the client has sent meanwhile is read, or its kernel throws away what we said last.
const PARTING_TIME_MAX: Duration = Duration::from_secs(2);
/// Frames that say nothing we know, before the connection is closed.
const NONSENSE_MAX: u32 = 10;
/// Replies that wait for the client to take them, before nothing more of it is heard.
const REPLIES_MAX: u32 = 16;

pub const NORMAL: u16 = 1000;
const GOING_AWAY: u16 = 1001;
const PROTOCOL: u16 = 1002;
const NO_TEXT: u16 = 1007;
const POLICY: u16 = 1008;
const TOO_LARGE: u16 = 1009;
const RESTART: u16 = 1012;
pub const TRY_LATER: u16 = 1013;
/// Of the range that is everybody's own.
const UNAUTHORIZED: u16 = 4401;
pub const GONE: u16 = 4404;
pub const WRONG_STATE: u16 = 4409;

/// What is done by one WebSocket, from its first frame to its end.
pub trait Conversation: Send + 'static {
    fn hold(self, session: &mut Session) -> impl Future<Output = Result<(), Over>> + Send;
}

/// Why a conversation ends.
#[derive(Debug)]
pub enum Over {
    /// Nobody is there to be told.
    Broken,
    Closed {
        code: u16,
        reason: &'static str,
    },
    /// The client is told what went wrong.
    Failed {
        error: ApiError,
        code: u16,
    },
    /// What the host said, for whoever knows of what.
    Host(AgentError),
}

impl From<ApiError> for Over {
    fn from(error: ApiError) -> Self {
        Self::Failed { error, code: NORMAL }
    }
}

impl From<AgentError> for Over {
    fn from(error: AgentError) -> Self {
        Self::Host(error)
    }
}

/// What happened.
pub enum Turn {
    Text(Utf8Bytes),
    Bytes(Bytes),
    /// None: the host has ended its stream.
    Event(Option<Result<ExecResponse, ConnectError>>),
    /// Nothing to act on.
    Quiet,
}

pub struct Session {
    socket: WebSocket,
    stop: CancellationToken,
    /// Cancelled when whoever opened it may no longer.
    rights: CancellationToken,
    ping: Interval,
    /// Pings since something was heard.
    unanswered: u32,
    /// Since when something is under way to the client.
    sending: Option<Instant>,
    replies: u32,
    nonsense: u32,
}

/// The answer to a request for a WebSocket that may be opened.
pub fn open(
    app: App,
    grant: Grant,
    upgrade: WebSocketUpgrade,
    counted: fn() -> Counted,
    conversation: impl Conversation,
) -> Response {
    let upgrade = upgrade.max_message_size(MESSAGE_BYTES_READ).max_frame_size(MESSAGE_BYTES_READ);
    upgrade.read_buffer_size(BUFFER_BYTES).write_buffer_size(BUFFER_BYTES).on_upgrade(move |socket| async move {
        let _counted = counted();
        let rights = CancellationToken::new();
        let session = Session::new(socket, app.stop.clone(), rights.clone());
        // The look at the rights ends with the session, and the session soon after the rights.
        tokio::select! {
            () = session.run(conversation) => {}
            () = async { rights::lost(&app, &grant).await; rights.cancel(); tokio::time::sleep(END_TIME_MAX).await } => {}
        }
    })
}

pub fn upgrade(upgrade: Upgrade) -> Result<WebSocketUpgrade, ApiError> {
    upgrade.map_err(|error| ApiError::invalid("", format!("is not a WebSocket upgrade: {error}")))
}

impl Session {
    fn new(socket: WebSocket, stop: CancellationToken, rights: CancellationToken) -> Self {
        let mut ping = interval(PING_EVERY);
        ping.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Self { socket, stop, rights, ping, unanswered: 0, sending: None, replies: 0, nonsense: 0 }
    }

    async fn run(mut self, conversation: impl Conversation) {
        let over = match conversation.hold(&mut self).await {
            Ok(()) => Over::Closed { code: NORMAL, reason: "ended" },
            Err(Over::Host(error)) => ApiError::from(error).into(),
            Err(over) => over,
        };
        self.end(over).await;
    }

    /// The first frame that `understand` takes, of which clients have [`START_TIME_MAX`].
    pub async fn first<T>(
        &mut self,
        mut understand: impl FnMut(&mut Self, Turn) -> Result<Option<T>, Over>,
    ) -> Result<T, Over> {
        let until = Instant::now() + START_TIME_MAX;
        loop {
            let turn = tokio::time::timeout_at(until, self.turn(true, None)).await;
            let turn = turn.unwrap_or(Err(Over::Closed { code: POLICY, reason: "no start" }))?;
            if let Some(first) = understand(self, turn)? {
                return Ok(first);
            }
        }
    }

    /// What happens next. Cancel-safe. Events are taken while nothing is under way to the client, and it is heard while `hears`.
    pub async fn turn(&mut self, hears: bool, events: Option<&mut Events>) -> Result<Turn, Over> {
        let hears = hears && self.replies < REPLIES_MAX;
        let is_free = self.sending.is_none();
        let patience = self.sending.unwrap_or_else(Instant::now) + SEND_TIME_MAX;
        let (socket, ping) = (&mut self.socket, &mut self.ping);
        // Both sides of one socket, of which neither waits for the other.
        let moved = future::poll_fn(|context| {
            if !is_free && let Poll::Ready(flushed) = std::pin::Pin::new(&mut *socket).poll_flush(context) {
                return Poll::Ready(Moved::Flushed(flushed));
            }
            match hears {
                true => socket.poll_next_unpin(context).map(Moved::Heard),
                false => Poll::Pending,
            }
        });
        let next = async {
            match events {
                Some(events) if is_free => events.next().await,
                _ => future::pending().await,
            }
        };
        tokio::select! {
            // First: what this replica does at its end breaks connections to hosts, too. And last the host: a command that talks without end
            // must not keep the rest from being heard.
            biased;
            () = self.stop.cancelled() => Err(restarts()),
            () = self.rights.cancelled() => Err(unauthorized()),
            moved = moved => match moved {
                Moved::Flushed(flushed) => {
                    flushed.map_err(|_| Over::Broken)?;
                    (self.sending, self.replies) = (None, 0);
                    Ok(Turn::Quiet)
                }
                Moved::Heard(message) => {
                    self.unanswered = 0;
                    heard(message)
                }
            },
            () = sleep_until(patience), if !is_free => {
                Err(Over::Closed { code: TRY_LATER, reason: "the client takes nothing" })
            }
            _ = ping.tick(), if is_free => {
                if self.unanswered >= UNANSWERED_MAX && hears {
                    return Err(Over::Closed { code: GOING_AWAY, reason: "pings are not answered" });
                }
                self.unanswered = self.unanswered.saturating_add(1);
                self.put(Message::Ping(Bytes::new()))?;
                Ok(Turn::Quiet)
            }
            event = next => Ok(Turn::Event(event)),
        }
    }

    /// Waits for `work` no longer than the conversation may go on.
    pub async fn meanwhile<T>(&mut self, work: impl Future<Output = T>) -> Result<T, Over> {
        tokio::select! {
            biased;
            () = self.stop.cancelled() => Err(restarts()),
            () = self.rights.cancelled() => Err(unauthorized()),
            done = work => Ok(done),
        }
    }

    /// A frame that is understood; else the client is told what is, and a few times are too many.
    pub fn parse<T: DeserializeOwned>(&mut self, text: &str, frames: &str) -> Result<Option<T>, Over> {
        match serde_json::from_str(text) {
            Ok(frame) => Ok(Some(frame)),
            Err(_) => self.nonsense(frames).map(|()| None),
        }
    }

    /// `frames`: which there are.
    pub fn nonsense(&mut self, frames: &str) -> Result<(), Over> {
        self.nonsense += 1;
        if self.nonsense > NONSENSE_MAX {
            return Err(Over::Closed { code: POLICY, reason: "nothing that is understood" });
        }
        self.complain(&ApiError::invalid("", format!("the frame is not one of: {frames}")))
    }

    /// An error after which it goes on.
    pub fn complain(&mut self, error: &ApiError) -> Result<(), Over> {
        self.replies += 1;
        self.say(&error_frame(error, false))
    }

    pub fn say(&mut self, frame: &impl Serialize) -> Result<(), Over> {
        self.put(Message::Text(serde_json::to_string(frame).expect("frames are JSON").into()))
    }

    /// On its way to the client.
    pub fn put(&mut self, message: Message) -> Result<(), Over> {
        // The library takes it in any case, and writes on when it is flushed.
        std::pin::Pin::new(&mut self.socket).start_send(message).map_err(|_| Over::Broken)?;
        self.sending.get_or_insert_with(Instant::now);
        Ok(())
    }

    async fn end(mut self, over: Over) {
        let (code, reason) = match &over {
            Over::Broken => return,
            Over::Closed { code, reason } => (*code, *reason),
            Over::Failed { error, code } => match self.say(&error_frame(error, true)) {
                Ok(()) => (*code, error.code()),
                Err(_) => return,
            },
            Over::Host(_) => (NORMAL, "failed"),
        };
        let time_max = if code == NORMAL { SEND_TIME_MAX } else { END_TIME_MAX };
        let close = Message::Close(Some(CloseFrame { code, reason: reason.into() }));
        let part = async {
            // The client's own close is answered by the library, when it is flushed.
            if self.socket.send(close).await.is_err() {
                return self.socket.flush().await.is_ok();
            }
            true
        };
        if let Ok(true) = timeout(time_max, part).await {
            let rest = async { while let Some(Ok(_)) = self.socket.next().await {} };
            let _ = timeout(PARTING_TIME_MAX, rest).await;
        }
    }
}

enum Moved {
    Flushed(Result<(), axum::Error>),
    Heard(Option<Result<Message, axum::Error>>),
}

fn heard(message: Option<Result<Message, axum::Error>>) -> Result<Turn, Over> {
    match message {
        Some(Ok(Message::Text(text))) if text.len() > MESSAGE_BYTES_MAX => Err(too_large()),
        Some(Ok(Message::Binary(bytes))) if bytes.len() > MESSAGE_BYTES_MAX => Err(too_large()),
        Some(Ok(Message::Text(text))) => Ok(Turn::Text(text)),
        Some(Ok(Message::Binary(bytes))) => Ok(Turn::Bytes(bytes)),
        Some(Ok(Message::Ping(_) | Message::Pong(_))) => Ok(Turn::Quiet),
        Some(Ok(Message::Close(_))) | None => Err(Over::Closed { code: NORMAL, reason: "closed" }),
        Some(Err(error)) => Err(wrong(error)),
    }
}

/// What came is not what a WebSocket carries; or it broke.
fn wrong(error: axum::Error) -> Over {
    let cause = error.into_inner();
    match cause.downcast_ref::<tungstenite::Error>() {
        Some(tungstenite::Error::Utf8(_)) => Over::Closed { code: NO_TEXT, reason: "a text is not UTF-8" },
        Some(tungstenite::Error::Capacity(_)) => too_large(),
        Some(tungstenite::Error::Protocol(_)) => Over::Closed { code: PROTOCOL, reason: "this is no WebSocket" },
        _ => Over::Broken,
    }
}

fn too_large() -> Over {
    Over::Closed { code: TOO_LARGE, reason: "a message is larger than 1 MiB" }
}

fn restarts() -> Over {
    Over::Closed { code: RESTART, reason: "the control plane restarts" }
}

fn unauthorized() -> Over {
    Over::Closed { code: UNAUTHORIZED, reason: "unauthorized" }
}

fn error_frame(error: &ApiError, fatal: bool) -> ExecServerFrame {
    ExecServerFrame::Error { code: error.code().to_owned(), data: error.message().to_owned(), fatal }
}
