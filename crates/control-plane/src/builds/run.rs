//! One build, from its sandbox to the wish for its snapshot.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use chrono::Utc;
use futures::stream;
use model::ids::{SandboxId, TeamId};
use model::sandbox::Status;
use store::audit::Actor;
use store::builds::{Archive, ArchiveKind, Build, Step, TIME_MAX, Taking};
use store::operations::Phase;
use store::placement::Asked;
use store::policy::{Policy, PolicyChange};
use store::sandboxes::{Created, NewSandbox};
use store::snapshots::{Built, NewSnapshot, SnapshotWish};
use store::wishes::KillWish;
use store::{StoreError, Update};
use tokio::time::Instant;
use tracing::{info, warn};

use super::ACTOR;
use super::guest::{Command, Guest, Ran};
use super::recipe::{self, Context, Healthcheck, Instruction};
use crate::agents::AgentError;
use crate::app::App;
use crate::http::errors::ApiError;
use crate::reconcile::driver;
use crate::templates;

/// How often a build is said to be worked on, and looked at whether it still is to be: well within a lease.
const HOLD_EVERY: Duration = Duration::from_secs(2);
/// For a host to have room.
const ROOM_TIME_MAX: Duration = Duration::from_secs(600);
const ROOM_EVERY: Duration = Duration::from_secs(5);
const CREATE_TIME_MAX: Duration = Duration::from_secs(300);
const SNAPSHOT_TIME_MAX: Duration = Duration::from_secs(900);
/// Longer than the build may take: it ends with it, unless nobody sees to that.
const SANDBOX_MORE: Duration = Duration::from_secs(1800);
/// For what fetches packages, or unpacks files.
const LONG_STEP_TIME: Duration = Duration::from_secs(600);
const COPY_TIME: Duration = Duration::from_secs(60);
const HELPER_TIME: Duration = Duration::from_secs(30);

const PRE_BUILD: [&str; 3] = ["RUN apt-get update", "USER wrenn-user", "WORKDIR /home/wrenn-user"];
const POST_BUILD: [&str; 3] = ["RUN apt-get clean", "RUN apt-get autoremove -y", "RUN rm -rf /var/lib/apt/lists/*"];
const FILES_DIR: &str = "/tmp/build-files";

/// Only where it is new: whoever uses it has a shell, and becomes root without a password.
const MAKE_USER: &str = r#"id -u "$1" >/dev/null 2>&1 && exit
if command -v useradd >/dev/null; then useradd -m -s /bin/bash "$1"; else adduser -D "$1"; fi || exit
[ -d /etc/sudoers.d ] || exit 0
printf '%s ALL=(ALL) NOPASSWD:ALL\n' "$1" >"/etc/sudoers.d/$1" && chmod 0440 "/etc/sudoers.d/$1""#;
/// What is there already stays whose it is.
const MAKE_DIR: &str = r#"[ -d "$1" ] || { mkdir -p -- "$1" && chown -- "$2:" "$1"; }"#;
/// Owned before they are copied: what else lies in the target is not touched.
const COPY: &str = r#"user=$1 target=$2; shift 2
cd /tmp/build-files || exit
chown -R -- "$user:" "$@" || exit
case $target in */) mkdir -p -- "$target" ;; *) mkdir -p -- "$(dirname -- "$target")" ;; esac && cp -a -- "$@" "$target""#;
const UNPACK: &str = r#"mkdir -p /tmp/build-files && cd /tmp/build-files || exit
case $1 in
gzip) tar -xzf "$2" ;;
tar) tar -xf "$2" ;;
zip) command -v unzip >/dev/null || { echo 'the base template has no unzip' >&2; exit 1; }; unzip -q "$2" ;;
esac && rm -f -- "$2""#;

/// Why nothing comes of a build.
#[derive(Debug)]
enum Stopped {
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

fn failed(message: impl Into<String>) -> Stopped {
    Stopped::Failed(message.into())
}

/// How many steps a build has.
pub fn steps(recipe: usize, has_healthcheck: bool, skip_pre_post: bool) -> usize {
    let around = if skip_pre_post { 0 } else { PRE_BUILD.len() + POST_BUILD.len() };
    recipe + usize::from(has_healthcheck) + around
}

/// Works on it until it ends, is cancelled, or the replica ends.
pub async fn run(app: &App, build: Build) {
    let taking = Taking { build: build.id, attempt: build.attempt };
    info!("build {} of template {} begins (attempt {})", build.id, build.name, build.attempt);
    let left = build
        .started_at
        .map_or(TIME_MAX, |at| (TIME_MAX).saturating_sub((Utc::now() - at).to_std().unwrap_or_default()));
    let ended = tokio::select! {
        biased;
        () = app.stop.cancelled() => {
            if let Err(error) = app.store.put_down_build(taking).await {
                warn!("build {} is not put down: {error}", build.id);
            }
            return;
        }
        () = held(app, taking) => Err(Stopped::Lost),
        made = tokio::time::timeout(left, made(app, &build, taking)) => {
            made.unwrap_or_else(|_| Err(failed(format!("it did not end within {} h", TIME_MAX.as_secs() / 3600))))
        }
    };
    let noted = match ended {
        Ok(()) => Ok(Update::Stale),
        Err(Stopped::Failed(message)) => {
            info!("build {} failed: {message}", build.id);
            app.store.fail_build(taking, &message).await
        }
        Err(Stopped::Store(error)) => Err(error),
        Err(Stopped::Lost) => {
            info!("build {} is worked on no more: it was cancelled, has ended, or is another's", build.id);
            Ok(Update::Stale)
        }
    };
    if let Err(error) = noted {
        // Its lease runs out, and it begins anew.
        warn!("build {} waits for the database: {error}", build.id);
    }
    if let Err(error) = super::clean(app.clone()).await {
        warn!("what build {} has left stays for now: {error}", build.id);
    }
}

/// Says that the build is worked on, for as long as it is to be.
async fn held(app: &App, taking: Taking) {
    loop {
        tokio::time::sleep(HOLD_EVERY).await;
        if let Ok(Update::Stale) = app.store.hold_build(taking).await {
            return;
        }
    }
}

async fn made(app: &App, build: &Build, taking: Taking) -> Result<(), Stopped> {
    if let Some(before) = &build.sandbox {
        kill(app, before).await?;
    }
    let team = app.store.platform_team().await?.ok_or_else(|| failed("the platform has no team"))?;
    let (guest, envs) = sandbox(app, build, taking, team).await?;
    let mut maker = Maker { app, taking, guest, context: Context { envs, ..Context::new() }, step: 0 };
    if let Some(archive) = &build.archive {
        maker.unpack(archive).await?;
    }
    if !build.skip_pre_post {
        for line in PRE_BUILD {
            maker.instruction("pre-build", line, LONG_STEP_TIME).await?;
        }
    }
    for line in &build.recipe {
        maker.instruction("recipe", line, recipe::RUN_TIME).await?;
    }
    let result = maker.context.clone();
    if let Some(text) = &build.healthcheck {
        let check = recipe::healthcheck(text).map_err(failed)?;
        maker.healthcheck(text, &check).await?;
    }
    maker.context = Context::new();
    if !build.skip_pre_post {
        for line in POST_BUILD {
            maker.instruction("post-build", line, LONG_STEP_TIME).await?;
        }
    }
    maker.helper(&format!("rm -rf {FILES_DIR}"), Vec::new(), LONG_STEP_TIME).await?;
    let _ = crashpoint::hit("cp.build.made");
    let envs = result.envs_of_template();
    let built = Built { taking, user: &result.user, envs: &envs };
    snapshot(app, build, team, &maker.guest.sandbox, built).await
}

/// Of an earlier taking.
async fn kill(app: &App, id: &SandboxId) -> Result<(), StoreError> {
    let Some(sandbox) = app.store.sandbox_of_any_team(id).await? else { return Ok(()) };
    let wished = app.store.wish_killed(sandbox.team, id, &app.lease(), &Actor::platform(ACTOR)).await?;
    if let KillWish::Opened(operation) = wished {
        driver::work(app, operation, None);
    }
    Ok(())
}

/// A sandbox of the platform's team that runs, in the shape that the template is to have; and what its base has in its environment.
async fn sandbox(
    app: &App,
    build: &Build,
    taking: Taking,
    team: TeamId,
) -> Result<(Guest, BTreeMap<String, String>), Stopped> {
    let time = i64::try_from((TIME_MAX + SANDBOX_MORE).as_secs()).unwrap_or(i64::MAX);
    let change = PolicyChange { timeout_sec: Some(time), ..PolicyChange::default() };
    let mut new = NewSandbox {
        id: SandboxId::from_random(rand::random()),
        team,
        template: build.base.clone(),
        snapshot: None,
        shape: build.shape,
        envs: BTreeMap::new(),
        metadata: BTreeMap::from([("build".to_owned(), build.id.to_string())]),
        default_user: "root".to_owned(),
        policy: Policy::default().with(&change),
        asked: Asked::default(),
    };
    templates::resolve(app, &mut new).await?;
    // Known before it is there: whatever dies then, somebody ends it.
    if app.store.build_is_in(taking, &new.id).await? == Update::Stale {
        return Err(Stopped::Lost);
    }
    let until = Instant::now() + ROOM_TIME_MAX;
    let operation = loop {
        match app.store.create_sandbox(&new, &app.lease(), None, &Actor::platform(ACTOR)).await? {
            Created::Made(_, operation) => break operation,
            Created::NoHost(shortage) if Instant::now() < until => {
                if new.snapshot.is_none() && is_unknown(app, team, build).await? {
                    return Err(failed(format!("there is no template {}", build.base)));
                }
                info!("build {} waits for room: {shortage}", build.id);
                tokio::time::sleep(ROOM_EVERY).await;
            }
            Created::NoHost(shortage) => return Err(failed(format!("no host has room: {shortage}"))),
            Created::OverQuota(exceeded) => {
                return Err(ApiError::over_quota(&exceeded).into());
            }
            Created::NoSnapshot => return Err(failed(format!("there is no template {} any more", build.base))),
            Created::NoTeam | Created::OtherArguments | Created::Repeated(..) => {
                return Err(failed("the platform's team is not there"));
            }
        }
    };
    let id = operation.id;
    driver::work(app, operation, None);
    let ended = app.outcomes.wait(id, Instant::now() + CREATE_TIME_MAX).await?;
    if let Some(Phase::Failed { message, .. }) = ended.map(|operation| operation.phase) {
        return Err(failed(format!("the sandbox of the build did not start: {message}")));
    }
    let sandbox = app.store.sandbox(team, &new.id).await?.filter(|sandbox| sandbox.status() == Status::Running);
    let placed = sandbox.and_then(|sandbox| sandbox.host);
    let placed = placed.ok_or_else(|| failed("the sandbox of the build did not start in time"))?;
    Ok((Guest { agent: app.agents.of(&placed)?, sandbox: new.id }, new.envs))
}

async fn is_unknown(app: &App, team: TeamId, build: &Build) -> Result<bool, StoreError> {
    Ok(!app.store.template_is_offered(team, build.base.as_str()).await? && app.store.any_host_online(team).await?)
}

/// Wishes the template, and waits for it; whoever reads the build sees its end in any case.
async fn snapshot(app: &App, build: &Build, team: TeamId, of: &SandboxId, built: Built<'_>) -> Result<(), Stopped> {
    let new = NewSnapshot { team, of, name: &build.name, is_published: true, built: Some(built) };
    let wished = app.store.wish_snapshot(&new, &app.lease(), None, &Actor::platform(ACTOR)).await?;
    let _ = crashpoint::hit("cp.build.wished");
    let operation = match wished {
        SnapshotWish::Opened(_, operation) => operation,
        SnapshotWish::NameReserved => {
            return Err(failed(format!("the hosts have an image of the name {}", build.name)));
        }
        SnapshotWish::Wrong(status) => return Err(failed(format!("the sandbox of the build is {status}"))),
        SnapshotWish::UnderWay => return Err(failed("another snapshot of the sandbox of the build is being made")),
        SnapshotWish::Repeated(..) | SnapshotWish::OtherArguments | SnapshotWish::NameTaken | SnapshotWish::Missing => {
            return Err(Stopped::Lost);
        }
    };
    let id = operation.id;
    driver::work(app, operation, None);
    app.outcomes.wait(id, Instant::now() + SNAPSHOT_TIME_MAX).await?;
    if let Some(ended) = app.store.build(build.id).await? {
        info!("build {} of template {} is {}", build.id, build.name, ended.state.as_str());
    }
    Ok(())
}

/// Who carries out a recipe.
struct Maker<'a> {
    app: &'a App,
    taking: Taking,
    guest: Guest,
    context: Context,
    /// That have ended.
    step: i32,
}

impl Maker<'_> {
    async fn unpack(&self, archive: &Archive) -> Result<(), Stopped> {
        let extension = match archive.kind {
            ArchiveKind::Gzip => "tar.gz",
            ArchiveKind::Tar => "tar",
            ArchiveKind::Zip => "zip",
        };
        let path = format!("{FILES_DIR}.{extension}");
        let (app, id) = (self.app, archive.id);
        let pieces = stream::try_unfold(0, |part| async move {
            let bytes = app.store.archive_part(id, part).await?;
            Ok::<_, ApiError>(bytes.map(|bytes| (Bytes::from(bytes), part + 1)))
        });
        self.guest.put(&path, pieces).await?;
        let ran = self.helper(UNPACK, vec![archive.kind.as_str().to_owned(), path], LONG_STEP_TIME).await?;
        if ran.exit != 0 {
            return Err(failed(format!("the archive could not be unpacked: {}", last_line(&ran.stderr))));
        }
        Ok(())
    }

    /// Something that is no instruction, by root.
    async fn helper(&self, script: &str, args: Vec<String>, time: Duration) -> Result<Ran, Stopped> {
        let envs = BTreeMap::new();
        Ok(self.guest.run(Command { script, args, user: "root", cwd: "/", envs: &envs }, time).await?)
    }

    /// Carries it out and keeps what it wrote.
    async fn instruction(&mut self, phase: &str, line: &str, run_time: Duration) -> Result<(), Stopped> {
        let began = Instant::now();
        let instruction = recipe::parse(line).map_err(failed)?;
        let (ran, why) = match &instruction {
            Instruction::Run { timeout, command } => {
                let time = timeout.unwrap_or(run_time);
                (self.command(command, time).await?, format!("did not end within {} s", time.as_secs_f64()))
            }
            Instruction::Start { command } => {
                let tag = format!("start-{}", self.step + 1);
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

    async fn healthcheck(&mut self, text: &str, check: &Healthcheck) -> Result<(), Stopped> {
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
