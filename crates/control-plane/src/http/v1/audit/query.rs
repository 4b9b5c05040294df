//! What is asked of the audit: kinds and verbs, where a page begins, how long it is.

use axum::extract::{FromRequestParts, RawQuery};
use chrono::{DateTime, Utc};
use http::request::Parts;
use model::ids::TeamId;
use store::audit_log::{Before, PAGE_MAX};
use utoipa::IntoParams;

use crate::http::errors::ApiError;

const LIMIT_DEFAULT: i64 = 50;
/// Of one parameter that may be repeated.
const WORDS_MAX: usize = 32;
const WORD_BYTES_MAX: usize = 64;
const ID_PREFIX: &str = "log-";

/// As the document says it. `resource_type` and `action` may be repeated, too, which needs a reader of our own.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
#[allow(dead_code)]
pub struct AuditParams {
    /// Entries from before this instant. With `before_id` that says more.
    before: Option<DateTime<Utc>>,
    /// Entries before this one: `next_before_id` of the page before.
    before_id: Option<String>,
    /// 1 to 200, 50 when it is not given.
    limit: Option<i64>,
    /// With commas, or repeated.
    resource_type: Option<String>,
    /// Verbs (`create`), or with the kind (`sandbox.create`); with commas, or repeated.
    action: Option<String>,
}

#[derive(Debug, Default, PartialEq)]
pub struct AuditQuery {
    pub before: Before,
    pub limit: i64,
    pub kinds: Vec<String>,
    pub actions: Vec<String>,
    pub team: Option<TeamId>,
}

impl<S: Send + Sync> FromRequestParts<S> for AuditQuery {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let RawQuery(text) = RawQuery::from_request_parts(parts, state).await.unwrap_or_else(|never| match never {});
        parse(&text.unwrap_or_default())
    }
}

/// An entry's number as clients see it.
pub fn id(number: i64) -> String {
    format!("{ID_PREFIX}{number}")
}

fn parse(text: &str) -> Result<AuditQuery, ApiError> {
    let mut query = AuditQuery { limit: LIMIT_DEFAULT, ..AuditQuery::default() };
    let (mut instant, mut entry) = (None, None);
    for (name, value) in url::form_urlencoded::parse(text.as_bytes()) {
        match &*name {
            "before" => {
                let at = DateTime::parse_from_rfc3339(&value);
                instant = Some(at.map_err(|_| ApiError::invalid("before", "is not an instant as RFC 3339 writes it"))?);
            }
            "before_id" => {
                let number = value.strip_prefix(ID_PREFIX).and_then(|digits| digits.parse::<i64>().ok());
                entry = Some(number.ok_or_else(|| ApiError::invalid("before_id", "is not the id of an entry"))?);
            }
            "limit" => {
                let limit = value.parse().ok().filter(|limit| (1..=PAGE_MAX).contains(limit));
                query.limit =
                    limit.ok_or_else(|| ApiError::invalid("limit", format!("must be from 1 to {PAGE_MAX}")))?;
            }
            "resource_type" => words("resource_type", &value, &mut query.kinds)?,
            "action" => words("action", &value, &mut query.actions)?,
            "team_id" => {
                let team = value.parse().map_err(|error| ApiError::invalid("team_id", format!("is {error}")))?;
                query.team = Some(team);
            }
            _ => {}
        }
    }
    query.before = match (entry, instant) {
        (Some(number), _) => Before::Entry(number),
        (None, Some(at)) => Before::Instant(at.with_timezone(&Utc)),
        (None, None) => Before::Nothing,
    };
    Ok(query)
}

fn words(field: &str, value: &str, into: &mut Vec<String>) -> Result<(), ApiError> {
    for word in value.split(',').map(str::trim).filter(|word| !word.is_empty()) {
        if word.len() > WORD_BYTES_MAX || into.len() == WORDS_MAX {
            return Err(ApiError::invalid(field, format!("may name {WORDS_MAX} words of {WORD_BYTES_MAX} characters")));
        }
        into.push(word.to_owned());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_come_with_commas_or_repeated() {
        let query = parse("resource_type=sandbox,host&resource_type=team&action=create&limit=7&x=y").unwrap();
        assert_eq!(query.kinds, ["sandbox", "host", "team"]);
        assert_eq!((query.actions, query.limit, query.before), (vec!["create".to_owned()], 7, Before::Nothing));
        assert_eq!(parse("").unwrap().limit, LIMIT_DEFAULT);
        let both = parse("before=2026-01-02T03:04:05Z&before_id=log-9").unwrap();
        assert_eq!(both.before, Before::Entry(9));
        assert!(matches!(parse("before=2026-01-02T03:04:05%2B01:00").unwrap().before, Before::Instant(_)));
    }

    #[test]
    fn says_which_parameter_is_wrong() {
        let many = format!("action={}", "x,".repeat(40));
        for wrong in ["limit=0", "limit=201", "limit=x", "before=yesterday", "before_id=9", "before_id=log-x", &many] {
            let error = parse(wrong).unwrap_err();
            assert_eq!(error.code(), "invalid_request", "{wrong}");
            assert!(error.message().starts_with(wrong.split('=').next().unwrap()), "{wrong}: {}", error.message());
        }
    }
}
