//! A host of a team's own, with a real agent: it gets what its team makes and nothing else, and is taken for no other host, wherever it says
//! that it is.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use model::access::Scope;
use reqwest::Method;
use serde_json::json;
use testkit::cut_proxy::SILENT;

use super::client::Client;
use super::cluster::Cluster;
use super::host::Host;

/// A client of a team that has hosts of its own, and the team's id.
async fn team_with_hosts(cluster: &Cluster) -> (Client, String) {
    let url = format!("http://{}", cluster.balancer.address());
    let post = async |client: &Client, path: &str, body| {
        let answer = client.call(Method::POST, path, Some(body)).await.unwrap();
        assert!(answer.status < 300, "{path}: {}", answer.body);
        answer.body
    };
    let team = post(&cluster.admin, "/v1/teams", json!({"name": "own"})).await["id"].as_str().unwrap().to_owned();
    let path = format!("/v1/admin/teams/{team}/byoc");
    let changed = cluster.admin.call(Method::PUT, &path, Some(json!({"enabled": true}))).await.unwrap();
    assert_eq!(changed.status, 204, "{}", changed.body);
    let switched = post(&cluster.admin, "/v1/auth/switch-team", json!({"team_id": team})).await;
    let there = Client::bearer(&url, switched["token"].as_str().unwrap());
    let scopes: Vec<&str> = Scope::ALL.iter().map(|scope| scope.as_str()).collect();
    let key = post(&there, "/v1/api-keys", json!({ "scopes": scopes })).await;
    (Client::key(&url, key["key"].as_str().unwrap()), team)
}

fn alive(host: &Host) -> BTreeSet<String> {
    host.alive().into_keys().collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_teams_host_gets_what_its_team_makes_and_nothing_else() {
    let cluster = Cluster::start(2).await;
    let (own, team) = team_with_hosts(&cluster).await;
    let platforms = Host::join(&cluster).await;
    let refused = own.create_once("without a host", 0).await.unwrap();
    assert_eq!(refused.code(), "no_hosts_available", "{}", refused.body);
    let host = Host::join_as(&cluster, json!({"type": "byoc", "team_id": team})).await;
    let (mut ours, mut theirs) = (BTreeSet::new(), BTreeSet::new());
    for number in 0..4 {
        ours.insert(own.running(&format!("ours {number}")).await);
        theirs.insert(cluster.team.running(&format!("theirs {number}")).await);
    }
    assert_eq!((alive(&host), alive(&platforms)), (ours.clone(), theirs.clone()));
    // All that is done with one is done there: over the same connection, by the host's own name.
    let id = ours.first().unwrap().clone();
    for verb in ["pause", "resume"] {
        assert_eq!(own.verb(&id, verb).await.status, 200, "{verb}");
    }
    let forked =
        own.call(Method::POST, &format!("/v1/sandboxes/{id}/fork?wait_sec=30"), Some(json!({"count": 2}))).await;
    let forked = forked.unwrap();
    assert_eq!(forked.status, 201, "{}", forked.body);
    let kept = json!({"sandbox_id": id, "name": "kept"});
    let kept = own.call(Method::POST, "/v1/snapshots?wait_sec=30", Some(kept)).await.unwrap();
    assert_eq!(kept.status, 201, "{}", kept.body);
    let from = json!({"template": "kept"});
    let begun = own.call(Method::POST, "/v1/sandboxes?wait_sec=30", Some(from.clone())).await.unwrap();
    assert_eq!(begun.status, 201, "{}", begun.body);
    assert_eq!((alive(&host).len(), alive(&platforms)), (7, theirs.clone()));
    let foreign = cluster.team.call(Method::POST, "/v1/sandboxes?wait_sec=0", Some(from)).await.unwrap();
    assert_eq!(foreign.code(), "not_found", "{}", foreign.body);
    // Without the platform's host the others have none.
    let path = format!("/v1/hosts/{}/drain", platforms.id);
    assert_eq!(cluster.admin.call(Method::POST, &path, None).await.unwrap().status, 200);
    let none = cluster.team.create_once("nowhere", 0).await.unwrap();
    assert_eq!(none.code(), "no_hosts_available", "{}", none.body);
    let inspected = cluster.admin.call(Method::GET, &format!("/v1/hosts/{}/inspect", host.id), None).await.unwrap();
    assert_eq!(inspected.status, 200, "{}", inspected.body);
    for id in ours {
        assert_eq!(own.verb(&id, "kill").await.status, 204);
    }
    assert_eq!(alive(&host).len(), 3);
}

/// A team's host that takes every call and answers none, with more to do than the platform works on at once.
#[tokio::test(flavor = "multi_thread")]
async fn a_teams_host_that_hangs_holds_nobody_else_up() {
    let cluster = Cluster::start(1).await;
    let (own, team) = team_with_hosts(&cluster).await;
    let _platforms = Host::join(&cluster).await;
    let host = Host::join_as(&cluster, json!({"type": "byoc", "team_id": team})).await;
    host.inbound.set(SILENT);
    host.inbound.cut();
    for number in 0..300 {
        let made = own.create_once(&format!("hangs {number}"), 0).await.unwrap();
        assert_eq!(made.status, 202, "{}", made.body);
    }
    let began = Instant::now();
    cluster.team.running("theirs").await;
    assert!(began.elapsed() < Duration::from_secs(10), "after {:?}", began.elapsed());
}

/// As who says that it is where another host is, or comes to be there.
#[tokio::test(flavor = "multi_thread")]
async fn no_host_is_called_in_anothers_place() {
    let cluster = Cluster::start(1).await;
    let (own, team) = team_with_hosts(&cluster).await;
    let platforms = Host::join(&cluster).await;
    let host = Host::join_as(&cluster, json!({"type": "byoc", "team_id": team})).await;
    let ours = own.running("ours").await;
    let theirs = cluster.team.running("theirs").await;
    let place = async |of: &Host, address: std::net::SocketAddr| {
        let moved = format!("update hosts set address = '{address}' where id = '{}'", of.id.0);
        cluster.database.sql(&moved).await;
    };
    // The team's says that it is where the platform's is: nothing of the team gets there, and nothing is told of it.
    place(&host, platforms.inbound.address()).await;
    let refused = own.create_once("moved", 8).await.unwrap();
    assert!(matches!(refused.code(), "host_unavailable" | "no_hosts_available"), "{}", refused.body);
    let inspected = cluster.admin.call(Method::GET, &format!("/v1/hosts/{}/inspect", host.id), None).await.unwrap();
    assert_eq!(inspected.code(), "host_unavailable", "{}", inspected.body);
    assert_eq!(alive(&platforms), BTreeSet::from([theirs.clone()]));
    // The team's has got to where the platform's was: no secret of anybody gets there.
    place(&host, host.inbound.address()).await;
    place(&platforms, host.inbound.address()).await;
    let refused = cluster.team.create_once("caught", 8).await.unwrap();
    assert!(matches!(refused.code(), "host_unavailable" | "no_hosts_available"), "{}", refused.body);
    assert_eq!(alive(&host), BTreeSet::from([ours]));
    // Each at its place, both are called again.
    place(&platforms, platforms.inbound.address()).await;
    own.running("again ours").await;
    cluster.team.running("again theirs").await;
    assert_eq!((alive(&host).len(), alive(&platforms).len()), (2, 2));
}
