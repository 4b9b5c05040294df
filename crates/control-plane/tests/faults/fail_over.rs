//! The database's server takes no writes any more, and another one of the url does.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use testkit::cut_proxy::{CutProxy, FAIR, Target, Way, Weather};
use testkit::postgres::{Server, Stop};

use super::cluster::{Cluster, wait};
use super::host::Host;
use super::time_travel::Story;
use super::truth;

const BACK_MAX: Duration = Duration::from_secs(30);

/// As an administrator fences a primary: sessions that are open are read-only from then on, too.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_without_writes_is_unavailable_until_it_takes_them() {
    let cluster = Cluster::start(2).await;
    let host = Host::join(&cluster).await;
    let id = cluster.team.running("one").await;
    let server = cluster.database.server().clone();
    let read_only = |word: &str| {
        server.administer(&format!("alter system set default_transaction_read_only = {word}")).unwrap();
        server.administer("select pg_reload_conf()").unwrap();
    };
    read_only("on");
    wait("writes to be refused", BACK_MAX, || async {
        cluster.team.create_once("two", 0).await.unwrap().is_unavailable()
    })
    .await;
    for key in ["two", "three"] {
        let answer = cluster.team.create_once(key, 0).await.unwrap();
        assert!(answer.is_unavailable(), "{} {}", answer.status, answer.body);
    }
    for verb in ["pause", "kill"] {
        let answer = cluster.team.verb_once(&id, verb, 0).await.unwrap();
        assert!(answer.is_unavailable(), "{verb}: {} {}", answer.status, answer.body);
    }
    read_only("off");
    let began = Instant::now();
    let two = cluster.team.create("two").await.id();
    assert!(began.elapsed() < BACK_MAX);
    cluster.team.wait_status(&two, "running", BACK_MAX).await;
    assert_eq!(cluster.team.status(&id).await, "running");
    truth::judge(&cluster, &[&host]).await;
    truth::judge_audit(&cluster).await;
}

/// Both servers are in the url. The first is fenced, and the second goes on from where the first stood.
#[tokio::test(flavor = "multi_thread")]
async fn a_fail_over_is_followed_to_the_server_that_takes_writes() {
    let mut cluster = Cluster::start(1).await;
    let second_door = CutProxy::start(&[]).await.unwrap();
    cluster.use_databases(&[cluster.to_database.address().port(), second_door.address().port()]);
    cluster.restart(0).await;
    let host = Host::join(&cluster).await;
    let id = cluster.team.running("one").await;

    let first = cluster.database.server().clone();
    first.administer("alter system set default_transaction_read_only = on").unwrap();
    cluster.database.stop_server_by(Stop::Fast).await;
    let second = first.copy().unwrap();
    second.resume().unwrap();
    second.administer("alter system reset default_transaction_read_only").unwrap();
    second.administer("select pg_reload_conf()").unwrap();
    cluster.database.start_server().await;
    second_door.lead_to(&[Target::Unix(second.socket())]);
    let began = Instant::now();
    let two = cluster.team.create("two").await.id();
    println!("the first write after the fail-over took {:?}", began.elapsed());
    assert!(began.elapsed() < BACK_MAX);
    cluster.team.wait_status(&two, "running", BACK_MAX).await;
    assert_eq!(cluster.team.verb(&id, "pause").await.status, 200);
    let name = cluster.database.name();
    let there = second.query(name, "select count(*) from sandboxes").unwrap();
    assert_eq!((there.trim(), cluster.count("sandboxes").await), ("2", 1), "all that is new is on the second");
    let open = second.query(name, "select count(*) from operations where phase = 'open'").unwrap();
    assert_eq!(open.trim(), "0");
    assert_eq!(host.launches_of(&two), 1);
}

/// A primary and a standby that follows it, both in the url of two replicas.
struct Pair {
    cluster: Cluster,
    standby: Server,
    /// From the standby to the primary's log.
    stream: CutProxy,
    _second_door: CutProxy,
}

impl Pair {
    async fn start() -> Self {
        let mut cluster = Cluster::start(2).await;
        let first = cluster.database.server().clone();
        let stream = CutProxy::start(&[Target::Unix(first.socket())]).await.unwrap();
        let port = stream.address().port();
        let standby = tokio::task::spawn_blocking(move || first.standby(port).unwrap()).await.unwrap();
        let second_door = CutProxy::start(&[Target::Unix(standby.socket())]).await.unwrap();
        // The standby first: it answers, and takes no writes.
        cluster.use_databases(&[second_door.address().port(), cluster.to_database.address().port()]);
        for number in 0..2 {
            cluster.restart(number).await;
        }
        Self { cluster, standby, stream, _second_door: second_door }
    }

    /// The primary is killed, and the standby takes its place.
    async fn fail_over(&mut self) {
        self.cluster.database.stop_server_by(Stop::Kill).await;
        let standby = self.standby.clone();
        tokio::task::spawn_blocking(move || standby.promote().unwrap()).await.unwrap();
        self.cluster.database.move_to(self.standby.clone());
        let (team, began) = (self.cluster.team.clone(), Instant::now());
        let first = team.create("after the fail-over").await.id();
        println!("the first write after the fail-over took {:?}", began.elapsed());
        assert!(began.elapsed() < BACK_MAX);
        team.verb(&first, "kill").await;
    }
}

/// A commit is answered when the standby has it: then nothing that was acknowledged is lost.
#[tokio::test(flavor = "multi_thread")]
async fn a_synchronous_standby_has_all_that_was_acknowledged() {
    let mut pair = Pair::start().await;
    let first = pair.cluster.database.server().clone();
    first.administer("alter system set synchronous_standby_names = '*'").unwrap();
    first.administer("select pg_reload_conf()").unwrap();
    wait("the standby to be synchronous", BACK_MAX, || async {
        first.administer("select sync_state from pg_stat_replication").unwrap() == "sync"
    })
    .await;
    let host = Host::join(&pair.cluster).await;
    let stop = Arc::<AtomicBool>::default();
    let clients: Vec<_> = (0..4)
        .map(|part| {
            let (team, stop) = (pair.cluster.team.clone(), stop.clone());
            tokio::spawn(async move {
                let mut told = Vec::new();
                for number in 0.. {
                    let id = team.running(&format!("client {part} sandbox {number}")).await;
                    let wanted = ["running", "paused", "stopped"][number % 3];
                    match wanted {
                        "paused" => drop(team.verb(&id, "pause").await),
                        "stopped" => drop(team.verb(&id, "kill").await),
                        _ => {}
                    }
                    told.push((id, wanted));
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                }
                told
            })
        })
        .collect();
    tokio::time::sleep(Duration::from_secs(2)).await;
    pair.fail_over().await;
    stop.store(true, Ordering::Relaxed);
    let mut acknowledged = 0;
    for client in clients {
        for (id, wanted) in client.await.unwrap() {
            pair.cluster.team.wait_status(&id, wanted, BACK_MAX).await;
            acknowledged += 1;
        }
    }
    println!("{acknowledged} sandboxes were acknowledged");
    truth::judge(&pair.cluster, &[&host]).await;
    truth::judge_audit(&pair.cluster).await;
    assert_eq!(pair.cluster.count("sandboxes").await, acknowledged + 1, "one for each key");
}

/// What the standby had not heard of when the primary died is as after an old copy was put back.
#[tokio::test(flavor = "multi_thread")]
async fn what_an_asynchronous_standby_has_not_heard_deletes_nothing() {
    let mut pair = Pair::start().await;
    let host = Host::join(&pair.cluster).await;
    let story = Story::begin(&pair.cluster, &host).await;
    let first = pair.cluster.database.server().clone();
    wait("the standby to have it all", BACK_MAX, || async {
        first.administer("select pg_current_wal_lsn() = replay_lsn from pg_stat_replication").unwrap() == "t"
    })
    .await;
    pair.stream.set(Weather { back: Way::Held, ..FAIR });
    let forgotten = story.go_on(&pair.cluster, &host).await;
    pair.fail_over().await;
    story.is_true_again(&pair.cluster, &host, forgotten).await;
}
