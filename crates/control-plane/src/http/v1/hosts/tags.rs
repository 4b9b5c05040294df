//! `/v1/hosts/{id}/tags`: words (`gpu`) and pairs (`zone=a`) that say what a host is. A create that asks for some (`tags`) goes to a host
//! that has them all. What is on a host stays there when a tag goes.

use api::v1::errors::ErrorBody;
use api::v1::hosts::AddTag;
use axum::extract::{Path, State};
use http::StatusCode;
use model::ids::HostId;
use store::hosts::Change;

use crate::app::App;
use crate::http::access::HostsCaller;
use crate::http::body::{Id, Json};
use crate::http::errors::ApiError;

/// Of one host, and of one create.
pub const TAGS_MAX: usize = 32;
const WORD_CHARS_MAX: usize = 63;

#[utoipa::path(get, path = "/{id}/tags", tag = "hosts", params(("id" = String, Path)),
    responses((status = 200, body = Vec<String>), (status = 404, body = ErrorBody)))]
pub async fn list(
    State(app): State<App>,
    _: HostsCaller,
    Id(id): Id<HostId>,
) -> Result<axum::Json<Vec<String>>, ApiError> {
    Ok(axum::Json(super::find(&app, id).await?.tags))
}

#[utoipa::path(post, path = "/{id}/tags", tag = "hosts", params(("id" = String, Path)), request_body = AddTag,
    responses((status = 204), (status = 400, body = ErrorBody), (status = 404, body = ErrorBody)))]
pub async fn add(
    State(app): State<App>,
    caller: HostsCaller,
    Id(id): Id<HostId>,
    Json(body): Json<AddTag>,
) -> Result<StatusCode, ApiError> {
    is_tag("tag", &body.tag)?;
    let (store, actor) = (app.store.clone(), caller.actor());
    let tagged =
        super::super::detached(&app, async move { store.tag_host(id, &body.tag, TAGS_MAX, &actor).await }).await?;
    match tagged {
        Change::Done(_) => Ok(StatusCode::NO_CONTENT),
        Change::Missing => Err(ApiError::not_found("host")),
        Change::Refused => Err(ApiError::invalid("tag", format!("is one too many: a host has at most {TAGS_MAX}"))),
    }
}

/// 204 also when it had none such.
#[utoipa::path(delete, path = "/{id}/tags/{tag}", tag = "hosts", params(("id" = String, Path), ("tag" = String, Path)),
    responses((status = 204), (status = 404, body = ErrorBody)))]
pub async fn remove(
    State(app): State<App>,
    caller: HostsCaller,
    Id(id): Id<HostId>,
    slots: Path<(String, String)>,
) -> Result<StatusCode, ApiError> {
    let Path((_, tag)) = slots;
    is_tag("tag", &tag)?;
    let (store, actor) = (app.store.clone(), caller.actor());
    match super::super::detached(&app, async move { store.untag_host(id, &tag, &actor).await }).await? {
        Change::Done(_) | Change::Refused => Ok(StatusCode::NO_CONTENT),
        Change::Missing => Err(ApiError::not_found("host")),
    }
}

/// The tags of one request, each once.
pub fn checked(tags: Option<Vec<String>>) -> Result<Vec<String>, ApiError> {
    let mut tags = tags.unwrap_or_default();
    if tags.len() > TAGS_MAX {
        return Err(ApiError::invalid("tags", format!("must be at most {TAGS_MAX}")));
    }
    tags.iter().try_for_each(|tag| is_tag("tags", tag))?;
    tags.sort();
    tags.dedup();
    Ok(tags)
}

fn is_tag(field: &str, tag: &str) -> Result<(), ApiError> {
    let is_word = |word: &str| {
        let is_inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'_' | b'.');
        word.len() <= WORD_CHARS_MAX
            && word.bytes().next().is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit())
            && word.bytes().all(is_inner)
    };
    let is_right = match tag.split_once('=') {
        None => is_word(tag),
        Some((key, value)) => is_word(key) && is_word(value),
    };
    if is_right {
        return Ok(());
    }
    Err(ApiError::invalid(
        field,
        "must be a word or key=value, each 1 to 63 of a-z, 0-9, '-', '_' and '.', beginning with a letter or digit",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_are_words_and_pairs() {
        for right in ["gpu", "zone=a", "nvme-2.0", "a_b=1.2", &"x".repeat(63)] {
            assert!(is_tag("tag", right).is_ok(), "{right}");
        }
        let long = "x".repeat(64);
        for wrong in ["", "=", "a=", "=a", "a=b=c", "Gpu", "-a", "a b", "a\n", "a,b", "ä", "a\0", &long] {
            assert!(is_tag("tag", wrong).is_err(), "{wrong:?}");
        }
        let tags = checked(Some(vec!["b".to_owned(), "a".to_owned(), "b".to_owned()])).unwrap();
        assert_eq!(tags, ["a", "b"]);
        assert!(checked(Some(vec!["a".to_owned(); 33])).is_err());
    }
}
