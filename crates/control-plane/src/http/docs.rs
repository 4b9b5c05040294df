//! What the API says of itself: `/openapi.json`, and `/docs`, which is served whole from this program.

use axum::Router;
use axum::response::Redirect;
use utoipa::openapi::OpenApi as Document;
use utoipa::openapi::security::{ApiKey, ApiKeyValue, HttpAuthScheme, HttpBuilder, SecurityScheme};
use utoipa::{Modify, OpenApi};
use utoipa_axum::router::OpenApiRouter;
use utoipa_swagger_ui::SwaggerUi;

use crate::app::App;

#[derive(OpenApi)]
#[openapi(
    info(title = "Wrenn", description = "Sandboxes for code that nobody has to trust. Errors have one shape and a page each in docs/errors."),
    components(schemas(
        api::v1::errors::ErrorBody,
        // Of WebSockets, which the document's format does not know.
        api::v1::exec::ExecClientFrame,
        api::v1::exec::ExecServerFrame,
        api::v1::pty::PtyClientFrame,
        api::v1::pty::PtyServerFrame,
    )),
    modifiers(&Credentials),
    security(("api_key" = []), ("token" = []), ("cookie" = [])),
)]
struct Wrenn;

struct Credentials;

impl Modify for Credentials {
    fn modify(&self, document: &mut Document) {
        let components = document.components.get_or_insert_default();
        components
            .add_security_scheme("api_key", SecurityScheme::ApiKey(ApiKey::Header(ApiKeyValue::new("X-API-Key"))));
        let bearer = HttpBuilder::new().scheme(HttpAuthScheme::Bearer).bearer_format("JWT").build();
        components.add_security_scheme("token", SecurityScheme::Http(bearer));
        let cookie = ApiKeyValue::new(super::credentials::COOKIE);
        components.add_security_scheme("cookie", SecurityScheme::ApiKey(ApiKey::Cookie(cookie)));
    }
}

pub fn openapi() -> OpenApiRouter<App> {
    OpenApiRouter::with_openapi(Wrenn::openapi())
}

/// The document, for `wrenn-cp openapi`.
pub fn document() -> Document {
    super::documented().split_for_parts().1
}

pub fn router(document: Document) -> Router<App> {
    SwaggerUi::new("/docs").url("/openapi.json", document).into()
}

/// Until there is a dashboard.
pub async fn home() -> Redirect {
    Redirect::temporary("/docs")
}
