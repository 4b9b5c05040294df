//! `GET /v1/admin/users`: everybody, 100 to a page.

use api::v1::accounts::Users;
use api::v1::errors::ErrorBody;
use axum::extract::State;
use serde::Deserialize;
use store::users::PAGE;
use utoipa::IntoParams;

use crate::app::App;
use crate::http::access::Admin;
use crate::http::body::Query;
use crate::http::errors::ApiError;

/// More people than any platform has.
const PAGE_MAX: i64 = 1_000_000;

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct Paged {
    /// From 1.
    page: Option<i64>,
}

#[utoipa::path(get, path = "/", tag = "admin", params(Paged),
    responses((status = 200, body = Users), (status = 400, body = ErrorBody), (status = 403, body = ErrorBody)))]
pub async fn list(
    State(app): State<App>,
    Admin(_caller): Admin,
    Query(query): Query<Paged>,
) -> Result<axum::Json<Users>, ApiError> {
    let page = query.page.unwrap_or(1);
    if !(1..=PAGE_MAX).contains(&page) {
        return Err(ApiError::invalid("page", format!("must be from 1 to {PAGE_MAX}")));
    }
    let (people, total) = app.store.users(page).await?;
    let users = people.into_iter().map(super::shown).collect();
    let total_pages = (total + PAGE - 1) / PAGE;
    Ok(axum::Json(Users { users, total, page, per_page: PAGE, total_pages }))
}
