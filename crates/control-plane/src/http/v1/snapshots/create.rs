//! `POST /v1/snapshots`: keeps what a sandbox is now, with its memory, under a name. A running one stands still for some tens of
//! milliseconds and goes on; a paused one stays paused. 201: it is there. 202: it is still being made, and in the list when it is there.

use api::v1::errors::ErrorBody;
use api::v1::sandboxes::Wait;
use api::v1::snapshots::{CreateSnapshot, MadeSnapshot};
use axum::Extension;
use axum::extract::State;
use http::StatusCode;
use model::ids::SandboxId;
use model::shape::TemplateName;
use store::idempotency::Key;
use store::operations::Phase;
use store::snapshots::{NewSnapshot, SnapshotWish};
use tokio::time::Instant;

use super::super::sandboxes::create::waiting;
use super::super::sandboxes::find;
use crate::app::App;
use crate::http::access::Caller;
use crate::http::body::{Json, Query};
use crate::http::edge::Arrived;
use crate::http::errors::ApiError;
use crate::http::idempotency::IdempotencyKey;
use crate::reconcile::driver;

const WAIT_DEFAULT_SEC: u32 = 30;

#[utoipa::path(post, path = "/", tag = "snapshots", params(Wait), request_body = CreateSnapshot,
    responses((status = 201, body = MadeSnapshot), (status = 202, body = MadeSnapshot), (status = 400, body = ErrorBody),
        (status = 404, body = ErrorBody), (status = 409, body = ErrorBody)))]
pub async fn create(
    State(app): State<App>,
    caller: Caller,
    Extension(Arrived(arrived)): Extension<Arrived>,
    Query(wait): Query<Wait>,
    repeat: IdempotencyKey,
    Json(body): Json<CreateSnapshot>,
) -> Result<(StatusCode, axum::Json<MadeSnapshot>), ApiError> {
    let key = repeat.scoped(&caller, "POST /v1/snapshots", &body);
    let of = body.sandbox_id.parse().map_err(|error| ApiError::invalid("sandbox_id", format!("is {error}")))?;
    make(&app, &caller, Wished { of, name: body.name, is_published: false, key, arrived, wait }).await
}

/// What a caller wants.
pub struct Wished {
    pub of: SandboxId,
    pub name: Option<String>,
    pub is_published: bool,
    pub key: Option<Key>,
    pub arrived: Instant,
    pub wait: Wait,
}

/// Wishes the snapshot, and waits for it for as long as the caller does.
pub async fn make(
    app: &App,
    caller: &Caller,
    wished: Wished,
) -> Result<(StatusCode, axum::Json<MadeSnapshot>), ApiError> {
    let Wished { of, name, is_published, key, arrived, wait } = wished;
    let deadline = arrived + waiting(&wait, WAIT_DEFAULT_SEC)?;
    let name = name.unwrap_or_else(|| format!("template-{:08x}", rand::random::<u32>()));
    let name: TemplateName = name.parse().map_err(|error| ApiError::invalid("name", format!("is wrong: {error}")))?;
    let (worker, actor, team) = (app.clone(), caller.actor(), caller.team);
    let (source, wished_name) = (of.clone(), name.clone());
    let wished = super::super::detached(app, async move {
        let new = NewSnapshot { team, of: &source, name: &wished_name, is_published, built: None };
        let wished = worker.store.wish_snapshot(&new, &worker.lease(), key.as_ref(), &actor).await?;
        let _ = crashpoint::hit("cp.snapshot.written");
        if let SnapshotWish::Opened(_, operation) = &wished {
            driver::work(&worker, operation.clone(), Some(arrived));
        }
        Ok(wished)
    });
    let (id, operation) = match wished.await? {
        SnapshotWish::Opened(id, operation) => (id, operation.id),
        SnapshotWish::Repeated(id, operation) => (id, operation),
        SnapshotWish::OtherArguments => return Err(ApiError::idempotency_key_reused()),
        SnapshotWish::UnderWay => return Err(ApiError::snapshot_under_way()),
        SnapshotWish::Wrong(status) => {
            let message = "only a sandbox that runs or is paused has a snapshot made of it";
            return Err(ApiError::wrong_state(message, status));
        }
        SnapshotWish::NameReserved => return Err(ApiError::name_reserved(name.as_str())),
        SnapshotWish::NameTaken => return Err(ApiError::template_name_taken(name.as_str())),
        SnapshotWish::Missing => return Err(ApiError::not_found("sandbox")),
    };
    let ended = app.outcomes.wait(operation, deadline).await?;
    if let Some(Phase::Failed { code, message }) = ended.map(|operation| operation.phase) {
        return Err(ApiError::of_operation(&code, &message));
    }
    let snapshot = app.store.snapshot(id).await?.ok_or_else(|| ApiError::not_found("snapshot"))?;
    let status = if snapshot.is_ready { StatusCode::CREATED } else { StatusCode::ACCEPTED };
    let sandbox = find(app, caller, &of).await?;
    let made = MadeSnapshot {
        template: super::shown(snapshot),
        id: sandbox.id.to_string(),
        status: sandbox.status().as_str().to_owned(),
    };
    Ok((status, axum::Json(made)))
}
