//! `GET /v1/sandboxes/usage`: what the team has used, by days.

use api::v1::errors::ErrorBody;
use api::v1::metrics::{Usage, UsagePoint};
use axum::extract::State;
use chrono::{Datelike as _, NaiveDate, TimeDelta, Utc};
use serde::Deserialize;
use utoipa::IntoParams;

use crate::app::App;
use crate::http::access::Caller;
use crate::http::body::Query;
use crate::http::errors::ApiError;

/// Longest range; it is kept a little longer.
const DAYS_MAX: i64 = 92;
const DAYS_DEFAULT: i64 = 30;
/// No platform has run before, and none will be asked later.
const YEARS: std::ops::RangeInclusive<i32> = 2000..=2999;

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct Asked {
    /// First day, YYYY-MM-DD in UTC; 30 days before `to` when absent.
    from: Option<String>,
    /// Last day; today when absent.
    to: Option<String>,
}

#[utoipa::path(get, path = "/usage", tag = "sandboxes", params(Asked),
    responses((status = 200, body = Usage), (status = 400, body = ErrorBody)))]
pub async fn usage(
    State(app): State<App>,
    caller: Caller,
    Query(asked): Query<Asked>,
) -> Result<axum::Json<Usage>, ApiError> {
    let now = Utc::now();
    let (from, to) = days(&asked, now.date_naive())?;
    let used = app.store.usage(caller.team, from, to, now).await?;
    let points = used.into_iter().map(|(date, used)| UsagePoint {
        date,
        cpu_minutes: minutes(used.vcpu_seconds),
        ram_mb_minutes: minutes(used.memory_mib_seconds),
    });
    Ok(axum::Json(Usage { from, to, points: points.collect() }))
}

fn days(asked: &Asked, today: NaiveDate) -> Result<(NaiveDate, NaiveDate), ApiError> {
    let to = day("to", asked.to.as_deref())?.unwrap_or(today);
    let from = day("from", asked.from.as_deref())?.unwrap_or(to - TimeDelta::days(DAYS_DEFAULT));
    if from > to {
        return Err(ApiError::invalid("from", "is after to"));
    }
    if (to - from).num_days() > DAYS_MAX {
        return Err(ApiError::invalid("from", format!("is more than {DAYS_MAX} days before to")));
    }
    Ok((from, to))
}

fn day(field: &str, text: Option<&str>) -> Result<Option<NaiveDate>, ApiError> {
    let Some(text) = text else { return Ok(None) };
    let is_plain = text.len() == 10 && text.bytes().all(|byte| byte.is_ascii_digit() || byte == b'-');
    let date = NaiveDate::parse_from_str(text, "%Y-%m-%d").ok().filter(|date| is_plain && YEARS.contains(&date.year()));
    date.map(Some).ok_or_else(|| ApiError::invalid(field, "must be a day like 2026-03-31"))
}

/// To thousandths: more is noise.
fn minutes(seconds: f64) -> f64 {
    (seconds / 60.0 * 1000.0).round() / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(from: Option<&str>, to: Option<&str>) -> Asked {
        Asked { from: from.map(str::to_owned), to: to.map(str::to_owned) }
    }

    #[test]
    fn ranges_have_an_order_and_a_length() {
        let today: NaiveDate = "2026-03-31".parse().unwrap();
        let text = |asked: Asked| days(&asked, today).map(|(from, to)| format!("{from} {to}")).unwrap();
        assert_eq!(text(asked(None, None)), "2026-03-01 2026-03-31");
        assert_eq!(text(asked(Some("2026-03-31"), None)), "2026-03-31 2026-03-31");
        assert_eq!(text(asked(None, Some("2025-12-31"))), "2025-12-01 2025-12-31");
        assert_eq!(text(asked(Some("2025-12-29"), Some("2026-03-31"))), "2025-12-29 2026-03-31");
        for (from, to, field) in [
            (Some("2026-04-01"), None, "from"),
            (Some("2025-12-28"), None, "from"),
            (Some("0000-01-01"), Some("0000-01-02"), "to"),
            (Some("9999-01-01"), Some("9999-01-02"), "to"),
            (Some("2026-02-30"), None, "from"),
            (Some("2026-3-1"), None, "from"),
            (Some("+2026-3-1"), None, "from"),
            (Some(""), None, "from"),
            (None, Some("tomorrow"), "to"),
            (None, Some("2026-03-31T00:00:00Z"), "to"),
        ] {
            let error = days(&asked(from, to), today).unwrap_err();
            assert_eq!(error.object("").details.unwrap()["field"], field, "{from:?} {to:?}");
        }
    }
}
