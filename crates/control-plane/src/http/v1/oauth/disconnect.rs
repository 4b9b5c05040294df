//! `DELETE /v1/me/providers/{provider}`: the account of the other site opens this one no more. Something must be left that does.

use api::v1::errors::ErrorBody;
use axum::extract::State;
use http::StatusCode;
use store::identities::Disconnected;

use crate::app::App;
use crate::http::access::PersonCaller;
use crate::http::body::LastId;
use crate::http::errors::ApiError;

/// The site may be one that the platform knows no more.
#[utoipa::path(delete, path = "/{provider}", tag = "me", params(("provider" = String, Path)),
    responses((status = 204), (status = 400, body = ErrorBody), (status = 404, body = ErrorBody)))]
pub async fn disconnect(
    State(app): State<App>,
    person: PersonCaller,
    LastId(provider): LastId<String>,
) -> Result<StatusCode, ApiError> {
    let (store, actor) = (app.store.clone(), person.actor());
    let disconnect = async move { store.disconnect_identity(person.user, &provider, &actor).await };
    match super::super::detached(&app, disconnect).await? {
        Disconnected::Done => Ok(StatusCode::NO_CONTENT),
        Disconnected::LastMethod => Err(ApiError::last_login_method()),
        Disconnected::Missing => Err(ApiError::provider_not_found()),
    }
}
