//! Request bodies and parameters: bounded in size and time, and refused where another reader would understand something else
//! (duplicate keys, two documents, other encodings).

use std::fmt;
use std::time::Duration;

use axum::body::{Body, HttpBody as _};
use axum::extract::{FromRequest, FromRequestParts, Request};
use bytes::Bytes;
use http::request::Parts;
use http::{HeaderMap, header};
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use serde::de::{DeserializeOwned, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::{Map, Number, Value};

use super::errors::ApiError;

const JSON_BYTES_MAX: usize = 1024 * 1024;
const BODY_TIME_MAX: Duration = Duration::from_secs(30);
const DEPTH_MAX: usize = 32;

/// A JSON body.
pub struct Json<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Json<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, _: &S) -> Result<Self, ApiError> {
        is_json(request.headers())?;
        let bytes = read(request.into_body(), JSON_BYTES_MAX).await?;
        parse(&bytes).map(Self)
    }
}

/// A JSON body that may be absent.
pub struct OptionalJson<T>(pub T);

impl<T: DeserializeOwned + Default, S: Send + Sync> FromRequest<S> for OptionalJson<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, _: &S) -> Result<Self, ApiError> {
        let is_json = is_json(request.headers());
        let bytes = read(request.into_body(), JSON_BYTES_MAX).await?;
        if bytes.is_empty() {
            return Ok(Self(T::default()));
        }
        is_json?;
        parse(&bytes).map(Self)
    }
}

/// Parameters after the question mark.
pub struct Query<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequestParts<S> for Query<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        let query = axum::extract::Query::<T>::try_from_uri(&parts.uri);
        query
            .map(|query| Self(query.0))
            .map_err(|error| ApiError::invalid("", format!("the query: {}", error.body_text())))
    }
}

/// The path parameter `id`, parsed.
pub struct Id<T>(pub T);

/// The last path parameter, parsed: of routes that name a thing within another.
pub struct LastId<T>(pub T);

macro_rules! from_path {
    ($type:ident, $pick:expr) => {
        impl<T, S> FromRequestParts<S> for $type<T>
        where
            T: std::str::FromStr,
            T::Err: fmt::Display,
            S: Send + Sync,
        {
            type Rejection = ApiError;

            async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
                let raw = axum::extract::RawPathParams::from_request_parts(parts, state).await;
                let raw = raw.map_err(|_| ApiError::invalid("id", "is not UTF-8"))?;
                let pick: fn(&axum::extract::RawPathParams) -> Option<(&str, &str)> = $pick;
                let (name, text) = pick(&raw).unwrap_or_default();
                text.parse().map(Self).map_err(|error| ApiError::invalid(name, format!("is {error}")))
            }
        }
    };
}

from_path!(Id, |params| params.iter().find(|(name, _)| *name == "id"));
from_path!(LastId, |params| params.iter().last());

fn is_json(headers: &HeaderMap) -> Result<(), ApiError> {
    let wrong = || ApiError::unsupported_media_type("application/json");
    let kind = headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).ok_or_else(wrong)?;
    let kind = kind.split(';').next().unwrap_or_default().trim();
    if !kind.eq_ignore_ascii_case("application/json") || is_encoded(headers) {
        return Err(wrong());
    }
    Ok(())
}

pub fn is_encoded(headers: &HeaderMap) -> bool {
    headers.get(header::CONTENT_ENCODING).is_some_and(|encoding| encoding != "identity")
}

/// The whole body, within a size and a time.
pub async fn read(body: Body, bytes_max: usize) -> Result<Bytes, ApiError> {
    let too_large = || ApiError::too_large(u64::try_from(bytes_max).unwrap_or(u64::MAX));
    // Who says so beforehand is answered before anything is read; a client that waits to go on does not send it.
    if usize::try_from(body.size_hint().lower()).is_ok_and(|bytes| bytes > bytes_max) {
        return Err(too_large());
    }
    let collected = tokio::time::timeout(BODY_TIME_MAX, Limited::new(body, bytes_max).collect());
    match collected.await {
        Err(_) => Err(ApiError::request_timeout()),
        Ok(Ok(whole)) => Ok(whole.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(too_large()),
        Ok(Err(_)) => Err(ApiError::invalid("", "the body ended early")),
    }
}

pub fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ApiError> {
    if bytes.is_empty() {
        return Err(ApiError::invalid("", "the body is empty; a JSON object is needed"));
    }
    let text = std::str::from_utf8(bytes).map_err(|_| ApiError::invalid("", "the body is not UTF-8"))?;
    let Strict(value) =
        serde_json::from_str(text).map_err(|error| ApiError::invalid("", format!("the body is not JSON: {error}")))?;
    if !value.is_object() {
        return Err(ApiError::invalid("", "the body must be a JSON object"));
    }
    check(&value, "", 0)?;
    serde_path_to_error::deserialize(value).map_err(|error| {
        let field = error.path().to_string();
        ApiError::invalid(if field == "." { "" } else { &field }, format!("is wrong: {}", error.into_inner()))
    })
}

/// NUL opens doors in whatever is written in C; depth opens them in whatever recurses.
fn check(value: &Value, field: &str, depth: usize) -> Result<(), ApiError> {
    if depth > DEPTH_MAX {
        return Err(ApiError::invalid(field, format!("is nested deeper than {DEPTH_MAX}")));
    }
    match value {
        Value::String(text) if text.contains('\0') => Err(ApiError::invalid(field, "holds a NUL character")),
        Value::Array(items) => items.iter().try_for_each(|item| check(item, field, depth + 1)),
        Value::Object(items) => items.iter().try_for_each(|(name, item)| {
            if name.contains('\0') {
                return Err(ApiError::invalid(field, "holds a NUL character"));
            }
            check(item, if field.is_empty() { name } else { field }, depth + 1)
        }),
        _ => Ok(()),
    }
}

/// A JSON value in which no key is said twice: of two, readers take the first or the last.
struct Strict(Value);

impl<'de> Deserialize<'de> for Strict {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(StrictVisitor).map(Self)
    }
}

struct StrictVisitor;

impl<'de> Visitor<'de> for StrictVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<Value, E> {
        Number::from_f64(value).map(Value::Number).ok_or_else(|| E::custom("a number is not finite"))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::String(value.to_owned()))
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(Strict(item)) = items.next_element()? {
            list.push(item);
        }
        Ok(Value::Array(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut map = Map::new();
        while let Some((name, Strict(item))) = items.next_entry::<String, Strict>()? {
            if map.contains_key(&name) {
                return Err(serde::de::Error::custom(format!(
                    "the key {:?} is there twice",
                    super::errors::echo(&name)
                )));
            }
            map.insert(name, item);
        }
        Ok(Value::Object(map))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Deserialize, PartialEq)]
    struct Body {
        #[serde(default)]
        count: Option<i64>,
        #[serde(default)]
        name: Option<String>,
    }

    #[test]
    fn refuses_what_is_not_one_json_object() {
        let deep = format!("{{\"x\":{}1{}}}", "[".repeat(100_000), "]".repeat(100_000));
        let nested = format!("{{\"x\":{}1{}}}", "[".repeat(40), "]".repeat(40));
        for wrong in [
            "",
            "null",
            "[]",
            "\"x\"",
            "{}{}",
            "{} x",
            "\u{feff}{}",
            "{\"count\":1,\"count\":2}",
            "{\"count\":NaN}",
            "{\"count\":1e400}",
            "{/**/}",
            "{\"count\":1.5}",
            "{\"count\":\"2\"}",
            "{\"count\":9223372036854775808}",
            "{\"name\":\"a\\u0000b\"}",
            &deep,
            &nested,
        ] {
            let error = parse::<Body>(wrong.as_bytes()).unwrap_err();
            assert_eq!(error.code(), "invalid_request", "{}", &wrong[..wrong.len().min(40)]);
        }
        assert!(parse::<Body>(b"\xff\xfe{\0}\0").is_err());
        assert_eq!(parse::<Body>(b"{\"count\":1,\"other\":true}").unwrap(), Body { count: Some(1), name: None });
    }

    #[test]
    fn names_the_field() {
        let error = parse::<Body>(b"{\"count\":\"2\"}").unwrap_err();
        assert_eq!(error.object("").details.unwrap()["field"], "count");
    }
}
