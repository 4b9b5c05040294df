//! `POST /v1/admin/builds/{id}/cancel`: nothing comes of it any more. What runs for it is ended within seconds.

use api::v1::errors::ErrorBody;
use axum::extract::State;
use http::StatusCode;
use model::ids::BuildId;
use store::builds::Cancelled;

use crate::app::App;
use crate::http::access::Caller;
use crate::http::body::Id;
use crate::http::errors::ApiError;

#[utoipa::path(post, path = "/{id}/cancel", tag = "builds", params(("id" = String, Path)),
    responses((status = 204), (status = 400, body = ErrorBody, description = "it has ended"), (status = 403, body = ErrorBody),
        (status = 404, body = ErrorBody)))]
pub async fn cancel(State(app): State<App>, caller: Caller, Id(id): Id<BuildId>) -> Result<StatusCode, ApiError> {
    let (worker, actor) = (app.clone(), caller.actor());
    let cancelled = super::super::detached(&app, async move { worker.store.cancel_build(id, &actor).await });
    match cancelled.await? {
        Cancelled::Done => Ok(StatusCode::NO_CONTENT),
        Cancelled::Ended => Err(ApiError::invalid("id", "the build has ended already")),
        Cancelled::Missing => Err(ApiError::not_found("build")),
    }
}
