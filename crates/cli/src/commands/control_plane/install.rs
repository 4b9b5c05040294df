//! `wrenn control-plane install`: makes this machine the control plane: puts program, settings, user and service into place, with a database
//! of the system's PostgreSQL where one is asked for, and waits until it answers. Repeated, it changes what is given and keeps the rest.
//!
//! It makes no secret: the control plane makes the platform's at its first start, in its own directory, and never another one.

use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use serde::Serialize;
use url::Url;

use crate::client::{Client, Credential};
use crate::commands::{doctor, version};
use crate::credentials::Options;
use crate::failure::{Doing as _, Failure};
use crate::output::{Format, show};
use crate::platform::control_plane::{self, DATABASE, DIR, LISTEN, LISTEN_DEFAULT, SERVICE, SETTINGS, USER};
use crate::platform::preflight::Finding;
use crate::platform::service::{self, Files, Settings};
use crate::platform::{bootstrap, postgres};

const HEAD: &str = "Settings of the control plane; their names are in .env.example. `wrenn control-plane install --set NAME=VALUE` changes them.";
const NETWORKS: &str = "WRENN_HOST_NETWORKS";
/// The database has a few seconds to answer.
const CHECK_MAX: Duration = Duration::from_secs(30);

#[derive(clap::Args)]
pub struct Arguments {
    /// PostgreSQL. Better given by the environment, where no process list shows its password.
    #[arg(long, value_name = "URL", env = "DATABASE_URL", hide_env_values = true)]
    database_url: Option<String>,
    /// Make role and database in the PostgreSQL of this machine, as Debian sets it up.
    #[arg(long)]
    local_database: bool,
    /// Where the API listens [default: :8000, all addresses].
    #[arg(long, value_name = "ADDR:PORT", env = "WRENN_CP_LISTEN_ADDR")]
    listen: Option<String>,
    /// Networks in which hosts may lie: CIDRs with commas [default: all but loopback, link-local and their like].
    #[arg(long, value_name = "CIDRS", env = "WRENN_HOST_NETWORKS")]
    host_networks: Option<String>,
    /// A setting of the control plane, such as WRENN_LOG=debug; may be repeated. The names are in .env.example.
    #[arg(long = "set", value_name = "NAME=VALUE")]
    settings: Vec<String>,
    /// Put everything into place and start nothing.
    #[arg(long)]
    no_start: bool,
    /// Below this directory instead of `/`: to look at what would be put into place. Starts nothing, makes no user and no database.
    #[arg(long, default_value = "/", value_name = "DIR")]
    root: PathBuf,
}

#[derive(Serialize)]
struct Installed {
    findings: Vec<Finding>,
    /// What was put into place.
    files: Vec<String>,
    /// Where it answers on this machine.
    url: Url,
    /// It answers there, and so does its database.
    running: bool,
    /// What is left to do, for a person.
    next: String,
}

pub async fn run(arguments: &Arguments, options: &Options, format: Format) -> Result<ExitCode, Failure> {
    if let Some(dir) = options.dir.as_ref().filter(|dir| *dir != Path::new(DIR)) {
        return Err(Failure::usage(format!(
            "the control plane keeps its data in {DIR}, where its unit lets it write: leave --dir and WRENN_DIR ({}) away",
            dir.display()
        )));
    }
    let mut files = Files::below(&arguments.root);
    let mut settings = wanted(arguments)?.over(Settings::read(&files.at(SETTINGS))?);
    if settings.get(DATABASE).is_none() && !arguments.local_database {
        return Err(Failure::usage(
            "--database-url or --local-database is missing: the first time one has to be given",
        ));
    }
    let listen = settings.get(LISTEN).unwrap_or(LISTEN_DEFAULT).to_owned();
    let address = control_plane::listen_address(&listen)?;
    if address.port() == 0 {
        return Err(Failure::usage(format!("--listen is {listen:?}: hosts have to find it again, so give a port")));
    }
    settings.put(LISTEN, listen)?;
    let url = control_plane::url_of(address);
    let is_here = arguments.root == Path::new("/");
    if is_here {
        service::only_root()?;
        is_free(address, &url).await?;
        service::make_user(USER, DIR)?;
    }
    if arguments.local_database {
        let database =
            if is_here { postgres::of_system::database(USER).await? } else { postgres::of_system::url(USER) };
        settings.put(DATABASE, database)?;
    }
    let program = SERVICE.place(&mut files)?;
    if is_here {
        checked(Path::new(&program), &settings).await?;
    }
    files.write(SETTINGS, settings.text(HEAD).as_bytes(), 0o600)?;
    let findings = SERVICE.hidden(&program, &arguments.root).into_iter().collect();
    let (running, next) = if arguments.no_start || !is_here {
        (false, SERVICE.later())
    } else if !service::has_systemd() {
        (false, by_hand(&program))
    } else {
        SERVICE.start().await?;
        bootstrap::until_healthy(&url).await?;
        (true, first_steps(&url))
    };
    show(format, &Installed { findings, files: files.written, url, running, next }, in_words)?;
    Ok(ExitCode::SUCCESS)
}

fn wanted(arguments: &Arguments) -> Result<Settings, Failure> {
    let given = |value: &Option<String>| value.clone().filter(|value| !value.is_empty());
    let mut all = Settings::default();
    if let Some(url) = given(&arguments.database_url) {
        if arguments.local_database {
            return Err(Failure::usage(
                "--database-url (or DATABASE_URL) and --local-database are two databases: give one",
            ));
        }
        // It is not told again: there may be a password in it.
        Url::parse(&url).ok().filter(|url| matches!(url.scheme(), "postgres" | "postgresql")).ok_or_else(|| {
            Failure::usage(
                "--database-url is no address of PostgreSQL: give postgres://USER:PASSWORD@HOST:5432/DATABASE",
            )
        })?;
        all.put(DATABASE, url)?;
    }
    if let Some(listen) = given(&arguments.listen) {
        all.put(LISTEN, listen)?;
    }
    if let Some(networks) = given(&arguments.host_networks) {
        all.put(NETWORKS, networks)?;
    }
    all.put_given(&arguments.settings)?;
    Ok(all)
}

/// Told here, in words, rather than by the service's log. The one that is being installed again may be there.
async fn is_free(address: SocketAddr, url: &Url) -> Result<(), Failure> {
    let Err(error) = TcpListener::bind(address) else { return Ok(()) };
    let is_ours = control_plane::installed().and_then(|settings| control_plane::url(&settings).ok());
    if is_ours.as_ref() == Some(url) && version::of_server(Client::new(url.clone(), Credential::None)?).await.is_some()
    {
        return Ok(());
    }
    Err(control_plane::cannot_listen(address, &error))
}

/// By the program itself, as the user that it will have: it knows what it takes, and whether the database lets it in.
async fn checked(program: &Path, settings: &Settings) -> Result<(), Failure> {
    let mut command = control_plane::command(program, settings)?;
    let output = tokio::time::timeout(CHECK_MAX, command.arg("check").output())
        .await
        .map_err(|_| Failure::new(format!("wrenn-cp check gave no answer within {} s", CHECK_MAX.as_secs())))?
        .doing(|| format!("start {}", program.display()))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let said = said.trim().lines().last().unwrap_or("wrenn-cp said nothing");
    Err(Failure::new(said.strip_prefix("wrenn-cp: ").unwrap_or(said)))
}

fn by_hand(program: &str) -> String {
    format!(
        "systemd does not run here, so nothing was started. By hand:\n  install -d -m 700 -o {USER} -g {USER} {DIR}\n  \
         set -a; . /{SETTINGS}; WRENN_DIR={DIR} HOME={DIR}; set +a\n  cd / && runuser -u {USER} --preserve-environment -- {program}"
    )
}

fn first_steps(url: &Url) -> String {
    format!(
        "The control plane answers at {url} (documentation: {url}docs). On this machine, as root:\n  \
         journalctl -u {unit} | grep administrator   # the first administrator's password, which is shown once\n  \
         wrenn host add                                   # a token for a host, and what to type there\n  \
         wrenn key create                                 # an API key, for WRENN_API_KEY",
        unit = SERVICE.program
    )
}

fn in_words(installed: &Installed) -> String {
    let mut lines: Vec<String> = doctor::lines(&installed.findings);
    lines.extend(installed.files.iter().map(|file| format!("wrote {file}")));
    lines.push(installed.next.clone());
    lines.join("\n")
}
