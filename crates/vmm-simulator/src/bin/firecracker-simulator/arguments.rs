//! The real program's arguments that we use. One that is not here is refused, as the real one refuses what it does not know.

use std::path::PathBuf;

use anyhow::{Context as _, ensure};
use clap::Parser;

use crate::config::Level;

const ID_LENGTH_MAX: usize = 64;

#[derive(Debug, Parser)]
#[command(name = "firecracker", disable_version_flag = true)]
pub struct Arguments {
    #[arg(long, default_value = "anonymous-instance")]
    pub id: String,
    #[arg(long, default_value = "/run/firecracker.socket")]
    pub api_sock: PathBuf,
    #[arg(long)]
    pub level: Option<String>,
    #[arg(long)]
    pub log_path: Option<PathBuf>,
    /// The jailer's clocks at its start; they only matter to metrics.
    #[arg(long)]
    pub start_time_us: Option<u64>,
    #[arg(long)]
    pub start_time_cpu_us: Option<u64>,
    #[arg(long)]
    pub parent_cpu_time_us: Option<u64>,
    #[arg(long)]
    pub no_seccomp: bool,
    #[arg(long)]
    pub enable_pci: bool,
    #[arg(long, default_value_t = 51200)]
    pub http_api_max_payload_size: usize,
    #[arg(long)]
    pub mmds_size_limit: Option<usize>,
    #[arg(long)]
    pub version: bool,
    #[arg(long)]
    pub snapshot_version: bool,
    #[arg(long)]
    pub describe_snapshot: Option<PathBuf>,
}

impl Arguments {
    pub fn check_id(&self) -> anyhow::Result<()> {
        let fits = (1..=ID_LENGTH_MAX).contains(&self.id.len())
            && self.id.chars().all(|c| c == '-' || c.is_ascii_alphanumeric());
        ensure!(fits, "Invalid instance ID: {}", self.id);
        Ok(())
    }

    pub fn level(&self) -> anyhow::Result<Option<Level>> {
        let level = self.level.as_deref().map(|name| serde_json::from_value(name.into()));
        level.transpose().context("Invalid value for --level")
    }
}
