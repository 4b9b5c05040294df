//! `POST /v1/admin/builds`: the wish for a template, made by a recipe. As JSON; or as a form, with files for `COPY`.

use api::v1::builds::{Build, CreateBuild};
use api::v1::errors::ErrorBody;
use axum::extract::{FromRequest as _, Request, State};
use http::StatusCode;
use model::ids::BuildId;
use model::shape::{Shape, TemplateName};
use serde::Serialize;
use store::builds::{Archive, Created, NewBuild, UNFINISHED_MAX};
use utoipa::ToSchema;
use uuid::Uuid;

use super::super::sandboxes::create::shape;
use super::archive::{self, Sent};
use crate::app::App;
use crate::builds::{recipe, steps};
use crate::http::access::Caller;
use crate::http::body::{Json, parse};
use crate::http::errors::ApiError;
use crate::http::form::{self, text_of, within};
use crate::http::idempotency::IdempotencyKey;
use crate::templates;

const RECIPE_MAX: usize = 256;
const CONFIG_BYTES_MAX: usize = 1024 * 1024;
const VCPUS_DEFAULT: i64 = 1;
const MEMORY_DEFAULT_MIB: i64 = 512;

#[derive(ToSchema)]
#[allow(dead_code, reason = "describes the form for the OpenAPI document")]
pub struct BuildForm {
    /// `CreateBuild`, as JSON.
    config: String,
    /// Files for `COPY`: tar, tar.gz or zip, of at most 100 MiB.
    #[schema(value_type = Option<String>, format = Binary)]
    archive: Option<Vec<u8>>,
}

/// What makes two calls the same.
#[derive(Serialize)]
struct Arguments<'a> {
    config: &'a CreateBuild,
    archive: Option<String>,
}

#[utoipa::path(post, path = "/", tag = "builds",
    request_body(content((CreateBuild = "application/json"), (BuildForm = "multipart/form-data"))),
    responses((status = 201, body = Build), (status = 400, body = ErrorBody), (status = 403, body = ErrorBody),
        (status = 409, body = ErrorBody, description = "the hosts have an image of that name"), (status = 429, body = ErrorBody)))]
pub async fn create(
    State(app): State<App>,
    caller: Caller,
    repeat: IdempotencyKey,
    request: Request,
) -> Result<(StatusCode, axum::Json<Build>), ApiError> {
    let (config, sent) = if form::is_one(request.headers()).is_ok() {
        sent(&app, request).await?
    } else {
        (Json::from_request(request, &()).await?.0, None)
    };
    let archive = sent.as_ref().map(|sent| sent.archive);
    let digest = sent.map(|sent| sent.sha256);
    let key = repeat.scoped(&caller, "POST /v1/admin/builds", &Arguments { config: &config, archive: digest });
    let made = match checked(&app, &caller, config, archive).await {
        Ok(new) => {
            let (worker, actor, name) = (app.clone(), caller.actor(), new.name.clone());
            let created = super::super::detached(&app, async move {
                Ok((worker.store.create_build(&new, key.as_ref(), &actor).await?, new.id))
            });
            // Where it is not known what became of it, the archive is the build's, or goes with what is old.
            match created.await? {
                (Created::Made, id) => Ok((id, true)),
                (Created::Repeated(id), _) => Ok((id, false)),
                (Created::OtherArguments, _) => Err(ApiError::idempotency_key_reused()),
                (Created::NameReserved, _) => Err(ApiError::name_reserved(name.as_str())),
                (Created::NameTaken, _) => Err(ApiError::template_name_taken(name.as_str())),
                (Created::TooMany, _) => Err(ApiError::too_many_builds(UNFINISHED_MAX)),
            }
        }
        Err(error) => Err(error),
    };
    if let (Some(archive), Ok((_, false)) | Err(_)) = (archive, &made) {
        app.store.remove_archive(archive.id).await?;
    }
    let (id, _) = made?;
    app.builds.hint();
    let build = app.store.build(id).await?.ok_or_else(|| ApiError::not_found("build"))?;
    let done = app.store.build_steps(id).await?;
    Ok((StatusCode::CREATED, axum::Json(super::shown(build, done))))
}

/// The form's fields, in whatever order they come.
async fn sent(app: &App, request: Request) -> Result<(CreateBuild, Option<Sent>), ApiError> {
    let mut form = form::of(request).await?;
    let (mut config, mut archive) = (None, None);
    let read = async {
        while let Some(mut field) = within(form.next_field()).await? {
            match field.name() {
                Some("config") if config.is_none() => {
                    config = Some(parse(text_of(&mut field, "config", CONFIG_BYTES_MAX).await?.as_bytes())?);
                }
                Some("archive") if archive.is_none() => archive = archive::kept(app, field).await?,
                Some(name @ ("config" | "archive")) => return Err(ApiError::invalid(name, "is there twice")),
                _ => while within(field.chunk()).await?.is_some() {},
            }
        }
        config.ok_or_else(|| ApiError::invalid("config", "is missing"))
    }
    .await;
    match read {
        Ok(config) => Ok((config, archive)),
        Err(error) => {
            if let Some(Sent { archive, .. }) = archive {
                app.store.remove_archive(archive.id).await?;
            }
            Err(error)
        }
    }
}

async fn checked(
    app: &App,
    caller: &Caller,
    config: CreateBuild,
    archive: Option<Archive>,
) -> Result<NewBuild, ApiError> {
    let template = |field, text: &str| {
        text.parse::<TemplateName>().map_err(|error| ApiError::invalid(field, format!("is wrong: {error}")))
    };
    if !(1..=RECIPE_MAX).contains(&config.recipe.len()) {
        return Err(ApiError::invalid("recipe", format!("must be 1 to {RECIPE_MAX} instructions")));
    }
    for (index, line) in config.recipe.iter().enumerate() {
        let instruction =
            recipe::parse(line).map_err(|reason| ApiError::invalid(&format!("recipe[{index}]"), reason))?;
        if matches!(instruction, recipe::Instruction::Copy { .. }) && archive.is_none() {
            return Err(ApiError::invalid("archive", format!("is missing, and recipe[{index}] copies from it")));
        }
    }
    let healthcheck = config.healthcheck.filter(|text| !text.trim().is_empty());
    if let Some(text) = &healthcheck {
        recipe::healthcheck(text).map_err(|reason| ApiError::invalid("healthcheck", reason))?;
    }
    let base = template("base_template", config.base_template.as_deref().unwrap_or(templates::DEFAULT))?;
    let name = template("name", &config.name)?;
    // What has memory has its shape with it.
    let of_base = app.store.snapshot_named(caller.team, &base).await?.map(|snapshot| snapshot.shape);
    let (vcpus, memory, disk) = of_base.map_or((VCPUS_DEFAULT, MEMORY_DEFAULT_MIB, Shape::DEFAULT_DISK_MIB), |shape| {
        (shape.vcpus().into(), shape.memory().0.into(), shape.disk().0.into())
    });
    let shape =
        shape(config.vcpus.unwrap_or(vcpus), config.memory_mb.unwrap_or(memory), config.disk_size_mb.unwrap_or(disk))?;
    if let Some(of_base) = of_base.filter(|of_base| *of_base != shape) {
        let (vcpus, memory, disk) = (of_base.vcpus(), of_base.memory().0, of_base.disk().0);
        let reason = format!(
            "has a shape of its own ({vcpus} vCPUs, {memory} MiB, disk {disk} MiB): leave out vcpus, memory_mb and disk_size_mb"
        );
        return Err(ApiError::invalid("base_template", reason));
    }
    let total = steps(config.recipe.len(), healthcheck.is_some(), config.skip_pre_post);
    Ok(NewBuild {
        id: BuildId(Uuid::now_v7()),
        name,
        base,
        recipe: config.recipe,
        healthcheck,
        shape,
        skip_pre_post: config.skip_pre_post,
        archive,
        total_steps: i32::try_from(total).unwrap_or(i32::MAX),
    })
}
