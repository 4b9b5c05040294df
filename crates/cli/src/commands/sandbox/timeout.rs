//! `wrenn sandbox timeout ID [SECONDS]`.

use std::process::ExitCode;

use api::v1::sandboxes::{Sandbox, SetTimeout};

use crate::client::Client;
use crate::credentials::Options;
use crate::failure::Failure;
use crate::output::{Format, show};

#[derive(clap::Args)]
pub struct Arguments {
    id: String,
    /// From now on, or, of one that is paused, from its resume; 0: never. As it was when absent.
    #[arg(allow_negative_numbers = true)]
    seconds: Option<i64>,
    /// What its end is: kill; pause, with memory; or pause_disk. As it was when absent.
    #[arg(long, value_name = "kill|pause|pause_disk")]
    on_timeout: Option<String>,
    /// Whether a command or a file call lets it run again when it is paused. As it was when absent.
    #[arg(long, value_name = "true|false")]
    auto_resume: Option<bool>,
    /// The same end after this many seconds in which nothing happens in it, from 60; 0: never. As it was when absent.
    #[arg(long, value_name = "SECONDS", allow_negative_numbers = true)]
    idle_timeout: Option<i64>,
}

pub async fn run(arguments: &Arguments, options: &Options, format: Format) -> Result<ExitCode, Failure> {
    let client = Client::of_user(options)?;
    let wanted = SetTimeout {
        timeout_sec: arguments.seconds,
        on_timeout: arguments.on_timeout.clone(),
        auto_resume: arguments.auto_resume,
        idle_timeout_sec: arguments.idle_timeout,
    };
    let sandbox: Sandbox = client.post(client.url(&["v1", "sandboxes", &arguments.id, "timeout"]), &wanted).await?;
    show(format, &sandbox, |sandbox| {
        let time = match (sandbox.timeout_sec, sandbox.expires_at) {
            (0, _) => "never".to_owned(),
            (_, Some(at)) => format!("{} at {}", sandbox.on_timeout, at.to_rfc3339()),
            (seconds, None) => format!("{} after {seconds} s of running", sandbox.on_timeout),
        };
        match sandbox.idle_timeout_sec {
            0 => time,
            idle => format!("{time}\n{} after {idle} s of being idle", sandbox.on_timeout),
        }
    })?;
    Ok(ExitCode::SUCCESS)
}
