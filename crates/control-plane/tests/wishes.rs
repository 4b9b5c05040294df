//! Creates and kills as wishes: done once for one key, never sold twice, kept while the database is away.

mod replica;

use std::time::Duration;

use control_plane::http::access::{Policy, TABLE};
use control_plane::run;
use model::ids::TeamId;
use replica::{Answer, Replica, Slots, Who, config, path};
use reqwest::Method;
use serde_json::{Value, json};
use testkit::postgres::Database;

impl Replica {
    async fn with_key(&self, path: &str, key: &str, body: Value) -> Answer {
        let request = self.http.post(format!("{}{path}", self.url)).header("Idempotency-Key", key).json(&body);
        let who = if path.starts_with("/v1/hosts") { Who::Bearer(&self.admin) } else { Who::Key(&self.key) };
        self.send(who, request).await
    }

    async fn rows(&self, of: &str) -> i64 {
        self.database.sql(&format!("select count(*) from {of}")).await.trim().parse().unwrap()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_calls_with_one_key_make_one_sandbox() {
    let replica = Replica::start().await;
    replica.host(1 << 20).await;
    let body = json!({"memory_mb": 256});
    let calls = (0..100).map(|_| replica.with_key("/v1/sandboxes?wait_sec=0", "once", body.clone()));
    let answers = futures::future::join_all(calls).await;
    let ids: std::collections::HashSet<&str> = answers.iter().filter_map(|answer| answer.body["id"].as_str()).collect();
    assert_eq!(
        ids.len(),
        1,
        "{:?}",
        answers.iter().map(|answer| answer.body.to_string()).find(|text| text.contains("error"))
    );
    assert!(answers.iter().all(|answer| answer.status == 202), "all of them got it");
    assert_eq!(replica.rows("sandboxes").await, 1);
    let other = replica.with_key("/v1/sandboxes?wait_sec=0", "once", json!({"memory_mb": 512})).await;
    assert_eq!(other.error(), (422, "idempotency_key_reused"));
    // Another team's key of the same name is another key.
    let foreign = replica.foreign_key().await;
    let request = replica
        .http
        .post(format!("{}/v1/sandboxes?wait_sec=0", replica.url))
        .header("Idempotency-Key", "once")
        .json(&body);
    let theirs = replica.send(Who::Key(&foreign), request).await;
    assert!(!ids.contains(theirs.body["id"].as_str().unwrap()));
    for key in ["", &"x".repeat(256)] {
        assert_eq!(replica.with_key("/v1/sandboxes", key, body.clone()).await.error(), (400, "invalid_request"));
    }
    // Secrets that are told once are told again to the call that is repeated.
    for (path, secret, body) in
        [("/v1/api-keys", "key", json!({"name": "k"})), ("/v1/hosts", "registration_token", json!({"type": "regular"}))]
    {
        let (first, again) =
            (replica.with_key(path, "k1", body.clone()).await, replica.with_key(path, "k1", body).await);
        assert_eq!((first.status.as_u16(), again.status.as_u16()), (201, 201), "{path}: {}", again.body);
        assert!(first.body[secret].is_string() && first.body[secret] == again.body[secret], "{path}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn room_for_ten_is_sold_ten_times() {
    let replica = Replica::start().await;
    replica.host(2560).await;
    let calls =
        (0..40).map(|_| replica.as_team(Method::POST, "/v1/sandboxes?wait_sec=0", Some(json!({"memory_mb": 256}))));
    let answers = futures::future::join_all(calls).await;
    let made = answers.iter().filter(|answer| answer.status == 202).count();
    let refused = answers.iter().filter(|answer| answer.code() == "no_hosts_available").count();
    assert_eq!((made, refused), (10, 30));
    assert!(
        answers.iter().filter(|answer| answer.status == 503).all(|answer| answer.headers.contains_key("retry-after"))
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_create_that_reaches_no_host_ends_in_words_and_is_not_sold() {
    let replica = Replica::start().await;
    let missing = replica.as_team(Method::POST, "/v1/sandboxes", Some(json!({}))).await;
    assert_eq!(missing.error(), (503, "no_hosts_available"));
    replica.host(4096).await;
    let unknown = replica.as_team(Method::POST, "/v1/sandboxes", Some(json!({"template": "no-such-template"}))).await;
    assert_eq!(unknown.error(), (404, "not_found"));
    assert!(unknown.body["error"]["message"].as_str().unwrap().contains("no-such-template"));
    let answer = replica.as_team(Method::POST, "/v1/sandboxes?wait_sec=30", Some(json!({}))).await;
    assert_eq!(answer.error(), (503, "host_unavailable"));
    let id = answer.body["error"]["details"]["sandbox_id"].as_str().unwrap().to_owned();
    let shown = replica.as_team(Method::GET, &format!("/v1/sandboxes/{id}"), None).await.body;
    assert_eq!(shown["status"], "error", "{shown}");
    for _ in 0..2 {
        let killed = replica.as_team(Method::DELETE, &format!("/v1/sandboxes/{id}"), None).await;
        assert_eq!(killed.status, 204, "a host that never had it is not waited for: {}", killed.body);
    }
    assert_eq!(
        replica.as_team(Method::DELETE, "/v1/sandboxes/sb0000000000000000000000", None).await.error(),
        (404, "not_found")
    );
}

/// A call of an earlier attempt may have reached the host: no other host may be asked then.
#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_may_have_it_is_not_replaced_by_another() {
    let replica = Replica::start().await;
    let (first, _second) = (replica.host(4096).await, replica.host(4096).await);
    let id = replica.sandbox(first).await;
    replica
        .database
        .sql(&format!(
            "update sandboxes set observed = 'starting' where id = '{id}';
             insert into operations (id, sandbox_id, kind, revision, attempts, deadline)
             values (gen_random_uuid(), '{id}', 'run', 1, 1, now() + interval '2 minutes')"
        ))
        .await;
    wait(|| async { replica.rows("operations where attempts >= 2 and lease_owner is null").await == 1 }).await;
    let host = replica.database.sql(&format!("select host_id from sandboxes where id = '{id}'")).await;
    assert_eq!(host.trim(), first.0.to_string());
}

/// Wishes that lost their operation, by whatever damage, are taken up again.
#[tokio::test(flavor = "multi_thread")]
async fn what_lies_open_without_an_operation_is_taken_up() {
    let replica = Replica::start().await;
    let host = replica.host(4096).await;
    let (starting, killing) = (replica.sandbox(host).await, replica.sandbox(host).await);
    replica
        .database
        .sql(&format!(
            "update sandboxes set observed = 'starting' where id = '{starting}';
             update sandboxes set desired = 'killed' where id = '{killing}'"
        ))
        .await;
    wait(|| async { replica.rows("operations where phase = 'open' and kind = 'kill'").await == 1 }).await;
    wait(|| async { replica.rows("operations where kind = 'run'").await >= 1 }).await;
}

/// A host that does not answer may have paused it: the wish stays open, and the API says what is wished and not what is hoped.
#[tokio::test(flavor = "multi_thread")]
async fn a_pause_waits_for_the_word_of_its_host() {
    let replica = Replica::start().await;
    let host = replica.host(1024).await;
    let id = replica.sandbox(host).await;
    let turn =
        async |verb: &str| replica.as_team(Method::POST, &format!("/v1/sandboxes/{id}/{verb}?wait_sec=1"), None).await;
    for _ in 0..2 {
        let pausing = turn("pause").await;
        assert_eq!((pausing.status.as_u16(), pausing.body["status"].as_str()), (202, Some("pausing")));
    }
    assert_eq!(replica.rows("operations where phase = 'open' and kind = 'pause'").await, 1);
    wait(|| async { replica.rows("sandboxes where reason = 'host_unavailable'").await == 1 }).await;
    // What is paused gives its room to others, and needs it again.
    replica.database.sql("update operations set phase = 'done'; update sandboxes set observed = 'paused'").await;
    assert_eq!(
        (turn("pause").await.status.as_u16(), turn("pause").await.body["status"].as_str()),
        (200, Some("paused"))
    );
    let body = Some(json!({"memory_mb": 1024}));
    assert_eq!(replica.as_team(Method::POST, "/v1/sandboxes?wait_sec=0", body).await.status, 202);
    assert_eq!(turn("resume").await.error(), (503, "no_hosts_available"));
    let shown = replica.as_team(Method::GET, &format!("/v1/sandboxes/{id}"), None).await;
    assert_eq!(shown.body["status"], "paused", "nothing was written");
    replica.database.sql("update sandboxes set observed = 'killed' where memory_mib = 1024").await;
    let resuming = turn("resume").await;
    assert_eq!((resuming.status.as_u16(), resuming.body["status"].as_str()), (202, Some("resuming")));
    // A kill ends the wait.
    let killed = replica.as_team(Method::DELETE, &format!("/v1/sandboxes/{id}?wait_sec=0"), None).await;
    assert_eq!(killed.status, 202);
    let open = format!("operations where phase = 'open' and kind <> 'kill' and sandbox_id = '{id}'");
    assert_eq!(replica.rows(&open).await, 0);
    for verb in ["pause", "resume"] {
        assert_eq!(turn(verb).await.error(), (409, "invalid_state"), "{verb}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_its_database_the_platform_says_so_and_comes_back() {
    let replica = Replica::on(Database::on_own_server().await).await;
    let host = replica.host(4096).await;
    let sandbox = replica.sandbox(host).await;
    let slots = Slots { team: TeamId(uuid::Uuid::nil()), host: host.to_string(), sandbox: sandbox.to_string() };
    replica.database.stop_server().await;
    for (method, route, policy) in TABLE {
        let is_asked = !matches!(policy, Policy::Open | Policy::Host) || route == "/health";
        if !is_asked || route.ends_with("/stream") || route.ends_with("/pty") {
            continue;
        }
        let path = path(route, &slots);
        let who = if matches!(policy, Policy::Team(_)) { Who::Key(&replica.key) } else { Who::Bearer(&replica.admin) };
        let answer = replica.call(who, method.parse().unwrap(), &path, Some(json!({"cmd": "true"}))).await;
        assert_eq!(answer.error(), (503, "unavailable"), "{method} {route}");
        assert!(answer.headers.contains_key("retry-after"), "{method} {route}");
    }
    replica.database.start_server().await;
    wait(|| async { replica.as_team(Method::GET, "/v1/sandboxes", None).await.status == 200 }).await;
    let shown = replica.as_team(Method::GET, &format!("/v1/sandboxes/{sandbox}"), None).await;
    assert_eq!(shown.body["status"], "running", "nothing was lost");
}

/// Two replicas that start on one empty database are one platform.
#[tokio::test(flavor = "multi_thread")]
async fn replicas_share_one_truth() {
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let database = Database::new().await;
    let dir = tempfile::tempdir().unwrap();
    let config = config(&database.url, dir.path());
    let (one, two) = tokio::join!(run::start(&config), run::start(&config));
    let (one, two) = (one.unwrap(), two.unwrap());
    assert_eq!(database.sql("select count(*) from users").await.trim(), "1", "one administrator");
    assert_eq!(one.app.authority.certificate_pem, two.app.authority.certificate_pem, "one authority");
    one.stop().await;
    assert!(two.app.store.ping().await.is_ok());
    two.stop().await;
    // Another secret cannot open what the first one has sealed, and says so instead of making new things.
    let other = tempfile::tempdir().unwrap();
    let refused = run::start(&self::config(&database.url, other.path())).await;
    assert!(refused.err().unwrap().to_string().contains("secret"));
}

async fn wait<F: Future<Output = bool>>(mut condition: impl FnMut() -> F) {
    let began = std::time::Instant::now();
    while !condition().await {
        assert!(began.elapsed() < Duration::from_secs(30), "waited in vain");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
