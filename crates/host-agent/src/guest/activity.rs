//! What the guest says of its own work.

use std::time::Duration;

use api::guest::Activity;
use bytes::Bytes;
use http::Request;
use http_body_util::Empty;

use super::{Guest, GuestError};

const CONNECT_TIME_MAX: Duration = Duration::from_secs(1);
/// An emulated guest whose users' processes take all of its CPU was seen to take a second.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(4);

impl Guest {
    /// One question, on a connection of its own, which is over with the answer: nothing of it keeps the guest busy. Sums since the
    /// guest's boot, as it says; in bounded time.
    pub async fn activity(&self) -> Result<Activity, GuestError> {
        let mut request = Request::get("/activity").header(http::header::HOST, "guest");
        for (name, value) in self.headers() {
            request = request.header(name, value);
        }
        let request = request.body(Empty::<Bytes>::new()).expect("tokens are hex digits of our own making");
        let answer = self.once(|| request, CONNECT_TIME_MAX, ANSWER_TIME_MAX);
        let (status, _, body) = self.alive(answer).await?;
        if !status.is_success() {
            return Err(GuestError::Fault(format!("activity answers {status}")));
        }
        serde_json::from_slice(&body).map_err(|_| GuestError::Fault("activity that cannot be read".to_owned()))
    }
}
