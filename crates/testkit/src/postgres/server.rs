//! One private cluster and its server, driven by PostgreSQL's own programs. It blocks; [`super::Database`] is for async tests.

use std::fs::File;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, Once, PoisonError, Weak};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, User, geteuid};

use super::place;
use crate::keeper;

const PORT: u16 = 5432;
/// Who owns the databases of tests: no superuser, as in the product.
const ROLE: &str = "wrenn";
/// The start takes 0.1 s; the machine may be compiling.
const START_MAX: Duration = Duration::from_secs(60);
/// A fast shutdown takes 0.1 s; what comes after it is harsher.
const STOP_MAX: Duration = Duration::from_secs(10);
/// For so long the processes of a server that was killed may be there after it.
const LEFT_MAX: Duration = Duration::from_secs(10);
/// Between two looks at something that ends or begins within a tenth of a second.
const LOOK: Duration = Duration::from_millis(10);
/// Lines of the server's log that are shown when it does not start.
const LOG_LINES: usize = 20;
/// Nothing of a test's data needs to outlive the machine. A standby may follow each of them.
const SETTINGS: [&str; 12] = [
    "listen_addresses=",
    "unix_socket_permissions=0700",
    "max_connections=200",
    "shared_buffers=32MB",
    "fsync=off",
    "synchronous_commit=off",
    "full_page_writes=off",
    "wal_level=replica",
    "max_wal_senders=4",
    // In the cluster's directory, not in /dev/shm, where a killed server would leave it.
    "dynamic_shared_memory_type=mmap",
    "logging_collector=off",
    "timezone=UTC",
];

/// How a server ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// Connections are told, and what is written lies on disk.
    Fast,
    /// All at once; the next start reads the log.
    Immediate,
    /// `kill -9` of the first process; the others notice.
    Kill,
}

/// Those that are there, for the clean-up at exit.
static SERVERS: Mutex<Vec<Weak<Cluster>>> = Mutex::new(Vec::new());

/// A running PostgreSQL that ends, and whose directory goes, with its last handle or with this process.
#[derive(Clone)]
pub struct Server {
    cluster: Arc<Cluster>,
}

struct Cluster {
    bin: PathBuf,
    dir: PathBuf,
    /// As which the server runs; none when this process is not root.
    user: Option<User>,
    /// None while it is stopped.
    child: Mutex<Option<Child>>,
}

impl Server {
    /// Makes a cluster and starts its server. Blocks until it answers.
    pub fn start() -> Result<Self> {
        place::sweep();
        let bin = binaries()?;
        let user = user()?;
        let dir = place::make(user.as_ref())?;
        let server = Self { cluster: Arc::new(Cluster { bin, dir, user, child: Mutex::new(None) }) };
        clean_up_at_exit(&server.cluster);
        server.cluster.init()?;
        server.resume()?;
        finish(server.psql("postgres", "postgres").args(["--command", &format!("create role {ROLE} login")]))?;
        Ok(server)
    }

    /// Starts the server again after [`Server::stop`]. Blocks until it answers.
    pub fn resume(&self) -> Result<()> {
        let mut child = self.cluster.child();
        if child.is_some() {
            return Ok(());
        }
        *child = Some(self.cluster.launch()?);
        let began = Instant::now();
        while !succeeds(self.command("pg_isready").arg("--quiet"))? {
            let ended = child.as_mut().and_then(|child| child.try_wait().ok().flatten());
            let elapsed = began.elapsed();
            ensure!(
                elapsed < START_MAX && (ended.is_none() || elapsed < LEFT_MAX),
                "PostgreSQL does not start:\n{}",
                self.cluster.log()
            );
            std::thread::sleep(LOOK);
            if ended.is_some() {
                // Processes of the one that was killed still hold its memory.
                *child = Some(self.cluster.launch()?);
            }
        }
        Ok(())
    }

    /// Ends the server and keeps its data. Open connections are ended.
    pub fn stop(&self) -> Result<()> {
        self.stop_by(Stop::Fast)
    }

    pub fn stop_by(&self, stop: Stop) -> Result<()> {
        self.cluster.stop(stop)
    }

    /// The socket by which it is reached.
    pub fn socket(&self) -> PathBuf {
        self.cluster.dir.join(format!(".s.PGSQL.{PORT}"))
    }

    /// Another server with a copy of the data of this one, which must not run. It is not started.
    pub fn copy(&self) -> Result<Self> {
        ensure!(self.cluster.child().is_none(), "only what lies still can be copied");
        let copy = self.beside()?;
        finish(plain(Path::new("/bin/cp")).arg("-a").arg(self.cluster.data()).arg(copy.cluster.data()))?;
        Ok(copy)
    }

    /// Another server, which follows the log of this one as a hot standby. `port` of the loopback leads to this one's socket, for the
    /// backup and for the stream. Blocks until it answers.
    pub fn standby(&self, port: u16) -> Result<Self> {
        let standby = self.beside()?;
        let mut backup = plain(&self.cluster.bin.join("pg_basebackup"));
        backup.args(["--host=127.0.0.1", "--username=postgres", "--no-password", "--no-sync", "--checkpoint=fast"]);
        backup.args(["--wal-method=stream", "--write-recovery-conf"]).arg(format!("--port={port}"));
        finish(standby.cluster.as_user(&mut backup).arg("--pgdata").arg(standby.cluster.data()))?;
        standby.resume()?;
        Ok(standby)
    }

    /// A standby takes writes from now on. Blocks until it does.
    pub fn promote(&self) -> Result<()> {
        let promoted = self.administer("select pg_promote()")?;
        ensure!(promoted == "t", "the standby is not promoted: {promoted:?}");
        Ok(())
    }

    /// With an empty directory.
    fn beside(&self) -> Result<Self> {
        let dir = place::make(self.cluster.user.as_ref())?;
        let (bin, user) = (self.cluster.bin.clone(), self.cluster.user.clone());
        let server = Self { cluster: Arc::new(Cluster { bin, dir, user, child: Mutex::new(None) }) };
        clean_up_at_exit(&server.cluster);
        Ok(server)
    }

    /// Writes the database into a file, as `pg_dump` does it while others work.
    pub fn dump(&self, database: &str, file: &Path) -> Result<()> {
        let mut dump = self.command("pg_dump");
        let kind = ["--username", ROLE, "--format=custom", "--no-password", "--dbname", database];
        let text = dump.args(kind).stdout(File::create(file).context("make the file of the dump")?).output();
        let output = text.context("start pg_dump")?;
        ensure!(output.status.success(), "pg_dump: {}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    }

    /// Puts what [`Server::dump`] wrote in the place of the database. Open connections to it are ended.
    pub fn restore(&self, database: &str, file: &Path) -> Result<()> {
        self.administer(&format!("drop database {database} with (force)"))?;
        self.create_database(database)?;
        let mut restore = self.command("pg_restore");
        restore.args(["--username", ROLE, "--no-password", "--no-owner", "--exit-on-error", "--dbname", database]);
        finish(restore.stdin(File::open(file).context("open the dump")?)).map(drop)
    }

    /// A statement as the superuser.
    pub fn administer(&self, statement: &str) -> Result<String> {
        finish(self.psql("postgres", "postgres").args(["--no-align", "--tuples-only", "--command", statement]))
    }

    /// An empty database and its url.
    pub fn create_database(&self, name: &str) -> Result<String> {
        let statement = format!("create database {name} owner {ROLE} template template0");
        finish(self.psql("postgres", "postgres").args(["--command", &statement]))?;
        Ok(format!("postgres://{ROLE}@localhost:{PORT}/{name}?host={}", self.cluster.dir.display()))
    }

    /// Runs the statements of a file in one transaction, as the owner of the databases.
    pub fn run_file(&self, database: &str, file: &Path) -> Result<()> {
        let mut psql = self.psql(ROLE, database);
        finish(psql.arg("--single-transaction").arg("--file").arg(file)).map(drop)
    }

    /// What statements answer, as the owner of the databases: a row is a line, columns are parted by `|`.
    pub fn query(&self, database: &str, statements: &str) -> Result<String> {
        let mut psql = self.psql(ROLE, database);
        finish(psql.args(["--no-align", "--tuples-only", "--command", statements]))
    }

    fn psql(&self, role: &str, database: &str) -> Command {
        let mut command = self.command("psql");
        command.args(["--no-psqlrc", "--quiet", "--no-password", "--set=ON_ERROR_STOP=1"]);
        command.args(["--username", role, "--dbname", database]);
        command
    }

    fn command(&self, program: &str) -> Command {
        let mut command = plain(&self.cluster.bin.join(program));
        command.arg("--host").arg(&self.cluster.dir).args(["--port", &PORT.to_string()]);
        command
    }
}

impl Cluster {
    fn child(&self) -> MutexGuard<'_, Option<Child>> {
        // A panic while it was held leaves a child or none; both are fine.
        self.child.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn data(&self) -> PathBuf {
        self.dir.join("data")
    }

    fn log_file(&self) -> PathBuf {
        self.dir.join("log")
    }

    fn init(&self) -> Result<()> {
        let mut initdb = plain(&self.bin.join("initdb"));
        initdb.args(["--auth=trust", "--username=postgres", "--encoding=UTF8", "--no-locale", "--no-sync", "--pgdata"]);
        finish(self.as_user(&mut initdb).arg(self.data())).map(drop)
    }

    fn launch(&self) -> Result<Child> {
        let log = File::options().create(true).append(true).open(self.log_file()).context("open PostgreSQL's log")?;
        let mut command = plain(&self.bin.join("postgres"));
        command.arg("-D").arg(self.data()).arg("-c").arg(format!("unix_socket_directories={}", self.dir.display()));
        command.args(["-c", &format!("port={PORT}")]);
        command.args(SETTINGS.iter().flat_map(|setting| ["-c", setting]));
        // A group of its own: Ctrl-C reaches the tests, and the server by their end.
        self.as_user(&mut command).stdout(Stdio::null()).stderr(log).process_group(0);
        // An immediate shutdown, which ends all its processes.
        keeper::spawn(command, Signal::SIGQUIT).context("start PostgreSQL")
    }

    fn as_user<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        if let Some(user) = &self.user {
            command.uid(user.uid.as_raw()).gid(user.gid.as_raw());
        }
        command
    }

    fn stop(&self, stop: Stop) -> Result<()> {
        let mut held = self.child();
        let Some(mut child) = held.take() else { return Ok(()) };
        let pid = Pid::from_raw(i32::try_from(child.id()).expect("a process id is positive and small"));
        // PostgreSQL's fast shutdown, its immediate one, and what nobody can refuse.
        let signals = [Signal::SIGINT, Signal::SIGQUIT, Signal::SIGKILL];
        for signal in signals.into_iter().skip(stop as usize) {
            // It has not been collected yet, so the number is still its own.
            kill(pid, signal).with_context(|| format!("send {signal} to PostgreSQL"))?;
            let began = Instant::now();
            while began.elapsed() < STOP_MAX {
                if child.try_wait().context("wait for PostgreSQL")?.is_some() {
                    return Ok(());
                }
                std::thread::sleep(LOOK);
            }
        }
        bail!("PostgreSQL (process {pid}) does not end")
    }

    fn remove(&self) {
        if let Err(error) = self.stop(Stop::Fast) {
            eprintln!("{error:#}");
        }
        if let Err(error) = std::fs::remove_dir_all(&self.dir)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            eprintln!("remove {}: {error}", self.dir.display());
        }
    }

    fn log(&self) -> String {
        let text = std::fs::read_to_string(self.log_file()).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(LOG_LINES)..].join("\n")
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.remove();
    }
}

/// Statics are not dropped, and the test runner leaves by `exit`: what is still there is removed by a handler of the C library. After a
/// kill the death signal ends the server, and the next run removes the directory.
fn clean_up_at_exit(cluster: &Arc<Cluster>) {
    extern "C" fn clean_up() {
        let servers = SERVERS.lock().map(|mut all| std::mem::take(&mut *all)).unwrap_or_default();
        servers.iter().filter_map(Weak::upgrade).for_each(|cluster| cluster.remove());
    }
    static REGISTERED: Once = Once::new();
    REGISTERED.call_once(|| {
        // SAFETY: the handler is a plain function that lives as long as the program and does not unwind.
        if unsafe { libc::atexit(clean_up) } != 0 {
            eprintln!("PostgreSQL's directory stays until the next run of tests");
        }
    });
    let mut servers = SERVERS.lock().unwrap_or_else(PoisonError::into_inner);
    servers.retain(|server| server.strong_count() > 0);
    servers.push(Arc::downgrade(cluster));
}

/// Of the newest version that is installed.
fn binaries() -> Result<PathBuf> {
    let version = |path: &Path| path.file_name()?.to_str()?.parse::<u32>().ok();
    let installed = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    installed
        .filter_map(|entry| Some((version(&entry.path())?, entry.path().join("bin"))))
        .filter(|(_, bin)| bin.join("postgres").is_file())
        .max()
        .map(|(_, bin)| bin)
        .context("PostgreSQL is not installed: run scripts/setup")
}

/// PostgreSQL refuses to run as root.
fn user() -> Result<Option<User>> {
    if !geteuid().is_root() {
        return Ok(None);
    }
    let user = User::from_name("postgres").context("look up the user postgres")?;
    user.map(Some).context("there is no user postgres: run scripts/setup")
}

/// Of this process's environment nothing reaches PostgreSQL's programs: PGHOST and its like would lead them elsewhere.
fn plain(program: &Path) -> Command {
    let mut command = Command::new(program);
    command.env_clear().env("PATH", "/usr/local/bin:/usr/bin:/bin").env("LC_ALL", "C").current_dir("/");
    command.stdin(Stdio::null());
    command
}

fn succeeds(command: &mut Command) -> Result<bool> {
    let status = command.stdout(Stdio::null()).stderr(Stdio::null()).status();
    Ok(status.with_context(|| format!("start {}", command.get_program().display()))?.success())
}

fn finish(command: &mut Command) -> Result<String> {
    let program = command.get_program().to_owned();
    let output = command.output().with_context(|| format!("start {}", program.display()))?;
    ensure!(
        output.status.success(),
        "{}: {}\n{}",
        program.display(),
        output.status,
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
