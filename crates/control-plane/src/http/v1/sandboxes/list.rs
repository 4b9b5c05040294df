//! `GET /v1/sandboxes`: the team's, newest first, without those that have ended. All of them at once, or page by page.

use api::v1::errors::ErrorBody;
use api::v1::sandboxes::{Page, Sandbox};
use axum::extract::State;
use http::{HeaderMap, HeaderValue, header};
use model::ids::SandboxId;
use store::sandboxes::LIST_MAX;

use super::view::shown;
use crate::app::App;
use crate::http::access::Caller;
use crate::http::body::Query;
use crate::http::errors::ApiError;

#[utoipa::path(get, path = "/", tag = "sandboxes", params(Page),
    responses((status = 200, body = Vec<Sandbox>), (status = 400, body = ErrorBody), (status = 401, body = ErrorBody)))]
pub async fn list(
    State(app): State<App>,
    caller: Caller,
    Query(page): Query<Page>,
) -> Result<(HeaderMap, axum::Json<Vec<Sandbox>>), ApiError> {
    let limit = page.limit.unwrap_or(LIST_MAX);
    if !(1..=LIST_MAX).contains(&limit) {
        return Err(ApiError::invalid("limit", format!("must be from 1 to {LIST_MAX}")));
    }
    let before: Option<SandboxId> = match page.before.as_deref() {
        None => None,
        Some(id) => Some(id.parse().map_err(|error| ApiError::invalid("before", format!("is {error}")))?),
    };
    let before = match &before {
        None => None,
        // Another team's is like one that never was.
        Some(id) => match app.store.sandbox(caller.team, id).await? {
            Some(sandbox) => Some((sandbox.created_at, id)),
            None => return Err(ApiError::invalid("before", "is no sandbox of the team")),
        },
    };
    let found = app.store.sandboxes(caller.team, limit, before).await?;
    let mut headers = HeaderMap::new();
    if found.len() == limit as usize
        && let Some(last) = found.last()
    {
        // Relative to the list itself, under whichever name it was asked for.
        let next = format!("<?limit={limit}&before={}>; rel=\"next\"", last.id);
        headers.insert(header::LINK, HeaderValue::from_str(&next).expect("ids and numbers are ASCII"));
    }
    Ok((headers, axum::Json(found.into_iter().map(shown).collect())))
}
