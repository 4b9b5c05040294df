//! `wrenn quota`: what a team may have, and what it has.

use std::process::ExitCode;

use api::v1::quotas::{Quota, Quotas, SetQuotas};

use crate::client::Client;
use crate::credentials::Options;
use crate::failure::Failure;
use crate::output::{Format, show, table};

#[derive(clap::Subcommand)]
pub enum Command {
    /// Show the limits of the own team, or, for administrators, of another one, and what of them is used.
    Get {
        #[arg(long, value_name = "ID")]
        team: Option<String>,
    },
    /// Give a team limits of its own, in place of those it had; what is left out is as the platform has it by default.
    Set(Set),
}

#[derive(clap::Args)]
pub struct Set {
    team: String,
    /// Sandboxes, running or paused; 0: none at all.
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    sandboxes: Option<i64>,
    /// Those of them that are not paused.
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    running: Option<i64>,
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    vcpus: Option<i64>,
    #[arg(long, value_name = "MIB", allow_negative_numbers = true)]
    memory: Option<i64>,
    #[arg(long, value_name = "MIB", allow_negative_numbers = true)]
    disk: Option<i64>,
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    creates_per_min: Option<i64>,
}

pub async fn run(command: Command, options: &Options, format: Format) -> Result<ExitCode, Failure> {
    let quotas: Quotas = match command {
        Command::Get { team: None } => {
            let client = Client::of_user(options)?;
            client.get(client.url(&["v1", "teams", "self", "quotas"])).await?
        }
        Command::Get { team: Some(team) } => {
            let client = Client::of_administrator(options).await?;
            client.get(client.url(&["v1", "teams", &team, "quotas"])).await?
        }
        Command::Set(set) => {
            let client = Client::of_administrator(options).await?;
            let wanted = SetQuotas {
                sandboxes: set.sandboxes,
                running: set.running,
                vcpus: set.vcpus,
                memory_mb: set.memory,
                disk_mb: set.disk,
                creates_per_min: set.creates_per_min,
            };
            client.put(client.url(&["v1", "teams", &set.team, "quotas"]), &wanted).await?
        }
    };
    show(format, &quotas, |quotas| {
        let rows = quotas.quotas.iter().map(row).collect();
        format!("team {}\n{}", quotas.team_id, table(&["QUOTA", "USED", "LIMIT", "WHOSE"], rows))
    })?;
    Ok(ExitCode::SUCCESS)
}

fn row(quota: &Quota) -> Vec<String> {
    let limit = quota.limit.map_or_else(|| "none".to_owned(), |limit| limit.to_string());
    let whose = if quota.is_own { "the team's own" } else { "the platform's" };
    vec![quota.name.clone(), quota.used.to_string(), limit, whose.to_owned()]
}
