//! `GET /v1/events`: the team's events, oldest first, page by page: for who looks from time to time, and for who has missed some.

use api::v1::errors::ErrorBody;
use api::v1::events::{EventPage, EventsAsked};
use axum::extract::State;
use model::ids::SandboxId;
use store::events::{Asked, PAGE_MAX};

use crate::app::App;
use crate::events::shown;
use crate::http::access::Caller;
use crate::http::body::Query;
use crate::http::errors::ApiError;

const LIMIT_DEFAULT: i64 = 100;

#[utoipa::path(get, path = "/", tag = "events", params(EventsAsked),
    responses((status = 200, body = EventPage), (status = 400, body = ErrorBody)))]
pub async fn page(
    State(app): State<App>,
    caller: Caller,
    Query(asked): Query<EventsAsked>,
) -> Result<axum::Json<EventPage>, ApiError> {
    let limit = asked.limit.unwrap_or(LIMIT_DEFAULT);
    if !(1..=PAGE_MAX).contains(&limit) {
        return Err(ApiError::invalid("limit", format!("must be from 1 to {PAGE_MAX}")));
    }
    let after = asked.after.as_deref().map_or(Ok(0), |text| super::place("after", text))?;
    let sandbox: Option<SandboxId> = asked.sandbox_id.as_deref().map(str::parse).transpose().map_err(wrong_id)?;
    let asked = Asked { after, limit, kinds: super::kinds(asked.kinds.as_deref())?, sandbox };
    // So that what the caller has just done is among them. Whoever else is at it does the same.
    app.store.number_events().await?;
    let (_, oldest) = app.store.events_kept().await?;
    let events = app.store.events(caller.team, &asked).await?;
    let next_after = events.last().map_or(after, |event| event.id);
    Ok(axum::Json(EventPage {
        events: events.into_iter().map(shown).collect(),
        next_after: next_after.to_string(),
        oldest: oldest.to_string(),
    }))
}

pub fn wrong_id(error: impl std::fmt::Display) -> ApiError {
    ApiError::invalid("sandbox_id", format!("is {error}"))
}
