//! Calls to host agents: Connect over mutual TLS, one connection pool for all hosts.
//!
//! What comes back is judged here, once: the rest of the control plane sees [`AgentError`].

pub mod connect;
pub mod said;

use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use api::host::{self, HostAgentServiceClient};
use connectrpc::client::{CallOptions, ClientBody, ClientConfig, ServiceTransport};
use connectrpc::{ConnectError, ErrorCode};
use hyper_util::client::legacy;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use model::ids::{HostId, TeamId};
use store::sandboxes::Placed;

use self::connect::Connector;
use crate::measures;
use crate::networks::Networks;

const IDLE_TIME_MAX: Duration = Duration::from_secs(120);
/// A host that vanished is noticed after the two together.
const PING_EVERY: Duration = Duration::from_secs(10);
const PING_ANSWER_MAX: Duration = Duration::from_secs(10);
/// Questions that the agent answers from memory or by one question to a guest.
const ASK_TIME_MAX: Duration = Duration::from_secs(30);
/// What the library says, as its own error and without a cause, when a connection ends within an answer.
const BODY_LOST: &str = "failed to read response body";
/// Per stream and connection: bounds what a slow client of ours makes us hold.
const STREAM_WINDOW: u32 = 1024 * 1024;
const CONNECTION_WINDOW: u32 = 8 * 1024 * 1024;

type Http = legacy::Client<Connector, ClientBody>;
pub type Agent = HostAgentServiceClient<ServiceTransport<Http>>;

#[derive(Debug, Clone, thiserror::Error)]
pub enum AgentError {
    /// No connection came about: the host has not got the call.
    #[error("the host cannot be reached")]
    Unreachable,
    /// The connection broke or nothing came back in time: the host may have got the call.
    #[error("the host did not answer")]
    NoAnswer,
    /// The agent starts or ends just now.
    #[error("the host agent is not ready")]
    NotReady,
    #[error("a newer wish or epoch has been seen by the host")]
    Stale,
    #[error("the host has no room for the sandbox")]
    NoRoom,
    #[error("the host does not have the sandbox")]
    UnknownSandbox,
    #[error("the host does not have the template")]
    UnknownTemplate,
    #[error("the host does not have the snapshot")]
    UnknownSnapshot,
    #[error("the host has no disk for it")]
    NoDisk,
    /// The sentence is for the sandbox's owner.
    #[error("{message}")]
    NotSaved { message: String },
    #[error("the sandbox does not run")]
    NotRunning,
    #[error("the sandbox's disk is full")]
    GuestDiskFull,
    #[error("too many commands and transfers are under way")]
    TooManyStreams,
    #[error("time is over")]
    DeadlineExceeded,
    /// The arguments do not fit what is in the sandbox; the sentence is for the caller.
    #[error("{message}")]
    Refused { refusal: Refusal, message: String },
    /// The guest, or something of ours, misbehaved.
    #[error("the guest agent misbehaved: {message}")]
    Misbehaved { message: String },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    Invalid,
    NotFound,
    Conflict,
    Forbidden,
    TooLarge,
}

pub struct Agents {
    http: RwLock<Http>,
    networks: Arc<Networks>,
}

impl Agents {
    pub fn new(tls: &rustls::ClientConfig, networks: Networks) -> Self {
        let networks = Arc::new(networks);
        Self { http: RwLock::new(http(tls, networks.clone())), networks }
    }

    /// New connections show the new certificate; the old ones end by themselves.
    pub fn renew(&self, tls: &rustls::ClientConfig) {
        *self.http.write().unwrap_or_else(PoisonError::into_inner) = http(tls, self.networks.clone());
    }

    pub fn networks(&self) -> &Networks {
        &self.networks
    }

    /// The agent of this host, which is the platform's or `owner`'s, at `address:port`. Making one costs nothing; connections are shared.
    pub fn at(&self, host: HostId, address: &str, owner: Option<TeamId>) -> Result<Agent, AgentError> {
        let uri = connect::uri(host, address, owner).ok_or(AgentError::Unreachable)?;
        let http = self.http.read().unwrap_or_else(PoisonError::into_inner).clone();
        let config = ClientConfig::new(uri).with_default_max_message_size(host::MESSAGE_BYTES_MAX);
        Ok(HostAgentServiceClient::new(ServiceTransport::new(http), config))
    }

    pub fn of(&self, placed: &Placed) -> Result<Agent, AgentError> {
        self.at(placed.host, &placed.address, placed.owner)
    }
}

/// For calls that are answered at once.
pub fn ask() -> CallOptions {
    CallOptions::default().with_timeout(ASK_TIME_MAX)
}

fn http(tls: &rustls::ClientConfig, networks: Arc<Networks>) -> Http {
    legacy::Client::builder(TokioExecutor::new())
        .timer(TokioTimer::new())
        .pool_timer(TokioTimer::new())
        .pool_idle_timeout(IDLE_TIME_MAX)
        .http2_only(true)
        .http2_keep_alive_interval(PING_EVERY)
        .http2_keep_alive_timeout(PING_ANSWER_MAX)
        .http2_initial_stream_window_size(STREAM_WINDOW)
        .http2_initial_connection_window_size(CONNECTION_WINDOW)
        .build(Connector::new(tls, networks))
}

impl From<ConnectError> for AgentError {
    fn from(error: ConnectError) -> Self {
        let judged = Self::judge(error);
        measures::host_call_failed(&judged);
        judged
    }
}

impl AgentError {
    fn judge(error: ConnectError) -> Self {
        if let Some(transport) = of_transport(&error) {
            return transport;
        }
        let text = said::sentence(error.message.as_deref().unwrap_or_default());
        // The host has begun to answer, so it has done what it was asked: that must not be taken for a refusal.
        if text.starts_with(BODY_LOST) {
            return Self::NoAnswer;
        }
        let (reason, message) = host::reason(&text);
        let refused = |refusal| Self::Refused { refusal, message: message.to_owned() };
        match (error.code, reason) {
            (_, Some(host::STALE_GENERATION)) => Self::Stale,
            (_, Some(host::NOT_RUNNING)) => Self::NotRunning,
            (_, Some(host::NO_ROOM)) => Self::NoRoom,
            (_, Some(host::UNKNOWN_SANDBOX)) => Self::UnknownSandbox,
            (_, Some(host::UNKNOWN_TEMPLATE)) => Self::UnknownTemplate,
            (_, Some(host::UNKNOWN_SNAPSHOT)) => Self::UnknownSnapshot,
            (_, Some(host::NO_DISK)) => Self::NoDisk,
            (_, Some(host::NOT_SAVED)) => Self::NotSaved { message: message.to_owned() },
            (_, Some(host::GUEST_DISK_FULL)) => Self::GuestDiskFull,
            (_, Some(host::TOO_MANY_STREAMS)) => Self::TooManyStreams,
            (_, Some(host::NOT_READY)) => Self::NotReady,
            (ErrorCode::InvalidArgument | ErrorCode::OutOfRange, _) => refused(Refusal::Invalid),
            (ErrorCode::NotFound, _) => refused(Refusal::NotFound),
            (ErrorCode::AlreadyExists | ErrorCode::FailedPrecondition | ErrorCode::Aborted, _) => {
                refused(Refusal::Conflict)
            }
            (ErrorCode::PermissionDenied, _) => refused(Refusal::Forbidden),
            (ErrorCode::ResourceExhausted, _) => refused(Refusal::TooLarge),
            (ErrorCode::DeadlineExceeded | ErrorCode::Canceled, _) => Self::DeadlineExceeded,
            (ErrorCode::Unavailable, _) => Self::NoAnswer,
            _ => Self::Misbehaved { message: text },
        }
    }
}

/// What our own side of the wire says of a call that got no answer.
fn of_transport(error: &ConnectError) -> Option<AgentError> {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = std::error::Error::source(error);
    while let Some(present) = cause {
        if let Some(error) = present.downcast_ref::<legacy::Error>() {
            return Some(if error.is_connect() { AgentError::Unreachable } else { AgentError::NoAnswer });
        }
        cause = present.source();
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_that_breaks_off_is_no_answer() {
        let lost = ConnectError::internal(format!("{BODY_LOST}: error reading a body from connection"));
        assert!(matches!(AgentError::from(lost), AgentError::NoAnswer));
        assert!(matches!(AgentError::from(ConnectError::internal("odd")), AgentError::Misbehaved { .. }));
    }
}
