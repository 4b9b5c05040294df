//! `GET /v1/admin/users`: everybody, 100 to a page.

use api::v1::accounts::Users;
use api::v1::errors::ErrorBody;
use axum::extract::State;
use store::users::PAGE;

use crate::app::App;
use crate::http::access::Admin;
use crate::http::body::Query;
use crate::http::errors::ApiError;
use crate::http::paged::Paged;

#[utoipa::path(get, path = "/", tag = "admin", params(Paged),
    responses((status = 200, body = Users), (status = 400, body = ErrorBody), (status = 403, body = ErrorBody)))]
pub async fn list(
    State(app): State<App>,
    Admin(_caller): Admin,
    Query(query): Query<Paged>,
) -> Result<axum::Json<Users>, ApiError> {
    let page = query.number()?;
    let (people, total) = app.store.users(page).await?;
    let users = people.into_iter().map(super::shown).collect();
    let total_pages = (total + PAGE - 1) / PAGE;
    Ok(axum::Json(Users { users, total, page, per_page: PAGE, total_pages }))
}
