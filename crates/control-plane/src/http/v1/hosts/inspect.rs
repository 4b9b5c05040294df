//! `GET /v1/hosts/{id}/inspect`: what the host agent says of itself now: versions, room, counts of what it holds in kernel and files.

use api::host::GetHostRequest;
use api::v1::errors::ErrorBody;
use axum::extract::State;
use model::ids::HostId;
use serde_json::{Value, json};

use crate::agents::{AgentError, ask};
use crate::app::App;
use crate::http::access::HostsCaller;
use crate::http::body::Id;
use crate::http::errors::ApiError;

#[utoipa::path(get, path = "/{id}/inspect", tag = "hosts", params(("id" = String, Path)),
    responses((status = 200, body = Object), (status = 404, body = ErrorBody), (status = 503, body = ErrorBody)))]
pub async fn inspect(
    State(app): State<App>,
    _: HostsCaller,
    Id(id): Id<HostId>,
) -> Result<axum::Json<Value>, ApiError> {
    let host = super::find(&app, id).await?;
    let address = host.address.ok_or_else(|| ApiError::wrong_state("the host has not registered", "pending"))?;
    let answer = app
        .agents
        .at(id, &address, host.owner.as_ref().map(|owner| owner.team))?
        .get_host_with_options(GetHostRequest::default(), ask())
        .await;
    let said = answer.map_err(AgentError::from)?.into_owned();
    let mut shown = serde_json::to_value(&said).map_err(|_| ApiError::internal())?;
    shown["unclaimed"] = json!(host.unclaimed);
    Ok(axum::Json(shown))
}
