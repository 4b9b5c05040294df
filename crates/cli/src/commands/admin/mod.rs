//! `wrenn admin`: what administrators of the platform do beside hosts and quotas; and `token`, an administrator's JWT, made by this machine's `wrenn-cp` from the platform's own secret. Whoever can read that
//! secret on this machine is an administrator anyway.

mod build;
mod team;
mod template;
mod user;

use std::path::Path;
use std::process::{ExitCode, Stdio};
use std::time::Duration;

use serde_json::json;

use crate::credentials::{Options, checked_header};
use crate::failure::{Doing as _, Failure};
use crate::output::{Format, show};
use crate::platform::{control_plane, layout, postgres};

const TOKEN_MAX: Duration = Duration::from_secs(30);

#[derive(clap::Subcommand)]
pub enum Command {
    /// Print an administrator's JWT, valid for a day. On the machine of the platform.
    Token,
    /// The people of the platform.
    #[command(subcommand)]
    User(user::Command),
    /// All teams of the platform.
    #[command(subcommand)]
    Team(team::Command),
    /// The templates of the platform.
    #[command(subcommand)]
    Template(template::Command),
    /// Templates of the platform in the making.
    #[command(subcommand)]
    Build(build::Command),
}

pub async fn run(command: Command, options: &Options, format: Format) -> Result<ExitCode, Failure> {
    match command {
        Command::Token => {
            let token = token(options).await?;
            show(format, &json!({ "token": token }), |_| token.clone())?;
        }
        Command::User(command) => return user::run(command, options, format).await,
        Command::Team(command) => return team::run(command, options, format).await,
        Command::Template(command) => return template::run(command, options, format).await,
        Command::Build(command) => return build::run(command, options, format).await,
    }
    Ok(ExitCode::SUCCESS)
}

/// Of the platform of the directory, or of the control plane that is installed here.
pub async fn token(options: &Options) -> Result<String, Failure> {
    match options.installed()? {
        Some(settings) => {
            let command = control_plane::command(&control_plane::program()?, &settings)?;
            asked(command, Path::new(control_plane::DIR)).await
        }
        None => token_of(&options.dir()?).await,
    }
}

/// Of the platform of `dir`, by the `wrenn-cp` beside this program.
pub async fn token_of(dir: &Path) -> Result<String, Failure> {
    let mut command = tokio::process::Command::new(layout::program("wrenn-cp")?);
    command.env("WRENN_DIR", dir).stdin(Stdio::null()).kill_on_drop(true);
    if std::env::var_os("DATABASE_URL").is_none_or(|url| url.is_empty()) {
        command.env("DATABASE_URL", postgres::url(dir));
    }
    asked(command, dir).await
}

async fn asked(mut wrenn_cp: tokio::process::Command, dir: &Path) -> Result<String, Failure> {
    let output = tokio::time::timeout(TOKEN_MAX, wrenn_cp.arg("admin-token").output())
        .await
        .map_err(|_| Failure::new(format!("wrenn-cp admin-token gave no answer within {} s", TOKEN_MAX.as_secs())))?
        .doing(|| "start wrenn-cp".to_owned())?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(Failure::new(format!(
            "no administrator's token from the platform in {}: {} (give WRENN_ADMIN_TOKEN, or run this where the platform runs)",
            dir.display(),
            said.trim().lines().last().unwrap_or("wrenn-cp said nothing")
        )));
    }
    checked_header(String::from_utf8_lossy(&output.stdout).trim().to_owned(), "what wrenn-cp admin-token printed")
}
