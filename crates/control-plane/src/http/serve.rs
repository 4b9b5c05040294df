//! The public port: plain HTTP/1.1 and HTTP/2, bounded in connections, headers and time. TLS is the business of what stands in front.

use std::io;
use std::time::Duration;

use axum::Router;
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::ServiceExt as _;
use tracing::{debug, warn};

use super::unread::ReadToEnd;

const CONNECTIONS_MAX: usize = 8192;
const HEADER_TIME_MAX: Duration = Duration::from_secs(10);
/// hyper's own bounds lie above those of `edge`, which answers with a body that says why.
const HEADER_BUFFER_BYTES: usize = 64 * 1024;
const HEADERS_MAX: usize = 200;
const HTTP2_HEADER_BYTES_MAX: u32 = 64 * 1024;
const STREAMS_MAX: u32 = 256;
const PING_EVERY: Duration = Duration::from_secs(20);
const PING_ANSWER_MAX: Duration = Duration::from_secs(20);
/// How long requests under way may take when the program ends.
const DRAIN_TIME_MAX: Duration = Duration::from_secs(30);
/// Out of descriptors does not get better by trying at once.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

pub async fn serve(listener: TcpListener, router: Router, stop: CancellationToken) {
    let room = std::sync::Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let tracker = TaskTracker::new();
    loop {
        let permit = tokio::select! {
            () = stop.cancelled() => break,
            permit = room.clone().acquire_owned() => permit.expect("the semaphore is never closed"),
        };
        let stream = tokio::select! {
            () = stop.cancelled() => break,
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    warn!("accept a connection: {error}");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            },
        };
        let (router, stop) = (router.clone(), stop.clone());
        tracker.spawn(async move {
            let _permit = permit;
            if let Err(error) = connection(stream, router, stop).await {
                debug!("connection: {error}");
            }
        });
    }
    tracker.close();
    let _ = tokio::time::timeout(DRAIN_TIME_MAX, tracker.wait()).await;
}

async fn connection(stream: TcpStream, router: Router, stop: CancellationToken) -> io::Result<()> {
    // Small answers must not wait for the acknowledgement of the one before.
    stream.set_nodelay(true)?;
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIME_MAX)
        .max_buf_size(HEADER_BUFFER_BYTES)
        .max_headers(HEADERS_MAX);
    builder
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(PING_EVERY)
        .keep_alive_timeout(PING_ANSWER_MAX)
        .max_concurrent_streams(STREAMS_MAX)
        .max_header_list_size(HTTP2_HEADER_BYTES_MAX);
    let service = TowerToHyperService::new(router.map_request(|request: hyper::Request<Incoming>| {
        let (parts, body) = request.into_parts();
        let body = axum::body::Body::new(ReadToEnd::new(body, &parts.headers));
        hyper::Request::from_parts(parts, body)
    }));
    let connection = builder.serve_connection_with_upgrades(TokioIo::new(stream), service);
    let mut connection = std::pin::pin!(connection);
    tokio::select! {
        ended = connection.as_mut() => return ended.map_err(io::Error::other),
        () = stop.cancelled() => connection.as_mut().graceful_shutdown(),
    }
    connection.await.map_err(io::Error::other)
}
