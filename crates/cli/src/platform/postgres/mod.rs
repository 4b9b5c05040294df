//! The private PostgreSQL of `wrenn up`: a cluster in `WRENN_DIR/postgres`, made with the system's binaries, reached by a unix socket
//! in a short place that only root may open. It refuses the network.
//!
//! It outlives a killed `up` and is adopted by the next one. As root it runs as user `postgres`, confined to what it needs
//! ([`confined`]), which also lets `WRENN_DIR` lie where that user may not go.

pub mod confined;
pub mod of_system;

use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use tokio::process::Command;

use super::process::Identity;
use super::{layout, logs, process};
use crate::failure::{Doing as _, Failure};

const NAME: &str = "postgres";
const PORT: u16 = 5432;
/// initdb took 0.6 to 1.5 s; a slow disk may need much more.
const INIT_MAX: Duration = Duration::from_secs(120);
/// The recovery after a crash replays at most what lies between two checkpoints.
const START_MAX: Duration = Duration::from_secs(90);
const TOOL_MAX: Duration = Duration::from_secs(30);
/// It writes all that is not yet on disk: normally 0.1 s, on a disk that others keep busy much more.
const FAST_STOP_MAX: Duration = Duration::from_secs(20);
const CRASH_STOP_MAX: Duration = Duration::from_secs(5);

/// The address of the private cluster's database, also while it does not run.
pub fn url(dir: &Path) -> String {
    format!("postgres://wrenn@localhost:{PORT}/wrenn?host={}", layout::socket_dir(dir).display())
}

/// A running server: started by this process, or found running.
pub struct Server {
    dir: PathBuf,
    identity: Identity,
    /// Absent when it was adopted.
    child: Option<tokio::process::Child>,
}

/// Binaries of the version that the cluster has, or of the newest version that there is.
pub fn binaries(dir: &Path) -> Result<PathBuf, Failure> {
    let version = |path: &Path| path.file_name()?.to_str()?.parse::<u32>().ok();
    let mut found: Vec<(u32, PathBuf)> = std::fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| Some((version(&entry.path())?, entry.path().join("bin"))))
        .filter(|(_, bin)| bin.join("postgres").is_file() && bin.join("initdb").is_file())
        .collect();
    found.sort();
    match std::fs::read_to_string(data(dir).join("PG_VERSION")) {
        Ok(cluster) => {
            let cluster = cluster.trim();
            found.into_iter().find(|(version, _)| version.to_string() == cluster).map(|(_, bin)| bin).ok_or_else(|| {
                Failure::new(format!(
                    "the cluster in {} is of PostgreSQL {cluster}, of which there are no binaries: install postgresql-{cluster}, or \
                     move the data with pg_upgrade",
                    data(dir).display()
                ))
            })
        }
        Err(_) => found.pop().map(|(_, bin)| bin).ok_or_else(|| {
            Failure::new(
                "PostgreSQL is not installed: run scripts/setup (or apt-get install postgresql), or set DATABASE_URL",
            )
        }),
    }
}

fn home(dir: &Path) -> PathBuf {
    dir.join("postgres")
}

fn data(dir: &Path) -> PathBuf {
    home(dir).join("data")
}

/// Makes the cluster when there is none, starts or adopts its server, and makes the database.
pub async fn start(dir: &Path) -> Result<Server, Failure> {
    let bin = binaries(dir)?;
    make_places(dir)?;
    if !data(dir).is_dir() {
        make_cluster(dir, &bin).await?;
    }
    let mut server = match running(dir) {
        Some(identity) => Server { dir: dir.to_owned(), identity, child: None },
        None => launch(dir, &bin)?,
    };
    server.until_answering(&bin).await?;
    make_database(dir, &bin).await?;
    Ok(server)
}

/// The server of this directory's cluster, when one runs: also one that was just started and has not written its number down. A number
/// in `postmaster.pid` that is now another process's does not count.
pub fn running(dir: &Path) -> Option<Identity> {
    let noted = || {
        let text = std::fs::read_to_string(data(dir).join("postmaster.pid")).ok()?;
        text.lines().next()?.trim().parse::<i32>().ok()
    };
    if let Some(pid) = noted().filter(|pid| serves(*pid, dir)) {
        return Identity::of(pid);
    }
    servers(dir).first().and_then(|pid| Identity::of(*pid))
}

/// The processes of this cluster that no other one of it has started: one server. Its backends come and go with its clients.
pub fn servers(dir: &Path) -> Vec<i32> {
    let all = processes(dir);
    all.iter().copied().filter(|pid| process::parent(*pid).is_none_or(|parent| !all.contains(&parent))).collect()
}

fn processes(dir: &Path) -> Vec<i32> {
    process::all().into_iter().filter(|pid| serves(*pid, dir)).collect()
}

/// True for the postmaster and its backends.
fn serves(pid: i32, dir: &Path) -> bool {
    let facts = || {
        let program = std::fs::read_link(format!("/proc/{pid}/exe")).ok()?;
        let is_postgres = program.file_name()?.to_string_lossy().starts_with(NAME);
        let (there, ours) = (std::fs::metadata(format!("/proc/{pid}/cwd")).ok()?, std::fs::metadata(data(dir)).ok()?);
        Some(is_postgres && (there.dev(), there.ino()) == (ours.dev(), ours.ino()))
    };
    facts().unwrap_or(false)
}

/// Stops the server of a directory, whoever started it.
pub async fn stop(dir: &Path) {
    if let Some(identity) = running(dir) {
        end(&identity).await;
    }
    // Backends notice the end of a server that had to be killed by themselves, a moment later.
    let began = Instant::now();
    while !processes(dir).is_empty() && began.elapsed() < CRASH_STOP_MAX {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let socket_dir = layout::socket_dir(dir);
    // Only what is ours lies there; the folder above may be shared with other platforms.
    let _ = std::fs::remove_dir_all(&socket_dir);
    let _ = socket_dir.parent().map(std::fs::remove_dir);
}

/// SIGINT: PostgreSQL's fast shutdown. SIGQUIT: its immediate one, after which the next start recovers.
async fn end(identity: &Identity) {
    for (signal, limit) in
        [(Signal::SIGINT, FAST_STOP_MAX), (Signal::SIGQUIT, CRASH_STOP_MAX), (Signal::SIGKILL, CRASH_STOP_MAX)]
    {
        identity.signal(signal);
        if identity.wait_end(limit).await {
            return;
        }
    }
}

fn make_places(dir: &Path) -> Result<(), Failure> {
    let socket_dir = layout::socket_dir(dir);
    let mount_point = confined::mount_point(dir);
    for place in [home(dir), socket_dir.clone(), mount_point] {
        let doing = || format!("make {}", place.display());
        std::fs::create_dir_all(&place).doing(doing)?;
        std::fs::set_permissions(&place, std::fs::Permissions::from_mode(0o700)).doing(doing)?;
        if let Some(user) = confined::user()? {
            std::os::unix::fs::chown(&place, Some(user.uid.as_raw()), Some(user.gid.as_raw())).doing(doing)?;
        }
    }
    if let Some(base) = socket_dir.parent() {
        let mode = if nix::unistd::geteuid().is_root() { 0o755 } else { 0o700 };
        std::fs::set_permissions(base, std::fs::Permissions::from_mode(mode))
            .doing(|| format!("open {}", base.display()))?;
    }
    Ok(())
}

/// Made under another name and renamed: a cluster that has its name is whole.
async fn make_cluster(dir: &Path, bin: &Path) -> Result<(), Failure> {
    let unfinished = home(dir).join("data.tmp");
    if unfinished.exists() {
        std::fs::remove_dir_all(&unfinished).doing(|| format!("remove the half-made {}", unfinished.display()))?;
    }
    let inside = confined::mount_point(dir).join("data.tmp");
    let mut initdb = confined::command(dir, &bin.join("initdb"))?;
    initdb.args(["--auth=trust", "--username=postgres", "--encoding=UTF8", "--no-locale", "--pgdata"]).arg(inside);
    finish(initdb, "make the PostgreSQL cluster", INIT_MAX).await?;
    std::fs::rename(&unfinished, data(dir)).doing(|| "name the finished PostgreSQL cluster".to_owned())?;
    std::fs::File::open(home(dir))
        .and_then(|folder| folder.sync_all())
        .doing(|| "make the cluster's name durable".to_owned())
}

fn launch(dir: &Path, bin: &Path) -> Result<Server, Failure> {
    // Its number may by now be that of another PostgreSQL of the same user, for which the server would refuse to start.
    let _ = std::fs::remove_file(data(dir).join("postmaster.pid"));
    let socket_dir = layout::socket_dir(dir);
    let (out, err) = logs::stdio(dir, NAME)?;
    let mut command = confined::command(dir, &bin.join("postgres"))?;
    command.arg("-D").arg(confined::mount_point(dir).join("data"));
    for setting in [
        "listen_addresses=",
        &format!("port={PORT}"),
        &format!("unix_socket_directories={}", socket_dir.display()),
        "unix_socket_permissions=0700",
        "logging_collector=off",
        "cluster_name=wrenn",
        // One machine's control plane; enough for it and for a person with psql.
        "max_connections=100",
    ] {
        command.arg("-c").arg(setting);
    }
    command.stdin(Stdio::null()).stdout(out).stderr(err).process_group(0);
    let child = command.spawn().doing(|| "start PostgreSQL".to_owned())?;
    let pid = child.id().and_then(|pid| i32::try_from(pid).ok());
    let identity = pid.and_then(Identity::of).ok_or_else(|| Failure::new("PostgreSQL ended at once"))?;
    Ok(Server { dir: dir.to_owned(), identity, child: Some(child) })
}

impl Server {
    async fn until_answering(&mut self, bin: &Path) -> Result<(), Failure> {
        let began = Instant::now();
        loop {
            let mut ready = Command::new(bin.join("pg_isready"));
            ready.arg("--quiet").arg("--host").arg(layout::socket_dir(&self.dir)).args(["--port", &PORT.to_string()]);
            if run(ready, TOOL_MAX).await?.status.success() {
                return Ok(());
            }
            if !self.is_alive() || began.elapsed() > START_MAX {
                return Err(Failure::new(format!(
                    "PostgreSQL does not start; the end of {}:\n{}",
                    logs::place(&self.dir, NAME).display(),
                    logs::tail(&self.dir, NAME, super::programs::TAIL_LINES)
                )));
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    pub fn is_alive(&mut self) -> bool {
        // Collects it when it is our child and has ended.
        let ended = self.child.as_mut().is_some_and(|child| !matches!(child.try_wait(), Ok(None)));
        !ended && self.identity.is_alive()
    }

    /// Resolves when the server has ended. Cancel-safe.
    pub async fn ended(&mut self) {
        match &mut self.child {
            Some(child) => drop(child.wait().await),
            // Not our child: looked at, as a process that was adopted cannot be waited for.
            None => while !self.identity.wait_end(Duration::from_secs(3600)).await {},
        }
    }

    pub async fn stop(mut self) {
        if let Some(mut child) = self.child.take() {
            // Collected beside the waiting, or it would stay as a zombie that looks ended anyway.
            tokio::join!(end(&self.identity), async {
                let _ = tokio::time::timeout(FAST_STOP_MAX + 2 * CRASH_STOP_MAX, child.wait()).await;
            });
        }
        stop(&self.dir).await;
    }
}

/// The role and the database of the control plane, which is no superuser.
async fn make_database(dir: &Path, bin: &Path) -> Result<(), Failure> {
    let tool = |name: &str| {
        let mut command = Command::new(bin.join(name));
        command.arg("--host").arg(layout::socket_dir(dir)).args(["--port", &PORT.to_string(), "--no-password"]);
        command
    };
    let mut check = tool("psql");
    check.args(["--no-psqlrc", "--quiet", "--username=wrenn", "--dbname=wrenn", "--command="]);
    if run(check, TOOL_MAX).await?.status.success() {
        return Ok(());
    }
    let mut role = tool("createuser");
    role.args(["--username=postgres", "wrenn"]);
    // It may be there already, from a start that was killed here.
    run(role, TOOL_MAX).await?;
    let mut database = tool("createdb");
    database.args(["--username=postgres", "--owner=wrenn", "wrenn"]);
    finish(database, "make the database wrenn", TOOL_MAX).await
}

async fn run(mut command: Command, limit: Duration) -> Result<std::process::Output, Failure> {
    let described = format!("{:?}", command.as_std().get_program());
    command.stdin(Stdio::null()).kill_on_drop(true);
    for name in ["PGHOST", "PGPORT", "PGUSER", "PGDATABASE", "PGPASSWORD", "PGSERVICE", "PGOPTIONS", "PGSSLMODE"] {
        command.env_remove(name);
    }
    tokio::time::timeout(limit, command.output())
        .await
        .map_err(|_| Failure::new(format!("{described} did not end within {} s", limit.as_secs())))?
        .doing(|| format!("start {described}"))
}

async fn finish(command: Command, what: &str, limit: Duration) -> Result<(), Failure> {
    let output = run(command, limit).await?;
    if output.status.success() {
        return Ok(());
    }
    Err(Failure::new(format!("{what}: {}", String::from_utf8_lossy(&output.stderr).trim())))
}
