//! `wrenn admin user`: the people of the platform.

use std::process::ExitCode;

use api::v1::accounts::{CreateUser, Link, SetActive, SetAdministrator, User, Users};
use serde_json::json;

use crate::client::Client;
use crate::credentials::Options;
use crate::failure::Failure;
use crate::output::{Format, age, facts, show, table};

#[derive(clap::Subcommand)]
pub enum Command {
    /// The people that there are.
    #[command(visible_alias = "ls")]
    List,
    /// Make an account. What is printed is to be handed to its person, who activates it with a password of their own.
    Create {
        email: String,
        #[arg(long)]
        name: String,
    },
    /// What would be sent by mail, to be handed on: the activation of an account that is pending, else a new password.
    Link { user: String },
    /// Let a person no longer log in, and end their sessions.
    Disable { user: String },
    /// Let a person log in again.
    Enable { user: String },
    /// Make a person an administrator of the platform.
    Promote { user: String },
    /// Let a person be no administrator any more.
    Demote { user: String },
}

pub async fn run(command: Command, options: &Options, format: Format) -> Result<ExitCode, Failure> {
    let client = Client::of_person(options).await?;
    let of = |user: &str, rest: &str| client.url(&["v1", "admin", "users", user, rest]);
    match command {
        Command::List => {
            let users = all(&client).await?;
            show(format, &users, |users| {
                let head = ["ID", "EMAIL", "NAME", "STATUS", "ADMINISTRATOR", "TEAMS", "AGE"];
                table(&head, users.iter().map(row).collect())
            })?;
        }
        Command::Create { email, name } => {
            let body = CreateUser { email, name };
            let link: Link = client.post_once(client.url(&["v1", "admin", "users"]), &body).await?;
            show(format, &link, described)?;
        }
        Command::Link { user } => {
            let link: Link = client.post_once(of(&user, "link"), &json!({})).await?;
            show(format, &link, described)?;
        }
        Command::Disable { user } => {
            client.put_for_nothing(of(&user, "active"), &SetActive { active: false }).await?;
            done(format, &user, "disabled")?;
        }
        Command::Enable { user } => {
            client.put_for_nothing(of(&user, "active"), &SetActive { active: true }).await?;
            done(format, &user, "enabled")?;
        }
        Command::Promote { user } => {
            client.put_for_nothing(of(&user, "admin"), &SetAdministrator { admin: true }).await?;
            done(format, &user, "promoted")?;
        }
        Command::Demote { user } => {
            client.put_for_nothing(of(&user, "admin"), &SetAdministrator { admin: false }).await?;
            done(format, &user, "demoted")?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

async fn all(client: &Client) -> Result<Vec<User>, Failure> {
    let mut users = Vec::new();
    for page in 1.. {
        let mut url = client.url(&["v1", "admin", "users"]);
        url.set_query(Some(&format!("page={page}")));
        let found: Users = client.get(url).await?;
        let is_last = page >= found.total_pages || found.users.is_empty();
        users.extend(found.users);
        if is_last {
            break;
        }
    }
    Ok(users)
}

fn row(user: &User) -> Vec<String> {
    vec![
        user.id.clone(),
        user.email.clone(),
        user.name.clone(),
        user.status.clone(),
        if user.is_admin { "yes" } else { "" }.to_owned(),
        user.teams_joined.to_string(),
        age(user.created_at),
    ]
}

fn described(link: &Link) -> String {
    facts(&[
        ("user", link.user_id.clone()),
        ("for", link.purpose.clone()),
        ("address", link.url.clone()),
        ("token", link.token.clone()),
        ("until", link.expires_at.to_rfc3339()),
    ])
}

fn done(format: Format, id: &str, what: &str) -> Result<(), Failure> {
    show(format, &json!({ "id": id, what: true }), |_| format!("{what} {id}"))
}
