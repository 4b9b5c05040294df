//! The client of the public API: one place for addresses, credentials, deadlines and the shape of errors.
//!
//! It refuses to wait without a bound: every call has a total deadline, except transfers, which may last as long as bytes move.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use api::v1::errors::{ErrorBody, ErrorObject};
use reqwest::{ClientBuilder, Method, RequestBuilder, Response, StatusCode};
use serde::Serialize;
use serde::de::DeserializeOwned;
use url::Url;

use crate::credentials::{Options, checked_header};
use crate::failure::{Failure, with_causes};

const CONNECT_MAX: Duration = Duration::from_secs(10);
/// The server answers within 120 s at the most (`wait_sec`); a little more for the way.
const CALL_MAX: Duration = Duration::from_secs(150);
/// A transfer may last for hours, but not without a byte for this long.
pub const SILENCE_MAX: Duration = Duration::from_secs(120);
/// A control plane that is being restarted is back within seconds. Only calls that may be repeated are.
const TRIES: u32 = 5;
const PAUSE_FIRST: Duration = Duration::from_millis(200);
/// Who sends too much is told for how long to wait: seconds, unless it is about guessed passwords.
const RATE_WAIT_MAX: Duration = Duration::from_secs(10);
const RATE_TRIES: u32 = 4;

#[derive(Clone)]
pub enum Credential {
    ApiKey(String),
    /// An administrator's JWT.
    Bearer(String),
    None,
}

#[derive(Clone)]
pub struct Client {
    base: Url,
    credential: Credential,
    http: reqwest::Client,
    /// Made when something is sent up.
    uploads: Arc<OnceLock<reqwest::Client>>,
}

fn made(change: impl FnOnce(ClientBuilder) -> ClientBuilder) -> Result<reqwest::Client, Failure> {
    let client = reqwest::Client::builder()
        .user_agent(concat!("wrenn/", env!("CARGO_PKG_VERSION")))
        .connect_timeout(CONNECT_MAX)
        // A redirect would send the key to somewhere else.
        .redirect(reqwest::redirect::Policy::none());
    change(client).build().map_err(|error| Failure::new(format!("make an HTTP client: {}", with_causes(&error))))
}

impl Client {
    pub fn new(base: Url, credential: Credential) -> Result<Self, Failure> {
        let http = made(|client| client.read_timeout(SILENCE_MAX.max(CALL_MAX)))?;
        Ok(Self { base, credential, http, uploads: Arc::default() })
    }

    /// With the API key, or the session of `wrenn login`: for the commands of users.
    pub fn of_user(options: &Options) -> Result<Self, Failure> {
        Self::new(options.api_url()?, options.of_team()?)
    }

    /// With the session of `wrenn login`, for the commands of a person. Without one an administrator acts, where that is possible.
    pub async fn of_person(options: &Options) -> Result<Self, Failure> {
        let is_given = options.admin_token.as_ref().is_some_and(|token| !token.is_empty());
        match options.session_token()?.filter(|_| !is_given) {
            Some(token) => Self::new(options.api_url()?, Credential::Bearer(token)),
            None => Self::of_administrator(options).await,
        }
    }

    /// With an administrator's JWT: for the commands of operators.
    pub async fn of_administrator(options: &Options) -> Result<Self, Failure> {
        let url = options.api_url()?;
        let token = match options.admin_token.clone().filter(|token| !token.is_empty()) {
            Some(token) => checked_header(token, "WRENN_ADMIN_TOKEN")?,
            // A token of this machine's platform is nobody else's business.
            None if options.is_local(&url)? => crate::commands::admin::token(options).await?,
            None => {
                return Err(Failure::new(format!(
                    "{url} is not the platform of {}: `wrenn login`, or give an administrator's token of it as WRENN_ADMIN_TOKEN",
                    options.dir()?.display()
                )));
            }
        };
        Self::new(url, Credential::Bearer(token))
    }

    pub fn base(&self) -> &Url {
        &self.base
    }

    /// The address of a route. Path segments that come from users are given in `segments` and are escaped.
    pub fn url(&self, segments: &[&str]) -> Url {
        let mut url = self.base.clone();
        url.path_segments_mut().expect("http and https URLs have segments").pop_if_empty().extend(segments);
        url
    }

    pub fn header(&self) -> Option<(&'static str, String)> {
        match &self.credential {
            Credential::ApiKey(key) => Some(("X-API-Key", key.clone())),
            Credential::Bearer(token) => Some(("Authorization", format!("Bearer {token}"))),
            Credential::None => None,
        }
    }

    pub fn request(&self, method: Method, url: Url) -> RequestBuilder {
        self.with_credential(self.http.request(method, url))
    }

    /// For a body that may take hours. The time for reading counts from the beginning of a call until its answer, also while the body is
    /// sent, so there is none here: whoever sends sees to it that it does not stand still.
    pub fn upload(&self, method: Method, url: Url) -> Result<RequestBuilder, Failure> {
        let http = match self.uploads.get() {
            Some(http) => http.clone(),
            None => {
                let http = made(|client| client)?;
                self.uploads.get_or_init(|| http).clone()
            }
        };
        Ok(self.with_credential(http.request(method, url)))
    }

    fn with_credential(&self, request: RequestBuilder) -> RequestBuilder {
        match self.header() {
            Some((name, value)) => request.header(name, value),
            None => request,
        }
    }

    pub async fn get<T: DeserializeOwned>(&self, url: Url) -> Result<T, Failure> {
        self.read(self.repeated(self.request(Method::GET, url).timeout(CALL_MAX)).await?).await
    }

    /// A part of a list, and where the next one is (`Link`).
    pub async fn get_page<T: DeserializeOwned>(&self, url: Url) -> Result<(T, Option<Url>), Failure> {
        let answer = self.repeated(self.request(Method::GET, url.clone()).timeout(CALL_MAX)).await?;
        let link = answer.headers().get(reqwest::header::LINK).and_then(|link| link.to_str().ok());
        let next = link.and_then(next_of).and_then(|next| url.join(next).ok());
        // The credentials are for this list, and for nowhere else.
        let next = next.filter(|next| next.origin() == url.origin() && next.path() == url.path() && *next != url);
        Ok((self.read(answer).await?, next))
    }

    pub async fn get_text(&self, url: Url) -> Result<String, Failure> {
        let answer = self.repeated(self.request(Method::GET, url).timeout(CALL_MAX)).await?;
        answer.text().await.map_err(|error| self.broken(&error))
    }

    /// The answer's body may be empty (204): then `None`.
    pub async fn delete<T: DeserializeOwned>(&self, url: Url) -> Result<Option<T>, Failure> {
        let answer = self.repeated(self.request(Method::DELETE, url).timeout(CALL_MAX)).await?;
        if answer.status() == StatusCode::NO_CONTENT {
            return Ok(None);
        }
        self.read(answer).await.map(Some)
    }

    /// A deletion that says what it is sure of; not repeated, because who asked is gone after it. Answered with no body (204).
    pub async fn delete_with<B: Serialize>(&self, url: Url, body: &B) -> Result<(), Failure> {
        let sent = self.patient(self.request(Method::DELETE, url).timeout(CALL_MAX).json(body)).await;
        self.checked(sent.map_err(|error| self.broken(&error))?).await.map(drop)
    }

    /// With an idempotency key, so that a repeated call does the thing once.
    pub async fn post<B: Serialize, T: DeserializeOwned>(&self, url: Url, body: &B) -> Result<T, Failure> {
        let key = uuid::Uuid::new_v4().to_string();
        let request = self.request(Method::POST, url).timeout(CALL_MAX).header("Idempotency-Key", key).json(body);
        self.read(self.repeated(request).await?).await
    }

    /// Done twice it is the same.
    pub async fn put<B: Serialize, T: DeserializeOwned>(&self, url: Url, body: &B) -> Result<T, Failure> {
        let request = self.request(Method::PUT, url).timeout(CALL_MAX).json(body);
        self.read(self.repeated(request).await?).await
    }

    /// As `post`, answered with no body (204).
    pub async fn post_for_nothing<B: Serialize>(&self, url: Url, body: &B) -> Result<(), Failure> {
        self.repeated(self.request(Method::POST, url).timeout(CALL_MAX).json(body)).await.map(drop)
    }

    /// As `put`, answered with no body (204).
    pub async fn put_for_nothing<B: Serialize>(&self, url: Url, body: &B) -> Result<(), Failure> {
        self.repeated(self.request(Method::PUT, url).timeout(CALL_MAX).json(body)).await.map(drop)
    }

    /// A call that makes a new thing each time: it is not repeated.
    pub async fn post_once<B: Serialize, T: DeserializeOwned>(&self, url: Url, body: &B) -> Result<T, Failure> {
        let sent = self.patient(self.request(Method::POST, url).timeout(CALL_MAX).json(body)).await;
        let answer = self.checked(sent.map_err(|error| self.broken(&error))?).await?;
        self.read(answer).await
    }

    /// As `post_once`, answered with no body (204).
    pub async fn post_once_for_nothing<B: Serialize>(&self, url: Url, body: &B) -> Result<(), Failure> {
        let sent = self.patient(self.request(Method::POST, url).timeout(CALL_MAX).json(body)).await;
        self.checked(sent.map_err(|error| self.broken(&error))?).await.map(drop)
    }

    /// A change to what `body` says, answered with none (204).
    pub async fn patch<B: Serialize>(&self, url: Url, body: &B) -> Result<(), Failure> {
        self.repeated(self.request(Method::PATCH, url).timeout(CALL_MAX).json(body)).await.map(drop)
    }

    /// As `patch`, answered with what it has become.
    pub async fn patch_for<B: Serialize, T: DeserializeOwned>(&self, url: Url, body: &B) -> Result<T, Failure> {
        self.read(self.repeated(self.request(Method::PATCH, url).timeout(CALL_MAX).json(body)).await?).await
    }

    /// A call that needs no body, may be repeated, and is answered with none (204).
    pub async fn post_only(&self, url: Url) -> Result<(), Failure> {
        self.repeated(self.request(Method::POST, url).timeout(CALL_MAX)).await.map(drop)
    }

    async fn read<T: DeserializeOwned>(&self, answer: Response) -> Result<T, Failure> {
        let status = answer.status();
        let text = answer.bytes().await.map_err(|error| self.broken(&error))?;
        serde_json::from_slice(&text).map_err(|error| {
            Failure::new(format!("{} answered {status} with something that is not what this API answers ({error}): is it a Wrenn API, of this version?", self.base))
        })
    }

    /// Sends a request that may be repeated, and does repeat it while nobody answers there.
    async fn repeated(&self, request: RequestBuilder) -> Result<Response, Failure> {
        let mut pause = PAUSE_FIRST;
        for attempt in 1.. {
            let this = request.try_clone().expect("bodies of calls are in memory");
            match self.patient(this).await {
                Ok(answer) if answer.status() == StatusCode::SERVICE_UNAVAILABLE && attempt < TRIES => {
                    let error = self.refusal(answer).await;
                    // Only this one says "the platform is not itself just now"; the other 503s are answers.
                    if error.code() != Some("unavailable") {
                        return Err(error);
                    }
                }
                Ok(answer) => return self.checked(answer).await,
                Err(error) if attempt >= TRIES || !(error.is_connect() || error.is_request()) || error.is_timeout() => {
                    return Err(self.broken(&error));
                }
                Err(_) => {}
            }
            tokio::time::sleep(pause).await;
            pause *= 2;
        }
        unreachable!("the loop ends by its return")
    }

    /// Sends a request, and again when there were too many: then nothing was done, so that every call may be repeated.
    async fn patient(&self, request: RequestBuilder) -> Result<Response, reqwest::Error> {
        for _ in 1..RATE_TRIES {
            let Some(this) = request.try_clone() else { break };
            let answer = this.send().await?;
            match rate_wait(&answer) {
                Some(wait) => tokio::time::sleep(wait).await,
                None => return Ok(answer),
            }
        }
        request.send().await
    }

    /// An answer that is a success, or the server's error.
    pub async fn checked(&self, answer: Response) -> Result<Response, Failure> {
        if answer.status().is_success() { Ok(answer) } else { Err(self.refusal(answer).await) }
    }

    async fn refusal(&self, answer: Response) -> Failure {
        let status = answer.status();
        let id = answer.headers().get("x-request-id").and_then(|id| id.to_str().ok()).unwrap_or_default().to_owned();
        let body =
            tokio::time::timeout(CONNECT_MAX, answer.bytes()).await.ok().and_then(Result::ok).unwrap_or_default();
        self.refusal_of(status.as_u16(), &id, &body)
    }

    /// The error in a body, for HTTP answers of any kind (also those that refuse a WebSocket).
    pub fn refusal_of(&self, status: u16, request_id: &str, body: &[u8]) -> Failure {
        match serde_json::from_slice::<ErrorBody>(body) {
            Ok(mut body) => {
                if body.error.request_id.is_empty() {
                    body.error.request_id = request_id.to_owned();
                }
                Failure::refused(body.error)
            }
            Err(_) => Failure::refused(ErrorObject {
                code: format!("http_{status}"),
                message: format!("{} answered {status} without an error that this program knows", self.base),
                request_id: request_id.to_owned(),
                details: None,
            }),
        }
    }

    pub fn broken(&self, error: &reqwest::Error) -> Failure {
        let base = &self.base;
        Failure::new(if error.is_connect() {
            format!("nothing answers at {base}: {} (does `wrenn up` run? is WRENN_API_URL right?)", root_cause(error))
        } else if error.is_timeout() {
            format!("{base} did not answer in time")
        } else {
            format!("the connection to {base} broke: {}", root_cause(error))
        })
    }
}

/// For how long the server asks to wait, where that is bearable. A quota has no such time.
fn rate_wait(answer: &Response) -> Option<Duration> {
    let seconds = answer.headers().get(reqwest::header::RETRY_AFTER)?.to_str().ok()?.parse().ok()?;
    let wait = Duration::from_secs(seconds);
    (answer.status() == StatusCode::TOO_MANY_REQUESTS && wait <= RATE_WAIT_MAX).then_some(wait)
}

/// The address in `<ADDRESS>; rel="next"`.
fn next_of(link: &str) -> Option<&str> {
    let (address, rel) = link.trim().strip_prefix('<')?.split_once('>')?;
    rel.split(';').any(|part| matches!(part.trim(), "rel=\"next\"" | "rel=next")).then_some(address)
}

fn root_cause(error: &dyn std::error::Error) -> String {
    let mut last = error;
    while let Some(source) = last.source() {
        last = source;
    }
    last.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_next_part_of_a_list_is_named_by_its_link() {
        assert_eq!(next_of("<?limit=2&cursor=x>; rel=\"next\""), Some("?limit=2&cursor=x"));
        for other in ["", "<?limit=2>", "<?limit=2>; rel=\"prev\"", "?limit=2; rel=\"next\""] {
            assert_eq!(next_of(other), None, "{other}");
        }
    }

    #[test]
    fn segments_are_escaped_and_a_path_of_the_base_is_kept() {
        let client = Client::new(Url::parse("http://h:1/api/").unwrap(), Credential::None).unwrap();
        assert_eq!(client.url(&["v1", "sandboxes", "../x y"]).as_str(), "http://h:1/api/v1/sandboxes/..%2Fx%20y");
    }
}
