//! Calls to other sites: over TLS, bounded in time and size, without redirects. Plain HTTP is for a site on this machine only.

use std::pin::Pin;
use std::time::Duration;

use futures::StreamExt as _;
use openidconnect::{AsyncHttpClient, HttpRequest, HttpResponse};
use url::{Host, Url};

/// For one call, whole.
const CALL_TIME_MAX: Duration = Duration::from_secs(10);
const CONNECT_TIME_MAX: Duration = Duration::from_secs(5);
/// Keys and tokens have some kilobytes.
const BODY_BYTES_MAX: usize = 512 * 1024;

#[derive(Debug, thiserror::Error)]
pub enum OutwardError {
    #[error("{0} is not https")]
    Plain(Url),
    #[error("it took too long")]
    Late,
    #[error("the answer is too large")]
    TooLarge,
    #[error("{0}")]
    Failed(String),
}

#[derive(Clone)]
pub struct Outward {
    http: reqwest::Client,
}

impl Outward {
    pub fn new() -> Self {
        let http = reqwest::Client::builder()
            .user_agent(concat!("wrenn/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(CONNECT_TIME_MAX)
            .timeout(CALL_TIME_MAX)
            // Logins are rare: a connection that was kept would mostly be one that the site has closed.
            .pool_max_idle_per_host(0)
            // A site that sends us elsewhere would send our secret there.
            .redirect(reqwest::redirect::Policy::none())
            .build()
            .expect("the settings are constant and fit each other");
        Self { http }
    }

    pub async fn ask(&self, request: HttpRequest) -> Result<HttpResponse, OutwardError> {
        let (parts, body) = request.into_parts();
        let url = Url::parse(&parts.uri.to_string()).map_err(|error| OutwardError::Failed(error.to_string()))?;
        if !may_be_asked(&url) {
            return Err(OutwardError::Plain(url));
        }
        let call = self.http.request(parts.method, url).headers(parts.headers).body(body);
        let answer = call.send().await.map_err(failed)?;
        let mut response = http::Response::builder().status(answer.status());
        if let Some(headers) = response.headers_mut() {
            *headers = answer.headers().clone();
        }
        let mut pieces = answer.bytes_stream();
        let mut whole = Vec::new();
        while let Some(piece) = pieces.next().await {
            whole.extend_from_slice(&piece.map_err(failed)?);
            if whole.len() > BODY_BYTES_MAX {
                return Err(OutwardError::TooLarge);
            }
        }
        response.body(whole).map_err(|error| OutwardError::Failed(error.to_string()))
    }
}

/// Boxed: the library's own client of closures has futures that cannot be shown to move between threads.
impl<'c> AsyncHttpClient<'c> for Outward {
    type Error = OutwardError;
    type Future = Pin<Box<dyn Future<Output = Result<HttpResponse, OutwardError>> + Send + 'c>>;

    fn call(&'c self, request: HttpRequest) -> Self::Future {
        Box::pin(self.ask(request))
    }
}

/// Whether what is said to it can be read by nobody else.
pub fn may_be_asked(url: &Url) -> bool {
    let is_here = match url.host() {
        Some(Host::Ipv4(address)) => address.is_loopback(),
        Some(Host::Ipv6(address)) => address.is_loopback(),
        Some(Host::Domain(name)) => name == "localhost",
        None => false,
    };
    url.scheme() == "https" && url.has_host() || url.scheme() == "http" && is_here
}

/// With its causes, without the address: that may hold a code.
fn failed(error: reqwest::Error) -> OutwardError {
    if error.is_timeout() {
        return OutwardError::Late;
    }
    let error = error.without_url();
    let mut said = error.to_string();
    let mut cause = std::error::Error::source(&error);
    while let Some(inner) = cause {
        said = format!("{said}: {inner}");
        cause = inner.source();
    }
    OutwardError::Failed(said)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_said_in_the_clear() {
        for (url, is_asked) in [
            ("https://example.org/x", true),
            ("http://example.org/x", false),
            ("http://127.0.0.1:1/x", true),
            ("http://[::1]/x", true),
            ("http://localhost/x", true),
            ("http://localhost.example.org/x", false),
            ("http://127.0.0.1.example.org/", false),
            ("ftp://127.0.0.1/", false),
            ("file:///etc/passwd", false),
        ] {
            assert_eq!(may_be_asked(&Url::parse(url).unwrap()), is_asked, "{url}");
        }
    }
}
