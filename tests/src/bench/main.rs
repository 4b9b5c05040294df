//! `make bench`: figures of the product into builds/bench.json, each beside the floor that the same run measured, and judged.
//!
//! It starts a platform of its own, as the tests do, and knows of Wrenn what they know; only the floor of a command looks into the
//! platform's directory, for the guest's token. Its file is written anew by each run, and it fails after writing it when a limit is
//! broken. A run that could not measure leaves no file: old figures are not passed off as new ones. `bench host-part` measures the host's part
//! of a create alone, which takes a minute and a half, into builds/bench-host-part.json.

mod bursts;
mod claims;
mod direct;
mod floor;
mod host_part;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use reqwest::Method;
use serde_json::{Value, json};
use tokio::signal::unix::{SignalKind, signal};
use whole_machine::figures::{self, Figure, Judged, Limit};
use whole_machine::objects::Objects;
use whole_machine::platform::{Options, Platform};
use whole_machine::wait;

use direct::Envd;
use floor::{BareVmm, Life};

/// Lives of each, one beside the other: about ten seconds a pair.
const CREATES: usize = 12;
/// Commands of each, one beside the other.
const COMMANDS: usize = 100;
/// Not measured: what connects, fills caches and wakes threads for the first time.
const WARM_UP: usize = 10;
/// What is made ahead or taken down in the background is there, or gone, within moments.
const SETTLE_MAX: Duration = Duration::from_secs(30);
/// The defaults of the API, spelled out because the bare microVM gets the same memory.
const MEMORY_MIB: u32 = 512;
/// Only for the creates that claim one: they take processors and memory from everything else.
const STANDBYS: usize = 2;
/// Room for all that are there at once.
const POOL_MIB: u32 = 12_288;
/// What a pause costs must not depend on how much memory a guest has: these are compared, by so many pauses each.
const SMALL_MIB: u32 = 256;
const LARGE_MIB: u32 = 2048;
const PAUSES: usize = 8;
/// Sandboxes that one fork makes, and how often.
const FORKED: usize = 10;
const FORKS: usize = 3;
/// After this nothing of a fork's guests happens any more but what always does.
const IDLE_AFTER: Duration = Duration::from_secs(3);
/// What a guest has written between two pauses.
const DIRTIED_BYTES: u32 = 16 << 20;

fn main() -> ExitCode {
    let done = match std::env::args().nth(1).as_deref() {
        Some("host-part") => run_host_part(),
        _ => run(),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn options() -> Options {
    let mut options = Options { pool_mib: Some(POOL_MIB), ..Options::default() };
    if let Some(artifacts) = std::env::var_os("WRENN_TEST_ARTIFACTS") {
        options.args = vec!["--artifacts".to_owned(), artifacts.to_string_lossy().into_owned()];
    }
    options
}

fn run_host_part() -> Result<bool> {
    let place = figures::place("bench-host-part.json");
    figures::forget(&place)?;
    let platform = Platform::start_with(&options());
    let runtime = tokio::runtime::Runtime::new().context("make a runtime")?;
    let figures = runtime.block_on(host_part::measure(&platform))?;
    figures::write(&place, &figures, &format!("sandboxes: {}", platform.isolation()))?;
    Ok(figures.iter().all(Judged::is_fine))
}

fn run() -> Result<bool> {
    let place = figures::place("bench.json");
    figures::forget(&place)?;
    let mut options = options();
    let runtime = tokio::runtime::Runtime::new().context("make a runtime")?;
    let (mut figures, mut isolation) = (Vec::new(), String::new());
    for standbys in [0, STANDBYS] {
        options.env.insert("WRENN_STANDBYS".to_owned(), standbys.to_string());
        // Dropping it takes it down, also after an error.
        let platform = Platform::start_with(&options);
        let measured = runtime.block_on(async {
            let mut terminate = signal(SignalKind::terminate())?;
            let all = async {
                if standbys > 0 {
                    return Ok((claims::measure(&platform).await?, platform.isolation()));
                }
                measure(&platform).await
            };
            tokio::select! {
                measured = all => measured,
                _ = tokio::signal::ctrl_c() => anyhow::bail!("interrupted"),
                _ = terminate.recv() => anyhow::bail!("terminated"),
            }
        })?;
        let left = platform.finish();
        ensure!(left.is_empty(), "the end of the platform left {left:?}");
        figures.extend(measured.0);
        isolation = measured.1;
    }
    let how = format!("sandboxes: {isolation}, floors of bare microVMs: {}", floor::name(&isolation)?);
    figures::write(&place, &figures, &how)?;
    println!("\nmeasured {how}\nfigures: {}", place.display());
    Ok(figures.iter().all(Judged::is_fine))
}

/// What is collected on the way.
#[derive(Default)]
struct Samples {
    create: Vec<f64>,
    restored: Vec<f64>,
    bare: Vec<Life>,
    pause: Vec<f64>,
    pause_stopped: Vec<f64>,
    pause_small: Vec<f64>,
    pause_large: Vec<f64>,
    stopped_small: Vec<f64>,
    stopped_large: Vec<f64>,
    resume: Vec<f64>,
    checkpoint_stall: Vec<f64>,
    snapshot: Vec<f64>,
    fork: Vec<f64>,
    /// Of each microVM of a fork, once it has nothing to do.
    idle_pss_mib: Vec<f64>,
    control_plane: Vec<f64>,
    command: Vec<f64>,
    direct: Vec<f64>,
    agent_mib: Vec<f64>,
    control_plane_mib: Vec<f64>,
    envd_mib: Vec<f64>,
    /// One number for each kill: objects more than before the create.
    left: Vec<f64>,
}

/// The figures, and the isolation of the sandboxes that were measured.
async fn measure(platform: &Platform) -> Result<(Vec<Judged>, String)> {
    let mut samples = Samples::default();
    let isolation = platform.isolation();
    let mut bare = BareVmm::start(&platform.dir, &isolation, MEMORY_MIB, CREATES, 0)?;
    for round in 0..CREATES {
        // In turns, so that neither always meets what the other left to do.
        if round % 2 == 0 {
            samples.bare.push(bare.life().await?);
        }
        let said = one_life(platform, &mut samples).await?;
        ensure!(said == isolation, "the host says {isolation}, the sandbox {said}");
        if round % 2 == 1 {
            samples.bare.push(bare.life().await?);
        }
        eprintln!(
            "life {:>2} of {CREATES}: boot {:.0} ms and restore {:.0} ms bare; create {:.0} ms cold and {:.0} ms restored, pause {:.0} ms, resume {:.0} ms",
            round + 1,
            samples.bare[round].boot,
            samples.bare[round].restore,
            samples.create[round],
            samples.restored[round],
            samples.pause[round],
            samples.resume[round]
        );
    }
    bare.finish().await?;
    commands(platform, &mut samples).await?;
    for memory_mib in [SMALL_MIB, LARGE_MIB] {
        pauses(platform, memory_mib, &mut samples).await?;
    }
    forks(platform, &mut samples).await?;
    let mut judged = judge(samples);
    judged.extend(host_part::measure(platform).await?);
    judged.push(bursts::measure(platform, &isolation).await?);
    Ok((judged, isolation))
}

/// Creates a sandbox, pauses and resumes it, kills it, does all but the pause with one that is restored, and counts what is left. Gives
/// the isolation.
async fn one_life(platform: &Platform, samples: &mut Samples) -> Result<String> {
    let before = settled(platform).await;
    // The first of its kind boots.
    let templates = platform.dir.join("pool/templates");
    for place in std::fs::read_dir(&templates).context("look for booted states")?.flatten() {
        std::fs::remove_dir_all(place.path()).context("remove a booted state")?;
    }
    let (id, sandbox) = create(platform, &mut samples.create).await?;
    let steps = sandbox["steps"].as_array().context("the sandbox has no steps")?;
    let decided = steps.iter().find(|step| step["name"] == "control_plane").context("no step control_plane")?;
    samples.control_plane.push(decided["ms"].as_f64().context("a step without its time")?);
    weigh(platform, samples)?;
    turns(platform, &id, samples).await?;
    platform.kill(&id).await;
    wait::until("the booted state is kept", SETTLE_MAX, || {
        let mut places = std::fs::read_dir(&templates).into_iter().flatten().flatten();
        // Its digests are made last, and would be made beside what is measured.
        let is_kept = places.any(|place| place.path().join("gen-00001/digests").exists());
        async move { is_kept.then_some(()) }
    })
    .await;
    let (id, _) = create(platform, &mut samples.restored).await?;
    platform.kill(&id).await;
    samples.left.push(left_over(platform, &before).await);
    Ok(sandbox["isolation"].as_str().unwrap_or("unknown").to_owned())
}

/// The first pause of a microVM that was booted writes little; what is measured is the second one, of a clone, as they all are from then
/// on.
async fn turns(platform: &Platform, id: &str, samples: &mut Samples) -> Result<()> {
    turn(platform, id, "pause", "paused").await?;
    turn(platform, id, "resume", "running").await?;
    let dirtied = format!("head -c {DIRTIED_BYTES} /dev/urandom >/dev/shm/dirtied");
    ensure!(platform.shell(id, &dirtied).await.0 == 0, "the guest has no memory to write to");
    let (took, sandbox) = turn(platform, id, "pause", "paused").await?;
    samples.pause.push(took);
    samples.pause_stopped.push(stopped_ms(&sandbox)?);
    samples.resume.push(turn(platform, id, "resume", "running").await?.0);
    checkpoint(platform, id, &dirtied, samples).await
}

/// The same pauses of a guest with so much memory, of which it uses as little.
async fn pauses(platform: &Platform, memory_mib: u32, samples: &mut Samples) -> Result<()> {
    let before = settled(platform).await;
    let id = platform.create_with(json!({"template": "minimal", "memory_mb": memory_mib, "vcpus": 1})).await;
    for round in 0..=PAUSES {
        let dirtied = format!("head -c {DIRTIED_BYTES} /dev/urandom >/dev/shm/dirtied");
        ensure!(platform.shell(&id, &dirtied).await.0 == 0, "the guest has no memory to write to");
        let (took, sandbox) = turn(platform, &id, "pause", "paused").await?;
        let (acknowledged, stopped) = match memory_mib {
            SMALL_MIB => (&mut samples.pause_small, &mut samples.stopped_small),
            _ => (&mut samples.pause_large, &mut samples.stopped_large),
        };
        // The first one is of a microVM that was booted, and another matter.
        if round > 0 {
            acknowledged.push(took);
            stopped.push(stopped_ms(&sandbox)?);
        }
        turn(platform, &id, "resume", "running").await?;
    }
    platform.kill(&id).await;
    samples.left.push(left_over(platform, &before).await);
    Ok(())
}

/// How long its vCPUs stood still.
fn stopped_ms(of: &Value) -> Result<f64> {
    let steps = of["steps"].as_array().context("no steps")?;
    let stopped = steps.iter().find(|step| step["name"] == "stopped").context("no step stopped")?;
    stopped["ms"].as_f64().context("a step without its time")
}

async fn turn(platform: &Platform, id: &str, verb: &str, wanted: &str) -> Result<(f64, Value)> {
    let began = Instant::now();
    let (status, sandbox) = platform.call(Method::POST, &format!("/v1/sandboxes/{id}/{verb}?wait_sec=60"), None).await;
    ensure!(status == 200 && sandbox["status"] == wanted, "the {verb} answers {status}: {sandbox}");
    Ok((milliseconds(began), sandbox))
}

/// A snapshot of a sandbox that goes on.
async fn checkpoint(platform: &Platform, id: &str, dirtied: &str, samples: &mut Samples) -> Result<()> {
    ensure!(platform.shell(id, dirtied).await.0 == 0, "the guest has no memory to write to");
    let began = Instant::now();
    let body = json!({"sandbox_id": id, "name": "bench"});
    let (status, made) = platform.call(Method::POST, "/v1/snapshots?wait_sec=60", Some(body)).await;
    samples.snapshot.push(milliseconds(began));
    ensure!(status == 201, "the snapshot answers {status}: {made}");
    let (_, timeline) = platform.call(Method::GET, &format!("/v1/sandboxes/{id}/timeline"), None).await;
    let entries = timeline.as_array().context("no timeline")?;
    let taken = entries.iter().find(|entry| entry["kind"] == "snapshot").context("no snapshot in the timeline")?;
    samples.checkpoint_stall.push(stopped_ms(taken)?);
    let (status, _) = platform.call(Method::DELETE, "/v1/snapshots/bench", None).await;
    ensure!(status == 204, "the end of the snapshot answers {status}");
    Ok(())
}

/// Many of one, at once.
async fn forks(platform: &Platform, samples: &mut Samples) -> Result<()> {
    let body = json!({"template": "minimal", "memory_mb": 256, "vcpus": 1});
    for _ in 0..FORKS {
        let before = settled(platform).await;
        let id = platform.create_with(body.clone()).await;
        ensure!(platform.shell(&id, "true").await.0 == 0, "the source does not work");
        let began = Instant::now();
        let path = format!("/v1/sandboxes/{id}/fork?wait_sec=120");
        let (status, answer) = platform.call(Method::POST, &path, Some(json!({"count": FORKED}))).await;
        samples.fork.push(milliseconds(began));
        ensure!(status == 201, "the fork answers {status}: {answer}");
        tokio::time::sleep(IDLE_AFTER).await;
        let children = answer["sandboxes"].as_array().context("a fork without sandboxes")?;
        for child in children.iter().filter_map(|child| child["id"].as_str()) {
            samples.idle_pss_mib.push(pss_mib(platform, child)?);
        }
        for child in children.iter().filter_map(|child| child["id"].as_str()).chain([id.as_str()]) {
            platform.kill(child).await;
        }
        samples.left.push(left_over(platform, &before).await);
    }
    Ok(())
}

/// The part of the machine's memory that a sandbox's microVM takes, what it shares with others counted in part.
fn pss_mib(platform: &Platform, id: &str) -> Result<f64> {
    let state = std::fs::read(platform.dir.join("pool/sandboxes").join(id).join("state.json"))?;
    let state: Value = serde_json::from_slice(&state)?;
    let pid = state["record"]["phase"]["run"]["process"]["pid"].as_i64().context("a sandbox without a process")?;
    let rollup = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).context("read a microVM's size")?;
    let line = rollup.lines().find_map(|line| line.strip_prefix("Pss:")).context("a process without Pss")?;
    let kib: f64 = line.trim().trim_end_matches(" kB").parse().with_context(|| format!("read {line:?}"))?;
    Ok(kib / 1024.0)
}

async fn create(platform: &Platform, times: &mut Vec<f64>) -> Result<(String, Value)> {
    let body = json!({"template": "minimal", "memory_mb": MEMORY_MIB, "vcpus": 1});
    let began = Instant::now();
    let (status, sandbox) = platform.call(Method::POST, "/v1/sandboxes?wait_sec=120", Some(body)).await;
    let took = milliseconds(began);
    ensure!(status == 201 && sandbox["status"] == "running", "the create answers {status}: {sandbox}");
    times.push(took);
    Ok((sandbox["id"].as_str().context("a sandbox without id")?.to_owned(), sandbox))
}

/// The same command by the public API and by envd itself, in turns.
async fn commands(platform: &Platform, samples: &mut Samples) -> Result<()> {
    let before = settled(platform).await;
    // Not one of those that are compared with bare boots, because none boots beside it.
    let (id, _) = create(platform, &mut Vec::new()).await?;
    let mut envd = Envd::connect(platform, &id).await?;
    for round in 0..WARM_UP + COMMANDS {
        let began = Instant::now();
        let body = json!({"cmd": direct::COMMAND});
        let (status, outcome) = platform.call(Method::POST, &format!("/v1/sandboxes/{id}/exec"), Some(body)).await;
        let by_api = milliseconds(began);
        ensure!(status == 200 && outcome["exit_code"] == 0, "the command answers {status}: {outcome}");
        let began = Instant::now();
        envd.run().await?;
        let by_envd = milliseconds(began);
        if round >= WARM_UP {
            samples.command.push(by_api);
            samples.direct.push(by_envd);
        }
    }
    weigh(platform, samples)?;
    let script = "for p in /proc/[0-9]*; do [ \"$(cat $p/comm)\" = envd ] && sed -n 's/^VmRSS:[^0-9]*\\([0-9]*\\) kB/\\1/p' $p/status; done; true";
    let (_, said) = platform.shell(&id, script).await;
    let kib: f64 = said.trim().parse().with_context(|| format!("the guest says of envd's memory {said:?}"))?;
    samples.envd_mib.push(kib / 1024.0);
    drop(envd);
    platform.kill(&id).await;
    samples.left.push(left_over(platform, &before).await);
    Ok(())
}

fn judge(samples: Samples) -> Vec<Judged> {
    let floor = |part: fn(&Life) -> f64| samples.bare.iter().map(part).collect::<Vec<_>>();
    let overhead = samples.command.iter().zip(&samples.direct).map(|(by_api, by_envd)| by_api - by_envd).collect();
    vec![
        Figure::of("create_cold", "ms", samples.create).beside(floor(|life| life.boot)).judged(Limit::Ratio(1.15)),
        // Beside a bare restore with the same words to the guest: what the guest itself takes for them is no work of the platform.
        Figure::of("create_restore", "ms", samples.restored)
            .beside(floor(|life| life.restore_first))
            .judged(Limit::Ratio(1.25)),
        Figure::of("resume", "ms", samples.resume).beside(floor(|life| life.restore_again)).judged(Limit::Ratio(1.25)),
        // How much of that is the guest's: beside the first answer of one that is told nothing.
        Figure::of("bare_restore_and_init", "ms", floor(|life| life.restore_again))
            .beside(floor(|life| life.restore))
            .judged(Limit::None),
        Figure::of("snapshot", "ms", samples.snapshot).judged(Limit::None),
        Figure::of("checkpoint_stall", "ms", samples.checkpoint_stall).judged(Limit::P50(40.0)),
        Figure::of("fork_10", "ms", samples.fork)
            .beside(floor(|life| life.restore_again * FORKED as f64))
            .judged(Limit::Ratio(1.5)),
        Figure::of("idle_pss_mib", "MiB", samples.idle_pss_mib).judged(Limit::P50(30.0)),
        Figure::of("pause_acknowledged", "ms", samples.pause)
            .beside(floor(|life| life.pause))
            .judged(Limit::P50(150.0)),
        Figure::of("pause_stopped", "ms", samples.pause_stopped)
            .beside(floor(|life| life.pause_stopped))
            .judged(Limit::P50(30.0)),
        Figure::of("pause_acknowledged_2_gib", "ms", samples.pause_large)
            .beside(samples.pause_small)
            .judged(Limit::Ratio(1.5)),
        Figure::of("pause_stopped_2_gib", "ms", samples.stopped_large)
            .beside(samples.stopped_small)
            .judged(Limit::Ratio(1.5)),
        Figure::of("create_control_plane", "ms", samples.control_plane).judged(Limit::P50(10.0)),
        Figure::of("exec", "ms", samples.command).beside(samples.direct).judged(Limit::None),
        Figure::of("exec_overhead", "ms", overhead).judged(Limit::P50(5.0)),
        Figure::of("agent_rss_mib", "MiB", samples.agent_mib).judged(Limit::Max(60.0)),
        Figure::of("control_plane_rss_mib", "MiB", samples.control_plane_mib).judged(Limit::Max(120.0)),
        Figure::of("envd_rss_mib", "MiB", samples.envd_mib).judged(Limit::Max(12.0)),
        Figure::of("left_after_kill", "objects", samples.left).judged(Limit::Max(0.0)),
    ]
}

/// What the programs have in memory just now.
fn weigh(platform: &Platform, samples: &mut Samples) -> Result<()> {
    for (name, sizes) in [("wrenn-agent", &mut samples.agent_mib), ("wrenn-cp", &mut samples.control_plane_mib)] {
        let pid = platform.pid_of(name).with_context(|| format!("{name} does not run"))?;
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).context("read a program's size")?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("a program without VmRSS")?;
        let kib: f64 = line.trim().trim_end_matches(" kB").parse().with_context(|| format!("read {line:?}"))?;
        sizes.push(kib / 1024.0);
    }
    Ok(())
}

/// The count once it is the same twice in a row: slots are made ahead in the background.
async fn settled(platform: &Platform) -> Objects {
    let mut last = None;
    wait::until("the same count twice", SETTLE_MAX, || {
        let now = platform.objects();
        let is_same = last.replace(now.clone()) == Some(now.clone());
        async move {
            tokio::time::sleep(Duration::from_millis(200)).await;
            is_same.then_some(now)
        }
    })
    .await
}

/// How many objects there are more than before, once no more go away.
async fn left_over(platform: &Platform, before: &Objects) -> f64 {
    let began = Instant::now();
    loop {
        let grown: usize =
            platform.objects().iter().map(|(kind, n)| n.saturating_sub(before.get(kind).copied().unwrap_or(0))).sum();
        if grown == 0 || began.elapsed() > SETTLE_MAX {
            return grown as f64;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

fn milliseconds(began: Instant) -> f64 {
    began.elapsed().as_secs_f64() * 1000.0
}
