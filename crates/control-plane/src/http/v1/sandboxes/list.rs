//! `GET /v1/sandboxes`: the team's, newest first, without those that have ended. All of them at once, or page by page; all, or those that are
//! as asked: `status`, `template`, `metadata.NAME=VALUE` (all of them), `created_after`, `created_before`.

use api::v1::errors::ErrorBody;
use api::v1::sandboxes::{Page, Sandbox};
use axum::extract::{FromRequestParts, RawQuery, State};
use chrono::{DateTime, Utc};
use http::request::Parts;
use http::{HeaderMap, HeaderValue, header};
use model::ids::SandboxId;
use model::sandbox::Status;
use store::sandboxes::{LIST_MAX, Which};

use super::create::{METADATA_MAX, metadata_pair};
use super::view::shown;
use crate::app::App;
use crate::http::access::Caller;
use crate::http::cursor::{Last, Of};
use crate::http::errors::ApiError;

/// Of those that the list has.
const STATUSES: [Status; 8] = [
    Status::Starting,
    Status::Running,
    Status::Pausing,
    Status::Paused,
    Status::Resuming,
    Status::Stopping,
    Status::Error,
    Status::Missing,
];
const TEMPLATE_BYTES_MAX: usize = 64;
const LABEL_PREFIX: &str = "metadata.";

#[derive(Debug, Default, PartialEq)]
pub struct ListQuery {
    limit: Option<u32>,
    begin: Begin,
    which: Which,
}

#[derive(Debug, Default, PartialEq)]
enum Begin {
    #[default]
    Newest,
    Cursor(String),
    /// After this one.
    Before(SandboxId),
}

impl<S: Send + Sync> FromRequestParts<S> for ListQuery {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let RawQuery(text) = RawQuery::from_request_parts(parts, state).await.unwrap_or_else(|never| match never {});
        parse(&text.unwrap_or_default())
    }
}

#[utoipa::path(get, path = "/", tag = "sandboxes",
    params(Page, ("metadata.NAME" = Option<String>, Query, description = "those whose metadata has this value under NAME; repeated with other names: all of them")),
    responses((status = 200, body = Vec<Sandbox>), (status = 400, body = ErrorBody), (status = 401, body = ErrorBody)))]
pub async fn list(
    State(app): State<App>,
    caller: Caller,
    query: ListQuery,
) -> Result<(HeaderMap, axum::Json<Vec<Sandbox>>), ApiError> {
    let limit = query.limit.unwrap_or(LIST_MAX);
    let filters = filters(&query.which);
    let asked = format!("sandboxes?{filters}");
    let of = Of { secret: &app.secret, team: caller.team, asked: asked.as_bytes() };
    let before: Option<(DateTime<Utc>, SandboxId)> = match query.begin {
        Begin::Newest => None,
        Begin::Cursor(text) => {
            let Last { at, id } = of.read(&text, Utc::now())?;
            Some((at, id.parse().map_err(|_| ApiError::internal())?))
        }
        // Another team's is like one that never was.
        Begin::Before(id) => match app.store.sandbox(caller.team, &id).await? {
            Some(sandbox) => Some((sandbox.created_at, id)),
            None => return Err(ApiError::invalid("before", "is no sandbox of the team")),
        },
    };
    let before = before.as_ref().map(|(at, id)| (*at, id));
    let found = app.store.sandboxes(caller.team, limit, before, &query.which).await?;
    let mut headers = HeaderMap::new();
    if found.len() == limit as usize
        && let Some(last) = found.last()
    {
        let cursor = of.cursor(&Last { at: last.created_at, id: last.id.to_string() }, Utc::now());
        // Relative to the list itself, under whichever name it was asked for.
        let next = format!("<?limit={limit}&cursor={cursor}{filters}>; rel=\"next\"");
        headers.insert(header::LINK, HeaderValue::from_str(&next).expect("what is encoded for an address is ASCII"));
    }
    Ok((headers, axum::Json(found.into_iter().map(shown).collect())))
}

/// What was asked, in one form, as the rest of an address: `&status=running&template=x`.
fn filters(which: &Which) -> String {
    let mut pairs = url::form_urlencoded::Serializer::new(String::new());
    for status in &which.statuses {
        pairs.append_pair("status", status.as_str());
    }
    if let Some(template) = &which.template {
        pairs.append_pair("template", template);
    }
    for (name, value) in &which.metadata {
        pairs.append_pair(&format!("{LABEL_PREFIX}{name}"), value);
    }
    for (name, at) in [("created_after", which.created_after), ("created_before", which.created_before)] {
        if let Some(at) = at {
            pairs.append_pair(name, &at.to_rfc3339_opts(chrono::SecondsFormat::Micros, true));
        }
    }
    let text = pairs.finish();
    if text.is_empty() { text } else { format!("&{text}") }
}

fn parse(text: &str) -> Result<ListQuery, ApiError> {
    let mut query = ListQuery::default();
    for (name, value) in url::form_urlencoded::parse(text.as_bytes()) {
        if value.contains('\0') || name.contains('\0') {
            return Err(ApiError::invalid("", "the query: holds a NUL character"));
        }
        match &*name {
            "limit" => {
                let limit = value.parse().ok().filter(|limit| (1..=LIST_MAX).contains(limit));
                let reason = || ApiError::invalid("limit", format!("must be from 1 to {LIST_MAX}"));
                query.limit = Some(limit.ok_or_else(reason)?);
            }
            "before" | "cursor" if query.begin != Begin::Newest => {
                return Err(ApiError::invalid(&name, "is not the only one that says where the page begins"));
            }
            "before" => {
                let id = value.parse().map_err(|error| ApiError::invalid("before", format!("is {error}")))?;
                query.begin = Begin::Before(id);
            }
            "cursor" => query.begin = Begin::Cursor(value.into_owned()),
            "status" => statuses(&value, &mut query.which.statuses)?,
            "template" => {
                if value.is_empty() || value.len() > TEMPLATE_BYTES_MAX {
                    return Err(ApiError::invalid("template", "must have 1 to 64 bytes"));
                }
                query.which.template = Some(value.into_owned());
            }
            "created_after" => query.which.created_after = Some(instant(&name, &value)?),
            "created_before" => query.which.created_before = Some(instant(&name, &value)?),
            other => {
                let Some(label) = other.strip_prefix(LABEL_PREFIX) else { continue };
                // The platform's own names are not asked for here: they are no labels.
                metadata_pair(label, Some(&value))?;
                let was = query.which.metadata.insert(label.to_owned(), value.into_owned());
                if was.is_some() || query.which.metadata.len() > METADATA_MAX {
                    let reason = format!("may be asked for {METADATA_MAX} names, each once");
                    return Err(ApiError::invalid("metadata", reason));
                }
            }
        }
    }
    query.which.statuses.sort_unstable_by_key(|status| status.as_str());
    query.which.statuses.dedup();
    let (after, before) = (query.which.created_after, query.which.created_before);
    if after.zip(before).is_some_and(|(after, before)| after >= before) {
        return Err(ApiError::invalid("created_after", "must be before created_before"));
    }
    Ok(query)
}

fn statuses(text: &str, into: &mut Vec<Status>) -> Result<(), ApiError> {
    for word in text.split(',').map(str::trim).filter(|word| !word.is_empty()) {
        let known = STATUSES.into_iter().find(|status| status.as_str() == word);
        let all: Vec<&str> = STATUSES.iter().map(|status| status.as_str()).collect();
        let reason = || ApiError::invalid("status", format!("must be one of {}", all.join(", ")));
        into.push(known.ok_or_else(reason)?);
        if into.len() > 4 * STATUSES.len() {
            return Err(ApiError::invalid("status", "names the same ones again and again"));
        }
    }
    Ok(())
}

fn instant(field: &str, text: &str) -> Result<DateTime<Utc>, ApiError> {
    let at = DateTime::parse_from_rfc3339(text).ok().map(|at| at.with_timezone(&Utc));
    // What the database can hold.
    let at = at.filter(|at| (1..=9999).contains(&chrono::Datelike::year(at)));
    at.ok_or_else(|| ApiError::invalid(field, "is not an instant as RFC 3339 writes it"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_asked_has_one_form() {
        let one = parse(
            "status=paused,running&template=x&metadata.b=2&metadata.a=%261&created_after=2026-01-02T03:04:05%2B01:00",
        );
        let other = parse(
            "metadata.a=%261&status=running&status=paused&created_after=2026-01-02T02:04:05Z&metadata.b=2&template=x",
        );
        let (one, other) = (one.unwrap().which, other.unwrap().which);
        assert_eq!(one, other);
        assert_eq!(
            filters(&one),
            "&status=paused&status=running&template=x&metadata.a=%261&metadata.b=2&created_after=2026-01-02T02%3A04%3A05.000000Z"
        );
        assert_eq!(parse(&filters(&one)).unwrap().which, one);
        assert_eq!(filters(&parse("x=y&limit=3").unwrap().which), "");
    }

    #[test]
    fn says_which_parameter_is_wrong() {
        for (wrong, field) in [
            ("limit=0", "limit"),
            ("limit=10001", "limit"),
            ("limit=1e9", "limit"),
            ("before=x", "before"),
            ("cursor=a&cursor=b", "cursor"),
            ("cursor=a&before=sb0000000000000000000000", "before"),
            ("status=stopped", "status"),
            ("status=RUNNING", "status"),
            ("template=", "template"),
            ("metadata.=x", "metadata"),
            ("metadata.envd_version=x", "metadata"),
            ("metadata.a=1&metadata.a=2", "metadata"),
            ("created_after=yesterday", "created_after"),
            ("created_before=2026-01-01", "created_before"),
            ("created_after=2026-01-02T00:00:00Z&created_before=2026-01-01T00:00:00Z", "created_after"),
        ] {
            let error = parse(wrong).unwrap_err();
            assert_eq!(error.object("").details.unwrap()["field"], field, "{wrong}");
        }
    }
}
