//! `wrenn sandbox get ID`.

use std::process::ExitCode;

use api::v1::sandboxes::Sandbox;

use crate::client::Client;
use crate::credentials::Options;
use crate::failure::Failure;
use crate::output::{Format, facts, show};

#[derive(clap::Args)]
pub struct Arguments {
    id: String,
}

pub async fn run(arguments: &Arguments, options: &Options, format: Format) -> Result<ExitCode, Failure> {
    let client = Client::of_user(options)?;
    let sandbox: Sandbox = client.get(client.url(&["v1", "sandboxes", &arguments.id])).await?;
    show(format, &sandbox, described)?;
    Ok(ExitCode::SUCCESS)
}

fn described(sandbox: &Sandbox) -> String {
    let or_none = |value: &Option<String>| value.clone().unwrap_or_default();
    let time = |at: Option<chrono::DateTime<chrono::Utc>>| at.map(|at| at.to_rfc3339()).unwrap_or_default();
    facts(&[
        ("id", sandbox.id.clone()),
        ("status", sandbox.status.clone()),
        ("reason", or_none(&sandbox.reason)),
        ("kept", or_none(&sandbox.kept)),
        ("template", sandbox.template.clone()),
        ("vcpus", sandbox.vcpus.to_string()),
        ("memory", format!("{} MiB", sandbox.memory_mb)),
        ("disk", format!("{} MiB", sandbox.disk_size_mb)),
        (
            "timeout",
            if sandbox.timeout_sec > 0 {
                format!("{} s, then {}", sandbox.timeout_sec, sandbox.on_timeout)
            } else {
                "never".to_owned()
            },
        ),
        ("expires", time(sandbox.expires_at)),
        (
            "idle timeout",
            if sandbox.idle_timeout_sec > 0 {
                format!("{} s, then {}", sandbox.idle_timeout_sec, sandbox.on_timeout)
            } else {
                "never".to_owned()
            },
        ),
        ("auto resume", if sandbox.auto_resume { "yes" } else { "no" }.to_owned()),
        ("idle since", time(sandbox.idle_since)),
        ("isolation", or_none(&sandbox.isolation)),
        ("host", or_none(&sandbox.host_id)),
        ("created", time(Some(sandbox.created_at))),
        ("started", time(sandbox.started_at)),
        (
            "metadata",
            sandbox.metadata.iter().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>().join(" "),
        ),
        (
            "steps",
            sandbox.steps.iter().map(|step| format!("{} {:.0} ms", step.name, step.ms)).collect::<Vec<_>>().join(", "),
        ),
    ])
}
