//! `wrenn sandbox pause ID...` and `wrenn sandbox resume ID...`.

use std::process::ExitCode;
use std::time::Duration;

use api::v1::sandboxes::{Pause, Sandbox};
use serde_json::json;

use crate::client::Client;
use crate::credentials::Options;
use crate::failure::Failure;
use crate::output::{Format, show};

const END_MAX: Duration = Duration::from_secs(120);
const LOOK_EVERY: Duration = Duration::from_millis(100);

#[derive(clap::Args)]
pub struct PauseArguments {
    /// Keep its disk and not its memory: resumed, it boots.
    #[arg(long)]
    disk_only: bool,
    #[arg(required = true)]
    ids: Vec<String>,
}

#[derive(clap::Args)]
pub struct ResumeArguments {
    #[arg(required = true)]
    ids: Vec<String>,
}

#[derive(Clone, Copy)]
enum Turn {
    Pause { disk_only: bool },
    Resume,
}

impl Turn {
    fn verb(self) -> &'static str {
        match self {
            Self::Pause { .. } => "pause",
            Self::Resume => "resume",
        }
    }

    /// The status on the way, and the one at its end.
    fn statuses(self) -> [&'static str; 2] {
        match self {
            Self::Pause { .. } => ["pausing", "paused"],
            Self::Resume => ["resuming", "running"],
        }
    }

    fn body(self) -> serde_json::Value {
        match self {
            Self::Pause { disk_only: true } => json!(Pause { memory: Some(false) }),
            _ => json!({}),
        }
    }
}

pub async fn pause(arguments: &PauseArguments, options: &Options, format: Format) -> Result<ExitCode, Failure> {
    turn_all(Turn::Pause { disk_only: arguments.disk_only }, &arguments.ids, options, format).await
}

pub async fn resume(arguments: &ResumeArguments, options: &Options, format: Format) -> Result<ExitCode, Failure> {
    turn_all(Turn::Resume, &arguments.ids, options, format).await
}

async fn turn_all(turn: Turn, ids: &[String], options: &Options, format: Format) -> Result<ExitCode, Failure> {
    let client = Client::of_user(options)?;
    let mut turned = Vec::new();
    let mut first_failure = None;
    for id in ids {
        match and_wait(turn, &client, id).await {
            Ok(sandbox) => turned.push(sandbox),
            // The others are turned all the same; the first failure decides the exit code.
            Err(failure) if first_failure.is_none() => first_failure = Some(failure),
            Err(failure) => failure.print(format),
        }
    }
    if !turned.is_empty() {
        let ids: Vec<_> = turned.iter().map(|sandbox| sandbox.id.clone()).collect();
        show(format, &json!({ turn.statuses()[1]: ids }), |_| ids.join("\n"))?;
    }
    first_failure.map_or(Ok(ExitCode::SUCCESS), Err)
}

/// Back when the host has said that it is so, or that it stays as it was.
async fn and_wait(turn: Turn, client: &Client, id: &str) -> Result<Sandbox, Failure> {
    let [under_way, end] = turn.statuses();
    let url = client.url(&["v1", "sandboxes", id]);
    let mut sandbox: Sandbox = client.post(client.url(&["v1", "sandboxes", id, turn.verb()]), &turn.body()).await?;
    let waited = tokio::time::timeout(END_MAX, async {
        while sandbox.status == under_way {
            tokio::time::sleep(LOOK_EVERY).await;
            sandbox = client.get(url.clone()).await?;
        }
        Ok(())
    });
    match waited.await {
        Ok(outcome) => outcome?,
        Err(_) => {
            return Err(Failure::new(format!(
                "sandbox {id} is still {under_way}: its host has not said yet what became of it, and `wrenn sandbox get {id}` will show it"
            )));
        }
    }
    if sandbox.status == end {
        return Ok(sandbox);
    }
    let reason = sandbox.reason.as_deref().map(|reason| format!(": {reason}")).unwrap_or_default();
    Err(Failure::new(format!("sandbox {id} is {}{reason}", sandbox.status)))
}
