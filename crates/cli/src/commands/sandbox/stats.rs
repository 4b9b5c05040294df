//! `wrenn sandbox stats`: how much of the team runs, and ran at most.

use std::process::ExitCode;

use api::v1::metrics::Stats;

use crate::client::Client;
use crate::credentials::Options;
use crate::failure::Failure;
use crate::output::{Format, show, table};

#[derive(clap::Args)]
pub struct Arguments {
    /// Of the course: 5m, 1h, 6h, 24h or 30d [default: 1h].
    #[arg(long)]
    range: Option<String>,
    /// Show the course too.
    #[arg(long)]
    series: bool,
}

pub async fn run(arguments: &Arguments, options: &Options, format: Format) -> Result<ExitCode, Failure> {
    let client = Client::of_user(options)?;
    let mut url = client.url(&["v1", "sandboxes", "stats"]);
    if let Some(range) = &arguments.range {
        url.query_pairs_mut().append_pair("range", range);
    }
    let stats: Stats = client.get(url).await?;
    show(format, &stats, |stats| {
        let row = |what: &str, running: i64, vcpus: i64, memory: i64| {
            vec![what.to_owned(), running.to_string(), vcpus.to_string(), format!("{memory} MiB")]
        };
        let (now, peaks, series) = (&stats.current, &stats.peaks, &stats.series);
        let mut rows = Vec::new();
        if arguments.series || arguments.range.is_some() {
            let columns = series.labels.iter().zip(&series.running).zip(&series.vcpus).zip(&series.memory_mb);
            rows.extend(columns.map(|(((label, running), vcpus), memory)| row(label, *running, *vcpus, *memory)));
        }
        rows.push(row("now", now.running_count, now.vcpus_reserved, now.memory_mb_reserved));
        rows.push(row("most in 30 days", peaks.running_count, peaks.vcpus, peaks.memory_mb));
        table(&["WHEN", "RUNNING", "VCPUS", "MEMORY"], rows)
    })?;
    Ok(ExitCode::SUCCESS)
}
