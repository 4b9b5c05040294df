//! `POST /v1/sandboxes/{id}/fork`: sandboxes that begin where this one stands now, with its memory, its disk and its processes, each with
//! an identity and a token of its own. A running one stands still for some tens of milliseconds and goes on; a paused one stays paused.
//!
//! All of them are written down or none. 201: they run. 202: some are still under way. One that its host did not start is an error that
//! names all.

use api::v1::errors::ErrorBody;
use api::v1::sandboxes::{Fork, Forked, Wait};
use axum::Extension;
use axum::extract::State;
use http::StatusCode;
use model::ids::SandboxId;
use model::sandbox::Status;
use store::operations::Phase;
use store::snapshots::{Child, ForkWish};

use super::create::{envs, metadata, policy, waiting};
use super::view::shown;
use crate::app::App;
use crate::http::access::Caller;
use crate::http::body::{Id, OptionalJson, Query};
use crate::http::edge::Arrived;
use crate::http::errors::ApiError;
use crate::http::idempotency::IdempotencyKey;
use crate::reconcile::driver;

const WAIT_DEFAULT_SEC: u32 = 30;
/// Of one call; each is a microVM that is restored.
const COUNT_MAX: i64 = 64;

#[utoipa::path(post, path = "/{id}/fork", tag = "sandboxes", params(("id" = String, Path), Wait), request_body = Fork,
    responses((status = 201, body = Forked), (status = 202, body = Forked), (status = 400, body = ErrorBody),
        (status = 404, body = ErrorBody), (status = 409, body = ErrorBody), (status = 429, body = ErrorBody), (status = 503, body = ErrorBody)))]
pub async fn fork(
    State(app): State<App>,
    caller: Caller,
    Id(id): Id<SandboxId>,
    Extension(Arrived(arrived)): Extension<Arrived>,
    Query(wait): Query<Wait>,
    repeat: IdempotencyKey,
    OptionalJson(body): OptionalJson<Fork>,
) -> Result<(StatusCode, axum::Json<Forked>), ApiError> {
    let deadline = arrived + waiting(&wait, WAIT_DEFAULT_SEC)?;
    let key = repeat.scoped(&caller, "POST /v1/sandboxes/{id}/fork", &(id.as_str(), &body));
    let source = super::find(&app, &caller, &id).await?;
    // With the source's own, which do not change: forks of forks must not add up without end.
    envs(source.envs.into_iter().chain(body.envs.clone().unwrap_or_default()).collect())?;
    metadata(source.metadata.into_iter().chain(body.metadata.clone().unwrap_or_default()).collect())?;
    let children = children(&app, body)?;
    let (worker, actor, team) = (app.clone(), caller.actor(), caller.team);
    let wished = super::super::detached(&app, async move {
        let wished = worker.store.wish_forked(team, &id, &children, &worker.lease(), key.as_ref(), &actor).await?;
        let _ = crashpoint::hit("cp.fork.written");
        if let ForkWish::Opened(operations) = &wished {
            for operation in operations {
                driver::work(&worker, operation.clone(), Some(arrived));
            }
        }
        Ok(wished)
    });
    let made = match wished.await? {
        ForkWish::Opened(operations) => {
            operations.into_iter().map(|operation| (operation.sandbox, operation.id)).collect()
        }
        ForkWish::Repeated(made) => made,
        ForkWish::OtherArguments => return Err(ApiError::idempotency_key_reused()),
        ForkWish::Wrong(status) => {
            let message = "only a sandbox that runs or is paused can be forked";
            return Err(ApiError::wrong_state(message, status));
        }
        ForkWish::OverQuota(exceeded) => return Err(ApiError::over_quota(&exceeded)),
        ForkWish::NoRoom => return Err(ApiError::no_hosts_available()),
        ForkWish::Missing => return Err(ApiError::not_found("sandbox")),
    };
    let mut sandboxes = Vec::with_capacity(made.len());
    let mut failure = None;
    for (child, operation) in &made {
        let ended = app.outcomes.wait(*operation, deadline).await?;
        if let Some(Phase::Failed { code, message }) = ended.map(|operation| operation.phase) {
            failure.get_or_insert(ApiError::of_operation(&code, &message));
        }
        sandboxes.push(shown(super::find(&app, &caller, child).await?));
    }
    if let Some(failure) = failure {
        // They stay readable, the failed ones as `error`, until they are killed.
        let ids: Vec<String> = made.iter().map(|(child, _)| child.to_string()).collect();
        return Err(failure.with("sandbox_ids", ids));
    }
    let all_run = sandboxes.iter().all(|sandbox| sandbox.status == Status::Running.as_str());
    let status = if all_run { StatusCode::CREATED } else { StatusCode::ACCEPTED };
    Ok((status, axum::Json(Forked { sandboxes })))
}

fn children(app: &App, body: Fork) -> Result<Vec<Child>, ApiError> {
    let count = body.count.unwrap_or(1);
    if !(1..=COUNT_MAX).contains(&count) {
        let error = ApiError::invalid("count", format!("must be from 1 to {COUNT_MAX}"));
        return Err(error.with("min", 1).with("max", COUNT_MAX));
    }
    let policy = policy(app, body.timeout_sec, body.on_timeout.as_deref(), body.idle_timeout_sec, body.auto_resume)?;
    let envs = envs(body.envs.unwrap_or_default())?;
    let metadata = metadata(body.metadata.unwrap_or_default())?;
    let child = |_| Child {
        id: SandboxId::from_random(rand::random()),
        envs: envs.clone(),
        metadata: metadata.clone(),
        policy,
    };
    Ok((0..count).map(child).collect())
}
