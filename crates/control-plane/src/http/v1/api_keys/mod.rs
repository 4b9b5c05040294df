//! `/v1/api-keys`: credentials of machines.

mod create;
mod delete;
mod list;

use api::v1::keys::ApiKey;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::app::App;

pub fn router() -> OpenApiRouter<App> {
    OpenApiRouter::new().routes(routes!(create::create, list::list)).routes(routes!(delete::delete))
}

fn shown(key: store::api_keys::ApiKey, secret: Option<String>) -> ApiKey {
    ApiKey {
        id: key.id.to_string(),
        team_id: key.team.to_string(),
        name: key.name,
        key_prefix: key.key_prefix,
        created_by: key.created_by.map(|user| user.to_string()),
        created_at: key.created_at,
        last_used: key.last_used,
        scopes: key.scopes.iter().map(ToString::to_string).collect(),
        expires_at: key.expires_at,
        key: secret,
    }
}
