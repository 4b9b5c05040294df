//! `/v1/me`: what people see and change of themselves.

mod delete;
mod get;
mod password;
mod rename;
mod reset;
mod sessions;

use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::app::App;

pub fn router() -> OpenApiRouter<App> {
    OpenApiRouter::new()
        .routes(routes!(get::get, rename::rename, delete::delete))
        .routes(routes!(password::change))
        .routes(routes!(reset::ask))
        .routes(routes!(reset::confirm))
        .routes(routes!(sessions::list))
        .routes(routes!(sessions::end))
}
