//! `wrenn sandbox ps ID`: what was started in it through the API and still runs.

use std::process::ExitCode;

use serde::{Deserialize, Serialize};

use crate::client::Client;
use crate::credentials::Options;
use crate::failure::Failure;
use crate::output::{Format, show, table};
use crate::printable::escaped;

#[derive(clap::Args)]
pub struct Arguments {
    id: String,
}

#[derive(Serialize, Deserialize)]
struct Processes {
    processes: Vec<Process>,
}

#[derive(Serialize, Deserialize)]
struct Process {
    pid: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    tag: Option<String>,
    cmd: String,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    args: Vec<String>,
}

pub async fn run(arguments: &Arguments, options: &Options, format: Format) -> Result<ExitCode, Failure> {
    let client = Client::of_user(options)?;
    let found: Processes = client.get(client.url(&["v1", "sandboxes", &arguments.id, "processes"])).await?;
    show(format, &found, |found| table(&["PID", "TAG", "COMMAND"], found.processes.iter().map(row).collect()))?;
    Ok(ExitCode::SUCCESS)
}

fn row(process: &Process) -> Vec<String> {
    let command: Vec<&str> =
        [process.cmd.as_str()].into_iter().chain(process.args.iter().map(String::as_str)).collect();
    vec![process.pid.to_string(), process.tag.as_deref().map(escaped).unwrap_or_default(), escaped(&command.join(" "))]
}
