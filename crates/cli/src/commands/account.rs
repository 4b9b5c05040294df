//! `wrenn account`: how a person gets an account, and the person who is logged in.

use std::process::ExitCode;

use api::v1::accounts::{
    Activate, ChangePassword, ConfirmReset, DeleteMe, LoggedIn, Me, Rename, ResetPassword, Session as ApiSession,
    SignUp,
};
use serde_json::{Value, json};

use super::login::keep;
use crate::client::{Client, Credential};
use crate::credentials::Options;
use crate::failure::Failure;
use crate::output::{Format, age, facts, show, table};
use crate::password::given_or_asked_for;
use crate::session::Session;

#[derive(clap::Subcommand)]
pub enum Command {
    /// Show who is logged in, and how they may log in.
    Show,
    /// Ask for an account, where sign-up is open or an invitation is at hand. The password comes from WRENN_PASSWORD, or is asked for.
    #[command(name = "signup")]
    SignUp {
        email: String,
        #[arg(long)]
        name: String,
        /// The token of an invitation: the account is active at once.
        #[arg(long, value_name = "TOKEN")]
        invitation: Option<String>,
        /// Better asked for, or given by the environment: options can be seen in process lists.
        #[arg(long, env = "WRENN_PASSWORD", hide_env_values = true)]
        password: Option<String>,
    },
    /// Activate an account by the token of its link, and log in.
    Activate {
        token: String,
        /// The account was made by an administrator and has no password yet: give it this one, or be asked for it.
        #[arg(long)]
        set_password: bool,
        #[arg(long, env = "WRENN_PASSWORD", hide_env_values = true, requires = "set_password")]
        password: Option<String>,
    },
    /// Have a link sent for a new password, when the old one is lost.
    Reset { email: String },
    /// Set the new password by the token of that link.
    ConfirmReset {
        token: String,
        #[arg(long, env = "WRENN_NEW_PASSWORD", hide_env_values = true)]
        new_password: Option<String>,
    },
    /// Take another name.
    Rename { name: String },
    /// Change the password, or set the first one. All other sessions end.
    Password {
        /// Better asked for, or given by the environment: options can be seen in process lists.
        #[arg(long, env = "WRENN_PASSWORD", hide_env_values = true)]
        password: Option<String>,
        #[arg(long, env = "WRENN_NEW_PASSWORD", hide_env_values = true)]
        new_password: Option<String>,
    },
    /// Where one is logged in.
    Sessions,
    /// End a session: what it was used by is logged out at once.
    EndSession { id: String },
    /// Log in by another site no more: github, oidc.
    Disconnect { provider: String },
    /// Delete the account, with its API keys, and with the teams in which nobody else is and all that is in them.
    Delete {
        /// The account's own address, so that nobody does it by a slip.
        #[arg(long, value_name = "EMAIL")]
        confirm: String,
    },
}

pub async fn run(command: Command, options: &Options, format: Format) -> Result<ExitCode, Failure> {
    match command {
        Command::SignUp { email, name, invitation, password } => {
            let client = of_nobody(options)?;
            let password = given_or_asked_for(password, "Password of the new account")?;
            let body = SignUp { email, password, name, invitation };
            let said: Value = client.post_once(client.url(&["v1", "auth", "signup"]), &body).await?;
            // With an invitation it is a session, else a word about the mail that was sent.
            if let Ok(logged_in) = serde_json::from_value::<LoggedIn>(said.clone()) {
                return keep(client.base(), logged_in, format);
            }
            show(format, &said, |said| said["message"].as_str().unwrap_or_default().to_owned())?;
            return Ok(ExitCode::SUCCESS);
        }
        Command::Activate { token, set_password, password } => {
            let client = of_nobody(options)?;
            let password =
                if set_password { Some(given_or_asked_for(password, "Password of the account")?) } else { None };
            let body = Activate { token, password };
            let logged_in = client.post_once(client.url(&["v1", "auth", "activate"]), &body).await?;
            return keep(client.base(), logged_in, format);
        }
        Command::Reset { email } => {
            let client = of_nobody(options)?;
            client.post_for_nothing(client.url(&["v1", "me", "password", "reset"]), &ResetPassword { email }).await?;
            show(format, &json!({ "asked": true }), |_| {
                "if there is such an account, a link is on its way".to_owned()
            })?;
            return Ok(ExitCode::SUCCESS);
        }
        Command::ConfirmReset { token, new_password } => {
            let client = of_nobody(options)?;
            let new_password = given_or_asked_for(new_password, "New password")?;
            let body = ConfirmReset { token, new_password };
            client.post_once_for_nothing(client.url(&["v1", "me", "password", "reset", "confirm"]), &body).await?;
            show(format, &json!({ "changed": true }), |_| "the password is changed".to_owned())?;
            return Ok(ExitCode::SUCCESS);
        }
        command => of_person(command, options, format).await?,
    }
    Ok(ExitCode::SUCCESS)
}

fn of_nobody(options: &Options) -> Result<Client, Failure> {
    Client::new(options.api_url()?, Credential::None)
}

async fn of_person(command: Command, options: &Options, format: Format) -> Result<(), Failure> {
    let client = Client::of_person(options).await?;
    match command {
        Command::SignUp { .. } | Command::Activate { .. } | Command::Reset { .. } | Command::ConfirmReset { .. } => {}
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
        Command::Rename { name } => {
            let _: Value = client.patch_for(client.url(&["v1", "me"]), &Rename { name: name.clone() }).await?;
            show(format, &json!({ "name": name }), |_| name.clone())?;
        }
        Command::Password { password, new_password } => {
            let me: Me = client.get(client.url(&["v1", "me"])).await?;
            let current_password = match me.has_password {
                true => Some(given_or_asked_for(password, "Present password")?),
                false => None,
            };
            let new_password = given_or_asked_for(new_password, "New password")?;
            let confirm_password = (!me.has_password).then(|| new_password.clone());
            let body = ChangePassword { current_password, new_password, confirm_password };
            client.post_once_for_nothing(client.url(&["v1", "me", "password"]), &body).await?;
            show(format, &json!({ "changed": true }), |_| {
                "the password is changed; other sessions have ended".to_owned()
            })?;
        }
        Command::Sessions => {
            let sessions: Vec<ApiSession> = client.get(client.url(&["v1", "me", "sessions"])).await?;
            show(format, &sessions, |sessions| {
                table(&["ID", "THIS", "KIND", "AGE", "SEEN", "UNTIL"], sessions.iter().map(row).collect())
            })?;
        }
        Command::EndSession { id } => {
            client.delete::<Value>(client.url(&["v1", "me", "sessions", &id])).await?;
            show(format, &json!({ "id": id, "ended": true }), |_| format!("ended {id}"))?;
        }
        Command::Disconnect { provider } => {
            client.delete::<Value>(client.url(&["v1", "me", "providers", &provider])).await?;
            show(format, &json!({ "provider": provider, "disconnected": true }), |_| {
                format!("disconnected {provider}")
            })?;
        }
        Command::Delete { confirm } => {
            let body = DeleteMe { confirmation: confirm };
            client.delete_with(client.url(&["v1", "me"]), &body).await?;
            Session::forget()?;
            show(format, &json!({ "deleted": true }), |_| "the account is deleted".to_owned())?;
        }
    }
    Ok(())
}

fn row(session: &ApiSession) -> Vec<String> {
    vec![
        session.id.clone(),
        if session.current { "this one" } else { "" }.to_owned(),
        if session.browser { "browser" } else { "token" }.to_owned(),
        age(session.created_at),
        format!("{} ago", age(session.last_seen_at)),
        session.expires_at.to_rfc3339(),
    ]
}
