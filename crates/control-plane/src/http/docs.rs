//! What the API says of itself: `/openapi.json`, and `/docs`, which is served whole from this program.

use axum::Router;
use axum::response::Redirect;
use axum::routing::get;
use bytes::Bytes;
use http::header::CONTENT_TYPE;
use utoipa::openapi::path::{Operation, ParameterBuilder, ParameterIn};
use utoipa::openapi::schema::Type;
use utoipa::openapi::security::{
    ApiKey, ApiKeyValue, HttpAuthScheme, HttpBuilder, SecurityRequirement, SecurityScheme,
};
use utoipa::openapi::{
    ContentBuilder, ObjectBuilder, OpenApi as Document, Ref, RefOr, Required, Response, ResponseBuilder,
};
use utoipa::{Modify, OpenApi};
use utoipa_axum::router::OpenApiRouter;
use utoipa_swagger_ui::SwaggerUi;

use super::access::{Policy, TABLE};
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
    whole(super::documented().split_for_parts().1)
}

/// What is the same for many operations, and said by the tables of the program: who may call them, what else they may answer, and a name
/// that no other operation has.
pub fn whole(mut document: Document) -> Document {
    for (path, item) in &mut document.paths.paths {
        let methods = [
            ("GET", &mut item.get),
            ("POST", &mut item.post),
            ("PUT", &mut item.put),
            ("PATCH", &mut item.patch),
            ("DELETE", &mut item.delete),
        ];
        for (method, operation) in methods {
            let Some(operation) = operation else { continue };
            let policy = TABLE.iter().find(|(m, route, _)| *m == method && route == path).map(|(_, _, policy)| *policy);
            complete(operation, method, path, policy);
        }
    }
    document
}

fn complete(operation: &mut Operation, method: &str, path: &str, policy: Option<Policy>) {
    let tag = operation.tags.iter().flatten().next().cloned().unwrap_or_default();
    let verb = operation.operation_id.take().unwrap_or_default();
    let summary =
        SUMMARIES.iter().find(|(m, route, _)| *m == method && *route == path).map(|(_, _, text)| (*text).to_owned());
    operation.summary =
        Some(summary.unwrap_or_else(|| format!("{}: {}", tag.replace('-', " "), verb.replace('_', " "))));
    operation.operation_id = Some(name(method, path));
    let requirement = |scheme: &str| SecurityRequirement::new(scheme, Vec::<String>::new());
    operation.security = Some(match policy {
        None | Some(Policy::Open) => Vec::new(),
        Some(Policy::Host) => vec![requirement("token")],
        Some(Policy::Team(_)) => vec![requirement("api_key"), requirement("token"), requirement("cookie")],
        Some(_) => vec![requirement("token"), requirement("cookie")],
    });
    let mut also =
        vec![("400", "something in the request is wrong"), ("431", "the headers or the address are too large")];
    if !matches!(policy, None | Some(Policy::Open)) {
        also.push(("401", "there is no credential, or one that opens nothing"));
        also.push(("403", "the credential does not allow this"));
        also.push(("429", "too many requests; Retry-After says when to come again"));
    }
    if path.contains('{') {
        also.push(("404", "there is no such thing, or it is another team's"));
    }
    if operation.request_body.is_some() {
        also.push(("408", "the body did not arrive in time"));
        also.push(("413", "the body is too large"));
        also.push(("415", "the body is of another type, or encoded"));
    }
    if method != "GET" {
        also.push(("409", "the state does not permit this, or the first call under the Idempotency-Key has not ended"));
    }
    if REPEATABLE.contains(&(method, path)) {
        also.push(("422", "the Idempotency-Key was used with other arguments before"));
        let key = ParameterBuilder::new()
            .name("Idempotency-Key")
            .parameter_in(ParameterIn::Header)
            .required(Required::False)
            .description(Some(
                "1 to 255 printable ASCII characters: a repeated call is answered with what the first one made",
            ))
            .schema(Some(
                ObjectBuilder::new().schema_type(Type::String).min_length(Some(1)).max_length(Some(255)).build(),
            ))
            .build();
        operation.parameters.get_or_insert_default().push(key.into());
    }
    also.push(("500", "our mistake; the request's id helps to find it"));
    also.push(("503", "the platform or the host is not available now"));
    for (status, description) in also {
        operation.responses.responses.entry(status.to_owned()).or_insert_with(|| refusal(description).into());
    }
    // What was said in the handler is only that there is such an answer.
    for (status, response) in &mut operation.responses.responses {
        if let RefOr::T(response) = response
            && response.description.is_empty()
        {
            response.description = match status.as_str() {
                "200" => "as asked",
                "201" => "it is made",
                "202" => "it is under way",
                "204" => "it is done",
                "404" => "there is no such thing, or it is another team's",
                "409" => "the state does not permit this",
                _ => "an error",
            }
            .to_owned();
        }
    }
}

fn refusal(description: &str) -> Response {
    let body = ContentBuilder::new().schema(Some(Ref::from_schema_name("ErrorBody"))).build();
    ResponseBuilder::new().description(description).content("application/json", body).build()
}

/// `post_v1_sandboxes_id_pause`: of method and path, which no two operations share.
fn name(method: &str, path: &str) -> String {
    let words = path.split(['/', '{', '}', '-', '_', '.']).filter(|word| !word.is_empty());
    std::iter::once(method.to_lowercase()).chain(words.map(str::to_owned)).collect::<Vec<_>>().join("_")
}

/// Where a repeated call finds what the first one made.
const REPEATABLE: [(&str, &str); 12] = [
    ("POST", "/v1/sandboxes"),
    ("POST", "/v1/sandboxes/{id}/fork"),
    ("POST", "/v1/snapshots"),
    ("POST", "/v1/admin/builds"),
    ("POST", "/v1/admin/capsules"),
    ("POST", "/v1/admin/capsules/{id}/snapshot"),
    ("POST", "/v1/api-keys"),
    ("POST", "/v1/teams"),
    ("POST", "/v1/teams/{id}/members"),
    ("POST", "/v1/teams/{id}/invitations"),
    ("POST", "/v1/hosts"),
    ("POST", "/v1/hosts/{id}/token"),
];

/// In a line; of others it is made of their names.
const SUMMARIES: [(&str, &str, &str); 44] = [
    ("POST", "/v1/sandboxes", "Create a sandbox"),
    ("GET", "/v1/sandboxes", "List the team's sandboxes"),
    ("GET", "/v1/sandboxes/{id}", "Look at a sandbox"),
    ("PATCH", "/v1/sandboxes/{id}", "Change a sandbox's metadata"),
    ("DELETE", "/v1/sandboxes/{id}", "Kill a sandbox"),
    ("POST", "/v1/sandboxes/{id}/pause", "Pause a sandbox"),
    ("POST", "/v1/sandboxes/{id}/resume", "Resume a sandbox"),
    ("POST", "/v1/sandboxes/{id}/timeout", "Begin a sandbox's time anew"),
    ("POST", "/v1/sandboxes/{id}/ping", "Say that a sandbox is used"),
    ("POST", "/v1/sandboxes/{id}/fork", "Make sandboxes that begin as this one is"),
    ("GET", "/v1/sandboxes/{id}/timeline", "What happened to a sandbox"),
    ("POST", "/v1/sandboxes/{id}/exec", "Run a command"),
    ("GET", "/v1/sandboxes/{id}/exec/stream", "Run a command and hear its output (WebSocket)"),
    ("GET", "/v1/sandboxes/{id}/processes", "List a sandbox's processes"),
    ("DELETE", "/v1/sandboxes/{id}/processes/{selector}", "Send a signal to a process"),
    ("GET", "/v1/sandboxes/{id}/console", "Read what the guest's kernel says"),
    ("POST", "/v1/sandboxes/{id}/files/read", "Read a file"),
    ("POST", "/v1/sandboxes/{id}/files/write", "Write a file"),
    ("POST", "/v1/sandboxes/{id}/files/stream/read", "Read a file as a stream"),
    ("POST", "/v1/sandboxes/{id}/files/stream/write", "Write a file as a stream"),
    ("POST", "/v1/snapshots", "Make a snapshot"),
    ("GET", "/v1/snapshots", "List snapshots and templates"),
    ("DELETE", "/v1/snapshots/{id}", "Delete a snapshot"),
    ("GET", "/v1/events", "Read the team's events"),
    ("GET", "/v1/events/stream", "Hear the team's events, of the published kinds"),
    ("GET", "/v1/events/all/stream", "Hear the team's events, of all kinds"),
    ("POST", "/v1/api-keys", "Make an API key"),
    ("GET", "/v1/api-keys", "List the team's API keys"),
    ("DELETE", "/v1/api-keys/{id}", "Delete an API key"),
    ("POST", "/v1/teams", "Make a team"),
    ("POST", "/v1/teams/{id}/members", "Add a member"),
    ("POST", "/v1/teams/{id}/invitations", "Invite somebody"),
    ("POST", "/v1/hosts", "Make a record for a host"),
    ("GET", "/v1/audit-logs", "Read the team's audit"),
    ("GET", "/v1/admin/templates", "List the templates and snapshots of all teams"),
    ("DELETE", "/v1/admin/templates/{id}", "Delete a template of the platform"),
    ("POST", "/v1/admin/builds", "Build a template of the platform"),
    ("GET", "/v1/admin/builds", "List builds"),
    ("GET", "/v1/admin/builds/{id}", "Look at a build"),
    ("POST", "/v1/admin/builds/{id}/cancel", "Cancel a build"),
    ("POST", "/v1/admin/capsules", "Create a sandbox of the platform's team"),
    ("GET", "/v1/admin/capsules", "List the sandboxes of the platform's team"),
    ("DELETE", "/v1/admin/capsules/{id}", "Kill a sandbox of the platform's team"),
    ("POST", "/v1/admin/capsules/{id}/snapshot", "Make a sandbox a template of the platform"),
];

pub fn router(document: Document) -> Router<App> {
    // JSON is YAML, and this is where published tools look.
    let text = Bytes::from(document.to_json().expect("the document is JSON"));
    let yaml = move || std::future::ready(([(CONTENT_TYPE, "application/yaml")], text.clone()));
    Router::from(SwaggerUi::new("/docs").url("/openapi.json", document)).route("/openapi.yaml", get(yaml))
}

/// Until there is a dashboard.
pub async fn home() -> Redirect {
    Redirect::temporary("/docs")
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    const KEPT: &str = include_str!("../../../../docs/openapi.json");

    /// What a release says of itself is looked at when it changes.
    #[test]
    fn the_document_that_is_kept_is_that_of_now() {
        let now: Value = serde_json::from_str(&document().to_pretty_json().unwrap()).unwrap();
        let kept: Value = serde_json::from_str(KEPT).unwrap();
        assert!(
            kept == now,
            "docs/openapi.json is old: write it anew by `wrenn-cp openapi > docs/openapi.json`, and look at what changed"
        );
    }

    #[test]
    fn every_operation_says_all_that_it_must() {
        let document = serde_json::to_value(document()).unwrap();
        let mut names = std::collections::BTreeSet::new();
        assert!(document["openapi"].as_str().unwrap().starts_with("3.1"));
        for (path, item) in document["paths"].as_object().unwrap() {
            for (method, operation) in item.as_object().unwrap() {
                let place = format!("{method} {path}");
                let name = operation["operationId"].as_str().unwrap_or_else(|| panic!("{place} has no name"));
                assert!(names.insert(name.to_owned()), "{name} is there twice");
                assert!(operation["summary"].as_str().is_some_and(|text| !text.is_empty()), "{place} has no summary");
                assert_eq!(operation["tags"].as_array().map(Vec::len), Some(1), "{place}");
                assert!(operation["security"].is_array(), "{place} does not say who may call it");
                for (status, response) in operation["responses"].as_object().unwrap() {
                    assert!(!response["description"].as_str().unwrap().is_empty(), "{place} {status}");
                    let has_body = response.get("content").is_some();
                    assert!(has_body || !status.starts_with(['4', '5']), "{place} {status} has no body");
                }
                for parameter in operation["parameters"].as_array().into_iter().flatten() {
                    assert!(parameter["schema"].is_object(), "{place}: {parameter}");
                }
            }
        }
        let shown: Vec<_> = SUMMARIES.iter().map(|(method, path, _)| (*method, *path)).chain(REPEATABLE).collect();
        for (method, path) in shown {
            assert!(TABLE.iter().any(|(m, route, _)| *m == method && *route == path), "{method} {path} is no route");
        }
    }
}
