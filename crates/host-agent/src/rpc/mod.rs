//! `HostAgentService`: what the control plane may ask of this host. Every caller has shown a client certificate of the platform's
//! authority with the control plane's name (`serve`); nothing here checks users or teams, which the control plane has done.
//!
//! State changes are tasks of their own (`sandbox`), so a dropped call changes nothing.

mod answers;
mod entries;
mod errors;
mod exec;
mod files;
mod gauges;
mod host;
mod processes;
pub mod serve;
mod streams;

use std::sync::Arc;
use std::time::Duration;

use api::host::{
    CloseStdinRequest, CloseStdinResponse, ConnectProcessRequest, EnsureKilledRequest, EnsureKilledResponse,
    EnsurePausedRequest, EnsurePausedResponse, EnsureRunningRequest, EnsureRunningResponse, EnsureSnapshotRequest,
    EnsureSnapshotResponse, ExecRequest, ExecResponse, GetConsoleRequest, GetConsoleResponse, GetHostRequest,
    GetHostResponse, GetMetricsRequest, GetMetricsResponse, GetSandboxRequest, GetSandboxResponse, HostAgentService,
    ListFilesRequest, ListFilesResponse, ListProcessesRequest, ListProcessesResponse, ListSandboxesRequest,
    ListSandboxesResponse, MakeDirectoryRequest, MakeDirectoryResponse, MoveFileRequest, MoveFileResponse,
    ReadFileRequest, ReadFileResponse, RemoveFileRequest, RemoveFileResponse, RemoveSnapshotRequest,
    RemoveSnapshotResponse, ResizeTerminalRequest, ResizeTerminalResponse, SandboxState, SendInputRequest,
    SendInputResponse, SignalProcessRequest, SignalProcessResponse, StartProcessResponse, StatFileRequest,
    StatFileResponse, WriteFileRequest, WriteFileResponse,
};
use connectrpc::{
    ConnectError, Encodable, InboundStream, RequestContext, Response, ServiceRequest, ServiceResult, ServiceStream,
};
use model::ids::SandboxId;
use model::sandbox::Kept;
use tokio::time::Instant;

use crate::agent::Agent;
use crate::guest::Guest;
use crate::heartbeat::Link;
use crate::sandbox::console;
use crate::sandbox::state::View;
use streams::{Permit, Streams};

/// How long an "ensure" waits when the caller gives no deadline.
const ENSURE_TIME_DEFAULT: Duration = Duration::from_secs(60);
/// So much before the caller's deadline the present state is answered, so that it arrives in time.
const ANSWER_EARLIER: Duration = Duration::from_millis(100);

pub struct Service {
    agent: Arc<Agent>,
    streams: Streams,
}

impl Service {
    pub fn new(agent: Arc<Agent>) -> Self {
        Self { agent, streams: Streams::new() }
    }

    fn id(&self, text: &str) -> Result<SandboxId, ConnectError> {
        text.parse().map_err(|_| ConnectError::invalid_argument("sandbox_id is not a sandbox id"))
    }

    /// Before the start-up scan is done nothing can be said of a sandbox that is not found.
    fn ready(&self) -> Result<(), ConnectError> {
        if self.agent.sandboxes.is_complete() {
            return Ok(());
        }
        Err(errors::not_ready("the agent still takes up what it had before its start"))
    }

    /// Where another machine may be this host, nothing is begun or ended; nor before the control plane has said that it is none.
    fn acts(&self) -> Result<(), ConnectError> {
        self.ready()?;
        match *self.agent.link.borrow() {
            Link::Fenced(_) => Err(errors::not_ready("this host is fenced: another machine may be it")),
            Link::Unknown | Link::Unheard(_) => {
                Err(errors::not_ready("the control plane has not yet heard of this start of the agent"))
            }
            Link::Attached | Link::Detached(_) => Ok(()),
        }
    }

    fn guest(&self, id: &str) -> Result<Arc<Guest>, ConnectError> {
        let id = self.id(id)?;
        match self.agent.sandboxes.guest(&id) {
            Ok(guest) => Ok(guest),
            Err(Some(observed)) => Err(errors::not_running(observed)),
            Err(None) => {
                self.ready()?;
                Err(errors::unknown_sandbox())
            }
        }
    }

    async fn state(&self, view: &View) -> SandboxState {
        self.agent.state(view, &self.agent.kernel_version().await)
    }

    /// For a stream: the guest, and room for it.
    fn streaming(&self, id: &str) -> Result<(Arc<Guest>, Permit), ConnectError> {
        let guest = self.guest(id)?;
        let permit = self.streams.admit(&guest)?;
        Ok((guest, permit))
    }

    /// As [`Self::streaming`], for a stream that is use only while something comes by it.
    fn listening(&self, id: &str) -> Result<(Arc<Guest>, Permit), ConnectError> {
        let guest = self.guest(id)?;
        let permit = self.streams.admit_listener(&guest)?;
        Ok((guest, permit))
    }
}

/// When an "ensure" answers with what is true, whether or not the end is reached.
fn answer_at(context: &RequestContext) -> Instant {
    let left = context.time_remaining().unwrap_or(ENSURE_TIME_DEFAULT);
    Instant::now() + left.saturating_sub(ANSWER_EARLIER)
}

impl HostAgentService for Service {
    async fn ensure_running<'a>(
        &'a self,
        context: RequestContext,
        request: ServiceRequest<'_, EnsureRunningRequest>,
    ) -> ServiceResult<impl Encodable<EnsureRunningResponse> + Send + use<'a>> {
        let deadline = answer_at(&context);
        let request = request.to_owned_message();
        self.acts()?;
        let id = self.id(&request.sandbox_id)?;
        let fence = answers::fence(request.fence.into_option())?;
        let spec = answers::spec(request.spec.into_option())?;
        if request.must_exist && self.agent.sandboxes.get(&id).await.map_err(errors::wish)?.is_none() {
            return Err(errors::unknown_sandbox());
        }
        let view = self.agent.sandboxes.ensure_running(&id, fence, spec, deadline).await.map_err(errors::wish)?;
        Response::ok(EnsureRunningResponse { state: self.state(&view).await.into(), ..Default::default() })
    }

    async fn ensure_paused<'a>(
        &'a self,
        context: RequestContext,
        request: ServiceRequest<'_, EnsurePausedRequest>,
    ) -> ServiceResult<impl Encodable<EnsurePausedResponse> + Send + use<'a>> {
        let deadline = answer_at(&context);
        let request = request.to_owned_message();
        self.acts()?;
        let id = self.id(&request.sandbox_id)?;
        let fence = answers::fence(request.fence.into_option())?;
        let kept = if request.disk_only { Kept::Disk } else { Kept::Memory };
        let view = self.agent.sandboxes.ensure_paused(&id, fence, kept, deadline).await.map_err(errors::wish)?;
        Response::ok(EnsurePausedResponse { state: self.state(&view).await.into(), ..Default::default() })
    }

    async fn ensure_killed<'a>(
        &'a self,
        context: RequestContext,
        request: ServiceRequest<'_, EnsureKilledRequest>,
    ) -> ServiceResult<impl Encodable<EnsureKilledResponse> + Send + use<'a>> {
        let deadline = answer_at(&context);
        let request = request.to_owned_message();
        self.acts()?;
        let id = self.id(&request.sandbox_id)?;
        let fence = answers::fence(request.fence.into_option())?;
        let view = self.agent.sandboxes.ensure_killed(&id, fence, deadline).await.map_err(errors::wish)?;
        Response::ok(EnsureKilledResponse { state: self.state(&view).await.into(), ..Default::default() })
    }

    async fn ensure_snapshot<'a>(
        &'a self,
        context: RequestContext,
        request: ServiceRequest<'_, EnsureSnapshotRequest>,
    ) -> ServiceResult<impl Encodable<EnsureSnapshotResponse> + Send + use<'a>> {
        let deadline = answer_at(&context);
        let request = request.to_owned_message();
        self.acts()?;
        let id = self.id(&request.sandbox_id)?;
        let snapshot = answers::snapshot_id(&request.snapshot_id)?;
        let sandboxes = &self.agent.sandboxes;
        let _in_use = sandboxes.guest(&id).ok().map(|guest| guest.in_use());
        let made =
            sandboxes.ensure_snapshot(&id, request.host_epoch, snapshot, deadline).await.map_err(errors::wish)?;
        let state = match sandboxes.get(&id).await.map_err(errors::wish)? {
            // The steps of the sandbox's last transition are this one's.
            Some(published) if made.is_some_and(|(_, is_made)| is_made) => self.state(&published.view).await.into(),
            _ => None.into(),
        };
        Response::ok(EnsureSnapshotResponse {
            ready: made.is_some(),
            size_bytes: made.map(|(bytes, _)| bytes).unwrap_or_default(),
            state,
            ..Default::default()
        })
    }

    async fn remove_snapshot<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, RemoveSnapshotRequest>,
    ) -> ServiceResult<impl Encodable<RemoveSnapshotResponse> + Send + use<'a>> {
        self.acts()?;
        let snapshot = answers::snapshot_id(request.snapshot_id)?;
        self.agent.sandboxes.remove_snapshot(snapshot).await.map_err(errors::wish)?;
        Response::ok(RemoveSnapshotResponse::default())
    }

    async fn get_sandbox<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, GetSandboxRequest>,
    ) -> ServiceResult<impl Encodable<GetSandboxResponse> + Send + use<'a>> {
        let id = self.id(request.sandbox_id)?;
        let Some(published) = self.agent.sandboxes.get(&id).await.map_err(errors::wish)? else {
            self.ready()?;
            return Err(errors::unknown_sandbox());
        };
        Response::ok(GetSandboxResponse { state: self.state(&published.view).await.into(), ..Default::default() })
    }

    async fn list_sandboxes<'a>(
        &'a self,
        _: RequestContext,
        _: ServiceRequest<'_, ListSandboxesRequest>,
    ) -> ServiceResult<impl Encodable<ListSandboxesResponse> + Send + use<'a>> {
        // Read first: a scan that ends in between must not declare the older list complete.
        let complete = self.agent.sandboxes.is_complete();
        let kernel = self.agent.kernel_version().await;
        let sandboxes = self.agent.sandboxes.list().iter().map(|view| self.agent.state(view, &kernel)).collect();
        Response::ok(ListSandboxesResponse { sandboxes, complete, ..Default::default() })
    }

    async fn exec(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, ExecRequest>,
    ) -> ServiceResult<ServiceStream<impl Encodable<ExecResponse> + Send + use<>>> {
        let request = request.to_owned_message();
        let (guest, permit) = match request.terminal.is_set() {
            false => self.streaming(&request.sandbox_id)?,
            true => self.listening(&request.sandbox_id)?,
        };
        Ok(Response::stream(exec::exec(guest, permit, request).await?))
    }

    async fn start_process<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, ExecRequest>,
    ) -> ServiceResult<impl Encodable<StartProcessResponse> + Send + use<'a>> {
        let request = request.to_owned_message();
        let (guest, _permit) = self.streaming(&request.sandbox_id)?;
        Response::ok(exec::start(&guest, request).await?)
    }

    async fn connect_process(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, ConnectProcessRequest>,
    ) -> ServiceResult<ServiceStream<impl Encodable<ExecResponse> + Send + use<>>> {
        let request = request.to_owned_message();
        let (guest, permit) = self.listening(&request.sandbox_id)?;
        Ok(Response::stream(exec::connect(guest, permit, request).await?))
    }

    async fn send_input<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, SendInputRequest>,
    ) -> ServiceResult<impl Encodable<SendInputResponse> + Send + use<'a>> {
        let request = request.to_owned_message();
        let guest = self.guest(&request.sandbox_id)?;
        let _in_use = guest.in_use();
        processes::send_input(&guest, request).await?;
        Response::ok(SendInputResponse::default())
    }

    async fn close_stdin<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, CloseStdinRequest>,
    ) -> ServiceResult<impl Encodable<CloseStdinResponse> + Send + use<'a>> {
        let request = request.to_owned_message();
        let guest = self.guest(&request.sandbox_id)?;
        let _in_use = guest.in_use();
        processes::close_stdin(&guest, request).await?;
        Response::ok(CloseStdinResponse::default())
    }

    async fn resize_terminal<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, ResizeTerminalRequest>,
    ) -> ServiceResult<impl Encodable<ResizeTerminalResponse> + Send + use<'a>> {
        let request = request.to_owned_message();
        let guest = self.guest(&request.sandbox_id)?;
        let _in_use = guest.in_use();
        processes::resize(&guest, request).await?;
        Response::ok(ResizeTerminalResponse::default())
    }

    async fn list_processes<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, ListProcessesRequest>,
    ) -> ServiceResult<impl Encodable<ListProcessesResponse> + Send + use<'a>> {
        let guest = self.guest(request.sandbox_id)?;
        let _in_use = guest.in_use();
        Response::ok(processes::list(&guest).await?)
    }

    async fn signal_process<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, SignalProcessRequest>,
    ) -> ServiceResult<impl Encodable<SignalProcessResponse> + Send + use<'a>> {
        let request = request.to_owned_message();
        let guest = self.guest(&request.sandbox_id)?;
        let _in_use = guest.in_use();
        processes::signal(&guest, request).await?;
        Response::ok(SignalProcessResponse::default())
    }

    async fn read_file(
        &self,
        _: RequestContext,
        request: ServiceRequest<'_, ReadFileRequest>,
    ) -> ServiceResult<ServiceStream<impl Encodable<ReadFileResponse> + Send + use<>>> {
        let request = request.to_owned_message();
        let (guest, permit) = self.streaming(&request.sandbox_id)?;
        Ok(Response::stream(files::read(guest, permit, request).await?))
    }

    async fn write_file<'a>(
        &'a self,
        _: RequestContext,
        requests: InboundStream<WriteFileRequest>,
    ) -> ServiceResult<impl Encodable<WriteFileResponse> + Send + use<'a>> {
        Response::ok(files::write(|id| self.streaming(id), requests).await?)
    }

    async fn list_files<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, ListFilesRequest>,
    ) -> ServiceResult<impl Encodable<ListFilesResponse> + Send + use<'a>> {
        let (guest, _permit) = self.streaming(request.sandbox_id)?;
        Response::ok(entries::list(&guest, request.to_owned_message()).await?)
    }

    async fn stat_file<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, StatFileRequest>,
    ) -> ServiceResult<impl Encodable<StatFileResponse> + Send + use<'a>> {
        let (guest, _permit) = self.streaming(request.sandbox_id)?;
        Response::ok(entries::stat(&guest, request.to_owned_message()).await?)
    }

    async fn make_directory<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, MakeDirectoryRequest>,
    ) -> ServiceResult<impl Encodable<MakeDirectoryResponse> + Send + use<'a>> {
        let (guest, _permit) = self.streaming(request.sandbox_id)?;
        Response::ok(entries::make(&guest, request.to_owned_message()).await?)
    }

    async fn move_file<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, MoveFileRequest>,
    ) -> ServiceResult<impl Encodable<MoveFileResponse> + Send + use<'a>> {
        let (guest, _permit) = self.streaming(request.sandbox_id)?;
        Response::ok(entries::rename(&guest, request.to_owned_message()).await?)
    }

    async fn remove_file<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, RemoveFileRequest>,
    ) -> ServiceResult<impl Encodable<RemoveFileResponse> + Send + use<'a>> {
        let (guest, _permit) = self.streaming(request.sandbox_id)?;
        Response::ok(entries::remove(&guest, request.to_owned_message()).await?)
    }

    async fn get_metrics<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, GetMetricsRequest>,
    ) -> ServiceResult<impl Encodable<GetMetricsResponse> + Send + use<'a>> {
        let id = self.id(request.sandbox_id)?;
        let Some(published) = self.agent.sandboxes.get(&id).await.map_err(errors::wish)? else {
            self.ready()?;
            return Err(errors::unknown_sandbox());
        };
        Response::ok(gauges::points(&self.agent.gauges, &published.view, request.range_sec).await?)
    }

    async fn get_console<'a>(
        &'a self,
        _: RequestContext,
        request: ServiceRequest<'_, GetConsoleRequest>,
    ) -> ServiceResult<impl Encodable<GetConsoleResponse> + Send + use<'a>> {
        let id = self.id(request.sandbox_id)?;
        let Some(published) = self.agent.sandboxes.get(&id).await.map_err(errors::wish)? else {
            self.ready()?;
            return Err(errors::unknown_sandbox());
        };
        let console = published.console.ok_or_else(|| errors::not_running(published.view.observed))?;
        let tail = console.tail(published.microvm.as_ref(), console::BYTES_MAX).await.map_err(errors::console)?;
        Response::ok(GetConsoleResponse { tail, ..Default::default() })
    }

    async fn get_host<'a>(
        &'a self,
        _: RequestContext,
        _: ServiceRequest<'_, GetHostRequest>,
    ) -> ServiceResult<impl Encodable<GetHostResponse> + Send + use<'a>> {
        Response::ok(host::describe(&self.agent).await)
    }
}
