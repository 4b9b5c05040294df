//! `GET /v1/users/search`: people by how their address begins, for who adds somebody to a team.
//!
//! What stands before the at sign must be known, and there are not many tries: nobody reads out who has an account here.

use std::time::Duration;

use api::v1::accounts::Found;
use api::v1::errors::ErrorBody;
use axum::extract::State;
use serde::Deserialize;
use utoipa::IntoParams;

use super::super::auth::Attempts;
use crate::app::App;
use crate::http::access::PersonCaller;
use crate::http::body::Query;
use crate::http::errors::ApiError;

const CHARS_MIN: usize = 3;
const CHARS_MAX: usize = 254;
/// Enough for fingers that type an address.
const SEARCH: Attempts = Attempts { what: "search", max: 60, window: Duration::from_secs(60) };

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct Search {
    /// How the address begins, with the at sign.
    email: String,
}

#[utoipa::path(get, path = "/search", tag = "users", params(Search),
    responses((status = 200, body = Vec<Found>), (status = 400, body = ErrorBody), (status = 429, body = ErrorBody)))]
pub async fn search(
    State(app): State<App>,
    person: PersonCaller,
    Query(query): Query<Search>,
) -> Result<axum::Json<Vec<Found>>, ApiError> {
    let begins = query.email.trim();
    let length = begins.chars().count();
    if !(CHARS_MIN..=CHARS_MAX).contains(&length) || !begins.contains('@') || begins.contains(char::is_control) {
        let reason = format!("must be the beginning of an address: {CHARS_MIN} to {CHARS_MAX} characters with an @");
        return Err(ApiError::invalid("email", reason));
    }
    SEARCH.count(&app, &person.user.to_string()).await?;
    let found = app.store.users_by_beginning(begins).await?;
    Ok(axum::Json(found.into_iter().map(|(id, email)| Found { user_id: id.to_string(), email }).collect()))
}
