//! `POST /v1/admin/capsules/{id}/snapshot`: makes what a sandbox of the platform's team is now a template of the platform. It was there for
//! that: it ends when the template is there. A template that has the name already gives way in the same moment, not before.

use api::v1::errors::ErrorBody;
use api::v1::sandboxes::Wait;
use api::v1::snapshots::{MadeSnapshot, PublishSnapshot};
use axum::Extension;
use axum::extract::State;
use http::StatusCode;
use model::ids::SandboxId;

use super::super::snapshots::create::{Wished, make};
use crate::app::App;
use crate::http::access::Caller;
use crate::http::body::{Id, OptionalJson, Query};
use crate::http::edge::Arrived;
use crate::http::errors::ApiError;
use crate::http::idempotency::IdempotencyKey;

#[utoipa::path(post, path = "/{id}/snapshot", tag = "sandboxes", params(("id" = String, Path), Wait), request_body = Option<PublishSnapshot>,
    responses((status = 201, body = MadeSnapshot), (status = 202, body = MadeSnapshot), (status = 400, body = ErrorBody),
        (status = 404, body = ErrorBody), (status = 409, body = ErrorBody)))]
pub async fn publish(
    State(app): State<App>,
    caller: Caller,
    Extension(Arrived(arrived)): Extension<Arrived>,
    Id(of): Id<SandboxId>,
    Query(wait): Query<Wait>,
    repeat: IdempotencyKey,
    OptionalJson(body): OptionalJson<PublishSnapshot>,
) -> Result<(StatusCode, axum::Json<MadeSnapshot>), ApiError> {
    let key = repeat.scoped(&caller, "POST /v1/admin/capsules/{id}/snapshot", &(of.as_str(), &body));
    make(&app, &caller, Wished { of, name: body.name, is_published: true, key, arrived, wait }).await
}
