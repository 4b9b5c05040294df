//! The agent's port: mutual TLS, then Connect. Who has no certificate of the platform's authority with the control plane's name gets no
//! further than the handshake.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use api::host::{CONTROL_PLANE_NAME, HostAgentServiceExt as _, MESSAGE_BYTES_MAX};
use connectrpc::{ConnectRpcService, Limits};
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::service::TowerToHyperService;
use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::Service as _;
use tracing::{debug, warn};

use crate::credentials::Credentials;
use crate::measures;

/// Replicas of the control plane times a few connections each.
const CONNECTIONS_MAX: usize = 256;
/// Who is not known yet: strangers that open connections and say nothing take these places, not those of the control plane, and each
/// beyond them takes the place of the one who has been unknown for longest.
const HANDSHAKES_MAX: usize = 64;
const HANDSHAKE_TIME_MAX: Duration = Duration::from_secs(10);
const HEADER_TIME_MAX: Duration = Duration::from_secs(30);
/// Streams of one connection: every command and file transfer of a control plane replica goes through few connections.
const STREAMS_MAX: u32 = 4096;
/// A peer that vanished is noticed after the two together.
const PING_EVERY: Duration = Duration::from_secs(20);
const PING_ANSWER_MAX: Duration = Duration::from_secs(20);
/// Per stream and connection: bounds what a slow reader makes us hold.
const STREAM_WINDOW: u32 = 1024 * 1024;
const CONNECTION_WINDOW: u32 = 8 * 1024 * 1024;
/// How long calls under way may take when the agent ends.
const DRAIN_TIME_MAX: Duration = Duration::from_secs(3);
/// Pause after a failed accept: out of descriptors does not get better by trying at once.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("the host's certificate, key or authority cannot be read as PEM")]
    Pem(#[source] rustls::pki_types::pem::Error),
    #[error("the authority's certificate cannot be used")]
    Authority(#[source] rustls::Error),
    #[error("the check of client certificates cannot be set up")]
    Verifier(#[source] rustls::server::VerifierBuilderError),
    #[error("the host's certificate and key cannot be used")]
    Certificate(#[source] rustls::Error),
}

/// What the port needs of the present credentials.
pub fn server_config(credentials: &Credentials) -> Result<Arc<ServerConfig>, TlsError> {
    let mut roots = rustls::RootCertStore::empty();
    for authority in CertificateDer::pem_slice_iter(credentials.ca_pem.as_bytes()) {
        roots.add(authority.map_err(TlsError::Pem)?).map_err(TlsError::Authority)?;
    }
    let chain = CertificateDer::pem_slice_iter(credentials.cert_pem.as_bytes())
        .collect::<Result<Vec<_>, _>>()
        .map_err(TlsError::Pem)?;
    let key = PrivateKeyDer::from_pem_slice(credentials.key_pem.0.as_bytes()).map_err(TlsError::Pem)?;
    let verifier = WebPkiClientVerifier::builder(Arc::new(roots)).build().map_err(TlsError::Verifier)?;
    // Both sides are ours: nothing older is spoken.
    let mut config = ServerConfig::builder_with_protocol_versions(&[&rustls::version::TLS13])
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)
        .map_err(TlsError::Certificate)?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

/// Serves until `stop`, then lets calls under way end within a bound.
pub async fn serve(
    listener: TcpListener,
    service: super::Service,
    tls: watch::Receiver<Arc<ServerConfig>>,
    stop: CancellationToken,
) {
    let router = Arc::new(service).register(connectrpc::Router::new());
    let limits = Limits::default().with_max_message_size(MESSAGE_BYTES_MAX).with_max_request_body_size(usize::MAX);
    // No deadline policy: it would also bound uploads, whose whole length lies in the call. Each handler bounds its own waits.
    let service = ConnectRpcService::new(router).with_limits(limits);
    let room = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let mut unknown: VecDeque<CancellationToken> = VecDeque::new();
    let tracker = TaskTracker::new();
    loop {
        let (stream, peer) = tokio::select! {
            () = stop.cancelled() => break,
            accepted = listener.accept() => match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    warn!("accept a connection: {error}");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            },
        };
        let config = tls.borrow().clone();
        let service = service.clone();
        let (stop, room) = (stop.clone(), room.clone());
        unknown.retain(|place| !place.is_cancelled());
        if unknown.len() >= HANDSHAKES_MAX
            && let Some(longest) = unknown.pop_front()
        {
            longest.cancel();
        }
        let place = CancellationToken::new();
        unknown.push_back(place.clone());
        tracker.spawn(async move {
            let given_back = place.clone().drop_guard();
            let known = async {
                let stream = handshake(config, stream).await?;
                Ok((stream, room.acquire_owned().await.map_err(io::Error::other)?))
            };
            let known: io::Result<_> = tokio::select! {
                known = known => known,
                () = place.cancelled() => Err(io::Error::other("others wanted the place")),
                () = tokio::time::sleep(HANDSHAKE_TIME_MAX) => Err(io::ErrorKind::TimedOut.into()),
            };
            drop(given_back);
            match known {
                Ok((stream, _permit)) => connection(stream, peer, service, stop).await,
                Err(error) => debug!(%peer, "handshake: {error}"),
            }
        });
    }
    tracker.close();
    let _ = tokio::time::timeout(DRAIN_TIME_MAX, tracker.wait()).await;
}

type TlsStream = tokio_rustls::server::TlsStream<TcpStream>;

async fn handshake(config: Arc<ServerConfig>, stream: TcpStream) -> io::Result<TlsStream> {
    stream.set_nodelay(true)?;
    let stream = TlsAcceptor::from(config).accept(stream).await?;
    let (_, session) = stream.get_ref();
    let leaf = session.peer_certificates().and_then(|chain| chain.first());
    // The verifier has checked the chain; another host's agent has a certificate of the same authority, but not this name.
    if leaf.is_some_and(|leaf| common_name(leaf).as_deref() == Some(CONTROL_PLANE_NAME)) {
        Ok(stream)
    } else {
        Err(io::Error::new(io::ErrorKind::PermissionDenied, "the client is not the control plane"))
    }
}

fn common_name(certificate: &CertificateDer<'_>) -> Option<String> {
    let (_, certificate) = x509_parser::parse_x509_certificate(certificate).ok()?;
    let mut names = certificate.subject().iter_common_name();
    let name = names.next()?.as_str().ok()?.to_owned();
    names.next().is_none().then_some(name)
}

async fn connection(stream: TlsStream, peer: SocketAddr, service: ConnectRpcService, stop: CancellationToken) {
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(HEADER_TIME_MAX).keep_alive(true);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(STREAMS_MAX)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_send_buf_size(1024 * 1024)
        .keep_alive_interval(PING_EVERY)
        .keep_alive_timeout(PING_ANSWER_MAX);
    let service = tower::service_fn(move |request: http::Request<Incoming>| {
        let (mut service, path, began) = (service.clone(), request.uri().path().to_owned(), Instant::now());
        async move {
            let answer = service.call(request).await;
            answer.inspect(|response| measures::call(&path, response.status(), began.elapsed()))
        }
    });
    let served = builder.serve_connection(TokioIo::new(stream), TowerToHyperService::new(service));
    tokio::pin!(served);
    let result = tokio::select! {
        result = served.as_mut() => result,
        () = stop.cancelled() => {
            served.as_mut().graceful_shutdown();
            tokio::time::timeout(DRAIN_TIME_MAX, served).await.unwrap_or(Ok(()))
        }
    };
    if let Err(error) = result {
        debug!(%peer, "connection: {error}");
    }
}
