//! The clients of one incarnation's envd.
//!
//! There are three, because their waits differ: *health* opens a new connection each time, *unary* has a small pool and two minutes in
//! all, *streaming* has no total time and serves every process and file stream through the one accessor [`Guest::streaming`]. All of them
//! belong to one incarnation and are dropped with it, so no request can reach the next user of a network slot.
//!
//! What a guest says is attacker input: sizes are bounded, every wait has an end, and texts are cut before they go on.

mod activity;
mod boot;
mod connector;
mod entries;
mod faults;
mod files;
mod input;
mod processes;
mod rehearsal;
mod tags;
mod usage;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use connectrpc::client::{ClientBody, ClientConfig, ServiceTransport};
use http::{HeaderName, HeaderValue};
use hyper_util::client::legacy::Client;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use model::ids::Incarnation;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

pub use connector::{Connector, Dial};
pub use entries::{Entry, EntryKind};
pub use faults::GuestError;
pub use files::{FileHead, FileStream, FileWanted};
pub use input::Input;
pub use processes::{Command, ExecEvent, ExecStream, Kill, Process, Select, Size};
pub use rehearsal::rehearse;
pub use usage::InUse;

pub use api::guest::PORT as ENVD_PORT;

/// A unary call, from the first byte of the request to the last of the answer.
const UNARY_TIME_MAX: Duration = Duration::from_secs(120);
/// Idle connections that one incarnation may keep, per client: enough for a busy caller, few enough for a thousand sandboxes.
const UNARY_IDLE_MAX: usize = 2;
const STREAMING_IDLE_MAX: usize = 4;
const IDLE_TIME_MAX: Duration = Duration::from_secs(30);
/// Largest message that a guest may send.
const MESSAGE_BYTES_MAX: usize = 4 * 1024 * 1024;
/// What one message may make the decoder allocate beyond its own bytes.
const ELEMENT_BYTES_MAX: usize = 8 * 1024 * 1024;

/// Commands and file transfers under way in one incarnation. Each is a connection with its buffers here and a process there.
const STREAMS_MAX: usize = 64;

type HttpClient = Client<Connector, ClientBody>;

/// One incarnation's envd.
pub struct Guest {
    connector: Connector,
    unary: Pool,
    streaming: Pool,
    incarnation: Incarnation,
    access_token: HeaderValue,
    streams: Arc<Semaphore>,
    usage: Arc<usage::Usage>,
    tags: Arc<tags::Tags>,
    closed: CancellationToken,
}

impl std::fmt::Debug for Guest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Guest").field("incarnation", &self.incarnation).finish_non_exhaustive()
    }
}

impl Guest {
    pub fn new(dial: Arc<dyn Dial>, incarnation: Incarnation, access_token: &str) -> Self {
        let connector = Connector::new(dial);
        let mut access_token = HeaderValue::from_str(access_token).expect("tokens are hex digits of our own making");
        access_token.set_sensitive(true);
        Self {
            unary: Pool::new(connector.clone(), UNARY_IDLE_MAX),
            streaming: Pool::new(connector.clone(), STREAMING_IDLE_MAX),
            connector,
            incarnation,
            access_token,
            streams: Arc::new(Semaphore::new(STREAMS_MAX)),
            usage: usage::Usage::new(Instant::now()),
            tags: Arc::default(),
            closed: CancellationToken::new(),
        }
    }

    pub fn incarnation(&self) -> &Incarnation {
        &self.incarnation
    }

    /// A call for a user is under way as long as what this gives is kept. The host's own calls are none.
    pub fn in_use(&self) -> InUse {
        self.usage.begin()
    }

    /// A call for a user has just done something, and does not keep it in use for as long as it is under way.
    pub fn touch(&self) {
        drop(self.in_use());
    }

    /// When a call for a user was last under way: `now` while one is, the start of the incarnation before the first.
    pub fn last_used(&self, now: Instant) -> Instant {
        self.usage.last(now)
    }

    /// Ends every request under way and refuses new ones.
    pub fn close(&self) {
        self.closed.cancel();
    }

    /// Ends the connections on which nothing is under way. What is under way goes on.
    pub fn close_idle(&self) {
        self.unary.close_idle();
        self.streaming.close_idle();
    }

    pub fn is_closed(&self) -> bool {
        self.closed.is_cancelled()
    }

    /// Room for one more stream, held as long as the stream; none when there is no room.
    pub fn stream_permit(&self) -> Option<OwnedSemaphorePermit> {
        self.streams.clone().try_acquire_owned().ok()
    }

    /// The only way to the client without a total time; used for every process and file stream.
    fn streaming(&self) -> HttpClient {
        self.streaming.client()
    }

    fn unary(&self) -> HttpClient {
        self.unary.client()
    }

    fn transport(&self, client: HttpClient) -> ServiceTransport<HttpClient> {
        ServiceTransport::new(client)
    }

    fn headers(&self) -> [(HeaderName, HeaderValue); 2] {
        let incarnation = HeaderValue::from_str(self.incarnation.as_str()).expect("an incarnation is hex digits");
        [
            (HeaderName::from_static(api::guest::ACCESS_TOKEN_HEADER), self.access_token.clone()),
            (HeaderName::from_static(api::guest::INCARNATION_HEADER), incarnation),
        ]
    }

    fn config(&self) -> ClientConfig {
        let headers = self.headers().into_iter().collect();
        ClientConfig::new(base_uri())
            .with_default_max_message_size(MESSAGE_BYTES_MAX)
            .with_default_element_memory_limit(ELEMENT_BYTES_MAX)
            .with_default_headers(headers)
    }

    fn unary_config(&self) -> ClientConfig {
        self.config().with_default_timeout(UNARY_TIME_MAX)
    }

    /// Waits for `work` no longer than the incarnation lives.
    async fn alive<T>(&self, work: impl Future<Output = Result<T, GuestError>>) -> Result<T, GuestError> {
        tokio::select! {
            biased;
            () = self.closed.cancelled() => Err(GuestError::Gone),
            result = work => result,
        }
    }
}

/// A client with the connections that it keeps.
struct Pool {
    connector: Connector,
    idle_max: usize,
    client: Mutex<HttpClient>,
}

impl Pool {
    fn new(connector: Connector, idle_max: usize) -> Self {
        let client = Mutex::new(Self::make(&connector, idle_max));
        Self { connector, idle_max, client }
    }

    fn make(connector: &Connector, idle_max: usize) -> HttpClient {
        Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE_TIME_MAX)
            .pool_max_idle_per_host(idle_max)
            // A guest that sends endless headers fills at most this.
            .http1_max_buf_size(256 * 1024)
            .http1_max_headers(64)
            .build(connector.clone())
    }

    fn client(&self) -> HttpClient {
        self.lock().clone()
    }

    /// Idle connections end with the client that keeps them; those in use do not hang on it.
    fn close_idle(&self) {
        *self.lock() = Self::make(&self.connector, self.idle_max);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HttpClient> {
        self.client.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.closed.cancel();
    }
}

/// The name is only what the guest sees as `Host`: the connector knows the one address there is.
fn base_uri() -> http::Uri {
    http::Uri::from_static("http://guest:49983")
}
