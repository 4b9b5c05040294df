//! Placement under fire: random hosts and random wishes, by two replicas at once. At no instant is more reserved on a host than it sells,
//! or held by a team than it may have, or on a host of another team, or on the platform's of a team that has its own; and nothing is left
//! when all have ended.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use model::ids::{HostId, SandboxId, TeamId, UserId};
use model::sandbox::{Kept, Observed};
use model::shape::Shape;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use store::audit::Actor;
use store::hosts::{Created as CreatedHost, NewHost};
use store::operations::{Lease, Operation};
use store::placement::{Asked, Strategy};
use store::policy::{Policy, PolicyChange};
use store::presence::Replica;
use store::quotas::Limits;
use store::sandboxes::{Created, NewSandbox, Report};
use store::snapshots::{Child, ForkWish};
use store::wishes::{KillWish, ResumeOf, Turned};
use store::{Rules, Store};
use testkit::postgres::Database;
use uuid::Uuid;

const WORKERS: u64 = 8;
const WISHES: u32 = 60;
const SEEDS: [u64; 3] = [1, 20_261_127, 0xdead_beef];

/// Hosts on which more is reserved than they sell, and teams that hold more than they may: none.
const BROKEN: &str = "
    select 'host', h.id::text from hosts h join (
        select host_id, sum(vcpus) as vcpus, sum(memory_mib) as memory, sum(memory_mib + disk_mib / 16) as pool
        from sandboxes where observed not in ('killed', 'failed', 'paused', 'lost') group by host_id) r on r.host_id = h.id
    where r.vcpus > h.cpu_cores * 16 or r.memory > h.memory_mb or r.pool > (h.disk_gb + 1) * 1024 - 1024
    union all
    select 'team', t.team_id::text from team_quotas t join (
        select team_id, count(*) as sandboxes, count(*) filter (where observed <> 'paused') as running,
            sum(vcpus) filter (where observed <> 'paused') as vcpus, sum(memory_mib) filter (where observed <> 'paused') as memory
        from sandboxes where observed not in ('killed', 'failed') group by team_id) u on u.team_id = t.team_id
    where u.sandboxes > t.sandboxes or u.running > t.running or u.vcpus > t.vcpus or u.memory > t.memory_mb
    union all
    select 'foreign', s.id from sandboxes s join hosts h on h.id = s.host_id join teams t on t.id = s.team_id
    where h.team_id is distinct from (case when t.is_byoc then t.id end)";

struct Platform {
    database: Database,
    stores: [Store; 2],
    teams: Vec<TeamId>,
    actor: Actor,
}

impl Platform {
    async fn new(random: &mut StdRng) -> Self {
        let database = Database::new().await;
        let store = || Store::new(&database.url).unwrap().with_rules(Rules::default());
        let stores = [store(), store()];
        stores[0].migrate().await.unwrap();
        let mut platform = Self { database, stores, teams: Vec::new(), actor: Actor::platform("test") };
        for _ in 0..3 {
            platform.team(random).await;
        }
        // The last one has hosts of its own.
        let own = platform.teams[2];
        let changed = platform.stores[0].let_have_hosts(own, &platform.actor).await.unwrap();
        assert_eq!(changed, store::teams::ByocChange::Done);
        for _ in 0..random.random_range(2..6) {
            platform.host(None, random).await;
        }
        for _ in 0..2 {
            platform.host(Some(own), random).await;
        }
        platform
    }

    /// The last one has no limits.
    async fn team(&mut self, random: &mut StdRng) {
        let team = TeamId(Uuid::now_v7());
        let store = &self.stores[0];
        if self.teams.is_empty() {
            assert!(store.make_first_administrator(UserId(Uuid::now_v7()), team, "a@b", "hash").await.unwrap());
        } else {
            self.database.sql(&format!("insert into teams (id, name) values ('{}', 't')", team.0)).await;
        }
        if self.teams.len() < 2 {
            let limits = Limits {
                sandboxes: Some(random.random_range(3..12)),
                running: Some(random.random_range(2..6)),
                vcpus: Some(random.random_range(2..12)),
                memory_mb: Some(random.random_range(512..4096)),
                ..Limits::default()
            };
            store.set_quotas(team, &limits, &self.actor).await.unwrap().expect("the team is there");
        }
        self.teams.push(team);
    }

    async fn host(&self, team: Option<TeamId>, random: &mut StdRng) {
        let new = NewHost {
            id: HostId(Uuid::now_v7()),
            team,
            provider: None,
            availability_zone: None,
            tags: if random.random_bool(0.5) { vec!["fast".to_owned()] } else { Vec::new() },
            created_by: "test".to_owned(),
            token_hash: random.random(),
        };
        assert!(matches!(self.stores[0].create_host(&new, None, &self.actor).await.unwrap(), CreatedHost::Made(_)));
        let (cores, memory, disk) =
            (random.random_range(1..3), random.random_range(512..4096), random.random_range(2..12));
        self.database
            .sql(&format!(
                "update hosts set state = 'active', address = 'h:1', cpu_cores = {cores}, memory_mb = {memory}, disk_gb = {disk},
                 disk_free_mb = {disk} * 1024, templates = '{{minimal}}', last_heartbeat_at = now() where id = '{}'",
                new.id.0
            ))
            .await;
    }

    async fn count(&self, of: &str) -> i64 {
        self.database.sql(&format!("select count(*) from {of}")).await.trim().parse().unwrap()
    }
}

/// One user, who makes a few dozen wishes for what is theirs.
struct Worker {
    store: Store,
    team: TeamId,
    lease: Lease,
    actor: Actor,
    random: StdRng,
    mine: Vec<SandboxId>,
    refused: u32,
}

impl Worker {
    async fn wish(&mut self) {
        let kind = self.random.random_range(0..10);
        let mine = (!self.mine.is_empty()).then(|| self.random.random_range(0..self.mine.len()));
        match (kind, mine) {
            (0..4, _) | (_, None) => self.create().await,
            (4 | 5, Some(one)) => self.kill(one).await,
            (6, Some(one)) => self.pause(one).await,
            (7 | 8, Some(one)) => self.resume(one).await,
            (_, Some(one)) => self.fork(one).await,
        }
    }

    async fn create(&mut self) {
        let random = &mut self.random;
        let (vcpus, memory, disk) =
            (random.random_range(1..5), random.random_range(64..512) * 2, random.random_range(1024..20_480));
        let strategy = [None, Some(Strategy::Spread), Some(Strategy::Pack)][random.random_range(0..3)];
        let tags = if random.random_bool(0.2) { vec!["fast".to_owned()] } else { Vec::new() };
        let new = NewSandbox {
            id: SandboxId::from_random(random.random()),
            team: self.team,
            template: "minimal".parse().unwrap(),
            snapshot: None,
            shape: Shape::new(vcpus, memory, disk).unwrap(),
            envs: BTreeMap::new(),
            metadata: BTreeMap::new(),
            default_user: String::new(),
            policy: Policy::default(),
            asked: Asked { tags, strategy },
        };
        let operation = match self.store.create_sandbox(&new, &self.lease, None, &self.actor).await.unwrap() {
            Created::Made(_, operation) => operation,
            Created::NoHost(shortage) => {
                assert!(!shortage.0.is_empty());
                self.refused += 1;
                return;
            }
            Created::OverQuota(exceeded) => {
                assert!(exceeded.used + exceeded.asked > exceeded.limit, "{exceeded:?}");
                self.refused += 1;
                return;
            }
            _ => panic!("a create is made or refused"),
        };
        self.mine.push(new.id);
        self.begin(operation).await;
    }

    /// The host starts it, refuses it, or it does not start at all.
    async fn begin(&mut self, mut operation: Operation) {
        for _ in 0..2 {
            if self.random.random_bool(0.7) {
                break;
            }
            let sandbox = self.store.sandbox(self.team, &operation.sandbox).await.unwrap().unwrap();
            let host = sandbox.host.as_ref().expect("it was placed").host;
            self.store.refuse_host(&operation, host).await.unwrap();
            operation.refused_hosts.push(host);
            if self.store.place(&operation, &sandbox).await.unwrap().is_err() {
                self.store.fail_run(&operation, "no_hosts_available", "no room", &[]).await.unwrap();
                return;
            }
        }
        if self.random.random_bool(0.1) {
            self.store.fail_run(&operation, "agent_error", "it broke", &[]).await.unwrap();
        } else {
            self.store.finish_run(&operation, &report(Observed::Running)).await.unwrap();
        }
    }

    async fn pause(&mut self, one: usize) {
        let id = self.mine[one].clone();
        let wished = self.store.wish_paused(self.team, &id, Kept::Memory, &self.lease, &self.actor).await.unwrap();
        if let Turned::Opened(operation) = wished {
            self.store.finish_pause(&operation, &report(Observed::Paused)).await.unwrap();
        }
    }

    async fn resume(&mut self, one: usize) {
        let id = self.mine[one].clone();
        let wished = self.store.wish_resumed(self.team, &id, ResumeOf::Wish, &self.lease, &self.actor).await.unwrap();
        match wished {
            Turned::Opened(operation) => {
                self.store.finish_run(&operation, &report(Observed::Running)).await.unwrap();
            }
            Turned::NoRoom | Turned::OverQuota(_) => self.refused += 1,
            _ => {}
        }
    }

    async fn fork(&mut self, one: usize) {
        let id = self.mine[one].clone();
        let child = |random: &mut StdRng| Child {
            id: SandboxId::from_random(random.random()),
            envs: BTreeMap::new(),
            metadata: BTreeMap::new(),
            policy: PolicyChange::default(),
        };
        let children: Vec<Child> = (0..self.random.random_range(1..4)).map(|_| child(&mut self.random)).collect();
        let wished = self.store.wish_forked(self.team, &id, &children, &self.lease, None, &self.actor).await.unwrap();
        match wished {
            ForkWish::Opened(operations) => {
                for operation in operations {
                    self.mine.push(operation.sandbox.clone());
                    self.store.finish_run(&operation, &report(Observed::Running)).await.unwrap();
                }
            }
            ForkWish::NoRoom | ForkWish::OverQuota(_) => self.refused += 1,
            _ => {}
        }
    }

    async fn kill(&mut self, one: usize) {
        let id = self.mine.swap_remove(one);
        if let KillWish::Opened(operation) =
            self.store.wish_killed(self.team, &id, &self.lease, &self.actor).await.unwrap()
        {
            self.store.finish_kill(&operation, &[]).await.unwrap();
        }
    }
}

fn report(observed: Observed) -> Report {
    Report {
        observed,
        reason: String::new(),
        incarnation: "i".to_owned(),
        isolation: "fake".to_owned(),
        versions: BTreeMap::new(),
        steps: Vec::new(),
        kept: Kept::Memory,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_sold_twice_and_nothing_is_left() {
    for seed in SEEDS {
        let platform = Arc::new(Platform::new(&mut StdRng::seed_from_u64(seed)).await);
        let is_over = Arc::new(AtomicBool::new(false));
        let watch = {
            let (platform, is_over) = (platform.clone(), is_over.clone());
            tokio::spawn(async move {
                let mut looks = 0;
                while !is_over.load(Ordering::Relaxed) {
                    let broken = platform.database.sql(BROKEN).await;
                    assert_eq!(broken.trim(), "", "seed {seed}");
                    looks += 1;
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                looks
            })
        };
        let worker = |number: u64| Worker {
            store: platform.stores[usize::try_from(number).unwrap() % 2].clone(),
            team: platform.teams[usize::try_from(number).unwrap() % platform.teams.len()],
            lease: Lease { replica: Replica::from_random(u32::try_from(number).unwrap() * 2) },
            actor: Actor::platform("test"),
            random: StdRng::seed_from_u64(seed ^ number << 32),
            mine: Vec::new(),
            refused: 0,
        };
        let workers = (0..WORKERS).map(worker).map(|mut worker| {
            tokio::spawn(async move {
                for _ in 0..WISHES {
                    worker.wish().await;
                }
                worker
            })
        });
        let mut done = Vec::new();
        for worker in futures::future::join_all(workers).await {
            done.push(worker.unwrap());
        }
        is_over.store(true, Ordering::Relaxed);
        assert!(watch.await.unwrap() > 0);
        assert!(done.iter().any(|worker| worker.refused > 0), "seed {seed}: it was never full, which shows nothing");
        assert!(platform.count("sandboxes").await > 20, "seed {seed}: hardly anything was placed");
        for worker in &mut done {
            while !worker.mine.is_empty() {
                worker.kill(0).await;
            }
        }
        assert_eq!(platform.count("sandboxes where observed not in ('killed', 'failed')").await, 0, "seed {seed}");
        for host in platform.stores[0].hosts(store::hosts::Sees::All).await.unwrap() {
            assert_eq!((host.held.running, host.held.vcpus, host.held.memory_mib), (0, 0, 0), "seed {seed}");
        }
        for team in &platform.teams {
            let used = platform.stores[0].quotas(*team).await.unwrap().unwrap().used;
            assert_eq!((used.sandboxes, used.running, used.vcpus, used.memory_mb, used.disk_mb), (0, 0, 0, 0, 0));
        }
    }
}
