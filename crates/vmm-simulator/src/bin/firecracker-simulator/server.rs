//! HTTP/1.1 over the API's socket. Many may connect; one call is answered at a time.

use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::{Body as _, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode, header};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Mutex, watch};
use tokio::task::JoinSet;

use crate::api::{self, Answer};
use crate::fault::Fault;
use crate::hooks::{self, Hook};
use crate::machine::Machine;

/// For a last answer to leave a process that ends.
const FAREWELL: Duration = Duration::from_secs(1);

#[derive(Debug, Clone, Copy)]
enum End {
    /// The answer that caused it is sent first.
    Answered(u8),
    AtOnce(u8),
}

struct Api {
    machine: Mutex<Machine>,
    payload_bytes_max: usize,
    end: watch::Sender<Option<End>>,
}

/// Until something ends the process; the code it ends with.
pub async fn serve(listener: UnixListener, machine: Machine, payload_bytes_max: usize) -> io::Result<u8> {
    let (end, mut ended) = watch::channel(None);
    let api = Arc::new(Api { machine: Mutex::new(machine), payload_bytes_max, end });
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let (stream, _) = accepted?;
                connections.spawn(connection(api.clone(), stream));
            }
            Some(_) = connections.join_next() => {}
            // The sender lives in `api`.
            _ = ended.changed() => break,
        }
    }
    let end = *ended.borrow();
    match end {
        Some(End::AtOnce(code)) => Ok(code),
        Some(End::Answered(code)) => {
            let _ = tokio::time::timeout(FAREWELL, connections.join_all()).await;
            Ok(code)
        }
        None => Ok(0),
    }
}

async fn connection(api: Arc<Api>, stream: UnixStream) {
    let mut ended = api.end.subscribe();
    let service = service_fn(|request| api.call(request));
    let mut served =
        std::pin::pin!(hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service));
    loop {
        tokio::select! {
            // A client that goes away, or speaks something else, is its own business.
            _ = served.as_mut() => return,
            Ok(()) = ended.changed() => served.as_mut().graceful_shutdown(),
        }
    }
}

impl Api {
    async fn call(&self, request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
        let size = request.body().size_hint().lower();
        if size > self.payload_bytes_max as u64 {
            return Ok(self.too_large(size));
        }
        let (head, body) = request.into_parts();
        let Ok(body) = Limited::new(body, self.payload_bytes_max).collect().await else {
            return Ok(self.too_large(self.payload_bytes_max as u64 + 1));
        };
        let mut machine = self.machine.lock().await;
        if self.end.borrow().is_some() {
            // Too late: nobody is there any more.
            return std::future::pending().await;
        }
        let path = head.uri.path();
        let outcome = match self.hooked(path).await {
            Some(message) => Err(self.injected(&machine, path, message)),
            None => api::handle(&mut machine, &head.method, path, &body.to_bytes()),
        };
        let last = match &outcome {
            Ok(Answer { last: true, .. }) => Some(0),
            Err(Fault { fatal: true, .. }) => Some(1),
            _ => None,
        };
        if let Some(code) = last {
            self.end.send_replace(Some(End::Answered(code)));
        }
        Ok(match outcome {
            Ok(answer) => respond(answer.status(), answer.body.as_ref()),
            Err(fault) => {
                machine
                    .log
                    .error(&format!("Received Error. Status code: {}. Message: {}", fault.status, fault.message));
                respond(fault.status, Some(&json!({ "fault_message": fault.message })))
            }
        })
    }

    /// The text of a refusal that a test asked for.
    async fn hooked(&self, path: &str) -> Option<String> {
        for hook in hooks::for_path(path) {
            match hook {
                Hook::Slow(time) => tokio::time::sleep(time).await,
                Hook::Silent => std::future::pending().await,
                Hook::Fail(message) => return Some(message),
                // Of the save itself.
                Hook::Lose(_) => {}
                Hook::Exit => {
                    self.end.send_replace(Some(End::AtOnce(1)));
                    std::future::pending().await
                }
            }
        }
        None
    }

    /// As every failed load, one that was asked for ends the process.
    fn injected(&self, machine: &Machine, path: &str, message: String) -> Fault {
        let fault = Fault::new(message);
        if path == "/snapshot/load" && machine.guest.is_none() { fault.fatal() } else { fault }
    }

    /// The rest of the request is never read, so the connection ends with the answer.
    fn too_large(&self, bytes: u64) -> Response<Full<Bytes>> {
        let error = format!(
            "Request payload with size {bytes} is larger than the limit of {} allowed by server.\nAll previous \
             unanswered requests will be dropped.",
            self.payload_bytes_max
        );
        let mut response = respond(StatusCode::BAD_REQUEST, Some(&json!({ "error": error })));
        response.headers_mut().insert(header::CONNECTION, header::HeaderValue::from_static("close"));
        response
    }
}

fn respond(status: StatusCode, body: Option<&Value>) -> Response<Full<Bytes>> {
    let bytes = body.map(|value| Bytes::from(value.to_string())).unwrap_or_default();
    let mut response = Response::new(Full::new(bytes));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(header::SERVER, header::HeaderValue::from_static("Firecracker API"));
    if body.is_some() {
        headers.insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/json"));
    }
    response
}
