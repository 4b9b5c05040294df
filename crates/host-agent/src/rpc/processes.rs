//! Processes that run in a sandbox: which there are, what they are told.

use api::host::__buffa::oneof::process_selector::Selector;
use api::host::__buffa::oneof::send_input_request::Input as WireInput;
use api::host::__buffa::oneof::signal_process_request::Selector as SignalSelector;
use api::host::{
    CloseStdinRequest, ListProcessesResponse, Process, ProcessSelector, ResizeTerminalRequest, SendInputRequest,
    SignalProcessRequest, TerminalSize,
};
use connectrpc::ConnectError;

use super::errors;
use crate::guest::{Guest, Input, Kill, Select, Size};

/// Columns and rows of a terminal: larger ones are nobody's screen, and programs take memory for each character.
const SIDE_MAX: u32 = 1000;

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
        Some(SignalSelector::Pid(pid)) => Select::Pid(pid),
        Some(SignalSelector::Tag(tag)) => Select::Tag(tag),
        None => return Err(unselected()),
    };
    guest.signal(select, kill).await.map_err(errors::guest)
}

pub async fn send_input(guest: &Guest, request: SendInputRequest) -> Result<(), ConnectError> {
    let select = select(request.process.into_option())?;
    let input = match request.input {
        Some(WireInput::Stdin(bytes)) => Input::Stdin(bytes),
        Some(WireInput::Pty(bytes)) => Input::Terminal(bytes),
        None => return Err(ConnectError::invalid_argument("input is missing")),
    };
    guest.send_input(select, input).await.map_err(errors::guest)
}

pub async fn close_stdin(guest: &Guest, request: CloseStdinRequest) -> Result<(), ConnectError> {
    guest.close_stdin(select(request.process.into_option())?).await.map_err(errors::guest)
}

pub async fn resize(guest: &Guest, request: ResizeTerminalRequest) -> Result<(), ConnectError> {
    let select = select(request.process.into_option())?;
    let size = request.size.into_option().ok_or_else(|| ConnectError::invalid_argument("size is missing"))?;
    guest.resize(select, self::size(size)?).await.map_err(errors::guest)
}

pub fn select(selector: Option<ProcessSelector>) -> Result<Select, ConnectError> {
    match selector.and_then(|process| process.selector) {
        Some(Selector::Pid(pid)) => Ok(Select::Pid(pid)),
        Some(Selector::Tag(tag)) => Ok(Select::Tag(tag)),
        None => Err(unselected()),
    }
}

pub fn size(size: TerminalSize) -> Result<Size, ConnectError> {
    let sides = 1..=SIDE_MAX;
    if !sides.contains(&size.cols) || !sides.contains(&size.rows) {
        return Err(ConnectError::invalid_argument(format!("cols and rows of a terminal are from 1 to {SIDE_MAX}")));
    }
    Ok(Size { cols: size.cols, rows: size.rows })
}

fn unselected() -> ConnectError {
    ConnectError::invalid_argument("neither pid nor tag is given")
}
