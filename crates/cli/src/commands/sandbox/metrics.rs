//! `wrenn sandbox metrics ID`.

use std::process::ExitCode;

use api::v1::metrics::{MetricPoint, Metrics};
use chrono::DateTime;
use indicatif::HumanBytes;

use crate::client::Client;
use crate::credentials::Options;
use crate::failure::Failure;
use crate::output::{Format, show, table};

#[derive(clap::Args)]
pub struct Arguments {
    id: String,
    /// 5m, 10m, 1h, 2h, 6h, 12h or 24h [default: 10m].
    #[arg(long)]
    range: Option<String>,
}

pub async fn run(arguments: &Arguments, options: &Options, format: Format) -> Result<ExitCode, Failure> {
    let client = Client::of_user(options)?;
    let mut url = client.url(&["v1", "sandboxes", &arguments.id, "metrics"]);
    if let Some(range) = &arguments.range {
        url.query_pairs_mut().append_pair("range", range);
    }
    let metrics: Metrics = client.get(url).await?;
    show(format, &metrics, |metrics| {
        table(&["AT", "CPU", "MEMORY", "DISK"], metrics.points.iter().map(row).collect())
    })?;
    Ok(ExitCode::SUCCESS)
}

fn row(point: &MetricPoint) -> Vec<String> {
    let bytes = |bytes: i64| u64::try_from(bytes).map(|bytes| HumanBytes(bytes).to_string()).unwrap_or_default();
    vec![
        DateTime::from_timestamp(point.timestamp_unix, 0)
            .map(|at| at.format("%Y-%m-%d %H:%M:%S").to_string())
            .unwrap_or_default(),
        format!("{:.1} %", point.cpu_pct),
        bytes(point.mem_bytes),
        bytes(point.disk_bytes),
    ]
}
