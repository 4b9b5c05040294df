//! `POST /v1/sandboxes`: the wish for a sandbox, and, within `wait_sec`, its being there.
//!
//! A team's snapshot is a template, too: what begins with it has its shape, and stands where the snapshot's sandbox stood.
//!
//! 201: it runs. 202: it is still under way, or another replica works on it. An error after the wish was written names the sandbox in
//! `details.sandbox_id`; it stays readable, as `error`, until it is killed.

use std::collections::BTreeMap;
use std::time::Duration;

use api::v1::errors::ErrorBody;
use api::v1::sandboxes::{CreateSandbox, Sandbox, Wait};
use axum::Extension;
use axum::extract::State;
use http::StatusCode;
use model::ids::SandboxId;
use model::sandbox::Status;
use model::shape::{Shape, TemplateName};
use store::operations::Phase;
use store::placement::{Asked, Shortage};
use store::policy::{Policy, PolicyChange};
use store::sandboxes::{Created, NewSandbox};

use super::super::hosts::tags;
use super::view::shown;
use crate::app::App;
use crate::http::access::Caller;
use crate::http::body::{Json, Query};
use crate::http::edge::Arrived;
use crate::http::errors::ApiError;
use crate::http::idempotency::IdempotencyKey;
use crate::measures;
use crate::reconcile::driver;
use crate::templates;

/// Who processes run as when nothing else is asked for.
const USER_DEFAULT: &str = "wrenn-user";
/// Who asks for the base template by its name wants the bare machine.
const USER_OF_MINIMAL: &str = "root";
const WAIT_DEFAULT_SEC: u32 = 4;
const WAIT_MAX_SEC: u32 = 120;
/// A year: what shall live for longer has no deadline.
const TIMEOUT_MAX_SEC: i64 = 365 * 86_400;
pub(super) const METADATA_MAX: usize = 32;
/// Under these names a sandbox shows by what it is run.
const METADATA_RESERVED: [&str; 4] = ["kernel_version", "vmm_version", "agent_version", "envd_version"];
const METADATA_BYTES_MAX: usize = 256;
const ENVS_MAX: usize = 128;
const ENVS_BYTES_MAX: usize = 32 * 1024;

#[utoipa::path(post, path = "/", tag = "sandboxes", params(Wait), request_body = CreateSandbox,
    responses((status = 201, body = Sandbox), (status = 202, body = Sandbox), (status = 400, body = ErrorBody),
        (status = 404, body = ErrorBody), (status = 429, body = ErrorBody), (status = 503, body = ErrorBody)))]
pub async fn create(
    State(app): State<App>,
    caller: Caller,
    Extension(Arrived(arrived)): Extension<Arrived>,
    Query(wait): Query<Wait>,
    repeat: IdempotencyKey,
    Json(body): Json<CreateSandbox>,
) -> Result<(StatusCode, axum::Json<Sandbox>), ApiError> {
    let deadline = arrived + waiting(&wait, WAIT_DEFAULT_SEC)?;
    let key = repeat.scoped(&caller, "POST /v1/sandboxes", &body);
    let asked = checked(&app, &caller, body)?;
    let (worker, actor) = (app.clone(), caller.actor());
    let created = super::super::detached(&app, async move {
        let (new, created) = templates::create(&worker, &asked, key.as_ref(), &actor).await?;
        let _ = crashpoint::hit("cp.create.written");
        if let Created::Made(_, operation) = &created {
            driver::work(&worker, operation.clone(), Some(arrived));
        }
        Ok((new, created))
    });
    let (new, created) = created.await?;
    let (id, operation) = match created {
        Created::Made(sandbox, operation) => (sandbox.id, operation.id),
        Created::Repeated(id, operation) => (id, operation),
        Created::OtherArguments => return Err(ApiError::idempotency_key_reused()),
        Created::NoTeam => return Err(ApiError::not_found("team")),
        Created::NoSnapshot => return Err(ApiError::no_template(new.template.as_str())),
        Created::NoHost(shortage) => {
            measures::not_placed(&shortage);
            return Err(no_host(&app, &new, &shortage).await?);
        }
        Created::OverQuota(exceeded) => return Err(ApiError::over_quota(&exceeded)),
    };
    let ended = app.outcomes.wait(operation, deadline).await?;
    if let Some(Phase::Failed { code, message }) = ended.map(|operation| operation.phase) {
        return Err(ApiError::of_operation(&code, &message).with("sandbox_id", id.to_string()));
    }
    let sandbox = super::find(&app, &caller, &id).await?;
    let status = if sandbox.status() == Status::Running { StatusCode::CREATED } else { StatusCode::ACCEPTED };
    Ok((status, axum::Json(shown(sandbox))))
}

/// How long the caller wants to wait.
pub(in crate::http::v1) fn waiting(wait: &Wait, default_sec: u32) -> Result<Duration, ApiError> {
    let seconds = wait.wait_sec.unwrap_or(default_sec);
    if seconds > WAIT_MAX_SEC {
        return Err(ApiError::invalid("wait_sec", format!("must be from 0 to {WAIT_MAX_SEC}")));
    }
    Ok(Duration::from_secs(seconds.into()))
}

async fn no_host(app: &App, new: &NewSandbox, shortage: &Shortage) -> Result<ApiError, ApiError> {
    let is_unknown = templates::is_unknown(app, new).await?;
    Ok(if is_unknown { ApiError::no_template(new.template.as_str()) } else { ApiError::short_of(shortage) })
}

fn checked(app: &App, caller: &Caller, body: CreateSandbox) -> Result<NewSandbox, ApiError> {
    let template = body.template.as_deref().unwrap_or(templates::DEFAULT);
    let template: TemplateName =
        template.parse().map_err(|error| ApiError::invalid("template", format!("is wrong: {error}")))?;
    let shape = shape(
        body.vcpus.unwrap_or(Shape::DEFAULT_VCPUS),
        body.memory_mb.unwrap_or(Shape::DEFAULT_MEMORY_MIB),
        body.disk_size_mb.unwrap_or(Shape::DEFAULT_DISK_MIB),
    )?;
    let change = policy(app, body.timeout_sec, body.on_timeout.as_deref(), body.idle_timeout_sec, body.auto_resume)?;
    let strategy = body.placement.as_deref().map(str::parse).transpose();
    let strategy = strategy.map_err(|error| ApiError::invalid("placement", error))?;
    let default_user =
        if body.template.as_deref() == Some(templates::DEFAULT) { USER_OF_MINIMAL } else { USER_DEFAULT };
    Ok(NewSandbox {
        id: SandboxId::from_random(rand::random()),
        team: caller.team,
        template,
        snapshot: None,
        shape,
        envs: envs(body.envs.unwrap_or_default())?,
        metadata: metadata(body.metadata.unwrap_or_default())?,
        default_user: default_user.to_owned(),
        policy: Policy::default().with(&change),
        asked: Asked { tags: tags::checked(body.tags)?, strategy },
    })
}

pub(in crate::http::v1) fn shape(vcpus: i64, memory_mb: i64, disk_size_mb: i64) -> Result<Shape, ApiError> {
    Shape::new(vcpus, memory_mb, disk_size_mb).map_err(|wrong| {
        let step = wrong.step.map(|step| format!(" in steps of {step}")).unwrap_or_default();
        let reason = format!("must be from {} to {}{step}", wrong.min, wrong.max);
        ApiError::invalid(wrong.field, reason).with("min", wrong.min).with("max", wrong.max)
    })
}

/// What a caller says of when a sandbox pauses, ends and runs again by itself, as far as anything is said.
pub(super) fn policy(
    app: &App,
    timeout_sec: Option<i64>,
    on_timeout: Option<&str>,
    idle_timeout_sec: Option<i64>,
    auto_resume: Option<bool>,
) -> Result<PolicyChange, ApiError> {
    if !timeout_sec.is_none_or(|seconds| (0..=TIMEOUT_MAX_SEC).contains(&seconds)) {
        return Err(ApiError::invalid("timeout_sec", format!("must be from 0 (never) to {TIMEOUT_MAX_SEC}")));
    }
    let idle_min_sec = app.idle_timeout_min_sec;
    if !idle_timeout_sec.is_none_or(|seconds| seconds == 0 || (idle_min_sec..=TIMEOUT_MAX_SEC).contains(&seconds)) {
        let reason = format!("must be 0 (never) or from {idle_min_sec} to {TIMEOUT_MAX_SEC}");
        return Err(ApiError::invalid("idle_timeout_sec", reason)
            .with("min", idle_min_sec)
            .with("max", TIMEOUT_MAX_SEC));
    }
    let on_timeout = on_timeout.map(str::parse).transpose();
    let on_timeout = on_timeout.map_err(|_| ApiError::invalid("on_timeout", "must be kill, pause or pause_disk"))?;
    Ok(PolicyChange { timeout_sec, on_timeout, idle_timeout_sec, auto_resume })
}

pub(super) fn metadata(pairs: BTreeMap<String, String>) -> Result<BTreeMap<String, String>, ApiError> {
    if pairs.len() > METADATA_MAX {
        return Err(ApiError::invalid("metadata", format!("must be at most {METADATA_MAX} pairs")));
    }
    pairs.iter().try_for_each(|(name, value)| metadata_pair(name, Some(value)))?;
    Ok(pairs)
}

/// A name, with the value that it shall have, if any.
pub(super) fn metadata_pair(name: &str, value: Option<&str>) -> Result<(), ApiError> {
    let is_name = !name.is_empty() && name.len() <= METADATA_BYTES_MAX && !name.chars().any(char::is_control);
    if !is_name || value.is_some_and(|value| value.len() > METADATA_BYTES_MAX) {
        let reason = "must have printable names of 1 to 256 bytes, and values of at most 256";
        return Err(ApiError::invalid("metadata", reason));
    }
    if METADATA_RESERVED.contains(&name) {
        return Err(ApiError::invalid("metadata", format!("may not have {name}: what the host runs is said under it")));
    }
    Ok(())
}

pub(super) fn envs(pairs: BTreeMap<String, String>) -> Result<BTreeMap<String, String>, ApiError> {
    let bytes: usize = pairs.iter().map(|(name, value)| name.len() + value.len()).sum();
    let is_name = |name: &String| !name.is_empty() && !name.contains('=') && !name.chars().any(char::is_control);
    if pairs.len() > ENVS_MAX || bytes > ENVS_BYTES_MAX || !pairs.keys().all(is_name) {
        return Err(ApiError::invalid("envs", "must be at most 128 pairs, 32 KiB in all, with names that have no '='"));
    }
    Ok(pairs)
}
