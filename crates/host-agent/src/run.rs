//! From settings to a serving agent, and back down.
//!
//! Order: what can be refused at once; the lock; what an earlier agent left, before anything that may take long (finding out about KVM,
//! the control plane); then the port. When a task of the agent dies, the agent ends and is started again: nothing is lost by that.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use microvm::Driver;
use telemetry::Telemetry;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::admission::Admission;
use crate::admittance::Admittance;
use crate::agent::Agent;
use crate::config::{BadSetting, Config};
use crate::control_plane::NoClient;
use crate::credentials::{Credentials, CredentialsError, Files, HostToken};
use crate::gauges::Gauges;
use crate::heartbeat::{self, Beat, Link};
use crate::identity::{self, IdentityError, Lock, Tag};
use crate::idleness::Idleness;
use crate::machines::Machines;
use crate::preflight::{self, Missing};
use crate::real_ground::{GroundOpen, RealGround};
use crate::registration::{self, RegisterError, Registration, keep_fresh};
use crate::rpc::serve::{self, TlsError};
use crate::sandbox::Sandboxes;
use crate::sandbox::journal::{Journal, JournalError};
use crate::sandbox::snapshots::Snapshots;
use crate::sandbox::steps::{Context, blocking};
use crate::sandbox::template_generations::TemplateGenerations;
use crate::standby::Standbys;
use crate::ticket::Ticket;
use crate::vmm::{VmmError, Vmms};
use crate::{durable, measures, template, vmm};

/// How long wishes under way may take when the agent ends; what is not done by then is undone at the next start.
const SETTLE_TIME_MAX: Duration = Duration::from_secs(5);

#[derive(Debug, thiserror::Error)]
pub enum RunError {
    #[error(transparent)]
    Missing(#[from] Missing),
    #[error(transparent)]
    Setting(#[from] BadSetting),
    #[error(transparent)]
    Identity(#[from] IdentityError),
    #[error(transparent)]
    Credentials(#[from] CredentialsError),
    #[error(transparent)]
    Register(#[from] RegisterError),
    #[error(transparent)]
    NoClient(#[from] NoClient),
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error(transparent)]
    Ground(#[from] GroundOpen),
    #[error(transparent)]
    Journal(#[from] JournalError),
    #[error(transparent)]
    Vmm(#[from] VmmError),
    #[error("end what Firecracker was tried with")]
    Probe(#[source] io::Error),
    #[error("make {path}")]
    Directory {
        path: PathBuf,
        #[source]
        cause: io::Error,
    },
    #[error("listen on {address} (WRENN_HOST_LISTEN_ADDR); is another program there?")]
    Listen {
        address: SocketAddr,
        #[source]
        cause: io::Error,
    },
    #[error("listen on {address:?} for metrics (WRENN_HOST_METRICS_LISTEN_ADDR); is another program there?")]
    Metrics {
        address: telemetry::Listen,
        #[source]
        cause: io::Error,
    },
    #[error("set up metrics")]
    Telemetry(#[from] telemetry::InstallError),
    #[error("write the ready file {path}")]
    ReadyFile {
        path: PathBuf,
        #[source]
        cause: io::Error,
    },
    #[error("watch for signals")]
    Signals(#[source] io::Error),
    #[error("{0} sandboxes could not be ended")]
    Left(usize),
    #[error("the task {0} died")]
    Died(&'static str),
}

impl RunError {
    /// Starting again does not help: somebody has to change something first.
    pub fn is_config(&self) -> bool {
        match self {
            Self::Ground(error) => return error.is_config(),
            Self::Journal(error) => return error.is_config(),
            Self::Vmm(error) => return error.is_config(),
            _ => {}
        }
        matches!(
            self,
            Self::Missing(_)
                | Self::Setting(_)
                | Self::Identity(IdentityError::OtherMachine { .. } | IdentityError::Damaged { .. })
                | Self::Credentials(CredentialsError::Damaged { .. })
                | Self::Register(RegisterError::TokenRefused { .. } | RegisterError::Refused { .. })
        )
    }
}

/// What both a serving agent and `--stop-all` stand on.
pub(crate) struct Base {
    pub config: Config,
    pub tag: Tag,
    pub ground: Arc<RealGround>,
    _lock: Lock,
}

impl Base {
    pub async fn open(config: Config) -> Result<Self, RunError> {
        preflight::check()?;
        preflight::raise_descriptors();
        let dir = config.dir.clone();
        std::fs::create_dir_all(&dir).map_err(|cause| RunError::Directory { path: dir.clone(), cause })?;
        let lock = Lock::take(&dir).await?;
        let tag = identity::load_or_make(&dir, &identity::machine_id()?)?;
        let ground = Arc::new(RealGround::open(&config, &tag).await?);
        let (pool, uid) = (ground.pool_dir(), tag.uid(0));
        blocking(move || vmm::end_probe(&pool, uid)).await.map_err(RunError::Probe)?;
        Ok(Self { config, tag, ground, _lock: lock })
    }

    /// `driver` may become known later.
    pub fn sandboxes(
        &self,
        driver: watch::Receiver<Option<Arc<dyn Driver>>>,
        epoch: u64,
    ) -> Result<Arc<Sandboxes>, RunError> {
        let dir = self.config.dir.clone();
        let ground = self.ground.clone();
        let pool = self.ground.pool_dir();
        let journal = Journal::open(&pool, self.tag.as_str())
            .map_err(|cause| RunError::Directory { path: pool.clone(), cause })?;
        let snapshots =
            Snapshots::open(&pool, &journal).map_err(|cause| RunError::Directory { path: pool.clone(), cause })?;
        let template_generations = if self.config.restores {
            let opened = TemplateGenerations::open(&pool, &dir);
            Some(Arc::new(opened.map_err(|cause| RunError::Directory { path: pool.clone(), cause })?))
        } else {
            TemplateGenerations::clear(&pool).map_err(|cause| RunError::Directory { path: pool.clone(), cause })?;
            None
        };
        // They are made of those states, and by an agent that serves.
        let standbys = match self.config.standbys {
            at_most if at_most > 0 && template_generations.is_some() => {
                let opened = Standbys::open(&pool, at_most);
                Some(Arc::new(opened.map_err(|cause| RunError::Directory { path: pool.clone(), cause })?))
            }
            _ => None,
        };
        let context = Context {
            standbys,
            digests: Default::default(),
            template_generations,
            snapshots: Arc::new(snapshots),
            machines: Machines::new(dir.clone(), ground.clone(), driver),
            dir,
            tag: self.tag.clone(),
            journal,
            ground: ground.clone(),
            admission: Admission::new(self.config.max_sandboxes),
            room: Box::new(move || {
                let ground = ground.clone();
                Box::pin(async move { ground.room().await })
            }),
            changed: Arc::default(),
        };
        Ok(Sandboxes::new(Arc::new(context), epoch))
    }
}

/// Serves until SIGTERM or SIGINT. MicroVMs, namespaces and mounts stay.
pub async fn run(config: Config) -> Result<(), RunError> {
    let stop = CancellationToken::new();
    watch_signals(stop.clone())?;
    let files = Files::new(&config.dir);
    let known = files.load()?;
    let plan = Admittance::new(&config, known.as_ref())?;
    let base = Base::open(config).await?;
    // Outside of the users of slots.
    let vmms = Vmms::find(&base.config, base.ground.pool_dir(), base.tag.uid(0)).await?;
    let known = match known {
        Some(known) if known.host.cp_url != plan.cp_url => {
            info!("the control plane is at {} now", plan.cp_url);
            let moved = Credentials { host: HostToken { cp_url: plan.cp_url.clone(), ..known.host }, ..known };
            files.save(&moved)?;
            Some(moved)
        }
        known => known,
    };
    let config = &base.config;
    let (driver_sender, driver) = watch::channel(None);
    let sandboxes = base.sandboxes(driver.clone(), known.as_ref().map_or(0, |known| known.host.epoch))?;

    // The port first, so that a wrong address is known before anything is touched; served below.
    let listener =
        TcpListener::bind(config.listen).await.map_err(|cause| RunError::Listen { address: config.listen, cause })?;
    let address = listener.local_addr().map_err(|cause| RunError::Listen { address: config.listen, cause })?;
    let measured = measured(config).await?;
    sandboxes.recover().await?;

    let vmm_notes = Arc::<OnceLock<Vec<String>>>::default();
    let settle_driver = settle_driver(vmms, driver_sender, vmm_notes.clone());
    let mut tasks: JoinSet<&'static str> = JoinSet::new();
    let (credentials, driver_task) = match plan.token {
        // A registration says how the host runs sandboxes, so that has to be known.
        Some(token) => {
            settle_driver.await?;
            let mut facts = base.ground.hardware().await;
            facts.isolation = driver.borrow().as_ref().map(|driver| driver.stamp().level()).unwrap_or_default();
            facts.agent_version = env!("CARGO_PKG_VERSION").to_owned();
            facts.templates = template::names(&config.dir);
            let registration =
                Registration { files: &files, cp_url: &plan.cp_url, address: &plan.address, token: &token, facts };
            let credentials = match (registration::register(registration, &stop).await, known) {
                (Ok(credentials), _) => credentials,
                (Err(RegisterError::Stopped), _) => return Ok(()),
                (Err(error), Some(known)) => {
                    warn!("the host stays registered as it was: {error}");
                    known
                }
                (Err(error), None) => return Err(error.into()),
            };
            (credentials, None)
        }
        None => (known.expect("without a token there are credentials, or the plan had failed"), Some(settle_driver)),
    };

    sandboxes.see_epoch(credentials.host.epoch);
    let (tls_sender, tls) = watch::channel(serve::server_config(&credentials)?);
    let credentials = Arc::new(watch::channel(credentials).0);
    let (link_sender, link) = watch::channel(Link::Unknown);
    let idleness = Idleness::new(sandboxes.context().changed.clone());
    let gauges = Gauges::new(&config.dir);
    let agent = Arc::new(Agent {
        sandboxes: sandboxes.clone(),
        idleness: idleness.clone(),
        gauges: gauges.clone(),
        credentials: credentials.subscribe(),
        link,
        driver: driver.clone(),
        vmm_notes,
        cgroup_driver: base.ground.cgroup_driver(),
        ground_notes: base.ground.notes(),
        count: {
            let (ground, sandboxes) = (base.ground.clone(), sandboxes.clone());
            Box::new(move || {
                let (ground, sandboxes) = (ground.clone(), sandboxes.clone());
                Box::pin(async move {
                    let standbys = sandboxes.context().standbys.clone();
                    let slots = || standbys.as_ref().map(|all| all.slots()).unwrap_or_default();
                    ground.count(sandboxes.list().len(), slots).await
                })
            })
        },
        hardware: {
            let ground = base.ground.clone();
            Box::new(move || {
                let ground = ground.clone();
                Box::pin(async move { ground.hardware().await })
            })
        },
        seen: Arc::default(),
        looking: Arc::default(),
    });

    let task_stop = stop.child_token();
    let metrics = measured.as_ref().map(|(_, address, _)| *address);
    if let Some((listener, address, telemetry)) = measured {
        let (looking, token) = (agent.clone(), task_stop.clone());
        let look: telemetry::Look = Box::new(move || Box::pin(measures::look(looking.clone())));
        tasks.spawn(telemetry.clone().keep(token.clone()).then_name("metrics"));
        tasks.spawn(telemetry::serve(listener, telemetry, look, token).then_name("metrics"));
        info!(metrics = %address, "metrics are read on {address}");
    }
    let token = task_stop.clone();
    tasks.spawn(serve::serve(listener, crate::rpc::Service::new(agent.clone()), tls, token).then_name("serve"));
    let (token, changes) = (task_stop.clone(), credentials.subscribe());
    tasks.spawn(
        async move {
            // It waits for what may never come: without this the agent would be waited for at its end.
            token.run_until_cancelled(swap_certificates(changes, tls_sender)).await;
        }
        .then_name("certificates"),
    );
    let ticket = Ticket::load(&config.dir, &credentials.borrow().host.host_id);
    let beat = Beat {
        report: {
            let agent = agent.clone();
            Box::new(move || {
                let agent = agent.clone();
                Box::pin(async move { agent.report().await })
            })
        },
        changed: sandboxes.context().changed.clone(),
        credentials: credentials.subscribe(),
        ticket: ticket.clone(),
        epoch_seen: heartbeat::epoch_keeper(sandboxes.clone(), credentials.clone(), files.clone()),
        idle_timeouts: {
            let idleness = idleness.clone();
            Box::new(move |timeouts| idleness.tell(timeouts))
        },
        link: link_sender,
    };
    tasks.spawn(gauges.watch(sandboxes.clone(), task_stop.clone()).then_name("gauges"));
    tasks.spawn(idleness.watch(sandboxes.clone(), task_stop.clone()).then_name("idleness"));
    let (token, mut known_driver) = (task_stop.clone(), driver.clone());
    tasks.spawn(
        async move {
            // A heartbeat says how sandboxes are isolated.
            tokio::select! {
                _ = known_driver.wait_for(Option::is_some) => {}
                () = token.cancelled() => return,
            }
            if let Err(error) = heartbeat::run(beat, token).await {
                error!("{error}");
            }
        }
        .then_name("heartbeat"),
    );
    let fresh = keep_fresh(files, plan.address.clone(), credentials.clone(), ticket, task_stop.clone());
    tasks.spawn(
        async move {
            if let Err(error) = fresh.await {
                error!("{error}");
            }
        }
        .then_name("credentials"),
    );
    tasks.spawn(
        crate::orphans::watch(base.ground.clone(), sandboxes.clone(), config.orphan_grace, task_stop.clone())
            .then_name("orphans"),
    );
    tasks.spawn(base.ground.clone().keep_ready(task_stop.clone()).then_name("slots"));
    if let Some(standbys) = sandboxes.context().standbys.clone() {
        tasks.spawn(standbys.keep(sandboxes.context().clone(), task_stop.clone()).then_name("standbys"));
    }
    tasks.spawn(base.ground.clone().guard(task_stop.clone()).then_name("guard"));
    let unsettled = Arc::<OnceLock<RunError>>::default();
    if let Some(settle) = driver_task {
        // Ends when it is done; only its failure is news.
        let (failed, why) = (stop.clone(), unsettled.clone());
        tokio::spawn(async move {
            if let Err(error) = settle.await {
                error!("{error}");
                let _ = why.set(error);
                failed.cancel();
            }
        });
    }
    if let Some(path) = &config.ready_file {
        announce(path.clone(), address, metrics).await?;
    }
    supervision::ready();
    let alive = tokio::spawn(supervision::keep_alive());
    info!(%address, host.id = %agent.credentials.borrow().host.host_id, "serving on {address}");

    let died = tokio::select! {
        () = stop.cancelled() => None,
        ended = tasks.join_next() => Some(ended.and_then(Result::ok).unwrap_or("of the agent")),
    };
    info!("ending; sandboxes go on");
    supervision::ending();
    task_stop.cancel();
    sandboxes.stop(SETTLE_TIME_MAX).await;
    let _ = tokio::time::timeout(SETTLE_TIME_MAX, async { while tasks.join_next().await.is_some() {} }).await;
    alive.abort();
    if let Some(error) = Arc::into_inner(unsettled).and_then(OnceLock::into_inner) {
        return Err(error);
    }
    match died {
        Some(name) if !stop.is_cancelled() => Err(RunError::Died(name)),
        _ => Ok(()),
    }
}

/// The port for metrics, and what is told there.
async fn measured(config: &Config) -> Result<Option<(TcpListener, SocketAddr, Telemetry)>, RunError> {
    let failed = |cause| RunError::Metrics { address: config.metrics, cause };
    let Some(listener) = config.metrics.bind().await.map_err(failed)? else { return Ok(None) };
    let address = listener.local_addr().map_err(failed)?;
    Ok(Some((listener, address, telemetry::install(measures::TABLE, env!("CARGO_PKG_VERSION"))?)))
}

async fn settle_driver(
    vmms: Vmms,
    driver: watch::Sender<Option<Arc<dyn Driver>>>,
    notes: Arc<OnceLock<Vec<String>>>,
) -> Result<(), RunError> {
    let settled = vmms.settle().await?;
    let _ = notes.set(settled.notes);
    driver.send_replace(Some(settled.driver));
    Ok(())
}

async fn swap_certificates(
    mut credentials: watch::Receiver<Credentials>,
    tls: watch::Sender<Arc<rustls::ServerConfig>>,
) {
    while credentials.changed().await.is_ok() {
        let config = serve::server_config(&credentials.borrow_and_update());
        match config {
            Ok(config) => {
                tls.send_replace(config);
            }
            Err(error) => warn!("the new certificate cannot be used, the old one stays: {error}"),
        }
    }
}

async fn announce(path: PathBuf, address: SocketAddr, metrics: Option<SocketAddr>) -> Result<(), RunError> {
    let ready = serde_json::json!({
        "addr": address.to_string(),
        "metrics": metrics.map(|address| address.to_string()),
        "pid": std::process::id(),
    });
    let text = ready.to_string();
    let target = path.clone();
    blocking(move || durable::write(&target, text.as_bytes(), 0o644))
        .await
        .map_err(|cause| RunError::ReadyFile { path, cause })
}

/// The first signal ends the agent in order; the second at once, which is safe too.
fn watch_signals(stop: CancellationToken) -> Result<(), RunError> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate()).map_err(RunError::Signals)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(RunError::Signals)?;
    tokio::spawn(async move {
        for _ in 0..2 {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            if stop.is_cancelled() {
                #[expect(
                    clippy::disallowed_methods,
                    reason = "whoever asks twice wants no clean-up; the next start does it"
                )]
                std::process::exit(1);
            }
            stop.cancel();
        }
    });
    Ok(())
}

/// Names a task, so that its end can be told.
trait ThenName: Future<Output = ()> + Sized {
    async fn then_name(self, name: &'static str) -> &'static str {
        self.await;
        name
    }
}

impl<F: Future<Output = ()>> ThenName for F {}
