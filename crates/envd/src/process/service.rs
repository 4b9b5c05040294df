//! `process.Process`, as published clients speak it.

use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use api::guest::OUTPUT_FROM_HEADER;
use api::guest::process as wire;
use api::guest::process::process_event::{DataEvent, EndEvent, KeepAlive, StartEvent};
use connectrpc::{ConnectError, RequestContext, Response, ServiceRequest, ServiceResult, ServiceStream, StreamMessage};
use futures::StreamExt as _;
use http::HeaderMap;
use tokio::time::Instant;
use wire::__buffa::oneof::process_event::Event as WireEvent;
use wire::__buffa::oneof::process_event::data_event::Output;
use wire::__buffa::oneof::process_input::Input;
use wire::__buffa::oneof::process_selector::Selector;
use wire::__buffa::oneof::stream_input_request::Event as InputEvent;

use super::child::Child;
use super::input::NotTaken;
use super::output::{Channel, Ended, Event, Listener};
use super::spawn::{self, Plan};
use super::starter::{NotStarted, Progress};
use super::table::{Newborn, Process};
use crate::console::say;
use crate::freezer::Group;
use crate::server::Guest;
use crate::users;

/// Seconds, when the client does not ask for another interval.
const KEEPALIVE_DEFAULT: u64 = 90;
const KEEPALIVE_HEADER: &str = "keepalive-ping-interval";
const TERMINAL_DEFAULT: (u16, u16) = (24, 80);

pub struct Service {
    guest: Arc<Guest>,
}

impl Service {
    pub fn new(guest: Arc<Guest>) -> Self {
        Self { guest }
    }

    fn find(&self, selector: Option<&wire::ProcessSelector>) -> Result<Arc<Process>, ConnectError> {
        match selector.and_then(|selector| selector.selector.as_ref()) {
            Some(Selector::Pid(pid)) => self
                .guest
                .table
                .by_pid(*pid)
                .ok_or_else(|| ConnectError::not_found(format!("process with pid {pid} not found"))),
            Some(Selector::Tag(tag)) => {
                self.guest.table.by_tag(tag).ok_or_else(|| ConnectError::not_found("process with this tag not found"))
            }
            None => Err(ConnectError::invalid_argument("process: pid or tag is missing")),
        }
    }

    /// A running process, for what needs one.
    fn find_running(&self, selector: Option<&wire::ProcessSelector>) -> Result<Arc<Process>, ConnectError> {
        let process = self.find(selector)?;
        if process.has_ended() { Err(ConnectError::not_found("the process has ended")) } else { Ok(process) }
    }
}

impl wire::Process for Service {
    async fn list(
        &self,
        _: RequestContext,
        _: ServiceRequest<'_, wire::ListRequest>,
    ) -> ServiceResult<wire::ListResponse> {
        let running = self.guest.table.running();
        let processes = running.iter().filter_map(|process| {
            let (config, tag) = (process.config()?.into(), process.tag.clone());
            Some(wire::ProcessInfo { config, pid: process.pid, tag, ..Default::default() })
        });
        Response::ok(wire::ListResponse { processes: processes.collect(), ..Default::default() })
    }

    async fn start(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, wire::StartRequest>,
    ) -> ServiceResult<ServiceStream<wire::StartResponse>> {
        let request = request.to_owned_message();
        let config =
            request.process.into_option().ok_or_else(|| ConnectError::invalid_argument("process is missing"))?;
        let birth = Birth {
            guest: self.guest.clone(),
            headers: ctx.headers().clone(),
            config,
            terminal: request.pty.into_option(),
            tag: request.tag,
            stdin: request.stdin.unwrap_or(true),
            deadline: ctx.deadline().map(Into::into),
        };
        let deadline = birth.deadline.map_or(Deadline::None, Deadline::Kills);
        // A task of its own: a process that was started is known, and ends at its time, whoever gives up the request.
        let born = tokio::spawn(birth.give()).await;
        let (process, listener) = born.map_err(|_| ConnectError::internal("the start panicked"))??;
        let stream = events_of(&process, listener, keepalive(&ctx), deadline);
        let stream =
            stream.map(|event| event.map(|event| wire::StartResponse { event: event.into(), ..Default::default() }));
        Ok(Response::stream(stream))
    }

    async fn connect(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, wire::ConnectRequest>,
    ) -> ServiceResult<ServiceStream<wire::ConnectResponse>> {
        let request = request.to_owned_message();
        let process = self.find(request.process.as_option())?;
        let from = ctx.header(OUTPUT_FROM_HEADER).and_then(|value| value.to_str().ok()?.parse().ok()).unwrap_or(0);
        let listener = process.listen(from);
        let begins = listener.from;
        let deadline = ctx.deadline().map_or(Deadline::None, |deadline| Deadline::Parts(deadline.into()));
        let stream = events_of(&process, listener, keepalive(&ctx), deadline);
        let stream =
            stream.map(|event| event.map(|event| wire::ConnectResponse { event: event.into(), ..Default::default() }));
        Ok(Response::stream(stream).with_header(OUTPUT_FROM_HEADER, begins.to_string()))
    }

    async fn update(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, wire::UpdateRequest>,
    ) -> ServiceResult<wire::UpdateResponse> {
        let request = request.to_owned_message();
        let process = self.find_running(request.process.as_option())?;
        if let Some(size) = request.pty.into_option().and_then(|pty| pty.size.into_option()) {
            let terminal = process
                .terminal
                .as_ref()
                .ok_or_else(|| ConnectError::failed_precondition("the process has no terminal"))?;
            let (rows, columns) = terminal_size(&size);
            terminal.resize(rows, columns).map_err(|e| ConnectError::internal(format!("resize: {e}")))?;
        }
        Response::ok(wire::UpdateResponse::default())
    }

    async fn stream_input(
        &self,
        _: RequestContext,
        mut requests: ServiceStream<StreamMessage<wire::StreamInputRequest>>,
    ) -> ServiceResult<wire::StreamInputResponse> {
        let mut target = None;
        while let Some(request) = requests.next().await {
            match request?.to_owned_message().event {
                Some(InputEvent::Start(start)) => target = Some(self.find_running(start.process.as_option())?),
                Some(InputEvent::Data(data)) => {
                    let process =
                        target.as_ref().ok_or_else(|| ConnectError::failed_precondition("input before start"))?;
                    write(process, data.input.into_option()).await?;
                }
                Some(InputEvent::Keepalive(_)) | None => {}
            }
        }
        Response::ok(wire::StreamInputResponse::default())
    }

    async fn send_input(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, wire::SendInputRequest>,
    ) -> ServiceResult<wire::SendInputResponse> {
        let request = request.to_owned_message();
        let process = self.find_running(request.process.as_option())?;
        write(&process, request.input.into_option()).await?;
        Response::ok(wire::SendInputResponse::default())
    }

    async fn send_signal(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, wire::SendSignalRequest>,
    ) -> ServiceResult<wire::SendSignalResponse> {
        let request = request.to_owned_message();
        let process = self.find_running(request.process.as_option())?;
        let signal = match request.signal.as_known() {
            Some(wire::Signal::SIGNAL_SIGKILL) => libc::SIGKILL,
            Some(wire::Signal::SIGNAL_SIGTERM) => libc::SIGTERM,
            _ => return Err(ConnectError::invalid_argument("signal must be SIGNAL_SIGKILL or SIGNAL_SIGTERM")),
        };
        process.signal(signal).map_err(|e| ConnectError::internal(format!("signal: {e}")))?;
        Response::ok(wire::SendSignalResponse::default())
    }

    async fn close_stdin(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, wire::CloseStdinRequest>,
    ) -> ServiceResult<wire::CloseStdinResponse> {
        let request = request.to_owned_message();
        let process = self.find_running(request.process.as_option())?;
        if process.terminal.is_some() {
            return Err(ConnectError::failed_precondition("a terminal's input cannot be closed; send it ^D"));
        }
        // Closing twice, or what was never open, is fine.
        if let Some(stdin) = &process.stdin {
            stdin.close().await.map_err(not_taken)?;
        }
        Response::ok(wire::CloseStdinResponse::default())
    }
}

/// A process on its way into the world.
struct Birth {
    guest: Arc<Guest>,
    headers: HeaderMap,
    config: wire::ProcessConfig,
    terminal: Option<wire::PTY>,
    tag: Option<String>,
    stdin: bool,
    deadline: Option<Instant>,
}

impl Birth {
    async fn give(self) -> Result<(Arc<Process>, Listener), ConnectError> {
        let Self { guest, headers, config, terminal, tag, stdin, deadline } = self;
        let place = guest
            .table
            .place()
            .ok_or_else(|| ConnectError::resource_exhausted("as many processes run as this sandbox can have"))?;
        // Nothing that follows is to happen in a guest that is being saved.
        let _start = guest.quiet.start().await;
        let work = {
            let guest = guest.clone();
            move |progress: &Progress| beget(&guest, &headers, config, terminal, stdin, progress)
        };
        let (config, child, pty, group) = guest.starter.run(work).await.map_err(|e| match e {
            NotStarted::Thread(_) => ConnectError::resource_exhausted(format!("the sandbox cannot start it: {e}")),
            NotStarted::Hangs => ConnectError::unavailable(e.to_string()),
            NotStarted::Panicked => ConnectError::internal(e.to_string()),
        })??;
        let newborn = Newborn { child, config, tag, pty, group };
        let (process, listener) = guest.table.adopt(newborn, place);
        if let Some(deadline) = deadline {
            end_at(deadline, process.clone());
        }
        Ok((process, listener))
    }
}

type Born = (wire::ProcessConfig, Child, Option<(pty_process::Pty, OwnedFd)>, Option<Group>);

/// On the starting thread: all that may wait for a disk or a mount.
fn beget(
    guest: &Guest,
    headers: &HeaderMap,
    config: wire::ProcessConfig,
    terminal: Option<wire::PTY>,
    stdin: bool,
    progress: &Progress,
) -> Result<Born, ConnectError> {
    let session = &guest.session;
    let account = users::of_request(headers, &session.default_user())
        .map_err(|e| ConnectError::unauthenticated(e.to_string()))?;
    let asked = config.cwd.as_deref().unwrap_or_default();
    let mut envs = Plan::environment(&account, &session.envs(), config.envs.clone());
    if terminal.is_some() {
        envs.entry("TERM".to_owned()).or_insert_with(|| "xterm-256color".to_owned());
    }
    let plan = Plan {
        program: config.cmd.clone(),
        arguments: config.args.clone(),
        envs,
        cwd: spawn::resolve(asked, &account, &session.default_workdir()),
        cwd_asked: !asked.is_empty(),
        account,
        stdin,
    };
    plan.check()?;
    let group = guest.freezer.group().map_err(|e| {
        ConnectError::resource_exhausted(format!("the sandbox cannot start another process: control group: {e}"))
    })?;
    let Some(terminal) = terminal else {
        let child = spawn::spawn(&plan, group.as_ref(), None, progress)?;
        return Ok((config, child, None, group));
    };
    let failed = |e: pty_process::Error| ConnectError::resource_exhausted(format!("open a terminal: {e}"));
    let (pty, pts) = pty_process::open().map_err(failed)?;
    let (rows, columns) = terminal_size(&terminal.size.into_option().unwrap_or_default());
    pty.resize(pty_process::Size::new(rows, columns)).map_err(failed)?;
    let master = pty.as_fd().try_clone_to_owned().map_err(|e| failed(e.into()))?;
    let child = spawn::spawn(&plan, group.as_ref(), Some(&pts), progress)?;
    Ok((config, child, Some((pty, master)), group))
}

async fn write(process: &Process, input: Option<wire::ProcessInput>) -> Result<(), ConnectError> {
    let (to, bytes) = match input.and_then(|input| input.input) {
        Some(Input::Stdin(bytes)) => (process.stdin.as_ref(), bytes),
        Some(Input::Pty(bytes)) => (process.terminal.as_ref().map(|terminal| &terminal.input), bytes),
        None => return Err(ConnectError::invalid_argument("input is missing")),
    };
    to.ok_or_else(|| not_taken(NotTaken::Closed))?.give(bytes).await.map_err(not_taken)
}

fn not_taken(why: NotTaken) -> ConnectError {
    match why {
        NotTaken::Closed => ConnectError::failed_precondition(why.to_string()),
        NotTaken::Late => ConnectError::deadline_exceeded(why.to_string()),
    }
}

fn keepalive(ctx: &RequestContext) -> Duration {
    let asked = ctx.header(KEEPALIVE_HEADER).and_then(|value| value.to_str().ok()?.parse().ok());
    Duration::from_secs(asked.filter(|seconds| (1..=3600).contains(seconds)).unwrap_or(KEEPALIVE_DEFAULT))
}

/// Rows and columns.
fn terminal_size(size: &wire::pty::Size) -> (u16, u16) {
    // Clamped, never cut: 65536 columns are not zero columns.
    let clamp = |asked: u32, default: u16| match asked {
        0 => default,
        asked => u16::try_from(asked).unwrap_or(u16::MAX).min(1000),
    };
    (clamp(size.rows, TERMINAL_DEFAULT.0), clamp(size.cols, TERMINAL_DEFAULT.1))
}

/// The caller's time is the process's life.
fn end_at(deadline: Instant, process: Arc<Process>) {
    tokio::spawn(async move {
        let early = tokio::time::timeout_at(deadline, process.wait()).await;
        if early.is_err()
            && let Err(e) = process.signal(libc::SIGKILL)
        {
            say(format_args!("kill {} at its deadline: {e}", process.pid));
        }
    });
}

/// What happens when the caller's time is over.
#[derive(Clone, Copy)]
enum Deadline {
    None,
    /// The process ends, which somebody else sees to; its stream says why.
    Kills(Instant),
    /// The stream ends and the process goes on.
    Parts(Instant),
}

struct Events {
    listener: Listener,
    first: Option<u32>,
    keepalive: Duration,
    deadline: Deadline,
    over: bool,
}

/// `start`, then output, then `end`; `keepalive` when nothing else was said for so long.
fn events_of(
    process: &Process,
    listener: Listener,
    keepalive: Duration,
    deadline: Deadline,
) -> impl futures::Stream<Item = Result<wire::ProcessEvent, ConnectError>> + Send + use<> {
    let events = Events { listener, first: Some(process.pid), keepalive, deadline, over: false };
    futures::stream::unfold(events, |mut events| async move {
        if events.over {
            return None;
        }
        if let Some(pid) = events.first.take() {
            return Some((Ok(event(StartEvent { pid, ..Default::default() }.into())), events));
        }
        let silence = Instant::now() + events.keepalive;
        let (until, parts) = match events.deadline {
            Deadline::Parts(at) => (at.min(silence), at <= silence),
            _ => (silence, false),
        };
        // Output without end must not hide the end of the caller's time.
        let heard = match events.deadline {
            Deadline::Parts(at) if at <= Instant::now() => None,
            _ => tokio::time::timeout_at(until, events.listener.hear()).await.ok(),
        };
        match heard.ok_or(()) {
            Err(()) if parts => {
                events.over = true;
                Some((Err(ConnectError::deadline_exceeded("the time for listening to the process is over")), events))
            }
            Err(()) => Some((Ok(event(KeepAlive::default().into())), events)),
            Ok(Some(Event::Data(channel, bytes))) => {
                let output = match channel {
                    Channel::Stdout => Output::Stdout(bytes.into()),
                    Channel::Stderr => Output::Stderr(bytes.into()),
                    Channel::Pty => Output::Pty(bytes.into()),
                };
                Some((Ok(event(DataEvent { output: Some(output), ..Default::default() }.into())), events))
            }
            Ok(Some(Event::End(ended))) => {
                events.over = true;
                let killed = ended.signal == Some("killed");
                if killed && matches!(events.deadline, Deadline::Kills(at) if at <= Instant::now()) {
                    return Some((
                        Err(ConnectError::deadline_exceeded("the command ran out of its time and was killed")),
                        events,
                    ));
                }
                Some((Ok(event(end_event(&ended).into())), events))
            }
            Ok(None) => {
                events.over = true;
                Some((
                    Err(ConnectError::resource_exhausted(
                        "this client read too slowly while others read the same output",
                    )),
                    events,
                ))
            }
        }
    })
}

fn event(event: WireEvent) -> wire::ProcessEvent {
    wire::ProcessEvent { event: Some(event), ..Default::default() }
}

fn end_event(ended: &Ended) -> EndEvent {
    let status = match ended.signal {
        Some(signal) => format!("signal: {signal}"),
        None => format!("exit status {}", ended.code),
    };
    let error = (ended.code != 0).then(|| status.clone());
    EndEvent { exit_code: ended.code, exited: ended.signal.is_none(), status, error, ..Default::default() }
}
