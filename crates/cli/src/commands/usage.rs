//! `wrenn usage`: what the team's sandboxes have used, by days.

use std::process::ExitCode;

use api::v1::metrics::Usage;
use chrono::NaiveDate;

use crate::client::Client;
use crate::credentials::Options;
use crate::failure::Failure;
use crate::output::{Format, show, table};

#[derive(clap::Args)]
pub struct Arguments {
    /// The first day, in UTC: 2026-01-31 [default: 30 days ago].
    #[arg(long, value_name = "DATE")]
    from: Option<NaiveDate>,
    /// The last day [default: today]. At most 92 days in all.
    #[arg(long, value_name = "DATE")]
    to: Option<NaiveDate>,
}

pub async fn run(arguments: &Arguments, options: &Options, format: Format) -> Result<ExitCode, Failure> {
    let client = Client::of_user(options)?;
    let mut url = client.url(&["v1", "sandboxes", "usage"]);
    for (name, date) in [("from", arguments.from), ("to", arguments.to)] {
        if let Some(date) = date {
            url.query_pairs_mut().append_pair(name, &date.to_string());
        }
    }
    let usage: Usage = client.get(url).await?;
    show(format, &usage, |usage| {
        let row = |date: &str, vcpu_minutes: f64, mib_minutes: f64| {
            // What is paid for by the hour is read by the hour.
            vec![date.to_owned(), format!("{:.2}", vcpu_minutes / 60.0), format!("{:.2}", mib_minutes / 1024.0 / 60.0)]
        };
        let mut rows: Vec<_> = usage
            .points
            .iter()
            .map(|point| row(&point.date.to_string(), point.cpu_minutes, point.ram_mb_minutes))
            .collect();
        let sum = |of: fn(&api::v1::metrics::UsagePoint) -> f64| usage.points.iter().map(of).sum::<f64>();
        rows.push(row("all", sum(|point| point.cpu_minutes), sum(|point| point.ram_mb_minutes)));
        table(&["DAY", "VCPU HOURS", "MEMORY GIB HOURS"], rows)
    })?;
    Ok(ExitCode::SUCCESS)
}
