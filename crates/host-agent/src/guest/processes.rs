//! Processes in the guest: start and connect with their streams, list, signal.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use api::guest::process::__buffa::oneof::process_event::{Event, data_event::Output};
use api::guest::process::__buffa::oneof::process_selector::Selector;
use api::guest::process::__buffa::view::{ConnectResponseView, StartResponseView};
use api::guest::process::{
    ConnectRequest, ListRequest, PTY, ProcessClient, ProcessConfig, ProcessEvent, ProcessSelector, SendSignalRequest,
    Signal, StartRequest, pty,
};
use base64::Engine as _;
use bytes::Bytes;
use connectrpc::client::{CallOptions, ServerStream, ServiceTransport};
use connectrpc::{ConnectError, ErrorCode};
use hyper::body::Incoming;
use tokio::time::{Instant, timeout, timeout_at};

use super::faults::printable;
use super::{Guest, GuestError, HttpClient};

/// envd is asked to send something at least this often, so that silence means something.
const KEEPALIVE_SECONDS: &str = "30";
/// Silence longer than this ends the stream. An emulated guest under load may be late by much, not by this.
const SILENCE_MAX: Duration = Duration::from_secs(120);
/// What the guest's clock may lag behind ours before the host ends the stream of a command whose time is over.
const TIMEOUT_GRACE: Duration = Duration::from_secs(10);
/// A list longer than this is not a list of processes that we started.
const PROCESSES_MAX: usize = 10_000;

/// A command to start.
#[derive(Debug, Clone, Default)]
pub struct Command {
    pub cmd: String,
    pub args: Vec<String>,
    pub envs: HashMap<String, String>,
    /// Empty: the user's home.
    pub cwd: String,
    /// Empty: the sandbox's default user.
    pub user: String,
    /// Zero: no limit.
    pub timeout: Duration,
    /// Empty: none.
    pub tag: String,
    /// None: pipes.
    pub terminal: Option<Size>,
    /// Its input is a pipe that is open, instead of being at its end.
    pub stdin: bool,
}

/// Of a terminal, in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    pub cols: u32,
    pub rows: u32,
}

impl From<Size> for PTY {
    fn from(size: Size) -> Self {
        let size = pty::Size { cols: size.cols, rows: size.rows, ..Default::default() };
        Self { size: size.into(), ..Default::default() }
    }
}

/// One event of a running command.
#[derive(Debug, Clone, PartialEq)]
pub enum ExecEvent {
    /// `output_from`: how much the process has written before what follows, when the guest says it.
    Start {
        pid: u32,
        output_from: Option<u64>,
    },
    Stdout(Bytes),
    Stderr(Bytes),
    Pty(Bytes),
    End {
        exit_code: i32,
        exited: bool,
        status: String,
    },
    Keepalive,
}

/// A process that envd started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    pub pid: u32,
    pub tag: String,
    pub cmd: String,
    pub args: Vec<String>,
}

/// Which process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Select {
    Pid(u32),
    Tag(String),
}

impl From<Select> for ProcessSelector {
    fn from(select: Select) -> Self {
        let selector = match select {
            Select::Pid(pid) => Selector::Pid(pid),
            Select::Tag(tag) => Selector::Tag(tag),
        };
        Self { selector: Some(selector), ..Default::default() }
    }
}

/// The signals that may be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kill {
    Term,
    Kill,
}

/// The output of a process. Reading it is what takes more from the guest: a slow reader slows the command down and fills nothing.
pub struct ExecStream {
    guest: Arc<Guest>,
    inner: Inner,
    /// Where its output begins, until that was told.
    output_from: Option<u64>,
    end: Option<Instant>,
    ended: bool,
}

/// What two calls of the protocol answer: the same events in messages of two types.
enum Inner {
    Started(ServerStream<Incoming, StartResponseView<'static>>),
    Connected(ServerStream<Incoming, ConnectResponseView<'static>>),
}

impl Guest {
    /// Starts a command. The process lives on when the stream is dropped.
    pub async fn start(self: &Arc<Self>, command: Command) -> Result<ExecStream, GuestError> {
        // Held until the process is in the guest's own list.
        let _tag = self.claim_tag(&command.tag).await?;
        let mut options = CallOptions::default().with_header("keepalive-ping-interval", KEEPALIVE_SECONDS);
        if !command.user.is_empty() {
            options = options.with_header("authorization", basic(&command.user));
        }
        let mut end = None;
        if !command.timeout.is_zero() {
            // As a bare header, not as the client's own timeout: the guest kills the process at its end and says so; the host's timer is
            // later and only makes sure that the stream ends too.
            options = options.with_header("connect-timeout-ms", command.timeout.as_millis().to_string());
            end = Some(Instant::now() + command.timeout + TIMEOUT_GRACE);
        }
        let request = StartRequest {
            process: ProcessConfig {
                cmd: command.cmd,
                args: command.args,
                envs: command.envs.into_iter().collect(),
                cwd: Some(command.cwd).filter(|cwd| !cwd.is_empty()),
                ..Default::default()
            }
            .into(),
            pty: command.terminal.map(PTY::from).into(),
            tag: Some(command.tag).filter(|tag| !tag.is_empty()),
            stdin: Some(command.stdin),
            ..Default::default()
        };
        let client = self.process_streams();
        let work = async {
            match timeout(SILENCE_MAX, client.start_with_options(request, options)).await {
                Ok(answer) => Ok(answer?),
                Err(_) => Err(GuestError::Fault("no answer to a start".to_owned())),
            }
        };
        let inner = Inner::Started(self.alive(work).await?);
        Ok(ExecStream { guest: self.clone(), inner, output_from: Some(0), end, ended: false })
    }

    /// What is kept of a process's output from `output_from` on, and what comes. A process that ended a short while ago is known, too.
    pub async fn connect(self: &Arc<Self>, select: Select, output_from: u64) -> Result<ExecStream, GuestError> {
        let options = CallOptions::default()
            .with_header("keepalive-ping-interval", KEEPALIVE_SECONDS)
            .with_header(api::guest::OUTPUT_FROM_HEADER, output_from.to_string());
        let request = ConnectRequest { process: ProcessSelector::from(select).into(), ..Default::default() };
        let client = self.process_streams();
        let work = async {
            match timeout(SILENCE_MAX, client.connect_with_options(request, options)).await {
                Ok(answer) => Ok(answer?),
                Err(_) => Err(GuestError::Fault("no answer to a connect".to_owned())),
            }
        };
        let inner = self.alive(work).await?;
        let said = inner.headers().get(api::guest::OUTPUT_FROM_HEADER);
        let output_from = said.and_then(|value| value.to_str().ok()?.parse().ok());
        Ok(ExecStream { guest: self.clone(), inner: Inner::Connected(inner), output_from, end: None, ended: false })
    }

    fn process_streams(&self) -> ProcessClient<ServiceTransport<HttpClient>> {
        ProcessClient::new(self.transport(self.streaming()), self.config())
    }

    pub(super) fn process_calls(&self) -> ProcessClient<ServiceTransport<HttpClient>> {
        ProcessClient::new(self.transport(self.unary()), self.unary_config())
    }

    pub async fn processes(&self) -> Result<Vec<Process>, GuestError> {
        let client = self.process_calls();
        let answer = self.alive(async { Ok(client.list(ListRequest::default()).await?) }).await?;
        let list = answer.into_owned().processes;
        if list.len() > PROCESSES_MAX {
            return Err(GuestError::Fault("a list of processes without end".to_owned()));
        }
        Ok(list
            .into_iter()
            .map(|process| Process {
                pid: process.pid,
                tag: process.tag.clone().unwrap_or_default(),
                cmd: process.config.cmd.clone(),
                args: process.config.args.clone(),
            })
            .collect())
    }

    pub async fn signal(&self, select: Select, kill: Kill) -> Result<(), GuestError> {
        let signal = match kill {
            Kill::Term => Signal::SIGNAL_SIGTERM,
            Kill::Kill => Signal::SIGNAL_SIGKILL,
        };
        let process = ProcessSelector::from(select).into();
        let request = SendSignalRequest { process, signal: signal.into(), ..Default::default() };
        let client = self.process_calls();
        self.alive(async { Ok(client.send_signal(request).await?) }).await?;
        Ok(())
    }
}

impl ExecStream {
    /// The next event; None after the end. Not cancel-safe: drop the stream with the call.
    pub async fn next(&mut self) -> Result<Option<ExecEvent>, GuestError> {
        loop {
            if self.ended {
                return Ok(None);
            }
            let until = self.end.unwrap_or_else(|| Instant::now() + SILENCE_MAX).min(Instant::now() + SILENCE_MAX);
            let inner = &mut self.inner;
            let work = async {
                match timeout_at(until, inner.message()).await {
                    Ok(message) => Ok(message?),
                    Err(_) if self.end == Some(until) => Err(GuestError::Refused {
                        code: ErrorCode::DeadlineExceeded,
                        message: "the command's time is over".to_owned(),
                    }),
                    Err(_) => Err(GuestError::Fault("silence in the middle of a command's output".to_owned())),
                }
            };
            let message = self.guest.alive(work).await?;
            let Some(message) = message else {
                self.ended = true;
                // The protocol ends a stream cleanly only after `end`.
                return Err(GuestError::Fault("output that ends without an exit status".to_owned()));
            };
            if let Some(event) = self.event(message) {
                return Ok(Some(event));
            }
        }
    }

    fn event(&mut self, event: ProcessEvent) -> Option<ExecEvent> {
        match event.event {
            Some(Event::Start(start)) => {
                Some(ExecEvent::Start { pid: start.pid, output_from: self.output_from.take() })
            }
            Some(Event::Data(data)) => match data.output {
                Some(Output::Stdout(bytes)) if !bytes.is_empty() => Some(ExecEvent::Stdout(bytes.into())),
                Some(Output::Stderr(bytes)) if !bytes.is_empty() => Some(ExecEvent::Stderr(bytes.into())),
                Some(Output::Pty(bytes)) if !bytes.is_empty() => Some(ExecEvent::Pty(bytes.into())),
                // Empty pieces say nothing.
                _ => None,
            },
            Some(Event::End(end)) => {
                self.ended = true;
                Some(ExecEvent::End { exit_code: end.exit_code, exited: end.exited, status: printable(&end.status) })
            }
            Some(Event::Keepalive(_)) => Some(ExecEvent::Keepalive),
            None => None,
        }
    }
}

impl Inner {
    /// None when the guest has ended the stream; an event without contents is nothing that this host knows.
    async fn message(&mut self) -> Result<Option<ProcessEvent>, ConnectError> {
        let event = match self {
            Self::Started(stream) => stream.message().await?.map(|message| message.to_owned_message().event),
            Self::Connected(stream) => stream.message().await?.map(|message| message.to_owned_message().event),
        };
        Ok(event.map(|event| event.into_option().unwrap_or_default()))
    }
}

/// The user in the form that envd reads.
pub(super) fn basic(user: &str) -> String {
    format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(format!("{user}:")))
}
