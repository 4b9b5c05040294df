//! Processes in a sandbox, relayed. The stream takes from the guest only what the control plane has taken from it.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use api::host::__buffa::oneof::exec_response::Event;
use api::host::__buffa::oneof::signal_process_request::Selector;
use api::host::{
    CHUNK_BYTES, ExecEnd, ExecKeepalive, ExecRequest, ExecResponse, ExecStart, ListProcessesResponse, Process,
    SignalProcessRequest,
};
use bytes::Bytes;
use connectrpc::ConnectError;
use futures::{Stream, stream};

use super::errors;
use super::streams::Permit;
use crate::guest::{Command, ExecEvent, ExecStream, Guest, Kill, Select};

pub async fn exec(
    guest: Arc<Guest>,
    permit: Permit,
    request: ExecRequest,
) -> Result<impl Stream<Item = Result<ExecResponse, ConnectError>> + Send + 'static, ConnectError> {
    if request.cmd.is_empty() {
        return Err(ConnectError::invalid_argument("cmd is empty"));
    }
    let command = Command {
        cmd: request.cmd,
        args: request.args,
        envs: request.envs.into_iter().collect(),
        cwd: request.cwd,
        user: request.user,
        timeout: Duration::from_millis(u64::from(request.timeout_ms)),
        tag: request.tag,
    };
    let output = guest.start(command).await.map_err(errors::guest)?;
    Ok(stream::unfold(Some(Relay { output, pending: VecDeque::new(), _permit: permit }), |relay| async move {
        let mut relay = relay?;
        match relay.next().await {
            Ok(Some(event)) => Some((Ok(event), Some(relay))),
            Ok(None) => None,
            Err(error) => Some((Err(error), None)),
        }
    }))
}

struct Relay {
    output: ExecStream,
    /// Pieces of one large message of the guest.
    pending: VecDeque<Event>,
    _permit: Permit,
}

impl Relay {
    async fn next(&mut self) -> Result<Option<ExecResponse>, ConnectError> {
        if self.pending.is_empty() {
            let Some(event) = self.output.next().await.map_err(errors::guest)? else { return Ok(None) };
            match event {
                ExecEvent::Start { pid } => self.pending.push_back(ExecStart { pid, ..Default::default() }.into()),
                ExecEvent::Stdout(bytes) => self.pending.extend(pieces(bytes).map(Event::Stdout)),
                ExecEvent::Stderr(bytes) => self.pending.extend(pieces(bytes).map(Event::Stderr)),
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

pub async fn list(guest: &Guest) -> Result<ListProcessesResponse, ConnectError> {
    let processes = guest.processes().await.map_err(errors::guest)?;
    let processes = processes
        .into_iter()
        .map(|process| Process {
            pid: process.pid,
            tag: process.tag,
            cmd: process.cmd,
            args: process.args,
            ..Default::default()
        })
        .collect();
    Ok(ListProcessesResponse { processes, ..Default::default() })
}

pub async fn signal(guest: &Guest, request: SignalProcessRequest) -> Result<(), ConnectError> {
    let kill = match request.signal.as_str() {
        "SIGTERM" => Kill::Term,
        "SIGKILL" => Kill::Kill,
        _ => return Err(ConnectError::invalid_argument("signal is neither SIGTERM nor SIGKILL")),
    };
    let select = match request.selector {
        Some(Selector::Pid(pid)) => Select::Pid(pid),
        Some(Selector::Tag(tag)) => Select::Tag(tag),
        None => return Err(ConnectError::invalid_argument("neither pid nor tag is given")),
    };
    guest.signal(select, kill).await.map_err(errors::guest)
}
