//! The database's server takes no writes any more, and another one of the url does.

use std::time::{Duration, Instant};

use testkit::cut_proxy::{CutProxy, Target};
use testkit::postgres::Stop;

use super::cluster::{Cluster, wait};
use super::host::Host;
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
