//! Wishes, operations and what hosts say of them, on a real PostgreSQL: every update is conditional, so that whoever comes late changes
//! nothing.

use std::collections::BTreeMap;
use std::time::Duration;

use model::ids::{HostId, SandboxId, SnapshotId, TeamId, UserId};
use model::sandbox::{Kept, Observed, OnTimeout, Status};
use model::shape::Shape;
use store::audit::Actor;
use store::hosts::{Deleted, Losses, NewHost};
use store::idempotency::Key;
use store::operations::{Full, Kind, Lease, Operation, Phase};
use store::placement::{Asked, Dimension, Shortage};
use store::policy::{Policy, PolicyChange};
use store::presence::Replica;
use store::sandboxes::{Created, NewSandbox, Report, Sandbox, Sighting, Which};
use store::snapshots::{Child, ForkWish, NewSnapshot, SnapshotWish};
use store::wishes::{KillWish, ResumeOf, Timed, Turned};
use store::{Store, Update};
use testkit::postgres::Database;
use uuid::Uuid;

struct Bench {
    database: Database,
    store: Store,
    team: TeamId,
    host: HostId,
    lease: Lease,
    made: std::cell::Cell<u128>,
}

impl Bench {
    async fn new() -> Self {
        let database = Database::new().await;
        let store = Store::new(&database.url).unwrap();
        store.migrate().await.unwrap();
        let team = TeamId(Uuid::now_v7());
        assert!(store.make_first_administrator(UserId(Uuid::now_v7()), team, "a@b", "hash").await.unwrap());
        let bench = Self {
            host: HostId(Uuid::now_v7()),
            lease: Lease { replica: Replica::from_random(7) },
            made: 0.into(),
            database,
            store,
            team,
        };
        bench.host(bench.host, 4096).await;
        bench
    }

    async fn host(&self, id: HostId, memory_mb: i64) {
        let new = NewHost {
            id,
            team: None,
            provider: None,
            availability_zone: None,
            created_by: "test".to_owned(),
            tags: Vec::new(),
            token_hash: rand_hash(id),
        };
        self.store.create_host(&new, None, &Actor::platform("test")).await.unwrap();
        self.database
            .sql(&format!(
                "update hosts set state = 'active', address = 'h:1', cpu_cores = 4, memory_mb = {memory_mb}, templates = '{{minimal}}',
                 last_heartbeat_at = now() where id = '{}'",
                id.0
            ))
            .await;
    }

    async fn create(&self) -> (SandboxId, Operation) {
        self.create_with(None).await
    }

    /// The run of a sandbox that begins with a snapshot.
    async fn begin_with(&self, snapshot: SnapshotId) -> Operation {
        self.create_with(Some(snapshot)).await.1
    }

    async fn create_with(&self, snapshot: Option<SnapshotId>) -> (SandboxId, Operation) {
        self.made.set(self.made.get() + 1);
        let new = NewSandbox {
            id: SandboxId::from_random(self.made.get()),
            team: self.team,
            template: "minimal".parse().unwrap(),
            snapshot,
            shape: Shape::new(1, 512, 5120).unwrap(),
            envs: [("SECRET".to_owned(), "x".to_owned())].into(),
            metadata: BTreeMap::new(),
            default_user: String::new(),
            policy: Policy { timeout_sec: 60, ..Policy::default() },
            asked: Asked::default(),
        };
        match self.store.create_sandbox(&new, &self.lease, None, &Actor::platform("test")).await.unwrap() {
            Created::Made(sandbox, operation) => (sandbox.id, operation),
            _ => panic!("no room"),
        }
    }

    async fn get(&self, id: &SandboxId) -> Sandbox {
        self.store.sandbox(self.team, id).await.unwrap().unwrap()
    }

    async fn run(&self, operation: &Operation) -> Update {
        self.store.finish_run(operation, &report("i1")).await.unwrap()
    }

    async fn kill(&self, id: &SandboxId) -> KillWish {
        self.store.wish_killed(self.team, id, &self.lease, &Actor::platform("test")).await.unwrap()
    }

    async fn snapshot(&self, of: &SandboxId, name: &str) -> SnapshotWish {
        let name = name.parse().unwrap();
        let new = NewSnapshot { team: self.team, of, name: &name, is_published: false, built: None };
        self.store.wish_snapshot(&new, &self.lease, None, &Actor::platform("test")).await.unwrap()
    }

    async fn fork(&self, of: &SandboxId, count: u128, key: Option<&Key>) -> ForkWish {
        let child = |n: u128| Child {
            id: SandboxId::from_random(1 << 64 | Uuid::now_v7().as_u128() << 8 | n),
            envs: [("F".to_owned(), "f".to_owned())].into(),
            metadata: BTreeMap::new(),
            policy: PolicyChange {
                on_timeout: Some(OnTimeout::Pause),
                auto_resume: Some(true),
                ..PolicyChange::default()
            },
        };
        let children: Vec<Child> = (0..count).map(child).collect();
        let actor = Actor::platform("test");
        self.store.wish_forked(self.team, of, &children, &self.lease, key, &actor).await.unwrap()
    }

    async fn unwanted(&self) -> usize {
        self.store.unwanted_snapshots().await.unwrap().len()
    }

    async fn phase(&self, operation: &Operation) -> Phase {
        self.store.operation(operation.id).await.unwrap().unwrap().phase
    }
}

fn rand_hash(id: HostId) -> [u8; 32] {
    let mut hash = [0; 32];
    hash[..16].copy_from_slice(id.0.as_bytes());
    hash
}

fn report(incarnation: &str) -> Report {
    Report {
        observed: Observed::Running,
        reason: String::new(),
        incarnation: incarnation.to_owned(),
        isolation: "fake".to_owned(),
        versions: BTreeMap::new(),
        steps: vec![("start".to_owned(), 1.5)],
        kept: Kept::Memory,
    }
}

fn sighting(id: &SandboxId, observed: Observed, revision: i64) -> Sighting {
    Sighting {
        id: id.to_string(),
        observed,
        revision,
        incarnation: "i1".to_owned(),
        reason: String::new(),
        idle_sec: None,
    }
}

#[tokio::test]
async fn a_kill_wins_over_a_create_that_is_under_way() {
    let bench = Bench::new().await;
    let (id, run) = bench.create().await;
    assert_eq!((run.kind, run.revision, bench.get(&id).await.status()), (Kind::Run, 1, Status::Starting));
    let KillWish::Opened(kill) = bench.kill(&id).await else { panic!("not opened") };
    assert_eq!((kill.kind, kill.revision), (Kind::Kill, 2));
    assert_eq!(bench.phase(&run).await, Phase::Superseded);
    assert!(matches!(bench.kill(&id).await, KillWish::UnderWay(again) if again == kill.id), "one wish, one operation");
    // The create's own end comes late, from a replica that did not hear of it.
    assert_eq!(bench.run(&run).await, Update::Stale);
    assert_eq!(bench.store.fail_run(&run, "agent_error", "late", &[]).await.unwrap(), Update::Stale);
    assert_eq!(bench.get(&id).await.status(), Status::Stopping);
    assert_eq!(bench.store.finish_kill(&kill, &[]).await.unwrap(), Update::Changed);
    assert_eq!(bench.store.finish_kill(&kill, &[]).await.unwrap(), Update::Stale, "twice is fine");
    let ended = bench.get(&id).await;
    assert_eq!((ended.status(), ended.envs.len()), (Status::Stopped, 0), "what a user gave is not kept after the end");
    assert!(matches!(bench.kill(&id).await, KillWish::Ended));
    assert_eq!(bench.store.sandboxes(bench.team, 100, None, &Which::default()).await.unwrap().len(), 0);
}

#[tokio::test]
async fn a_failed_create_gives_its_room_back_and_cleans_up() {
    let bench = Bench::new().await;
    let _presence = bench.store.be_present(bench.lease.replica).await.unwrap();
    let mut made = Vec::new();
    for _ in 0..8 {
        made.push(bench.create().await);
    }
    let full = bench.store.place(&made[0].1, &bench.get(&made[0].0).await).await.unwrap();
    assert_eq!(full, Err(Shortage(vec![Dimension::Memory])), "4096 MiB are eight of 512");
    let (id, operation) = &made[3];
    assert_eq!(bench.store.fail_run(operation, "agent_error", "it broke", &[]).await.unwrap(), Update::Changed);
    let failed = bench.get(id).await;
    assert_eq!((failed.status(), failed.reason.as_deref(), failed.revision), (Status::Error, Some("it broke"), 2));
    assert_eq!(
        bench.phase(operation).await,
        Phase::Failed { code: "agent_error".to_owned(), message: "it broke".to_owned() }
    );
    let claimed = bench.store.claim_operations(&bench.lease, 10).await.unwrap();
    let kinds: Vec<_> = claimed.iter().map(|operation| (operation.kind, operation.sandbox.clone())).collect();
    assert_eq!(kinds, [(Kind::Clean, id.clone())], "what may be left on the host is ended there");
    bench.create().await;
}

#[tokio::test]
async fn what_a_dead_replica_worked_on_is_taken_over_at_once_and_a_living_ones_is_not() {
    let bench = Bench::new().await;
    let (dead, living) = (Replica::from_random(100), Replica::from_random(200));
    let _presence = bench.store.be_present(living).await.unwrap();
    let (id, first) = bench.create().await;
    let (_, second) = bench.create().await;
    for (operation, owner) in [(&first, 100 >> 1), (&second, 200 >> 1)] {
        bench
            .database
            .sql(&format!("update operations set lease_owner = {owner} where id = '{}'", operation.id.0))
            .await;
    }
    let me = Lease { replica: Replica::from_random(300) };
    let claimed = bench.store.claim_operations(&me, 10).await.unwrap();
    assert_eq!(claimed.iter().map(|operation| operation.id).collect::<Vec<_>>(), [first.id]);
    assert_eq!(claimed[0].attempts, 2);
    // Who lost it and works on cannot take it from a host that whoever has it now may have reached.
    let host = bench.get(&id).await.host.expect("it is placed").host;
    assert_eq!(bench.store.refuse_host(&first, host).await.unwrap(), Update::Stale);
    assert_eq!(bench.get(&id).await.host.map(|placed| placed.host), Some(host));
    assert_eq!(bench.store.refuse_host(&claimed[0], host).await.unwrap(), Update::Changed);
    assert!(bench.get(&id).await.host.is_none());
    assert_eq!(bench.store.renew_lease(first.id, &Lease { replica: dead }).await.unwrap(), Update::Stale);
    assert_eq!(bench.store.renew_lease(first.id, &me).await.unwrap(), Update::Changed);
    // A lease that ran out is anybody's, whoever lives.
    bench.database.sql("update operations set lease_until = now() - interval '1 second'").await;
    let claimed = bench.store.claim_operations(&me, 10).await.unwrap();
    assert_eq!(claimed.len(), 2);
    // Nor can who lost it put it off.
    bench.store.put_off(&first, Duration::from_secs(60), "host_unavailable").await.unwrap();
    let lost = format!("select count(*) from operations where id = '{}' and lease_owner is null", first.id.0);
    assert_eq!(bench.database.sql(&lost).await.trim(), "0");
    // Put off: not before its time.
    let mine = claimed.iter().find(|operation| operation.id == first.id).unwrap();
    bench.store.put_off(mine, Duration::from_secs(60), "host_unavailable").await.unwrap();
    bench.database.sql("update operations set lease_until = now() - interval '1 second'").await;
    let claimed = bench.store.claim_operations(&me, 10).await.unwrap();
    assert_eq!(claimed.iter().map(|operation| operation.id).collect::<Vec<_>>(), [second.id]);
    // No host was asked: that was no attempt.
    bench.store.put_off_unasked(&claimed[0], Duration::ZERO, "full").await.unwrap();
    let again = bench.store.claim_operations(&me, 10).await.unwrap();
    assert_eq!((again[0].id, again[0].attempts), (second.id, claimed[0].attempts));
}

#[tokio::test]
async fn operations_for_hosts_of_teams_that_have_enough_to_do_are_left_until_they_are_overdue() {
    let bench = Bench::new().await;
    let (_, operation) = bench.create().await;
    let free = "update operations set lease_owner = null";
    let all = Full { all: true, ..Full::default() };
    // The platform's own hosts are nobody's who could be full.
    bench.database.sql(free).await;
    assert_eq!(bench.store.claim_operations_but(&bench.lease, 9, &all).await.unwrap().len(), 1);
    bench
        .database
        .sql(&format!("update teams set is_byoc = true; update hosts set kind = 'byoc', team_id = '{}'", bench.team.0))
        .await;
    let this = Full { teams: vec![bench.team], all: false };
    let another = Full { teams: vec![TeamId(Uuid::now_v7())], all: false };
    for (full, count) in [(&all, 0), (&this, 0), (&another, 1), (&Full::default(), 1)] {
        bench.database.sql(free).await;
        let claimed = bench.store.claim_operations_but(&bench.lease, 9, full).await.unwrap();
        assert_eq!(claimed.len(), count, "{full:?}");
    }
    bench.database.sql("update operations set lease_owner = null, deadline = now() - interval '1 s'").await;
    let overdue = bench.store.claim_operations_but(&bench.lease, 9, &all).await.unwrap();
    assert_eq!(overdue.iter().map(|one| one.id).collect::<Vec<_>>(), [operation.id]);
}

#[tokio::test]
async fn many_claim_and_each_operation_is_claimed_once() {
    let bench = Bench::new().await;
    bench.host(HostId(Uuid::now_v7()), 1 << 20).await;
    for _ in 0..40 {
        bench.create().await;
    }
    bench.database.sql("update operations set lease_owner = null").await;
    let stores: Vec<Store> = (0..8).map(|_| bench.store.clone()).collect();
    let claims = stores.iter().enumerate().map(|(n, store)| async move {
        let lease = Lease { replica: Replica::from_random(1000 + 2 * u32::try_from(n).unwrap()) };
        let _presence = store.be_present(lease.replica).await.unwrap();
        let mut mine = Vec::new();
        loop {
            let claimed = store.claim_operations(&lease, 3).await.unwrap();
            if claimed.is_empty() {
                // Held until all have looked, so that nobody's are taken over.
                tokio::time::sleep(Duration::from_millis(300)).await;
                return mine;
            }
            mine.extend(claimed.into_iter().map(|operation| operation.id.0));
        }
    });
    let mut all: Vec<Uuid> = futures::future::join_all(claims).await.concat();
    assert_eq!(all.len(), 40);
    all.sort();
    all.dedup();
    assert_eq!(all.len(), 40);
}

#[tokio::test]
async fn a_sandbox_whose_time_is_over_is_wished_away_once() {
    let bench = Bench::new().await;
    let (id, run) = bench.create().await;
    assert_eq!(bench.store.expire_sandboxes().await.unwrap(), 0, "time runs from the start");
    assert_eq!(bench.run(&run).await, Update::Changed);
    bench.database.sql("update sandboxes set deadline = now() - interval '1 second'").await;
    let counts = tokio::join!(bench.store.expire_sandboxes(), bench.store.expire_sandboxes());
    assert_eq!(counts.0.unwrap() + counts.1.unwrap(), 1);
    let sandbox = bench.get(&id).await;
    assert_eq!((sandbox.status(), sandbox.reason.as_deref()), (Status::Stopping, Some("deadline")));
    let audited = bench.database.sql("select count(*) from audit where action = 'sandbox.kill'").await;
    assert_eq!(audited.trim(), "1");
}

#[tokio::test]
async fn a_sandbox_whose_time_is_over_is_paused_when_that_was_asked_for() {
    let bench = Bench::new().await;
    let (id, run) = bench.create().await;
    bench.run(&run).await;
    let over = "update sandboxes set on_timeout = 'pause', timeout_sec = 600, deadline = now() - interval '1 second'";
    bench.database.sql(over).await;
    let counts = tokio::join!(bench.store.expire_sandboxes(), bench.store.expire_sandboxes());
    assert_eq!(counts.0.unwrap() + counts.1.unwrap(), 1);
    let sandbox = bench.get(&id).await;
    assert_eq!((sandbox.status(), sandbox.policy.on_timeout), (Status::Pausing, OnTimeout::Pause));
    assert_eq!(sandbox.kept, Kept::Memory);
    assert_eq!(bench.store.expire_sandboxes().await.unwrap(), 0);

    // It does not come about: not at once again, but again.
    let lease = &bench.lease;
    let [pause] = bench.store.claim_operations(lease, 9).await.unwrap().try_into().unwrap();
    bench.store.take_back(&pause, Observed::Running, "agent_error", "no", &[]).await.unwrap();
    assert_eq!(bench.store.expire_sandboxes().await.unwrap(), 0);
    bench.database.sql(&over.replace("'pause'", "'pause', timeout_keeps = 'disk'")).await;
    assert_eq!(bench.store.expire_sandboxes().await.unwrap(), 1);
    let sandbox = bench.get(&id).await;
    assert_eq!((sandbox.policy.on_timeout, sandbox.kept), (OnTimeout::PauseDisk, Kept::Disk));
    let [pause] = bench.store.claim_operations(lease, 9).await.unwrap().try_into().unwrap();
    bench.store.finish_pause(&pause, &Report { kept: Kept::Disk, ..report("i1") }).await.unwrap();
    let sandbox = bench.get(&id).await;
    assert_eq!((sandbox.status(), sandbox.kept), (Status::Paused, Kept::Disk));

    // Its length can be changed, and runs from the resume.
    let set = async |timeout_sec, on_timeout| {
        let actor = Actor::platform("test");
        let change = PolicyChange { timeout_sec, on_timeout, ..PolicyChange::default() };
        match bench.store.set_policy(bench.team, &id, &change, &actor).await.unwrap() {
            Timed::Set(sandbox) => *sandbox,
            _ => panic!("not set"),
        }
    };
    let sandbox = set(Some(7), Some(OnTimeout::Kill)).await;
    assert_eq!((sandbox.policy.timeout_sec, sandbox.policy.on_timeout, sandbox.deadline), (7, OnTimeout::Kill, None));
    bench.database.sql("update sandboxes set desired = 'running', observed = 'running'").await;
    let sandbox = set(None, Some(OnTimeout::Pause)).await;
    let left = sandbox.deadline.unwrap() - chrono::Utc::now();
    assert!((1..=7).contains(&left.num_seconds()), "{left}");
    assert_eq!((sandbox.policy.timeout_sec, sandbox.policy.on_timeout), (7, OnTimeout::Pause));
    assert_eq!(set(Some(0), None).await.deadline, None);
    bench.database.sql("update sandboxes set desired = 'paused', observed = 'paused'").await;

    // Paused it has time, and one that failed is nothing to pause.
    let left = bench.database.sql("select deadline is null from sandboxes").await;
    assert_eq!(left.trim(), "t");
    bench.database.sql(over).await;
    assert_eq!(bench.store.expire_sandboxes().await.unwrap(), 0);
    bench.database.sql("update sandboxes set desired = 'running', observed = 'failed'").await;
    assert_eq!(bench.store.expire_sandboxes().await.unwrap(), 1);
    assert_eq!(bench.get(&id).await.status(), Status::Stopping);
    let actor = Actor::platform("test");
    let ended = bench.store.set_policy(bench.team, &id, &PolicyChange::default(), &actor).await.unwrap();
    assert!(matches!(ended, Timed::Ended(Status::Stopping)));
}

#[tokio::test]
async fn a_report_changes_only_what_it_can_know() {
    let bench = Bench::new().await;
    let (id, run) = bench.create().await;
    let see = async |observed, revision| {
        bench.store.take_sightings(bench.host, &[sighting(&id, observed, revision)], false).await.unwrap()
    };
    // Under way: the operation says more.
    see(Observed::Failed, 1).await;
    assert_eq!(bench.get(&id).await.status(), Status::Starting);
    bench.run(&run).await;
    // Of an older wish: nothing.
    see(Observed::Failed, 0).await;
    assert_eq!(bench.get(&id).await.status(), Status::Running);
    see(Observed::Failed, 1).await;
    assert_eq!(bench.get(&id).await.status(), Status::Error);
    see(Observed::Running, 1).await;
    assert_eq!(bench.get(&id).await.status(), Status::Running);

    // Not named by a complete report: asked about, not written off.
    assert!(bench.store.absent_sandboxes().await.unwrap().is_empty());
    bench.store.take_sightings(bench.host, &[], false).await.unwrap();
    assert!(
        bench.store.absent_sandboxes().await.unwrap().is_empty(),
        "an incomplete report says nothing of the others"
    );
    bench.store.take_sightings(bench.host, &[], true).await.unwrap();
    assert_eq!(bench.store.absent_sandboxes().await.unwrap().len(), 1);
    assert_eq!(bench.get(&id).await.status(), Status::Running);
    bench.store.sandbox_is_present(&id).await.unwrap();
    assert_eq!(bench.store.sandbox_is_gone(&id, 1, "gone").await.unwrap(), Update::Stale, "present again");
    bench.store.take_sightings(bench.host, &[], true).await.unwrap();
    assert_eq!(bench.store.sandbox_is_gone(&id, 1, "gone").await.unwrap(), Update::Changed);

    // Killed, and there again: it ends again, whoever brought it back.
    let KillWish::Opened(kill) = bench.kill(&id).await else { panic!("not opened") };
    bench.store.finish_kill(&kill, &[]).await.unwrap();
    see(Observed::Running, 1).await;
    let claimed = bench.store.claim_operations(&bench.lease, 10).await.unwrap();
    assert!(claimed.iter().any(|operation| operation.kind == Kind::Kill && operation.sandbox == id));
    assert_eq!(bench.get(&id).await.status(), Status::Stopped);
    let stranger = SandboxId::from_random(99);
    let seen = [sighting(&stranger, Observed::Running, 1)];
    let unclaimed = bench.store.take_sightings(bench.host, &seen, false).await.unwrap().unclaimed;
    assert_eq!(unclaimed, [stranger.to_string()]);
}

/// Text that cannot be, in columns that the program reads: that row is refused, and nothing panics.
#[tokio::test]
async fn damaged_rows_are_errors_and_not_panics() {
    let bench = Bench::new().await;
    let (id, _) = bench.create().await;
    let (fine, _) = bench.create().await;
    bench.database.sql(&format!("update sandboxes set vcpus = 1000000 where id = '{id}'")).await;
    let error = bench.store.sandbox(bench.team, &id).await.unwrap_err();
    assert!(!error.is_unavailable(), "{error}");
    assert!(bench.store.sandbox(bench.team, &fine).await.unwrap().is_some());
}

#[tokio::test]
async fn migrations_run_once_whoever_starts_them() {
    let database = Database::new().await;
    let stores: Vec<Store> = (0..4).map(|_| Store::new(&database.url).unwrap()).collect();
    let done = futures::future::join_all(stores.iter().map(Store::migrate)).await;
    assert!(done.iter().all(Result::is_ok), "{done:?}");
    let rows = database.sql("select count(*) from _sqlx_migrations where success").await;
    let files = std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/migrations")).unwrap().count();
    assert_eq!(rows.trim(), files.to_string());
}

#[tokio::test]
async fn pauses_and_resumes_are_wishes_of_their_own_revisions() {
    let bench = Bench::new().await;
    let (id, run) = bench.create().await;
    let actor = Actor::platform("test");
    let pause = async || bench.store.wish_paused(bench.team, &id, Kept::Memory, &bench.lease, &actor).await.unwrap();
    let resume =
        async || bench.store.wish_resumed(bench.team, &id, ResumeOf::Wish, &bench.lease, &actor).await.unwrap();
    let opened = |turned: Turned| match turned {
        Turned::Opened(operation) => operation,
        _ => panic!("it was not opened"),
    };
    assert!(matches!(pause().await, Turned::Wrong(Status::Starting)));
    bench.run(&run).await;
    assert!(matches!(resume().await, Turned::Is));
    let pausing = opened(pause().await);
    assert_eq!((pausing.kind, pausing.revision, bench.get(&id).await.status()), (Kind::Pause, 2, Status::Pausing));
    assert!(matches!(pause().await, Turned::UnderWay(id) if id == pausing.id));
    assert_eq!(bench.store.finish_pause(&pausing, &report("i1")).await.unwrap(), Update::Changed);
    assert_eq!((bench.get(&id).await.status(), bench.phase(&pausing).await), (Status::Paused, Phase::Done));
    assert!(matches!(pause().await, Turned::Is));
    let resuming = opened(resume().await);
    assert_eq!((resuming.kind, resuming.revision, bench.get(&id).await.status()), (Kind::Resume, 3, Status::Resuming));
    // Whoever comes late with the older wish changes nothing.
    assert_eq!(bench.store.finish_pause(&pausing, &report("i1")).await.unwrap(), Update::Stale);
    let back = bench.store.take_back(&resuming, Observed::Paused, "no_hosts_available", "no room", &[]).await.unwrap();
    assert_eq!(back, Update::Changed);
    let paused = bench.get(&id).await;
    assert_eq!((paused.status(), paused.reason.as_deref()), (Status::Paused, Some("no room")));
    let failed = Phase::Failed { code: "no_hosts_available".to_owned(), message: "no room".to_owned() };
    assert_eq!(bench.phase(&resuming).await, failed);
    let resuming = opened(resume().await);
    bench.store.finish_run(&resuming, &report("i2")).await.unwrap();
    let running = bench.get(&id).await;
    assert_eq!((running.status(), running.incarnation.as_deref()), (Status::Running, Some("i2")));
    assert_eq!(running.envs["SECRET"], "x", "they are told to the guest again at its next resume");
    // A pause that does not come about.
    let pausing = opened(pause().await);
    bench.store.take_back(&pausing, Observed::Running, "insufficient_storage", "full", &[]).await.unwrap();
    assert_eq!((bench.get(&id).await.status(), bench.get(&id).await.revision), (Status::Running, 5));
    // A kill supersedes it, and nothing turns a sandbox that ends.
    let pausing = opened(pause().await);
    assert!(matches!(bench.kill(&id).await, KillWish::Opened(_)));
    assert_eq!(bench.phase(&pausing).await, Phase::Superseded);
    assert_eq!(bench.store.finish_pause(&pausing, &report("i2")).await.unwrap(), Update::Stale);
    assert!(matches!(pause().await, Turned::Wrong(Status::Stopping)));
    assert!(matches!(resume().await, Turned::Wrong(Status::Stopping)));
}

#[tokio::test]
async fn a_call_resumes_only_what_is_to_run_again_by_itself() {
    let bench = Bench::new().await;
    let (id, run) = bench.create().await;
    bench.run(&run).await;
    let actor = Actor::platform("test");
    let paused = bench.store.wish_paused(bench.team, &id, Kept::Memory, &bench.lease, &actor).await.unwrap();
    let Turned::Opened(pausing) = paused else { panic!("it was not opened") };
    bench.store.finish_pause(&pausing, &report("i1")).await.unwrap();
    let call = async |change: &str| {
        bench.database.sql(&format!("update sandboxes set {change}")).await;
        bench.store.wish_resumed(bench.team, &id, ResumeOf::Call, &bench.lease, &actor).await.unwrap()
    };
    assert!(matches!(call("auto_resume = false").await, Turned::Wrong(Status::Paused)));
    assert!(matches!(call("auto_resume = true, kept = 'disk'").await, Turned::Wrong(Status::Paused)));
    let Turned::Opened(resuming) = call("kept = 'memory'").await else { panic!("it was not opened") };
    // Who comes next waits for the same.
    assert!(matches!(call("auto_resume = false").await, Turned::UnderWay(id) if id == resuming.id));
}

#[tokio::test]
async fn what_is_paused_takes_no_room_and_is_missed_when_it_is_gone() {
    let bench = Bench::new().await;
    // Room for eight of 512 MiB.
    let mut made = Vec::new();
    for _ in 0..8 {
        let (id, run) = bench.create().await;
        bench.run(&run).await;
        made.push(id);
    }
    let actor = Actor::platform("test");
    let Turned::Opened(pausing) =
        bench.store.wish_paused(bench.team, &made[0], Kept::Memory, &bench.lease, &actor).await.unwrap()
    else {
        panic!("it was not opened")
    };
    bench.store.finish_pause(&pausing, &report("i1")).await.unwrap();
    let (ninth, _) = bench.create().await;
    let wished = bench.store.wish_resumed(bench.team, &made[0], ResumeOf::Wish, &bench.lease, &actor).await.unwrap();
    assert!(matches!(wished, Turned::NoRoom));
    bench.kill(&ninth).await;
    bench.database.sql(&format!("update sandboxes set observed = 'killed' where id = '{ninth}'")).await;
    // A host that names it no more is asked about it; a paused one is no less missed than a running one.
    let seen: Vec<_> = made[1..].iter().map(|id| sighting(id, Observed::Running, 1)).collect();
    bench.store.take_sightings(bench.host, &seen, true).await.unwrap();
    let absent = bench.store.absent_sandboxes().await.unwrap();
    assert_eq!(absent.iter().map(|sandbox| sandbox.id.clone()).collect::<Vec<_>>(), [made[0].clone()]);
    bench.store.sandbox_is_gone(&made[0], 2, "the host no longer has it").await.unwrap();
    assert_eq!(bench.get(&made[0]).await.status(), Status::Missing);
}

#[tokio::test]
async fn a_snapshot_has_its_name_alone_and_goes_when_nothing_begins_with_it() {
    let bench = Bench::new().await;
    let (id, run) = bench.create().await;
    assert!(matches!(bench.snapshot(&id, "one").await, SnapshotWish::Wrong(Status::Starting)));
    bench.run(&run).await;
    assert!(matches!(bench.snapshot(&id, "minimal").await, SnapshotWish::NameReserved));
    let SnapshotWish::Opened(one, taking) = bench.snapshot(&id, "one").await else { panic!("not opened") };
    assert!(matches!(bench.snapshot(&id, "two").await, SnapshotWish::UnderWay));
    // A newer wish for the sandbox leaves it alone.
    let actor = Actor::platform("test");
    assert!(matches!(
        bench.store.wish_paused(bench.team, &id, Kept::Memory, &bench.lease, &actor).await,
        Ok(Turned::Opened(_))
    ));
    assert_eq!((bench.phase(&taking).await, bench.unwanted().await), (Phase::Open, 0));
    let name = "one".parse().unwrap();
    assert_eq!(bench.store.snapshot_named(bench.team, &name).await.unwrap(), None, "it is not there yet");
    assert_eq!(bench.store.snapshot_is_ready(one, 7).await.unwrap(), Update::Changed);
    assert_eq!(bench.store.snapshot_is_ready(one, 9).await.unwrap(), Update::Stale);
    bench.store.finish_operation(&taking, &[("save".to_owned(), 2.0)]).await.unwrap();
    let other_team = TeamId(Uuid::now_v7());
    assert_eq!(bench.store.snapshot_named(other_team, &name).await.unwrap(), None);
    assert!(bench.store.snapshots(other_team).await.unwrap().is_empty());
    let found = bench.store.snapshot_named(bench.team, &name).await.unwrap().unwrap();
    assert_eq!((found.id, found.size_bytes, &found.sandbox), (one, 7, &id));
    assert_eq!(bench.store.snapshots(bench.team).await.unwrap(), [found]);
    let [pause] = bench.store.claim_operations(&bench.lease, 9).await.unwrap().try_into().unwrap();
    bench.store.finish_pause(&pause, &report("i1")).await.unwrap();
    assert!(matches!(bench.snapshot(&id, "one").await, SnapshotWish::NameTaken));

    // What is about to begin with it is waited for.
    let begun = bench.begin_with(one).await;
    assert!(!bench.store.delete_snapshot(other_team, &name, false, &actor).await.unwrap());
    assert!(bench.store.delete_snapshot(bench.team, &name, false, &actor).await.unwrap());
    assert!(!bench.store.delete_snapshot(bench.team, &name, false, &actor).await.unwrap());
    assert_eq!(bench.unwanted().await, 0);
    bench.run(&begun).await;
    assert_eq!(bench.unwanted().await, 1);
    bench.store.forget_snapshot(one).await.unwrap();
    assert_eq!(bench.unwanted().await, 0);
    // Its name is free; one that fails frees it, too, and so does one whose operation got lost.
    let SnapshotWish::Opened(_, failing) = bench.snapshot(&id, "one").await else { panic!("not opened") };
    bench.store.fail_snapshot(&failing, "agent_error", "no").await.unwrap();
    assert!(matches!(bench.phase(&failing).await, Phase::Failed { .. }));
    assert_eq!(bench.unwanted().await, 1);
    let SnapshotWish::Opened(..) = bench.snapshot(&id, "one").await else { panic!("not opened") };

    let timeline = bench.store.timeline(bench.team, &id).await.unwrap().unwrap();
    let kinds: Vec<_> = timeline.iter().map(|entry| entry.kind.as_str()).collect();
    assert_eq!(kinds, ["run", "snapshot", "pause", "snapshot", "snapshot"]);
    assert_eq!(timeline[1].steps, [("save".to_owned(), 2.0)]);
    assert_eq!(bench.store.timeline(other_team, &id).await.unwrap(), None);
}

#[tokio::test]
async fn a_fork_is_all_of_its_sandboxes_or_none() {
    let bench = Bench::new().await;
    let (id, run) = bench.create().await;
    assert!(matches!(bench.fork(&id, 1, None).await, ForkWish::Wrong(Status::Starting)));
    bench.run(&run).await;
    // The host has 4096 MiB, and the source takes 512 of them.
    assert!(matches!(bench.fork(&id, 8, None).await, ForkWish::NoRoom));
    assert_eq!(bench.store.sandboxes(bench.team, 100, None, &Which::default()).await.unwrap().len(), 1);
    let key = Key { scope: "t fork".to_owned(), key: "k".to_owned(), args_hash: [1; 32] };
    let ForkWish::Opened(operations) = bench.fork(&id, 7, Some(&key)).await else { panic!("not opened") };
    assert_eq!(operations.len(), 7);
    let source = bench.get(&id).await;
    let mut snapshots = std::collections::BTreeSet::new();
    for operation in &operations {
        let child = bench.get(&operation.sandbox).await;
        assert_eq!((operation.kind, child.status()), (Kind::Run, Status::Starting));
        assert_eq!((&child.template, child.shape, child.policy.timeout_sec), (&source.template, source.shape, 60));
        assert_eq!((child.policy.on_timeout, child.policy.auto_resume), (OnTimeout::Pause, true));
        assert_eq!(child.envs.len(), 2);
        assert_eq!(child.host.unwrap().host, bench.host);
        snapshots.insert(child.snapshot.unwrap());
    }
    assert_eq!(snapshots.len(), 1);
    let ForkWish::Repeated(again) = bench.fork(&id, 7, Some(&key)).await else { panic!("not repeated") };
    let ids = |list: Vec<SandboxId>| list.into_iter().collect::<std::collections::BTreeSet<_>>();
    let made = ids(operations.iter().map(|operation| operation.sandbox.clone()).collect());
    assert_eq!(ids(again.into_iter().map(|(child, _)| child).collect()), made);
    let other = Key { args_hash: [2; 32], ..key };
    assert!(matches!(bench.fork(&id, 1, Some(&other)).await, ForkWish::OtherArguments));
    assert!(bench.store.snapshots(bench.team).await.unwrap().is_empty(), "it has no name");

    // It goes when the last of them has begun, failed to, or is to be killed.
    let [failed, killed, rest @ ..] = &operations[..] else { panic!("seven") };
    bench.store.fail_run(failed, "agent_error", "no", &[]).await.unwrap();
    assert!(matches!(bench.kill(&killed.sandbox).await, KillWish::Opened(_)));
    for operation in rest {
        assert_eq!(bench.unwanted().await, 0);
        bench.run(operation).await;
    }
    assert_eq!(bench.unwanted().await, 1);

    // A host with a snapshot is not removed by accident.
    let SnapshotWish::Opened(named, _) = bench.snapshot(&id, "kept").await else { panic!("not opened") };
    bench.store.snapshot_is_ready(named, 1).await.unwrap();
    bench.database.sql("update sandboxes set observed = 'killed', desired = 'killed'").await;
    let actor = Actor::platform("test");
    let held = bench.store.delete_host(bench.host, false, &actor).await.unwrap();
    let Deleted::Holds(Losses { sandboxes, snapshots }) = held else { panic!("it is gone") };
    assert_eq!((sandboxes.len(), snapshots), (0, vec!["kept".to_owned()]));
    assert!(matches!(bench.store.delete_host(bench.host, true, &actor).await.unwrap(), Deleted::Done));
    assert!(bench.store.snapshots(bench.team).await.unwrap().is_empty());
}
