//! Calls to the control plane, and what their answers may mean.
//!
//! Only a 2xx with the expected JSON is a yes and only a JSON error of ours is a no. A proxy's HTML page, a redirect, an empty 200, a
//! cut body: none of them says anything about this host, and nothing here ever makes the agent stop or delete a sandbox.

use std::time::Duration;

use api::v1::errors::ErrorBody;
use serde::Serialize;
use serde::de::DeserializeOwned;
use url::Url;

/// One call, from connect to the last byte of the answer.
const CALL_TIME_MAX: Duration = Duration::from_secs(15);
const CONNECT_TIME_MAX: Duration = Duration::from_secs(5);
/// Credentials with two certificates are below 10 KiB; the answer to a heartbeat has a hundred bytes for each of 10,000 sandboxes.
const ANSWER_BYTES_MAX: usize = 2 * 1024 * 1024;
/// A header that asks for a longer pause than this is not obeyed longer than this.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(60);

#[derive(Debug, Clone)]
pub struct ControlPlane {
    http: reqwest::Client,
    base: Url,
}

#[derive(Debug, thiserror::Error)]
pub enum CallError {
    #[error("the control plane at {base} does not answer")]
    Unreachable {
        base: Url,
        #[source]
        cause: reqwest::Error,
    },
    #[error("what answers at {base} is not a Wrenn control plane ({what})")]
    NotOurs { base: Url, what: String },
    #[error("the control plane answered {status} {code}: {message}")]
    Refused { status: u16, code: String, message: String, retry_after: Option<Duration> },
}

impl CallError {
    /// The control plane itself says that asking again with the same content is of no use.
    pub fn is_final(&self) -> bool {
        matches!(self, Self::Refused { status: 400 | 401 | 403 | 409 | 410 | 413 | 415 | 422 | 426, .. })
    }

    /// The control plane itself does not accept this host's credential, or knows another machine that has it, too.
    pub fn is_unauthorized(&self) -> bool {
        matches!(self, Self::Refused { status: 401 | 403, .. }) || self.is_fenced()
    }

    pub fn is_fenced(&self) -> bool {
        matches!(self, Self::Refused { code, .. } if code == "host_fenced")
    }

    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Refused { retry_after, .. } => *retry_after,
            _ => None,
        }
    }
}

/// The client could not be made: the system's certificates cannot be read, for example.
#[derive(Debug, thiserror::Error)]
#[error("make the HTTP client for the control plane")]
pub struct NoClient(#[source] reqwest::Error);

impl ControlPlane {
    pub fn new(base: Url) -> Result<Self, NoClient> {
        let http = reqwest::Client::builder()
            .user_agent(concat!("wrenn-agent/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(CONNECT_TIME_MAX)
            .timeout(CALL_TIME_MAX)
            // A redirect would carry the host's credential to wherever it points.
            .redirect(reqwest::redirect::Policy::none())
            .build()
            .map_err(NoClient)?;
        Ok(Self { http, base })
    }

    pub fn base(&self) -> &Url {
        &self.base
    }

    pub async fn post<A: DeserializeOwned>(
        &self,
        path: &str,
        token: Option<&str>,
        body: &impl Serialize,
    ) -> Result<A, CallError> {
        let url = format!("{}{path}", self.base.as_str().trim_end_matches('/'));
        let mut request = self.http.post(url).json(body);
        if let Some(token) = token {
            request = request.bearer_auth(token);
        }
        let response = request.send().await.map_err(|cause| self.unreachable(cause))?;
        let status = response.status();
        let retry_after = response
            .headers()
            .get(http::header::RETRY_AFTER)
            .and_then(|value| value.to_str().ok()?.parse().ok())
            .map(|seconds| Duration::from_secs(seconds).min(RETRY_AFTER_MAX));
        let bytes = self.body(response).await?;
        if status.is_success() {
            return serde_json::from_slice(&bytes)
                .map_err(|_| self.not_ours(format!("{status} without the expected JSON")));
        }
        match serde_json::from_slice::<ErrorBody>(&bytes) {
            Ok(ErrorBody { error }) if !status.is_redirection() => Err(CallError::Refused {
                status: status.as_u16(),
                code: short(&error.code, 64),
                message: short(&error.message, 300),
                retry_after,
            }),
            _ => Err(self.not_ours(format!("{status} without an error of ours"))),
        }
    }

    async fn body(&self, mut response: reqwest::Response) -> Result<Vec<u8>, CallError> {
        let mut bytes = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(|cause| self.unreachable(cause))? {
            if bytes.len() + chunk.len() > ANSWER_BYTES_MAX {
                return Err(self.not_ours("an answer without end".to_owned()));
            }
            bytes.extend_from_slice(&chunk);
        }
        Ok(bytes)
    }

    fn unreachable(&self, cause: reqwest::Error) -> CallError {
        CallError::Unreachable { base: self.base.clone(), cause }
    }

    fn not_ours(&self, what: String) -> CallError {
        CallError::NotOurs { base: self.base.clone(), what }
    }
}

/// The first characters of a text from elsewhere, without control characters.
fn short(text: &str, characters: usize) -> String {
    text.chars().filter(|c| !c.is_control()).take(characters).collect()
}

/// Waits between repetitions: full jitter below a bound that doubles.
#[derive(Debug)]
pub struct BackOff {
    bound: Duration,
    first: Duration,
    max: Duration,
}

impl BackOff {
    pub fn new(first: Duration, max: Duration) -> Self {
        Self { bound: first, first, max }
    }

    /// `random` is in 0..1. At least a tenth of the bound, so that a lucky number is not a busy loop.
    pub fn next(&mut self, random: f64) -> Duration {
        let wait = self.bound.mul_f64(0.1 + 0.9 * random.clamp(0.0, 1.0));
        self.bound = (self.bound * 2).min(self.max);
        wait
    }

    pub fn reset(&mut self) {
        self.bound = self.first;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn back_off_grows_to_its_bound_and_starts_again() {
        let mut back_off = BackOff::new(Duration::from_secs(1), Duration::from_secs(4));
        let waits: Vec<_> = (0..4).map(|_| back_off.next(1.0).as_secs()).collect();
        assert_eq!(waits, [1, 2, 4, 4]);
        back_off.reset();
        assert_eq!(back_off.next(0.0), Duration::from_millis(100));
    }
}
