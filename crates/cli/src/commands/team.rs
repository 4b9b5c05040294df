//! `wrenn team`: teams, who is in them, and invitations to them.

use std::process::ExitCode;

use api::v1::accounts::SwitchTeam;
use api::v1::teams::{AddMember, ChangeRole, Invitation, Invite, Member, SetByoc, Team, TeamName, TeamWithMembers};
use serde_json::{Value, json};

use super::login::keep;
use crate::client::Client;
use crate::credentials::Options;
use crate::failure::Failure;
use crate::output::{Format, age, facts, show, table};

#[derive(clap::Subcommand)]
pub enum Command {
    /// List the teams you are in.
    #[command(visible_alias = "ls")]
    List,
    /// One team, with who is in it.
    Get { team: String },
    /// Act for another team from now on.
    Switch { team: String },
    /// Make a team, whose owner you are.
    Create { name: String },
    /// Give a team another name.
    Rename { team: String, name: String },
    /// Delete a team that has no sandboxes, no snapshots and no hosts.
    Delete { team: String },
    /// List who is in a team.
    Members { team: String },
    /// Add somebody who has an account.
    Add { team: String, email: String },
    /// Send somebody an offer to join.
    Invite {
        team: String,
        email: String,
        /// owner, admin or member.
        #[arg(long, default_value = "member")]
        role: String,
    },
    /// List offers that nobody has taken yet.
    Invitations { team: String },
    /// Take an offer back.
    Revoke { team: String, invitation: String },
    /// Join a team by the token of an offer.
    Accept { token: String },
    /// Change what somebody is in a team: owner, admin or member.
    Role { team: String, user: String, role: String },
    /// Put somebody out of a team, with the keys that they made.
    Remove { team: String, user: String },
    /// Let a team have hosts of its own, on which alone its new sandboxes are then (administrators). There is no way back.
    Byoc {
        team: String,
        /// It is meant: the team has no room for new sandboxes until it has hosts.
        #[arg(long)]
        yes: bool,
    },
    /// Go out of a team.
    Leave { team: String },
}

pub async fn run(command: Command, options: &Options, format: Format) -> Result<ExitCode, Failure> {
    let client = Client::of_person(options).await?;
    let of = |team: &str, rest: &[&str]| client.url(&[&["v1", "teams", team], rest].concat());
    match command {
        Command::List => {
            let teams: Vec<Team> = client.get(client.url(&["v1", "teams"])).await?;
            show(format, &teams, |teams| {
                let hosts = |team: &Team| if team.is_byoc { "its own" } else { "the platform's" }.to_owned();
                let row = |team: &Team| {
                    vec![team.id.clone(), team.name.clone(), team.role.clone(), hosts(team), age(team.created_at)]
                };
                table(&["ID", "NAME", "ROLE", "HOSTS", "AGE"], teams.iter().map(row).collect())
            })?;
        }
        Command::Get { team } => {
            let found: TeamWithMembers = client.get(of(&team, &[])).await?;
            show(format, &found, described)?;
        }
        Command::Switch { team } => {
            let body = SwitchTeam { team_id: team };
            let logged_in = client.post_once(client.url(&["v1", "auth", "switch-team"]), &body).await?;
            return keep(client.base(), logged_in, format);
        }
        Command::Create { name } => {
            let team: Team = client.post_once(client.url(&["v1", "teams"]), &TeamName { name }).await?;
            show(format, &team, |team| team.id.clone())?;
        }
        Command::Rename { team, name } => {
            client.patch(of(&team, &[]), &TeamName { name }).await?;
            done(format, &team, "renamed")?;
        }
        Command::Delete { team } => {
            client.delete::<Value>(of(&team, &[])).await?;
            done(format, &team, "deleted")?;
        }
        Command::Members { team } => {
            let members: Vec<Member> = client.get(of(&team, &["members"])).await?;
            show(format, &members, |members| table_of(members))?;
        }
        Command::Add { team, email } => {
            let member: Member = client.post_once(of(&team, &["members"]), &AddMember { email }).await?;
            show(format, &member, |member| member.user_id.clone())?;
        }
        Command::Invite { team, email, role } => {
            let body = Invite { email, role: Some(role) };
            let invitation: Invitation = client.post(of(&team, &["invitations"]), &body).await?;
            // Only administrators of the platform are told the token; the others' is in the mail.
            show(format, &invitation, |made| made.token.clone().unwrap_or_else(|| made.id.clone()))?;
        }
        Command::Invitations { team } => {
            let invitations: Vec<Invitation> = client.get(of(&team, &["invitations"])).await?;
            show(format, &invitations, |invitations| {
                let row = |made: &Invitation| {
                    vec![made.id.clone(), made.email.clone(), made.role.clone(), made.expires_at.to_rfc3339()]
                };
                table(&["ID", "EMAIL", "ROLE", "UNTIL"], invitations.iter().map(row).collect())
            })?;
        }
        Command::Revoke { team, invitation } => {
            client.delete::<Value>(of(&team, &["invitations", &invitation])).await?;
            done(format, &invitation, "revoked")?;
        }
        Command::Accept { token } => {
            let joined: Value =
                client.post_once(client.url(&["v1", "invitations", "accept"]), &json!({ "token": token })).await?;
            show(format, &joined, |joined| joined["team_id"].as_str().unwrap_or_default().to_owned())?;
        }
        Command::Role { team, user, role } => {
            client.patch(of(&team, &["members", &user]), &ChangeRole { role }).await?;
            done(format, &user, "changed")?;
        }
        Command::Remove { team, user } => {
            client.delete::<Value>(of(&team, &["members", &user])).await?;
            done(format, &user, "removed")?;
        }
        Command::Byoc { yes: false, .. } => {
            return Err(Failure::usage(
                "there is no way back, and the team has no room for new sandboxes until it has hosts: repeat it with --yes",
            ));
        }
        Command::Byoc { team, yes: true } => {
            client
                .put_for_nothing(client.url(&["v1", "admin", "teams", &team, "byoc"]), &SetByoc { enabled: true })
                .await?;
            done(format, &team, "byoc")?;
        }
        Command::Leave { team } => {
            client.post_only(of(&team, &["leave"])).await?;
            done(format, &team, "left")?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn described(found: &TeamWithMembers) -> String {
    let TeamWithMembers { team, members } = found;
    let of_team = facts(&[
        ("id", team.id.clone()),
        ("name", team.name.clone()),
        ("you are", team.role.clone()),
        ("hosts", if team.is_byoc { "its own" } else { "the platform's" }.to_owned()),
        ("age", age(team.created_at)),
    ]);
    format!("{of_team}\n\n{}", table_of(members))
}

fn table_of(members: &[Member]) -> String {
    let row =
        |member: &Member| vec![member.user_id.clone(), member.email.clone(), member.name.clone(), member.role.clone()];
    table(&["USER", "EMAIL", "NAME", "ROLE"], members.iter().map(row).collect())
}

fn done(format: Format, id: &str, what: &str) -> Result<(), Failure> {
    show(format, &json!({ "id": id, what: true }), |_| format!("{what} {id}"))
}
