//! Idle sandboxes on a real PostgreSQL: ended by a fresh word of their host alone, and not when they are used in between.

use std::collections::BTreeMap;
use std::time::Duration;

use model::ids::{HostId, SandboxId, TeamId, UserId};
use model::sandbox::{Kept, Observed, OnTimeout, Status};
use model::shape::Shape;
use store::Store;
use store::audit::Actor;
use store::hosts::NewHost;
use store::idleness::Pinged;
use store::operations::{Kind, Lease, Operation};
use store::placement::Asked;
use store::policy::{Policy, PolicyChange};
use store::presence::Replica;
use store::sandboxes::{Created, NewSandbox, Report, Sandbox, Sighting};
use store::snapshots::{Child, ForkWish, NewSnapshot, SnapshotWish};
use store::wishes::{ResumeOf, Timed, Turned};
use testkit::postgres::Database;
use uuid::Uuid;

/// One host with sandboxes that run, and are idle for too long after a minute.
struct Bench {
    database: Database,
    store: Store,
    team: TeamId,
    host: HostId,
    lease: Lease,
    actor: Actor,
    sequence: std::cell::Cell<i64>,
}

impl Bench {
    async fn new() -> Self {
        let database = Database::new().await;
        let store = Store::new(&database.url).unwrap();
        store.migrate().await.unwrap();
        let (team, host, actor) = (TeamId(Uuid::now_v7()), HostId(Uuid::now_v7()), Actor::platform("test"));
        assert!(store.make_first_administrator(UserId(Uuid::now_v7()), team, "a@b", "hash").await.unwrap());
        let new = NewHost {
            id: host,
            team: None,
            provider: None,
            availability_zone: None,
            created_by: "test".to_owned(),
            tags: Vec::new(),
            token_hash: [7; 32],
        };
        store.create_host(&new, None, &actor).await.unwrap();
        let lease = Lease { replica: Replica::from_random(7) };
        let bench = Self { database, store, team, host, lease, actor, sequence: 0.into() };
        bench
            .sql(
                "update hosts set state = 'active', address = 'h:1', cpu_cores = 64, memory_mb = 65536, templates = '{minimal}',
                 last_heartbeat_at = now(), agent_run = 'a', heartbeat_sequence = 1",
            )
            .await;
        bench
    }

    async fn sql(&self, text: &str) -> String {
        self.database.sql(text).await.trim().to_owned()
    }

    async fn create(&self, on_timeout: OnTimeout) -> SandboxId {
        let new = NewSandbox {
            id: SandboxId::from_random(Uuid::now_v7().as_u128()),
            team: self.team,
            template: "minimal".parse().unwrap(),
            snapshot: None,
            shape: Shape::new(1, 512, 5120).unwrap(),
            envs: BTreeMap::new(),
            metadata: BTreeMap::new(),
            default_user: String::new(),
            policy: Policy { on_timeout, idle_timeout_sec: 60, ..Policy::default() },
            asked: Asked::default(),
        };
        match self.store.create_sandbox(&new, &self.lease, None, &self.actor).await.unwrap() {
            Created::Made(sandbox, operation) => {
                self.store.finish_run(&operation, &report("i1")).await.unwrap();
                sandbox.id
            }
            _ => panic!("no room"),
        }
    }

    /// The sandbox has been there for long, used by nobody.
    async fn long_ago(&self, id: &SandboxId) {
        self.sql(&format!("update sandboxes set last_active_at = now() - interval '1 hour' where id = '{id}'")).await;
    }

    /// A heartbeat.
    async fn say(&self, id: &SandboxId, idle_sec: Option<i64>) {
        self.say_of("i1", id, idle_sec).await;
    }

    async fn say_of(&self, incarnation: &str, id: &SandboxId, idle_sec: Option<i64>) {
        let sequence = self.sequence.get() + 1;
        self.sequence.set(sequence);
        self.sql(&format!("update hosts set heartbeat_sequence = {sequence}")).await;
        let seen = [sighting(id, incarnation, idle_sec)];
        self.store.note_idleness(self.host, "a", sequence, &seen).await.unwrap();
    }

    async fn end_idle(&self) -> usize {
        self.store.end_idle_sandboxes().await.unwrap()
    }

    async fn get(&self, id: &SandboxId) -> Sandbox {
        self.store.sandbox(self.team, id).await.unwrap().unwrap()
    }

    async fn status(&self, id: &SandboxId) -> Status {
        self.get(id).await.status()
    }

    async fn claim(&self) -> Operation {
        let [operation] = self.store.claim_operations(&self.lease, 9).await.unwrap().try_into().unwrap();
        operation
    }

    /// How often the row was written.
    async fn version(&self, id: &SandboxId) -> String {
        self.sql(&format!("select xmin from sandboxes where id = '{id}'")).await
    }
}

fn report(incarnation: &str) -> Report {
    Report {
        observed: Observed::Running,
        reason: String::new(),
        incarnation: incarnation.to_owned(),
        isolation: "fake".to_owned(),
        versions: BTreeMap::new(),
        steps: Vec::new(),
        kept: Kept::Memory,
    }
}

fn sighting(id: &SandboxId, incarnation: &str, idle_sec: Option<i64>) -> Sighting {
    Sighting {
        id: id.to_string(),
        observed: Observed::Running,
        revision: 1,
        incarnation: incarnation.to_owned(),
        reason: String::new(),
        idle_sec,
    }
}

#[tokio::test]
async fn what_is_idle_for_too_long_is_paused_or_killed() {
    let bench = Bench::new().await;
    let (pausing, killing) = (bench.create(OnTimeout::PauseDisk).await, bench.create(OnTimeout::Kill).await);
    for id in [&pausing, &killing] {
        bench.long_ago(id).await;
        bench.say(id, Some(59)).await;
        assert_eq!(bench.end_idle().await, 0);
        assert!(bench.get(id).await.idle_since.is_some());
        bench.say(id, Some(60)).await;
        assert_eq!(bench.end_idle().await, 1);
        assert_eq!(bench.end_idle().await, 0, "one wish");
    }
    assert_eq!((bench.status(&pausing).await, bench.status(&killing).await), (Status::Pausing, Status::Stopping));
    assert_eq!(bench.get(&killing).await.reason.as_deref(), Some("idle"));
    let mut wished = bench.store.claim_operations(&bench.lease, 9).await.unwrap();
    wished.sort_by_key(|operation| operation.sandbox != pausing);
    assert_eq!(wished.iter().map(|operation| operation.kind).collect::<Vec<_>>(), [Kind::Pause, Kind::Kill]);
    let audit = bench.sql("select count(*) from audit where details->>'reason' = 'idle'").await;
    assert_eq!(audit, "2");

    // Paused it stays so; resumed, it begins anew, whatever was said of the run before.
    bench.store.finish_pause(&wished[0], &report("i1")).await.unwrap();
    bench.say(&pausing, Some(9999)).await;
    assert_eq!((bench.end_idle().await, bench.get(&pausing).await.idle_since), (0, None));
    let resumed =
        bench.store.wish_resumed(bench.team, &pausing, ResumeOf::Wish, &bench.lease, &bench.actor).await.unwrap();
    let Turned::Opened(resumed) = resumed else { panic!("not opened") };
    bench.store.finish_run(&resumed, &report("i2")).await.unwrap();
    bench.say_of("i1", &pausing, Some(9999)).await;
    bench.long_ago(&pausing).await;
    assert_eq!((bench.end_idle().await, bench.get(&pausing).await.idle_since), (0, None));
    bench.say_of("i2", &pausing, Some(70)).await;
    // A user's pause of less than a minute ago.
    assert_eq!(bench.end_idle().await, 0);
    bench.sql("update operations set created_at = now() - interval '2 minutes'").await;
    assert_eq!(bench.end_idle().await, 1);
}

#[tokio::test]
async fn a_pause_that_does_not_come_about_is_not_wished_again_at_once() {
    let bench = Bench::new().await;
    let id = bench.create(OnTimeout::Pause).await;
    bench.long_ago(&id).await;
    bench.say(&id, Some(70)).await;
    assert_eq!(bench.end_idle().await, 1);
    let pause = bench.claim().await;
    bench.store.take_back(&pause, Observed::Running, "insufficient_storage", "no room", &[]).await.unwrap();
    bench.say(&id, Some(75)).await;
    assert_eq!((bench.end_idle().await, bench.status(&id).await), (0, Status::Running));
    bench.sql("update operations set created_at = now() - interval '61 seconds'").await;
    bench.say(&id, Some(140)).await;
    assert_eq!((bench.end_idle().await, bench.status(&id).await), (1, Status::Pausing));
}

#[tokio::test]
async fn a_host_that_is_silent_says_nothing() {
    let bench = Bench::new().await;
    let id = bench.create(OnTimeout::Kill).await;
    bench.long_ago(&id).await;
    // Idle for less than its time, and then nothing more is heard.
    bench.say(&id, Some(50)).await;
    bench.sql("update sandboxes set idle_since = idle_since - interval '1 minute'").await;
    bench.sql("update hosts set idle_reported_at = idle_reported_at - interval '1 minute'").await;
    assert_eq!(bench.end_idle().await, 0);
    // For longer than its time, but nobody looked when that was fresh: the control plane was away.
    bench.say(&id, Some(100)).await;
    bench.sql("update hosts set idle_reported_at = now() - interval '20 seconds'").await;
    assert_eq!(bench.end_idle().await, 0);
    assert_eq!(bench.status(&id).await, Status::Running);
    // An agent that has just started does not know yet.
    bench.say(&id, None).await;
    assert_eq!((bench.end_idle().await, bench.get(&id).await.idle_since), (0, None));
    // A heartbeat that was overtaken.
    let seen = [sighting(&id, "i1", Some(100))];
    bench.store.note_idleness(bench.host, "a", bench.sequence.get() - 1, &seen).await.unwrap();
    bench.store.note_idleness(bench.host, "b", bench.sequence.get(), &seen).await.unwrap();
    assert_eq!((bench.end_idle().await, bench.get(&id).await.idle_since), (0, None));
}

/// Every kind of use takes away that it is idle, also when a report of before comes after it.
#[tokio::test]
async fn what_is_used_is_not_ended() {
    let bench = Bench::new().await;
    let id = bench.create(OnTimeout::Kill).await;
    for kind in ["ping", "call", "timeout", "snapshot", "fork"] {
        bench.long_ago(&id).await;
        bench.say(&id, Some(70)).await;
        match kind {
            "ping" => assert_eq!(bench.store.ping_sandbox(bench.team, &id).await.unwrap(), Pinged::Noted),
            "call" => bench.store.touch_sandbox(&id).await.unwrap(),
            "timeout" => {
                let set =
                    bench.store.set_policy(bench.team, &id, &PolicyChange::default(), &bench.actor).await.unwrap();
                assert!(matches!(set, Timed::Set(sandbox) if sandbox.idle_since.is_none()));
            }
            "snapshot" => {
                let name = "kept".parse().unwrap();
                let new = NewSnapshot { team: bench.team, of: &id, name: &name, is_published: false, built: None };
                let wish = bench.store.wish_snapshot(&new, &bench.lease, None, &bench.actor).await;
                assert!(matches!(wish.unwrap(), SnapshotWish::Opened(..)));
            }
            _ => {
                let child = Child {
                    id: SandboxId::from_random(5),
                    envs: BTreeMap::new(),
                    metadata: BTreeMap::new(),
                    policy: PolicyChange::default(),
                };
                let wish = bench.store.wish_forked(bench.team, &id, &[child], &bench.lease, None, &bench.actor).await;
                assert!(matches!(wish.unwrap(), ForkWish::Opened(_)));
                assert_eq!(bench.get(&SandboxId::from_random(5)).await.policy.idle_timeout_sec, 60, "as the source");
            }
        }
        assert_eq!((bench.end_idle().await, bench.get(&id).await.idle_since), (0, None), "{kind}");
        bench.say(&id, Some(71)).await;
        assert_eq!((bench.end_idle().await, bench.get(&id).await.idle_since), (0, None), "{kind}: a report of before");
        bench.sql("update operations set phase = 'done', created_at = now() - interval '2 minutes'").await;
    }
    // Another idle time while it runs, and none.
    bench.long_ago(&id).await;
    let set = async |idle_timeout_sec| {
        let change = PolicyChange { idle_timeout_sec, ..PolicyChange::default() };
        let set = bench.store.set_policy(bench.team, &id, &change, &bench.actor).await;
        bench.long_ago(&id).await;
        bench.say(&id, Some(100)).await;
        assert!(
            matches!(set.unwrap(), Timed::Set(sandbox) if Some(sandbox.policy.idle_timeout_sec) == idle_timeout_sec)
        );
        bench.end_idle().await
    };
    assert_eq!((set(Some(120)).await, set(Some(0)).await, set(Some(90)).await), (0, 0, 1));
    // What does not run cannot be pinged.
    let ping = async |team, id: &SandboxId| bench.store.ping_sandbox(team, id).await.unwrap();
    assert_eq!(ping(bench.team, &id).await, Pinged::Wrong(Status::Stopping));
    assert_eq!(ping(TeamId(Uuid::now_v7()), &id).await, Pinged::Missing);
    assert_eq!(ping(bench.team, &SandboxId::from_random(99)).await, Pinged::Missing);
}

/// Somebody uses it, or its host says that it works, while the reconciler looks: whoever has the row first, its word stands.
#[tokio::test(flavor = "multi_thread")]
async fn between_the_look_and_the_wish_it_may_be_used() {
    let bench = Bench::new().await;
    let id = bench.create(OnTimeout::Kill).await;
    for (n, change) in ["idle_since = null, last_active_at = now()", "idle_since = null", "idle_timeout_sec = 3600"]
        .into_iter()
        .enumerate()
    {
        bench.long_ago(&id).await;
        bench.sql("update sandboxes set idle_timeout_sec = 60").await;
        bench.say(&id, Some(70)).await;
        // Its row is held by somebody: it is passed over.
        let held = format!("begin; update sandboxes set {change} where id = '{id}'; select pg_sleep(1); commit;");
        let holding = bench.database.sql(&held);
        let looking = async {
            tokio::time::sleep(Duration::from_millis(300)).await;
            bench.end_idle().await
        };
        let (_, ended) = tokio::join!(holding, looking);
        assert_eq!((ended, bench.end_idle().await, bench.status(&id).await), (0, 0, Status::Running), "{n}");
    }
    // Pings and the reconciler at once, many times: one that was taken is never followed by an end.
    for _ in 0..30 {
        bench.sql("update sandboxes set desired = 'running', observed = 'running', idle_timeout_sec = 60").await;
        bench.sql("update operations set phase = 'done', created_at = now() - interval '2 minutes'").await;
        bench.long_ago(&id).await;
        bench.say(&id, Some(70)).await;
        let (pinged, ended) = tokio::join!(bench.store.ping_sandbox(bench.team, &id), bench.store.end_idle_sandboxes());
        match (pinged.unwrap(), ended.unwrap()) {
            (Pinged::Noted, 0) => assert_eq!(bench.status(&id).await, Status::Running),
            (Pinged::Wrong(Status::Stopping), 1) => assert_eq!(bench.status(&id).await, Status::Stopping),
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn nothing_is_written_when_nothing_has_changed() {
    let bench = Bench::new().await;
    let id = bench.create(OnTimeout::Kill).await;
    bench.long_ago(&id).await;
    let written = async |idle_sec| {
        let before = bench.version(&id).await;
        bench.say(&id, idle_sec).await;
        bench.version(&id).await != before
    };
    assert!(!written(Some(0)).await);
    assert!(!written(Some(19)).await, "pauses between two calls");
    assert!(written(Some(20)).await);
    assert!(!written(Some(22)).await, "the same instant");
    assert!(written(Some(40)).await);
    assert!(written(Some(0)).await);
    assert!(!written(None).await);
    // Of one whose idle time does not count nothing is written, and its host is not told of it.
    bench.sql("update sandboxes set idle_timeout_sec = 0").await;
    assert!(!written(Some(40)).await);
    let told = bench.store.note_idleness(bench.host, "a", bench.sequence.get(), &[]).await.unwrap();
    assert_eq!(told, []);
    bench.sql("update sandboxes set idle_timeout_sec = 60, last_active_at = now() - interval '7 seconds'").await;
    let told = bench.store.note_idleness(bench.host, "a", bench.sequence.get(), &[]).await.unwrap();
    let [told] = told.try_into().unwrap();
    assert_eq!((told.id, told.timeout_sec, told.active_sec_ago), (id.to_string(), 60, 7));
    let told = bench.store.note_idleness(HostId(Uuid::now_v7()), "a", 1, &[]).await.unwrap();
    assert_eq!(told, [], "another host's");
}
