//! `GET /v1/events/stream`: the team's events as server-sent events, of the kinds that published clients know.
//!
//! The first one is `connected`; a comment comes when nothing else has for half a minute. `Last-Event-ID` brings what came after that event.
//! Where some of that is not kept any more, a comment says so: published clients take no event that they do not know.

use api::v1::errors::ErrorBody;
use api::v1::events::{Event, PUBLISHED, StreamFrom};
use axum::extract::State;
use axum::response::Response;
use http::HeaderMap;

use super::listener::{Filter, Listener, begin};
use crate::app::App;
use crate::http::access::Caller;
use crate::http::body::Query;
use crate::http::errors::ApiError;
use crate::http::rights::Grant;

#[utoipa::path(get, path = "/stream", tag = "events", params(StreamFrom,
        ("Last-Event-ID" = Option<String>, Header, description = "the id of an event: what came after it is told first")),
    responses((status = 200, body = Event, content_type = "text/event-stream", description = "messages whose data is an Event"),
        (status = 400, body = ErrorBody), (status = 503, body = ErrorBody)))]
pub async fn stream(
    State(app): State<App>,
    caller: Caller,
    grant: Grant,
    headers: HeaderMap,
    Query(from): Query<StreamFrom>,
) -> Result<Response, ApiError> {
    let after = begin(&headers, from.last_event_id.as_deref())?;
    let kinds = PUBLISHED.iter().map(ToString::to_string).collect();
    let filter = Filter { is_published: true, kinds, sandbox: None };
    Ok(Listener::open(app, caller.team, grant, filter, after).await?.response())
}
