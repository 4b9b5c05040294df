//! Bodies that are forms (`multipart/form-data`), read as they come.

use std::time::Duration;

use axum::extract::multipart::{Field, Multipart, MultipartError, MultipartRejection};
use axum::extract::{DefaultBodyLimit, FromRequest as _, Request};
use http::{HeaderMap, header};

use super::body::is_encoded;
use super::errors::ApiError;

/// Of the client in the middle of an upload.
pub const SILENCE_MAX: Duration = Duration::from_secs(60);

/// By what its headers say.
pub fn is_one(headers: &HeaderMap) -> Result<(), ApiError> {
    let kind = headers.get(header::CONTENT_TYPE).map(|kind| kind.as_bytes().to_ascii_lowercase()).unwrap_or_default();
    if is_encoded(headers) || !kind.starts_with(b"multipart/form-data") {
        return Err(ApiError::unsupported_media_type("multipart/form-data"));
    }
    Ok(())
}

pub async fn of(mut request: Request) -> Result<Multipart, ApiError> {
    DefaultBodyLimit::disable().apply(&mut request);
    Multipart::from_request(request, &()).await.map_err(|error| match error {
        MultipartRejection::InvalidBoundary(_) => ApiError::unsupported_media_type("multipart/form-data"),
        _ => ApiError::invalid("", "the body is not multipart/form-data"),
    })
}

/// The whole text of a field.
pub async fn text_of(field: &mut Field<'_>, name: &str, bytes_max: usize) -> Result<String, ApiError> {
    let mut bytes = Vec::new();
    while let Some(chunk) = within(field.chunk()).await? {
        if bytes.len() + chunk.len() > bytes_max {
            return Err(ApiError::invalid(name, "is too long"));
        }
        bytes.extend_from_slice(&chunk);
    }
    String::from_utf8(bytes).map_err(|_| ApiError::invalid(name, "is not UTF-8"))
}

/// The next part of the form, if it comes in time.
pub async fn within<T>(part: impl Future<Output = Result<T, MultipartError>>) -> Result<T, ApiError> {
    match tokio::time::timeout(SILENCE_MAX, part).await {
        Ok(Ok(part)) => Ok(part),
        Ok(Err(_)) => Err(ApiError::invalid("", "the form is malformed or ended early")),
        Err(_) => Err(ApiError::request_timeout()),
    }
}
