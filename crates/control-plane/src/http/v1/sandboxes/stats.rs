//! `GET /v1/sandboxes/stats`: how much of the team runs, ran in a range of time, and ran at most in thirty days.

use api::v1::errors::ErrorBody;
use api::v1::metrics::{CurrentLoad, LoadSeries, PeakLoad, Stats};
use axum::extract::State;
use chrono::{DateTime, SecondsFormat, TimeDelta, Utc};
use serde::Deserialize;
use store::usage::{Load, QUARTER};
use utoipa::IntoParams;

use crate::app::App;
use crate::http::access::Caller;
use crate::http::body::Query;
use crate::http::errors::ApiError;

/// Of the series of the last thirty days, in quarters.
const QUARTERS: u16 = 120;
const RANGE_DEFAULT: &str = "1h";
const RANGE_LONGEST: &str = "30d";
/// Words, width of a bucket, how many.
const RANGES: [(&str, TimeDelta, u16); 5] = [
    ("5m", TimeDelta::seconds(3), 100),
    ("1h", TimeDelta::seconds(30), 120),
    ("6h", TimeDelta::seconds(180), 120),
    ("24h", TimeDelta::seconds(720), 120),
    (RANGE_LONGEST, QUARTER, QUARTERS),
];

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct Asked {
    /// `5m`, `1h` (default), `6h`, `24h` or `30d`.
    range: Option<String>,
}

#[utoipa::path(get, path = "/stats", tag = "sandboxes", params(Asked),
    responses((status = 200, body = Stats), (status = 400, body = ErrorBody)))]
pub async fn stats(
    State(app): State<App>,
    caller: Caller,
    Query(asked): Query<Asked>,
) -> Result<axum::Json<Stats>, ApiError> {
    let range = asked.range.unwrap_or_else(|| RANGE_DEFAULT.to_owned());
    let Some((_, width, count)) = RANGES.iter().find(|(word, _, _)| *word == range) else {
        return Err(ApiError::invalid("range", "must be one of 5m, 1h, 6h, 24h and 30d"));
    };
    let now = Utc::now();
    let current = app.store.load_now(caller.team).await?;
    let month = app.store.quarters(caller.team, first_bucket(now, QUARTER, QUARTERS), QUARTERS).await?;
    let peaks = month.iter().copied().fold(current, Load::max);
    let from = first_bucket(now, *width, *count);
    let series = match range.as_str() {
        RANGE_LONGEST => month,
        _ => app.store.load_series(caller.team, from, *width, *count).await?,
    };
    Ok(axum::Json(Stats {
        range,
        current: CurrentLoad {
            running_count: current.running,
            vcpus_reserved: current.vcpus,
            memory_mb_reserved: current.memory_mib,
        },
        peaks: PeakLoad { running_count: peaks.running, vcpus: peaks.vcpus, memory_mb: peaks.memory_mib },
        series: shown(from, *width, &series),
    }))
}

/// Buckets begin at multiples of their width, and the last one is that in which `now` is.
fn first_bucket(now: DateTime<Utc>, width: TimeDelta, count: u16) -> DateTime<Utc> {
    let within = TimeDelta::seconds(now.timestamp().rem_euclid(width.num_seconds()));
    let last = DateTime::from_timestamp(now.timestamp(), 0).unwrap_or(now) - within;
    last - width * (i32::from(count) - 1)
}

fn shown(from: DateTime<Utc>, width: TimeDelta, series: &[Load]) -> LoadSeries {
    let labels = (0i32..).take(series.len()).map(|n| (from + width * n).to_rfc3339_opts(SecondsFormat::Secs, true));
    LoadSeries {
        labels: labels.collect(),
        running: series.iter().map(|load| load.running).collect(),
        vcpus: series.iter().map(|load| load.vcpus).collect(),
        memory_mb: series.iter().map(|load| load.memory_mib).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_bucket_is_that_of_now() {
        let now: DateTime<Utc> = "2026-03-05T13:14:15.9Z".parse().unwrap();
        for (width, count, first) in [
            (TimeDelta::seconds(3), 100, "2026-03-05T13:09:18Z"),
            (TimeDelta::seconds(30), 120, "2026-03-05T12:14:30Z"),
            (QUARTER, 120, "2026-02-03T18:00:00Z"),
        ] {
            let from = first_bucket(now, width, count);
            assert_eq!(from, first.parse::<DateTime<Utc>>().unwrap());
            let last = from + width * (i32::from(count) - 1);
            assert!(last <= now && now < last + width);
        }
        let labels = shown(now, TimeDelta::seconds(30), &[Load::default(); 2]).labels;
        assert_eq!(labels, ["2026-03-05T13:14:15Z", "2026-03-05T13:14:45Z"]);
    }
}
