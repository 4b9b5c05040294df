//! How long a page of a team's list takes that has a hundred thousand sandboxes.

use std::time::Instant;

use anyhow::{Result, ensure};
use whole_machine::figures::{Figure, Judged, Limit};

use super::control_plane::ControlPlane;

const SANDBOXES: usize = 100_000;
const PAGES: usize = 300;
/// As many as somebody looks at.
const PAGE: usize = 100;
const P99_MS_MAX: f64 = 50.0;

pub async fn measure() -> Result<Judged> {
    let control_plane = ControlPlane::start("").await?;
    control_plane.hosts(1000, "127.0.0.1:1")?;
    control_plane.sql(&format!(
        "insert into sandboxes (id, team_id, template, vcpus, memory_mib, disk_mib, desired, observed, host_id, host_epoch, created_at)
         select 'sb' || lpad(n::text, 22, '0'), (select team_id from api_keys order by created_at limit 1), 'minimal', 1, 128, 1024, 'paused', 'paused',
             h.ids[1 + n % 1000], 1, now() - n * interval '1 second'
         from generate_series(1, {SANDBOXES}) n, (select array_agg(id) as ids from hosts) h; analyze"
    ))?;
    let mut took = Vec::with_capacity(PAGES);
    for round in 0..=PAGES {
        // From the newest to the oldest, the deep ones like the first.
        let before = format!("&before=sb{:022}", 1 + round * (SANDBOXES - PAGE) / PAGES);
        let page = format!("?limit={PAGE}{}", if round == 0 { "" } else { &before });
        let began = Instant::now();
        let request = control_plane.http.get(format!("{}/v1/sandboxes{page}", control_plane.base));
        let answer = request.header("X-API-Key", &control_plane.key).send().await?;
        ensure!(answer.status() == 200, "a list was answered with {}", answer.status());
        let bytes = answer.bytes().await?;
        ensure!(bytes.len() > 1000, "the list is empty");
        // The first one connects and plans.
        if round > 0 {
            took.push(began.elapsed().as_secs_f64() * 1000.0);
        }
    }
    Ok(Figure::of("list_page_p99", "ms", took).judged(Limit::P50AndP99(P99_MS_MAX, P99_MS_MAX)))
}
