//! The public API over HTTP: routes, and what surrounds all of them.
//!
//! ```text
//!   edge (request id, sizes, panics, error bodies, log) -> router -> access (the table) -> handler
//! ```

pub mod access;
mod body;
mod credentials;
mod cursor;
pub mod docs;
mod edge;
pub mod errors;
mod fields;
mod form;
mod health;
mod idempotency;
pub mod limits;
mod paged;
mod rights;
pub mod serve;
mod socket;
mod unread;
mod v1;

use axum::Router;
use axum::middleware;
use axum::routing::get;
use http::Method;
use utoipa_axum::router::OpenApiRouter;

pub use v1::sandboxes::view::shown as sandbox_shown;

use crate::app::App;
use errors::ApiError;

pub fn router(app: App) -> Router {
    let (v1, openapi) = documented().split_for_parts();
    let (capsules, _) = v1::sandboxes::router().split_for_parts();
    Router::new()
        .merge(v1)
        // The name of sandboxes in the routes of the published SDK.
        .nest("/v1/capsules", capsules)
        .merge(docs::router(docs::whole(openapi)))
        .route("/", get(docs::home))
        .route("/health", get(health::ready))
        .route("/health/ready", get(health::ready))
        .route("/health/live", get(health::live))
        .route_layer(middleware::from_fn_with_state(app.clone(), access::check))
        .fallback(|| async { ApiError::not_found("route") })
        .method_not_allowed_fallback(|method: Method| async move { not_allowed(&method) })
        .layer(middleware::from_fn_with_state(app.clone(), edge::edge))
        .with_state(app)
}

/// Of a replica that does not answer the API: whether it lives and can work.
pub fn health_alone(app: App) -> Router {
    Router::new()
        .route("/health", get(health::ready))
        .route("/health/ready", get(health::ready))
        .route("/health/live", get(health::live))
        .fallback(|| async { ApiError::not_found("route") })
        .layer(middleware::from_fn_with_state(app.clone(), edge::edge))
        .with_state(app)
}

/// The routes that are in the OpenAPI document.
fn documented() -> OpenApiRouter<App> {
    docs::openapi()
        .nest("/v1/auth", v1::auth::router())
        .nest("/auth/oauth", v1::oauth::router())
        .nest("/v1/me/providers", v1::oauth::of_person())
        .nest("/v1/me", v1::me::router())
        .nest("/v1/teams", v1::teams::router())
        .nest("/v1/invitations", v1::invitations::router())
        .nest("/v1/users", v1::users::search_router())
        .nest("/v1", v1::audit::router())
        .nest("/v1/admin", v1::fleet::router())
        .nest("/v1/admin/teams", v1::teams::admin_router())
        .nest("/v1/admin/users", v1::users::router())
        .nest("/v1/admin/templates", v1::templates::router())
        .nest("/v1/admin/builds", v1::builds::router())
        .nest("/v1/admin/capsules", v1::sandboxes::admin_router())
        .nest("/v1/api-keys", v1::api_keys::router())
        .nest("/v1/hosts", v1::hosts::router())
        .nest("/v1", v1::quotas::router())
        .nest("/v1/sandboxes", v1::sandboxes::router())
        .nest("/v1/snapshots", v1::snapshots::router())
        .nest("/v1/channels", v1::channels::router())
        .nest("/v1/events", v1::events::router())
}

/// Which methods there are is said by the router's own header.
fn not_allowed(_: &Method) -> ApiError {
    ApiError::method_not_allowed(String::new())
}

#[cfg(test)]
mod tests {
    use super::access::TABLE;

    /// A route without a policy would answer nobody, and a policy without a route is a leftover.
    #[test]
    fn routes_and_policies_are_the_same() {
        let (_, openapi) = super::documented().split_for_parts();
        let document = serde_json::to_value(&openapi).unwrap();
        let mut routes: Vec<(String, String)> = Vec::new();
        for (path, item) in document["paths"].as_object().unwrap() {
            for method in item.as_object().unwrap().keys().filter(|key| key.len() <= 6 && *key != "params") {
                routes.push((method.to_uppercase(), path.clone()));
            }
        }
        routes.sort();
        let undocumented = [
            "/",
            "/health",
            "/health/ready",
            "/health/live",
            "/openapi.json",
            "/openapi.yaml",
            "/docs",
            "/docs/",
            "/docs/{*rest}",
        ];
        let mut policies: Vec<(String, String)> = TABLE
            .iter()
            .filter(|(_, route, _)| !undocumented.contains(route))
            .map(|(method, route, _)| ((*method).to_owned(), (*route).to_owned()))
            .collect();
        policies.sort();
        assert_eq!(routes, policies);
    }
}
