//! What a sandbox has taken of its host.

use api::host::{GetMetricsResponse, MetricPoint};
use connectrpc::ConnectError;
use model::sandbox::Observed;

use super::errors;
use crate::gauges::{Gauges, Point};
use crate::sandbox::state::View;

/// Of one that has ended there is nothing any more.
pub async fn points(gauges: &Gauges, view: &View, range_sec: u32) -> Result<GetMetricsResponse, ConnectError> {
    if matches!(view.observed, Observed::Killing | Observed::Killed) {
        return Err(errors::not_running(view.observed));
    }
    let points = gauges.points(&view.id, range_sec, view.observed == Observed::Running).await;
    Ok(GetMetricsResponse { points: points.into_iter().map(shown).collect(), ..Default::default() })
}

fn shown(point: Point) -> MetricPoint {
    MetricPoint {
        timestamp_unix: point.at.into(),
        cpu_pct: f64::from(point.cpu_pct),
        mem_bytes: i64::from(point.memory_kib) * 1024,
        disk_bytes: i64::from(point.disk_kib) * 1024,
        ..Default::default()
    }
}
