//! `wrenn admin team`: all teams of the platform.

use std::process::ExitCode;

use api::v1::teams::{AnyTeam, Teams};
use serde_json::{Value, json};

use crate::client::Client;
use crate::credentials::Options;
use crate::failure::Failure;
use crate::output::{Format, age, show, table};

#[derive(clap::Subcommand)]
pub enum Command {
    /// The teams that there are, and those that were deleted a short while ago.
    #[command(visible_alias = "ls")]
    List,
    /// End a team with all that is in it: its sandboxes, its snapshots, its keys, hosts of its own.
    Delete {
        team: String,
        /// It is meant.
        #[arg(long)]
        yes: bool,
    },
}

pub async fn run(command: Command, options: &Options, format: Format) -> Result<ExitCode, Failure> {
    match command {
        Command::List => {
            let client = Client::of_person(options).await?;
            let teams = all(&client).await?;
            show(format, &teams, |teams| {
                let head = ["ID", "NAME", "OWNER", "MEMBERS", "ACTIVE", "HOSTS", "AGE", "DELETED"];
                table(&head, teams.iter().map(row).collect())
            })?;
        }
        Command::Delete { yes: false, .. } => {
            return Err(Failure::usage("all that is in the team ends, and there is no way back: repeat it with --yes"));
        }
        Command::Delete { team, yes: true } => {
            let client = Client::of_person(options).await?;
            client.delete::<Value>(client.url(&["v1", "admin", "teams", &team])).await?;
            show(format, &json!({ "id": team, "deleted": true }), |_| format!("deleted {team}"))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

async fn all(client: &Client) -> Result<Vec<AnyTeam>, Failure> {
    let mut teams = Vec::new();
    for page in 1.. {
        let mut url = client.url(&["v1", "admin", "teams"]);
        url.set_query(Some(&format!("page={page}")));
        let found: Teams = client.get(url).await?;
        let is_last = page >= found.total_pages || found.teams.is_empty();
        teams.extend(found.teams);
        if is_last {
            break;
        }
    }
    Ok(teams)
}

fn row(team: &AnyTeam) -> Vec<String> {
    vec![
        team.id.clone(),
        team.name.clone(),
        team.owner_email.clone().unwrap_or_default(),
        team.member_count.to_string(),
        team.active_sandbox_count.to_string(),
        if team.is_byoc { team.host_count.to_string() } else { String::new() },
        age(team.created_at),
        team.deleted_at.map(|at| format!("{} ago", age(at))).unwrap_or_default(),
    ]
}
