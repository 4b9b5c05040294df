//! `xtask bare-vmm`: the floor of the benchmarks. One QEMU microVM driven by hand, jailed, with nothing of Wrenn around it.
//!
//! Boots the guest in a network namespace, waits for the first HTTP answer of whatever its rootfs starts on port 49983, pauses it (device
//! state, and the pages it owns onto a reflink of its parent), restores it, and tells how long each took; once more, with the words by which a
//! host tells a guest who it is (`/init`) in place of the first question. A figure of the product is read
//! as a ratio to these of the same run, so this program shares no code with the product's driver, and it refuses to end well when its
//! own figures are out of bounds: a slow floor must not flatter. It is an experiment, not a pattern for product code.

mod ground;
mod machine;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use serde::Serialize;

use ground::{Ground, Network};
use machine::{Accelerator, Beginning, Machine, Setting};

/// What this class of machine does by software emulation is 0.8 to 2.7 s and 0.08 to 0.18 s; outside of these something is wrong.
const BOOT_P50_MS: std::ops::RangeInclusive<f64> = 500.0..=4000.0;
const RESTORE_P50_MS: std::ops::RangeInclusive<f64> = 50.0..=500.0;
/// With KVM a kernel of this kind boots in some hundred milliseconds. Nobody has measured this program there.
const KVM_BOOT_P50_MS: std::ops::RangeInclusive<f64> = 30.0..=1500.0;
const KVM_RESTORE_P50_MS: std::ops::RangeInclusive<f64> = 3.0..=250.0;
/// A cold boot on an overloaded machine took 15 s.
const ANSWER_LIMIT: Duration = Duration::from_secs(120);
/// After the first answer the guest still starts things; a pause right then would count them as dirtied.
const SETTLE: Duration = Duration::from_millis(300);
/// Restores of each boot: each is a generation upon the last one.
const GENERATIONS: usize = 2;

#[derive(clap::Args)]
pub struct Arguments {
    /// Uncompressed kernel (ELF).
    #[arg(long)]
    kernel: PathBuf,
    /// Initramfs, for a kernel whose drivers are modules.
    #[arg(long)]
    initrd: Option<PathBuf>,
    /// Raw ext4 image; it is copied, never written.
    #[arg(long)]
    rootfs: PathBuf,
    /// Scratch directory. On a file system without reflinks an XFS of its own is made in it and removed at the end.
    #[arg(long)]
    dir: PathBuf,
    /// Memory of the guest in MiB.
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u32).range(64..=65536))]
    mem: u32,
    /// Boots; each is followed by four restores.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: u32,
    /// Restores at the same time, at the end of each boot's life.
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u8).range(0..=100))]
    burst: u8,
    /// Program that the guest starts first, when it is not the default of its initramfs.
    #[arg(long)]
    init: Option<String>,
    #[arg(long, default_value = "qemu-system-x86_64")]
    qemu: PathBuf,
    /// What the product uses on this machine: a floor of another kind is no floor.
    #[arg(long, value_enum, default_value_t = Accelerator::Tcg)]
    accel: Accelerator,
    /// One line of JSON on standard output instead of a table.
    #[arg(long)]
    json: bool,
    /// Begin each run when a line comes on standard input, and tell its times by a line of JSON on standard output (lists of milliseconds by
    /// name): for whoever measures something else in between. The end of the input ends the runs.
    #[arg(long)]
    on_request: bool,
}

/// All in milliseconds.
#[derive(Serialize)]
struct Figure {
    n: usize,
    p50: f64,
    p95: f64,
    p99: f64,
    max: f64,
}

impl Figure {
    fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let rounded = |value: f64| (value * 100.0).round() / 100.0;
        // Nearest rank: the smallest value that so many in a hundred do not exceed.
        let rank = |percent: usize| rounded(values[(values.len() * percent).div_ceil(100).max(1) - 1]);
        Self { n: values.len(), p50: rank(50), p95: rank(95), p99: rank(99), max: rank(100) }
    }
}

pub fn run(arguments: &Arguments) -> Result<()> {
    // SAFETY: geteuid has no effects.
    ensure!(unsafe { libc::geteuid() } == 0, "bare-vmm makes namespaces and mounts: run it as root");
    for file in [Some(&arguments.kernel), arguments.initrd.as_ref(), Some(&arguments.rootfs)].into_iter().flatten() {
        ensure!(file.is_file(), "{} is no file", file.display());
    }
    let figures = measure(arguments)?;
    if arguments.json {
        println!("{}", serde_json::to_string(&figures)?);
    } else {
        println!("{:<15} {:>4} {:>9} {:>9} {:>9}   (ms)", "", "n", "p50", "p95", "max");
        for (name, figure) in &figures {
            println!("{name:<15} {:>4} {:>9.2} {:>9.2} {:>9.2}", figure.n, figure.p50, figure.p95, figure.max);
        }
    }
    let (boot, restore) = match arguments.accel {
        Accelerator::Tcg => (BOOT_P50_MS, RESTORE_P50_MS),
        Accelerator::Kvm => (KVM_BOOT_P50_MS, KVM_RESTORE_P50_MS),
    };
    for (name, bounds) in [("boot", boot), ("restore", restore)] {
        let p50 = figures[name].p50;
        if !bounds.contains(&p50) {
            bail!(
                "the floor's own {name} took {p50} ms, outside {} to {} ms: no ratio to it means anything",
                bounds.start(),
                bounds.end()
            );
        }
    }
    Ok(())
}

fn measure(arguments: &Arguments) -> Result<BTreeMap<&'static str, Figure>> {
    ground::end_on_signals();
    let _alone = ground::only_one()?;
    let ground = Ground::make(&arguments.dir, &arguments.rootfs, arguments.mem)?;
    // The first is that of all that is done one after the other.
    let networks = (0..arguments.burst.max(1)).map(Network::make).collect::<Result<Vec<_>>>()?;
    let setting = Setting {
        qemu: arguments.qemu.clone(),
        kernel: arguments.kernel.clone(),
        initrd: arguments.initrd.clone(),
        init: arguments.init.clone(),
        memory_mib: arguments.mem,
        tsc_khz: machine::tsc_khz(),
        accelerator: arguments.accel,
    };
    let mut values: BTreeMap<&'static str, Vec<f64>> = BTreeMap::new();
    for run in 0..arguments.runs {
        if arguments.on_request && std::io::stdin().read_line(&mut String::new())? == 0 {
            break;
        }
        let place = ground.place().join(run.to_string());
        std::fs::create_dir(&place)?;
        let mut own: BTreeMap<&'static str, Vec<f64>> = BTreeMap::new();
        one_life(&setting, &networks[0], &ground, &place, &mut |name, took: Duration| {
            own.entry(name).or_default().push(took.as_secs_f64() * 1000.0);
        })?;
        if arguments.burst > 0 {
            for took in burst(&setting, &networks, &place)? {
                own.entry("restore_burst").or_default().push(took.as_secs_f64() * 1000.0);
            }
        }
        std::fs::remove_dir_all(&place)?;
        if arguments.on_request {
            println!("{}", serde_json::to_string(&own)?);
        }
        for (name, mut times) in own {
            values.entry(name).or_default().append(&mut times);
        }
    }
    ensure!(!values.is_empty(), "no run was asked for");
    Ok(values.into_iter().map(|(name, values)| (name, Figure::of(values))).collect())
}

/// A boot, and generations upon it: restored, answered, stopped and continued, paused.
fn one_life(
    setting: &Setting,
    network: &Network,
    ground: &Ground,
    place: &Path,
    note: &mut dyn FnMut(&'static str, Duration),
) -> Result<()> {
    let file = |what: &str, generation: usize| place.join(format!("{what}-{generation}"));
    drop(machine::clone(ground.base(), &file("disk", 0))?);
    machine::owned(&file("memory", 0))?.set_len(u64::from(setting.memory_mib) << 20)?;
    let mut vm =
        Machine::start(setting, network, &file("disk", 0), &file("memory", 0), &file("device", 0), Beginning::Boot)?;
    note("boot", vm.answered(ANSWER_LIMIT)?);
    std::thread::sleep(SETTLE);
    vm.save_device()?;
    vm.end()?;
    // Synced before it is cloned, or the first clone would wait for that.
    machine::sync(&file("memory", 0))?;
    machine::sync(&file("disk", 0))?;
    for generation in 1..=GENERATIONS {
        let parent = generation - 1;
        drop(machine::clone(&file("disk", parent), &file("disk", generation))?);
        let mut vm = Machine::start(
            setting,
            network,
            &file("disk", generation),
            &file("memory", parent),
            &file("device", generation),
            Beginning::Load { device: file("device", parent) },
        )?;
        note("restore", vm.answered(ANSWER_LIMIT)?);
        std::thread::sleep(SETTLE);
        let began = Instant::now();
        vm.ask("stop", serde_json::json!({}))?;
        vm.ask("cont", serde_json::json!({}))?;
        note("stop_cont", began.elapsed());
        let paused = vm.pause(&file("memory", generation))?;
        note("pause_stopped", paused.stopped);
        note("pause_fsync", paused.synced);
        vm.end()?;
    }
    introductions(setting, network, place, note)
}

/// Restores to the moment at which the guest is somebody: the first of a guest that was nobody before, and one of a guest that was.
fn introductions(
    setting: &Setting,
    network: &Network,
    place: &Path,
    note: &mut dyn FnMut(&'static str, Duration),
) -> Result<()> {
    let file = |what: &str, name: &str| place.join(format!("{what}-{name}"));
    for (run, (name, parent, child)) in
        [("restore_first", "0", "first"), ("restore_again", "first", "again")].iter().enumerate()
    {
        drop(machine::clone(&file("disk", parent), &file("disk", child))?);
        let mut vm = Machine::start(
            setting,
            network,
            &file("disk", child),
            &file("memory", parent),
            &file("device", child),
            Beginning::Load { device: file("device", parent) },
        )?;
        note(name, vm.introduced(ANSWER_LIMIT, 1 + u32::try_from(run)?)?);
        std::thread::sleep(SETTLE);
        vm.pause(&file("memory", child))?;
        vm.end()?;
    }
    Ok(())
}

/// One restore for each network, all begun at the same time: to the moment at which each guest is somebody.
fn burst(setting: &Setting, networks: &[Network], place: &Path) -> Result<Vec<Duration>> {
    let file = |what: &str, name: &str| place.join(format!("{what}-{name}"));
    let restored = |number: usize, network: &Network| {
        let name = format!("burst{number}");
        let began = Instant::now();
        drop(machine::clone(&file("disk", "0"), &file("disk", &name))?);
        let mut vm = Machine::start(
            setting,
            network,
            &file("disk", &name),
            &file("memory", "0"),
            &file("device", &name),
            Beginning::Load { device: file("device", "0") },
        )?;
        vm.introduced(ANSWER_LIMIT, 1)?;
        // Ended when all have come: none gets the processors of one that is done.
        Ok((vm, began.elapsed()))
    };
    let ended: Vec<Result<(Machine, Duration)>> = std::thread::scope(|scope| {
        let all: Vec<_> =
            networks.iter().enumerate().map(|(n, network)| scope.spawn(move || restored(n, network))).collect();
        all.into_iter().map(|one| one.join().expect("a restore does not panic")).collect()
    });
    let all = ended.into_iter().collect::<Result<Vec<_>>>()?;
    Ok(all.into_iter().map(|(_, took)| took).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_the_nearest_rank() {
        let figure = Figure::of((1..=20).rev().map(f64::from).collect());
        assert_eq!((figure.n, figure.p50, figure.p95, figure.p99, figure.max), (20, 10.0, 19.0, 20.0, 20.0));
        let one = Figure::of(vec![7.126]);
        assert_eq!((one.p50, one.p95, one.max), (7.13, 7.13, 7.13));
    }
}
