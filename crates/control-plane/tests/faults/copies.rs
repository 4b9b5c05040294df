//! A host's disk is copied, or restored from a backup, while real agents go on.

use std::time::Duration;

use host_agent::heartbeat::Link;
use reqwest::Method;
use serde_json::{Value, json};

use super::cluster::{Cluster, wait};
use super::host::Host;
use super::truth;

const KNOWN_MAX: Duration = Duration::from_secs(60);

async fn shown(cluster: &Cluster, host: &Host) -> Value {
    cluster.admin.call(Method::GET, &format!("/v1/hosts/{}", host.id), None).await.unwrap().body
}

async fn unfence(cluster: &Cluster, host: &Host) {
    let path = format!("/v1/hosts/{}/unfence", host.id);
    let unfenced = cluster.admin.call(Method::POST, &path, None).await.unwrap();
    assert_eq!(unfenced.status, 200, "{}", unfenced.body);
}

/// So many heartbeats more were answered, and the last ticket is on the disk.
async fn beats(cluster: &Cluster, host: &Host, count: usize) {
    let issued = async || cluster.rows("select ticket_issued from hosts").await[0][0].parse::<usize>().unwrap();
    let before = issued().await;
    wait("heartbeats", KNOWN_MAX, || async {
        host.speak();
        issued().await >= before + count
    })
    .await;
}

async fn wait_fenced(host: &Host) {
    wait("the machine to be fenced", KNOWN_MAX, || async { matches!(&*host.link.borrow(), Link::Fenced(_)) }).await;
}

/// Nobody has to wait for what is under way.
async fn half_a_minute_later(cluster: &Cluster) {
    cluster.database.sql("update past_agent_runs set heard_at = heard_at - interval '30 seconds'").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_old_copy_at_another_address_is_refused_before_it_acts() {
    let cluster = Cluster::start(2).await;
    let host = Host::join(&cluster).await;
    let team = cluster.team.clone();
    let running = team.running("running").await;
    let disk = host.disk();
    beats(&cluster, &host, 3).await;
    let before = shown(&cluster, &host).await;

    let copy = Host::copy(&cluster, &disk).await;
    wait_fenced(&copy).await;
    half_a_minute_later(&cluster).await;
    wait("the copy to be told", KNOWN_MAX, || async { shown(&cluster, &host).await["copy_heard_at"].is_string() })
        .await;
    assert_eq!(cluster.count("audit where action = 'host.fence'").await, 1);
    let after = shown(&cluster, &host).await;
    for field in ["address", "status"] {
        assert_eq!(after[field], before[field], "{field}");
    }
    team.wait_status(&running, "running", KNOWN_MAX).await;
    // The host goes on, and does what it is told.
    beats(&cluster, &host, 2).await;
    assert_eq!(*host.link.borrow(), Link::Attached);
    let later = team.running("later").await;
    assert_eq!(team.verb(&running, "pause").await.status, 200);
    assert_eq!(team.verb(&running, "resume").await.status, 200);
    assert!(copy.alive().is_empty() && host.alive().contains_key(&later));

    copy.stop();
    unfence(&cluster, &host).await;
    beats(&cluster, &host, 2).await;
    assert_eq!(shown(&cluster, &host).await["copy_heard_at"], Value::Null);
    for id in [&running, &later] {
        assert_eq!(team.verb(id, "kill").await.status, 204);
    }
    truth::judge(&cluster, &[&host]).await;
}

/// It has the ticket that was issued last, so at first it is as the host after a restart.
#[tokio::test(flavor = "multi_thread")]
async fn a_copy_of_just_now_is_fenced_when_both_have_spoken() {
    let cluster = Cluster::start(2).await;
    let host = Host::join(&cluster).await;
    let copy = Host::copy(&cluster, &host.disk()).await;
    copy.wait_attached(KNOWN_MAX).await;
    wait("both to have spoken", KNOWN_MAX, || async {
        host.speak();
        cluster.count("past_agent_runs where heard_at is not null").await == 1
    })
    .await;
    half_a_minute_later(&cluster).await;
    host.speak();
    wait_fenced(&host).await;
    copy.speak();
    wait_fenced(&copy).await;
    assert_eq!(shown(&cluster, &host).await["status"], json!("fenced"));
    let refused = cluster.team.verb("sb0000000000000000000000", "get").await;
    assert_eq!(refused.status, 404);

    copy.stop();
    unfence(&cluster, &host).await;
    host.wait_attached(Duration::from_secs(90)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_from_a_backup_is_the_host_again_when_it_is_unfenced() {
    let cluster = Cluster::start(2).await;
    let host = Host::join(&cluster).await;
    let disk = host.disk();
    beats(&cluster, &host, 3).await;
    host.stop();
    let restored = Host::copy(&cluster, &disk).await;
    wait_fenced(&restored).await;
    unfence(&cluster, &host).await;
    restored.wait_attached(Duration::from_secs(90)).await;
    // Its address is called when its credentials are renewed.
    let address = restored.inbound.address().to_string();
    wait("the host to be there", Duration::from_secs(90), || async {
        shown(&cluster, &host).await["address"] == address.as_str()
    })
    .await;
    let made = cluster.team.running("made there").await;
    assert!(restored.alive().contains_key(&made));
    assert_eq!(cluster.team.verb(&made, "kill").await.status, 204);
}
