//! Templates of the platform: who has which name when, who may still say something of a build, and what ends with what. Against a real
//! PostgreSQL.

use std::collections::BTreeMap;
use std::time::Duration;

use model::ids::{BuildId, HostId, SandboxId, SnapshotId, TeamId, UserId};
use model::sandbox::{Kept, Observed, Status};
use model::shape::{Shape, TemplateName};
use store::audit::Actor;
use store::builds::{Build, Cancelled, Created as Made, NewBuild, State, Step, Taking};
use store::operations::{Lease, Operation};
use store::placement::Asked;
use store::policy::Policy;
use store::presence::Replica;
use store::sandboxes::{Created, NewSandbox, Report};
use store::snapshots::{Built, NewSnapshot, SnapshotWish};
use store::{Store, Update};
use testkit::postgres::Database;
use uuid::Uuid;

struct Bench {
    database: Database,
    store: Store,
    platform: TeamId,
    other: TeamId,
    lease: Lease,
    actor: Actor,
}

impl Bench {
    async fn new() -> Self {
        let database = Database::new().await;
        let store = Store::new(&database.url).unwrap();
        store.migrate().await.unwrap();
        let (platform, other, host) = (TeamId(Uuid::now_v7()), TeamId(Uuid::now_v7()), HostId(Uuid::now_v7()));
        assert!(store.make_first_administrator(UserId(Uuid::now_v7()), platform, "a@b", "hash").await.unwrap());
        database
            .sql(&format!(
                "insert into teams (id, name) values ('{}', 'others');
                 insert into hosts (id, kind, created_by, state, address, cpu_cores, memory_mb, disk_gb, templates, last_heartbeat_at)
                 values ('{}', 'regular', 'test', 'active', 'h:1', 8, 16384, 100, '{{minimal}}', now())",
                other.0, host.0
            ))
            .await;
        let lease = Lease { replica: Replica::from_random(7) };
        Self { database, store, platform, other, lease, actor: Actor::platform("test") }
    }

    /// One that runs.
    async fn sandbox(&self) -> SandboxId {
        let new = NewSandbox {
            id: SandboxId::from_random(Uuid::now_v7().as_u128()),
            team: self.platform,
            template: name("minimal"),
            snapshot: None,
            shape: Shape::new(1, 512, 5120).unwrap(),
            envs: BTreeMap::new(),
            metadata: BTreeMap::new(),
            default_user: "root".to_owned(),
            policy: Policy::default(),
            asked: Asked::default(),
        };
        let Created::Made(sandbox, operation) =
            self.store.create_sandbox(&new, &self.lease, None, &self.actor).await.unwrap()
        else {
            panic!("no room");
        };
        let report = Report {
            observed: Observed::Running,
            reason: String::new(),
            incarnation: "i1".to_owned(),
            isolation: "fake".to_owned(),
            versions: BTreeMap::new(),
            steps: Vec::new(),
            kept: Kept::Memory,
        };
        assert_eq!(self.store.finish_run(&operation, &report).await.unwrap(), Update::Changed);
        sandbox.id
    }

    async fn status(&self, id: &SandboxId) -> Status {
        self.store.sandbox(self.platform, id).await.unwrap().unwrap().status()
    }

    async fn publish(&self, of: &SandboxId, template: &str, built: Option<Built<'_>>) -> SnapshotWish {
        let template = name(template);
        let new = NewSnapshot { team: self.platform, of, name: &template, is_published: true, built };
        self.store.wish_snapshot(&new, &self.lease, None, &self.actor).await.unwrap()
    }

    /// With what a team begins that names it.
    async fn named(&self, team: TeamId, template: &str) -> Option<SnapshotId> {
        self.store.snapshot_named(team, &name(template)).await.unwrap().map(|snapshot| snapshot.id)
    }

    async fn build(&self, template: &str) -> BuildId {
        let new = NewBuild {
            id: BuildId(Uuid::now_v7()),
            name: name(template),
            base: name("minimal"),
            recipe: vec!["RUN true".to_owned()],
            healthcheck: None,
            shape: Shape::new(1, 512, 5120).unwrap(),
            skip_pre_post: true,
            archive: None,
            total_steps: 1,
        };
        assert_eq!(self.store.create_build(&new, None, &self.actor).await.unwrap(), Made::Made);
        new.id
    }

    async fn get(&self, id: BuildId) -> Build {
        self.store.build(id).await.unwrap().unwrap()
    }

    async fn take(&self) -> Option<Taking> {
        let taken = self.store.take_build().await.unwrap();
        taken.map(|build| Taking { build: build.id, attempt: build.attempt })
    }

    async fn leases_are_over(&self) {
        self.database.sql("update builds set lease_until = now() - interval '1 s'").await;
    }
}

fn name(text: &str) -> TemplateName {
    text.parse().unwrap()
}

fn opened(wish: SnapshotWish) -> (SnapshotId, Operation) {
    let SnapshotWish::Opened(id, operation) = wish else { panic!("not opened") };
    (id, operation)
}

fn step(number: i32) -> Step {
    let text = String::new();
    let cmd = "RUN true".to_owned();
    Step { step: number, phase: "recipe".to_owned(), cmd, stdout: text.clone(), stderr: text, exit: 0, elapsed_ms: 1 }
}

#[tokio::test]
async fn a_template_takes_a_name_when_it_is_there_and_not_before() {
    let bench = Bench::new().await;
    let (first, second, third) = (bench.sandbox().await, bench.sandbox().await, bench.sandbox().await);
    assert!(matches!(bench.publish(&first, "minimal", None).await, SnapshotWish::NameReserved));
    let (one, making) = opened(bench.publish(&first, "app", None).await);
    assert_eq!(bench.named(bench.other, "app").await, None, "it is not there yet");
    assert_eq!(bench.store.snapshot(one).await.unwrap().unwrap().name.as_deref(), Some("app"));
    assert_eq!(bench.status(&first).await, Status::Running);
    assert_eq!(bench.store.snapshot_is_ready(one, 1).await.unwrap(), Update::Changed);
    assert_eq!(bench.status(&first).await, Status::Stopping);
    assert_eq!(bench.store.snapshot_is_ready(one, 1).await.unwrap(), Update::Stale);
    bench.store.finish_operation(&making, &[]).await.unwrap();
    let told = "select distinct resource_id from events_written where resource_type = 'template'";
    assert_eq!(bench.database.sql(told).await.trim(), "app", "of its beginning, too");
    assert_eq!(
        (bench.named(bench.other, "app").await, bench.named(bench.platform, "app").await),
        (Some(one), Some(one))
    );
    // Another that comes to nothing, and one that does not.
    let (_, failing) = opened(bench.publish(&second, "app", None).await);
    bench.store.fail_snapshot(&failing, "agent_error", "no").await.unwrap();
    assert_eq!((bench.named(bench.other, "app").await, bench.status(&second).await), (Some(one), Status::Running));
    let (newer, making) = opened(bench.publish(&third, "app", None).await);
    assert_eq!(bench.named(bench.other, "app").await, Some(one));
    assert_eq!(bench.store.snapshot_is_ready(newer, 1).await.unwrap(), Update::Changed);
    assert_eq!(bench.named(bench.other, "app").await, Some(newer));
    bench.store.finish_operation(&making, &[]).await.unwrap();
    assert_eq!(bench.store.unwanted_snapshots().await.unwrap().len(), 2, "the old one, and the one that failed");
    assert_eq!(bench.store.snapshots(bench.other).await.unwrap().len(), 1);

    // What is the platform's team's own is nobody else's, and keeps its name.
    let own = name("own");
    let new = NewSnapshot { team: bench.platform, of: &second, name: &own, is_published: false, built: None };
    let (kept, _) = opened(bench.store.wish_snapshot(&new, &bench.lease, None, &bench.actor).await.unwrap());
    assert_eq!(bench.store.snapshot_is_ready(kept, 1).await.unwrap(), Update::Changed);
    assert_eq!((bench.named(bench.platform, "own").await, bench.named(bench.other, "own").await), (Some(kept), None));
    bench.database.sql("update operations set phase = 'done' where phase = 'open'").await;
    assert!(matches!(bench.publish(&second, "own", None).await, SnapshotWish::NameTaken));
    assert!(!bench.store.delete_snapshot(bench.platform, &own, true, &bench.actor).await.unwrap());
    assert!(!bench.store.delete_snapshot(bench.platform, &name("app"), false, &bench.actor).await.unwrap());
    assert!(bench.store.delete_snapshot(bench.platform, &own, false, &bench.actor).await.unwrap());

    // A team's own goes first, if it had the name before; with hosts of its own it does not see the platform's.
    bench
        .database
        .sql(&format!(
            "update snapshots set team_id = '{}', is_published = false where id = '{}'",
            bench.other.0, one.0
        ))
        .await;
    bench.database.sql(&format!("update snapshots set state = 'ready' where id = '{}'", one.0)).await;
    assert_eq!(
        (bench.named(bench.other, "app").await, bench.named(bench.platform, "app").await),
        (Some(one), Some(newer))
    );
    bench.database.sql(&format!("update snapshots set name = 'own' where id = '{}'", one.0)).await;
    bench.database.sql(&format!("update teams set is_byoc = true where id = '{}'", bench.other.0)).await;
    assert_eq!((bench.named(bench.other, "app").await, bench.named(bench.other, "own").await), (None, Some(one)));
    assert_eq!(bench.store.snapshots(bench.other).await.unwrap().len(), 1);
}

#[tokio::test]
async fn only_who_has_a_build_says_something_of_it() {
    let bench = Bench::new().await;
    assert_eq!(bench.take().await, None);
    let id = bench.build("app").await;
    let first = bench.take().await.unwrap();
    assert_eq!((first, bench.take().await), (Taking { build: id, attempt: 1 }, None));
    assert_eq!(bench.store.hold_build(first).await.unwrap(), Update::Changed);
    assert_eq!(bench.store.add_build_step(first, &step(1)).await.unwrap(), Update::Changed);
    bench.leases_are_over().await;
    let second = bench.take().await.unwrap();
    assert_eq!((second.attempt, bench.get(id).await.step), (2, 0), "from its beginning");
    assert_eq!(bench.store.hold_build(first).await.unwrap(), Update::Stale);
    assert_eq!(bench.store.add_build_step(first, &step(1)).await.unwrap(), Update::Stale);
    assert_eq!(bench.store.fail_build(first, "late").await.unwrap(), Update::Stale);
    let envs = BTreeMap::from([("A".to_owned(), "b".to_owned())]);
    let sandbox = bench.sandbox().await;
    let stale = Built { taking: first, user: "web", envs: &envs };
    assert!(matches!(bench.publish(&sandbox, "app", Some(stale)).await, SnapshotWish::Missing));

    // From the wish on nobody has to hold it.
    let (snapshot, making) = opened(bench.publish(&sandbox, "app", Some(Built { taking: second, ..stale })).await);
    bench.leases_are_over().await;
    assert_eq!(bench.take().await, None);
    bench.store.fail_lost_builds().await.unwrap();
    assert_eq!(bench.get(id).await.state, State::Running);
    assert_eq!(bench.store.snapshot_is_ready(snapshot, 1).await.unwrap(), Update::Changed);
    assert_eq!(bench.store.cancel_build(id, &bench.actor).await.unwrap(), Cancelled::Ended);
    bench.store.finish_operation(&making, &[]).await.unwrap();
    let ended = bench.get(id).await;
    assert_eq!((ended.state, ended.default_user.as_str(), &ended.default_env), (State::Success, "web", &envs));
    let template = bench.store.snapshot(snapshot).await.unwrap().unwrap();
    assert_eq!((template.default_user.as_str(), &template.envs), ("web", &envs));
    assert_eq!(bench.status(&sandbox).await, Status::Stopping);
}

#[tokio::test]
async fn a_build_that_is_not_wanted_or_cannot_be_ends_with_all_that_was_there_for_it() {
    let bench = Bench::new().await;
    let envs = BTreeMap::new();
    let pending = bench.build("app").await;
    assert_eq!(bench.store.cancel_build(pending, &bench.actor).await.unwrap(), Cancelled::Done);
    assert_eq!((bench.take().await, bench.get(pending).await.state), (None, State::Cancelled));
    let unknown = BuildId(Uuid::nil());
    assert_eq!(bench.store.cancel_build(unknown, &bench.actor).await.unwrap(), Cancelled::Missing);

    // Cancelled when its template is being made: there will be none.
    let id = bench.build("app").await;
    let taking = bench.take().await.unwrap();
    let sandbox = bench.sandbox().await;
    assert_eq!(bench.store.build_is_in(taking, &sandbox).await.unwrap(), Update::Changed);
    let built = Built { taking, user: "root", envs: &envs };
    let (snapshot, making) = opened(bench.publish(&sandbox, "app", Some(built)).await);
    assert_eq!(bench.store.cancel_build(id, &bench.actor).await.unwrap(), Cancelled::Done);
    let left = bench.store.sandboxes_of_ended_builds().await.unwrap();
    assert_eq!(left, [(bench.platform, sandbox.clone())]);
    assert_eq!(bench.store.snapshot_is_ready(snapshot, 1).await.unwrap(), Update::Stale);
    bench.store.fail_snapshot(&making, "not_found", "not wanted").await.unwrap();
    assert_eq!((bench.named(bench.platform, "app").await, bench.get(id).await.state), (None, State::Cancelled));
    // Whoever looks ends it; that of which there is no template does not end by itself.
    assert_eq!(bench.status(&sandbox).await, Status::Running);
    bench.store.wish_killed(bench.platform, &sandbox, &bench.lease, &bench.actor).await.unwrap();
    assert_eq!(bench.store.sandboxes_of_ended_builds().await.unwrap(), []);

    // A snapshot that fails, and one that goes with its host.
    for (what, why) in [("fails", "no room"), ("goes", "its template was not made, or has gone with its host")] {
        let id = bench.build("app").await;
        let taking = bench.take().await.unwrap();
        let sandbox = bench.sandbox().await;
        let built = Built { taking, user: "root", envs: &envs };
        let (snapshot, making) = opened(bench.publish(&sandbox, "app", Some(built)).await);
        if what == "fails" {
            bench.store.fail_snapshot(&making, "insufficient_storage", why).await.unwrap();
        } else {
            bench.database.sql(&format!("delete from snapshots where id = '{}'", snapshot.0)).await;
            bench.store.fail_lost_builds().await.unwrap();
        }
        let ended = bench.get(id).await;
        assert_eq!((ended.state, ended.error.as_deref()), (State::Failed, Some(why)), "{what}");
    }

    // Begun again and again; what is put down in time does not count.
    let id = bench.build("app").await;
    for attempt in [1, 1, 2, 3] {
        let taking = bench.take().await.unwrap();
        assert_eq!(taking.attempt, attempt);
        if attempt == 1 && bench.get(id).await.error.is_none() {
            bench.store.put_down_build(taking).await.unwrap();
            bench.database.sql("update builds set error = 'once' where state = 'running'").await;
        } else {
            bench.leases_are_over().await;
        }
    }
    assert_eq!(bench.take().await, None);
    bench.store.fail_lost_builds().await.unwrap();
    let ended = bench.get(id).await;
    assert_eq!((ended.state, ended.error.as_deref()), (State::Failed, Some("it was begun too often without an end")));
}

/// The end of a template in the making, while somebody takes it away.
#[tokio::test]
async fn a_template_that_is_not_wanted_any_more_takes_no_name() {
    let bench = Bench::new().await;
    let (first, second) = (bench.sandbox().await, bench.sandbox().await);
    let (one, _) = opened(bench.publish(&first, "app", None).await);
    assert_eq!(bench.store.snapshot_is_ready(one, 1).await.unwrap(), Update::Changed);
    let (newer, _) = opened(bench.publish(&second, "app", None).await);
    let taking_away = format!(
        "begin; update snapshots set state = 'removing' where id = '{}'; select pg_sleep(0.7); commit",
        newer.0
    );
    let late = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        bench.store.snapshot_is_ready(newer, 1).await.unwrap()
    };
    let (_, said) = tokio::join!(bench.database.sql(&taking_away), late);
    assert_eq!((said, bench.named(bench.other, "app").await), (Update::Stale, Some(one)));
    assert_eq!(bench.status(&second).await, Status::Running, "what is of no template does not end for it");
}

#[tokio::test]
async fn what_is_published_and_what_is_not_take_no_name_from_each_other() {
    let bench = Bench::new().await;
    let (first, second) = (bench.sandbox().await, bench.sandbox().await);
    let wish = async |of: &SandboxId, text: &str| {
        let name = name(text);
        let new = NewSnapshot { team: bench.platform, of, name: &name, is_published: false, built: None };
        bench.store.wish_snapshot(&new, &bench.lease, None, &bench.actor).await.unwrap()
    };
    // While it is being made it has the name already, and is there under it afterwards.
    let (published, _) = opened(bench.publish(&first, "app", None).await);
    assert!(matches!(wish(&second, "app").await, SnapshotWish::NameTaken));
    assert_eq!(bench.store.snapshot_is_ready(published, 1).await.unwrap(), Update::Changed);
    assert!(matches!(wish(&second, "app").await, SnapshotWish::NameTaken));
    // Both at once: one of them.
    for round in 0..8 {
        let (a, b) = (bench.sandbox().await, bench.sandbox().await);
        let name = format!("both-{round}");
        let (not, published) = tokio::join!(wish(&a, &name), bench.publish(&b, &name, None));
        let opened = [not, published].iter().filter(|wish| matches!(wish, SnapshotWish::Opened(..))).count();
        assert_eq!(opened, 1, "{name}");
        bench.database.sql("update operations set phase = 'done' where phase = 'open'").await;
        bench
            .database
            .sql(&format!("update sandboxes set observed = 'killed', desired = 'killed' where id in ('{a}', '{b}')"))
            .await;
    }
    // A program of before, which knows nothing of names that are still to be taken, gives one away: to whom it stays.
    let (a, b) = (bench.sandbox().await, bench.sandbox().await);
    let (late, _) = opened(bench.publish(&a, "given", None).await);
    let (kept, _) = opened(wish(&b, "kept").await);
    let given = format!("update snapshots set name = 'given', state = 'ready' where id = '{}'", kept.0);
    bench.database.sql(&given).await;
    assert_eq!(bench.store.snapshot_is_ready(late, 1).await.unwrap(), Update::Stale);
    assert_eq!(bench.named(bench.platform, "given").await, Some(kept));
    assert_eq!(bench.status(&a).await, Status::Running);
    assert!(bench.store.snapshot(late).await.unwrap().is_none_or(|snapshot| !snapshot.is_ready));
    // A build of a name that is not to be had is told so at once, not when all is made.
    let new = NewBuild {
        id: BuildId(Uuid::now_v7()),
        name: name("own"),
        base: name("minimal"),
        recipe: vec!["RUN true".to_owned()],
        healthcheck: None,
        shape: Shape::new(1, 512, 5120).unwrap(),
        skip_pre_post: true,
        archive: None,
        total_steps: 1,
    };
    opened(wish(&second, "own").await);
    assert_eq!(bench.store.create_build(&new, None, &bench.actor).await.unwrap(), Made::NameTaken);
}

/// A program of before, which still serves while this one comes, ends what it finds open: by its own statements.
#[tokio::test]
async fn what_an_older_program_has_ended_is_put_right() {
    let bench = Bench::new().await;
    let envs = BTreeMap::new();
    for (state, wanted) in [("ready", State::Success), ("removing", State::Failed)] {
        let id = bench.build("app").await;
        let taking = bench.take().await.unwrap();
        let sandbox = bench.sandbox().await;
        let built = Built { taking, user: "root", envs: &envs };
        let (snapshot, making) = opened(bench.publish(&sandbox, "app", Some(built)).await);
        bench.database.sql(&format!("update snapshots set state = '{state}' where id = '{}'", snapshot.0)).await;
        bench.store.finish_operation(&making, &[]).await.unwrap();
        for _ in 0..2 {
            bench.store.let_ready_snapshots_take_their_place().await.unwrap();
            bench.store.fail_lost_builds().await.unwrap();
        }
        assert_eq!(bench.get(id).await.state, wanted);
        let is_there = wanted == State::Success;
        assert_eq!(bench.named(bench.other, "app").await.is_some_and(|named| named == snapshot), is_there);
        assert_eq!(bench.status(&sandbox).await == Status::Stopping, is_there);
    }
}

#[tokio::test]
async fn archives_go_with_their_builds() {
    let bench = Bench::new().await;
    let (of_build, of_nobody, fresh) = (Uuid::now_v7(), Uuid::now_v7(), Uuid::now_v7());
    for id in [of_build, of_nobody, fresh] {
        bench.store.put_archive_part(id, 0, b"a").await.unwrap();
        bench.store.put_archive_part(id, 1, b"b").await.unwrap();
    }
    assert_eq!(bench.store.archive_part(of_build, 1).await.unwrap().as_deref(), Some(b"b".as_slice()));
    assert_eq!(bench.store.archive_part(of_build, 2).await.unwrap(), None);
    let id = bench.build("app").await;
    let old = "update build_archives set created_at = now() - interval '3 h' where id <>";
    bench
        .database
        .sql(&format!("update builds set archive_id = '{of_build}', archive_kind = 'tar'; {old} '{fresh}'"))
        .await;
    let kept = async || bench.database.sql("select count(distinct id) from build_archives").await.trim().to_owned();
    bench.store.remove_old_rows(0).await.unwrap();
    assert_eq!(kept().await, "2", "the build's, and the one whose build is about to be");
    for id in [of_build, fresh] {
        bench.store.remove_archive(id).await.unwrap();
    }
    assert_eq!(kept().await, "1", "whatever becomes of a call, a build that is there keeps its own");
    bench.store.cancel_build(id, &bench.actor).await.unwrap();
    bench.store.remove_old_rows(0).await.unwrap();
    assert_eq!(kept().await, "0");
    bench.database.sql("update builds set completed_at = now() - interval '91 days'").await;
    bench.store.remove_old_rows(0).await.unwrap();
    assert_eq!(bench.store.builds(10).await.unwrap(), []);
}
