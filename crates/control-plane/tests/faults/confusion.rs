//! Credentials that are forged, of another kind, of another host, or of another authority: none of them opens anything, and all are told
//! the same.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use chrono::{TimeDelta, Utc};
use control_plane::http::access::{Policy, TABLE};
use control_plane::secrets::{Purpose, Secret};
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use model::ids::HostId;
use reqwest::Method;
use serde_json::{Value, json};

use super::client::{Answer, Client};
use super::cluster::Cluster;
use super::host::Host;

fn b64(text: &str) -> String {
    URL_SAFE_NO_PAD.encode(text)
}

fn signed(claims: &Value, key: &[u8], header: &Header) -> String {
    jsonwebtoken::encode(header, claims, &EncodingKey::from_secret(key)).unwrap()
}

/// With a header that no library writes, and a right signature.
fn signed_raw(header: &str, claims: &Value, key: &[u8]) -> String {
    let text = format!("{}.{}", b64(header), b64(&claims.to_string()));
    let signature =
        jsonwebtoken::crypto::sign(text.as_bytes(), &EncodingKey::from_secret(key), Algorithm::HS256).unwrap();
    format!("{text}.{signature}")
}

/// About sixty tokens, each with what is wrong with it. `right` is the payload of a good one.
fn forgeries(good: &str, right: &Value, host: HostId, cluster: &Cluster) -> Vec<(String, String)> {
    let secret = Secret::load(cluster.dir.path()).unwrap().unwrap();
    let (user, of_host) = (secret.key(Purpose::UserTokens), secret.key(Purpose::HostTokens));
    let hs256 = Header::new(Algorithm::HS256);
    let parts: Vec<&str> = good.split('.').collect();
    let mut all: Vec<(String, String)> = Vec::new();
    let mut add = |what: String, token: String| all.push((what, token));
    // The header's word is not believed: not with a right signature of what it says, not with none, not with the old one.
    let headers = [
        r#"{"alg":"none"}"#,
        r#"{"alg":"None","typ":"JWT"}"#,
        r#"{"alg":"nOnE"}"#,
        r#"{"alg":""}"#,
        r#"{"typ":"JWT"}"#,
        r#"{"alg":"HS384"}"#,
        r#"{"alg":"HS512"}"#,
        r#"{"alg":"RS256"}"#,
        r#"{"alg":"PS256"}"#,
        r#"{"alg":"ES256"}"#,
        r#"{"alg":"EdDSA"}"#,
        r#"{"alg":["HS256"]}"#,
        r#"{"alg":null}"#,
        r#"{"alg":"HS256 "}"#,
        "{}",
        "[]",
        "nonsense",
    ];
    for header in headers {
        add(format!("header {header}, no signature"), format!("{}.{}.", b64(header), parts[1]));
        add(format!("header {header}, the old signature"), format!("{}.{}.{}", b64(header), parts[1], parts[2]));
    }
    for header in [r#"{"alg":"none"}"#, r#"{"alg":"RS256"}"#, r#"{"alg":"HS512"}"#] {
        add(format!("header {header}, a right signature"), signed_raw(header, right, &user));
    }
    for alg in [Algorithm::HS384, Algorithm::HS512] {
        add(format!("{alg:?} with the right key"), signed(right, &user, &Header::new(alg)));
    }
    add(
        "a key file of the sender's choice".to_owned(),
        signed(right, b"", &Header { kid: Some("../../dev/null".to_owned()), ..hs256.clone() }),
    );
    add(
        "a key server of the sender's choice".to_owned(),
        signed(right, b"x", &Header { jku: Some("http://127.0.0.1:9/".to_owned()), ..hs256.clone() }),
    );
    add("an empty key".to_owned(), signed(right, b"", &hs256));
    add("the hosts' key".to_owned(), signed(right, &of_host, &hs256));
    add("a host's token".to_owned(), cluster.tokens().for_host(host, Utc::now()).0);
    let now = Utc::now().timestamp();
    for (claim, value) in [
        ("typ", json!("host")),
        ("typ", json!("User")),
        ("typ", Value::Null),
        ("aud", json!("wrenn-host")),
        ("aud", json!(["other"])),
        ("aud", Value::Null),
        ("exp", json!(now - 60)),
        ("exp", json!("9999999999")),
        ("exp", json!(-1)),
        ("exp", Value::Null),
        ("sub", json!("")),
        ("sub", json!(host.to_string())),
        ("sub", json!("user-0000000000000000000000000")),
        ("sub", json!("../../etc/passwd")),
        ("sid", json!("")),
        ("sid", right["sub"].clone()),
        ("sid", Value::Null),
        ("team_id", json!("'; drop table users; --")),
        ("team_id", json!({"$ne": null})),
    ] {
        let mut claims = right.clone();
        claims[claim] = value.clone();
        if value.is_null() {
            claims.as_object_mut().unwrap().remove(claim);
        }
        add(format!("{claim} = {value}"), signed(&claims, &user, &hs256));
    }
    let body = format!("{}.{}", parts[0], parts[1]);
    let flipped = if parts[2].starts_with('A') { "B" } else { "A" };
    for (what, token) in [
        ("no signature", body.clone()),
        ("an empty signature", format!("{body}.")),
        ("a changed signature", format!("{body}.{flipped}{}", &parts[2][1..])),
        ("half a signature", format!("{body}.{}", &parts[2][..20])),
        ("two signatures", format!("{good}.{}", parts[2])),
        ("a token in a token", format!("{}.{}.{}", parts[0], b64(good), parts[2])),
        ("five parts, as if encrypted", format!("{good}.x.y")),
        ("quotes", format!("\"{good}\"")),
        ("other letters", good.replace('.', "%2e")),
        ("nothing", ".".to_owned()),
        ("dots", "..".to_owned()),
        ("six thousand letters", "x".repeat(6000)),
    ] {
        add(what.to_owned(), token);
    }
    all
}

fn payload(token: &str) -> Value {
    serde_json::from_slice(&URL_SAFE_NO_PAD.decode(token.split('.').nth(1).unwrap()).unwrap()).unwrap()
}

/// The body without what is of each request alone.
fn told(answer: &Answer) -> (u16, Value) {
    let mut body = answer.body.clone();
    body["error"]["request_id"] = Value::Null;
    (answer.status, body)
}

#[tokio::test(flavor = "multi_thread")]
async fn forged_tokens_are_all_told_the_same() {
    let cluster = Cluster::start(1).await;
    let host = Host::join(&cluster).await;
    let url = format!("http://{}", cluster.balancer.address());
    let good = cluster.admin.bearer_token().to_owned();
    let me = async |token: &str| Client::bearer(&url, token).call(Method::GET, "/v1/me", None).await.unwrap();
    assert_eq!(me(&good).await.status, 200, "the one that they are made of is good");
    let refused = told(&me("x").await);
    assert_eq!(refused.0, 401);
    let forgeries = forgeries(&good, &payload(&good), host.id, &cluster);
    assert!(forgeries.len() >= 60, "{}", forgeries.len());
    let beat = format!("/v1/hosts/{}/heartbeat", host.id);
    for (what, token) in &forgeries {
        assert_eq!(told(&me(token).await), refused, "{what}");
        if what == "a host's token" {
            continue;
        }
        let as_host = Client::bearer(&url, token).call(Method::POST, &beat, Some(json!({}))).await.unwrap();
        assert_eq!(told(&as_host), refused, "{what}, as a host");
    }
    let as_host = Client::bearer(&url, &good).call(Method::POST, &beat, Some(json!({}))).await.unwrap();
    assert_eq!(told(&as_host), refused, "a person is no host");
    assert_eq!(me(&good).await.status, 200, "and it is good afterwards");
}

/// What was stolen from one host opens its own three routes, of its own row, until the row is gone.
#[tokio::test(flavor = "multi_thread")]
async fn a_stolen_host_credential_opens_its_own_row_alone() {
    let cluster = Cluster::start(1).await;
    let (host, other) = (Host::join(&cluster).await, Host::join(&cluster).await);
    let theirs = cluster.team.running("theirs").await;
    let home = cluster.rows("select host_id from sandboxes").await[0][0].clone();
    let (thief, victim) = if home == host.id.0.to_string() { (&other, &host) } else { (&host, &other) };
    let url = format!("http://{}", cluster.balancer.address());
    let token = thief.credentials.borrow().host.token.clone();
    let stolen = Client::bearer(&url, &token);
    for (method, route, policy) in TABLE {
        let is_open = matches!(policy, Policy::Open) || matches!(policy, Policy::Host);
        if is_open || route.ends_with("/stream") || route.ends_with("/pty") {
            continue;
        }
        let path = route
            .replace("{id}", &theirs)
            .replace("{selector}", "1")
            .replace("{tag}", "x")
            .replace("{user_id}", "user-0000000000000000000000000")
            .replace("{invitation_id}", "x");
        let answer = stolen.call(method.parse().unwrap(), &path, Some(json!({}))).await.unwrap();
        assert_eq!((answer.status, answer.code()), (401, "unauthorized"), "{method} {route}");
    }
    for route in ["heartbeat", "renew"] {
        let told = victim.told.lock().unwrap().last().cloned();
        let body = serde_json::to_value(told).unwrap();
        let path = format!("/v1/hosts/{}/{route}", victim.id);
        let answer = stolen.call(Method::POST, &path, Some(body)).await.unwrap();
        assert_ne!(answer.status / 100, 2, "{route} of another host: {}", answer.body);
    }
    // The word of one host about the sandbox of another.
    let mut lie = thief.told.lock().unwrap().last().unwrap().clone();
    let now = cluster
        .rows(&format!("select agent_run, heartbeat_sequence, epoch from hosts where id = '{}'", thief.id.0))
        .await;
    lie.agent_run.clone_from(&now[0][0]);
    lie.sequence = now[0][1].parse::<u64>().unwrap() + 1;
    lie.epoch = now[0][2].parse().unwrap();
    lie.sandboxes = vec![api::v1::hosts::ReportedSandbox {
        id: theirs.clone(),
        observed: "failed".to_owned(),
        revision: 99,
        ..Default::default()
    }];
    let path = format!("/v1/hosts/{}/heartbeat", thief.id);
    let answer = stolen.call(Method::POST, &path, Some(serde_json::to_value(&lie).unwrap())).await.unwrap();
    assert_eq!(answer.status, 200, "{}", answer.body);
    assert_eq!(cluster.team.status(&theirs).await, "running");
    let gone = cluster.admin.call(Method::DELETE, &format!("/v1/hosts/{}", thief.id), None).await.unwrap();
    assert_eq!(gone.status, 204, "{}", gone.body);
    let answer = stolen.call(Method::POST, &path, Some(serde_json::to_value(&lie).unwrap())).await.unwrap();
    assert_eq!((answer.status, answer.code()), (401, "unauthorized"), "what is removed is removed at once");
    let later = cluster.tokens().for_host(victim.id, Utc::now() - TimeDelta::days(31)).0;
    let path = format!("/v1/hosts/{}/heartbeat", victim.id);
    let answer = Client::bearer(&url, &later).call(Method::POST, &path, Some(json!({}))).await.unwrap();
    assert_eq!((answer.status, answer.code()), (401, "unauthorized"), "its month is over");
}
