//! How long creates take when half as many are asked for as the control plane can do. Each is asked for at its own time, however long the
//! ones before take, and its time counts from then: whoever waits is not left out.

use std::time::Duration;

use anyhow::Result;
use tokio::task::JoinSet;
use tokio::time::Instant;
use whole_machine::figures::{Figure, Judged, Limit};

use super::control_plane::ControlPlane;

const TIME: Duration = Duration::from_secs(10);
const P99_MS_MAX: f64 = 50.0;

pub async fn measure(control_plane: &ControlPlane, per_second: f64) -> Result<Judged> {
    let count = (TIME.as_secs_f64() * per_second) as u32;
    let began = Instant::now();
    let mut calls = JoinSet::new();
    for number in 0..count {
        let at = began + Duration::from_secs_f64(f64::from(number) / per_second);
        tokio::time::sleep_until(at).await;
        let create = control_plane.create_request();
        calls.spawn(async move {
            let answer = create.send().await;
            (answer.is_ok_and(|answer| answer.status() == 202)).then(|| at.elapsed().as_secs_f64() * 1000.0)
        });
    }
    let took: Vec<f64> = calls.join_all().await.into_iter().flatten().collect();
    let tries = count as usize;
    Ok(Figure::of("create_p99_at_half", "ms", took).of_tries(tries).judged(Limit::P50AndP99(P99_MS_MAX, P99_MS_MAX)))
}
