//! Processes in the guest: start with its stream, list, signal.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use api::guest::process::__buffa::oneof::process_event::{Event, data_event::Output};
use api::guest::process::__buffa::oneof::process_selector::Selector;
use api::guest::process::__buffa::view::StartResponseView;
use api::guest::process::{
    ListRequest, ProcessClient, ProcessConfig, ProcessSelector, SendSignalRequest, Signal, StartRequest, StartResponse,
};
use base64::Engine as _;
use bytes::Bytes;
use connectrpc::ErrorCode;
use connectrpc::client::{CallOptions, ServerStream};
use tokio::time::{Instant, timeout, timeout_at};

use super::faults::printable;
use super::{Guest, GuestError};

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
}

/// One event of a running command.
#[derive(Debug, Clone, PartialEq)]
pub enum ExecEvent {
    Start { pid: u32 },
    Stdout(Bytes),
    Stderr(Bytes),
    End { exit_code: i32, exited: bool, status: String },
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

/// The signals that may be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kill {
    Term,
    Kill,
}

/// The output of a command. Reading it is what takes more from the guest: a slow reader slows the command down and fills nothing.
pub struct ExecStream {
    guest: Arc<Guest>,
    inner: ServerStream<hyper::body::Incoming, StartResponseView<'static>>,
    end: Option<Instant>,
    ended: bool,
}

impl Guest {
    /// Starts a command. The process lives on when the stream is dropped.
    pub async fn start(self: &Arc<Self>, command: Command) -> Result<ExecStream, GuestError> {
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
            tag: Some(command.tag).filter(|tag| !tag.is_empty()),
            stdin: Some(false),
            ..Default::default()
        };
        let client = ProcessClient::new(self.transport(self.streaming()), self.config());
        let work = async {
            match timeout(SILENCE_MAX, client.start_with_options(request, options)).await {
                Ok(answer) => Ok(answer?),
                Err(_) => Err(GuestError::Fault("no answer to a start".to_owned())),
            }
        };
        let inner = self.alive(work).await?;
        Ok(ExecStream { guest: self.clone(), inner, end, ended: false })
    }

    pub async fn processes(&self) -> Result<Vec<Process>, GuestError> {
        let client = ProcessClient::new(self.transport(self.unary()), self.unary_config());
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
        let selector = match select {
            Select::Pid(pid) => Selector::Pid(pid),
            Select::Tag(tag) => Selector::Tag(tag),
        };
        let signal = match kill {
            Kill::Term => Signal::SIGNAL_SIGTERM,
            Kill::Kill => Signal::SIGNAL_SIGKILL,
        };
        let request = SendSignalRequest {
            process: ProcessSelector { selector: Some(selector), ..Default::default() }.into(),
            signal: signal.into(),
            ..Default::default()
        };
        let client = ProcessClient::new(self.transport(self.unary()), self.unary_config());
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
            if let Some(event) = self.event(message.to_owned_message())? {
                return Ok(Some(event));
            }
        }
    }

    fn event(&mut self, message: StartResponse) -> Result<Option<ExecEvent>, GuestError> {
        let event = message.event.into_option().and_then(|event| event.event);
        Ok(match event {
            Some(Event::Start(start)) => Some(ExecEvent::Start { pid: start.pid }),
            Some(Event::Data(data)) => match data.output {
                Some(Output::Stdout(bytes)) if !bytes.is_empty() => Some(ExecEvent::Stdout(bytes.into())),
                Some(Output::Stderr(bytes)) if !bytes.is_empty() => Some(ExecEvent::Stderr(bytes.into())),
                // Without a terminal there is no terminal output; empty pieces say nothing.
                _ => None,
            },
            Some(Event::End(end)) => {
                self.ended = true;
                Some(ExecEvent::End { exit_code: end.exit_code, exited: end.exited, status: printable(&end.status) })
            }
            Some(Event::Keepalive(_)) => Some(ExecEvent::Keepalive),
            None => None,
        })
    }
}

/// The user in the form that envd reads.
pub(super) fn basic(user: &str) -> String {
    format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(format!("{user}:")))
}
