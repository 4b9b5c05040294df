//! `wrenn run -- CMD`: a sandbox for one command. It is killed whatever happens: success, failure, Ctrl-C, an error of ours.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::Duration;

use api::v1::sandboxes::{CreateSandbox, Sandbox};

use super::exec_stream::{self, Wanted};
use super::sandbox::create::{self, Size};
use crate::client::Client;
use crate::credentials::Options;
use crate::failure::{EXIT_OURS, Failure};
use crate::output::{Format, spinner};
use crate::signals::Signals;

/// A create that is under way when the signal comes is waited for, so that what it made can be killed.
const CREATE_ANSWER_MAX: Duration = Duration::from_secs(20);
const KILL_MAX: Duration = Duration::from_secs(60);

#[derive(clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    size: Size,
    /// Environment variables of the command.
    #[arg(long = "env", value_name = "NAME=VALUE", value_parser = pair)]
    envs: Vec<(String, String)>,
    /// Kill the command, and the sandbox, after this many seconds.
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<i64>,
    /// The command and its arguments; one word with a blank in it is given to a shell.
    #[arg(last = true, required = true, value_name = "CMD")]
    command: Vec<String>,
}

pub fn pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("give NAME=VALUE".to_owned()),
    }
}

pub async fn run(arguments: Arguments, options: &Options, format: Format) -> Result<ExitCode, Failure> {
    in_a_sandbox(arguments, options, format).await.map_err(|failure| failure.exiting(EXIT_OURS))
}

async fn in_a_sandbox(arguments: Arguments, options: &Options, format: Format) -> Result<ExitCode, Failure> {
    let client = Client::of_user(options)?;
    let mut signals = Signals::new()?;
    let bar = spinner(format, "creating a sandbox");
    let wanted = CreateSandbox {
        timeout_sec: arguments.timeout.map(|seconds| seconds.saturating_add(60)),
        ..arguments.size.wanted()
    };
    // The answer comes at once (the wish is written down): a signal waits for it, so that nothing is made that nobody knows.
    let mut asked = Box::pin(create::ask(&client, &wanted));
    let (sandbox, mut signal) = tokio::select! {
        sandbox = &mut asked => (sandbox?, None),
        signal = signals.next() => match tokio::time::timeout(CREATE_ANSWER_MAX, &mut asked).await {
            Ok(sandbox) => (sandbox?, Some(signal)),
            Err(_) => return Ok(ExitCode::from(signal)),
        },
    };
    let mut outcome = Ok(0);
    if signal.is_none() {
        let command = Wanted {
            argv: arguments.command,
            envs: arguments.envs.into_iter().collect::<BTreeMap<_, _>>(),
            timeout_sec: arguments.timeout,
            ..Wanted::default()
        };
        tokio::select! {
            finished = use_it(&client, sandbox.clone(), command, &bar, format) => outcome = finished,
            caught = signals.next() => signal = Some(caught),
        }
    }
    bar.finish_and_clear();
    let killed = kill(&client, &sandbox.id, &mut signals).await;
    if let Some(code) = signal {
        killed?;
        return Ok(ExitCode::from(code));
    }
    let code = outcome?;
    killed?;
    Ok(exit_code(code))
}

async fn use_it(
    client: &Client,
    sandbox: Sandbox,
    command: Wanted,
    bar: &indicatif::ProgressBar,
    format: Format,
) -> Result<i32, Failure> {
    let sandbox = create::until_running(client, sandbox, create::RUNNING_MAX).await?;
    bar.finish_and_clear();
    match format {
        Format::Human => {
            exec_stream::run(client, &sandbox.id, command, &mut tokio::io::stdout(), &mut tokio::io::stderr()).await
        }
        Format::Json => super::sandbox::exec::collected(client, &sandbox.id, command).await,
    }
}

/// A second signal during this gives up, and says what is left.
async fn kill(client: &Client, id: &str, signals: &mut Signals) -> Result<(), Failure> {
    let left =
        |why: &str| Failure::new(format!("{why}: sandbox {id} may still run; end it with `wrenn sandbox kill {id}`"));
    tokio::select! {
        killed = tokio::time::timeout(KILL_MAX, super::sandbox::kill::and_wait(client, id)) => match killed {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(failure)) => Err(left(&failure.message())),
            Err(_) => Err(left("the kill takes too long")),
        },
        _ = signals.next() => Err(left("interrupted again")),
    }
}

/// What a shell makes of it: -1 stands for an end by a signal, of which the number is not told.
pub fn exit_code(code: i32) -> ExitCode {
    ExitCode::from(u8::try_from(code).unwrap_or(if code < 0 { 137 } else { 255 }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_are_split_at_the_first_sign() {
        assert_eq!(pair("A=b=c"), Ok(("A".into(), "b=c".into())));
        assert_eq!(pair("A="), Ok(("A".into(), String::new())));
        assert!(pair("=x").is_err() && pair("x").is_err());
    }
}
