//! What must hold at a rest, by what is not under test: rows, processes, files, the clients' ledger, and the numbers that guard invariants.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use reqwest::Method;
use testkit::metrics::{Page, scrape};

use super::super::cluster::{Cluster, wait};
use super::super::history::{Call, Event, Said, Wished, contradiction};
use super::super::place::Place;
use super::super::truth;
use super::clients::{History, Ledger};
use super::machine::Machine;

/// After the last fault everything is true again within this time; what a kernel repeats after a cut of its cable comes late.
const REST_MAX: Duration = Duration::from_secs(90);
/// Of a control plane or an agent, however long it has run: some times what they have.
const DESCRIPTORS_MAX: usize = 200;
const MEMORY_MIB_MAX: u64 = 256;
/// These stay 0 whatever breaks, or are 0 at a rest.
const OF_REPLICAS: [&str; 5] = [
    "wrenn_panics_total",
    "wrenn_operations_overdue",
    "wrenn_lost_sandboxes",
    "wrenn_unclaimed_sandboxes",
    "wrenn_brake_active",
];
const OF_AGENTS: [&str; 4] = [
    "wrenn_panics_total",
    "wrenn_agent_quarantined_sandboxes",
    "wrenn_agent_leaked_total",
    "wrenn_agent_snapshot_corrupt_total",
];
/// Words that no log may have.
const PANICKED: &str = "panicked at";

#[derive(Default)]
pub struct Inspector {
    pub judgements: u64,
    pub histories: u64,
    pub events: u64,
    /// Whose wishes the hosts could not fulfil: nothing follows from what was said of them.
    pub taken_back: u64,
    pub rest_longest: Duration,
    /// The most of each program, in the first third of the hour and now.
    pub sizes: BTreeMap<String, Vec<Size>>,
    read: BTreeMap<PathBuf, usize>,
}

#[derive(Debug, Clone, Copy)]
pub struct Size {
    pub descriptors: usize,
    pub memory_mib: u64,
}

impl Inspector {
    /// Nobody asks anything, and nothing is broken any more.
    pub async fn judge(&mut self, cluster: &Cluster, machines: &[Machine], ledger: &Ledger) {
        let began = Instant::now();
        let places: Vec<&Place> = machines.iter().map(|machine| machine.place.as_ref()).collect();
        wait("the hosts to be heard of", REST_MAX, || async {
            let silent = "hosts where last_heartbeat_at < now() - interval '45 s'";
            cluster.count(silent).await == 0 && all_attached(machines).await
        })
        .await;
        wait("the platform to rest", REST_MAX, || async {
            cluster.count("operations where phase = 'open'").await == 0
                && cluster.count("snapshots where name is null or state <> 'ready'").await == 0
        })
        .await;
        truth::judge(cluster, &places).await;
        self.rest_longest = self.rest_longest.max(began.elapsed());
        truth::judge_audit(cluster).await;
        failures(cluster, ledger).await;
        self.judge_histories(cluster, ledger).await;
        clean(cluster, ledger).await;
        truth::judge(cluster, &places).await;
        left_over(cluster, &places).await;
        one_microvm_each(&places);
        self.judge_programs(cluster, machines).await;
        let wrong = std::mem::take(&mut *ledger.wrong.lock().unwrap());
        assert!(wrong.is_empty(), "{wrong:#?}");
        self.judgements += 1;
    }

    async fn judge_histories(&mut self, cluster: &Cluster, ledger: &Ledger) {
        let ids = "select distinct sandbox_id from operations where phase = 'failed' and kind in ('pause', 'resume')";
        let taken_back: BTreeSet<String> = cluster.rows(ids).await.into_iter().map(|mut row| row.remove(0)).collect();
        let harmed = ledger.harmed.lock().unwrap().clone();
        let mut all = std::mem::take(&mut *ledger.histories.lock().unwrap());
        let ended: Vec<String> = ledger.ended.lock().unwrap().keys().cloned().collect();
        all.append(&mut ledger.ended.lock().unwrap());
        let mut go_on = BTreeMap::new();
        for (id, mut history) in all {
            let began = Instant::now();
            let status = cluster.team.status(&id).await;
            if harmed.contains(&id) {
                continue;
            }
            let is = match status.as_str() {
                "running" => Wished::Running,
                "paused" => Wished::Paused,
                "stopped" => Wished::Killed,
                other => panic!("{id} is {other} at a rest"),
            };
            assert!(!ended.contains(&id) || is == Wished::Killed, "{id} was killed and is {status}");
            history.events.push(Event { call: Call::Get, said: Said::Is(is), began, ended: Instant::now() });
            if taken_back.contains(&id) {
                self.taken_back += 1;
            } else if let Some(events) = contradiction(history.first, &history.events) {
                panic!("no order explains what was said of {id}: {events:#?}");
            }
            self.histories += 1;
            self.events += history.events.len() as u64;
            if is != Wished::Killed {
                go_on.insert(id, History { first: is, events: Vec::new() });
            }
        }
        *ledger.histories.lock().unwrap() = go_on;
        let made = ledger.made.lock().unwrap().clone();
        let rows: BTreeSet<String> =
            cluster.rows("select id from sandboxes").await.into_iter().map(|mut row| row.remove(0)).collect();
        let lost: Vec<_> = made.difference(&rows).collect();
        assert!(lost.is_empty(), "acknowledged, and in no row: {lost:?}");
        ledger.keys.lock().unwrap().clear();
    }

    async fn judge_programs(&mut self, cluster: &Cluster, machines: &[Machine]) {
        for (number, replica) in cluster.replicas.iter().enumerate() {
            let name = format!("replica {number}");
            stays_zero(&name, &scrape(replica.metrics).await, &OF_REPLICAS);
            self.measure(&name, replica.pid());
            self.no_panic(&replica.log_path());
        }
        for machine in machines {
            let name = format!("agent {}", machine.number);
            stays_zero(&name, &scrape(machine.metrics()).await, &OF_AGENTS);
            self.measure(&name, machine.pid());
            self.no_panic(&machine.log_path());
        }
        self.measure("this test", std::process::id());
    }

    fn measure(&mut self, name: &str, pid: u32) {
        let descriptors = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
        let memory_mib = line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() / 1024;
        self.sizes.entry(name.to_owned()).or_default().push(Size { descriptors, memory_mib });
        let is_bounded = descriptors < DESCRIPTORS_MAX && memory_mib < MEMORY_MIB_MAX;
        assert!(is_bounded, "{name} has {descriptors} descriptors and {memory_mib} MiB");
    }

    /// In what was written since the last look.
    fn no_panic(&mut self, log: &Path) {
        let text = std::fs::read(log).unwrap();
        let read = self.read.insert(log.to_owned(), text.len()).unwrap_or_default();
        let text = String::from_utf8_lossy(&text[read..]);
        let panics: Vec<&str> = text.lines().filter(|line| line.contains(PANICKED)).collect();
        assert!(panics.is_empty(), "{}: {panics:#?}", log.display());
    }
}

async fn all_attached(machines: &[Machine]) -> bool {
    for machine in machines {
        // An agent that has just been started does not serve yet.
        if tokio::net::TcpStream::connect(machine.metrics()).await.is_err() {
            return false;
        }
        if value(machine.metrics(), "wrenn_agent_link_up").await != 1.0 {
            return false;
        }
    }
    true
}

async fn value(of: SocketAddr, name: &str) -> f64 {
    scrape(of).await.sum(name)
}

fn stays_zero(name: &str, page: &Page, metrics: &[&str]) {
    let risen: Vec<_> =
        metrics.iter().map(|metric| (*metric, page.sum(metric))).filter(|(_, sum)| *sum != 0.0).collect();
    assert!(risen.is_empty(), "{name}: {risen:?}");
}

/// Only what the test ended has failed, or what its creator was told of.
async fn failures(cluster: &Cluster, ledger: &Ledger) {
    let harmed = ledger.harmed.lock().unwrap().clone();
    let made = ledger.histories.lock().unwrap().keys().cloned().collect::<BTreeSet<_>>();
    for row in cluster.rows("select id, coalesce(reason, '') from sandboxes where observed = 'failed'").await {
        let is_right = harmed.contains(&row[0]) || !made.contains(&row[0]);
        assert!(is_right, "{} ran, nothing was done to it, and it failed: {}", row[0], row[1]);
    }
}

/// What failed is killed, snapshots are removed: a host has room for as many.
async fn clean(cluster: &Cluster, ledger: &Ledger) {
    for row in cluster.rows("select id from sandboxes where observed = 'failed'").await {
        cluster.team.verb(&row[0], "kill").await;
    }
    let harmed = std::mem::take(&mut *ledger.harmed.lock().unwrap());
    for id in harmed {
        cluster.team.verb(&id, "kill").await;
        ledger.forget(&id);
    }
    // Those that run and were never told of: their creators gave up.
    let known: BTreeSet<String> = ledger.histories.lock().unwrap().keys().cloned().collect();
    for row in cluster.rows("select id from sandboxes where desired <> 'killed'").await {
        if !known.contains(&row[0]) {
            cluster.team.verb(&row[0], "kill").await;
        }
    }
    ledger.snapshots.lock().unwrap().clear();
    for row in cluster.rows("select name from snapshots where name is not null").await {
        let answer = cluster.admin.call(Method::DELETE, &format!("/v1/snapshots/{}", row[0]), None).await.unwrap();
        assert!(matches!(answer.status, 200..300), "{} {}", answer.status, answer.body);
    }
}

/// On the hosts there is what sandboxes that are there need, and nothing else.
async fn left_over(cluster: &Cluster, places: &[&Place]) {
    let mut faults = vec!["not looked yet".to_owned()];
    let began = Instant::now();
    while !faults.is_empty() && began.elapsed() < REST_MAX {
        faults.clear();
        for place in places {
            let alive: BTreeSet<String> = place.alive().into_keys().collect();
            let rows = format!("select id from sandboxes where observed <> 'killed' and host_id = '{}'", place.id.0);
            let rows: BTreeSet<String> = cluster.rows(&rows).await.into_iter().map(|mut row| row.remove(0)).collect();
            let mut expect = |what: &str, found: BTreeSet<String>, right: bool| {
                if !right {
                    faults.push(format!("{what} of host {}: {found:?}", place.id));
                }
            };
            let slots = place.names("slots");
            expect("slots", slots.clone(), slots.len() == alive.len());
            let groups = place.names("cgroups");
            expect("control groups", groups.clone(), groups.len() == alive.len());
            let dirs = place.names("pool/sandboxes");
            expect("directories", &dirs - &rows, dirs == rows);
            for dir in ["pool/snapshots", "pool/quarantine"] {
                let names = place.names(dir);
                expect(dir, names.clone(), names.is_empty());
            }
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert!(faults.is_empty(), "left over: {faults:#?}");
}

/// Of each incarnation, wherever.
fn one_microvm_each(places: &[&Place]) {
    let mut known = BTreeSet::new();
    for (sandbox, incarnation) in places.iter().flat_map(|place| place.launches()) {
        assert!(known.insert(incarnation.clone()), "two microVMs of incarnation {incarnation} of {sandbox}");
    }
}

/// Looks all the time for a sandbox that has two living microVMs at once.
pub async fn watch(places: Vec<Arc<Place>>) {
    /// What was ended may be seen before it is, and what was begun after it.
    const LOOK_AGAIN: Duration = Duration::from_millis(60);
    let look = || {
        let mut pids: BTreeMap<String, BTreeSet<i32>> = BTreeMap::new();
        for place in &places {
            for (id, own) in place.alive() {
                pids.entry(id).or_default().extend(own);
            }
        }
        pids.retain(|id, pids| pids.len() > 1 && !id.starts_with("nobody's"));
        pids
    };
    loop {
        tokio::time::sleep(Duration::from_millis(250)).await;
        let first = look();
        if first.is_empty() {
            continue;
        }
        tokio::time::sleep(LOOK_AGAIN).await;
        for (id, pids) in look() {
            let both = first.get(&id).map_or(0, |before| before.intersection(&pids).count());
            assert!(both < 2, "{id} lives {both} times at once: {pids:?}");
        }
    }
}
