//! `make bench-cp`: figures of the control plane alone into builds/bench-cp.json, each beside the floor of the same run, and judged.
//!
//! It runs `wrenn-cp` on a PostgreSQL of its own (without fsync, as in the tests, so that what is measured is work and not a disk), with
//! hosts that are rows: their address takes connections and answers nothing. So a create ends where placement ends, with the sandbox, its
//! reservation and its operation written down (202), and no host does anything. The floor is the same number of clients asking `/health`,
//! which is one way through the server and one query.
//!
//! `bench-cp heartbeats` measures that part alone, into a file of its own.

mod control_plane;
mod heartbeats;
mod paced;
mod pages;
mod streams;

use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use control_plane::{ControlPlane, silent};
use whole_machine::figures::{self, Figure, Judged, Limit};

/// A fleet of one rack, the same for a team with a quota, whose creates go one after the other, and a fleet of a large site.
const FLEETS: [Fleet; 3] = [
    Fleet { hosts: 10, quota: "", name: "creates_per_s", latency: "create", per_s_min: 300.0, is_paced: true },
    Fleet {
        hosts: 10,
        quota: "1000000",
        name: "creates_per_s_quota",
        latency: "create_quota",
        per_s_min: 100.0,
        is_paced: false,
    },
    Fleet {
        hosts: 1000,
        quota: "",
        name: "creates_per_s_1000_hosts",
        latency: "create_1000_hosts",
        per_s_min: 100.0,
        is_paced: false,
    },
];
const CLIENTS: usize = 16;
/// Of each client, in each round.
const CREATES: usize = 25;
const ROUNDS: usize = 5;
struct Fleet {
    hosts: usize,
    /// How many sandboxes a team may have; empty: no limit.
    quota: &'static str,
    name: &'static str,
    latency: &'static str,
    /// On a machine of two slow cores that are PostgreSQL's and the clients', too.
    per_s_min: f64,
    /// Whether it is measured, too, how long one takes when there is half as much to do.
    is_paced: bool,
}

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("bench-cp: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<bool> {
    let is_part = std::env::args().nth(1).as_deref() == Some("heartbeats");
    let place = figures::place(if is_part { "bench-cp-heartbeats.json" } else { "bench-cp.json" });
    figures::forget(&place)?;
    let runtime = tokio::runtime::Runtime::new().context("make a runtime")?;
    let mut all = Vec::new();
    if !is_part {
        for fleet in &FLEETS {
            all.extend(runtime.block_on(measure(fleet))?);
        }
        all.push(runtime.block_on(pages::measure())?);
        all.push(runtime.block_on(streams::measure())?);
    }
    all.extend(runtime.block_on(heartbeats::measure())?);
    figures::write(&place, &all, &format!("{CLIENTS} clients, PostgreSQL without fsync"))?;
    println!("\nfigures: {}", place.display());
    Ok(all.iter().all(Judged::is_fine))
}

async fn measure(fleet: &Fleet) -> Result<Vec<Judged>> {
    let control_plane = ControlPlane::start(fleet.quota).await?;
    let (address, held) = silent().await?;
    control_plane.hosts(fleet.hosts, &address)?;
    let (http, base) = (&control_plane.http, &control_plane.base);
    let (mut rates, mut floor, mut latencies) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..=ROUNDS {
        let began = Instant::now();
        let took = side_by_side(|| control_plane.create()).await?;
        let rate = (CLIENTS * CREATES) as f64 / began.elapsed().as_secs_f64();
        let began = Instant::now();
        side_by_side(|| async {
            let answer = http.get(format!("{base}/health")).send().await?;
            ensure!(answer.status() == 200, "health is {}", answer.status());
            Ok(())
        })
        .await?;
        // The first round connects, plans and fills caches.
        if round > 0 {
            rates.push(rate);
            floor.push((CLIENTS * CREATES) as f64 / began.elapsed().as_secs_f64());
            latencies.extend(took);
        }
    }
    let mut figures = Vec::new();
    if fleet.is_paced {
        figures.push(paced::measure(&control_plane, median(&rates) / 2.0).await?);
    }
    held.abort();
    figures.push(Figure::of(fleet.name, "1/s", rates).beside(floor).judged(Limit::P50AtLeast(fleet.per_s_min)));
    figures.push(Figure::of(fleet.latency, "ms", latencies).judged(Limit::None));
    Ok(figures)
}

/// Milliseconds of each call of all clients.
async fn side_by_side<F: Future<Output = Result<()>>>(call: impl Fn() -> F) -> Result<Vec<f64>> {
    let client = || async {
        let mut took = Vec::with_capacity(CREATES);
        for _ in 0..CREATES {
            let began = Instant::now();
            call().await?;
            took.push(began.elapsed().as_secs_f64() * 1000.0);
        }
        Ok(took)
    };
    let all: Vec<Result<Vec<f64>>> = futures::future::join_all((0..CLIENTS).map(|_| client())).await;
    all.into_iter().collect::<Result<Vec<_>>>().map(|all| all.concat())
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or_default()
}
