//! Two replicas and two hosts, each host in a network namespace of its own, run under random faults of every kind: no invariant is broken.
//!
//! Each part of the time ends with a rest: the clients stop, what lasts is mended, and everything is judged.

mod cables;
mod clients;
mod faults;
mod inspection;
pub mod machine;

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::RwLock;
use tokio_util::sync::CancellationToken;

use super::cluster::Cluster;
use super::seed::{dice, seed};
use cables::Cables;
use clients::{Ledger, Wisher};
use faults::{ALL, Fate, Pace, Stand};
use inspection::{Inspector, watch};
use machine::Machine;

const CLIENTS: u64 = 8;

#[derive(Debug, Clone, Copy)]
struct Plan {
    lasts: Duration,
    /// Between two rests.
    part: Duration,
    pace: Pace,
    /// Between two operations of a client.
    every: Duration,
}

#[tokio::test(flavor = "multi_thread")]
async fn half_a_minute_of_random_faults_breaks_no_invariant() {
    run(Plan {
        lasts: Duration::from_secs(24),
        part: Duration::from_secs(12),
        pace: Pace { gap_max: Duration::from_millis(900), lasts_max: Duration::from_secs(3) },
        every: Duration::from_millis(500),
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "an hour, or WRENN_TEST_HOUR_SEC: make check-long"]
async fn an_hour_of_random_faults_breaks_no_invariant() {
    let lasts = std::env::var("WRENN_TEST_HOUR_SEC").map_or(3600, |text| text.parse().expect("a number of seconds"));
    run(Plan {
        lasts: Duration::from_secs(lasts),
        part: Duration::from_secs(55),
        pace: Pace { gap_max: Duration::from_secs(5), lasts_max: Duration::from_secs(20) },
        every: Duration::from_millis(1100),
    })
    .await;
}

async fn run(plan: Plan) {
    let seed = seed();
    let mut cluster = Cluster::start(2).await;
    let quotas = "insert into team_quotas (team_id, creates_per_min) select id, 100000 from teams";
    cluster.database.sql(quotas).await;
    let cables = Cables::lay(2);
    let mut machines = Vec::new();
    for number in 0..2 {
        machines.push(Machine::join(&cluster, &cables, number).await);
    }
    let (ledger, calm, stop) = (Arc::<Ledger>::default(), Arc::<RwLock<()>>::default(), CancellationToken::new());
    let _stop = stop.clone().drop_guard();
    let wisher = |part| Wisher {
        client: cluster.team.clone(),
        ledger: ledger.clone(),
        dice: dice(seed, part),
        calm: calm.clone(),
        stop: stop.clone(),
        every: plan.every,
    };
    let clients: Vec<_> = (0..CLIENTS).map(|part| tokio::spawn(wisher(part).wish())).collect();
    let watcher = tokio::spawn(watch(machines.iter().map(|machine| machine.place.clone()).collect()));
    let mut fate = Fate::new(dice(seed, 1000), plan.pace);
    let mut inspector = Inspector::default();
    let began = Instant::now();
    // A bounded run goes on until everything has happened, which is chance, within reason.
    let missed = |fate: &Fate| ALL.into_iter().filter(|fault| !fate.happened.contains_key(fault)).collect::<Vec<_>>();
    while began.elapsed() < plan.lasts || began.elapsed() < plan.lasts * 3 && !missed(&fate).is_empty() {
        let part = Instant::now();
        let mut stand =
            Stand { cluster: &mut cluster, cables: &cables, machines: &mut machines, ledger: ledger.as_ref() };
        while part.elapsed() < plan.part {
            fate.strike(&mut stand).await;
        }
        fate.end(&mut stand).await;
        let rest = calm.write().await;
        fate.end(&mut stand).await;
        inspector.judge(&cluster, &machines, &ledger).await;
        assert!(!watcher.is_finished(), "{:?}", watcher.await);
        drop(rest);
        println!("judged after {:?}", began.elapsed());
    }
    stop.cancel();
    for client in clients {
        client.await.unwrap();
    }
    tell(&fate, &inspector, &ledger, began.elapsed());
    let missed = missed(&fate);
    assert!(missed.is_empty(), "these faults never happened: {missed:?}");
    watcher.abort();
}

/// For people.
fn tell(fate: &Fate, inspector: &Inspector, ledger: &Ledger, took: Duration) {
    println!("--- {took:?}");
    for (fault, count) in &fate.happened {
        println!("{count:6} x {fault:?}");
    }
    for ((verb, outcome), count) in &*ledger.outcomes.lock().unwrap() {
        println!("{count:6} x {verb}: {outcome}");
    }
    let Inspector { judgements, histories, events, taken_back, rest_longest, .. } = inspector;
    println!("{judgements} judgements of {histories} histories with {events} events, {taken_back} of them taken back");
    println!("the longest way to a rest took {rest_longest:?}");
    for (name, sizes) in &inspector.sizes {
        let most = |sizes: &[inspection::Size]| {
            let descriptors = sizes.iter().map(|size| size.descriptors).max().unwrap_or_default();
            (descriptors, sizes.iter().map(|size| size.memory_mib).max().unwrap_or_default())
        };
        let third = sizes.len().div_ceil(3);
        println!(
            "{name}: at most {:?} descriptors and MiB at first, {:?} at last",
            most(&sizes[..third]),
            most(&sizes[sizes.len() - third..])
        );
    }
}
