//! The programs that `up` runs and keeps running: started, watched, started again with growing pauses, ended.
//!
//! They end with this one, whatever ends it: the kernel sends them SIGKILL when the thread that started them is gone, and this program
//! has one thread. They are made to be killed; sandboxes outlive them.

use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use tokio::process::{Child, Command};

use super::process::Identity;
use super::{layout, logs};
use crate::failure::{Doing as _, Failure};

const PAUSE_FIRST: Duration = Duration::from_millis(200);
const PAUSE_MAX: Duration = Duration::from_secs(15);
/// Of a program that served before it ended: what it does is not hopeless, and its users wait.
const PAUSE_READY_MAX: Duration = Duration::from_secs(1);
/// A program that ran this long is taken to be well: its next start is not delayed.
const WELL_AFTER: Duration = Duration::from_secs(30);
/// Lines of a log in a message about a failure.
pub const TAIL_LINES: usize = 15;

/// How to start a program: data, because it is started again and again.
#[derive(Debug, Clone)]
pub struct Recipe {
    pub name: &'static str,
    pub arguments: Vec<String>,
    pub envs: Vec<(String, String)>,
    pub removed_envs: Vec<&'static str>,
    pub ready_file: PathBuf,
}

pub struct Running {
    pub recipe: Recipe,
    dir: PathBuf,
    child: Child,
    began: Instant,
    pause: Duration,
    /// How it ended and when it is to be started again.
    restart: Option<(String, Instant)>,
}

/// What a program writes when it serves.
#[derive(Debug, serde::Deserialize)]
pub struct Ready {
    pub addr: std::net::SocketAddr,
    pub pid: i32,
}

impl Running {
    pub fn start(dir: &Path, recipe: Recipe) -> Result<Self, Failure> {
        let child = spawn(dir, &recipe)?;
        Ok(Self { recipe, dir: dir.to_owned(), child, began: Instant::now(), pause: PAUSE_FIRST, restart: None })
    }

    pub fn identity(&self) -> Option<Identity> {
        Identity::of(i32::try_from(self.child.id()?).ok()?)
    }

    /// Waits until it says that it serves. An early end is told with the last lines of its log.
    pub async fn ready(&mut self, limit: Duration) -> Result<Ready, Failure> {
        let began = Instant::now();
        loop {
            if let Ok(text) = std::fs::read(&self.recipe.ready_file)
                && let Ok(ready) = serde_json::from_slice::<Ready>(&text)
                && u32::try_from(ready.pid).ok() == self.child.id()
            {
                return Ok(ready);
            }
            if let Some(status) = self.child.try_wait().doing(|| format!("watch {}", self.recipe.name))? {
                return Err(self.ended_early(status));
            }
            if began.elapsed() > limit {
                return Err(self.told(&format!("does not serve after {} s", limit.as_secs())));
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    pub fn ended_early(&self, status: ExitStatus) -> Failure {
        self.told(&format!("ended at its start ({status})"))
    }

    fn told(&self, what: &str) -> Failure {
        let name = self.recipe.name;
        let place = logs::place(&self.dir, name);
        Failure::new(format!(
            "{name} {what}; the end of {}:\n{}",
            place.display(),
            logs::tail(&self.dir, name, TAIL_LINES)
        ))
    }

    pub fn has_ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// Waits for its end, pauses, starts it again. Cancel-safe: the next call goes on where this one was.
    pub async fn watch(&mut self) -> Restarted {
        if self.restart.is_none() {
            let status = match self.child.wait().await {
                Ok(status) => status.to_string(),
                Err(error) => error.to_string(),
            };
            // The file stays when its program is killed; the next start removes it.
            let pause_max = if self.recipe.ready_file.exists() { PAUSE_READY_MAX } else { PAUSE_MAX };
            let was_well = self.began.elapsed() > WELL_AFTER;
            self.pause = if was_well { PAUSE_FIRST } else { (self.pause * 2).min(pause_max) };
            self.restart = Some((status, Instant::now() + self.pause));
        }
        let (ended, at) = self.restart.clone().expect("it was just set");
        tokio::time::sleep_until(at.into()).await;
        self.restart = None;
        self.began = Instant::now();
        let problem = match spawn(&self.dir, &self.recipe) {
            Ok(child) => {
                self.child = child;
                None
            }
            Err(failure) => Some(failure.message()),
        };
        Restarted { name: self.recipe.name, ended, problem }
    }

    pub fn ask_to_end(&self) {
        if let Some(identity) = self.identity() {
            identity.signal(Signal::SIGTERM);
        }
    }

    /// After `ask_to_end`: waits, then insists.
    pub async fn end(&mut self, limit: Duration) {
        if tokio::time::timeout(limit, self.child.wait()).await.is_err() {
            eprintln!("wrenn: {} did not end within {} s and is killed", self.recipe.name, limit.as_secs());
            let _ = self.child.kill().await;
        }
        let _ = std::fs::remove_file(&self.recipe.ready_file);
    }
}

pub struct Restarted {
    pub name: &'static str,
    pub ended: String,
    pub problem: Option<String>,
}

fn spawn(dir: &Path, recipe: &Recipe) -> Result<Child, Failure> {
    let _ = std::fs::remove_file(&recipe.ready_file);
    let (out, err) = logs::stdio(dir, recipe.name)?;
    let mut command = Command::new(layout::program(recipe.name)?);
    command.args(&recipe.arguments).env("WRENN_DIR", dir).arg("--ready-file").arg(&recipe.ready_file);
    for name in &recipe.removed_envs {
        command.env_remove(name);
    }
    for (name, value) in &recipe.envs {
        command.env(name, value);
    }
    // What a `.env` says has been taken in here, and some of it was taken out again for this program: it must not read it anew.
    command.current_dir(dir);
    command.env("PATH", layout::search_path());
    // What goes into a file has no colours.
    command.env("NO_COLOR", "1").stdin(Stdio::null()).stdout(out).stderr(err);
    // Its own group: Ctrl-C in a terminal goes to this program alone, which ends the others in their order.
    command.process_group(0);
    end_with_this_process(&mut command);
    command.spawn().doing(|| format!("start {}", recipe.name))
}

/// SIGKILL for the child when the thread that starts it is gone.
pub fn end_with_this_process(command: &mut Command) {
    let parent = nix::unistd::getpid();
    // SAFETY: both are plain system calls, allowed between fork and exec; nothing is allocated.
    unsafe {
        command.pre_exec(move || {
            nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
            // The parent may have died before the line above.
            if nix::unistd::getppid() == parent { Ok(()) } else { Err(nix::errno::Errno::ECHILD.into()) }
        });
    }
}
