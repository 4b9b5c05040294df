//! `wrenn login` and `wrenn logout`: a session for the commands of a person, kept for this user of the machine.

use std::process::ExitCode;

use api::v1::accounts::{LogIn, LoggedIn};
use serde_json::json;
use url::Url;

use crate::client::{Client, Credential};
use crate::credentials::{Options, checked_header};
use crate::failure::Failure;
use crate::output::{Format, show};
use crate::password::given_or_asked_for;
use crate::session::Session;

#[derive(clap::Args)]
pub struct Arguments {
    /// The address of the account.
    email: String,
    /// Better asked for, or given by the environment: options can be seen in process lists.
    #[arg(long, env = "WRENN_PASSWORD", hide_env_values = true)]
    password: Option<String>,
    /// The team to act for, when you are in several.
    #[arg(long, value_name = "TEAM")]
    team: Option<String>,
}

pub async fn login(arguments: Arguments, options: &Options, format: Format) -> Result<ExitCode, Failure> {
    let url = options.api_url()?;
    let password = given_or_asked_for(arguments.password, "Password")?;
    let client = Client::new(url.clone(), Credential::None)?;
    let body = LogIn { email: arguments.email, password, cookie: false };
    let mut logged_in: LoggedIn = client.post(client.url(&["v1", "auth", "login"]), &body).await?;
    if let Some(team_id) = arguments.team {
        let client = Client::new(url.clone(), Credential::Bearer(token_of(&logged_in)?))?;
        logged_in = client.post(client.url(&["v1", "auth", "switch-team"]), &json!({ "team_id": team_id })).await?;
    }
    keep(&url, logged_in, format)
}

/// Writes the session down, for the commands that come after.
pub fn keep(url: &Url, logged_in: LoggedIn, format: Format) -> Result<ExitCode, Failure> {
    let session = Session {
        api_url: url.as_str().trim_end_matches('/').to_owned(),
        token: token_of(&logged_in)?,
        email: logged_in.email,
        team_id: logged_in.team_id,
        expires_at: logged_in.expires_at,
    };
    let place = session.keep()?;
    let told = json!({
        "email": session.email, "team_id": session.team_id, "expires_at": session.expires_at, "kept_in": place,
    });
    show(format, &told, |_| {
        format!("logged in as {} until {}, for {}", session.email, session.expires_at.to_rfc3339(), session.team_id)
    })?;
    Ok(ExitCode::SUCCESS)
}

pub async fn logout(options: &Options, format: Format) -> Result<ExitCode, Failure> {
    if let Some(session) = Session::kept()? {
        let url = options.api_url()?;
        let client = Client::new(url, Credential::Bearer(checked_header(session.token, "the session's token")?))?;
        match client.post_only(client.url(&["v1", "auth", "logout"])).await {
            // It has ended already.
            Err(error) if error.code() == Some("unauthorized") => {}
            ended => ended?,
        }
    }
    Session::forget()?;
    show(format, &json!({ "logged_out": true }), |_| "logged out".to_owned())?;
    Ok(ExitCode::SUCCESS)
}

fn token_of(logged_in: &LoggedIn) -> Result<String, Failure> {
    let token = logged_in.token.clone().ok_or_else(|| Failure::new("the control plane answered without a token"))?;
    checked_header(token, "the token of the control plane")
}
