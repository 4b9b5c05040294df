//! What happens to every request: an id, bounds, a net for panics, one shape for errors, one line of log.

use std::panic::AssertUnwindSafe;
use std::time::{Duration, Instant};

use axum::extract::{MatchedPath, Request, State};
use axum::middleware::Next;
use axum::response::Response;
use futures::FutureExt as _;
use http::{HeaderMap, HeaderValue, StatusCode, header};
use tracing::{Instrument as _, error, info, info_span};

use super::errors::{ApiError, REQUEST_ID};
use super::limits;
use crate::app::App;
use crate::measures::{self, Counted};

const HEADER_BYTES_MAX: usize = 32 * 1024;
const HEADERS_MAX: usize = 100;
const URL_BYTES_MAX: usize = 8 * 1024;

/// Shorter than the time that requests have when the program ends.
const REFUSE_AFTER: Duration = Duration::from_secs(25);

/// When a request arrived.
#[derive(Debug, Clone, Copy)]
pub struct Arrived(pub tokio::time::Instant);

pub async fn edge(State(app): State<App>, mut request: Request, next: Next) -> Response {
    let began = Instant::now();
    let id = format!("req_{:032x}", rand::random::<u128>());
    let method = request.method().clone();
    let path: String = request.uri().path().chars().take(200).flat_map(char::escape_debug).collect();
    let is_too_large = request.uri().to_string().len() > URL_BYTES_MAX || are_too_large(request.headers());
    request.headers_mut().insert(REQUEST_ID, HeaderValue::from_str(&id).expect("an id is ASCII"));
    request.extensions_mut().insert(Arrived(tokio::time::Instant::now()));
    let span = info_span!("request", request.id = %id);
    let route = request.extensions().get::<MatchedPath>().cloned();
    let counted = Counted::request();
    let answered = async {
        if is_too_large {
            return ApiError::headers_too_large().response(&id);
        }
        let handled = tokio::select! {
            biased;
            handled = AssertUnwindSafe(next.run(request)).catch_unwind() => handled,
            // State changes go on in tasks of their own.
            () = late(&app) => return ApiError::ending().response(&id),
        };
        match handled {
            Ok(response) => response,
            Err(_) => {
                error!("{method} {path}: the handler panicked");
                ApiError::internal().response(&id)
            }
        }
    }
    .instrument(span.clone())
    .await;
    let mut response = in_one_shape(answered, &id);
    let headers = response.headers_mut();
    headers.insert(REQUEST_ID, HeaderValue::from_str(&id).expect("an id is ASCII"));
    headers.entry(header::CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    drop(counted);
    measures::answered(route.as_ref(), &method, &response, began.elapsed());
    let status = response.status();
    let duration_ms = began.elapsed().as_millis();
    span.in_scope(|| {
        if status.is_server_error() {
            info!(status = status.as_u16(), duration_ms, "{method} {path}: {status}");
        } else {
            tracing::debug!(status = status.as_u16(), duration_ms, "{method} {path}: {status}");
        }
    });
    response
}

/// When a request of a replica that ends is refused, so that it hears so before its connection is cut.
async fn late(app: &App) {
    app.stop.cancelled().await;
    tokio::time::sleep(REFUSE_AFTER).await;
}

/// Errors of handlers get their body here, where the request's id is known; so do answers that a library made.
fn in_one_shape(mut response: Response, id: &str) -> Response {
    let ours = response.extensions_mut().remove::<ApiError>();
    let is_json = response
        .headers()
        .get(header::CONTENT_TYPE)
        .is_some_and(|kind| kind.as_bytes().starts_with(b"application/json"));
    let error = match ours {
        Some(error) => error,
        None if is_json || response.status().as_u16() < 400 => return response,
        None => match response.status() {
            StatusCode::NOT_FOUND => ApiError::not_found("route"),
            StatusCode::METHOD_NOT_ALLOWED => ApiError::method_not_allowed(String::new()),
            StatusCode::PAYLOAD_TOO_LARGE => ApiError::too_large(0),
            StatusCode::UNSUPPORTED_MEDIA_TYPE => ApiError::unsupported_media_type("of another type"),
            status if status.is_client_error() => ApiError::invalid("", "the request is malformed"),
            _ => ApiError::internal(),
        },
    };
    let mut shaped = error.response(id);
    for name in limits::HEADERS.into_iter().chain([header::ALLOW, header::CONTENT_RANGE]) {
        if let Some(value) = response.headers().get(&name) {
            shaped.headers_mut().insert(name, value.clone());
        }
    }
    shaped
}

fn are_too_large(headers: &HeaderMap) -> bool {
    let bytes: usize = headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 4).sum();
    headers.len() > HEADERS_MAX || bytes > HEADER_BYTES_MAX
}
