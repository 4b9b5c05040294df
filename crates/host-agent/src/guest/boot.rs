//! What only the host says to a guest: the first words when it boots or was restored, and the last before it is saved.

use std::time::{Duration, SystemTime};

use bytes::Bytes;
use chrono::{DateTime, SecondsFormat, Utc};
use connectrpc::ErrorCode;
use http::{HeaderMap, Request};
use http_body_util::{BodyExt as _, Collected, Empty, Full, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::time::{Instant, timeout};

use super::faults::printable;
use super::{Guest, GuestError};

/// One health request, on a connection of its own.
const HEALTH_TIME_MAX: Duration = Duration::from_secs(1);
/// One attempt to connect to a guest that boots, by how long it has been waited for: a SYN that meets no kernel is repeated by ours only
/// after a second, so it is given up sooner and a new one sent; on a host where even a guest that is up needs longer, later ones wait longer.
const CONNECT_TIMES: [(Duration, Duration); 3] = [
    (Duration::from_secs(4), Duration::from_millis(20)),
    (Duration::from_secs(15), Duration::from_millis(150)),
    (Duration::MAX, Duration::from_secs(1)),
];
/// Pauses between attempts. Boot time is what the caller waits for, so they are short; they grow a little, because a guest that is not
/// up after the first ones has some hundred milliseconds to go.
const PAUSE_FIRST: Duration = Duration::from_millis(2);
const PAUSE_MAX: Duration = Duration::from_millis(10);
/// Shorter than the watchdog in the guest, so that the host knows first.
const INIT_TIME_MAX: Duration = Duration::from_secs(10);
/// The guest takes 3 s at most for getting ready to be saved.
const PREPARE_TIME_MAX: Duration = Duration::from_secs(4);
const INIT_AGAIN: Duration = Duration::from_millis(20);
const ANSWER_BYTES_MAX: usize = 64 * 1024;

impl Guest {
    /// Returns when envd has answered once. The caller bounds the whole wait.
    pub async fn wait_healthy(&self) -> Result<(), GuestError> {
        let mut pause = PAUSE_FIRST;
        let begin = Instant::now();
        loop {
            let waited = begin.elapsed();
            let (_, at_most) =
                CONNECT_TIMES.iter().find(|(until, _)| waited < *until).expect("the last one has no end");
            match self.alive(self.health(*at_most)).await {
                Ok(()) => return Ok(()),
                Err(GuestError::Gone) => return Err(GuestError::Gone),
                Err(_) => tokio::time::sleep(pause).await,
            }
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }

    /// One question on a connection of its own.
    pub async fn health(&self, connect_at_most: Duration) -> Result<(), GuestError> {
        let request = Request::get("/health")
            .header(http::header::HOST, "guest")
            .body(Empty::<Bytes>::new())
            .expect("a constant request is well formed");
        let (status, ..) = self.once(|| request, connect_at_most, HEALTH_TIME_MAX).await?;
        if status.is_success() { Ok(()) } else { Err(GuestError::Fault(format!("health answers {status}"))) }
    }

    /// Gives the guest its identity, and the present time. Answers envd's version. `known_by`: the control token that the guest knows, which of one that was
    /// restored is not the one that `init` brings.
    pub async fn init(&self, init: &api::guest::Init, known_by: &str) -> Result<String, GuestError> {
        self.identify("/init", init, known_by).await
    }

    /// The same, of a guest that was saved: its users' processes go on standing still. A guest whose envd does not know how is left as it was.
    pub async fn init_held(&self, init: &api::guest::Init, known_by: &str) -> Result<String, GuestError> {
        self.identify("/init/held", init, known_by).await
    }

    async fn identify(&self, path: &str, init: &api::guest::Init, known_by: &str) -> Result<String, GuestError> {
        let request = || {
            // The guest's clock is set by it: the time of this moment, not of the first try.
            let now = DateTime::<Utc>::from(SystemTime::now()).to_rfc3339_opts(SecondsFormat::Nanos, true);
            let init = api::guest::Init { timestamp: now, ..init.clone() };
            let body = serde_json::to_vec(&init).expect("an init has only text and maps with text keys");
            let mut request = Request::post(path)
                .header(http::header::HOST, "guest")
                .header(http::header::CONTENT_TYPE, "application/json")
                .header(api::guest::CONTROL_TOKEN_HEADER, known_by);
            for (name, value) in self.headers() {
                request = request.header(name, value);
            }
            request.body(Full::new(Bytes::from(body))).expect("tokens are hex digits of our own making")
        };
        let (status, headers, _) = self.once(request, HEALTH_TIME_MAX, INIT_TIME_MAX).await?;
        match status {
            status if status.is_success() => Ok(text(&headers, api::guest::VERSION_HEADER)),
            // Asked again it may do: what it could not set it can perhaps set in a moment.
            http::StatusCode::INTERNAL_SERVER_ERROR => {
                Err(GuestError::Fault("it could not take its identity".to_owned()))
            }
            http::StatusCode::CONFLICT => Err(GuestError::Refused {
                code: ErrorCode::Aborted,
                message: "the guest has another identity already".to_owned(),
            }),
            status => Err(GuestError::Fault(format!("init answers {status}"))),
        }
    }

    /// The first words to a guest that was restored, until it has heard them; the caller bounds the whole wait. Answers envd's version, and
    /// how long the answered question took.
    pub async fn introduce(&self, init: &api::guest::Init, known_by: &str) -> Result<(String, Duration), GuestError> {
        // A guest that took the first one, whose answer was lost, knows its host by the new token.
        let mut tokens = [known_by, init.control_token.as_str()].into_iter().cycle();
        loop {
            let began = Instant::now();
            match self.init(init, tokens.next().expect("it has no end")).await {
                Err(GuestError::Fault(_)) => tokio::time::sleep(INIT_AGAIN).await,
                answer => return answer.map(|version| (version, began.elapsed())),
            }
        }
    }

    /// Asks the guest to get ready to be saved: its users' processes stand still, its idle connections end, its disk is flushed. False
    /// when the flush is not over yet. Refused when it cannot get ready.
    pub async fn prepare(&self, control_token: &str) -> Result<bool, GuestError> {
        let mut request = Request::post("/snapshot/prepare")
            .header(http::header::HOST, "guest")
            .header(api::guest::CONTROL_TOKEN_HEADER, control_token);
        for (name, value) in self.headers() {
            request = request.header(name, value);
        }
        let request = request.body(Empty::<Bytes>::new()).expect("tokens are hex digits of our own making");
        let (status, headers, _) = self.once(|| request, HEALTH_TIME_MAX, PREPARE_TIME_MAX).await?;
        match status {
            status if status.is_success() => Ok(text(&headers, api::guest::DISK_FLUSHED_HEADER) == "yes"),
            http::StatusCode::INTERNAL_SERVER_ERROR => Err(GuestError::Refused {
                code: ErrorCode::FailedPrecondition,
                message: "its processes cannot be made to stand still".to_owned(),
            }),
            status => Err(GuestError::Fault(format!("prepare answers {status}"))),
        }
    }

    /// One request on a connection of its own; `request` is made once there is one. A body that is too long or breaks off counts as none.
    pub(super) async fn once<B>(
        &self,
        request: impl FnOnce() -> Request<B>,
        connect_at_most: Duration,
        at_most: Duration,
    ) -> Result<(http::StatusCode, HeaderMap, Bytes), GuestError>
    where
        B: hyper::body::Body<Data = Bytes> + Send + 'static,
        B::Error: std::error::Error + Send + Sync + 'static,
    {
        let stream =
            self.connector.connect(connect_at_most).await.map_err(|error| GuestError::Fault(error.to_string()))?;
        let work = async {
            let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
            // Both run in this very task, so the connection cannot outlive the wait.
            tokio::pin!(connection);
            let answer = async {
                let response = sender.send_request(request()).await?;
                let (head, body) = response.into_parts();
                // Read, so that an error text of the guest does not reset the connection under it.
                let body = Limited::new(body, ANSWER_BYTES_MAX).collect().await;
                Ok((head.status, head.headers, body.map(Collected::to_bytes).unwrap_or_default()))
            };
            tokio::pin!(answer);
            tokio::select! {
                biased;
                answer = &mut answer => return answer,
                result = &mut connection => result?,
            }
            // The connection is over; whatever came of it is in the answer already.
            answer.await
        };
        match timeout(at_most, work).await {
            Ok(result) => result.map_err(|error: hyper::Error| GuestError::Fault(error.to_string())),
            Err(_) => Err(GuestError::Fault("no answer in time".to_owned())),
        }
    }
}

/// What a header says, fit to be shown.
fn text(headers: &HeaderMap, name: &str) -> String {
    printable(headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default())
}
