//! One connection to a terminal, from its first word to the end of the program or of the connection.
//!
//! What is typed goes to the host in order, one call at a time, and what comes meanwhile is put together for the next. When too much waits,
//! the client is not heard until there is room: nothing is thrown away. Sizes keep their place among what is typed; a kill goes beside it,
//! since a program that does not read its input is what one kills. What was taken from the client is done although it leaves.

use std::collections::VecDeque;
use std::time::Duration;

use api::host::__buffa::oneof::exec_response::Event;
use api::host::__buffa::oneof::send_input_request::Input;
use api::host::__buffa::oneof::signal_process_request::Selector;
use api::host::{ProcessSelector, ResizeTerminalRequest, SendInputRequest, SignalProcessRequest, TerminalSize};
use api::v1::pty::{PtyClientFrame, PtyServerFrame};
use axum::extract::ws::Message;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use connectrpc::client::CallOptions;
use futures::future;
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior, interval_at, sleep_until, timeout};

use super::streams::{Place, Selected, said, size};
use crate::agents::said::exit_code;
use crate::agents::{AgentError, Refusal, ask};
use crate::http::errors::ApiError;
use crate::http::socket::{Events, Over, Session, Turn};

pub const FRAMES: &str = "start, connect, input, resize, kill, pong";

/// As published clients expect it.
const PING_EVERY: Duration = Duration::from_secs(30);
/// For a client to answer the first ping, before it is taken for one that does not.
const PROBE_TIME_MAX: Duration = Duration::from_secs(5);
/// Of what went in JSON to a client that may turn out to take binary frames: the last so many bytes are said again then.
const UNSURE_BYTES_MAX: usize = 64 * 1024;
/// envd waits half a minute for a program to read its input, and says so.
const INPUT_TIME_MAX: Duration = Duration::from_secs(40);
/// Of what is typed: what waits, beside the call that is under way, before the client is not heard. A message more may come.
const INPUT_BYTES_MAX: usize = 256 * 1024;
/// Each size between pieces of input makes two of one.
const INPUT_PIECES_MAX: usize = 64;
/// What is put together for one call.
const PIECE_BYTES_MAX: usize = 64 * 1024;

/// How output goes to the client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    Binary,
    Json,
}

/// How that is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Frames {
    /// It has said so.
    Asked(Format),
    /// It has sent such frames.
    Shown(Format),
    Assumed(Format),
    /// It may be of either generation; output waits until that is known.
    Unknown,
}

impl Frames {
    fn format(self) -> Option<Format> {
        match self {
            Self::Asked(format) | Self::Shown(format) | Self::Assumed(format) => Some(format),
            Self::Unknown => None,
        }
    }

    /// Something was typed in such frames.
    fn typed(&mut self, format: Format) {
        if !matches!(self, Self::Asked(_)) {
            *self = Self::Shown(format);
        }
    }

    /// Only the second generation answers pings. Others may, too, once it is known what they take.
    fn ponged(&mut self) {
        if matches!(self, Self::Unknown | Self::Assumed(_)) {
            *self = Self::Assumed(Format::Binary);
        }
    }

    fn waited(&mut self) {
        if *self == Self::Unknown {
            *self = Self::Assumed(Format::Json);
        }
    }
}

/// What the client is told when the program is found or runs.
pub enum Greeting {
    Started {
        tag: String,
    },
    Connected {
        /// Where the output begins, which published clients do not understand.
        tells: bool,
    },
}

pub struct Terminal {
    place: Place,
    frames: Frames,
    greeting: Greeting,
    /// None until the host has told it.
    pid: Option<u32>,
    waiting: VecDeque<Todo>,
    call: Option<Call>,
    kill: Option<Call>,
    /// What went in JSON because nothing was known of the client.
    unsure: Vec<u8>,
}

enum Todo {
    Input(Vec<u8>),
    Resize(TerminalSize),
}

/// In a task of its own: it is done although the client leaves.
type Call = JoinHandle<Result<(), AgentError>>;

impl Terminal {
    pub fn new(place: Place, frames: Frames, greeting: Greeting) -> Self {
        let (waiting, unsure) = (VecDeque::new(), Vec::new());
        Self { place, frames, greeting, pid: None, waiting, call: None, kill: None, unsure }
    }

    pub async fn relay(mut self, session: &mut Session, mut events: Events) -> Result<(), Over> {
        let ended = self.hold(session, &mut events).await;
        if ended.is_err() {
            self.leave();
        }
        ended
    }

    async fn hold(&mut self, session: &mut Session, events: &mut Events) -> Result<(), Over> {
        let mut ping = interval_at(Instant::now() + PING_EVERY, PING_EVERY);
        ping.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut assume_at = Instant::now();
        loop {
            self.begin_call();
            let hears = self.waiting_bytes() < INPUT_BYTES_MAX && self.waiting.len() < INPUT_PIECES_MAX;
            let shows = self.pid.is_none() || self.frames.format().is_some();
            let turn = tokio::select! {
                biased;
                done = finished(&mut self.call) => {
                    told(session, done)?;
                    continue;
                }
                done = finished(&mut self.kill) => {
                    told(session, done)?;
                    continue;
                }
                () = sleep_until(assume_at), if !shows => {
                    self.frames.waited();
                    continue;
                }
                _ = ping.tick() => {
                    session.say(&PtyServerFrame::Ping)?;
                    continue;
                }
                turn = session.turn(hears, shows.then_some(&mut *events)) => turn?,
            };
            let event = match turn {
                Turn::Event(event) => said(event)?,
                Turn::Text(text) => {
                    if let Some(frame) = session.parse(&text, FRAMES)? {
                        self.hear(session, frame)?;
                    }
                    continue;
                }
                Turn::Bytes(bytes) => {
                    self.frames.typed(Format::Binary);
                    self.say_again(session)?;
                    self.typed(bytes);
                    continue;
                }
                Turn::Quiet => continue,
            };
            match event {
                Some(Event::Start(start)) => {
                    self.pid = Some(start.pid);
                    self.greet(session, start.pid, start.output_from)?;
                    assume_at = Instant::now() + PROBE_TIME_MAX;
                }
                // One without a terminal has the others.
                Some(Event::Pty(bytes) | Event::Stdout(bytes) | Event::Stderr(bytes)) => self.show(session, bytes)?,
                Some(Event::End(end)) => {
                    return session.say(&PtyServerFrame::Exit { exit_code: exit_code(&end) });
                }
                Some(Event::Keepalive(_)) | None => {}
            }
        }
    }

    fn greet(&self, session: &mut Session, pid: u32, output_from: Option<u64>) -> Result<(), Over> {
        match &self.greeting {
            Greeting::Started { tag } => session.say(&PtyServerFrame::Started { tag: tag.clone(), pid })?,
            Greeting::Connected { tells: true } => session.say(&PtyServerFrame::Connected { pid, output_from })?,
            Greeting::Connected { tells: false } => {}
        }
        if self.frames == Frames::Unknown {
            session.say(&PtyServerFrame::Ping)?;
        }
        Ok(())
    }

    fn show(&mut self, session: &mut Session, bytes: Vec<u8>) -> Result<(), Over> {
        if self.frames == Frames::Assumed(Format::Json) {
            self.unsure.extend_from_slice(&bytes);
            let beyond = self.unsure.len().saturating_sub(UNSURE_BYTES_MAX);
            self.unsure.drain(..beyond);
        }
        match self.frames.format() {
            Some(Format::Json) => session.say(&PtyServerFrame::Output { data: STANDARD.encode(bytes) }),
            Some(Format::Binary) | None => session.put(Message::Binary(bytes.into())),
        }
    }

    /// It is known now what the client takes: what it has not seen in JSON comes in binary.
    fn say_again(&mut self, session: &mut Session) -> Result<(), Over> {
        let unsure = std::mem::take(&mut self.unsure);
        if self.frames.format() == Some(Format::Binary) && !unsure.is_empty() {
            return session.put(Message::Binary(unsure.into()));
        }
        Ok(())
    }

    fn hear(&mut self, session: &mut Session, frame: PtyClientFrame) -> Result<(), Over> {
        match frame {
            PtyClientFrame::Input { data } => match STANDARD.decode(data) {
                Ok(bytes) => {
                    self.frames.typed(Format::Json);
                    self.unsure.clear();
                    self.typed(bytes.into());
                }
                Err(_) => session.complain(&ApiError::invalid("data", "must be base64"))?,
            },
            PtyClientFrame::Resize { cols, rows } => match size(cols, rows) {
                Ok(size) => self.resized(size),
                Err(error) => session.complain(&error)?,
            },
            PtyClientFrame::Kill => self.kill(),
            PtyClientFrame::Pong => {
                self.frames.ponged();
                self.say_again(session)?;
            }
            PtyClientFrame::Start { .. } | PtyClientFrame::Connect { .. } => {
                session.complain(&ApiError::wrong_state("this connection has its terminal already", "started"))?;
            }
        }
        Ok(())
    }

    fn typed(&mut self, bytes: Bytes) {
        match self.waiting.back_mut() {
            Some(Todo::Input(last)) if last.len() + bytes.len() <= PIECE_BYTES_MAX => last.extend_from_slice(&bytes),
            _ if bytes.is_empty() => {}
            _ => self.waiting.push_back(Todo::Input(bytes.into())),
        }
    }

    fn resized(&mut self, size: TerminalSize) {
        match self.waiting.back_mut() {
            Some(Todo::Resize(last)) => *last = size,
            _ => self.waiting.push_back(Todo::Resize(size)),
        }
    }

    fn waiting_bytes(&self) -> usize {
        let bytes = |todo: &Todo| if let Todo::Input(bytes) = todo { bytes.len() } else { 0 };
        self.waiting.iter().map(bytes).sum()
    }

    /// The next, when none is under way and the program is known.
    fn begin_call(&mut self) {
        if self.call.is_none()
            && let Some(pid) = self.pid
            && let Some(todo) = self.waiting.pop_front()
        {
            self.call = Some(self.place.app.tracker.spawn(todo.done(self.place.clone(), pid)));
        }
    }

    fn kill(&mut self) {
        let (Some(pid), None) = (self.pid, &self.kill) else { return };
        let (agent, sandbox_id) = (self.place.agent.clone(), self.place.id.to_string());
        let selector = Some(Selector::Pid(pid));
        let request = SignalProcessRequest { sandbox_id, selector, signal: "SIGKILL".to_owned(), ..Default::default() };
        self.kill = Some(self.place.app.tracker.spawn(async move {
            agent.signal_process_with_options(request, ask()).await?;
            Ok(())
        }));
    }

    /// The client is gone: what it has typed before is still typed.
    fn leave(self) {
        let Some(pid) = self.pid else { return };
        if self.waiting.is_empty() {
            return;
        }
        let (place, call, waiting) = (self.place.clone(), self.call, self.waiting);
        self.place.app.tracker.spawn(timeout(INPUT_TIME_MAX, async move {
            if let Some(call) = call {
                let _ = call.await;
            }
            for todo in waiting {
                if todo.done(place.clone(), pid).await.is_err() {
                    return;
                }
            }
        }));
    }
}

impl Todo {
    async fn done(self, place: Place, pid: u32) -> Result<(), AgentError> {
        let (sandbox_id, process) = (place.id.to_string(), Some(ProcessSelector::from(Selected::Pid(pid))).into());
        let options = CallOptions::default().with_timeout(INPUT_TIME_MAX);
        match self {
            Self::Input(bytes) => {
                let input = Some(Input::Pty(bytes));
                let request = SendInputRequest { sandbox_id, process, input, ..Default::default() };
                place.agent.send_input_with_options(request, options).await?;
            }
            Self::Resize(size) => {
                let size = Some(size).into();
                let request = ResizeTerminalRequest { sandbox_id, process, size, ..Default::default() };
                place.agent.resize_terminal_with_options(request, options).await?;
            }
        }
        Ok(())
    }
}

/// What became of the call; never without one. Cancel-safe.
async fn finished(call: &mut Option<Call>) -> Result<(), AgentError> {
    let Some(under_way) = call else { return future::pending().await };
    let done = under_way.await;
    *call = None;
    done.unwrap_or(Err(AgentError::NoAnswer))
}

/// What the client hears of a call.
fn told(session: &mut Session, done: Result<(), AgentError>) -> Result<(), Over> {
    match done {
        Ok(()) => Ok(()),
        // It has just ended, which is on its way.
        Err(AgentError::Refused { refusal: Refusal::NotFound, .. }) => Ok(()),
        // The stream will say so, too; but input must not be lost without a word.
        Err(error @ (AgentError::NotRunning | AgentError::UnknownSandbox | AgentError::Unreachable)) => {
            Err(error.into())
        }
        Err(error) => session.complain(&error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_client_takes_is_known_by_what_it_sends() {
        let mut first = Frames::Unknown;
        assert_eq!(first.format(), None);
        first.waited();
        assert_eq!(first.format(), Some(Format::Json), "it reads and does not answer");
        first.ponged();
        assert_eq!(first.format(), Some(Format::Binary), "it does answer, late");
        first.typed(Format::Json);
        first.ponged();
        assert_eq!(first.format(), Some(Format::Json), "what it sends says more");
        let mut second = Frames::Unknown;
        second.ponged();
        second.waited();
        assert_eq!(second.format(), Some(Format::Binary));
        let mut other = Frames::Assumed(Format::Binary);
        other.typed(Format::Json);
        assert_eq!(other.format(), Some(Format::Json));
        let mut asked = Frames::Asked(Format::Binary);
        asked.typed(Format::Json);
        asked.ponged();
        assert_eq!(asked.format(), Some(Format::Binary));
    }
}
