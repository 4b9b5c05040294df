//! The network between control plane and host is cut, one way, both ways, by turns, and after the deed. Two minutes are told to the
//! database, not waited for: the hosts' last words become older by them.

use std::time::{Duration, Instant};

use rand::Rng as _;
use reqwest::Method;
use testkit::cut_proxy::{CutProxy, FAIR, REFUSED, SILENT, Way, Weather};

use super::client::Client;
use super::cluster::{Cluster, wait};
use super::host::Host;
use super::seed::{dice, seed};
use super::truth;

/// After the partition is over, what is shown is true within this time.
const TRUE_AGAIN_MAX: Duration = Duration::from_secs(10);
const PARTITION_SEC: u32 = 120;

async fn reason(cluster: &Cluster, id: &str) -> String {
    cluster.team.verb(id, "get").await.body["reason"].as_str().unwrap_or_default().to_owned()
}

async fn host_status(cluster: &Cluster, host: &Host) -> String {
    let shown = cluster.admin.call(Method::GET, &format!("/v1/hosts/{}", host.id), None).await.unwrap();
    shown.body["status"].as_str().unwrap_or_else(|| panic!("{}", shown.body)).to_owned()
}

fn set(proxies: &[&CutProxy], weather: Weather) {
    for proxy in proxies {
        proxy.set(weather);
        if weather == REFUSED {
            proxy.cut();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_partition_changes_nothing_but_what_is_shown() {
    let cluster = Cluster::start(2).await;
    let host = Host::join(&cluster).await;
    let team = &cluster.team;
    let (runs, saved) = (team.running("runs").await, team.running("saved").await);
    team.verb(&saved, "pause").await;
    for (what, weather) in [("silence", SILENT), ("refusal", REFUSED)] {
        let doomed = team.running(&format!("killed in {what}")).await;
        truth::judge(&cluster, &[&host]).await;
        let alive = host.alive();
        set(&[&host.inbound, &host.outbound], weather);
        // As one does who is silent for two minutes.
        host.speak();
        cluster.age_heartbeats(PARTITION_SEC).await;
        assert_eq!(host_status(&cluster, &host).await, "unreachable", "{what}");
        for (id, status) in [(&runs, "running"), (&saved, "paused")] {
            assert_eq!((team.status(id).await.as_str(), reason(&cluster, id).await.as_str()), (status, "host_silent"));
        }
        // A wish made meanwhile stands, and is not said to be fulfilled.
        let kill = team.verb_once(&doomed, "kill", 0).await.unwrap();
        assert_eq!((kill.status, kill.body["status"].as_str()), (202, Some("stopping")), "{what}");
        let create = team.create_once(&format!("made in {what}"), 0).await.unwrap();
        assert_eq!(create.code(), "no_hosts_available", "nothing is placed on a host that is silent: {}", create.body);
        // Time for the reconcilers, and for the agent to have been refused some times.
        tokio::time::sleep(Duration::from_secs(6)).await;
        assert_eq!(host.alive(), alive, "{what}: nothing is ended");
        assert_eq!(team.status(&doomed).await, "stopping");
        set(&[&host.inbound, &host.outbound], FAIR);
        let healed = Instant::now();
        wait("the host to be heard of", TRUE_AGAIN_MAX, || async { host_status(&cluster, &host).await == "online" })
            .await;
        team.wait_status(&doomed, "stopped", TRUE_AGAIN_MAX.saturating_sub(healed.elapsed())).await;
        assert_eq!(reason(&cluster, &runs).await, "", "{what}");
        println!("{what}: true again after {:?}", healed.elapsed());
        truth::judge(&cluster, &[&host]).await;
    }
}

/// Only one of the two can speak to the other.
#[tokio::test(flavor = "multi_thread")]
async fn a_partition_of_one_direction_doubles_and_ends_nothing() {
    let cluster = Cluster::start(2).await;
    let host = Host::join(&cluster).await;
    let team = &cluster.team;
    let runs = team.running("runs").await;

    // Heartbeats come, commands do not reach it.
    host.inbound.set(REFUSED);
    host.inbound.cut();
    let pause = team.verb_once(&runs, "pause", 1).await.unwrap();
    assert_eq!((pause.status, pause.body["status"].as_str()), (202, Some("pausing")), "{}", pause.body);
    assert_eq!(host_status(&cluster, &host).await, "online");
    assert_eq!(host.alive().len(), 1);
    host.inbound.set(FAIR);
    team.wait_status(&runs, "paused", TRUE_AGAIN_MAX).await;

    // Commands reach it, heartbeats do not come.
    host.outbound.set(SILENT);
    host.speak();
    cluster.age_heartbeats(PARTITION_SEC).await;
    assert_eq!(host_status(&cluster, &host).await, "unreachable");
    let create = team.create_once("nowhere", 0).await.unwrap();
    assert_eq!(create.code(), "no_hosts_available", "nothing is placed on a host that is silent: {}", create.body);
    assert_eq!(team.verb(&runs, "resume").await.status, 200, "an answer is an answer");
    assert_eq!(team.verb(&runs, "kill").await.status, 204);
    host.outbound.set(FAIR);
    wait("the host to be heard of", TRUE_AGAIN_MAX, || async { host_status(&cluster, &host).await == "online" }).await;
    truth::judge(&cluster, &[&host]).await;

    // Its commands arrive, and their answers do not.
    host.inbound.set(Weather { back: Way::Held, ..FAIR });
    let blind = team.create_once("blind", 2).await.unwrap();
    assert_eq!(blind.status, 202, "{}", blind.body);
    host.inbound.set(FAIR);
    team.wait_status(&blind.id(), "running", TRUE_AGAIN_MAX).await;
    assert_eq!(host.launches_of(&blind.id()), 1);
    truth::judge(&cluster, &[&host]).await;
}

/// Commands are done and their answers lost, at every place where a connection can end.
#[tokio::test(flavor = "multi_thread")]
async fn lost_answers_change_no_outcome() {
    lost_answers(6).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "a thousand lost answers: make check-long"]
async fn a_thousand_lost_answers_change_no_outcome() {
    lost_answers(250).await;
}

async fn lost_answers(rounds: u64) {
    let seed = seed();
    let mut dice = dice(seed, 0);
    let cluster = Cluster::start(1).await;
    let host = Host::join(&cluster).await;
    for round in 0..rounds {
        let mut id = String::new();
        for (verb, wanted) in [("create", "running"), ("pause", "paused"), ("resume", "running"), ("kill", "stopped")] {
            // From the handshake over the answer's first bytes to none at all.
            host.inbound.set(Weather { back: Way::CutAfter(dice.random_range(0..4000)), ..FAIR });
            host.inbound.cut();
            let answer = match verb {
                "create" => cluster.team.create_once(&format!("round {round}"), 1).await.unwrap(),
                verb => cluster.team.verb_once(&id, verb, 1).await.unwrap(),
            };
            host.inbound.set(FAIR);
            host.inbound.cut();
            if verb == "create" && answer.status == 503 {
                // Where nothing was reached at all, that is said, and cleaned up.
                assert_eq!(answer.code(), "host_unavailable", "{}", answer.body);
                break;
            }
            assert!(matches!(answer.status, 200..=204), "{verb}: {} {}", answer.status, answer.body);
            id = if verb == "create" { answer.id() } else { id };
            cluster.hurry_to(&id, wanted, Duration::from_secs(30)).await;
            let launches = if verb == "create" || verb == "pause" { 1 } else { 2 };
            assert_eq!(host.launches_of(&id), launches, "{verb}: each deed once");
        }
    }
    truth::judge(&cluster, &[&host]).await;
    truth::judge_audit(&cluster).await;
}

/// Up and down by turns: no storms, and no lies.
#[tokio::test(flavor = "multi_thread")]
async fn flapping_shows_a_host_as_what_it_is_for_most_of_the_time() {
    let cluster = Cluster::start(2).await;
    let host = Host::join(&cluster).await;
    let id = cluster.team.running("runs").await;
    let alive = host.alive();
    let mut seen = Vec::new();
    for _ in 0..6 {
        set(&[&host.inbound, &host.outbound], REFUSED);
        tokio::time::sleep(Duration::from_millis(1500)).await;
        seen.push(host_status(&cluster, &host).await);
        set(&[&host.inbound, &host.outbound], FAIR);
        tokio::time::sleep(Duration::from_millis(300)).await;
        seen.push(host_status(&cluster, &host).await);
    }
    assert!(seen.iter().all(|status| status == "online"), "short gaps are no silence: {seen:?}");
    let beats = host.told.lock().unwrap().len();
    assert!(beats < 60, "{beats} heartbeats were tried in eleven seconds");
    assert_eq!(host.alive(), alive);
    assert_eq!(cluster.team.status(&id).await, "running");
    host.wait_attached(TRUE_AGAIN_MAX).await;
    truth::judge(&cluster, &[&host]).await;
}

/// What was said long ago comes once more, and late: it is no news.
#[tokio::test(flavor = "multi_thread")]
async fn late_and_repeated_heartbeats_are_no_news() {
    let cluster = Cluster::start(2).await;
    let host = Host::join(&cluster).await;
    let (stays, dies) = (cluster.team.running("stays").await, cluster.team.running("dies").await);
    truth::rest(&cluster).await;
    wait("a heartbeat that names both", Duration::from_secs(40), || async {
        host.told.lock().unwrap().last().is_some_and(|told| told.sandboxes.len() == 2)
    })
    .await;
    let mut old = host.told.lock().unwrap().last().unwrap().clone();
    let told = cluster.rows("select agent_run, heartbeat_sequence, epoch from hosts").await.remove(0);
    old.agent_run.clone_from(&told[0]);
    old.sequence = told[1].parse().unwrap();
    old.epoch = told[2].parse().unwrap();
    cluster.team.verb(&dies, "kill").await;
    cluster.team.verb(&stays, "pause").await;
    truth::rest(&cluster).await;
    wait("news of the host", Duration::from_secs(40), || async {
        let now = cluster.rows("select heartbeat_sequence from hosts").await;
        now[0][0].parse::<u64>().unwrap() > old.sequence
    })
    .await;
    let token = host.credentials.borrow().host.token.clone();
    let speaker = Client::bearer(&format!("http://{}", cluster.balancer.address()), &token);
    let path = format!("/v1/hosts/{}/heartbeat", host.id);
    for _ in 0..20 {
        let answer = speaker.call(Method::POST, &path, Some(serde_json::to_value(&old).unwrap())).await.unwrap();
        assert_eq!(answer.status, 200, "{}", answer.body);
    }
    assert_eq!(cluster.team.status(&stays).await, "paused");
    assert_eq!(cluster.team.status(&dies).await, "stopped");
    truth::judge(&cluster, &[&host]).await;
    // Of an epoch that is over nothing is believed, however new it is.
    old.sequence += 1_000_000;
    old.epoch = old.epoch.saturating_sub(1);
    old.sandboxes.clear();
    speaker.call(Method::POST, &path, Some(serde_json::to_value(&old).unwrap())).await.unwrap();
    assert_eq!(cluster.count("sandboxes where absent_since is not null").await, 0);
}
