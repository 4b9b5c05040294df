//! `GET /v1/events/all/stream`: the same stream with every kind of event, and with all that is known of each. Ids are those of the other
//! stream. An event `gap` says that some of what was asked for is not kept any more.

use api::v1::errors::ErrorBody;
use api::v1::events::{Event, StreamFrom, StreamOf};
use axum::extract::State;
use axum::response::Response;
use http::HeaderMap;
use model::ids::SandboxId;

use super::listener::{Filter, Listener, begin};
use super::page::wrong_id;
use crate::app::App;
use crate::http::access::Caller;
use crate::http::body::Query;
use crate::http::errors::ApiError;
use crate::http::rights::Grant;

#[utoipa::path(get, path = "/all/stream", tag = "events", params(StreamFrom, StreamOf,
        ("Last-Event-ID" = Option<String>, Header, description = "the id of an event: what came after it is told first")),
    responses((status = 200, body = Event, content_type = "text/event-stream", description = "messages whose data is an Event"),
        (status = 400, body = ErrorBody), (status = 503, body = ErrorBody)))]
pub async fn stream_all(
    State(app): State<App>,
    caller: Caller,
    grant: Grant,
    headers: HeaderMap,
    Query(from): Query<StreamFrom>,
    Query(of): Query<StreamOf>,
) -> Result<Response, ApiError> {
    let after = begin(&headers, from.last_event_id.as_deref())?;
    let sandbox: Option<SandboxId> = of.sandbox_id.as_deref().map(str::parse).transpose().map_err(wrong_id)?;
    let filter = Filter { is_published: false, kinds: super::kinds(of.kinds.as_deref())?, sandbox };
    Ok(Listener::open(app, caller.team, grant, filter, after).await?.response())
}
