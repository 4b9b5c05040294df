//! One build, from its sandbox to the wish for its snapshot.

use std::collections::BTreeMap;
use std::time::Duration;

use chrono::Utc;
use model::ids::{SandboxId, TeamId};
use model::sandbox::Status;
use store::audit::Actor;
use store::builds::{Build, TIME_MAX, Taking};
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
use super::guest::Guest;
use super::maker::{LONG_STEP_TIME, Maker, Stopped, failed};
use super::recipe::{self, Context};
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
const PRE_BUILD: [&str; 3] = ["RUN apt-get update", "USER wrenn-user", "WORKDIR /home/wrenn-user"];
const POST_BUILD: [&str; 3] = ["RUN apt-get clean", "RUN apt-get autoremove -y", "RUN rm -rf /var/lib/apt/lists/*"];
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
    maker.remove_files().await?;
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
    let asked = NewSandbox {
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
    // Known before it is there: whatever dies then, somebody ends it.
    let is_ours = async || Ok::<_, StoreError>(app.store.build_is_in(taking, &asked.id).await? != Update::Stale);
    if !is_ours().await? {
        return Err(Stopped::Lost);
    }
    let until = Instant::now() + ROOM_TIME_MAX;
    let (new, operation) = loop {
        let (new, created) = templates::create(app, &asked, None, &Actor::platform(ACTOR)).await?;
        match created {
            Created::Made(_, operation) => break (new, operation),
            Created::NoHost(shortage) if Instant::now() < until => {
                if templates::is_unknown(app, &new).await? {
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
    // Whoever has taken the build meanwhile looked for it before it was there.
    if !is_ours().await? {
        kill(app, &new.id).await?;
        return Err(Stopped::Lost);
    }
    if new.shape != build.shape {
        return Err(failed(format!("template {} has another shape now, and what begins with it has that", build.base)));
    }
    let ended = app.outcomes.wait(id, Instant::now() + CREATE_TIME_MAX).await?;
    if let Some(Phase::Failed { message, .. }) = ended.map(|operation| operation.phase) {
        return Err(failed(format!("the sandbox of the build did not start: {message}")));
    }
    let sandbox = app.store.sandbox(team, &new.id).await?.filter(|sandbox| sandbox.status() == Status::Running);
    let placed = sandbox.and_then(|sandbox| sandbox.host);
    let placed = placed.ok_or_else(|| failed("the sandbox of the build did not start in time"))?;
    Ok((Guest { agent: app.agents.of(&placed)?, sandbox: new.id }, new.envs))
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
        SnapshotWish::NameTaken => {
            return Err(failed(format!("the platform's team has a snapshot {}, which is not published", build.name)));
        }
        // It was cancelled, or is another's.
        SnapshotWish::Repeated(..) | SnapshotWish::OtherArguments | SnapshotWish::Missing => return Err(Stopped::Lost),
    };
    let id = operation.id;
    driver::work(app, operation, None);
    app.outcomes.wait(id, Instant::now() + SNAPSHOT_TIME_MAX).await?;
    if let Some(ended) = app.store.build(build.id).await? {
        info!("build {} of template {} is {}", build.id, build.name, ended.state.as_str());
    }
    Ok(())
}
