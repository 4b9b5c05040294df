//! `POST /v1/admin/builds`: the wish for a template, made by a recipe. As JSON; or as a form, with files for `COPY`.

use api::v1::builds::{Build, CreateBuild};
use api::v1::errors::ErrorBody;
use axum::extract::multipart::Field;
use axum::extract::{FromRequest as _, Request, State};
use bytes::{Bytes, BytesMut};
use http::StatusCode;
use model::ids::BuildId;
use model::shape::{Shape, TemplateName};
use serde::Serialize;
use sha2::{Digest as _, Sha256};
use store::builds::{Archive, ArchiveKind, Created, NewBuild, UNFINISHED_MAX};
use utoipa::ToSchema;
use uuid::Uuid;

use super::super::sandboxes::create::shape;
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
const ARCHIVE_BYTES_MAX: u64 = 100 * 1024 * 1024;
/// Of an archive, in the database.
const PIECE_BYTES: usize = 1024 * 1024;
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
    let made = async {
        let digest = sent.map(|sent| sent.sha256);
        let key = repeat.scoped(&caller, "POST /v1/admin/builds", &Arguments { config: &config, archive: digest });
        let new = checked(config, archive)?;
        let (worker, actor) = (app.clone(), caller.actor());
        let created = super::super::detached(&app, async move {
            Ok((worker.store.create_build(&new, key.as_ref(), &actor).await?, new))
        });
        match created.await? {
            (Created::Made, new) => Ok((new.id, true)),
            (Created::Repeated(id), _) => Ok((id, false)),
            (Created::OtherArguments, _) => Err(ApiError::idempotency_key_reused()),
            (Created::NameReserved, new) => Err(ApiError::name_reserved(new.name.as_str())),
            (Created::TooMany, _) => Err(ApiError::too_many_builds(UNFINISHED_MAX)),
        }
    }
    .await;
    if let (Some(archive), Ok((_, false)) | Err(_)) = (archive, &made) {
        // Else it goes with what is old.
        app.store.remove_archive(archive.id).await?;
    }
    let (id, _) = made?;
    app.builds.hint();
    let build = app.store.build(id).await?.ok_or_else(|| ApiError::not_found("build"))?;
    let done = app.store.build_steps(id).await?;
    Ok((StatusCode::CREATED, axum::Json(super::shown(build, done))))
}

struct Sent {
    archive: Archive,
    /// In hex.
    sha256: String,
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
                Some("archive") if archive.is_none() => archive = kept(app, field).await?,
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

/// Puts an archive where every replica finds it. None: there is nothing in it.
async fn kept(app: &App, mut field: Field<'_>) -> Result<Option<Sent>, ApiError> {
    let id = Uuid::new_v4();
    let stored = stored(app, id, &mut field).await;
    if !matches!(stored, Ok(Some(_))) {
        app.store.remove_archive(id).await?;
    }
    stored
}

async fn stored(app: &App, id: Uuid, field: &mut Field<'_>) -> Result<Option<Sent>, ApiError> {
    let mut digest = Sha256::new();
    let (mut size, mut part, mut kind) = (0u64, 0, None);
    let mut piece = BytesMut::with_capacity(PIECE_BYTES);
    loop {
        let chunk = within(field.chunk()).await?;
        let is_last = chunk.is_none();
        let mut chunk = chunk.unwrap_or_default();
        size += u64::try_from(chunk.len()).unwrap_or(u64::MAX);
        if size > ARCHIVE_BYTES_MAX {
            return Err(ApiError::too_large(ARCHIVE_BYTES_MAX));
        }
        digest.update(&chunk);
        while !chunk.is_empty() || is_last && !piece.is_empty() {
            let room = PIECE_BYTES - piece.len();
            let taken: Bytes = chunk.split_to(room.min(chunk.len()));
            piece.extend_from_slice(&taken);
            if piece.len() == PIECE_BYTES || is_last {
                if part == 0 {
                    kind = Some(archive_kind(&piece)?);
                }
                app.store.put_archive_part(id, part, &piece).await?;
                piece.clear();
                part += 1;
            }
        }
        if is_last {
            break;
        }
    }
    Ok(kind.map(|kind| Sent { archive: Archive { id, kind }, sha256: hex::encode(digest.finalize()) }))
}

/// By how its bytes begin.
fn archive_kind(bytes: &[u8]) -> Result<ArchiveKind, ApiError> {
    if bytes.starts_with(b"\x1f\x8b") {
        Ok(ArchiveKind::Gzip)
    } else if bytes.starts_with(b"PK\x03\x04") {
        Ok(ArchiveKind::Zip)
    } else if bytes.get(257..262) == Some(b"ustar") {
        Ok(ArchiveKind::Tar)
    } else {
        Err(ApiError::invalid("archive", "is neither tar, nor tar.gz, nor zip"))
    }
}

fn checked(config: CreateBuild, archive: Option<Archive>) -> Result<NewBuild, ApiError> {
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
    let total = steps(config.recipe.len(), healthcheck.is_some(), config.skip_pre_post);
    Ok(NewBuild {
        id: BuildId(Uuid::now_v7()),
        name: template("name", &config.name)?,
        base: template("base_template", config.base_template.as_deref().unwrap_or(templates::DEFAULT))?,
        recipe: config.recipe,
        healthcheck,
        shape: shape(
            config.vcpus.unwrap_or(VCPUS_DEFAULT),
            config.memory_mb.unwrap_or(MEMORY_DEFAULT_MIB),
            config.disk_size_mb.unwrap_or(Shape::DEFAULT_DISK_MIB),
        )?,
        skip_pre_post: config.skip_pre_post,
        archive,
        total_steps: i32::try_from(total).unwrap_or(i32::MAX),
    })
}
