//! How long it takes until the last of a thousand listeners has heard of something.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use futures::StreamExt as _;
use tokio::sync::mpsc;

use super::Bench;
use super::figures::{Figure, Judged, Limit};

const LISTENERS: usize = 1000;
const ROUNDS: usize = 20;
/// From before the write until the last has heard.
const MS_MAX: f64 = 100.0;
const HEARD_MAX: Duration = Duration::from_secs(10);

pub async fn fan_out(bench: &Bench) -> Result<Judged> {
    let (sender, mut heard) = mpsc::channel(2 * LISTENERS);
    let mut listeners = Vec::new();
    for _ in 0..LISTENERS {
        let answer = bench.http.get(format!("{}/v1/events/stream", bench.url)).send().await?;
        ensure!(answer.status() == 200, "the stream of events is answered with {}", answer.status());
        let (sender, mut pieces) = (sender.clone(), answer.bytes_stream());
        listeners.push(tokio::spawn(async move {
            while let Some(Ok(piece)) = pieces.next().await {
                if piece.windows(6).any(|part| part == b"bench-") && sender.send(Instant::now()).await.is_err() {
                    return;
                }
            }
        }));
    }
    let team = bench.cluster.database.sql("select team_id from api_keys order by created_at limit 1").await;
    let mut took = Vec::new();
    for round in 0..ROUNDS {
        // As an idle platform is: no event is near.
        tokio::time::sleep(Duration::from_millis(300)).await;
        let began = Instant::now();
        bench
            .cluster
            .database
            .sql(&format!(
                "insert into events_written (team_id, kind, resource_type, resource_id)
                 values ('{}', 'capsule.state.changed', 'capsule', 'bench-{round}')",
                team.trim()
            ))
            .await;
        let mut last = began;
        for _ in 0..LISTENERS {
            let at = tokio::time::timeout(HEARD_MAX, heard.recv()).await.context("somebody heard nothing")?;
            last = last.max(at.context("the listeners are gone")?);
        }
        took.push((last - began).as_secs_f64() * 1000.0);
    }
    for listener in listeners {
        listener.abort();
    }
    Ok(Figure::of("event_to_1000", "ms", took).judged(Limit::P50AndP99(MS_MAX, MS_MAX)))
}
