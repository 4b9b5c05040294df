//! `wrenn sandbox logs ID`: the console, as text.

use std::process::ExitCode;

use serde_json::json;

use crate::client::Client;
use crate::credentials::Options;
use crate::failure::Failure;
use crate::output::{Format, show};
use crate::printable;

#[derive(clap::Args)]
pub struct Arguments {
    id: String,
}

pub async fn run(arguments: &Arguments, options: &Options, format: Format) -> Result<ExitCode, Failure> {
    let client = Client::of_user(options)?;
    let text = client.get_text(client.url(&["v1", "sandboxes", &arguments.id, "console"])).await?;
    show(format, &json!({ "console": text }), |_| printable::lines(text.trim_end()))?;
    Ok(ExitCode::SUCCESS)
}
