//! `wrenn sandbox exec ID -- CMD`.

use std::process::ExitCode;

use api::v1::exec::{Exec, ExecStarted};

use crate::client::Client;
use crate::commands::exec_stream::{self, Wanted};
use crate::commands::run::{exit_code, pair};
use crate::credentials::Options;
use crate::failure::{EXIT_OURS, Failure};
use crate::output::{Format, print_line, show};

#[derive(clap::Args)]
#[command(after_long_help = "\
  wrenn sandbox exec SANDBOX -- make -j2
  wrenn sandbox exec SANDBOX --user root -- sh -c 'id; pwd'
  tag=$(wrenn sandbox exec SANDBOX --background -- ./server); wrenn logs -f SANDBOX $tag

Output comes byte for byte, as it is written. The exit code is the command's; 137 when a signal ended it; 125 when this program failed. The \
command has no standard input. Ctrl-C ends this program and not the command: `wrenn sandbox ps` and `wrenn sandbox signal` find it.")]
pub struct Arguments {
    id: String,
    #[arg(long = "env", value_name = "NAME=VALUE", value_parser = pair)]
    envs: Vec<(String, String)>,
    /// Working directory [default: the user's home].
    #[arg(long, value_name = "PATH")]
    cwd: Option<String>,
    /// [default: the sandbox's default user]
    #[arg(long)]
    user: Option<String>,
    /// Leave it to run, and print the tag by which `wrenn logs`, `wrenn sandbox ps` and `wrenn sandbox signal` find it.
    #[arg(long, short)]
    background: bool,
    /// The tag, 1 to 64 characters [default: proc- and eight hex digits].
    #[arg(long, requires = "background")]
    tag: Option<String>,
    /// Kill the command after this many seconds [default: never; with --json, which collects the output, 30].
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<i64>,
    /// The command and its arguments; one word with a blank in it is given to a shell.
    #[arg(last = true, required = true, value_name = "CMD")]
    command: Vec<String>,
}

pub async fn run(arguments: Arguments, options: &Options, format: Format) -> Result<ExitCode, Failure> {
    executed(arguments, options, format).await.map_err(|failure| failure.exiting(EXIT_OURS))
}

async fn executed(arguments: Arguments, options: &Options, format: Format) -> Result<ExitCode, Failure> {
    let client = Client::of_user(options)?;
    let command = Wanted {
        argv: arguments.command,
        envs: arguments.envs.into_iter().collect(),
        cwd: arguments.cwd,
        user: arguments.user,
        timeout_sec: arguments.timeout,
    };
    if arguments.background {
        return in_background(&client, &arguments.id, command, arguments.tag, format).await;
    }
    match format {
        Format::Human => {
            let (mut out, mut err) = (tokio::io::stdout(), tokio::io::stderr());
            Ok(exit_code(exec_stream::run(&client, &arguments.id, command, &mut out, &mut err).await?))
        }
        Format::Json => Ok(exit_code(collected(&client, &arguments.id, command).await?)),
    }
}

/// Back when it runs.
async fn in_background(
    client: &Client,
    id: &str,
    command: Wanted,
    tag: Option<String>,
    format: Format,
) -> Result<ExitCode, Failure> {
    let wanted = Exec { background: true, tag, ..wanted(command) };
    // Not repeated: a command that ran twice is not what was asked for.
    let started: ExecStarted = client.post_once(client.url(&["v1", "sandboxes", id, "exec"]), &wanted).await?;
    show(format, &started, |started| started.tag.clone())?;
    Ok(ExitCode::SUCCESS)
}

fn wanted(command: Wanted) -> Exec {
    let mut argv = command.argv.into_iter();
    Exec {
        cmd: argv.next().unwrap_or_default(),
        args: argv.collect(),
        timeout_sec: command.timeout_sec,
        envs: command.envs,
        cwd: command.cwd,
        user: command.user,
        ..Exec::default()
    }
}

/// One document instead of two streams: the collected call, bounded by the server at 10 MiB a stream. Gives the exit code.
pub async fn collected(client: &Client, id: &str, command: Wanted) -> Result<i32, Failure> {
    let wanted = wanted(command);
    // Not repeated: a command that ran twice is not what was asked for.
    let limit =
        wanted.timeout_sec.and_then(|seconds| u64::try_from(seconds).ok()).filter(|seconds| *seconds > 0).unwrap_or(30);
    let request = client
        .request(reqwest::Method::POST, client.url(&["v1", "sandboxes", id, "exec"]))
        .timeout(std::time::Duration::from_secs(limit.saturating_add(30)))
        .json(&wanted);
    let answer = request.send().await.map_err(|error| client.broken(&error))?;
    let answer = client.checked(answer).await?;
    let outcome: api::v1::exec::ExecOutcome = answer.json().await.map_err(|error| client.broken(&error))?;
    print_line(&serde_json::to_string(&outcome).expect("texts and numbers are JSON"))?;
    Ok(outcome.exit_code)
}
