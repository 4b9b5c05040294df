//! `wrenn version`: of this program and, when one answers, of the control plane.

use std::process::ExitCode;
use std::time::Duration;

use serde_json::{Value, json};

use crate::client::{Client, Credential};
use crate::credentials::Options;
use crate::failure::Failure;
use crate::output::{Format, facts, show};

/// A question of courtesy: nobody should wait for it.
const ASK_MAX: Duration = Duration::from_secs(2);

#[derive(clap::Args)]
pub struct Arguments {}

pub async fn run(_: &Arguments, options: &Options, format: Format) -> Result<ExitCode, Failure> {
    let server = match options.api_url() {
        Ok(url) => of_server(Client::new(url, Credential::None)?).await,
        Err(_) => None,
    };
    let versions = json!({"wrenn": env!("CARGO_PKG_VERSION"), "control_plane": server});
    show(format, &versions, |versions| {
        let text = |field: &str| versions[field].as_str().unwrap_or_default().to_owned();
        facts(&[("wrenn", text("wrenn")), ("control plane", text("control_plane"))])
    })?;
    Ok(ExitCode::SUCCESS)
}

/// None where no control plane answers.
pub async fn of_server(client: Client) -> Option<String> {
    let request = client.request(reqwest::Method::GET, client.url(&["health"])).timeout(ASK_MAX);
    let health: Value = request.send().await.ok()?.json().await.ok()?;
    health["version"].as_str().map(str::to_owned)
}
