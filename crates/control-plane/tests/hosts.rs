//! Hosts: created, registered by a token that works once, heard from, removed.

mod replica;

use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use api::v1::hosts::{self, ReportedSandbox};
use model::ids::HostId;
use rcgen::{CertificateParams, KeyPair};
use replica::{Answer, Replica, Who};
use reqwest::Method;
use serde_json::{Value, json};

fn csr(key: &KeyPair) -> String {
    CertificateParams::default().serialize_request(key).unwrap().pem().unwrap()
}

fn registration(token: &str, key: &KeyPair, address: &str) -> Value {
    json!({"token": token, "address": address, "csr_pem": csr(key), "arch": "x86_64", "cpu_cores": 2, "memory_mb": 4096,
        "disk_gb": 20, "isolation": "emulation", "agent_version": "0.1.0", "templates": ["minimal"]})
}

impl Replica {
    async fn new_host(&self) -> (String, String) {
        let made = self.as_admin(Method::POST, "/v1/hosts", Some(json!({"type": "regular"}))).await;
        assert_eq!(made.status, 201, "{}", made.body);
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        (text(&made.body["host"]["id"]), text(&made.body["registration_token"]))
    }

    async fn register(&self, token: &str, key: &KeyPair) -> Answer {
        let body = registration(token, key, "127.0.0.1:50051");
        self.call(Who::Nobody, Method::POST, "/v1/hosts/register", Some(body)).await
    }
}

fn heartbeat(sequence: u64, sandboxes: &[&str]) -> Value {
    let sandboxes: Vec<Value> =
        sandboxes.iter().map(|id| json!({"id": id, "observed": "running", "revision": 1})).collect();
    json!({"epoch": 1, "sequence": sequence, "agent_run": "a", "memory_free_mb": 1000, "disk_free_mb": 10_000, "complete": true,
        "sandboxes": sandboxes, "facts": {"arch": "x86_64", "cpu_cores": 2, "memory_mb": 4096, "disk_gb": 20,
            "isolation": "emulation", "agent_version": "0.1.0", "templates": ["minimal"]}})
}

/// The answer may be lost on its way: the same key may ask again, another key may not.
#[tokio::test(flavor = "multi_thread")]
async fn a_token_works_once_for_one_key_and_for_one_hour() {
    let replica = Replica::start().await;
    let (id, token) = replica.new_host().await;
    let (key, thief) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
    let first = replica.register(&token, &key).await;
    assert_eq!((first.status.as_u16(), first.body["host"]["id"].as_str()), (201, Some(id.as_str())), "{}", first.body);
    for field in ["token", "cert_pem", "ca_cert_pem"] {
        assert!(first.body[field].as_str().is_some_and(|text| !text.is_empty()), "{field}: {}", first.body);
    }
    let again = replica.register(&token, &key).await;
    assert_eq!((again.status.as_u16(), &again.body["host"]["id"]), (201, &first.body["host"]["id"]), "{}", again.body);
    assert_eq!(replica.register(&token, &thief).await.error(), (401, "unauthorized"));

    replica.database.sql("update registration_tokens set expires_at = now() - interval '1 second'").await;
    assert_eq!(replica.register(&token, &key).await.error(), (401, "unauthorized"));

    // A host that is registered needs no token; one that is not gets another, and the first opens nothing any more.
    let again = replica.as_admin(Method::POST, &format!("/v1/hosts/{id}/token"), None).await;
    assert_eq!(again.error(), (409, "invalid_state"));
    let (id, old) = replica.new_host().await;
    let fresh = replica.as_admin(Method::POST, &format!("/v1/hosts/{id}/token"), None).await;
    let fresh = fresh.body["registration_token"].as_str().unwrap().to_owned();
    assert_eq!(replica.register(&old, &key).await.error(), (401, "unauthorized"));
    assert_eq!(replica.register(&fresh, &key).await.status, 201);
    let audited = replica.database.sql("select count(*) from audit where action = 'host.register'").await;
    assert_eq!(audited.trim(), "2", "one record for each registration, none for its repetition");
}

#[tokio::test(flavor = "multi_thread")]
async fn of_many_keys_with_one_token_one_wins() {
    let replica = Replica::start().await;
    let (_, token) = replica.new_host().await;
    let keys: Vec<KeyPair> = (0..12).map(|_| KeyPair::generate().unwrap()).collect();
    let answers = futures::future::join_all(keys.iter().map(|key| replica.register(&token, key))).await;
    let statuses: Vec<u16> = answers.iter().map(|answer| answer.status.as_u16()).collect();
    assert_eq!(statuses.iter().filter(|status| **status == 201).count(), 1, "{statuses:?}");
    assert_eq!(statuses.iter().filter(|status| **status == 401).count(), 11, "{statuses:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registration_with_wrong_claims_uses_nothing_up() {
    let replica = Replica::start().await;
    let (_, token) = replica.new_host().await;
    let key = KeyPair::generate().unwrap();
    let with = |field: &str, value: Value| {
        let mut body = registration(&token, &key, "127.0.0.1:50051");
        body[field] = value;
        body
    };
    let wrong = [
        ("address", json!("127.0.0.1")),
        ("address", json!("127.0.0.1:0")),
        ("address", json!("127.0.0.1:65536")),
        ("address", json!("http://127.0.0.1:1/x")),
        // Not in the networks in which hosts may be: the control plane would dial whatever it is told.
        ("address", json!("169.254.169.254:80")),
        ("address", json!("192.168.0.1:80")),
        ("address", json!("[::1]:80")),
        ("address", json!("user@127.0.0.1:80")),
        ("csr_pem", json!("nonsense")),
        ("csr_pem", json!("x".repeat(20_000))),
        ("cpu_cores", json!(-1)),
        ("memory_mb", json!("much")),
        ("disk_gb", json!(1i64 << 50)),
        ("arch", json!("x\ny")),
        ("templates", json!(["../../etc"])),
    ];
    for (field, value) in wrong {
        let said = value.to_string();
        let answer = replica.call(Who::Nobody, Method::POST, "/v1/hosts/register", Some(with(field, value))).await;
        assert_eq!(
            answer.error(),
            (400, "invalid_request"),
            "{field} {}: {}",
            &said[..said.len().min(50)],
            answer.body
        );
    }
    for token in ["", "x", "wrnreg_", &format!("wrnreg_{}", "0".repeat(64)), &"y".repeat(1000)] {
        let answer = replica.register(token, &key).await;
        assert_eq!(answer.error(), (401, "unauthorized"), "{token:?}");
    }
    assert_eq!(replica.register(&token, &key).await.status, 201);
}

/// A host's credential is for its own row, and for nothing once the row is gone.
#[tokio::test(flavor = "multi_thread")]
async fn a_host_acts_for_itself_alone_and_not_after_its_removal() {
    let replica = Replica::start().await;
    let (id, token) = replica.new_host().await;
    let key = KeyPair::generate().unwrap();
    let jwt = replica.register(&token, &key).await.body["token"].as_str().unwrap().to_owned();
    let (other, _) = replica.new_host().await;
    let beat = |of: &str| format!("/v1/hosts/{of}/heartbeat");
    let own = replica.call(Who::Bearer(&jwt), Method::POST, &beat(&id), Some(heartbeat(1, &[]))).await;
    assert_eq!(own.status, 200, "{}", own.body);
    let others = replica.call(Who::Bearer(&jwt), Method::POST, &beat(&other), Some(heartbeat(1, &[]))).await;
    assert_eq!(others.error(), (403, "forbidden"));
    let by_admin = replica.call(Who::Bearer(&replica.admin), Method::POST, &beat(&id), Some(heartbeat(1, &[]))).await;
    assert_eq!(by_admin.error(), (401, "unauthorized"));
    let as_user = replica.call(Who::Bearer(&jwt), Method::GET, "/v1/hosts", None).await;
    assert_eq!(as_user.error(), (401, "unauthorized"));
    let renewal = json!({"csr_pem": csr(&key), "address": "127.0.0.1:50052"});
    let renewed =
        replica.call(Who::Bearer(&jwt), Method::POST, &format!("/v1/hosts/{id}/renew"), Some(renewal.clone())).await;
    assert_eq!((renewed.status.as_u16(), renewed.body["host"]["address"].as_str()), (200, Some("127.0.0.1:50052")));

    assert_eq!(replica.as_admin(Method::DELETE, &format!("/v1/hosts/{id}"), None).await.status, 204);
    let gone = replica.call(Who::Bearer(&jwt), Method::POST, &beat(&id), Some(heartbeat(2, &[]))).await;
    assert_eq!(gone.error(), (401, "unauthorized"));
    let gone = replica.call(Who::Bearer(&jwt), Method::POST, &format!("/v1/hosts/{id}/renew"), Some(renewal)).await;
    assert_eq!(gone.error(), (401, "unauthorized"));
    assert_eq!(replica.as_admin(Method::DELETE, &format!("/v1/hosts/{id}"), None).await.error(), (404, "not_found"));
}

/// What a host says is believed of what is placed there, and of nothing else.
#[tokio::test(flavor = "multi_thread")]
async fn heartbeats_are_news_only_of_what_is_theirs() {
    let replica = Replica::start().await;
    let (host, other): (HostId, HostId) = (replica.host(4096).await, replica.host(4096).await);
    let (here, there) = (replica.sandbox(host).await, replica.sandbox(other).await);
    let jwt = replica.token_of_host(host);
    let path = format!("/v1/hosts/{host}/heartbeat");
    let beat = |body: Value| replica.call(Who::Bearer(&jwt), Method::POST, &path, Some(body));
    let state = async |id: &str| {
        replica.as_team(Method::GET, &format!("/v1/sandboxes/{id}"), None).await.body["status"]
            .as_str()
            .unwrap()
            .to_owned()
    };
    let mut report = heartbeat(5, &[here.as_str(), there.as_str(), "sb0000000000000000000000"]);
    report["sandboxes"][0]["observed"] = json!("failed");
    report["sandboxes"][0]["reason"] = json!("the VMM ended");
    report["sandboxes"][1]["observed"] = json!("failed");
    assert_eq!(beat(report.clone()).await.status, 200);
    assert_eq!(state(here.as_str()).await, "error");
    assert_eq!(state(there.as_str()).await, "running", "another host's word");
    let shown = replica.database.sql(&format!("select unclaimed from hosts where id = '{}'", host.0)).await;
    let unclaimed: HashSet<&str> = shown.trim().trim_matches(['{', '}']).split(',').collect();
    assert_eq!(unclaimed, HashSet::from([there.as_str(), "sb0000000000000000000000"]));

    // An older heartbeat of the same process came late.
    report["sequence"] = json!(4);
    report["sandboxes"][0]["observed"] = json!("running");
    assert_eq!(beat(report.clone()).await.status, 200);
    assert_eq!(state(here.as_str()).await, "error");
    for (field, value) in [
        ("sandboxes", json!([{"id": "nonsense", "observed": "running", "revision": 1}])),
        ("sandboxes", json!([{"id": here.as_str(), "observed": "melting", "revision": 1}])),
        ("sequence", json!(-1)),
        ("sequence", json!(u64::MAX)),
        ("agent_run", json!("x".repeat(1000))),
    ] {
        let mut body = heartbeat(9, &[]);
        body[field] = value;
        assert_eq!(beat(body).await.error(), (400, "invalid_request"), "{field}");
    }
}

/// Half a minute after half a minute a host says the same: then a digest says it, and only for as long as both sides mean the same.
#[tokio::test(flavor = "multi_thread")]
async fn a_digest_stands_for_the_list_for_as_long_as_both_sides_mean_the_same() {
    let replica = Replica::start().await;
    let (host, other): (HostId, HostId) = (replica.host(4096).await, replica.host(4096).await);
    let (one, two) = (replica.sandbox(host).await, replica.sandbox(host).await);
    replica.sandbox(other).await;
    let jwt = replica.token_of_host(host);
    let path = format!("/v1/hosts/{host}/heartbeat");
    let sequence = AtomicU64::new(0);
    let said = |id: &str, observed: &str, revision| ReportedSandbox {
        id: id.to_owned(),
        observed: observed.to_owned(),
        revision,
        ..ReportedSandbox::default()
    };
    // Whether a digest suffices from then on.
    let beat = async |mut body: Value| {
        body["sequence"] = json!(sequence.fetch_add(1, Ordering::Relaxed) + 1);
        let answer = replica.call(Who::Bearer(&jwt), Method::POST, &path, Some(body)).await;
        assert_eq!(answer.status, 200, "{}", answer.body);
        answer.body["digest_suffices"] == true
    };
    let list = async |sandboxes: &[ReportedSandbox]| {
        let mut body = heartbeat(0, &[]);
        body["sandboxes"] = json!(sandboxes);
        beat(body).await
    };
    let digest = async |held: &[ReportedSandbox], named: &[ReportedSandbox]| {
        let mut body = heartbeat(0, &[]);
        body["complete"] = json!(false);
        body["sandboxes"] = json!(named);
        body["digest"] = json!(hosts::digest(held));
        beat(body).await
    };
    let both = [said(two.as_str(), "running", 1), said(one.as_str(), "running", 1)];
    assert!(list(&both).await);
    assert!(digest(&both, &[]).await);
    assert!(digest(&both, &both[..1]).await, "named, too, as those whose idle time counts");
    let absent = "select count(*) from sandboxes where absent_since is not null";
    assert_eq!(replica.database.sql(absent).await.trim(), "0", "nothing is missing that a digest has");

    for (what, held) in [
        ("one is not there", vec![both[0].clone()]),
        ("one is there that nobody knows", [&both[..], &[said("sb0000000000000000000000", "running", 1)]].concat()),
        ("one is paused", vec![both[0].clone(), said(one.as_str(), "paused", 1)]),
        ("one has a newer wish", vec![both[0].clone(), said(one.as_str(), "running", 2)]),
        ("none is there", vec![]),
    ] {
        assert!(!digest(&held, &[]).await, "{what}");
    }
    let states = "select count(*) from sandboxes where observed <> 'running' or desired <> 'running' or absent_since is not null or revision <> 1";
    assert_eq!(replica.database.sql(states).await.trim(), "0", "a digest alone changes nothing");
    for (observed, what) in [("failed", "it runs here"), ("starting", "it is under way")] {
        assert!(!digest(&both, &[said(one.as_str(), observed, 1)]).await, "{what}");
        assert!(!list(&[both[0].clone(), said(one.as_str(), "starting", 1)]).await, "{what}");
    }
    assert!(!digest(&both, &[said("sb0000000000000000000000", "failed", 1)]).await, "nobody knows it");

    // What the list says is taken in, and then it is what both mean.
    assert!(!list(&both[..1]).await);
    assert_eq!(replica.database.sql(absent).await.trim(), "1");
    assert!(!digest(&both, &[]).await, "one is missed until a list has named it");
    assert!(!list(&both).await);
    assert!(list(&both).await && digest(&both, &[]).await);
    let failed = [both[0].clone(), said(one.as_str(), "failed", 1)];
    assert!(!list(&failed).await);
    assert!(list(&failed).await && digest(&failed, &failed[1..]).await);

    // A scan that is not done yet does not know what is missing, and a host that was declared lost meanwhile is asked for all.
    let mut body = heartbeat(0, &[]);
    body["sandboxes"] = json!(failed);
    body["complete"] = json!(false);
    assert!(!beat(body.clone()).await);
    body["complete"] = json!(true);
    body["epoch"] = json!(0);
    assert!(!beat(body).await);

    let good = hosts::digest(&both);
    for wrong in ["", "x", &good[1..], &good.to_uppercase(), &good.replace(|letter: char| letter.is_ascii_digit(), "g")]
    {
        let mut body = heartbeat(1000, &[]);
        body["complete"] = json!(false);
        body["digest"] = json!(wrong);
        let refused = replica.call(Who::Bearer(&jwt), Method::POST, &path, Some(body)).await;
        assert_eq!(refused.error(), (400, "invalid_request"), "{wrong}");
    }
    let mut body = heartbeat(1000, &[]);
    body["digest"] = json!(good);
    let refused = replica.call(Who::Bearer(&jwt), Method::POST, &path, Some(body)).await;
    assert_eq!(refused.error(), (400, "invalid_request"), "a complete list and a digest");
}

/// A copied disk: two agents with one identity. An agent that was started again is none, and neither is a heartbeat that came late.
#[tokio::test(flavor = "multi_thread")]
async fn two_machines_with_one_identity_are_fenced_until_an_operator_has_looked() {
    let replica = Replica::start().await;
    let host = replica.host(4096).await;
    let sandbox = replica.sandbox(host).await;
    let jwt = replica.token_of_host(host);
    let beat = async |run: &str, sequence: u64| {
        let mut body = heartbeat(sequence, &[sandbox.as_str()]);
        body["agent_run"] = json!(run);
        replica.call(Who::Bearer(&jwt), Method::POST, &format!("/v1/hosts/{host}/heartbeat"), Some(body)).await
    };
    let status =
        async || replica.as_admin(Method::GET, &format!("/v1/hosts/{host}"), None).await.body["status"].clone();
    for run in ["a", "b", "c"] {
        assert_eq!(beat(run, 1).await.status, 200, "a new start");
    }
    for sequence in [2, 3, 3] {
        assert_eq!(beat("b", sequence).await.status, 200, "it may have been under way");
    }
    assert_eq!(beat("c", 2).await.status, 200);
    assert_eq!(status().await, "online");

    replica.database.sql("update past_agent_runs set heard_at = heard_at - interval '1 minute'").await;
    assert_eq!(beat("b", 3).await.status, 200, "it was taken in before");
    assert_eq!(status().await, "online");
    assert_eq!(beat("b", 4).await.error(), (409, "host_fenced"));
    assert_eq!(beat("c", 3).await.error(), (409, "host_fenced"));
    assert_eq!(beat("d", 1).await.error(), (409, "host_fenced"));
    assert_eq!(status().await, "fenced");

    let of_it = format!("/v1/sandboxes/{sandbox}");
    assert_eq!(replica.as_team(Method::GET, &of_it, None).await.body["status"], "running", "nothing follows");
    let told = replica.as_team(Method::POST, &format!("{of_it}/exec"), Some(json!({"cmd": "true"}))).await;
    assert_eq!(told.error(), (503, "host_unavailable"));
    let wanted = json!({"template": "minimal", "memory_mb": 128});
    assert_eq!(replica.as_team(Method::POST, "/v1/sandboxes", Some(wanted)).await.status, 503);
    for verb in ["drain", "undrain"] {
        let refused = replica.as_admin(Method::POST, &format!("/v1/hosts/{host}/{verb}"), None).await;
        assert_eq!(refused.error(), (409, "invalid_state"), "{verb} would undo it");
    }

    for _ in 0..2 {
        let unfenced = replica.as_admin(Method::POST, &format!("/v1/hosts/{host}/unfence"), None).await;
        assert_eq!((unfenced.status.as_u16(), &unfenced.body["status"]), (200, &json!("online")), "{}", unfenced.body);
    }
    assert_eq!(beat("c", 4).await.status, 200);
    let acts = "select action from audit where action like 'host.%fence' order by id";
    assert_eq!(replica.database.sql(acts).await.trim(), "host.fence\nhost.unfence");
    let nobody = format!("/v1/hosts/{}/unfence", HostId(uuid::Uuid::new_v4()));
    assert_eq!(replica.as_admin(Method::POST, &nobody, None).await.error(), (404, "not_found"));
}

/// What a host says of idleness ends what is idle for too long, unless somebody gives a sign of life.
#[tokio::test(flavor = "multi_thread")]
async fn idle_sandboxes_end_by_their_hosts_word_and_not_after_a_ping() {
    let replica = Replica::start().await;
    let host = replica.host(4096).await;
    let (idle, used, never) = (replica.sandbox(host).await, replica.sandbox(host).await, replica.sandbox(host).await);
    let called = replica.sandbox(host).await;
    for sandbox in [&idle, &used, &called] {
        let path = format!("/v1/sandboxes/{sandbox}/timeout");
        let set = json!({"idle_timeout_sec": 60, "on_timeout": "pause"});
        let set = replica.as_team(Method::POST, &path, Some(set)).await;
        assert_eq!((set.status.as_u16(), &set.body["idle_timeout_sec"]), (200, &json!(60)), "{}", set.body);
    }
    let long_ago = "update sandboxes set incarnation = 'i1', last_active_at = now() - interval '1 hour'";
    replica.database.sql(long_ago).await;
    let jwt = replica.token_of_host(host);
    let path = format!("/v1/hosts/{host}/heartbeat");
    let beat = async |sequence: u64, idle_sec: Value| {
        let mut report = heartbeat(sequence, &[idle.as_str(), used.as_str(), never.as_str(), called.as_str()]);
        for sandbox in report["sandboxes"].as_array_mut().unwrap() {
            sandbox["incarnation"] = json!("i1");
            if !idle_sec.is_null() {
                sandbox["idle_sec"] = idle_sec.clone();
            }
        }
        replica.call(Who::Bearer(&jwt), Method::POST, &path, Some(report)).await
    };
    let get = async |id: &str| replica.as_team(Method::GET, &format!("/v1/sandboxes/{id}"), None).await.body;
    let ping = async |id: &str| replica.as_team(Method::POST, &format!("/v1/sandboxes/{id}/ping"), None).await;

    // The host is told of those three, and says nothing of them at first: a newer agent, or an older one.
    let told = beat(1, Value::Null).await.body["idle_timeouts"].clone();
    let named: HashSet<&str> = told.as_array().unwrap().iter().map(|told| told["id"].as_str().unwrap()).collect();
    assert_eq!(named, HashSet::from([idle.as_str(), used.as_str(), called.as_str()]));
    assert_eq!(told[0]["timeout_sec"], 60);
    assert_eq!(get(idle.as_str()).await["idle_since"], Value::Null);
    for wrong in [json!(-1), json!(1.5), json!("60")] {
        assert_eq!(beat(2, wrong).await.error(), (400, "invalid_request"));
    }
    beat(2, json!(40)).await;
    assert!(get(idle.as_str()).await["idle_since"].is_string());
    assert_eq!(get(never.as_str()).await["idle_since"], Value::Null);
    assert_eq!(ping(used.as_str()).await.status, 204);
    assert_eq!(get(used.as_str()).await["idle_since"], Value::Null);
    // A call counts from before it reaches the host, which here it does not.
    assert!(get(called.as_str()).await["idle_since"].is_string());
    let exec = format!("/v1/sandboxes/{called}/exec");
    let refused = replica.as_team(Method::POST, &exec, Some(json!({"cmd": "true"}))).await;
    assert_eq!(refused.error(), (503, "host_unavailable"));
    assert_eq!(get(called.as_str()).await["idle_since"], Value::Null);
    beat(3, json!(u64::MAX)).await;
    let began = tokio::time::Instant::now();
    while get(idle.as_str()).await["status"] != "pausing" {
        assert!(began.elapsed() < Duration::from_secs(9), "it is not paused: {}", get(idle.as_str()).await);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    for id in [used.as_str(), never.as_str(), called.as_str()] {
        assert_eq!(get(id).await["status"], "running");
    }
    assert_eq!(get(idle.as_str()).await["idle_since"], Value::Null);
    assert_eq!(ping(idle.as_str()).await.error(), (409, "invalid_state"));
    assert_eq!(ping("sb0000000000000000000000").await.error(), (404, "not_found"));
    assert_eq!(ping("nonsense").await.status.as_u16() / 100, 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_with_sandboxes_is_removed_only_by_force() {
    let replica = Replica::start().await;
    let host = replica.host(4096).await;
    let sandbox = replica.sandbox(host).await;
    let path = format!("/v1/hosts/{host}");
    let refused = replica.as_admin(Method::DELETE, &path, None).await;
    assert_eq!(refused.error(), (409, "host_has_sandboxes"));
    assert_eq!(refused.body["error"]["details"]["sandbox_ids"], json!([sandbox.as_str()]));
    assert_eq!(replica.as_admin(Method::DELETE, &format!("{path}?force=true"), None).await.status, 204);
    let left = replica.as_team(Method::GET, &format!("/v1/sandboxes/{sandbox}"), None).await;
    assert_eq!(left.body["status"], "stopped", "{}", left.body);
}
