//! `wrenn up`: the whole platform on this machine, in the foreground.
//!
//! ```text
//!   preflight -> kernels and images -> PostgreSQL -> wrenn-cp -> API key -> host record -> wrenn-agent -> online: one line -> watch
//! ```
//!
//! What dies is started again. SIGTERM or Ctrl-C ends the programs and leaves sandboxes running; a second signal ends it at once.

use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use serde_json::json;
use url::Url;

use crate::client::Client;
use crate::credentials::Options;
use crate::failure::{Doing as _, Failure};
use crate::output::{Format, print_line};
use crate::platform::preflight::{self, Grade};
use crate::platform::process::Identity;
use crate::platform::programs::{Recipe, Restarted, Running};
use crate::platform::state::UpState;
use crate::platform::{artifacts, bootstrap, control_plane, layout, logs, postgres};
use crate::signals::Signals;

const CONTROL_PLANE: &str = "wrenn-cp";
const AGENT: &str = "wrenn-agent";
/// Migrations of a grown database are the slowest part.
const CONTROL_PLANE_READY_MAX: Duration = Duration::from_secs(120);
/// The agent makes a pool, proves by a boot whether KVM works, and takes up what runs.
const HOST_ONLINE_MAX: Duration = Duration::from_secs(180);
/// With PostgreSQL's 30 s, which it hardly ever takes, 45 s in all.
const PROGRAM_END_MAX: Duration = Duration::from_secs(15);
const POSTGRES_PAUSE_FIRST: Duration = Duration::from_millis(200);
const POSTGRES_PAUSE_MAX: Duration = Duration::from_secs(15);
/// A server that ran this long is taken to be well: its next start is not delayed.
const POSTGRES_WELL_AFTER: Duration = Duration::from_secs(60);
/// A program that cannot work as it is configured; to start it again is no use. (EX_CONFIG)
const EXIT_CONFIG: i32 = 78;

#[derive(clap::Args)]
pub struct Arguments {
    /// Where the API listens; port 0 takes a free one and keeps it for later starts.
    #[arg(long, default_value = "127.0.0.1:8000", value_name = "ADDR:PORT")]
    pub listen: String,
    /// Where `make images` left kernels and images [default: `current` in the cache].
    #[arg(long, value_name = "DIR")]
    pub artifacts: Option<PathBuf>,
    /// Only PostgreSQL and the control plane: hosts are elsewhere.
    #[arg(long)]
    pub no_agent: bool,
}

pub async fn run(arguments: Arguments, options: &Options, format: Format) -> Result<ExitCode, Failure> {
    let mut signals = Signals::new()?;
    let mut platform = Platform::new(&arguments, options)?;
    let started = tokio::select! {
        started = platform.start(format) => started,
        code = signals.next() => Err(Failure::new("interrupted").exiting(code)),
    };
    let outcome = match started {
        Ok(line) => match announce(format, &line, &platform.dir) {
            Ok(()) => tokio::select! {
                failure = platform.watch() => Err(failure),
                _ = signals.next() => Ok(ExitCode::SUCCESS),
            },
            Err(failure) => Err(failure),
        },
        Err(failure) => Err(failure),
    };
    tokio::select! {
        () = platform.stop() => outcome,
        // The kernel ends the programs with this one.
        _ = signals.next() => Err(Failure::new("ended at once; the next `wrenn up` or `wrenn down` tidies up")),
    }
}

fn announce(format: Format, line: &serde_json::Value, dir: &Path) -> Result<(), Failure> {
    let text = |field: &str| line[field].as_str().unwrap_or("-").to_owned();
    print_line(&match format {
        Format::Json => line.to_string(),
        Format::Human => {
            let default = dir == Path::new(crate::credentials::DIR);
            let option = if default { String::new() } else { format!(" --dir {}", dir.display()) };
            format!(
                "Wrenn is up.\n\n  API      {api}   (documentation: {api}/docs)\n  API key  {key}   (also in {dir}/cli.json)\n  host     \
                 {host}\n  logs     {dir}/logs\n\nIn another terminal:\n\n  wrenn run{option} -- python3 -c 'print(2**100)'\n\nCtrl-C ends \
                 the programs and leaves sandboxes running; `wrenn down{option}` ends those too.",
                api = text("api"),
                key = text("api_key"),
                host = text("host_id"),
                dir = dir.display(),
            )
        }
    })
}

struct Platform {
    dir: PathBuf,
    listen: SocketAddr,
    artifacts: Option<PathBuf>,
    agent_wanted: bool,
    began: Instant,
    state: UpState,
    _lock: layout::DirLock,
    postgres: Option<postgres::Server>,
    control_plane: Option<Running>,
    agent: Option<Running>,
}

impl Platform {
    fn new(arguments: &Arguments, options: &Options) -> Result<Self, Failure> {
        let dir = options.dir()?;
        let listen = control_plane::listen_address(&arguments.listen)?;
        let mut findings = preflight::platform(&dir, !arguments.no_agent);
        if !arguments.no_agent {
            findings.extend(preflight::host());
        }
        let failed: Vec<String> = findings
            .iter()
            .filter(|finding| finding.grade == Grade::Fail)
            .map(|finding| format!("  {}: {}; {}", finding.what, finding.found, finding.cure))
            .collect();
        if !failed.is_empty() {
            return Err(Failure::new(format!("this machine is not ready for `wrenn up`:\n{}", failed.join("\n"))));
        }
        layout::make_dir(&dir)?;
        let Some(lock) = layout::lock(&dir)? else {
            let who = UpState::read(&dir).running().map(|up| format!(" (process {})", up.pid)).unwrap_or_default();
            return Err(Failure::new(format!(
                "another `wrenn up` or `wrenn down` is at work in {}{who}; use another --dir for a second platform",
                dir.display()
            )));
        };
        let mut state = UpState::read(&dir);
        state.up = Identity::of(std::process::id().cast_signed());
        state.stages_ms.clear();
        Ok(Self {
            dir,
            listen,
            artifacts: arguments.artifacts.clone(),
            agent_wanted: !arguments.no_agent,
            began: Instant::now(),
            state,
            _lock: lock,
            postgres: None,
            control_plane: None,
            agent: None,
        })
    }

    /// Starts everything and gives the line that says so.
    async fn start(&mut self, format: Format) -> Result<serde_json::Value, Failure> {
        let say = |what: &str| {
            if format == Format::Human {
                eprintln!("wrenn: {what} ...");
            }
        };
        self.state.write(&self.dir)?;
        end_strays(&self.state).await;
        if self.agent_wanted {
            say("putting kernels and images into their place");
            artifacts::publish(self.artifacts.as_deref(), &self.dir).await?;
            self.stage("images");
        }
        if uses_private_postgres() {
            say("starting PostgreSQL");
            if postgres::running(&self.dir).is_none() {
                logs::begin(&self.dir, "postgres");
            }
            self.postgres = Some(postgres::start(&self.dir).await?);
            self.stage("postgres");
        }
        say("starting the control plane");
        let url = self.start_control_plane().await?;
        self.stage("control_plane");
        let administrator = bootstrap::administrator(&self.dir, &url).await?;
        let api_key = bootstrap::api_key(&self.dir, &url, &administrator).await?;
        self.stage("api_key");
        let host_id = if self.agent_wanted {
            say("starting the host agent");
            let id = self.start_agent(&url, &administrator).await?;
            self.stage("host_registered");
            Some(id)
        } else {
            None
        };
        self.state.host_id.clone_from(&host_id);
        self.stage("up");
        self.note_programs()?;
        let api = url.as_str().trim_end_matches('/').to_owned();
        // The dashboard and the edge are served by the same listener; there is no dashboard in this version.
        let domain = format!("localhost:{}", url.port_or_known_default().unwrap_or_default());
        Ok(json!({"api": api, "dashboard": null, "api_key": api_key, "domain": domain, "host_id": host_id}))
    }

    fn stage(&mut self, name: &str) {
        self.state.stages_ms.insert(name.to_owned(), self.began.elapsed().as_secs_f64() * 1000.0);
    }

    async fn start_control_plane(&mut self) -> Result<Url, Failure> {
        let kept = self.state.api_port.filter(|_| self.listen.port() == 0);
        let wanted = SocketAddr::new(self.listen.ip(), kept.unwrap_or(self.listen.port()));
        // Told here, in words, rather than by the program's log.
        let listen = match (TcpListener::bind(wanted), kept) {
            (Ok(_), _) => wanted,
            (Err(_), Some(_)) => self.listen,
            (Err(error), None) => {
                return Err(control_plane::cannot_listen(wanted, &error));
            }
        };
        logs::begin(&self.dir, CONTROL_PLANE);
        let mut program = Running::start(&self.dir, self.control_plane_recipe(listen))?;
        let ready = program.ready(CONTROL_PLANE_READY_MAX).await;
        // From here on it is ended with the rest, also when it is not ready.
        let program = self.control_plane.insert(program);
        let addr = ready?.addr;
        // A restarted control plane must be where the first one was: on the same addresses, which the ready file does not name, and on
        // the port that was free.
        let again = SocketAddr::new(listen.ip(), addr.port()).to_string();
        program
            .recipe
            .envs
            .iter_mut()
            .filter(|(name, _)| name == "WRENN_CP_LISTEN_ADDR")
            .for_each(|env| env.1.clone_from(&again));
        self.state.api_port = Some(addr.port());
        self.note_programs()?;
        let url = control_plane::url_of(addr);
        bootstrap::until_healthy(&url).await?;
        Ok(url)
    }

    fn control_plane_recipe(&self, listen: SocketAddr) -> Recipe {
        let mut envs = vec![("WRENN_CP_LISTEN_ADDR".to_owned(), listen.to_string())];
        metrics_somewhere(&mut envs, "WRENN_METRICS_LISTEN_ADDR");
        // Nothing stands in front of it that would ask.
        envs.push(("WRENN_STOP_NOTICE_SEC".to_owned(), "0".to_owned()));
        if uses_private_postgres() {
            envs.push(("DATABASE_URL".to_owned(), postgres::url(&self.dir)));
        }
        // Hosts of one machine are on its loopback, where no other host may be; an operator's own setting goes before.
        if self.agent_wanted && std::env::var_os("WRENN_HOST_NETWORKS").is_none_or(|networks| networks.is_empty()) {
            envs.push(("WRENN_HOST_NETWORKS".to_owned(), "127.0.0.0/8".to_owned()));
        }
        // Credentials of this program's user are not the control plane's business.
        let mut removed_envs = vec!["WRENN_API_KEY", "WRENN_API_URL", "WRENN_ADMIN_TOKEN"];
        if self.agent_wanted {
            // For `make dev`, where the host agent is started by hand.
            removed_envs.push("CP_HOST_AGENT_ADDR");
        }
        Recipe {
            name: CONTROL_PLANE,
            arguments: Vec::new(),
            envs,
            removed_envs,
            ready_file: self.dir.join("wrenn-cp.ready"),
        }
    }

    async fn start_agent(&mut self, url: &Url, administrator: &Client) -> Result<String, Failure> {
        let host = bootstrap::host(&self.dir, administrator).await?;
        let port = free_port(self.state.agent_port)?;
        self.state.agent_port = Some(port);
        let address = format!("127.0.0.1:{port}");
        let mut envs =
            vec![("WRENN_CP_URL".to_owned(), url.to_string()), ("WRENN_HOST_LISTEN_ADDR".to_owned(), address.clone())];
        metrics_somewhere(&mut envs, "WRENN_HOST_METRICS_LISTEN_ADDR");
        if let Some(token) = host.registration_token {
            envs.push(("WRENN_REGISTRATION_TOKEN".to_owned(), token));
        }
        let recipe = Recipe {
            name: AGENT,
            arguments: vec!["--address".to_owned(), address],
            envs,
            removed_envs: vec!["DATABASE_URL", "WRENN_API_KEY", "WRENN_API_URL", "WRENN_ADMIN_TOKEN"],
            ready_file: self.dir.join("wrenn-agent.ready"),
        };
        logs::begin(&self.dir, AGENT);
        self.agent = Some(Running::start(&self.dir, recipe)?);
        self.note_programs()?;
        self.until_online(administrator, &host.id).await?;
        // Used up: a later restart has its credentials in a file.
        let agent = self.agent.as_mut().expect("it was just started");
        agent.recipe.envs.retain(|(name, _)| name != "WRENN_REGISTRATION_TOKEN");
        Ok(host.id)
    }

    /// While it waits, the agent is watched: one that cannot start is told at once, with its last words.
    async fn until_online(&mut self, administrator: &Client, host: &str) -> Result<(), Failure> {
        let began = Instant::now();
        let mut restarts = 0;
        loop {
            if bootstrap::is_usable(&self.dir, administrator, host).await? {
                return Ok(());
            }
            let agent = self.agent.as_mut().expect("it was just started");
            if let Some(status) = agent.has_ended() {
                restarts += 1;
                if status.code() == Some(EXIT_CONFIG) || restarts > 3 {
                    return Err(agent.ended_early(status));
                }
                agent.watch().await;
            }
            if began.elapsed() > HOST_ONLINE_MAX {
                return Err(Failure::new(format!(
                    "the host is not online with its template after {} s; the end of {}:\n{}",
                    HOST_ONLINE_MAX.as_secs(),
                    logs::place(&self.dir, AGENT).display(),
                    logs::tail(&self.dir, AGENT, 15)
                )));
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Keeps everything running; comes back only when that has become senseless.
    async fn watch(&mut self) -> Failure {
        let mut tick = tokio::time::interval(logs::CHECK_EVERY);
        // Beside the others: a database that takes its time must not keep a dead program from being started again.
        let mut database = std::pin::pin!(keep_postgres(self.dir.clone(), self.postgres.take()));
        loop {
            tokio::select! {
                restarted = watch_one(&mut self.control_plane) => self.restarted(&restarted),
                restarted = watch_one(&mut self.agent) => self.restarted(&restarted),
                () = &mut database => {}
                _ = tick.tick() => {
                    for name in [CONTROL_PLANE, AGENT, "postgres"] {
                        logs::keep_bounded(&self.dir, name);
                    }
                    if !self.dir.is_dir() {
                        return Failure::new(format!("{} is gone", self.dir.display()));
                    }
                }
            }
        }
    }

    fn restarted(&mut self, restarted: &Restarted) {
        let Restarted { name, ended, problem } = restarted;
        match problem {
            None => eprintln!(
                "wrenn: {name} ended ({ended}) and was started again; its log is {}",
                logs::place(&self.dir, name).display()
            ),
            Some(problem) => eprintln!("wrenn: {name} ended ({ended}) and cannot be started: {problem}"),
        }
        if let Err(failure) = self.note_programs() {
            eprintln!("wrenn: {}", failure.message());
        }
    }

    fn note_programs(&mut self) -> Result<(), Failure> {
        let running = [&self.control_plane, &self.agent].into_iter().flatten();
        self.state.programs =
            running.filter_map(|program| Some((program.recipe.name.to_owned(), program.identity()?))).collect();
        self.state.write(&self.dir)
    }

    /// Everything ends, in the order in which the parts need each other; sandboxes go on.
    async fn stop(&mut self) {
        let programs = [self.agent.as_ref(), self.control_plane.as_ref()];
        programs.into_iter().flatten().for_each(Running::ask_to_end);
        let ends = [self.agent.as_mut(), self.control_plane.as_mut()].into_iter().flatten();
        futures::future::join_all(ends.map(|program| program.end(PROGRAM_END_MAX))).await;
        if let Some(server) = self.postgres.take() {
            server.stop().await;
        } else if uses_private_postgres() {
            postgres::stop(&self.dir).await;
        }
        self.state.up = None;
        self.state.programs.clear();
        if let Err(failure) = self.state.write(&self.dir) {
            eprintln!("wrenn: {}", failure.message());
        }
    }
}

/// Programs of an `up` that was killed end with it; this is for the moment in which they do.
async fn end_strays(state: &UpState) {
    for identity in state.programs.values() {
        if identity.signal(nix::sys::signal::Signal::SIGKILL) {
            identity.wait_end(Duration::from_secs(10)).await;
        }
    }
}

pub fn uses_private_postgres() -> bool {
    std::env::var_os("DATABASE_URL").is_none_or(|url| url.is_empty())
}

async fn watch_one(program: &mut Option<Running>) -> Restarted {
    match program {
        Some(program) => program.watch().await,
        None => std::future::pending().await,
    }
}

/// Starts PostgreSQL again whenever it ends, with growing pauses while it does not stay; never comes back.
async fn keep_postgres(dir: PathBuf, server: Option<postgres::Server>) {
    let Some(mut server) = server else { return std::future::pending().await };
    let mut pause = POSTGRES_PAUSE_FIRST;
    loop {
        let began = Instant::now();
        server.ended().await;
        if began.elapsed() > POSTGRES_WELL_AFTER {
            pause = POSTGRES_PAUSE_FIRST;
        }
        eprintln!("wrenn: PostgreSQL ended and is started again");
        server = loop {
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(POSTGRES_PAUSE_MAX);
            match postgres::start(&dir).await {
                Ok(server) => break server,
                Err(failure) => eprintln!("wrenn: {}", failure.message()),
            }
        };
    }
}

/// On a free port, which the ready file names: several platforms on one machine do not want the same. What was set goes before.
fn metrics_somewhere(envs: &mut Vec<(String, String)>, setting: &str) {
    if std::env::var_os(setting).is_none_or(|listen| listen.is_empty()) {
        envs.push((setting.to_owned(), "127.0.0.1:0".to_owned()));
    }
}

/// `:8000` stands for every address, as in WRENN_CP_LISTEN_ADDR.
/// The kept port while nobody else has it.
fn free_port(kept: Option<u16>) -> Result<u16, Failure> {
    let bind = |port| TcpListener::bind(("127.0.0.1", port)).and_then(|listener| listener.local_addr());
    if let Some(port) = kept
        && bind(port).is_ok()
    {
        return Ok(port);
    }
    bind(0).map(|address| address.port()).doing(|| "find a free port for the host agent".to_owned())
}
