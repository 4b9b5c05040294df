//! `make bench-driver`: what the driver of Firecracker costs, into builds/bench-driver.json: a saved state is loaded by the driver and by the
//! bare calls made by hand, in turns, with the same programs and the same files, each from nothing to vCPUs that run.
//!
//! The programs are those that `WRENN_FIRECRACKER_BIN` and `WRENN_JAILER_BIN` name. Where they name none they are the simulated ones, and
//! each figure says so: then the driver's own part is true, and what the VMM takes is not.

mod by_hand;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context as _, Result};
use microvm::{Driver as _, SaveTarget, Start};
use whole_machine::figures::{self, Figure, Judged, Limit};
use whole_machine::jailed::{self, Jails};

use by_hand::{Calls, Parts};

/// Loads of each, one beside the other.
const LOADS: usize = 60;
/// Not measured: what fills caches.
const WARM_UP: usize = 5;
/// The driver's time from spawn to resumed over that of the same calls made by hand; of a real release.
const OVERHEAD_MAX: f64 = 1.1;
/// Of the one VMM that there is at a time.
const SLOT: u32 = 1;

fn main() -> ExitCode {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    match runtime.block_on(run()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("bench-driver: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run() -> Result<bool> {
    let place = figures::place("bench-driver.json");
    figures::forget(&place)?;
    let jails = Jails::new().await?.context("the driver was not measured")?;
    let name = if jails.is_real { "Firecracker" } else { "a simulated Firecracker" };
    let how = format!("by {name} {}", jails.release.version);
    if !jails.is_real {
        println!(
            "WRENN_FIRECRACKER_BIN and WRENN_JAILER_BIN name no programs: the driver is measured over a simulated Firecracker.\n"
        );
    }
    let saved = Saved::make(&jails).await?;
    let (mut driver, mut bare, mut least) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..WARM_UP + LOADS {
        let by_hand =
            |name: &str, calls| by_hand::load(&jails, &saved, &saved.dir.join(format!("{name}-{round}")), SLOT, calls);
        // In turns, so that neither always meets what the other left to do.
        let mut by_driver = None;
        if round % 2 == 0 {
            by_driver = Some(saved.load_by_driver(&jails, round).await?);
        }
        let same = by_hand("same", Calls::AsTheDriver)?;
        let fewest = by_hand("least", Calls::Least)?;
        let by_driver = match by_driver {
            Some(took) => took,
            None => saved.load_by_driver(&jails, round).await?,
        };
        if round >= WARM_UP {
            driver.push(by_driver);
            bare.push(same);
            least.push(fewest.total());
        }
    }
    let part = |of: fn(&Parts) -> f64| bare.iter().map(of).collect::<Vec<_>>();
    let overhead = driver.iter().zip(&bare).map(|(driver, bare)| driver - bare.total()).collect();
    let all = [
        Figure::of("driver_load", "ms", driver.clone()).beside(part(Parts::total)).judged(match jails.is_real {
            true => Limit::Ratio(OVERHEAD_MAX),
            // It is there sooner than a real one, so that the same overhead is a larger part.
            false => Limit::None,
        }),
        Figure::of("driver_overhead", "ms", overhead).judged(Limit::None),
        // What the driver asks for beyond that is the price of limits, counters, a bounded console and a look at the release.
        Figure::of("driver_load_over_least", "ms", driver).beside(least).judged(Limit::None),
        // What the same calls are made of.
        Figure::of("bare_jail_files", "ms", part(|parts| parts.files)).judged(Limit::None),
        Figure::of("bare_jailer", "ms", part(|parts| parts.jailer)).judged(Limit::None),
        Figure::of("bare_socket", "ms", part(|parts| parts.socket)).judged(Limit::None),
        Figure::of("bare_calls", "ms", part(|parts| parts.load)).judged(Limit::None),
    ];
    figures::write(&place, &all, &how)?;
    println!("\nmeasured {how}\nfigures: {}", place.display());
    Ok(all.iter().all(Judged::is_fine))
}

/// A guest that was saved once, and the files with which it is loaded again and again.
pub struct Saved {
    dir: PathBuf,
    pub disk: PathBuf,
    pub memory: PathBuf,
    pub device: PathBuf,
}

impl Saved {
    async fn make(jails: &Jails) -> Result<Self> {
        let dir = jails.dir.path().to_owned();
        let launch = jails.launch(&dir.join("booted"), SLOT)?;
        let disk = launch.disk.clone();
        let vm = jails.driver.start(launch, jails.boot()).await?;
        jails.comes_up(&vm).await;
        let target = SaveTarget { memory: dir.join("saved-memory"), device: dir.join("saved-device") };
        vm.save(&target).await?;
        vm.kill().await?;
        // Loads map it privately and leave it as it is.
        let memory = dir.join("memory");
        jailed::copy(&target.memory, &memory)?;
        jails.hand_over(&[&memory], SLOT)?;
        Ok(Self { dir, disk, memory, device: target.device })
    }

    async fn load_by_driver(&self, jails: &Jails, round: usize) -> Result<f64> {
        let run = self.dir.join(format!("driver-{round}"));
        make_run(&run)?;
        let start = Start::Load { device: self.device.clone(), made_by: Some(jails.driver.stamp()) };
        let launch = jails.launch_of(&self.disk, &self.memory, &run, SLOT);
        let began = Instant::now();
        let vm = jails.driver.start(launch, start).await?;
        vm.continue_vcpus().await?;
        let took = milliseconds(began);
        vm.kill().await?;
        fs::remove_dir_all(&run)?;
        Ok(took)
    }
}

pub fn make_run(run: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    fs::create_dir(run)?;
    Ok(fs::set_permissions(run, fs::Permissions::from_mode(0o711))?)
}

pub fn milliseconds(began: Instant) -> f64 {
    began.elapsed().as_secs_f64() * 1000.0
}
