//! `wrenn-cp`: serves, checks its settings, prints an administrator's token, or prints the OpenAPI document.

use std::process::ExitCode;

use anyhow::Context as _;
use clap::{Parser, Subcommand};
use control_plane::authority::AuthorityError;
use control_plane::config::{Config, EXIT_CONFIG, Misconfigured, Settings};
use control_plane::secrets::{Secret, SecretError};
use control_plane::tokens::Tokens;
use control_plane::{http, login, run};
use store::Store;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing::{error, info};
use tracing_subscriber::EnvFilter;

/// The control plane of Wrenn.
#[derive(Parser)]
#[command(name = "wrenn-cp", version)]
struct Arguments {
    #[command(flatten)]
    settings: Settings,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Serve (the default)
    Serve,
    /// Check the settings, and whether the database answers; change nothing
    Check,
    /// Print a token of an administrator, valid for 12 hours
    AdminToken,
    /// Print the OpenAPI document
    Openapi,
}

fn main() -> ExitCode {
    // The one of the working directory, not of some folder above it. A broken one is said, because half of it may have been taken.
    if let Err(error) = dotenvy::from_path(".env")
        && !error.not_found()
    {
        eprintln!("wrenn-cp: .env cannot be read: {error}");
        return ExitCode::from(EXIT_CONFIG);
    }
    let arguments = Arguments::parse();
    log_to_stderr();
    supervision::settings::warn_of_unknown();
    rustls::crypto::aws_lc_rs::default_provider().install_default().expect("no provider is installed before");
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("wrenn-cp: start the runtime: {error}");
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(execute(arguments)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("wrenn-cp: {error:#}");
            if is_misconfigured(&error) { ExitCode::from(EXIT_CONFIG) } else { ExitCode::FAILURE }
        }
    }
}

fn is_misconfigured(error: &anyhow::Error) -> bool {
    error.is::<Misconfigured>()
        || error.is::<SecretError>()
        || matches!(error.downcast_ref(), Some(AuthorityError::OtherSecret))
}

async fn execute(arguments: Arguments) -> anyhow::Result<()> {
    match arguments.command {
        None | Some(Command::Serve) => serve(&arguments.settings.check()?).await,
        Some(Command::Check) => run::check(&arguments.settings.check()?).await,
        Some(Command::AdminToken) => admin_token(&arguments.settings.check()?).await,
        Some(Command::Openapi) => {
            println!("{}", http::docs::document().to_pretty_json()?);
            Ok(())
        }
    }
}

async fn serve(config: &Config) -> anyhow::Result<()> {
    let mut signals = Signals::new()?;
    let serving = tokio::select! {
        serving = run::start(config) => serving?,
        () = signals.next() => {
            info!("told to end before it served");
            return Ok(());
        }
    };
    supervision::ready();
    let app = serving.app.clone();
    let alive = tokio::spawn(supervision::keep_alive_while(move || app.runs.stuck()));
    signals.next().await;
    supervision::ending();
    tokio::spawn(async move {
        signals.next().await;
        #[expect(
            clippy::disallowed_methods,
            reason = "whoever asks twice does not want to wait; what is left is taken up by others"
        )]
        std::process::exit(1);
    });
    serving.stop().await;
    alive.abort();
    if let Some(path) = &config.ready_file {
        let _ = std::fs::remove_file(path);
    }
    Ok(())
}

/// What tells a program to end.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> std::io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

async fn admin_token(config: &Config) -> anyhow::Result<()> {
    let secret = match &config.secret {
        Some(text) => Some(Secret::parse(text, "WRENN_SECRET")?),
        None => Secret::load(&config.dir)?,
    };
    let secret = secret.with_context(|| {
        format!("{} has no platform's secret; was the platform ever started there? (WRENN_DIR)", config.dir.display())
    })?;
    let store = Store::new(&config.database_url).context("read DATABASE_URL")?;
    let administrator = store.any_administrator().await.map_err(|error| {
        error!("ask the database: {error:?}");
        anyhow::anyhow!("the database at DATABASE_URL does not answer; does the platform run?")
    })?;
    let administrator = administrator.context("there is no administrator; start the platform once")?;
    let token = login::open(&store, &Tokens::new(&secret), administrator, "wrenn-cp admin-token")
        .await
        .context("make a session for the administrator")?
        .context("the administrator was disabled in this moment; try again")?;
    println!("{token}");
    Ok(())
}

fn log_to_stderr() {
    let filter = EnvFilter::try_from_env("WRENN_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    if std::env::var("WRENN_LOG_FORMAT").as_deref() == Ok("json") {
        builder.json().init();
    } else {
        builder.with_ansi(false).init();
    }
}
