//! Creates that claim what stands by, one after the other, and what they wait for at least: the disk.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use whole_machine::figures::{Figure, Judged, Limit};
use whole_machine::platform::Platform;
use whole_machine::standbys::{until_ready, was_standby};

use super::{create, milliseconds};

/// A second and a half each: another one is made for each that was claimed.
const CLAIMS: usize = 30;
/// Not measured.
const WARM_UP: usize = 3;

/// `platform` keeps standbys.
pub async fn measure(platform: &Platform) -> Result<Vec<Judged>> {
    let (mut claims, mut steps, mut syncs, mut commands) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    // The first boots, and the second says that there is a demand.
    for _ in 0..2 {
        let (id, _) = create(platform, &mut Vec::new()).await?;
        platform.kill(&id).await;
        tokio::time::sleep(std::time::Duration::from_secs(3)).await;
    }
    for round in 0..WARM_UP + CLAIMS {
        until_ready(platform, 1).await;
        let mut took = Vec::new();
        let (id, sandbox) = create(platform, &mut took).await?;
        ensure!(was_standby(platform, &id), "nothing stood by");
        let began = Instant::now();
        ensure!(platform.shell(&id, "true").await.0 == 0, "the sandbox does not work");
        let command = milliseconds(began);
        if round >= WARM_UP {
            claims.append(&mut took);
            commands.push(command);
            steps.push(sandbox);
            syncs.push(sync(&platform.dir.join("pool"))?);
        }
        platform.kill(&id).await;
    }
    let mut judged = vec![
        Figure::of("create_pool_hit", "ms", claims).judged(Limit::P50AndP99(10.0, 50.0)),
        Figure::of("create_pool_hit_first_command", "ms", commands).judged(Limit::None),
        Figure::of("disk_sync", "ms", syncs).judged(Limit::None),
    ];
    for (name, figure) in [
        ("reserve", "create_pool_hit_reserve"),
        ("start", "create_pool_hit_start"),
        ("init", "create_pool_hit_init"),
        ("commit", "create_pool_hit_commit"),
        ("control_plane", "create_pool_hit_control_plane"),
    ] {
        let times = steps.iter().filter_map(|sandbox| step(sandbox, name)).collect();
        judged.push(Figure::of(figure, "ms", times).judged(Limit::None));
    }
    Ok(judged)
}

pub fn step(sandbox: &Value, name: &str) -> Option<f64> {
    sandbox["steps"].as_array()?.iter().find(|step| step["name"] == name)?["ms"].as_f64()
}

/// A small file that lasts, as the host writes its journal.
pub fn sync(pool: &Path) -> Result<f64> {
    let (path, temporary) = (pool.join("bench"), pool.join("bench.tmp"));
    let began = Instant::now();
    let mut file = File::create(&temporary).context("make a file in the pool")?;
    file.write_all(&[b'x'; 2048])?;
    file.sync_all()?;
    fs::rename(&temporary, &path)?;
    File::open(pool)?.sync_all()?;
    let took = milliseconds(began);
    fs::remove_file(path)?;
    Ok(took)
}
