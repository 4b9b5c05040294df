//! The port: `GET /metrics` for Prometheus, `GET /health/live` for whoever wants to know whether the program runs its tasks at all. It
//! depends on nothing but the program itself: no database, no other program.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use http::{HeaderValue, Method, Response, StatusCode, header};
use http_body_util::Full;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;
use tokio::sync::{Mutex, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, warn};

use crate::{SCRAPE_COMPLETE, Telemetry};

/// A few servers that read, and whoever looks by hand.
const CONNECTIONS_MAX: usize = 32;
const HEADER_TIME_MAX: Duration = Duration::from_secs(5);
/// Prometheus gives up after ten seconds.
const LOOK_TIME_MAX: Duration = Duration::from_secs(4);
/// Whoever asks more often gets what was looked up before.
const LOOK_EVERY: Duration = Duration::from_millis(500);
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
const TEXT: HeaderValue = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");

/// Sets the gauges whose values are looked up when somebody asks; false when not all could be.
pub type Look = Box<dyn Fn() -> BoxFuture<'static, bool> + Send + Sync>;

struct Page {
    telemetry: Telemetry,
    look: Look,
    /// When the last look ended. Held while somebody looks.
    looked: Mutex<Option<tokio::time::Instant>>,
}

/// Serves until `stop`.
pub async fn serve(listener: TcpListener, telemetry: Telemetry, look: Look, stop: CancellationToken) {
    let page = Arc::new(Page { telemetry, look, looked: Mutex::default() });
    let room = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let tracker = TaskTracker::new();
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                warn!("accept a connection for metrics: {error}");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        // One too many is closed: who waits here would only look as if it were served.
        let Ok(permit) = room.clone().try_acquire_owned() else { continue };
        let (page, stop) = (page.clone(), stop.clone());
        tracker.spawn(async move {
            let _permit = permit;
            let service = service_fn(move |request: http::Request<hyper::body::Incoming>| {
                let page = page.clone();
                async move { Ok::<_, Infallible>(page.answer(request.method(), request.uri().path()).await) }
            });
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEADER_TIME_MAX)
                .serve_connection(TokioIo::new(stream), service);
            tokio::select! {
                ended = connection => if let Err(error) = ended { debug!("connection for metrics: {error}") },
                () = stop.cancelled() => {}
            }
        });
    }
}

impl Page {
    async fn answer(&self, method: &Method, path: &str) -> Response<Full<Bytes>> {
        let (status, text) = match (method, path) {
            (&Method::GET | &Method::HEAD, "/metrics") => {
                self.refresh().await;
                (StatusCode::OK, self.telemetry.render())
            }
            (&Method::GET | &Method::HEAD, "/health/live") => (StatusCode::OK, "alive\n".to_owned()),
            (_, "/metrics" | "/health/live") => (StatusCode::METHOD_NOT_ALLOWED, "only GET\n".to_owned()),
            _ => (StatusCode::NOT_FOUND, "there are /metrics and /health/live\n".to_owned()),
        };
        let mut response = Response::new(Full::from(text));
        *response.status_mut() = status;
        response.headers_mut().insert(header::CONTENT_TYPE, TEXT);
        response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        response
    }

    /// One look at a time. What cannot be looked up does not keep the rest from being told.
    async fn refresh(&self) {
        let mut looked = self.looked.lock().await;
        if looked.is_some_and(|at| at.elapsed() < LOOK_EVERY) {
            return;
        }
        let complete = tokio::time::timeout(LOOK_TIME_MAX, (self.look)()).await.unwrap_or(false);
        metrics::gauge!(SCRAPE_COMPLETE.name).set(if complete { 1.0 } else { 0.0 });
        *looked = Some(tokio::time::Instant::now());
    }
}
