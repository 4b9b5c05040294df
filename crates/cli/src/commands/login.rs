//! `wrenn login` and `wrenn logout`: a session for the commands of a person, kept for this user of the machine.

use std::io::{BufRead as _, IsTerminal as _, Write as _};
use std::process::ExitCode;

use api::v1::accounts::{LogIn, LoggedIn};
use nix::sys::termios::{LocalFlags, SetArg, tcgetattr, tcsetattr};
use serde_json::json;

use crate::client::{Client, Credential};
use crate::credentials::{Options, checked_header};
use crate::failure::{Doing as _, Failure};
use crate::output::{Format, show};
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
    let password = match arguments.password.filter(|password| !password.is_empty()) {
        Some(password) => password,
        None => asked_for()?,
    };
    let client = Client::new(url.clone(), Credential::None)?;
    let body = LogIn { email: arguments.email, password, cookie: false };
    let mut logged_in: LoggedIn = client.post(client.url(&["v1", "auth", "login"]), &body).await?;
    if let Some(team_id) = arguments.team {
        let client = Client::new(url.clone(), Credential::Bearer(token_of(&logged_in)?))?;
        logged_in = client.post(client.url(&["v1", "auth", "switch-team"]), &json!({ "team_id": team_id })).await?;
    }
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

/// One line, not shown while it is typed.
fn asked_for() -> Result<String, Failure> {
    let stdin = std::io::stdin();
    let mut line = String::new();
    let before = if stdin.is_terminal() {
        eprint!("Password: ");
        let _ = std::io::stderr().flush();
        let before = tcgetattr(&stdin).doing(|| "ask the terminal how it is set".to_owned())?;
        let mut silent = before.clone();
        silent.local_flags.remove(LocalFlags::ECHO);
        tcsetattr(&stdin, SetArg::TCSAFLUSH, &silent).doing(|| "silence the terminal".to_owned())?;
        Some(before)
    } else {
        None
    };
    let read = stdin.lock().read_line(&mut line);
    if let Some(before) = before {
        tcsetattr(&stdin, SetArg::TCSAFLUSH, &before).doing(|| "set the terminal as it was".to_owned())?;
        eprintln!();
    }
    read.doing(|| "read the password".to_owned())?;
    let password = line.trim_end_matches(['\r', '\n']).to_owned();
    if password.is_empty() { Err(Failure::usage("no password: give WRENN_PASSWORD, or type it")) } else { Ok(password) }
}
