//! `make bench-envd`: figures of envd into builds/bench-envd.json, each beside the floor of the same run, and judged.
//!
//! It runs the static program that goes into guests, by its own wire, on this machine's kernel, and at last a process in a guest. What the
//! microVM itself costs is measured by `make bench`. Like that one it writes its file anew, and fails after writing it when a limit is broken.

mod envd;
mod floor;
mod inside;

use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use whole_machine::figures::{self, Figure, Judged, Limit};

use envd::{Codec, Envd};

/// The cheapest process there is.
const PROGRAM: &str = "/bin/true";
const PROCESSES: usize = 300;
/// Not measured: what connects, fills caches and wakes threads for the first time.
const WARM_UP: usize = 20;
const STARTS: usize = 20;
/// Of output and of files; each is one beside the other.
const ROUNDS: usize = 5;
/// Half a second of what is asked for, several times over the buffers on the way.
const OUTPUT_BYTES: u64 = 256 << 20;
const FILE_BYTES: u64 = 512 << 20;
const STREAMS: usize = 1000;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let done = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["floor", runs] => runs.parse().context("floor RUNS").and_then(inside::print_floor).map(|()| true),
        _ => run(),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("bench-envd: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<bool> {
    let place = figures::place("bench-envd.json");
    figures::forget(&place)?;
    let program = figures::root().join("builds/envd");
    let size = std::fs::metadata(&program)
        .with_context(|| format!("look at {}: `make build-envd` makes it", program.display()))?
        .len();
    let mut all = vec![Figure::of("binary_size", "MB", vec![size as f64 / 1e6]).judged(Limit::Max(8.0))];
    all.extend(starts(&program)?);
    all.extend(processes(&program)?);
    all.extend(streams(&program)?);
    // On a disk, not in memory; the same for both.
    let dir = tempfile::tempdir_in("/var/tmp").context("make a scratch directory")?;
    all.extend(output(&program, dir.path())?);
    all.extend(files(&program, dir.path())?);
    all.extend(inside::processes()?);
    figures::write(&place, &all, "outside a sandbox but for process_in_guest")?;
    println!("\nfigures: {}", place.display());
    Ok(all.iter().all(Judged::is_fine))
}

/// From the start of the program to its first answer.
fn starts(program: &Path) -> Result<Vec<Judged>> {
    let mut ready = Vec::new();
    for _ in 0..STARTS {
        let began = Instant::now();
        let envd = Envd::start(program)?;
        ready.push(milliseconds(began));
        drop(envd);
    }
    Ok(vec![Figure::of("start_to_ready", "ms", ready).judged(Limit::P50(30.0))])
}

/// Start of a process to its end event, in turns with the bare process.
fn processes(program: &Path) -> Result<Vec<Judged>> {
    let envd = Envd::start(program)?;
    let mut client = envd.connect()?;
    let (mut by_envd, mut bare) = (Vec::new(), Vec::new());
    let mut resident = Vec::new();
    for round in 0..WARM_UP + PROCESSES {
        let began = Instant::now();
        let mut took = 0.0;
        client.run(Codec::Json, &[PROGRAM], || took = milliseconds(began))?;
        let began = Instant::now();
        floor::run(PROGRAM)?;
        if round >= WARM_UP {
            by_envd.push(took);
            bare.push(milliseconds(began));
        }
        if round == WARM_UP {
            resident.push(envd.resident_mib()?);
        }
    }
    let over = by_envd.iter().zip(&bare).map(|(by_envd, bare)| by_envd - bare).collect();
    Ok(vec![
        Figure::of("process", "ms", by_envd).beside(bare).judged(Limit::None),
        Figure::of("process_over_bare", "ms", over).judged(Limit::P50(1.0)),
        Figure::of("rss_idle", "MiB", resident).judged(Limit::Max(12.0)),
    ])
}

/// Streams that wait for a process that says nothing.
fn streams(program: &Path) -> Result<Vec<Judged>> {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).context("ask for the limit of descriptors")?;
    setrlimit(Resource::RLIMIT_NOFILE, most, most).context("raise the limit of descriptors")?;
    let envd = Envd::start(program)?;
    let mut first = envd.connect()?;
    let mut message = Vec::new();
    let mut started =
        first.call("Start", Codec::Json, br#"{"process":{"cmd":"sleep","args":["600"]},"stdin":false}"#)?;
    started.message(&mut message)?;
    let started: serde_json::Value = serde_json::from_slice(&message).context("read the start event")?;
    let pid = started["event"]["start"]["pid"].as_u64().context("the start event comes first")?;
    let asked = format!("{{\"process\":{{\"pid\":{pid}}}}}");
    let before = envd.resident_mib()?;
    let mut waiting = Vec::new();
    for _ in 0..STREAMS {
        let mut client = envd.connect()?;
        // Its first event has come, so that the stream is there.
        client.call("Connect", Codec::Json, asked.as_bytes())?.message(&mut message)?;
        waiting.push(client);
    }
    let grown = envd.resident_mib()? - before;
    Ok(vec![Figure::of("idle_streams_1000", "MiB", vec![grown]).judged(Limit::Max(8.0))])
}

fn output(program: &Path, dir: &Path) -> Result<Vec<Judged>> {
    let envd = Envd::start(program)?;
    let file = dir.join("output");
    floor::send(&mut std::fs::File::create(&file)?, OUTPUT_BYTES)?;
    let command = ["cat", file.to_str().context("a path that is no text")?];
    let (mut json, mut binary, mut cat) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        for (codec, rates) in [(Codec::Json, &mut json), (Codec::Proto, &mut binary)] {
            let mut client = envd.connect()?;
            rates.push(rate(OUTPUT_BYTES, || client.run(codec, &command, || ()))?);
        }
        cat.push(rate(OUTPUT_BYTES, || floor::cat(&file))?);
    }
    Ok(vec![
        Figure::of("stdout_json", "MB/s", json).beside(cat.clone()).judged(Limit::P50AtLeast(150.0)),
        Figure::of("stdout_binary", "MB/s", binary).beside(cat).judged(Limit::RatioAtLeast(0.3)),
    ])
}

fn files(program: &Path, dir: &Path) -> Result<Vec<Judged>> {
    let envd = Envd::start(program)?;
    let mut client = envd.connect()?;
    let (by_envd, bare) = (dir.join("by-envd"), dir.join("bare"));
    let target = format!("/files?path={}", by_envd.to_str().context("a path that is no text")?);
    let kind = "content-type: application/octet-stream\r\n";
    let (mut up, mut plain_up, mut down, mut plain_down) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        let mut by_envd_upload = || -> Result<()> {
            up.push(rate(FILE_BYTES, || {
                let send = |stream: &mut _| floor::send(stream, FILE_BYTES);
                let answer = client.ask_with("POST", &target, kind, FILE_BYTES, send)?;
                ensure!(answer.status == 200, "envd answers an upload with {}", answer.status);
                floor::drain(answer)?;
                Ok(std::fs::metadata(&by_envd)?.len())
            })?);
            down.push(rate(FILE_BYTES, || {
                let answer = client.ask("GET", &target, "", &[])?;
                ensure!(answer.status == 200, "envd answers a download with {}", answer.status);
                floor::drain(answer)
            })?);
            clear(&by_envd)
        };
        let mut bare_upload = || -> Result<()> {
            plain_up.push(rate(FILE_BYTES, || floor::upload(&bare, FILE_BYTES).map(|()| FILE_BYTES))?);
            plain_down.push(rate(FILE_BYTES, || floor::download(&bare))?);
            clear(&bare)
        };
        // In turns, so that neither always meets what the other left to do.
        if round % 2 == 0 {
            by_envd_upload()?;
            bare_upload()?;
        } else {
            bare_upload()?;
            by_envd_upload()?;
        }
    }
    Ok(vec![
        Figure::of("upload", "MB/s", up).beside(plain_up).judged(Limit::RatioAtLeast(0.6)),
        Figure::of("download", "MB/s", down).beside(plain_down).judged(Limit::RatioAtLeast(0.6)),
    ])
}

/// So that the next one finds the disk idle.
fn clear(file: &Path) -> Result<()> {
    std::fs::remove_file(file).with_context(|| format!("remove {}", file.display()))?;
    nix::unistd::sync();
    Ok(())
}

/// Megabytes a second of what moves exactly so many bytes.
fn rate(bytes: u64, work: impl FnOnce() -> Result<u64>) -> Result<f64> {
    let began = Instant::now();
    let moved = work()?;
    let took = began.elapsed().as_secs_f64();
    ensure!(moved == bytes, "{moved} bytes of {bytes} came");
    Ok(bytes as f64 / 1e6 / took)
}

fn milliseconds(began: Instant) -> f64 {
    began.elapsed().as_secs_f64() * 1000.0
}
