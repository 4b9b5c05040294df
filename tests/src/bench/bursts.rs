//! Creates that all come at once, beside as many bare restores begun at once.

use std::time::Instant;

use anyhow::{Context as _, Result};
use futures::future::join_all;
use reqwest::Method;
use serde_json::json;
use whole_machine::figures::{Figure, Judged, Limit};
use whole_machine::platform::Platform;

use super::floor::BareVmm;
use super::milliseconds;

const AT_ONCE: usize = 30;
const BURSTS: usize = 2;
/// What a host of this size has room for.
const MEMORY_MIB: u32 = 256;
const DISK_MIB: u32 = 1024;

pub async fn measure(platform: &Platform, isolation: &str) -> Result<Judged> {
    let body = json!({"template": "minimal", "memory_mb": MEMORY_MIB, "disk_size_mb": DISK_MIB, "vcpus": 1});
    // The first of its kind boots.
    let id = platform.create_with(body.clone()).await;
    platform.kill(&id).await;
    let mut bare = BareVmm::start(&platform.dir, isolation, MEMORY_MIB, BURSTS, AT_ONCE)?;
    let (mut times, mut floor) = (Vec::new(), Vec::new());
    for _ in 0..BURSTS {
        floor.append(&mut bare.life().await?.restore_burst);
        let one = async || {
            let began = Instant::now();
            let (status, sandbox) = platform.call(Method::POST, "/v1/sandboxes?wait_sec=120", Some(body.clone())).await;
            (milliseconds(began), status, sandbox)
        };
        let mut made = Vec::new();
        for (took, status, sandbox) in join_all((0..AT_ONCE).map(|_| one())).await {
            if status == 201 && sandbox["status"] == "running" {
                times.push(took);
            } else {
                eprintln!("a create in a burst answers {status}: {sandbox}");
            }
            made.extend(sandbox["id"].as_str().map(str::to_owned));
        }
        for id in &made {
            platform.kill(id).await;
        }
    }
    bare.finish().await.context("the floor of a burst")?;
    let figure = Figure::of("burst_create_30", "ms", times).beside(floor).of_tries(BURSTS * AT_ONCE).by_p99();
    Ok(figure.judged(Limit::Ratio(1.5)))
}
