//! `GET` and `HEAD /v1/sandboxes/{id}/files/content`: a file, so that a download that broke off can be resumed: with `Range`, `If-Range` and the
//! `ETag` of before, which is another one when the file has changed. The guest judges conditions and ranges; here they are carried.

use api::host::ReadFileRequest;
use api::v1::errors::ErrorBody;
use axum::extract::State;
use axum::response::Response;
use http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use model::ids::SandboxId;
use serde::Deserialize;
use utoipa::IntoParams;

use super::read::{asked, send};
use super::{check_path, user};
use crate::app::App;
use crate::http::access::Caller;
use crate::http::body::{Id, Query};
use crate::http::errors::ApiError;

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct Named {
    /// Absolute, or relative to the home of the user.
    #[serde(default)]
    pub path: String,
    /// The sandbox's default user when absent.
    pub user: Option<String>,
}

#[utoipa::path(get, path = "/{id}/files/content", tag = "files",
    params(("id" = String, Path), Named, ("Range" = Option<String>, Header), ("If-Range" = Option<String>, Header),
        ("If-None-Match" = Option<String>, Header), ("If-Modified-Since" = Option<String>, Header)),
    responses((status = 200, body = Vec<u8>, content_type = "application/octet-stream"),
        (status = 206, body = Vec<u8>, content_type = "application/octet-stream"), (status = 304), (status = 400, body = ErrorBody),
        (status = 403, body = ErrorBody), (status = 404, body = ErrorBody), (status = 409, body = ErrorBody),
        (status = 416, body = ErrorBody), (status = 503, body = ErrorBody)))]
pub async fn content(
    State(app): State<App>,
    caller: Caller,
    Id(id): Id<SandboxId>,
    Query(named): Query<Named>,
    method: Method,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    check_path("path", &named.path)?;
    let user = user(named.user)?;
    let disposition = disposition(&named.path);
    let agent = super::super::awake(&app, &caller, &id).await?;
    let request = ReadFileRequest {
        sandbox_id: id.to_string(),
        path: named.path,
        user,
        range: asked(&headers, header::RANGE),
        if_range: asked(&headers, header::IF_RANGE),
        if_none_match: asked(&headers, header::IF_NONE_MATCH),
        if_modified_since: asked(&headers, header::IF_MODIFIED_SINCE),
        head_only: method == Method::HEAD,
        ..Default::default()
    };
    let mut response = send(&agent, request).await?;
    if matches!(response.status(), StatusCode::OK | StatusCode::PARTIAL_CONTENT) {
        response.headers_mut().insert(header::CONTENT_DISPOSITION, disposition);
    }
    if response.status().as_u16() < 400 {
        // Kept by whoever asked, and asked for again each time.
        response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("private, no-cache"));
    }
    Ok(response)
}

/// Never shown by a browser: what is in a sandbox is nobody's page of this site. The name as ASCII for those who know no better, and as it is
/// (RFC 6266, RFC 8187).
fn disposition(path: &str) -> HeaderValue {
    let name = path.trim_end_matches('/').rsplit('/').next().unwrap_or_default();
    let is_plain = |char: char| matches!(char, ' '..='~') && !matches!(char, '"' | '\\' | '%');
    let ascii: String = name.chars().map(|char| if is_plain(char) { char } else { '_' }).collect();
    let mut text = format!("attachment; filename=\"{ascii}\"");
    if ascii != name {
        let is_attr = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$&+-.^_`|~".contains(&byte);
        let escape = |byte: u8| if is_attr(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") };
        text.push_str("; filename*=UTF-8''");
        text.extend(name.bytes().map(escape));
    }
    HeaderValue::from_str(&text).expect("all that is left is printable ASCII")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_cannot_break_out_of_their_header() {
        for (path, expected) in [
            ("/dir/plain.txt", "attachment; filename=\"plain.txt\""),
            ("plain", "attachment; filename=\"plain\""),
            ("/", "attachment; filename=\"\""),
            ("/x/", "attachment; filename=\"x\""),
            ("/a \"b\"", "attachment; filename=\"a _b_\"; filename*=UTF-8''a%20%22b%22"),
            (
                "/x\r\nset-cookie: y",
                "attachment; filename=\"x__set-cookie: y\"; filename*=UTF-8''x%0D%0Aset-cookie%3A%20y",
            ),
            ("/näme", "attachment; filename=\"n_me\"; filename*=UTF-8''n%C3%A4me"),
        ] {
            assert_eq!(disposition(path), expected, "{path}");
        }
    }
}
