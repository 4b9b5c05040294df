//! GitHub: OAuth without an ID token. Who it is, and which addresses are theirs, is asked of its API with the token that the code gave.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use http::{Method, StatusCode, header};
use openidconnect::HttpRequest;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use store::identities::Claimed;
use url::Url;
use url::form_urlencoded::Serializer;

use super::outward::{Outward, OutwardError};
use super::ticket::Ticket;
use super::{GITHUB, OauthError};
use crate::oauth_settings::GitHubSite;
use crate::secrets::sha256;

pub struct GitHub {
    site: GitHubSite,
    back: Url,
    http: Outward,
}

/// It answers 200 also when it refuses.
#[derive(Deserialize)]
struct Tokens {
    access_token: Option<String>,
    error: Option<String>,
}

#[derive(Deserialize)]
struct User {
    id: u64,
    login: String,
    name: Option<String>,
}

#[derive(Deserialize)]
struct Address {
    email: String,
    primary: bool,
    verified: bool,
}

impl GitHub {
    pub fn new(site: GitHubSite, back: Url, http: Outward) -> Self {
        Self { site, back, http }
    }

    pub fn begin(&self, ticket: &Ticket) -> Url {
        let mut url = below(&self.site.url, &["login", "oauth", "authorize"]);
        url.query_pairs_mut()
            .append_pair("client_id", &self.site.client_id)
            .append_pair("redirect_uri", self.back.as_str())
            .append_pair("scope", "read:user user:email")
            .append_pair("state", &ticket.state)
            .append_pair("code_challenge", &URL_SAFE_NO_PAD.encode(sha256(ticket.verifier.as_bytes())))
            .append_pair("code_challenge_method", "S256");
        url
    }

    pub async fn end(&self, ticket: &Ticket, code: &str) -> Result<Claimed, OauthError> {
        let form = Serializer::new(String::new())
            .append_pair("client_id", &self.site.client_id)
            .append_pair("client_secret", &self.site.client_secret)
            .append_pair("code", code)
            .append_pair("redirect_uri", self.back.as_str())
            .append_pair("code_verifier", &ticket.verifier)
            .finish();
        let request = http::Request::builder()
            .method(Method::POST)
            .uri(below(&self.site.url, &["login", "oauth", "access_token"]).as_str())
            .header(header::CONTENT_TYPE, "application/x-www-form-urlencoded")
            .header(header::ACCEPT, "application/json")
            .body(form.into_bytes());
        let tokens: Tokens = self.ask(request).await?;
        let token = match (tokens.access_token, tokens.error.as_deref()) {
            (Some(token), None) => token,
            (_, Some("bad_verification_code")) => return Err(OauthError::Code),
            _ => return Err(OauthError::Wrong("it gives no token".to_owned())),
        };
        let user: User = self.get(&["user"], &token).await?;
        let addresses: Vec<Address> = self.get(&["user", "emails"], &token).await?;
        let email = addresses.into_iter().find(|address| address.primary && address.verified);
        Ok(Claimed {
            provider: GITHUB,
            subject: user.id.to_string(),
            email: email.map(|address| address.email),
            name: user.name.filter(|name| !name.trim().is_empty()).unwrap_or(user.login),
        })
    }

    async fn get<T: DeserializeOwned>(&self, path: &[&str], token: &str) -> Result<T, OauthError> {
        let request = http::Request::builder()
            .uri(below(&self.site.api_url, path).as_str())
            .header(header::AUTHORIZATION, format!("Bearer {token}"))
            .header(header::ACCEPT, "application/vnd.github+json")
            .body(Vec::new());
        self.ask(request).await
    }

    async fn ask<T: DeserializeOwned>(&self, request: http::Result<HttpRequest>) -> Result<T, OauthError> {
        let request = request.map_err(|error| OauthError::Wrong(error.to_string()))?;
        let answer = self.http.ask(request).await.map_err(|error| match error {
            OutwardError::Late => OauthError::Late,
            OutwardError::Failed(said) => OauthError::Away(said),
            other => OauthError::Wrong(other.to_string()),
        })?;
        if answer.status() != StatusCode::OK {
            return Err(OauthError::Wrong(format!("it answers {}", answer.status())));
        }
        serde_json::from_slice(answer.body()).map_err(|error| OauthError::Wrong(error.to_string()))
    }
}

fn below(base: &Url, path: &[&str]) -> Url {
    let mut url = base.clone();
    if let Ok(mut segments) = url.path_segments_mut() {
        segments.pop_if_empty().extend(path);
    }
    url
}
