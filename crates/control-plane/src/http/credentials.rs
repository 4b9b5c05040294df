//! What a request shows: one API key, one token, or the cookie of a browser. Two are refused, because proxies and logs may mean the other
//! one. A browser sends its cookie by itself, also for other sites' pages, so a cookie alone changes nothing.

use http::{HeaderMap, Method, header};
use url::Url;

use super::errors::ApiError;
use crate::tokens;

pub const COOKIE: &str = "wrenn_session";
const CSRF_HEADER: &str = "x-csrf-token";

pub enum Credential {
    Key([u8; 32]),
    Token(String),
    Cookie { hash: [u8; 32], csrf_token: String },
}

/// The one credential of a request. Headers go before the cookie, which nobody chose to send.
pub fn credential(headers: &HeaderMap) -> Result<Option<Credential>, ApiError> {
    let mut keys = headers.get_all("x-api-key").iter();
    let key = keys.next();
    if keys.next().is_some() {
        return Err(ApiError::invalid("X-API-Key", "is there twice"));
    }
    let token = bearer(headers)?;
    match (key, token) {
        (Some(_), Some(_)) => Err(ApiError::invalid("", "both an API key and a token are given; give one")),
        (Some(key), None) => {
            let hash = key.to_str().ok().and_then(tokens::api_key_hash).ok_or_else(ApiError::unauthorized)?;
            Ok(Some(Credential::Key(hash)))
        }
        (None, Some(token)) => Ok(Some(Credential::Token(token))),
        (None, None) => cookie(headers),
    }
}

pub fn bearer(headers: &HeaderMap) -> Result<Option<String>, ApiError> {
    let mut given = headers.get_all(header::AUTHORIZATION).iter();
    let Some(value) = given.next() else { return Ok(None) };
    if given.next().is_some() {
        return Err(ApiError::invalid("Authorization", "is there twice"));
    }
    let text = value.to_str().map_err(|_| ApiError::unauthorized())?;
    let (scheme, token) = text.split_once(' ').ok_or_else(ApiError::unauthorized)?;
    if !scheme.eq_ignore_ascii_case("bearer") {
        return Err(ApiError::unauthorized());
    }
    Ok(Some(token.trim().to_owned()))
}

fn cookie(headers: &HeaderMap) -> Result<Option<Credential>, ApiError> {
    let all = headers.get_all(header::COOKIE).iter().filter_map(|value| value.to_str().ok());
    let ours =
        |pair: &str| pair.trim().split_once('=').filter(|(name, _)| *name == COOKIE).map(|(_, value)| value.to_owned());
    let mut given = all.flat_map(|value| value.split(';')).filter_map(ours);
    let Some(value) = given.next() else { return Ok(None) };
    // A page of a neighbouring name can add one of its own.
    if given.next().is_some() {
        return Err(ApiError::unauthorized());
    }
    let hash = tokens::opaque_hash(&value).ok_or_else(ApiError::unauthorized)?;
    Ok(Some(Credential::Cookie { hash, csrf_token: tokens::csrf_token(&value) }))
}

/// That a request with a cookie was made by a page of ours: what changes something must show the token that only such a page can read, and
/// a WebSocket, whose beginning no page can add headers to, must come from our own origin.
pub fn own_page(headers: &HeaderMap, method: &Method, csrf_token: &str, public_url: &Url) -> Result<(), ApiError> {
    if headers.contains_key(header::UPGRADE) {
        let origin = headers.get(header::ORIGIN).and_then(|origin| origin.to_str().ok()).unwrap_or_default();
        let ours = public_url.origin().ascii_serialization();
        return if origin == ours {
            Ok(())
        } else {
            Err(ApiError::forbidden("a WebSocket with a cookie must come from this site"))
        };
    }
    if [Method::GET, Method::HEAD].contains(method) {
        return Ok(());
    }
    let shown = headers.get(CSRF_HEADER).map(|value| value.as_bytes()).unwrap_or_default();
    if subtle::ConstantTimeEq::ct_eq(shown, csrf_token.as_bytes()).into() {
        Ok(())
    } else {
        Err(ApiError::forbidden("a request with a cookie needs the header X-CSRF-Token"))
    }
}

/// `value` none: the browser forgets it.
pub fn set_cookie(value: Option<&str>, life_sec: i64, public_url: &Url) -> String {
    let secure = if public_url.scheme() == "https" { "; Secure" } else { "" };
    let (value, life_sec) = value.map_or(("", 0), |value| (value, life_sec));
    format!("{COOKIE}={value}; Path=/; Max-Age={life_sec}; HttpOnly; SameSite=Lax{secure}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(list: &[(&'static str, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in list {
            headers.append(*name, value.parse().unwrap());
        }
        headers
    }

    #[test]
    fn one_credential_and_no_more() {
        let key = format!("wrn_{}", "ab".repeat(32));
        let code = |list: &[(&'static str, &str)]| match credential(&headers(list)) {
            Ok(Some(_)) => "one",
            Ok(None) => "none",
            Err(error) => error.code(),
        };
        assert_eq!(code(&[]), "none");
        assert_eq!(code(&[("x-api-key", &key)]), "one");
        assert_eq!(code(&[("authorization", "Bearer x")]), "one");
        assert_eq!(code(&[("x-api-key", &key), ("x-api-key", &key)]), "invalid_request");
        assert_eq!(code(&[("x-api-key", &key), ("authorization", "Bearer x")]), "invalid_request");
        assert_eq!(code(&[("x-api-key", "nonsense")]), "unauthorized");
        assert_eq!(code(&[("authorization", "Basic x")]), "unauthorized");
    }

    #[test]
    fn a_cookie_is_the_last_resort() {
        let cookie = format!("a=b; {COOKIE}={}", "ab".repeat(32));
        let kind = |list: &[(&'static str, &str)]| match credential(&headers(list)) {
            Ok(Some(Credential::Cookie { .. })) => "cookie",
            Ok(Some(_)) => "header",
            Ok(None) => "none",
            Err(error) => error.code(),
        };
        assert_eq!(kind(&[("cookie", &cookie)]), "cookie");
        assert_eq!(kind(&[("cookie", &cookie), ("authorization", "Bearer x")]), "header");
        assert_eq!(kind(&[("cookie", "other=1")]), "none");
        assert_eq!(kind(&[("cookie", &cookie), ("cookie", &cookie)]), "unauthorized");
        assert_eq!(kind(&[("cookie", "wrenn_session=x")]), "unauthorized");
    }

    #[test]
    fn other_sites_pages_change_nothing() {
        let site = Url::parse("https://wrenn.example.org/").unwrap();
        let passes = |list: &[(&'static str, &str)], method| own_page(&headers(list), &method, "token", &site).is_ok();
        assert!(passes(&[], Method::GET));
        assert!(!passes(&[], Method::POST));
        assert!(!passes(&[("x-csrf-token", "tokem")], Method::DELETE));
        assert!(passes(&[("x-csrf-token", "token")], Method::POST));
        let socket = |origin| passes(&[("upgrade", "websocket"), ("origin", origin)], Method::GET);
        assert!(socket("https://wrenn.example.org"));
        for origin in ["null", "", "http://wrenn.example.org", "https://wrenn.example.org.evil.org", "https://evil.org"]
        {
            assert!(!socket(origin), "{origin}");
        }
        assert!(!passes(&[("upgrade", "websocket"), ("x-csrf-token", "token")], Method::GET));
        assert!(set_cookie(Some("x"), 5, &site).ends_with("HttpOnly; SameSite=Lax; Secure"));
    }
}
