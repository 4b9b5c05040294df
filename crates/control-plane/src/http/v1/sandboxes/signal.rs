//! `DELETE /v1/sandboxes/{id}/processes/{selector}`: ends a process that was started through the API, by its pid or its tag.

use api::host::__buffa::oneof::signal_process_request::Selector;
use api::host::SignalProcessRequest;
use api::v1::errors::ErrorBody;
use axum::extract::{RawPathParams, State};
use http::StatusCode;
use model::ids::SandboxId;
use serde::Deserialize;
use utoipa::IntoParams;

use super::streams::Selected;
use crate::agents::{AgentError, ask};
use crate::app::App;
use crate::http::access::Caller;
use crate::http::body::{Id, Query};
use crate::http::errors::ApiError;

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct Signal {
    /// `SIGKILL` (when absent) or `SIGTERM`.
    signal: Option<String>,
}

#[utoipa::path(delete, path = "/{id}/processes/{selector}", tag = "sandboxes",
    params(("id" = String, Path), ("selector" = String, Path, description = "a pid, or a tag"), Signal),
    responses((status = 204), (status = 404, body = ErrorBody), (status = 409, body = ErrorBody)))]
pub async fn signal(
    State(app): State<App>,
    caller: Caller,
    Id(id): Id<SandboxId>,
    path: RawPathParams,
    Query(query): Query<Signal>,
) -> Result<StatusCode, ApiError> {
    let selector = match Selected::of(&path)? {
        Selected::Pid(pid) => Selector::Pid(pid),
        Selected::Tag(tag) => Selector::Tag(tag),
    };
    let signal = query.signal.unwrap_or_else(|| "SIGKILL".to_owned());
    if !["SIGKILL", "SIGTERM"].contains(&signal.as_str()) {
        return Err(ApiError::invalid("signal", "must be SIGKILL or SIGTERM"));
    }
    let agent = super::running(&app, &caller, &id).await?;
    let request =
        SignalProcessRequest { sandbox_id: id.to_string(), selector: Some(selector), signal, ..Default::default() };
    agent.signal_process_with_options(request, ask()).await.map_err(AgentError::from)?;
    Ok(StatusCode::NO_CONTENT)
}
