//! Channels on a real server that is told things: what arrives, in which order, how often, and what is never reached.

mod replica;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use aws_lc_rs::hmac;
use axum::Router;
use axum::extract::State;
use axum::routing::any;
use http::{HeaderMap, StatusCode};
use replica::{Replica, Team, Who};
use reqwest::Method;
use serde_json::{Value, json};

/// A server that keeps what it is told, and answers what it is set to.
#[derive(Clone, Default)]
struct Receiver {
    told: Arc<Mutex<Vec<(HeaderMap, String)>>>,
    /// Statuses of the next answers; then 204.
    answers: Arc<Mutex<Vec<u16>>>,
}

impl Receiver {
    async fn start() -> (Self, String) {
        let receiver = Self::default();
        let router = Router::new().route("/hook", any(told)).with_state(receiver.clone());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/hook", listener.local_addr().unwrap());
        tokio::spawn(async move { axum::serve(listener, router).await });
        (receiver, url)
    }

    fn bodies(&self) -> Vec<Value> {
        self.told.lock().unwrap().iter().map(|(_, body)| serde_json::from_str(body).unwrap()).collect()
    }

    async fn wait(&self, count: usize) {
        let wait = async {
            while self.told.lock().unwrap().len() < count {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(40), wait).await.unwrap_or_else(|_| panic!("{:?}", self.bodies()));
    }
}

async fn told(State(receiver): State<Receiver>, headers: HeaderMap, body: String) -> StatusCode {
    receiver.told.lock().unwrap().push((headers, body));
    let mut answers = receiver.answers.lock().unwrap();
    if answers.is_empty() { StatusCode::NO_CONTENT } else { StatusCode::from_u16(answers.remove(0)).unwrap() }
}

fn webhook(name: &str, url: &str, events: &[&str]) -> Value {
    json!({"name": name, "provider": "webhook", "config": {"url": url}, "events": events})
}

/// As if a sandbox of the team had been through that.
async fn happens(replica: &Replica, team: &Team, kind: &str, outcome: &str, resource: &str) {
    replica
        .database
        .sql(&format!(
            "insert into events_written (team_id, kind, outcome, resource_type, resource_id, actor_kind, actor_id)
             values ('{}', '{kind}', '{outcome}', 'capsule', '{resource}', 'user', 'usr-1')",
            team.id.0
        ))
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_happens_is_told_in_order_signed_and_until_it_arrives() {
    let replica = Replica::start().await;
    let team = replica.team().await;
    let (receiver, url) = Receiver::start().await;
    let events = ["capsule.created", "capsule.paused", "capsule.destroyed"];
    let made =
        replica.as_person(&team.member, Method::POST, "/v1/channels", Some(webhook(" My Hook ", &url, &events))).await;
    assert_eq!((made.status.as_u16(), &made.body["name"]), (201, &json!("my-hook")), "{}", made.body);
    let secret = made.body["secret"].as_str().unwrap().to_owned();
    let path = format!("/v1/channels/{}", made.body["id"].as_str().unwrap());

    receiver.answers.lock().unwrap().extend([500, 302]);
    for (kind, outcome) in [
        ("capsule.create", "success"),
        ("capsule.resume", "success"),
        ("capsule.pause", "error"),
        ("capsule.pause", "success"),
        ("capsule.destroy", "success"),
    ] {
        happens(&replica, &team, kind, outcome, "sb1").await;
    }
    // Somebody else's.
    let others = replica.team().await;
    happens(&replica, &others, "capsule.create", "success", "sb2").await;
    receiver.wait(5).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    let bodies = receiver.bodies();
    let kinds: Vec<&str> = bodies.iter().map(|body| body["event"].as_str().unwrap()).collect();
    let first = "capsule.created";
    assert_eq!(kinds, [first, first, first, "capsule.paused", "capsule.destroyed"]);
    assert_eq!(bodies[0]["resource"], json!({"id": "sb1", "type": "sandbox"}));
    assert_eq!(bodies[0]["team_id"], team.id.to_string());
    assert_eq!(bodies[0]["actor"]["type"], "user");

    let told = receiver.told.lock().unwrap().clone();
    let header = |number: usize, name: &str| told[number].0[name].to_str().unwrap().to_owned();
    assert_eq!(header(0, "x-wrenn-delivery"), header(2, "x-wrenn-delivery"));
    assert_ne!(header(2, "x-wrenn-delivery"), header(3, "x-wrenn-delivery"));
    for (number, (_, body)) in told.iter().enumerate() {
        let key = hmac::Key::new(hmac::HMAC_SHA256, secret.as_bytes());
        let signed = hmac::sign(&key, format!("{}.{body}", header(number, "x-wrenn-timestamp")).as_bytes());
        assert_eq!(header(number, "x-wrenn-signature"), format!("sha256={}", hex::encode(signed)));
    }
    let shown = replica.as_person(&team.member, Method::GET, &path, None).await;
    assert!(shown.body["delivered_at"].is_string() && shown.body["problem"].is_null(), "{}", shown.body);
    assert!(shown.body["secret"].is_null() && !shown.body.to_string().contains(&secret), "{}", shown.body);
    let kept = replica.database.sql("select encode(config, 'escape') from channels").await;
    assert!(!kept.contains(&secret) && !kept.contains("hook"), "{kept}");

    // What still waits goes with the channel.
    receiver.answers.lock().unwrap().extend([500; 20]);
    happens(&replica, &team, "capsule.create", "success", "sb3").await;
    receiver.wait(6).await;
    let wait = async {
        while replica.as_person(&team.member, Method::GET, &path, None).await.body["problem"].is_null() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), wait).await.unwrap();
    let shown = replica.as_person(&team.member, Method::GET, &path, None).await;
    assert_eq!(shown.body["problem"], "it answered 500");
    let gone = replica.as_person(&team.member, Method::DELETE, &path, None).await;
    assert_eq!(gone.status, 204);
    assert_eq!(replica.database.sql("select count(*) from outbox where channel_id is not null").await.trim(), "0");
    assert_eq!(replica.as_person(&team.member, Method::GET, &path, None).await.error(), (404, "not_found"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_channel_that_hangs_holds_up_nobody_elses() {
    let replica = Replica::start().await;
    let team = replica.team().await;
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let hanging = format!("http://{}/", silent.local_addr().unwrap());
    let (receiver, url) = Receiver::start().await;
    for number in 0..3 {
        let new = webhook(&format!("hangs-{number}"), &hanging, &["capsule.created"]);
        assert_eq!(replica.as_person(&team.member, Method::POST, "/v1/channels", Some(new)).await.status, 201);
    }
    let new = webhook("works", &url, &["capsule.created"]);
    assert_eq!(replica.as_person(&team.member, Method::POST, "/v1/channels", Some(new)).await.status, 201);
    for number in 0..20 {
        happens(&replica, &team, "capsule.create", "success", &format!("sb{number}")).await;
    }
    receiver.wait(1).await;
    let resources: Vec<Value> = receiver.bodies().iter().map(|body| body["resource"]["id"].clone()).collect();
    assert_eq!(resources[0], "sb0");
    receiver.wait(20).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_channels_are_refused_and_changed_ones_are_whole() {
    let replica = Replica::start().await;
    let team = replica.team().await;
    let call =
        async |method: Method, path: &str, body: Value| replica.as_person(&team.member, method, path, Some(body)).await;
    let good = webhook("ops", "https://example.org/hook", &["host.down"]);
    for (field, value, wrong) in [
        ("name", json!("../x"), "name"),
        ("name", json!(""), "name"),
        ("provider", json!("irc"), "provider"),
        ("events", json!([]), "events"),
        ("events", json!(["capsule.exploded"]), "events"),
        ("config", json!({}), "config.url"),
        ("config", json!({"url": "file:///etc/passwd"}), "config.url"),
        ("config", json!({"url": "https://user:secret@example.org/"}), "config.url"),
        ("config", json!({"url": "https://example.org/", "chat_id": "1"}), "config"),
    ] {
        let mut body = good.clone();
        body[field] = value;
        let answer = call(Method::POST, "/v1/channels", body.clone()).await;
        assert_eq!(answer.error(), (400, "invalid_request"), "{body}");
        assert_eq!(answer.body["error"]["details"]["field"], wrong, "{body}");
    }
    let made = call(Method::POST, "/v1/channels", good.clone()).await;
    assert_eq!(made.status, 201);
    assert_eq!(call(Method::POST, "/v1/channels", good.clone()).await.error(), (409, "conflict"));
    let mut other = good.clone();
    other["name"] = json!("other");
    let other = call(Method::POST, "/v1/channels", other).await;
    let path = format!("/v1/channels/{}", other.body["id"].as_str().unwrap());
    assert_eq!(call(Method::PATCH, &path, json!({"name": "OPS"})).await.error(), (409, "conflict"));
    assert_eq!(call(Method::PATCH, &path, json!({})).await.error(), (400, "invalid_request"));
    let updated = call(Method::PATCH, &path, json!({"events": ["host.up", "capsule.paused", "host.up"]})).await;
    assert_eq!(updated.body["events"], json!(["capsule.paused", "host.up"]));
    let set = call(Method::PUT, &format!("{path}/config"), json!({"config": {"url": "https://example.org/new"}})).await;
    assert!(set.body["secret"].as_str().is_some_and(|secret| secret.len() == 64), "{}", set.body);
    let own = json!({"config": {"url": "https://example.org/new", "secret": "mine"}});
    let set = call(Method::PUT, &format!("{path}/config"), own).await;
    assert!(set.status == 200 && set.body["secret"].is_null(), "{}", set.body);

    // To others there is none of them.
    let stranger = replica.foreign_key().await;
    let answer = replica.call(Who::Key(&stranger), Method::GET, &path, None).await;
    assert!([403, 404].contains(&answer.status.as_u16()), "{}", answer.body);
    let others = replica.team().await;
    assert_eq!(replica.as_person(&others.owner, Method::GET, &path, None).await.error(), (404, "not_found"));

    // A repeated call under a key finds what the first one made, with its secret.
    let send = async |body: Value| {
        let request =
            replica.http.post(format!("{}/v1/channels", replica.url)).header("Idempotency-Key", "k1").json(&body);
        replica.send(Who::Bearer(&team.member.token), request).await
    };
    let mut third = good;
    third["name"] = json!("third");
    let (first, again) = (send(third.clone()).await, send(third.clone()).await);
    assert_eq!((first.status.as_u16(), &first.body), (201, &again.body));
    assert!(first.body["secret"].is_string());
    third["name"] = json!("fourth");
    assert_eq!(send(third).await.error(), (422, "idempotency_key_reused"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_test_tells_once_and_reaches_nothing_of_the_operators() {
    let replica = Replica::start().await;
    let team = replica.team().await;
    let (receiver, url) = Receiver::start().await;
    let test = async |url: &str| {
        let body = json!({"provider": "webhook", "config": {"url": url}});
        replica.as_person(&team.member, Method::POST, "/v1/channels/test", Some(body)).await
    };
    let told = test(&url).await;
    assert_eq!((told.status.as_u16(), &told.body), (200, &json!({"status": "ok"})));
    assert_eq!(receiver.bodies()[0]["event"], "channel.test");
    receiver.answers.lock().unwrap().push(404);
    let refused = test(&url).await;
    assert_eq!(refused.error(), (502, "delivery_failed"));
    // The test's settings allow loopback alone: the rest is as an operator's network is.
    let mut said = vec![refused.body["error"]["message"].clone()];
    for url in
        ["http://10.0.0.1/", "http://169.254.169.254/latest/meta-data/", "http://[fd00::1]/", "http://127.0.0.1:1/"]
    {
        let answer = test(url).await;
        assert_eq!(answer.error(), (502, "delivery_failed"), "{url}");
        said.push(answer.body["error"]["message"].clone());
    }
    said.dedup();
    assert_eq!(said.len(), 1, "the answer tells one from another: {said:?}");
    assert_eq!(receiver.told.lock().unwrap().len(), 2);
    // And nobody is flooded by it.
    let mut answers = Vec::new();
    for _ in 0..20 {
        answers.push(test(&url).await.status.as_u16());
    }
    assert!(answers.contains(&200) && answers.ends_with(&[429]), "{answers:?}");
    assert!(receiver.told.lock().unwrap().len() < 20);
}
