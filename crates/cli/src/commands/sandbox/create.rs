//! `wrenn sandbox create`.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use api::v1::sandboxes::{CreateSandbox, Sandbox};

use crate::client::Client;
use crate::commands::run::pair;
use crate::credentials::Options;
use crate::failure::Failure;
use crate::output::{Format, show, spinner};

/// Booting is allowed to take this long: emulated, on a machine that is busy, 15 s were measured.
pub const RUNNING_MAX: Duration = Duration::from_secs(120);
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// What a sandbox is made of. The server has the defaults and the limits.
#[derive(clap::Args)]
pub struct Size {
    /// What it starts from [default: minimal].
    #[arg(long, value_name = "NAME")]
    template: Option<String>,
    /// [default: 1]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    vcpus: Option<i64>,
    /// [default: 512]
    #[arg(long, value_name = "MIB", allow_negative_numbers = true)]
    memory: Option<i64>,
    /// [default: 5120]
    #[arg(long, value_name = "MIB", allow_negative_numbers = true)]
    disk: Option<i64>,
}

impl Size {
    pub fn wanted(&self) -> CreateSandbox {
        CreateSandbox {
            template: self.template.clone(),
            vcpus: self.vcpus,
            memory_mb: self.memory,
            disk_size_mb: self.disk,
            ..CreateSandbox::default()
        }
    }
}

#[derive(clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    size: Size,
    /// End the sandbox after this many seconds of running [default: never].
    #[arg(long, value_name = "SECONDS", allow_negative_numbers = true)]
    timeout: Option<i64>,
    /// What its end is: kill; pause, with memory; or pause_disk. Resumed, its time begins anew [default: kill].
    #[arg(long, value_name = "kill|pause|pause_disk")]
    on_timeout: Option<String>,
    /// Let it run again by itself when it is paused and a command or a file call needs it.
    #[arg(long)]
    auto_resume: bool,
    /// The same end after this many seconds in which nothing happens in it, from 60 [default: never].
    #[arg(long, value_name = "SECONDS", allow_negative_numbers = true)]
    idle_timeout: Option<i64>,
    /// Environment variables of every process in the sandbox.
    #[arg(long = "env", value_name = "NAME=VALUE", value_parser = pair)]
    envs: Vec<(String, String)>,
    /// Pairs to find it again by.
    #[arg(long = "metadata", value_name = "NAME=VALUE", value_parser = pair)]
    metadata: Vec<(String, String)>,
    /// A tag that its host must have; may be repeated.
    #[arg(long = "tag", value_name = "TAG")]
    tags: Vec<String>,
    /// Onto the emptiest host, or the fullest that has room [default: as the platform has it].
    #[arg(long, value_name = "spread|pack")]
    placement: Option<String>,
    /// Do not wait until it runs.
    #[arg(long)]
    no_wait: bool,
}

pub async fn run(arguments: &Arguments, options: &Options, format: Format) -> Result<ExitCode, Failure> {
    let client = Client::of_user(options)?;
    let bar = spinner(format, "creating a sandbox");
    let pairs = |pairs: &[(String, String)]| (!pairs.is_empty()).then(|| pairs.iter().cloned().collect());
    let wanted = CreateSandbox {
        timeout_sec: arguments.timeout,
        on_timeout: arguments.on_timeout.clone(),
        auto_resume: arguments.auto_resume.then_some(true),
        idle_timeout_sec: arguments.idle_timeout,
        envs: pairs(&arguments.envs),
        metadata: pairs(&arguments.metadata),
        tags: (!arguments.tags.is_empty()).then(|| arguments.tags.clone()),
        placement: arguments.placement.clone(),
        ..arguments.size.wanted()
    };
    let mut sandbox = ask(&client, &wanted).await?;
    if !arguments.no_wait {
        sandbox = until_running(&client, sandbox, RUNNING_MAX).await?;
    }
    bar.finish_and_clear();
    show(format, &sandbox, |sandbox| sandbox.id.clone())?;
    Ok(ExitCode::SUCCESS)
}

/// Writes the wish down and comes back at once.
pub async fn ask(client: &Client, wanted: &CreateSandbox) -> Result<Sandbox, Failure> {
    let mut url = client.url(&["v1", "sandboxes"]);
    url.set_query(Some("wait_sec=0"));
    client.post(url, wanted).await
}

pub async fn until_running(client: &Client, mut sandbox: Sandbox, limit: Duration) -> Result<Sandbox, Failure> {
    let began = Instant::now();
    let why = |sandbox: &Sandbox| sandbox.reason.as_ref().map(|reason| format!(": {reason}")).unwrap_or_default();
    loop {
        match sandbox.status.as_str() {
            "running" => return Ok(sandbox),
            "starting" | "resuming" if began.elapsed() < limit => {}
            "starting" | "resuming" => {
                return Err(Failure::new(format!(
                    "sandbox {} does not run after {} s{} (it still exists: `wrenn sandbox get {0}`)",
                    sandbox.id,
                    limit.as_secs(),
                    why(&sandbox)
                )));
            }
            other => {
                return Err(Failure::new(format!(
                    "sandbox {} did not start, it is {other}{}",
                    sandbox.id,
                    why(&sandbox)
                )));
            }
        }
        tokio::time::sleep(LOOK_EVERY).await;
        sandbox = client.get(client.url(&["v1", "sandboxes", &sandbox.id])).await?;
    }
}
