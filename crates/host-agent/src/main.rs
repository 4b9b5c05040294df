//! `wrenn-agent`: reads settings, sets up logging, runs the library.

use std::io::IsTerminal as _;
use std::process::ExitCode;

use clap::Parser as _;
use host_agent::config::{Args, Config, EXIT_CONFIG};
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    // The one of the working directory, not of some folder above it. A broken one is said, because half of it may have been taken.
    if let Err(error) = dotenvy::from_path(".env")
        && !error.not_found()
    {
        eprintln!("wrenn-agent: .env cannot be read: {error}");
        return ExitCode::from(EXIT_CONFIG);
    }
    let args = Args::parse();
    log();
    supervision::settings::warn_of_unknown();
    let config = match Config::try_from(args) {
        Ok(config) => config,
        Err(error) => return refuse(&error),
    };
    rustls::crypto::aws_lc_rs::default_provider().install_default().expect("nothing else has installed a provider");
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().thread_name("wrenn-agent").build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("wrenn-agent: start threads: {error}");
            return ExitCode::FAILURE;
        }
    };
    let result = runtime.block_on(async {
        if config.stop_all { host_agent::stop_all(config).await } else { host_agent::run(config).await }
    });
    // Blocking work that hangs in the kernel must not hold the end of the program.
    runtime.shutdown_timeout(std::time::Duration::from_secs(1));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.is_config() => refuse(&error),
        Err(error) => {
            tracing::error!("{:#}", anyhow::Error::from(error));
            ExitCode::FAILURE
        }
    }
}

fn refuse(error: &dyn std::error::Error) -> ExitCode {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    eprintln!("wrenn-agent: {text}");
    ExitCode::from(EXIT_CONFIG)
}

fn log() {
    let filter = EnvFilter::try_from_env("WRENN_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    if std::env::var("WRENN_LOG_FORMAT").is_ok_and(|format| format == "json") {
        builder.json().init();
    } else {
        // Colours are for people, not for journals and files.
        builder.with_ansi(std::io::stderr().is_terminal()).init();
    }
}
