//! `wrenn sandbox fork ID`.

use std::process::ExitCode;

use api::v1::sandboxes::{Fork, Forked};

use super::create::{RUNNING_MAX, until_running};
use crate::client::Client;
use crate::commands::run::pair;
use crate::credentials::Options;
use crate::failure::Failure;
use crate::output::{Format, show, spinner};

#[derive(clap::Args)]
pub struct Arguments {
    /// It runs, and goes on, or is paused, and stays so.
    id: String,
    /// How many [default: 1].
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    count: Option<i64>,
    /// End them after this many seconds of running [default: as the source].
    #[arg(long, value_name = "SECONDS", allow_negative_numbers = true)]
    timeout: Option<i64>,
    /// What their end is: kill; pause, with memory; or pause_disk [default: as the source].
    #[arg(long, value_name = "kill|pause|pause_disk")]
    on_timeout: Option<String>,
    /// Whether a command or a file call lets them run again when they are paused [default: as the source].
    #[arg(long, value_name = "true|false")]
    auto_resume: Option<bool>,
    /// The same end after this many seconds in which nothing happens in them [default: as the source].
    #[arg(long, value_name = "SECONDS", allow_negative_numbers = true)]
    idle_timeout: Option<i64>,
    /// Environment variables of what is started in them, beside the source's own.
    #[arg(long = "env", value_name = "NAME=VALUE", value_parser = pair)]
    envs: Vec<(String, String)>,
    /// Pairs to find them again by, beside the source's own.
    #[arg(long = "metadata", value_name = "NAME=VALUE", value_parser = pair)]
    metadata: Vec<(String, String)>,
}

pub async fn run(arguments: &Arguments, options: &Options, format: Format) -> Result<ExitCode, Failure> {
    let client = Client::of_user(options)?;
    let bar = spinner(format, "forking a sandbox");
    let pairs = |pairs: &[(String, String)]| (!pairs.is_empty()).then(|| pairs.iter().cloned().collect());
    let wanted = Fork {
        count: arguments.count,
        timeout_sec: arguments.timeout,
        on_timeout: arguments.on_timeout.clone(),
        auto_resume: arguments.auto_resume,
        idle_timeout_sec: arguments.idle_timeout,
        envs: pairs(&arguments.envs),
        metadata: pairs(&arguments.metadata),
    };
    let mut forked: Forked = client.post(client.url(&["v1", "sandboxes", &arguments.id, "fork"]), &wanted).await?;
    for sandbox in &mut forked.sandboxes {
        *sandbox = until_running(&client, sandbox.clone(), RUNNING_MAX).await?;
    }
    bar.finish_and_clear();
    show(format, &forked, |forked| {
        let ids: Vec<&str> = forked.sandboxes.iter().map(|sandbox| sandbox.id.as_str()).collect();
        ids.join("\n")
    })?;
    Ok(ExitCode::SUCCESS)
}
