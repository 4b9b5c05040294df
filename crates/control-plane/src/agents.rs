//! Calls to host agents: Connect over mutual TLS, one connection pool for all hosts.
//!
//! A host proves by its certificate that it is who was called. The platform's hosts have certificates for their addresses. Teams' own have
//! them for a name that the control plane gives each of them, and for nothing else: a team says where its host is, and must neither be
//! taken for another host by that, nor have another one called in its place.
//!
//! An address is checked against the allowed networks each time it is connected to, because a name may point elsewhere by then. What
//! comes back is judged here, once: the rest of the control plane sees [`AgentError`].

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, PoisonError, RwLock};
use std::task::{Context, Poll};
use std::time::Duration;

use api::host::{self, HostAgentServiceClient};
use connectrpc::client::{CallOptions, ClientBody, ClientConfig, ServiceTransport};
use connectrpc::{ConnectError, ErrorCode};
use hyper_util::client::legacy;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use model::ids::{HostId, TeamId};
use rustls_pki_types::ServerName;
use store::sandboxes::Placed;
use tokio::net::TcpStream;

use crate::measures;
use crate::networks::Networks;

/// A host on the same continent answers a SYN within this time, or it will not at all.
const CONNECT_TIME_MAX: Duration = Duration::from_secs(3);
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

type Http = legacy::Client<hyper_rustls::HttpsConnector<Connector>, ClientBody>;
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

    /// The agent of a host at `host:port`, which is the platform's or `owner`'s. Making one costs nothing; connections are shared.
    pub fn at(&self, id: HostId, address: &str, owner: Option<TeamId>) -> Result<Agent, AgentError> {
        let authority = match owner {
            None => address.to_owned(),
            Some(_) => of_team(id, address).ok_or(AgentError::Unreachable)?,
        };
        let uri = format!("https://{authority}").parse().map_err(|_| AgentError::Unreachable)?;
        let http = self.http.read().unwrap_or_else(PoisonError::into_inner).clone();
        let config = ClientConfig::new(uri).with_default_max_message_size(host::MESSAGE_BYTES_MAX);
        Ok(HostAgentServiceClient::new(ServiceTransport::new(http), config))
    }

    pub fn of(&self, placed: &Placed) -> Result<Agent, AgentError> {
        self.at(placed.host, &placed.address, placed.owner)
    }
}

/// Of names that lead nowhere: no resolver is asked for one.
const TEAM_HOST: &str = ".host.wrenn.invalid";

/// The name by which a team's host proves that it is itself.
pub fn name_of(id: HostId) -> String {
    format!("{}{TEAM_HOST}", id.0.simple())
}

/// No host's address may be such a name.
pub fn is_reserved(name: &str) -> bool {
    let name = name.trim_end_matches('.').to_ascii_lowercase();
    name.ends_with(TEAM_HOST) || TEAM_HOST.ends_with(&format!(".{name}"))
}

/// Who and where in one authority, so that connections to one are never another's: the address in hex, then the name.
fn of_team(id: HostId, address: &str) -> Option<String> {
    let (host, port) = address.rsplit_once(':')?;
    Some(format!("{}.{}:{port}", hex::encode(host), name_of(id)))
}

/// Where and who, of such an authority's host.
fn parts(host: &str) -> Option<(String, &str)> {
    let (place, name) = host.split_once('.').filter(|(_, name)| name.ends_with(TEAM_HOST))?;
    Some((String::from_utf8(hex::decode(place).ok()?).ok()?, name))
}

/// For calls that are answered at once.
pub fn ask() -> CallOptions {
    CallOptions::default().with_timeout(ASK_TIME_MAX)
}

fn http(tls: &rustls::ClientConfig, networks: Arc<Networks>) -> Http {
    let mut tls = tls.clone();
    // The connector sets it by itself and wants it empty.
    tls.alpn_protocols.clear();
    let connector = hyper_rustls::HttpsConnectorBuilder::new()
        .with_tls_config(tls)
        .https_only()
        .with_server_name_resolver(server_name)
        .enable_http2()
        .wrap_connector(Connector { networks });
    legacy::Client::builder(TokioExecutor::new())
        .timer(TokioTimer::new())
        .pool_timer(TokioTimer::new())
        .pool_idle_timeout(IDLE_TIME_MAX)
        .http2_only(true)
        .http2_keep_alive_interval(PING_EVERY)
        .http2_keep_alive_timeout(PING_ANSWER_MAX)
        .http2_initial_stream_window_size(STREAM_WINDOW)
        .http2_initial_connection_window_size(CONNECTION_WINDOW)
        .build(connector)
}

/// Whom the certificate must be of.
fn server_name(uri: &http::Uri) -> Result<ServerName<'static>, Box<dyn std::error::Error + Sync + Send>> {
    let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
    let name = parts(host).map_or(host, |(_, name)| name);
    Ok(ServerName::try_from(name.to_owned())?)
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
        let text = error.message.clone().unwrap_or_default();
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

/// TCP to an address in the allowed networks.
#[derive(Clone)]
pub struct Connector {
    networks: Arc<Networks>,
}

impl Connector {
    async fn connect(&self, uri: &http::Uri) -> io::Result<TcpStream> {
        let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
        let place = parts(host).map(|(place, _)| place);
        let host = place.as_deref().map_or(host, |place| place.trim_matches(['[', ']']));
        let port = uri.port_u16().unwrap_or(443);
        let mut last = io::Error::new(io::ErrorKind::PermissionDenied, "the address is not in the networks of hosts");
        for address in tokio::net::lookup_host((host, port)).await? {
            if !self.networks.has(address.ip()) {
                continue;
            }
            match TcpStream::connect(address).await {
                Ok(stream) => {
                    // Small calls must not wait for the acknowledgement of the one before.
                    stream.set_nodelay(true)?;
                    return Ok(stream);
                }
                Err(error) => last = error,
            }
        }
        Err(last)
    }
}

impl tower::Service<http::Uri> for Connector {
    type Response = TokioIo<TcpStream>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Self::Response>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: http::Uri) -> Self::Future {
        let connector = self.clone();
        Box::pin(async move {
            let stream = tokio::time::timeout(CONNECT_TIME_MAX, connector.connect(&uri))
                .await
                .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
            Ok(TokioIo::new(stream))
        })
    }
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

    #[test]
    fn a_teams_host_is_called_by_its_name_where_it_is() {
        let id = HostId(uuid::Uuid::from_u128(7));
        for place in ["10.0.0.5", "[fd00::5]", "node-1.example.org"] {
            let uri: http::Uri =
                format!("https://{}", of_team(id, &format!("{place}:50051")).unwrap()).parse().unwrap();
            assert_eq!(parts(uri.host().unwrap()), Some((place.to_owned(), name_of(id).as_str())));
            assert_eq!(server_name(&uri).unwrap().to_str(), name_of(id));
            assert_eq!(uri.port_u16(), Some(50051));
        }
        let platforms: http::Uri = "https://[fd00::5]:50051".parse().unwrap();
        assert_eq!(server_name(&platforms).unwrap().to_str(), "fd00::5");
        assert!(is_reserved(&name_of(id)) && is_reserved("X.HOST.wrenn.invalid.") && is_reserved("wrenn.invalid"));
        assert!(!is_reserved("wrenn.example.org") && !is_reserved("10.0.0.5"));
    }
}
