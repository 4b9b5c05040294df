//! Calls of the public API by somebody who keeps to it: repeats with the same key, and takes 503 for an answer.

use std::time::{Duration, Instant};

use reqwest::{Method, RequestBuilder};
use serde_json::{Value, json};

const CALL_MAX: Duration = Duration::from_secs(30);
const AGAIN: Duration = Duration::from_millis(100);

#[derive(Clone)]
pub struct Client {
    http: reqwest::Client,
    url: String,
    credential: Credential,
}

#[derive(Clone)]
enum Credential {
    Key(String),
    Bearer(String),
}

#[derive(Debug, Clone)]
pub struct Answer {
    pub status: u16,
    pub body: Value,
    pub retry_after: Option<String>,
}

/// Nobody knows whether the call was heard.
#[derive(Debug)]
pub struct NoAnswer;

impl Answer {
    pub fn code(&self) -> &str {
        self.body["error"]["code"].as_str().unwrap_or_default()
    }

    pub fn id(&self) -> String {
        self.body["id"].as_str().unwrap_or_else(|| panic!("{} {}", self.status, self.body)).to_owned()
    }

    /// The platform says that it cannot just now.
    pub fn is_unavailable(&self) -> bool {
        if self.status != 503 || self.code() != "unavailable" {
            return false;
        }
        assert!(self.retry_after.is_some(), "a 503 without Retry-After: {}", self.body);
        true
    }
}

impl Client {
    pub fn key(url: &str, key: &str) -> Self {
        Self::new(url, Credential::Key(key.to_owned()))
    }

    pub fn bearer(url: &str, token: &str) -> Self {
        Self::new(url, Credential::Bearer(token.to_owned()))
    }

    fn new(url: &str, credential: Credential) -> Self {
        // A connection for each call, so that the balancer spreads them.
        let http = reqwest::Client::builder().timeout(CALL_MAX).pool_max_idle_per_host(0).build().unwrap();
        Self { http, url: url.to_owned(), credential }
    }

    /// Of one who shows a token.
    pub fn bearer_token(&self) -> &str {
        match &self.credential {
            Credential::Bearer(token) => token,
            Credential::Key(_) => panic!("a key is no token"),
        }
    }

    pub fn at(&self, url: &str) -> Self {
        Self { url: url.to_owned(), ..self.clone() }
    }

    /// Of one who shows a key.
    #[allow(dead_code)] // The bench of the API asks for it.
    pub fn key_text(&self) -> &str {
        match &self.credential {
            Credential::Key(key) => key,
            Credential::Bearer(_) => panic!("a token is no key"),
        }
    }

    pub fn request(&self, method: Method, path: &str) -> RequestBuilder {
        let request = self.http.request(method, format!("{}{path}", self.url));
        match &self.credential {
            Credential::Key(key) => request.header("X-API-Key", key),
            Credential::Bearer(token) => request.bearer_auth(token),
        }
    }

    pub async fn send(request: RequestBuilder) -> Result<Answer, NoAnswer> {
        let answer = request.send().await.map_err(|_| NoAnswer)?;
        let status = answer.status().as_u16();
        let retry_after = answer.headers().get("retry-after").map(|value| value.to_str().unwrap().to_owned());
        let text = answer.text().await.map_err(|_| NoAnswer)?;
        Ok(Answer { status, body: serde_json::from_str(&text).unwrap_or(Value::String(text)), retry_after })
    }

    pub async fn call(&self, method: Method, path: &str, body: Option<Value>) -> Result<Answer, NoAnswer> {
        let request = self.request(method, path);
        Self::send(match body {
            Some(body) => request.json(&body),
            None => request,
        })
        .await
    }

    pub async fn create_once(&self, key: &str, wait_sec: u32) -> Result<Answer, NoAnswer> {
        let request = self.request(Method::POST, &format!("/v1/sandboxes?wait_sec={wait_sec}"));
        let body = json!({"template": "minimal", "memory_mb": 128, "disk_size_mb": 1024});
        Self::send(request.header("Idempotency-Key", key).json(&body)).await
    }

    pub async fn verb_once(&self, id: &str, verb: &str, wait_sec: u32) -> Result<Answer, NoAnswer> {
        match verb {
            "kill" => self.call(Method::DELETE, &format!("/v1/sandboxes/{id}?wait_sec={wait_sec}"), None).await,
            "get" => self.call(Method::GET, &format!("/v1/sandboxes/{id}"), None).await,
            _ => self.call(Method::POST, &format!("/v1/sandboxes/{id}/{verb}?wait_sec={wait_sec}"), None).await,
        }
    }

    /// With the same key until there is an answer.
    pub async fn create(&self, key: &str) -> Answer {
        until_answered(|| self.create_once(key, 10)).await
    }

    /// Repeated until there is an answer.
    pub async fn verb(&self, id: &str, verb: &str) -> Answer {
        until_answered(|| self.verb_once(id, verb, 10)).await
    }

    pub async fn status(&self, id: &str) -> String {
        let shown = self.verb(id, "get").await;
        shown.body["status"].as_str().unwrap_or_else(|| panic!("{id}: {} {}", shown.status, shown.body)).to_owned()
    }

    pub async fn wait_status(&self, id: &str, wanted: &str, time_max: Duration) -> Duration {
        let began = Instant::now();
        loop {
            let status = self.status(id).await;
            if status == wanted {
                return began.elapsed();
            }
            assert!(began.elapsed() < time_max, "{id} is {status} and not {wanted} after {time_max:?}");
            tokio::time::sleep(AGAIN).await;
        }
    }

    /// A sandbox that runs.
    pub async fn running(&self, key: &str) -> String {
        let made = self.create(key).await;
        let id = made.id();
        self.wait_status(&id, "running", Duration::from_secs(60)).await;
        id
    }
}

async fn until_answered<F: Future<Output = Result<Answer, NoAnswer>>>(call: impl Fn() -> F) -> Answer {
    let began = Instant::now();
    loop {
        if let Ok(answer) = call().await
            && !answer.is_unavailable()
        {
            return answer;
        }
        assert!(began.elapsed() < Duration::from_secs(90), "no answer in 90 s");
        tokio::time::sleep(AGAIN).await;
    }
}
