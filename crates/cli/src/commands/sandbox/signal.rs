//! `wrenn sandbox signal ID PROCESS`.

use std::process::ExitCode;

use serde_json::{Value, json};

use crate::client::Client;
use crate::credentials::Options;
use crate::failure::Failure;
use crate::output::{Format, show};

#[derive(clap::Args)]
pub struct Arguments {
    id: String,
    /// By its pid or its tag.
    #[arg(value_name = "PID|TAG")]
    process: String,
    /// KILL or TERM, also with SIG before it.
    #[arg(long, short, default_value = "KILL")]
    signal: String,
}

pub async fn run(arguments: &Arguments, options: &Options, format: Format) -> Result<ExitCode, Failure> {
    let client = Client::of_user(options)?;
    let signal = arguments.signal.to_uppercase();
    let signal = if signal.starts_with("SIG") { signal } else { format!("SIG{signal}") };
    let mut url = client.url(&["v1", "sandboxes", &arguments.id, "processes", &arguments.process]);
    url.query_pairs_mut().append_pair("signal", &signal);
    client.delete::<Value>(url).await?;
    show(format, &json!({ "process": arguments.process, "signal": signal }), |_| String::new())?;
    Ok(ExitCode::SUCCESS)
}
