//! A replica is killed at every point at which the control plane can be killed, and the other one goes on.

use std::time::{Duration, Instant};

use reqwest::Method;
use serde_json::json;

use super::client::{Answer, Client, NoAnswer};
use super::cluster::{Cluster, wait};
use super::host::Host;
use super::truth;

/// Each from a sandbox that runs, but for the first, which makes one, and the resume, which finds it paused.
const VERBS: [&str; 6] = ["create", "pause", "resume", "snapshot", "fork", "kill"];
/// Points that lie on the way of each; a test that misses one has tested nothing.
pub const EXPECTED: [&str; 20] = [
    "cp.operation.leased",
    "cp.create.written",
    "cp.run.placed",
    "cp.run.started",
    "cp.run.finished",
    "cp.pause.written",
    "cp.pause.begun",
    "cp.pause.answered",
    "cp.pause.finished",
    "cp.resume.written",
    "cp.resume.begun",
    "cp.resume.answered",
    "cp.resume.finished",
    "cp.snapshot.written",
    "cp.fork.written",
    "cp.fork.taken",
    "cp.kill.written",
    "cp.kill.begun",
    "cp.kill.ended",
    "cp.kill.finished",
];

/// Of what a fork begins with, after the fork.
const REMOVED: &str = "cp.snapshot.removed";

async fn act(client: &Client, verb: &str, id: &str, key: &str) -> Result<Answer, NoAnswer> {
    match verb {
        "create" => client.create_once(key, 10).await,
        "fork" => {
            let path = format!("/v1/sandboxes/{id}/fork?wait_sec=10");
            let request = client.request(Method::POST, &path).header("Idempotency-Key", key).json(&json!({"count": 2}));
            Client::send(request).await
        }
        "snapshot" => client.call(Method::POST, "/v1/snapshots", Some(json!({"sandbox_id": id, "name": key}))).await,
        _ => client.verb_once(id, verb, 10).await,
    }
}

/// What the verb begins with.
async fn before(client: &Client, verb: &str, key: &str) -> String {
    if verb == "create" {
        return String::new();
    }
    let id = client.running(&format!("for {key}")).await;
    if verb == "resume" {
        assert_eq!(client.verb(&id, "pause").await.status, 200);
    }
    id
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_at_every_point_it_is_finished_by_the_other() {
    let mut cluster = Cluster::start(2).await;
    let host = Host::join(&cluster).await;
    let mut walks: Vec<(&str, String)> = Vec::new();
    for verb in VERBS {
        let client = cluster.at(0);
        let id = before(&client, verb, verb).await;
        cluster.replicas[0].passed();
        let answer = act(&client, verb, &id, verb).await.unwrap();
        assert!(matches!(answer.status, 200 | 201 | 202 | 204), "{verb}: {} {}", answer.status, answer.body);
        truth::rest(&cluster).await;
        walks.extend(cluster.replicas[0].passed().into_iter().map(|point| (verb, point)));
    }
    for point in EXPECTED {
        assert!(walks.iter().any(|(_, passed)| passed == point), "{point} was not passed: {walks:?}");
    }
    // A reconciler of either replica passes it.
    walks.retain(|(_, point)| point != REMOVED);
    walks.push(("fork", REMOVED.to_owned()));
    let began = Instant::now();
    for (verb, point) in &walks {
        die_at(&mut cluster, &host, verb, point).await;
    }
    println!("{} deaths in {:?}", walks.len(), began.elapsed());
    truth::judge(&cluster, &[&host]).await;
    truth::judge_audit(&cluster).await;
}

async fn die_at(cluster: &mut Cluster, host: &Host, verb: &str, point: &str) {
    let key = format!("{verb} at {point}");
    let name = key.replace([' ', '.'], "-");
    let survivor = cluster.at(1);
    let id = before(&survivor, verb, &key).await;
    let sandboxes = cluster.count("sandboxes").await;
    if point == REMOVED {
        cluster.replicas[1].kill();
    }
    cluster.replicas[0].arm(point);
    let _lost = act(&cluster.at(0), verb, &id, &name).await;
    let replica = &mut cluster.replicas[0];
    let armed = std::cell::RefCell::new(replica);
    wait(&format!("the death of {key}"), Duration::from_secs(20), || async { armed.borrow_mut().has_ended() }).await;
    if point == REMOVED {
        cluster.restart(1).await;
    }
    let survivor = cluster.at(1);
    let began = Instant::now();
    // Who sent it sends it again.
    let mut again = act(&survivor, verb, &id, &name).await.unwrap();
    while again.is_unavailable() {
        again = act(&survivor, verb, &id, &name).await.unwrap();
    }
    // A snapshot's name is its key.
    let is_taken = verb == "snapshot" && again.code() == "template_name_taken";
    let is_fine = matches!(again.status, 200 | 201 | 202 | 204) || is_taken || again.code() == "conflict";
    assert!(is_fine, "{key}: {} {}", again.status, again.body);
    truth::rest(cluster).await;
    let made = cluster.count("sandboxes").await - sandboxes;
    match verb {
        "create" => {
            assert_eq!(made, 1, "{key}");
            let id = again.id();
            assert_eq!(survivor.status(&id).await, "running", "{key}");
            assert_eq!(host.launches_of(&id), 1, "{key}: one microVM");
        }
        "fork" => assert_eq!(made, 2, "{key}"),
        "snapshot" => {
            let named = format!("snapshots where name = '{name}' and state = 'ready'");
            assert_eq!((made, cluster.count(&named).await), (0, 1), "{key}");
        }
        verb => {
            let wanted = if verb == "pause" {
                "paused"
            } else if verb == "kill" {
                "stopped"
            } else {
                "running"
            };
            assert_eq!((made, survivor.status(&id).await.as_str()), (0, wanted), "{key}");
        }
    }
    assert!(began.elapsed() < truth::REST_MAX, "{key} took {:?}", began.elapsed());
    // What is left over costs the host room.
    for used in [id, again.body["id"].as_str().unwrap_or_default().to_owned()] {
        if used.starts_with("sb") {
            survivor.verb(&used, "kill").await;
        }
    }
    for fork in again.body["sandboxes"].as_array().into_iter().flatten() {
        survivor.verb(fork["id"].as_str().unwrap(), "kill").await;
    }
    cluster.restart(0).await;
}
