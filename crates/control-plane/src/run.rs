//! A replica's life: database, secret, authority, reconcilers, port; and its end.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, bail};
use chrono::Utc;
use store::presence::Replica;
use store::{Store, StoreError};
use tokio::net::TcpListener;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{info, warn};

use crate::agents::Agents;
use crate::app::{Accounts, App, Shared};
use crate::authority::Authority;
use crate::channels::guard::Guarded;
use crate::config::Config;
use crate::events::Feed;
use crate::hints::Hint;
use crate::http::limits::Limits;
use crate::mail::Mail;
use crate::measures::{self, Runs};
use crate::oauth::Providers;
use crate::outcomes::Outcomes;
use crate::reconcile;
use crate::reconcile::driver::Driver;
use crate::reconcile::silent_hosts::Watch;
use crate::secrets::Secret;
use crate::tokens::Tokens;
use crate::{first_start, http};

/// A database that starts together with this program is there by then.
const DATABASE_TIME_MAX: Duration = Duration::from_secs(60);
const DATABASE_CURE: &str = "is PostgreSQL running, and are address, user and password right?";
const DATABASE_AGAIN: Duration = Duration::from_millis(250);
/// Operations under way are dropped at any point and taken up by another replica; this is for their last writes.
const END_TIME_MAX: Duration = Duration::from_secs(5);

/// A replica that serves.
pub struct Serving {
    pub address: SocketAddr,
    /// Where its metrics are read.
    pub metrics: Option<SocketAddr>,
    pub app: App,
    notice: Duration,
    served: tokio::task::JoinHandle<()>,
}

/// Brings a replica up to where it answers.
pub async fn start(config: &Config) -> anyhow::Result<Serving> {
    let secret = match &config.secret {
        Some(text) => Secret::parse(text, "WRENN_SECRET")?,
        None => Secret::load_or_make(&config.dir)?,
    };
    let store = Store::new(&config.database_url).context("read DATABASE_URL")?.with_rules(config.rules);
    migrated(&store).await?;
    let authority = Authority::load_or_make(&store, &secret).await?;
    if let Some((email, password)) = first_start::administrator(&store).await.context("make the first administrator")? {
        // Not a log line: logs are kept and sent elsewhere.
        eprintln!("wrenn-cp: made the administrator {email} with the password {password} (shown this once)");
    }
    if let Some(address) = &config.dev_host {
        first_start::dev_host(&store, &config.dir, address).await?;
    }
    let agents = Agents::new(&*authority.client_config(Utc::now())?, config.networks.clone());
    let stop = CancellationToken::new();
    let app = App(std::sync::Arc::new(Shared {
        outcomes: Outcomes::new(store.clone(), stop.clone()),
        feed: Feed::new(),
        limits: Limits::new(config.rates),
        tokens: Tokens::new(&secret),
        store,
        secret,
        authority,
        agents: agents.into(),
        driver: Driver::new(),
        // What one that does not work opens is nobody's.
        replica: if config.roles.workers { Replica::from_random(rand::random()) } else { Replica::idle() },
        roles: config.roles,
        runs: Runs::new(),
        dir: config.dir.clone(),
        idle_timeout_min_sec: config.idle_timeout_min_sec,
        audit_kept_days: config.audit_kept_days,
        watch: Watch::new(Instant::now()),
        silence_grace: config.silence_grace,
        accounts: Accounts {
            is_signup_open: config.accounts.is_signup_open,
            public_url: config.accounts.public_url.clone(),
            rights_every: config.accounts.rights_every,
            mail: Mail::new(config.accounts.smtp.as_ref())?,
            providers: Providers::new(&config.accounts.oauth, &config.accounts.public_url),
        },
        outbox: Hint::default(),
        notifications: Hint::default(),
        builds: Hint::default(),
        guarded: Guarded::new(config.channel_networks.clone()),
        tracker: TaskTracker::new(),
        stop,
        drain: CancellationToken::new(),
        end: CancellationToken::new(),
    }));
    let listener = TcpListener::bind(config.listen)
        .await
        .with_context(|| format!("listen on {}; is another program there? (WRENN_CP_LISTEN_ADDR)", config.listen))?;
    let address = listener.local_addr().context("ask for the port")?;
    let metrics = measured(config, &app).await?;
    reconcile::start(&app);
    let router = if config.roles.api { http::router(app.clone()) } else { http::health_alone(app.clone()) };
    let served = tokio::spawn(http::serve::serve(listener, router, app.stop.clone()));
    if let Some(path) = &config.ready_file {
        let ready = serde_json::json!({
            "addr": reachable(address).to_string(),
            "metrics": metrics.map(|address| reachable(address).to_string()),
            "pid": std::process::id(),
        });
        first_start::write_private(path, &ready.to_string()).with_context(|| format!("write {}", path.display()))?;
    }
    info!(address = %address, "serving on {address}");
    Ok(Serving { address, metrics, app, notice: config.stop_notice, served })
}

/// Serves the numbers of this process, where that is wished.
async fn measured(config: &Config, app: &App) -> anyhow::Result<Option<SocketAddr>> {
    let bound = config.metrics.bind().await.with_context(|| {
        format!("listen on {:?}; is another program there? (WRENN_METRICS_LISTEN_ADDR)", config.metrics)
    })?;
    let Some(listener) = bound else { return Ok(None) };
    let address = listener.local_addr().context("ask for the port of the metrics")?;
    let telemetry = telemetry::install(measures::TABLE, env!("CARGO_PKG_VERSION")).context("set up metrics")?;
    app.tracker.spawn(telemetry.clone().keep(app.end.clone()));
    let looking = app.clone();
    let look: telemetry::Look = Box::new(move || Box::pin(measures::look(looking.clone())));
    app.tracker.spawn(telemetry::serve(listener, telemetry, look, app.end.clone()));
    info!(metrics = %address, "metrics are read on {address}");
    Ok(Some(address))
}

/// Whether a start would find what it needs. Nothing is made, and nobody waits for a database that is not there yet.
pub async fn check(config: &Config) -> anyhow::Result<()> {
    if let Some(text) = &config.secret {
        Secret::parse(text, "WRENN_SECRET")?;
    }
    let store = Store::new(&config.database_url).context("read DATABASE_URL")?;
    if let Err(error) = store.ping().await {
        bail!("DATABASE_URL: no database answers ({}); {DATABASE_CURE}", causes(&error));
    }
    Ok(())
}

impl Serving {
    /// In order: whoever asks hears that it should get no more requests; then none is taken any more, streams are told, operations are
    /// handed back for other replicas, and requests under way may end; what does not in time is dropped.
    pub async fn stop(self) {
        info!("stopping");
        self.app.drain.cancel();
        tokio::time::sleep(self.notice).await;
        self.app.stop.cancel();
        if self.served.await.is_err() {
            warn!("the server did not end as it should");
        }
        self.app.end.cancel();
        self.app.tracker.close();
        let _ = tokio::time::timeout(END_TIME_MAX, self.app.tracker.wait()).await;
        let _ = tokio::time::timeout(END_TIME_MAX, self.app.store.close()).await;
    }
}

async fn migrated(store: &Store) -> anyhow::Result<()> {
    let began = Instant::now();
    let mut is_told = false;
    loop {
        store.follow_primary().await;
        match store.migrate().await {
            Ok(()) => return Ok(()),
            Err(error) if error.is_unavailable() && began.elapsed() < DATABASE_TIME_MAX => {
                if !std::mem::replace(&mut is_told, true) {
                    warn!("the database is not there yet: {}", causes(&error));
                }
                tokio::time::sleep(DATABASE_AGAIN).await;
            }
            Err(error) if error.is_unavailable() => {
                bail!(
                    "DATABASE_URL: no database answered within {} s ({}); {DATABASE_CURE}",
                    DATABASE_TIME_MAX.as_secs(),
                    causes(&error)
                )
            }
            Err(error) => return Err(error).context("bring the database to this version"),
        }
    }
}

fn causes(error: &StoreError) -> String {
    let mut last: &dyn std::error::Error = error;
    while let Some(source) = last.source() {
        last = source;
    }
    last.to_string()
}

/// Where a program on this machine reaches us.
fn reachable(address: SocketAddr) -> SocketAddr {
    let mut address = address;
    if address.ip().is_unspecified() {
        address.set_ip(if address.is_ipv4() { [127, 0, 0, 1].into() } else { std::net::Ipv6Addr::LOCALHOST.into() });
    }
    address
}
