//! Carries out a recipe in the sandbox of its build, and keeps what each step wrote.

use std::collections::BTreeMap;
use std::sync::OnceLock;
use std::time::Duration;

use bytes::Bytes;
use futures::stream;
use store::builds::{Archive, ArchiveKind, Step, Taking};
use store::{StoreError, Update};
use tokio::time::Instant;

use super::guest::{Command, Guest, Ran};
use super::recipe::{self, Context, Healthcheck, Instruction};
use crate::agents::AgentError;
use crate::app::App;
use crate::http::errors::ApiError;

/// For what fetches packages, or unpacks files.
pub const LONG_STEP_TIME: Duration = Duration::from_secs(600);
const COPY_TIME: Duration = Duration::from_secs(60);
const HELPER_TIME: Duration = Duration::from_secs(30);

const FILES_DIR: &str = "/tmp/build-files";

/// Only where it is new: whoever uses it has a shell, and becomes root without a password.
const MAKE_USER: &str = r#"id -u "$1" >/dev/null 2>&1 && exit
if command -v useradd >/dev/null; then useradd -m -s /bin/bash "$1"; else adduser -D "$1"; fi || exit
[ -d /etc/sudoers.d ] || exit 0
printf '%s ALL=(ALL) NOPASSWD:ALL\n' "$1" >"/etc/sudoers.d/$1" && chmod 0440 "/etc/sudoers.d/$1""#;
/// What is there already stays whose it is.
const MAKE_DIR: &str = r#"[ -d "$1" ] || { mkdir -p -- "$1" && chown -- "$2:" "$1"; }"#;
/// The user's before they are copied. A directory that is there already stays whose and what it is, also behind a symbolic link.
const COPY: &str = r#"user=$1 target=$2; shift 2
cd /tmp/build-files && chown -R -- "$user:" "$@" || exit
case $target in */) mkdir -p -- "$target" ;; *) mkdir -p -- "$(dirname -- "$target")" ;; esac || exit
if [ $# -eq 1 ] && { [ ! -e "$target" ] || [ -f "$1" ] && [ ! -d "$target" ]; }; then
    exec cp -a -- "$1" "$target"
fi
[ -d "$target" ] || { echo "$target is no directory" >&2; exit 1; }
keep=
if tar --help 2>&1 | grep -q -e --no-overwrite-dir; then keep='--no-overwrite-dir --keep-directory-symlink'; fi
for source; do
    tar -cf - -C "$(dirname -- "$source")" -- "$(basename -- "$source")" | tar -xpf - $keep -C "$target" || exit
done"#;
const UNPACK: &str = r#"mkdir -p /tmp/build-files && cd /tmp/build-files || exit
case $1 in
gzip) tar -xzf "$2" ;;
tar) tar -xf "$2" ;;
zip) command -v unzip >/dev/null || { echo 'the base template has no unzip' >&2; exit 1; }; unzip -q "$2" ;;
esac && rm -f -- "$2""#;

/// Why nothing comes of a build.
#[derive(Debug)]
pub enum Stopped {
    /// For whoever wants it.
    Failed(String),
    Store(StoreError),
    /// It is not to be worked on here any more.
    Lost,
}

impl From<StoreError> for Stopped {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}

impl From<AgentError> for Stopped {
    fn from(error: AgentError) -> Self {
        Self::Failed(format!("the sandbox of the build: {error}"))
    }
}

impl From<ApiError> for Stopped {
    fn from(error: ApiError) -> Self {
        Self::Failed(format!("the sandbox of the build: {}", error.object("").message))
    }
}

pub fn failed(message: impl Into<String>) -> Stopped {
    Stopped::Failed(message.into())
}

/// Who carries out a recipe.
pub struct Maker<'a> {
    pub app: &'a App,
    pub taking: Taking,
    pub guest: Guest,
    pub context: Context,
    /// That have ended.
    pub step: i32,
}

impl Maker<'_> {
    pub async fn unpack(&self, archive: &Archive) -> Result<(), Stopped> {
        let extension = match archive.kind {
            ArchiveKind::Gzip => "tar.gz",
            ArchiveKind::Tar => "tar",
            ArchiveKind::Zip => "zip",
        };
        let path = format!("{FILES_DIR}.{extension}");
        let (app, id) = (self.app, archive.id);
        let unread = OnceLock::new();
        let pieces = stream::try_unfold(0, |part| {
            let unread = &unread;
            async move {
                match app.store.archive_part(id, part).await {
                    Ok(bytes) => Ok(bytes.map(|bytes| (Bytes::from(bytes), part + 1))),
                    Err(error) => {
                        let _ = unread.set(error);
                        Err(ApiError::unavailable())
                    }
                }
            }
        });
        let put = self.guest.put(&path, pieces).await;
        if let Some(error) = unread.into_inner() {
            return Err(Stopped::Store(error));
        }
        put?;
        let ran = self.helper(UNPACK, vec![archive.kind.as_str().to_owned(), path], LONG_STEP_TIME).await?;
        if ran.exit != 0 {
            return Err(failed(format!("the archive could not be unpacked: {}", last_line(&ran.stderr))));
        }
        Ok(())
    }

    /// What the archive was unpacked into.
    pub async fn remove_files(&self) -> Result<(), Stopped> {
        self.helper(&format!("rm -rf {FILES_DIR}"), Vec::new(), LONG_STEP_TIME).await.map(drop)
    }

    /// Something that is no instruction, by root.
    async fn helper(&self, script: &str, args: Vec<String>, time: Duration) -> Result<Ran, Stopped> {
        let envs = BTreeMap::new();
        Ok(self.guest.run(Command { script, args, user: "root", cwd: "/", envs: &envs }, time).await?)
    }

    /// Carries it out and keeps what it wrote.
    pub async fn instruction(&mut self, phase: &str, line: &str, run_time: Duration) -> Result<(), Stopped> {
        let began = Instant::now();
        let instruction = recipe::parse(line).map_err(failed)?;
        let (ran, why) = match &instruction {
            Instruction::Run { timeout, command } => {
                let time = timeout.unwrap_or(run_time);
                (self.command(command, time).await?, format!("did not end within {} s", time.as_secs_f64()))
            }
            Instruction::Start { command } => {
                // What the base was built with has tags, too, and runs.
                let tag = format!("start-{}-{}", self.step + 1, self.taking.build);
                let Context { user, workdir, envs } = &self.context;
                let command = Command { script: command, args: Vec::new(), user, cwd: workdir, envs };
                self.guest.start(command, tag).await?;
                (Ran::default(), String::new())
            }
            Instruction::Env { name, value } => {
                self.context.set(name, value).map_err(failed)?;
                (Ran::default(), String::new())
            }
            Instruction::Workdir { path } => {
                let path = self.context.path(path);
                let args = vec![path.clone(), self.context.user.clone()];
                let ran = self.helper(MAKE_DIR, args, HELPER_TIME).await?;
                self.context.workdir = path;
                (ran, "the directory was not made in time".to_owned())
            }
            Instruction::User { name } => {
                let ran = self.helper(MAKE_USER, vec![name.clone()], HELPER_TIME).await?;
                self.context.user.clone_from(name);
                (ran, "the user was not made in time".to_owned())
            }
            Instruction::Copy { sources, target } => {
                let mut args = vec![self.context.user.clone(), self.context.path(target)];
                args.extend(sources.iter().map(|source| format!("./{source}")));
                (self.helper(COPY, args, COPY_TIME).await?, "the files were not copied in time".to_owned())
            }
        };
        self.ended(phase, line, ran, &why, began).await
    }

    async fn command(&self, script: &str, time: Duration) -> Result<Ran, AgentError> {
        let Context { user, workdir, envs } = &self.context;
        self.guest.run(Command { script, args: Vec::new(), user, cwd: workdir, envs }, time).await
    }

    pub async fn healthcheck(&mut self, text: &str, check: &Healthcheck) -> Result<(), Stopped> {
        let began = Instant::now();
        let until = check.time_max().map(|time| began + time);
        tokio::time::sleep(check.start_period).await;
        let ran = loop {
            let tried = Instant::now();
            let ran = self.command(&check.command, check.timeout).await?;
            let next = tried + check.interval;
            if ran.exit == 0 || until.is_some_and(|until| next >= until) {
                break ran;
            }
            tokio::time::sleep_until(next).await;
        };
        self.ended("healthcheck", text, ran, "the last try did not end in its time", began).await
    }

    async fn ended(
        &mut self,
        phase: &str,
        line: &str,
        ran: Ran,
        why_late: &str,
        began: Instant,
    ) -> Result<(), Stopped> {
        self.step += 1;
        let exit = ran.exit;
        let step = Step {
            step: self.step,
            phase: phase.to_owned(),
            cmd: line.to_owned(),
            stdout: ran.stdout,
            stderr: ran.stderr,
            exit,
            elapsed_ms: i64::try_from(began.elapsed().as_millis()).unwrap_or(i64::MAX),
        };
        if self.app.store.add_build_step(self.taking, &step).await? == Update::Stale {
            return Err(Stopped::Lost);
        }
        let _ = crashpoint::hit("cp.build.step");
        if ran.is_late {
            return Err(failed(format!("step {} ({line}): {why_late}", self.step)));
        }
        if exit != 0 {
            return Err(failed(format!("step {} ({line}) ended with code {exit}", self.step)));
        }
        Ok(())
    }
}

fn last_line(text: &str) -> &str {
    text.trim_end().lines().last().unwrap_or("tar said nothing")
}
