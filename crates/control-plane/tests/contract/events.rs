//! Events as listeners get them: in the published form, once and in order, also for who comes back, and for many at once.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use model::ids::SandboxId;
use reqwest::Method;
use serde_json::json;

use crate::listener::Listener;
use crate::replica::{Replica, Who};

const PUBLISHED: [&str; 10] = [
    "connected",
    "capsule.create",
    "capsule.pause",
    "capsule.resume",
    "capsule.destroy",
    "capsule.state.changed",
    "template.snapshot.create",
    "template.snapshot.delete",
    "host.up",
    "host.down",
];

impl Replica {
    async fn stream(&self, path: &str, last: Option<&str>) -> Listener {
        Listener::open(&self.http, &format!("{}{path}", self.url), &self.key, last).await
    }

    async fn turn(&self, id: &SandboxId, desired: &str, observed: &str) {
        let state = format!("desired = '{desired}', observed = '{observed}'");
        self.database.sql(&format!("update sandboxes set {state} where id = '{id}'")).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_listener_hears_what_happens_as_the_published_clients_expect_it() {
    let replica = Replica::start().await;
    let host = replica.host(1 << 20).await;
    let mut stream = replica.stream("/v1/events/stream", None).await;
    let mut all = replica.stream("/v1/events/all/stream", None).await;
    let first = stream.next().await.unwrap();
    assert_eq!((first.event.as_str(), &first.data["event"]), ("connected", &json!("connected")));
    assert_eq!(all.next().await.unwrap().event, "connected");
    assert_eq!(stream.headers["cache-control"], "no-store");
    let made = replica.as_team(Method::POST, "/v1/sandboxes?wait_sec=0", Some(json!({"metadata": {"a": "b"}}))).await;
    let id = made.body["id"].as_str().unwrap().to_owned();
    let starting = stream.until("capsule.state.changed", &id).await;
    assert_eq!(starting.data["metadata"], json!({"to": "starting"}));
    assert_eq!(starting.data["sandbox"]["id"], json!(id));
    assert_eq!(starting.data["sandbox"]["metadata"]["a"], "b");
    assert!(starting.data["timestamp"].as_str().unwrap().ends_with('Z'));
    assert!(starting.data.get("details").is_none() && starting.data.get("id").is_none(), "{}", starting.data);
    let patch = json!({"metadata": {"a": null, "c": "d"}});
    let changed = replica.as_team(Method::PATCH, &format!("/v1/sandboxes/{id}"), Some(patch)).await;
    assert_eq!((changed.status.as_u16(), &changed.body["metadata"]), (200, &json!({"c": "d"})));
    // Whoever has it knows who it was: the operation was wished by a key.
    let operation = format!(
        "update operations set phase = 'failed', error_code = 'agent_error', error_message = 'no',
        finished_at = now() where sandbox_id = '{id}' and kind = 'run'"
    );
    replica.database.sql(&operation).await;
    let failed = stream.until("capsule.create", &id).await;
    assert_eq!(failed.data["outcome"], "error");
    assert!(failed.data["error"].as_str().is_some_and(|error| !error.is_empty()), "{}", failed.data);
    assert_eq!(failed.data["actor"]["type"], "api_key");
    assert!(failed.data["actor"]["id"].as_str().is_some_and(|id| !id.is_empty()));
    assert_eq!(failed.data["resource"], json!({"id": id, "type": "capsule"}));
    let sandbox = replica.sandbox(host).await;
    replica.turn(&sandbox, "paused", "pausing").await;
    replica.turn(&sandbox, "paused", "paused").await;
    // No other state is shown.
    replica
        .database
        .sql(&format!("update sandboxes set reason = 'x', revision = revision + 1 where id = '{sandbox}'"))
        .await;
    replica.turn(&sandbox, "killed", "killed").await;
    let mut states = Vec::new();
    let destroyed = loop {
        let message = stream.next().await.unwrap();
        assert!(PUBLISHED.contains(&message.event.as_str()), "{message:?}");
        if message.data["resource"]["id"] != sandbox.as_str() {
            continue;
        }
        if message.event == "capsule.destroy" {
            break message;
        }
        states.push(message.data["metadata"]["to"].as_str().unwrap().to_owned());
    };
    assert_eq!(states, ["running", "pausing", "paused", "stopped"]);
    assert_eq!((&destroyed.data["outcome"], &destroyed.data["actor"]), (&json!("success"), &json!({"type": "system"})));
    // The other stream has the same, and more.
    let relabelled = all.until("sandbox.metadata.changed", &id).await;
    assert_eq!(relabelled.data["actor"]["type"], "api_key");
    let failed_too = all.until("capsule.create", &id).await;
    assert_eq!(failed_too.id, failed.id);
    assert_eq!(failed_too.data["id"].as_str(), failed.id.as_deref());
    assert!(failed_too.data["details"]["code"].is_string(), "{}", failed_too.data);
    let mut one = replica
        .stream(&format!("/v1/events/all/stream?sandbox_id={sandbox}&kinds=capsule.destroy&last_event_id=0"), None)
        .await;
    assert_eq!(one.next().await.unwrap().event, "connected");
    assert_eq!(one.next().await.unwrap().id, destroyed.id);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_comes_back_misses_nothing_and_hears_nothing_twice() {
    let replica = Replica::start().await;
    let host = replica.host(1 << 20).await;
    let sandbox = replica.sandbox(host).await;
    let mut stream = replica.stream("/v1/events/stream", Some("0")).await;
    let first = stream.until("capsule.state.changed", sandbox.as_str()).await;
    drop(stream);
    // More than a page, while it is away and while it comes back.
    let states = async {
        for round in 0..700 {
            let (desired, observed) = if round % 2 == 0 { ("paused", "paused") } else { ("running", "running") };
            replica.turn(&sandbox, desired, observed).await;
        }
    };
    let heard = async {
        let mut last = first.id.clone().unwrap();
        let mut seen = Vec::new();
        'all: loop {
            let mut stream = replica.stream("/v1/events/stream", Some(&last)).await;
            let connected = stream.next().await.unwrap();
            assert_eq!(connected.id.as_deref(), Some(last.as_str()));
            // It is cut again and again.
            for _ in 0..90 {
                let message = stream.next().await.unwrap();
                last = message.id.clone().unwrap();
                seen.push(last.parse::<i64>().unwrap());
                if seen.len() == 700 {
                    break 'all;
                }
            }
        }
        seen
    };
    let ((), seen) = tokio::join!(states, heard);
    assert!(seen.is_sorted(), "in order");
    assert_eq!(seen.iter().collect::<BTreeSet<_>>().len(), 700, "each once");
    let mut pages = Vec::new();
    let mut after = "0".to_owned();
    loop {
        let page = replica.as_team(Method::GET, &format!("/v1/events?limit=100&after={after}"), None).await;
        assert_eq!(page.status, 200, "{}", page.body);
        let events = page.body["events"].as_array().unwrap().clone();
        after = page.body["next_after"].as_str().unwrap().to_owned();
        if events.is_empty() {
            break;
        }
        pages.extend(events.into_iter().map(|event| event["id"].as_str().unwrap().parse::<i64>().unwrap()));
    }
    assert_eq!(pages.last(), seen.last());
    assert_eq!(pages.len(), 701);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_kept_any_more_is_said() {
    let replica = Replica::start().await;
    let host = replica.host(1 << 20).await;
    let sandbox = replica.sandbox(host).await;
    for _ in 0..3 {
        replica.turn(&sandbox, "paused", "paused").await;
        replica.turn(&sandbox, "running", "running").await;
    }
    let page = replica.as_team(Method::GET, "/v1/events", None).await.body;
    let ids: Vec<&str> = page["events"].as_array().unwrap().iter().map(|event| event["id"].as_str().unwrap()).collect();
    replica.database.sql(&format!("delete from events where id <= {}", ids[3])).await;
    let mut stream = replica.stream("/v1/events/stream", Some(ids[0])).await;
    stream.next().await.unwrap();
    assert_eq!(stream.next().await.unwrap().id.as_deref(), Some(ids[4]), "with what is there");
    assert!(stream.comments.iter().any(|said| said.contains("not kept")), "{:?}", stream.comments);
    let mut all = replica.stream("/v1/events/all/stream", Some(ids[0])).await;
    all.next().await.unwrap();
    let gap = all.next().await.unwrap();
    assert_eq!((gap.event.as_str(), gap.id, &gap.data["details"]["oldest"]), ("gap", None, &json!(ids[4])));
    // One of a database that was restored since: what comes is heard all the same.
    let mut future = replica.stream("/v1/events/all/stream", Some("99999999")).await;
    future.next().await.unwrap();
    assert_eq!(future.next().await.unwrap().event, "gap");
    replica.turn(&sandbox, "paused", "paused").await;
    assert_eq!(future.until("capsule.state.changed", sandbox.as_str()).await.data["metadata"]["to"], "paused");
    for wrong in ["x", "-1", "1.5", "99999999999999999999"] {
        let request = replica.http.get(format!("{}/v1/events/stream", replica.url)).header("Last-Event-ID", wrong);
        assert_eq!(replica.send(Who::Key(&replica.key), request).await.error(), (400, "invalid_request"), "{wrong}");
    }
    for query in ["after=x", "limit=0", "limit=1001", "kinds=nothing", "sandbox_id=x"] {
        let answer = replica.as_team(Method::GET, &format!("/v1/events?{query}"), None).await;
        assert_eq!(answer.error(), (400, "invalid_request"), "{query}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_listeners_hear_within_a_tenth_of_a_second_and_others_nothing() {
    let replica = Replica::start().await;
    let host = replica.host(1 << 20).await;
    let foreign = replica.foreign_key().await;
    let path = format!("{}/v1/events/stream", replica.url);
    let mut listeners = Vec::new();
    for _ in 0..20 {
        let opened = (0..50).map(|_| Listener::open(&replica.http, &path, &replica.key, None));
        listeners.extend(futures::future::join_all(opened).await);
    }
    let mut other = Listener::open(&replica.http, &path, &foreign, None).await;
    for listener in &mut listeners {
        assert_eq!(listener.next().await.unwrap().event, "connected");
    }
    let began = Instant::now();
    let sandbox = replica.sandbox(host).await;
    let heard = listeners.iter_mut().map(|listener| async {
        listener.until("capsule.state.changed", sandbox.as_str()).await;
        began.elapsed()
    });
    let mut took = futures::future::join_all(heard).await;
    took.sort_unstable();
    println!("of 1000 listeners the median heard after {:?}, the last after {:?}", took[500], took[999]);
    // The statement itself, and the reading of a thousand streams by the test, are in it.
    assert!(took[999] < Duration::from_secs(5), "{:?}", took[999]);
    let looks = "select count(*) from pg_stat_activity where datname = current_database() and state = 'active'";
    let active: i64 = replica.database.sql(looks).await.trim().parse().unwrap();
    assert!(active < 20, "one reader asks, not a thousand: {active}");
    drop(listeners);
    assert_eq!(other.next().await.unwrap().event, "connected");
    let nothing = tokio::time::timeout(Duration::from_millis(500), other.next()).await;
    assert!(nothing.is_err(), "another team's is none of theirs: {nothing:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_ends_with_the_right_to_it() {
    let accounts = control_plane::account_settings::AccountSettings {
        rights_every_sec: Some(1),
        ..control_plane::account_settings::AccountSettings::default()
    };
    let replica = Replica::with_accounts(accounts).await;
    let key = replica.as_team(Method::POST, "/v1/api-keys", Some(json!({"scopes": ["sandboxes:read"]}))).await.body;
    let (id, secret) = (key["id"].as_str().unwrap(), key["key"].as_str().unwrap());
    let path = format!("{}/v1/events/stream", replica.url);
    let mut stream = Listener::open(&replica.http, &path, secret, None).await;
    stream.next().await.unwrap();
    let deleted = replica.as_team(Method::DELETE, &format!("/v1/api-keys/{id}"), None).await;
    assert_eq!(deleted.status, 204);
    assert_eq!(stream.next().await, None);
    assert!(stream.comments.iter().any(|said| said.contains("right")), "{:?}", stream.comments);
    let request = replica.http.get(&path);
    assert_eq!(replica.send(Who::Key(secret), request).await.error(), (401, "unauthorized"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_ends_says_so_to_its_listeners() {
    let replica = Replica::start().await;
    let (second, url) = replica.another().await;
    let mut stream = Listener::open(&replica.http, &format!("{url}/v1/events/stream"), &replica.key, None).await;
    let last = stream.next().await.unwrap().id.unwrap();
    let host = replica.host(1 << 20).await;
    let sandbox = replica.sandbox(host).await;
    let heard = stream.until("capsule.state.changed", sandbox.as_str()).await;
    second.stop().await;
    assert_eq!(stream.next().await, None);
    assert!(stream.comments.iter().any(|said| said.contains("replica ends")), "{:?}", stream.comments);
    // Ids are those of the platform, whichever replica tells them.
    let mut again = replica.stream("/v1/events/stream", Some(&last)).await;
    assert_eq!(again.until("capsule.state.changed", sandbox.as_str()).await.id, heard.id);
}
