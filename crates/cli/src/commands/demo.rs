//! `wrenn demo`: proves on this machine that all of it works. A platform of its own in a fresh directory, a sandbox, code, files, wrong
//! input, the end of everything; and a count of what is left, made by listing the kernel's objects.

use std::path::{Path, PathBuf};
use std::process::{ExitCode, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, AsyncRead, AsyncReadExt as _, BufReader};
use tokio::process::Command;

use super::down;
use crate::credentials::Options;
use crate::failure::{Doing as _, Failure};
use crate::output::{Format, print_line};
use crate::platform::objects::{self, Objects};
use crate::platform::state::UpState;
use crate::platform::{artifacts, layout, logs, programs};
use crate::signals::Signals;

const UP_MAX: Duration = Duration::from_secs(400);
const COMMAND_MAX: Duration = Duration::from_secs(200);
/// Pools of made-ahead things are filled, and released things go away, within moments; this is the longest that is waited for it.
const SETTLE_MAX: Duration = Duration::from_secs(20);
/// A process that adds to a file in memory, five times a second.
const COUNTER: &str = ": >/dev/shm/count; (while :; do echo >>/dev/shm/count; sleep 0.2; done) >/dev/null 2>&1 &";
const FORKS: usize = 5;
const FILE_BYTES: usize = 4 << 20;
const OUTPUT_MAX: u64 = 32 << 20;

#[derive(clap::Args)]
pub struct Arguments {
    /// Leave the platform's directory (stopped, with its logs and its data) where it is.
    #[arg(long)]
    keep: bool,
    /// Where the figures go.
    #[arg(long, value_name = "FILE", default_value = "builds/demo.json")]
    out: PathBuf,
    /// Where `make images` left kernels and images.
    #[arg(long, value_name = "DIR")]
    artifacts: Option<PathBuf>,
}

struct Demo {
    dir: PathBuf,
    api: String,
    api_key: String,
    format: Format,
    steps: Vec<Value>,
    up: Option<tokio::process::Child>,
}

pub async fn run(arguments: Arguments, options: &Options, format: Format) -> Result<ExitCode, Failure> {
    // Before anything is started: a path that cannot be written is told now.
    let out = std::path::absolute(&arguments.out).doing(|| "read the path of --out".to_owned())?;
    if let Some(folder) = out.parent() {
        std::fs::create_dir_all(folder).doing(|| format!("make {}", folder.display()))?;
    }
    // The figures of an earlier run are not this one's.
    match std::fs::remove_file(&out) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(error).doing(|| format!("remove the earlier {}", out.display()));
        }
        _ => {}
    }
    let dir = match &options.dir {
        Some(_) => fresh(options.dir()?)?,
        None => PathBuf::from(format!("/var/tmp/wrenn-demo-{}", std::process::id())),
    };
    let before = objects::count(&dir, None);
    let mut demo = Demo { dir, api: String::new(), api_key: String::new(), format, steps: Vec::new(), up: None };
    let mut signals = Signals::new()?;
    let shown = tokio::select! {
        shown = demo.show(&arguments) => shown,
        code = signals.next() => Err(Failure::new("interrupted").exiting(code)),
    };
    let tag = objects::tag(&demo.dir);
    if shown.is_err() {
        demo.show_logs();
    }
    let stopped = demo.take_down(arguments.keep).await;
    let mut leaks = objects::grown(&before, &objects::count(&demo.dir, tag.as_deref()));
    if !arguments.keep && demo.dir.exists() {
        leaks.insert("directories".to_owned(), 1);
    }
    let isolation = match &shown {
        Ok((isolation, grown)) => {
            // What a sandbox left behind is a leak, also when the end of the platform took it away.
            grown.iter().for_each(|(kind, more)| *leaks.entry(kind.clone()).or_default() += more);
            isolation.clone()
        }
        Err(_) => "unknown".to_owned(),
    };
    let problem = shown.err().or(stopped.err());
    let ok = problem.is_none() && leaks.is_empty();
    let mut figures = json!({
        "ok": ok,
        "isolation": isolation,
        "steps": demo.steps,
        "leaks": leaks,
        "date": chrono::Utc::now().to_rfc3339(),
        "commit": commit().await,
        "version": env!("CARGO_PKG_VERSION"),
    });
    if let Some(problem) = &problem {
        figures["problem"] = json!(problem.message());
    }
    std::fs::write(&out, format!("{figures:#}\n")).doing(|| format!("write {}", out.display()))?;
    match format {
        Format::Json => print_line(&figures.to_string())?,
        Format::Human => print_line(&summary(ok, &isolation, &leaks, &out))?,
    }
    match problem {
        Some(problem) => Err(problem),
        None if ok => Ok(ExitCode::SUCCESS),
        None => Err(Failure::new("something is left behind")),
    }
}

fn summary(ok: bool, isolation: &str, leaks: &Objects, out: &Path) -> String {
    let left: Vec<String> = leaks.iter().map(|(kind, more)| format!("{more} {}", kind.replace('_', " "))).collect();
    format!(
        "\n{}  isolation: {isolation}; left behind: {}; figures: {}",
        if ok { "ok" } else { "NOT OK" },
        if left.is_empty() { "nothing".to_owned() } else { left.join(", ") },
        out.display()
    )
}

/// The demo ends with the removal of everything, so it takes no directory that has something in it.
fn fresh(dir: PathBuf) -> Result<PathBuf, Failure> {
    let is_empty = std::fs::read_dir(&dir).map(|mut entries| entries.next().is_none()).unwrap_or(true);
    if is_empty {
        Ok(dir)
    } else {
        Err(Failure::usage(format!("{} is not empty: the demo wants a directory of its own", dir.display())))
    }
}

impl Demo {
    /// The steps in their order; gives the isolation and what had grown between create and kill.
    async fn show(&mut self, arguments: &Arguments) -> Result<(String, Objects), Failure> {
        let began = Instant::now();
        let line = self.start(arguments).await?;
        let text = |field: &str| line[field].as_str().unwrap_or_default().to_owned();
        (self.api, self.api_key) = (text("api"), text("api_key"));
        self.step("up", began, &self.api.clone());
        let stages = UpState::read(&self.dir).stages_ms;
        let (Some(agent), Some(key)) = (stages.get("host_registered"), stages.get("api_key")) else {
            return Err(Failure::new("wrenn up did not say how long the registration of the host took"));
        };
        self.note("host_registered", agent - key, &text("host_id"));
        let before = self.settled_count().await;

        let began = Instant::now();
        let sandbox = self.json(&["sandbox", "create", "--json", "--timeout", "900"]).await?;
        let id = sandbox["id"].as_str().unwrap_or_default().to_owned();
        self.step("create", began, &id);
        let isolation = sandbox["isolation"].as_str().unwrap_or("unknown").to_owned();

        let began = Instant::now();
        let said = self
            .wrenn(
                &["sandbox", "exec", &id, "--", "python3", "-c", "import json; print(json.dumps(sum(range(1, 101))))"],
                None,
            )
            .await?;
        expect("python3 in the sandbox", &said, 0, b"5050\n")?;
        self.step("exec", began, "python3: the sum of 1 to 100 is 5050");

        let began = Instant::now();
        let said = self
            .wrenn(&["sandbox", "exec", &id, "--", "sh", "-c", "echo hello from $(uname -s); exit 7"], None)
            .await?;
        expect("sh in the sandbox", &said, 7, b"hello from Linux\n")?;
        self.step("exec_shell", began, "sh: hello from Linux, exit code 7");

        let content: Vec<u8> = (0..FILE_BYTES).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
        let place = format!("{id}:/tmp/demo.bin");
        let began = Instant::now();
        let said = self.wrenn(&["sandbox", "cp", "-", &place], Some(content.clone())).await?;
        expect("a file into the sandbox", &said, 0, b"")?;
        self.step("file_write", began, "4 MiB in");

        let began = Instant::now();
        let said = self.wrenn(&["sandbox", "cp", &place, "-"], None).await?;
        expect("a file out of the sandbox", &said, 0, &content)?;
        self.step("file_read", began, "4 MiB out, the same bytes");

        let counting = ["sandbox", "exec", &id, "--", "sh", "-c", COUNTER];
        expect("a counter in the sandbox", &self.wrenn(&counting, None).await?, 0, b"")?;
        let began = Instant::now();
        let said = self.wrenn(&["sandbox", "pause", &id], None).await?;
        expect("pausing the sandbox", &said, 0, format!("{id}\n").as_bytes())?;
        self.step("pause", began, "saved with its memory; its microVM is gone");

        let began = Instant::now();
        let said = self.wrenn(&["sandbox", "resume", &id], None).await?;
        expect("resuming the sandbox", &said, 0, format!("{id}\n").as_bytes())?;
        self.step("resume", began, "it runs again, and its counter goes on");
        self.expect_counting(&id).await?;
        self.show_fork(&id).await?;

        let began = Instant::now();
        let said = self.wrenn(&["run", "--template", "no-such-template", "--", "true"], None).await?;
        if said.code != 125 || !said.err.contains("no-such-template") {
            return Err(Failure::new(format!(
                "wrong input was to be refused in words, and was: {} {}",
                said.code, said.err
            )));
        }
        self.step("wrong_input", began, said.err.trim().trim_start_matches("wrenn: "));

        let began = Instant::now();
        let said = self.wrenn(&["sandbox", "kill", &id], None).await?;
        expect("killing the sandbox", &said, 0, format!("{id}\n").as_bytes())?;
        self.step("kill", began, "");

        let settling = Instant::now();
        loop {
            let grown = objects::grown(&before, &self.counted());
            if grown.is_empty() || settling.elapsed() > SETTLE_MAX {
                return Ok((isolation, grown));
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    async fn expect_counting(&self, id: &str) -> Result<(), Failure> {
        let look = "a=$(wc -c </dev/shm/count); sleep 0.5; b=$(wc -c </dev/shm/count); test $b -gt $a";
        let said = self.wrenn(&["sandbox", "exec", id, "--", "sh", "-c", look], None).await?;
        expect("the counter in the sandbox's memory", &said, 0, b"")
    }

    /// Sandboxes that go on from where one stands, each for itself.
    async fn show_fork(&mut self, id: &str) -> Result<(), Failure> {
        let began = Instant::now();
        let forked = self.json(&["sandbox", "fork", "--json", id, "--count", &FORKS.to_string()]).await?;
        let children: Vec<String> = forked["sandboxes"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|child| child["id"].as_str().map(str::to_owned))
            .collect();
        self.step("fork", began, &format!("{} more begin where it stands, and it goes on", children.len()));
        if children.len() != FORKS {
            return Err(Failure::new(format!("{FORKS} forks were to be made, and {} were", children.len())));
        }
        let began = Instant::now();
        for each in std::iter::once(id).chain(children.iter().map(String::as_str)) {
            self.expect_counting(each).await?;
        }
        self.step("forks_count", began, "in each of them the counter goes on");
        let mut kill = vec!["sandbox", "kill"];
        kill.extend(children.iter().map(String::as_str));
        let began = Instant::now();
        expect(
            "killing the forks",
            &self.wrenn(&kill, None).await?,
            0,
            format!("{}\n", children.join("\n")).as_bytes(),
        )?;
        self.step("kill_forks", began, "");
        Ok(())
    }

    async fn start(&mut self, arguments: &Arguments) -> Result<Value, Failure> {
        let mut command = Command::new(layout::program("wrenn")?);
        command.args(["up", "--listen", "127.0.0.1:0", "--json", "--dir"]).arg(&self.dir);
        if let Some(artifacts) = artifacts::place(arguments.artifacts.as_deref()) {
            command.arg("--artifacts").arg(artifacts);
        }
        // The demo's own database, wherever the environment points.
        command.env_remove("DATABASE_URL").env_remove("WRENN_DIR").current_dir("/");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::inherit()).process_group(0);
        programs::end_with_this_process(&mut command);
        let mut up = command.spawn().doing(|| "start wrenn up".to_owned())?;
        let stdout = up.stdout.take().expect("it is a pipe");
        self.up = Some(up);
        let mut line = String::new();
        let mut reader = BufReader::new(stdout.take(64 << 10));
        let read = tokio::time::timeout(UP_MAX, reader.read_line(&mut line)).await;
        match read {
            Ok(Ok(length)) if length > 0 => {
                serde_json::from_str(&line).doing(|| format!("read what wrenn up printed, {line:?}"))
            }
            Ok(_) => Err(Failure::new("wrenn up ended before everything was ready: see above")),
            Err(_) => Err(Failure::new(format!("wrenn up was not ready after {} s", UP_MAX.as_secs()))),
        }
    }

    async fn take_down(&mut self, keep: bool) -> Result<(), Failure> {
        let began = Instant::now();
        if self.dir.is_dir() {
            down::take_down(&self.dir, !keep).await?;
        }
        if let Some(mut up) = self.up.take()
            && tokio::time::timeout(Duration::from_secs(60), up.wait()).await.is_err()
        {
            let _ = up.kill().await;
        }
        self.step("down", began, "");
        Ok(())
    }

    /// The directory goes with the demo; what the programs said last is what a person needs.
    fn show_logs(&self) {
        for name in ["wrenn-cp", "wrenn-agent"] {
            let tail = logs::tail(&self.dir, name, programs::TAIL_LINES);
            if !tail.is_empty() {
                eprintln!("--- the end of {name}'s log:\n{tail}");
            }
        }
    }

    fn counted(&self) -> Objects {
        objects::count_used(&self.dir, objects::tag(&self.dir).as_deref())
    }

    /// The same twice in a row: things are made ahead in the background after the start.
    async fn settled_count(&self) -> Objects {
        let began = Instant::now();
        let mut last = self.counted();
        loop {
            tokio::time::sleep(Duration::from_millis(300)).await;
            let now = self.counted();
            if now == last || began.elapsed() > SETTLE_MAX {
                return now;
            }
            last = now;
        }
    }

    fn step(&mut self, name: &str, began: Instant, what: &str) {
        self.note(name, began.elapsed().as_secs_f64() * 1000.0, what);
    }

    fn note(&mut self, name: &str, ms: f64, what: &str) {
        self.steps.push(json!({"name": name, "ms": (ms * 10.0).round() / 10.0}));
        if self.format == Format::Human {
            let _ = print_line(format!("{name:16} {ms:9.0} ms   {what}").trim_end());
        }
    }

    async fn json(&self, arguments: &[&str]) -> Result<Value, Failure> {
        let said = self.wrenn(arguments, None).await?;
        if said.code != 0 {
            return Err(Failure::new(format!("wrenn {}: {}", arguments.join(" "), said.err.trim())));
        }
        serde_json::from_slice(&said.out).doing(|| format!("read what wrenn {} printed", arguments.join(" ")))
    }

    /// The command line, as a user calls it.
    async fn wrenn(&self, arguments: &[&str], input: Option<Vec<u8>>) -> Result<Said, Failure> {
        let mut command = Command::new(layout::program("wrenn")?);
        command
            .args(arguments)
            .env("WRENN_API_URL", &self.api)
            .env("WRENN_API_KEY", &self.api_key)
            .env("WRENN_DIR", &self.dir);
        command.stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() });
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        let mut child = command.spawn().doing(|| "start wrenn".to_owned())?;
        let (stdin, out, err) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let talking = async {
            let feeding = async {
                if let (Some(mut stdin), Some(input)) = (stdin, input) {
                    // A program that ends early closes its end; its exit code says why.
                    let _ = tokio::io::AsyncWriteExt::write_all(&mut stdin, &input).await;
                }
            };
            let ((), out, err) = tokio::join!(feeding, read_all(out), read_all(err));
            (out, err, child.wait().await)
        };
        let (out, err, status) = tokio::time::timeout(COMMAND_MAX, talking).await.map_err(|_| {
            Failure::new(format!("wrenn {} did not end within {} s", arguments.join(" "), COMMAND_MAX.as_secs()))
        })?;
        let status = status.doing(|| "wait for wrenn".to_owned())?;
        Ok(Said { code: status.code().unwrap_or(-1), out, err: String::from_utf8_lossy(&err).into_owned() })
    }
}

struct Said {
    code: i32,
    out: Vec<u8>,
    err: String,
}

async fn read_all(from: Option<impl AsyncRead + Unpin>) -> Vec<u8> {
    let mut all = Vec::new();
    if let Some(from) = from {
        let _ = from.take(OUTPUT_MAX).read_to_end(&mut all).await;
    }
    all
}

fn expect(what: &str, said: &Said, code: i32, out: &[u8]) -> Result<(), Failure> {
    if said.code == code && said.out == out {
        return Ok(());
    }
    let shown = String::from_utf8_lossy(&said.out[..said.out.len().min(200)]).into_owned();
    Err(Failure::new(format!("{what}: exit code {} (wanted {code}), output {shown:?}, {}", said.code, said.err.trim())))
}

async fn commit() -> Option<String> {
    let output = Command::new("git")
        .args(["rev-parse", "--short", "HEAD"])
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()
        .await
        .ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
