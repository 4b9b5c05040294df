//! Settings of `wrenn-cp`: read once, checked at once. What is wrong is told in one message with its cure.

use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::path::PathBuf;
use std::time::Duration;

use crate::account_settings::{AccountConfig, AccountSettings};
use crate::capacity::Capacity;
use crate::networks::{Networks, NotANetwork};
use crate::rate_settings::{RateSettings, Rates};
use crate::roles::Roles;
use telemetry::Listen;

/// `sysexits.h`: something was found in an unconfigured or misconfigured state.
pub const EXIT_CONFIG: u8 = 78;

/// Guests are asked every ten seconds what they do: from here on that is precise enough, and nobody is cut off who has just paused to think.
const IDLE_TIMEOUT_MIN_SEC: u32 = 60;

/// Two years: longer than most have to show what was done, and not for ever.
const AUDIT_KEPT_DAYS: u32 = 730;
/// Load balancers ask every second or two; with what comes after it this stays below the 45 s that systemd gives.
const STOP_NOTICE_SEC: u32 = 2;
/// On loopback: the numbers are the platform's, and no tenant's business.
const METRICS_LISTEN: SocketAddr = SocketAddr::V4(SocketAddrV4::new(Ipv4Addr::LOCALHOST, 9470));

const NETWORKS_CURE: &str = "give networks with commas, such as 10.0.0.0/8,192.168.7.0/24";

#[derive(Debug, Clone, clap::Args)]
pub struct Settings {
    /// PostgreSQL, such as postgres://wrenn:wrenn@localhost:5432/wrenn
    #[arg(long, env = "DATABASE_URL", hide_env_values = true, global = true)]
    pub database_url: Option<String>,
    /// Address and port to serve on; `:8000` is all addresses, port 0 picks a free one
    #[arg(long, env = "WRENN_CP_LISTEN_ADDR", default_value = ":8000", global = true)]
    pub listen: String,
    /// Where everything of this machine is kept
    #[arg(long, env = "WRENN_DIR", default_value = "/var/lib/wrenn", global = true)]
    pub dir: PathBuf,
    /// Address and port on which Prometheus reads metrics, or off [default: 127.0.0.1:9470]
    #[arg(long, env = "WRENN_METRICS_LISTEN_ADDR", global = true)]
    pub metrics_listen: Option<String>,
    /// What this replica does: api (answers), workers (carries out), with commas, or all [default: all]
    #[arg(long, env = "WRENN_ROLES", global = true)]
    pub roles: Option<String>,
    /// For how many seconds, once told to end, it still takes requests while /health/ready says that it should get none
    #[arg(long, env = "WRENN_STOP_NOTICE_SEC", default_value_t = STOP_NOTICE_SEC, value_parser = clap::value_parser!(u32).range(0..=10), global = true)]
    pub stop_notice_sec: u32,
    /// Networks in which the addresses of hosts may lie: CIDRs with commas
    #[arg(long, env = "WRENN_HOST_NETWORKS", global = true)]
    pub host_networks: Option<String>,
    /// Networks beside the public internet in which channels (webhooks, chats) may lie: CIDRs with commas
    #[arg(long, env = "WRENN_CHANNEL_NETWORKS", global = true)]
    pub channel_networks: Option<String>,
    /// Development on one machine: make the host record for this address and leave its registration token in
    /// WRENN_DIR/dev-registration-token
    #[arg(long, env = "CP_HOST_AGENT_ADDR", global = true)]
    pub dev_host: Option<String>,
    /// The platform's secret, 64 hex digits, the same for all replicas; default: WRENN_DIR/secret, made at the first start
    #[arg(long, env = "WRENN_SECRET", hide_env_values = true, global = true)]
    pub secret: Option<String>,
    /// File that says, once this serves, where: {"addr","pid"}
    #[arg(long, global = true)]
    pub ready_file: Option<PathBuf>,
    /// For tests, which cannot wait for a minute: the shortest idle time, in seconds
    #[arg(long, env = "WRENN_TEST_IDLE_TIMEOUT_MIN_SEC", hide = true, default_value_t = IDLE_TIMEOUT_MIN_SEC, global = true)]
    pub idle_timeout_min_sec: u32,
    /// For how many days audit records are kept; 0 is for ever
    #[arg(long, env = "WRENN_AUDIT_KEPT_DAYS", default_value_t = AUDIT_KEPT_DAYS, value_parser = clap::value_parser!(u32).range(0..=36_500), global = true)]
    pub audit_kept_days: u32,
    #[command(flatten)]
    pub capacity: Capacity,
    #[command(flatten)]
    pub accounts: AccountSettings,
    #[command(flatten)]
    pub rates: RateSettings,
}

#[derive(Debug, thiserror::Error)]
#[error("{setting}: {problem}; {cure}")]
pub struct Misconfigured {
    pub setting: &'static str,
    pub problem: String,
    pub cure: &'static str,
}

pub struct Config {
    pub database_url: String,
    pub listen: SocketAddr,
    pub metrics: Listen,
    pub roles: Roles,
    pub stop_notice: Duration,
    pub dir: PathBuf,
    pub networks: Networks,
    pub channel_networks: Option<Networks>,
    pub dev_host: Option<String>,
    pub secret: Option<String>,
    pub ready_file: Option<PathBuf>,
    pub idle_timeout_min_sec: i64,
    pub audit_kept_days: u32,
    pub rules: store::Rules,
    pub silence_grace: Duration,
    pub accounts: AccountConfig,
    pub rates: Rates,
}

impl Settings {
    pub fn check(self) -> Result<Config, Misconfigured> {
        let database_url = self.database_url.filter(|url| !url.is_empty()).ok_or_else(|| Misconfigured {
            setting: "DATABASE_URL",
            problem: "is not set".to_owned(),
            cure: "set it to postgres://USER:PASSWORD@HOST:5432/DATABASE, or start the platform with `wrenn up`, which brings its own",
        })?;
        if !database_url.starts_with("postgres://") && !database_url.starts_with("postgresql://") {
            return Err(Misconfigured {
                setting: "DATABASE_URL",
                problem: "does not begin with postgres://".to_owned(),
                cure: "only PostgreSQL is supported: postgres://USER:PASSWORD@HOST:5432/DATABASE",
            });
        }
        let full = if self.listen.starts_with(':') { format!("0.0.0.0{}", self.listen) } else { self.listen.clone() };
        let listen = full.parse().map_err(|_| Misconfigured {
            setting: "WRENN_CP_LISTEN_ADDR",
            problem: format!("{:?} is not an address and a port", self.listen),
            cure: "give it as :8000, 127.0.0.1:8000 or [::1]:8000",
        })?;
        let metrics =
            Listen::parse(self.metrics_listen.as_deref(), METRICS_LISTEN).map_err(|problem| Misconfigured {
                setting: "WRENN_METRICS_LISTEN_ADDR",
                problem: problem.to_string(),
                cure: "give it as 127.0.0.1:9470 or :9470, or off",
            })?;
        let roles = self.roles.as_deref().unwrap_or_default().parse().map_err(|problem| Misconfigured {
            setting: "WRENN_ROLES",
            problem: format!("{problem}"),
            cure: "give api, workers, both with a comma between, or all",
        })?;
        let channel_networks =
            self.channel_networks.as_deref().filter(|text| !text.is_empty()).map(str::parse).transpose();
        let channel_networks = channel_networks.map_err(|error: NotANetwork| Misconfigured {
            setting: "WRENN_CHANNEL_NETWORKS",
            problem: error.to_string(),
            cure: NETWORKS_CURE,
        })?;
        let mut networks = match self.host_networks.as_deref().filter(|text| !text.is_empty()) {
            None => Networks::default(),
            Some(text) => text.parse().map_err(|problem| Misconfigured {
                setting: "WRENN_HOST_NETWORKS",
                problem: format!("{problem}"),
                cure: NETWORKS_CURE,
            })?,
        };
        let dev_host = self.dev_host.filter(|address| !address.is_empty());
        if let Some(address) = &dev_host {
            let address = address.parse::<SocketAddr>().map_err(|_| Misconfigured {
                setting: "CP_HOST_AGENT_ADDR",
                problem: format!("{address:?} is not an address and a port"),
                cure: "give it as 127.0.0.1:50051",
            })?;
            networks.allow(address.ip());
        }
        Ok(Config {
            database_url,
            listen,
            metrics,
            roles,
            stop_notice: Duration::from_secs(self.stop_notice_sec.into()),
            dir: self.dir,
            networks,
            channel_networks,
            dev_host,
            secret: self.secret.filter(|secret| !secret.is_empty()),
            ready_file: self.ready_file,
            idle_timeout_min_sec: self.idle_timeout_min_sec.max(1).into(),
            audit_kept_days: self.audit_kept_days,
            rules: self.capacity.rules()?,
            silence_grace: self.capacity.silence_grace(),
            accounts: self.accounts.check()?,
            rates: self.rates.rates(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings() -> Settings {
        Settings {
            database_url: Some("postgres://u@h/d".to_owned()),
            listen: ":8000".to_owned(),
            metrics_listen: None,
            roles: None,
            stop_notice_sec: STOP_NOTICE_SEC,
            dir: PathBuf::from("/x"),
            host_networks: None,
            channel_networks: None,
            dev_host: None,
            secret: None,
            ready_file: None,
            idle_timeout_min_sec: IDLE_TIMEOUT_MIN_SEC,
            audit_kept_days: AUDIT_KEPT_DAYS,
            capacity: Capacity::default(),
            accounts: AccountSettings::default(),
            rates: RateSettings::default(),
        }
    }

    #[test]
    fn says_which_setting_is_wrong() {
        let wrong = [
            Settings { database_url: None, ..settings() },
            Settings { database_url: Some("mysql://x".to_owned()), ..settings() },
            Settings { listen: "8000".to_owned(), ..settings() },
            Settings { metrics_listen: Some("on".to_owned()), ..settings() },
            Settings { roles: Some("api,edge".to_owned()), ..settings() },
            Settings { host_networks: Some("10.0.0.0/33".to_owned()), ..settings() },
            Settings { channel_networks: Some("10.0.0.0".to_owned()), ..settings() },
            Settings { dev_host: Some("nowhere".to_owned()), ..settings() },
        ];
        let said: Vec<&str> = wrong.map(|settings| settings.check().err().unwrap().setting).to_vec();
        assert_eq!(
            said,
            [
                "DATABASE_URL",
                "DATABASE_URL",
                "WRENN_CP_LISTEN_ADDR",
                "WRENN_METRICS_LISTEN_ADDR",
                "WRENN_ROLES",
                "WRENN_HOST_NETWORKS",
                "WRENN_CHANNEL_NETWORKS",
                "CP_HOST_AGENT_ADDR"
            ]
        );
        assert_eq!(settings().check().unwrap().listen.port(), 8000);
    }
}
