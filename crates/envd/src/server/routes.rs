//! From a request to its answer: rights first, then the plain routes, then the Connect services.

use std::net::IpAddr;
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use api::guest::filesystem::FilesystemExt as _;
use api::guest::process::ProcessExt as _;
use api::guest::{DISK_FLUSHED_HEADER, Fault, INCARNATION_HEADER, VERSION, VERSION_HEADER};
use bytes::Bytes;
use connectrpc::{ConnectRpcService, Limits};
use futures::FutureExt as _;
use http::header::{
    ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS, ACCESS_CONTROL_ALLOW_ORIGIN,
    ACCESS_CONTROL_EXPOSE_HEADERS, ACCESS_CONTROL_MAX_AGE, CACHE_CONTROL, CONNECTION, CONTENT_TYPE, ORIGIN, VARY,
};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode};
use http_body::{Body, Frame};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Incoming;
use tower::ServiceExt as _;

use super::bodies::{BodyError, Counted};
use super::registry::{Busy, Connection};
use super::{Guest, sync};
use crate::ports::{activity, list};
use crate::{access, files, identity};

pub type AnswerBody = UnsyncBoxBody<Bytes, Box<dyn std::error::Error + Send + Sync>>;
pub type Answer = Response<AnswerBody>;
pub type Rpc = ConnectRpcService;

/// Largest single message of a call: input and file names, with room. Files have their own routes.
pub(crate) const MESSAGE_BYTES_MAX: usize = 4 * 1024 * 1024;
/// What a page may read of an answer's head.
const EXPOSED: &str = "Location, Cache-Control, Content-Disposition, Grpc-Status, Grpc-Message, Grpc-Status-Details-Bin, Connect-Content-Encoding, X-Output-From";
/// A whole body of one message: its envelope, and a second one that is refused as such.
const BODY_BYTES_MAX: usize = MESSAGE_BYTES_MAX + 1024;

pub fn rpc(guest: &Arc<Guest>) -> Rpc {
    let router = Arc::new(crate::process::service::Service::new(guest.clone())).register(connectrpc::Router::new());
    let router = Arc::new(crate::filesystem::service::Service::new(guest.clone())).register(router);
    let limits = Limits::unlimited()
        .with_max_request_body_size(BODY_BYTES_MAX)
        .with_max_message_size(MESSAGE_BYTES_MAX)
        .with_element_memory_limit(MESSAGE_BYTES_MAX * 2);
    ConnectRpcService::new(router).with_limits(limits)
}

pub async fn answer(
    guest: Arc<Guest>,
    rpc: Rpc,
    connection: Arc<Connection>,
    local: IpAddr,
    request: Request<Incoming>,
) -> Answer {
    let busy = connection.begin();
    if let Some(shown) = request.headers().get(INCARNATION_HEADER).and_then(|value| value.to_str().ok()) {
        connection.show(shown);
    }
    // Browsers may call a sandbox's envd from any page: the token is what protects it.
    let is_from_a_page = request.headers().contains_key(ORIGIN) && !is_the_hosts(request.uri().path());
    // What is cached for one that is no page's must not be a page's answer.
    let is_cacheable = matches!(*request.method(), Method::GET | Method::HEAD);
    let work = AssertUnwindSafe(route(&guest, rpc, &connection, local, request));
    // A mistake of ours costs one request its answer, nobody else anything.
    let mut answer = work.catch_unwind().await.unwrap_or_else(|_| {
        fault(StatusCode::INTERNAL_SERVER_ERROR, "envd made a mistake; the guest's console says which")
    });
    if guest.quiet.is_on() {
        answer.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    }
    if is_from_a_page {
        answer.headers_mut().insert(ACCESS_CONTROL_ALLOW_ORIGIN, HeaderValue::from_static("*"));
        answer.headers_mut().insert(ACCESS_CONTROL_EXPOSE_HEADERS, HeaderValue::from_static(EXPOSED));
    }
    if is_cacheable {
        answer.headers_mut().append(VARY, HeaderValue::from_static("Origin"));
    }
    // The connection keeps this map for as long as the answer lasts: without the room that it has grown beyond need.
    let mut headers = HeaderMap::with_capacity(answer.headers().len());
    headers.extend(std::mem::take(answer.headers_mut()));
    *answer.headers_mut() = headers;
    answer.map(|body| UnsyncBoxBody::new(While { body, _busy: busy }))
}

async fn route(
    guest: &Arc<Guest>,
    rpc: Rpc,
    connection: &Arc<Connection>,
    local: IpAddr,
    request: Request<Incoming>,
) -> Answer {
    let path = request.uri().path();
    if path != "/health" && !is_the_hosts(path) && !guest.registry.admits(connection) {
        let mut answer = fault(StatusCode::SERVICE_UNAVAILABLE, "too many connections");
        answer.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
        return answer;
    }
    match (request.method(), path) {
        (&Method::OPTIONS, _) => preflight(),
        (&Method::GET | &Method::HEAD, "/health") => health(),
        (&Method::POST, path) if is_the_hosts(path) => {
            if let Err(denied) = access::host(&guest.session, connection.peer.ip(), local, request.headers()) {
                return fault(StatusCode::UNAUTHORIZED, &denied.to_string());
            }
            connection.is_the_hosts();
            let is_held = path == "/init/held";
            match path {
                "/snapshot/prepare" => prepare(guest, connection).await,
                _ => init(guest, connection, local, request, is_held).await,
            }
        }
        (&Method::GET | &Method::HEAD, "/files") => files::download::answer(guest, request).await,
        (&Method::POST, "/files") => files::upload::answer(guest, request).await,
        (method, path)
            if *method != Method::GET
                && (is_the_hosts(path)
                    || matches!(path, "/health" | "/files" | "/metrics" | "/envs" | "/ports" | "/activity")) =>
        {
            fault(StatusCode::METHOD_NOT_ALLOWED, "method not allowed")
        }
        _ => {
            if let Err(denied) = access::user(&guest.session, request.headers()) {
                return fault(StatusCode::UNAUTHORIZED, &denied.to_string());
            }
            match path {
                "/metrics" => json(StatusCode::OK, &guest.sampler.sample()),
                "/envs" => json(StatusCode::OK, &guest.session.envs()),
                "/ports" => json(StatusCode::OK, &list::open_ports(guest.ports.forwarded()).await),
                "/activity" => json(StatusCode::OK, &activity::sample(guest)),
                _ => call(guest, rpc, request).await,
            }
        }
    }
}

fn is_the_hosts(path: &str) -> bool {
    matches!(path, "/init" | "/init/held" | "/snapshot/prepare")
}

async fn call(guest: &Guest, rpc: Rpc, request: Request<Incoming>) -> Answer {
    if let Err(message) = check_protocol(request.headers()) {
        return json(StatusCode::BAD_REQUEST, &serde_json::json!({"code": "invalid_argument", "message": message}));
    }
    // Until the answer begins the request's message is held, by whoever.
    let share = guest.bodies.share(BODY_BYTES_MAX);
    let counted = request.map(|body| Counted { body, share: share.clone() });
    match rpc.oneshot(counted).await {
        Ok(_) if share.is_refused() => json(
            StatusCode::TOO_MANY_REQUESTS,
            &serde_json::json!({"code": "resource_exhausted", "message": BodyError::Refused.to_string()}),
        ),
        Ok(answer) => answer.map(|body| UnsyncBoxBody::new(body.map_err(Into::into))),
        Err(never) => match never {},
    }
}

/// The runtime takes a time that it cannot read for none; but that time is a command's whole life.
pub(crate) fn check_protocol(headers: &HeaderMap) -> Result<(), &'static str> {
    let text = |name: &str| headers.get(name).map(|value| value.to_str().unwrap_or_default());
    let milliseconds = |text: &str| (1..=10).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_digit());
    match (text("connect-timeout-ms"), text("connect-protocol-version")) {
        (Some(time), _) if !milliseconds(time) => Err("connect-timeout-ms must be 1 to 10 digits"),
        (_, Some(version)) if version != "1" => Err("connect-protocol-version must be 1"),
        _ => Ok(()),
    }
}

fn health() -> Answer {
    let mut answer = empty(StatusCode::NO_CONTENT);
    answer.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    answer.headers_mut().insert(VERSION_HEADER, HeaderValue::from_static(VERSION));
    answer
}

/// Held: users' processes go on standing still, for the `/init` that will follow.
async fn init(
    guest: &Arc<Guest>,
    connection: &Arc<Connection>,
    local: IpAddr,
    request: Request<Incoming>,
    is_held: bool,
) -> Answer {
    let body = match Limited::new(request.into_body(), identity::BODY_BYTES_MAX).collect().await {
        Ok(body) => body.to_bytes(),
        Err(_) => return fault(StatusCode::PAYLOAD_TOO_LARGE, "the body is too large or was cut off"),
    };
    let hello = match identity::Hello::parse(&body) {
        Ok(hello) => hello,
        Err(e) => return fault(StatusCode::BAD_REQUEST, &e.to_string()),
    };
    if !guest.session.standalone && guest.session.identity().is_none() && !hello.has_control_token() {
        return fault(StatusCode::BAD_REQUEST, "controlToken is missing: the first /init after a boot has to bring it");
    }
    // A task of its own: a host that gives up leaves no guest that is half another.
    let introduced = tokio::spawn(introduce(guest.clone(), connection.clone(), local, hello, is_held)).await;
    introduced.unwrap_or_else(|_| fault(StatusCode::INTERNAL_SERVER_ERROR, "envd made a mistake in /init"))
}

async fn introduce(
    guest: Arc<Guest>,
    connection: Arc<Connection>,
    local: IpAddr,
    hello: identity::Hello,
    is_held: bool,
) -> Answer {
    let _alone = guest.introduction.lock().await;
    if is_held && !sync::hold(&guest) {
        return fault(StatusCode::CONFLICT, "users' processes run: they cannot be held");
    }
    if hello.is_outdated(&guest.session, guest.quiet.is_on()) {
        return fault(StatusCode::CONFLICT, "this /init is of an earlier incarnation");
    }
    let hello = match hello.apply(&guest.session).await {
        Ok(hello) => hello,
        // Users' processes stay frozen: they would run with the clock, the random numbers or the id of another.
        Err(e) => return fault(StatusCode::INTERNAL_SERVER_ERROR, &e.to_string()),
    };
    let is_new = identity::assume(&guest.session, &hello);
    guest.ports.reached_at(local);
    connection.show(hello.incarnation());
    if is_new {
        guest.registry.reset_strangers(hello.incarnation(), connection.id);
        guest.ports.restored();
    }
    if !is_held {
        sync::end(&guest);
    }
    let mut answer = empty(StatusCode::NO_CONTENT);
    answer.headers_mut().insert(VERSION_HEADER, HeaderValue::from_static(VERSION));
    answer
}

async fn prepare(guest: &Arc<Guest>, connection: &Connection) -> Answer {
    match sync::prepare(guest, connection.id).await {
        Ok(is_flushed) => {
            let mut answer = empty(StatusCode::NO_CONTENT);
            let flushed = HeaderValue::from_static(if is_flushed { "yes" } else { "no" });
            answer.headers_mut().insert(DISK_FLUSHED_HEADER, flushed);
            answer
        }
        Err(e) => fault(StatusCode::INTERNAL_SERVER_ERROR, &format!("freeze user processes: {e}")),
    }
}

pub fn empty(status: StatusCode) -> Answer {
    let mut answer = Response::new(whole(Bytes::new()));
    *answer.status_mut() = status;
    answer
}

pub fn json(status: StatusCode, value: &impl serde::Serialize) -> Answer {
    let text = serde_json::to_vec(value).expect("our own types can be written as JSON");
    let mut answer = Response::new(whole(text.into()));
    *answer.status_mut() = status;
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    answer
}

/// Every plain HTTP error: `{"code", "message"}`.
pub fn fault(status: StatusCode, message: &str) -> Answer {
    json(status, &Fault { code: status.as_u16(), message: message.to_owned() })
}

pub fn whole(bytes: Bytes) -> AnswerBody {
    UnsyncBoxBody::new(Full::new(bytes).map_err(|never| match never {}))
}

/// To a page's browser that asks before it asks.
fn preflight() -> Answer {
    let mut answer = empty(StatusCode::NO_CONTENT);
    for (name, value) in [
        (ACCESS_CONTROL_ALLOW_METHODS, "GET, HEAD, POST, PUT, DELETE, OPTIONS"),
        (ACCESS_CONTROL_ALLOW_HEADERS, "*, Authorization"),
        (ACCESS_CONTROL_MAX_AGE, "7200"),
    ] {
        answer.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    answer
}

/// A body that keeps its connection marked as busy until it has ended.
struct While {
    body: AnswerBody,
    _busy: Busy,
}

impl Body for While {
    type Data = Bytes;
    type Error = Box<dyn std::error::Error + Send + Sync>;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> http_body::SizeHint {
        self.body.size_hint()
    }
}
