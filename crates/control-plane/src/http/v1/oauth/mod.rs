//! `/auth/oauth/{provider}`, where browsers go to log in by another site, and `/v1/me/providers/{provider}`, for who is logged in.
//!
//! They are opened by people and not called by programs: what goes well ends in a redirect, what does not in an error as everywhere.

mod begin;
mod callback;
mod connect;
mod disconnect;

use http::{HeaderMap, HeaderValue, header};
use tracing::warn;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::app::App;
use crate::http::errors::ApiError;
use crate::oauth::OauthError;

/// `/auth/oauth`.
pub fn router() -> OpenApiRouter<App> {
    OpenApiRouter::new().routes(routes!(begin::begin)).routes(routes!(callback::callback))
}

/// `/v1/me/providers`.
pub fn of_person() -> OpenApiRouter<App> {
    OpenApiRouter::new().routes(routes!(connect::connect)).routes(routes!(disconnect::disconnect))
}

/// What went wrong with the other site is told to its operator and ours, and not to whoever sits before the browser.
fn failed(provider: &str, error: &OauthError) -> ApiError {
    match error {
        OauthError::Code => {
            return ApiError::invalid_login("the other site does not know this login any more; begin again");
        }
        OauthError::Busy => return ApiError::too_many_attempts(5),
        _ => warn!("log in by {provider}: {error}"),
    }
    match error {
        OauthError::Away(_) => ApiError::provider_error("the other site does not answer"),
        OauthError::Late => ApiError::deadline_exceeded("the other site did not answer in time"),
        _ => ApiError::provider_error("the other site's answer cannot be believed"),
    }
}

fn add_cookie(headers: &mut HeaderMap, cookie: &str) {
    headers.append(header::SET_COOKIE, HeaderValue::from_str(cookie).expect("a cookie of ours is ASCII"));
}
