//! `wrenn account`: the person who is logged in.

use std::process::ExitCode;

use api::v1::accounts::{DeleteMe, Me};
use serde_json::json;

use crate::client::Client;
use crate::credentials::Options;
use crate::failure::Failure;
use crate::output::{Format, facts, show};
use crate::session::Session;

#[derive(clap::Subcommand)]
pub enum Command {
    /// Show who is logged in, and how they may log in.
    Show,
    /// Delete the account, with its API keys, and with the teams in which nobody else is and all that is in them.
    Delete {
        /// The account's own address, so that nobody does it by a slip.
        #[arg(long, value_name = "EMAIL")]
        confirm: String,
    },
}

pub async fn run(command: Command, options: &Options, format: Format) -> Result<ExitCode, Failure> {
    let client = Client::of_person(options).await?;
    match command {
        Command::Show => {
            let me: Me = client.get(client.url(&["v1", "me"])).await?;
            show(format, &me, |me| {
                facts(&[
                    ("user", me.user_id.clone()),
                    ("name", me.name.clone()),
                    ("email", me.email.clone()),
                    ("team", me.team_id.clone().unwrap_or_default()),
                    ("role", me.role.clone().unwrap_or_default()),
                    ("password", if me.has_password { "yes" } else { "no" }.to_owned()),
                    ("logs in by", me.providers.join(", ")),
                    ("administrator", if me.is_admin { "yes" } else { "" }.to_owned()),
                ])
            })?;
        }
        Command::Delete { confirm } => {
            let body = DeleteMe { confirmation: confirm };
            client.delete_with(client.url(&["v1", "me"]), &body).await?;
            Session::forget()?;
            show(format, &json!({ "deleted": true }), |_| "the account is deleted".to_owned())?;
        }
    }
    Ok(ExitCode::SUCCESS)
}
