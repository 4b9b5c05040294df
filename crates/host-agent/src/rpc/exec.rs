//! Output of processes in a sandbox, relayed: of a command that is started, and of one that was. The stream takes from the guest only what
//! the control plane has taken from it.
//!
//! A command that somebody waits for keeps its sandbox in use. A terminal, and whoever only listens, do so with each piece that comes: one
//! that was left open must not keep a sandbox from being idle for ever.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use api::host::__buffa::oneof::exec_response::Event;
use api::host::{
    CHUNK_BYTES, ConnectProcessRequest, ExecEnd, ExecKeepalive, ExecRequest, ExecResponse, ExecStart,
    StartProcessResponse,
};
use bytes::Bytes;
use connectrpc::ConnectError;
use futures::{Stream, stream};

use super::streams::Permit;
use super::{errors, processes};
use crate::guest::{Command, ExecEvent, ExecStream, Guest};

pub async fn exec(
    guest: Arc<Guest>,
    permit: Permit,
    request: ExecRequest,
) -> Result<impl Stream<Item = Result<ExecResponse, ConnectError>> + Send + 'static, ConnectError> {
    let output = guest.start(command(request)?).await.map_err(errors::guest)?;
    guest.touch();
    Ok(relayed(Relay { guest, output, pending: VecDeque::new(), _permit: permit }))
}

pub async fn connect(
    guest: Arc<Guest>,
    permit: Permit,
    request: ConnectProcessRequest,
) -> Result<impl Stream<Item = Result<ExecResponse, ConnectError>> + Send + 'static, ConnectError> {
    let select = processes::select(request.process.into_option())?;
    let output = guest.connect(select, request.output_from).await.map_err(errors::guest)?;
    guest.touch();
    Ok(relayed(Relay { guest, output, pending: VecDeque::new(), _permit: permit }))
}

/// Answers when it runs; nobody listens then.
pub async fn start(guest: &Arc<Guest>, request: ExecRequest) -> Result<StartProcessResponse, ConnectError> {
    let tag = request.tag.clone();
    let mut output = guest.start(command(request)?).await.map_err(errors::guest)?;
    loop {
        match output.next().await.map_err(errors::guest)? {
            Some(ExecEvent::Start { pid, .. }) => {
                return Ok(StartProcessResponse { pid, tag, ..Default::default() });
            }
            Some(_) => {}
            None => return Err(ConnectError::new(api::host::GUEST_FAULT, "a process without a start")),
        }
    }
}

fn command(request: ExecRequest) -> Result<Command, ConnectError> {
    if request.cmd.is_empty() {
        return Err(ConnectError::invalid_argument("cmd is empty"));
    }
    Ok(Command {
        cmd: request.cmd,
        args: request.args,
        envs: request.envs.into_iter().collect(),
        cwd: request.cwd,
        user: request.user,
        timeout: Duration::from_millis(u64::from(request.timeout_ms)),
        tag: request.tag,
        terminal: request.terminal.into_option().map(processes::size).transpose()?,
        stdin: request.stdin,
    })
}

struct Relay {
    guest: Arc<Guest>,
    output: ExecStream,
    /// Pieces of one large message of the guest.
    pending: VecDeque<Event>,
    _permit: Permit,
}

fn relayed(relay: Relay) -> impl Stream<Item = Result<ExecResponse, ConnectError>> + Send + 'static {
    stream::unfold(Some(relay), |relay| async move {
        let mut relay = relay?;
        match relay.next().await {
            Ok(Some(event)) => Some((Ok(event), Some(relay))),
            Ok(None) => None,
            Err(error) => Some((Err(error), None)),
        }
    })
}

impl Relay {
    async fn next(&mut self) -> Result<Option<ExecResponse>, ConnectError> {
        if self.pending.is_empty() {
            let Some(event) = self.output.next().await.map_err(errors::guest)? else { return Ok(None) };
            if event != ExecEvent::Keepalive {
                self.guest.touch();
            }
            match event {
                ExecEvent::Start { pid, output_from } => {
                    self.pending.push_back(ExecStart { pid, output_from, ..Default::default() }.into());
                }
                ExecEvent::Stdout(bytes) => self.pending.extend(pieces(bytes).map(Event::Stdout)),
                ExecEvent::Stderr(bytes) => self.pending.extend(pieces(bytes).map(Event::Stderr)),
                ExecEvent::Pty(bytes) => self.pending.extend(pieces(bytes).map(Event::Pty)),
                ExecEvent::End { exit_code, exited, status } => {
                    self.pending.push_back(ExecEnd { exit_code, exited, status, ..Default::default() }.into());
                }
                ExecEvent::Keepalive => self.pending.push_back(ExecKeepalive::default().into()),
            }
        }
        Ok(self.pending.pop_front().map(|event| ExecResponse { event: Some(event), ..Default::default() }))
    }
}

fn pieces(bytes: Bytes) -> impl Iterator<Item = Vec<u8>> {
    let count = bytes.len().div_ceil(CHUNK_BYTES);
    (0..count).map(move |i| bytes[i * CHUNK_BYTES..bytes.len().min((i + 1) * CHUNK_BYTES)].to_vec())
}
