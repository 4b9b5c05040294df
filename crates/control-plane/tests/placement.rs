//! Where sandboxes go, how much a team may have, hosts that are emptied and removed, and what follows from silence: nothing.

mod replica;

use std::collections::HashMap;
use std::time::{Duration, Instant};

use control_plane::capacity::Capacity;
use futures::future::join_all;
use model::ids::{HostId, TeamId};
use replica::{Answer, Replica, Who};
use reqwest::Method;
use serde_json::{Value, json};
use testkit::postgres::Database;

impl Replica {
    async fn create(&self, body: Value) -> Answer {
        self.as_team(Method::POST, "/v1/sandboxes?wait_sec=0", Some(body)).await
    }

    /// How many sandboxes are on each host.
    async fn spread(&self) -> HashMap<String, i64> {
        let hosts = self.as_admin(Method::GET, "/v1/hosts", None).await.body;
        let hosts = hosts.as_array().unwrap().iter();
        hosts.map(|host| (host["id"].as_str().unwrap().to_owned(), host["held"]["running"].as_i64().unwrap())).collect()
    }

    async fn own_team(&self) -> String {
        let id = self.database.sql("select team_id from api_keys order by created_at limit 1").await;
        TeamId(id.trim().parse().unwrap()).to_string()
    }

    async fn set_quotas(&self, quotas: Value) {
        let path = format!("/v1/teams/{}/quotas", self.own_team().await);
        let set = self.as_admin(Method::PUT, &path, Some(quotas)).await;
        assert_eq!(set.status, 200, "{}", set.body);
    }

    /// Hosts from which the last word came so long ago.
    async fn silent_since(&self, hosts: &[HostId], seconds: u32) {
        for host in hosts {
            let ago = format!("now() - interval '{seconds} seconds'");
            self.database.sql(&format!("update hosts set last_heartbeat_at = {ago} where id = '{}'", host.0)).await;
        }
    }

    async fn is_braked(&self) -> bool {
        self.as_admin(Method::GET, "/v1/hosts/silence", None).await.body["brake_since"].is_string()
    }
}

async fn until<F: Future<Output = bool>>(what: &str, mut condition: impl FnMut() -> F) {
    let began = Instant::now();
    while !condition().await {
        assert!(began.elapsed() < Duration::from_secs(30), "waited in vain: {what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn sandboxes_are_spread_or_packed_as_the_platform_or_the_create_says() {
    for (word, expected) in [("spread", [3, 3]), ("pack", [0, 6])] {
        let capacity = Capacity { placement: Some(word.to_owned()), ..Capacity::default() };
        let replica = Replica::with(Database::new().await, capacity).await;
        for _ in 0..2 {
            replica.host(4096).await;
        }
        for _ in 0..6 {
            assert_eq!(replica.create(json!({"memory_mb": 512})).await.status, 202);
        }
        let mut found: Vec<i64> = replica.spread().await.into_values().collect();
        found.sort_unstable();
        assert_eq!(found, expected, "{word}");
    }
    let replica = Replica::start().await;
    for memory_mb in [2048, 4096] {
        replica.host(memory_mb).await;
    }
    for _ in 0..3 {
        assert_eq!(replica.create(json!({"memory_mb": 512, "placement": "pack"})).await.status, 202);
    }
    let mut found: Vec<i64> = replica.spread().await.into_values().collect();
    found.sort_unstable();
    assert_eq!(found, [0, 3], "a create says otherwise");
    for wrong in [json!("random"), json!(""), json!(1), json!("Pack")] {
        let answer = replica.create(json!({"placement": wrong})).await;
        assert_eq!(answer.error(), (400, "invalid_request"), "{wrong}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_create_goes_to_a_host_with_its_tags() {
    let replica = Replica::start().await;
    let (plain, fast) = (replica.host(4096).await, replica.host(1024).await);
    let tags = format!("/v1/hosts/{fast}/tags");
    for tag in ["gpu", "zone=a", "gpu"] {
        assert_eq!(replica.as_admin(Method::POST, &tags, Some(json!({"tag": tag}))).await.status, 204);
    }
    assert_eq!(replica.as_admin(Method::GET, &tags, None).await.body, json!(["gpu", "zone=a"]));
    let made = replica.create(json!({"memory_mb": 512, "tags": ["zone=a", "gpu"]})).await;
    assert_eq!((made.status.as_u16(), &made.body["host_id"]), (202, &json!(fast.to_string())), "{}", made.body);
    assert_eq!(made.body["tags"], json!(["gpu", "zone=a"]));
    // There is room elsewhere, which is not what was asked for.
    let full = replica.create(json!({"memory_mb": 1024, "tags": ["gpu"]})).await;
    assert_eq!(full.error(), (503, "no_hosts_available"));
    assert_eq!(full.body["error"]["details"]["short"], json!(["memory"]));
    let nobody = replica.create(json!({"tags": ["zone=b"]})).await;
    assert_eq!(
        (nobody.error(), &nobody.body["error"]["details"]["short"]),
        ((503, "no_hosts_available"), &json!(["tags"]))
    );
    assert!(nobody.headers.contains_key("retry-after"));

    assert_eq!(replica.as_admin(Method::DELETE, &format!("{tags}/zone=a"), None).await.status, 204);
    assert_eq!(replica.as_admin(Method::DELETE, &format!("{tags}/zone=a"), None).await.status, 204, "twice is fine");
    assert_eq!(
        replica.create(json!({"memory_mb": 128, "tags": ["zone=a"]})).await.error(),
        (503, "no_hosts_available")
    );
    let shown = replica.as_admin(Method::GET, &format!("/v1/hosts/{fast}"), None).await;
    assert_eq!((&shown.body["tags"], &shown.body["held"]["running"]), (&json!(["gpu"]), &json!(1)));

    // Set when it is added.
    let added = replica.as_admin(Method::POST, "/v1/hosts", Some(json!({"type": "regular", "tags": ["b", "a", "b"]})));
    assert_eq!(added.await.body["host"]["tags"], json!(["a", "b"]));
    let long = "x".repeat(64);
    for wrong in ["", "A", "a b", "=", "a=", "a=b=c", "a,b", "-a", "\u{e9}", &long] {
        let tagged = replica.as_admin(Method::POST, &tags, Some(json!({"tag": wrong}))).await;
        assert_eq!(tagged.error(), (400, "invalid_request"), "{wrong:?}");
        assert_eq!(tagged.body["error"]["details"]["field"], "tag");
        assert_eq!(replica.create(json!({"tags": [wrong]})).await.error(), (400, "invalid_request"), "{wrong:?}");
    }
    for wrong in [json!("gpu"), json!([1]), json!({"gpu": true}), json!(vec!["a"; 33])] {
        assert_eq!(replica.create(json!({"tags": wrong})).await.error(), (400, "invalid_request"), "{wrong}");
    }
    for number in 1..32 {
        let body = json!({"tag": format!("t{number}")});
        assert_eq!(replica.as_admin(Method::POST, &tags, Some(body)).await.status, 204);
    }
    assert_eq!(
        replica.as_admin(Method::POST, &tags, Some(json!({"tag": "many"}))).await.error(),
        (400, "invalid_request")
    );
    let nowhere = format!("/v1/hosts/{}/tags", HostId(uuid::Uuid::nil()));
    assert_eq!(replica.as_admin(Method::GET, &nowhere, None).await.error(), (404, "not_found"));
    assert_eq!(replica.as_admin(Method::POST, &nowhere, Some(json!({"tag": "a"}))).await.error(), (404, "not_found"));
    assert_eq!(replica.as_admin(Method::DELETE, &format!("{nowhere}/a"), None).await.error(), (404, "not_found"));
    let _ = plain;
}

/// The factors are settings; what is short is said, and nothing of whose it is.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_sold_is_a_setting_and_what_is_short_is_said() {
    let capacity = Capacity {
        vcpus_per_core: Some(1),
        memory_percent: Some(200),
        disk_overcommit: Some(1),
        ..Capacity::default()
    };
    let replica = Replica::with(Database::new().await, capacity).await;
    let host = replica.host(1024).await;
    replica.database.sql("update hosts set cpu_cores = 4").await;
    let short = async |body: Value| {
        let answer = replica.create(body).await;
        assert_eq!(answer.error(), (503, "no_hosts_available"), "{}", answer.body);
        answer.body["error"]["details"]["short"].clone()
    };
    assert_eq!(short(json!({"vcpus": 5})).await, json!(["cpu"]));
    assert_eq!(short(json!({"memory_mb": 2050})).await, json!(["memory"]));
    assert_eq!(short(json!({"disk_size_mb": 102_400})).await, json!(["disk"]));
    assert_eq!(short(json!({"vcpus": 5, "memory_mb": 4096})).await, json!(["cpu", "memory"]));
    assert_eq!(replica.create(json!({"vcpus": 4, "memory_mb": 2048})).await.status, 202);
    assert_eq!(short(json!({"memory_mb": 128})).await, json!(["cpu", "memory"]));
    // What agents say of their pools.
    replica
        .database
        .sql("update sandboxes set observed = 'killed', desired = 'killed'; update hosts set disk_free_mb = 1023")
        .await;
    assert_eq!(short(json!({})).await, json!(["disk"]));
    replica.database.sql("update hosts set disk_free_mb = 50000").await;
    replica.silent_since(&[host], 91).await;
    assert_eq!(short(json!({})).await, json!(["hosts"]));
}

/// The pool of the host that is nearly full is asked last, although it is the emptiest by what is reserved.
#[tokio::test(flavor = "multi_thread")]
async fn room_in_the_pool_as_heartbeats_have_it_comes_first() {
    let replica = Replica::start().await;
    let (roomy, crowded) = (replica.host(4096).await, replica.host(65_536).await);
    replica.database.sql(&format!("update hosts set disk_free_mb = 1500 where id = '{}'", crowded.0)).await;
    for _ in 0..3 {
        let made = replica.create(json!({"memory_mb": 1024})).await;
        assert_eq!(made.body["host_id"], json!(roomy.to_string()), "{}", made.body);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn sixteen_creates_at_once_never_exceed_a_quota() {
    let replica = Replica::start().await;
    let (other, other_url) = replica.another().await;
    replica.host(1 << 20).await;
    let create = async |url: &str, body: Value| {
        let request = replica.http.post(format!("{url}/v1/sandboxes?wait_sec=0")).json(&body);
        replica.send(Who::Key(&replica.key), request).await
    };
    let quotas = [
        (json!({"sandboxes": 5}), "sandboxes", "quota_exceeded"),
        (json!({"running": 5}), "running", "quota_exceeded"),
        (json!({"vcpus": 11}), "vcpus", "quota_exceeded"),
        (json!({"memory_mb": 1500}), "memory_mb", "quota_exceeded"),
        (json!({"disk_mb": 10_300}), "disk_mb", "quota_exceeded"),
        (json!({"creates_per_min": 5}), "creates_per_min", "rate_limited"),
    ];
    for (limits, name, code) in quotas {
        replica.set_quotas(limits).await;
        let body = json!({"vcpus": 2, "memory_mb": 256, "disk_size_mb": 2048});
        let calls = (0..16).map(|n| create(if n % 2 == 0 { &replica.url } else { &other_url }, body.clone()));
        let answers = join_all(calls).await;
        let made = answers.iter().filter(|answer| answer.status == 202).count();
        assert_eq!(made, 5, "{name}");
        for refused in answers.iter().filter(|answer| answer.status != 202) {
            assert_eq!(refused.error(), (429, code), "{name}");
            let details = &refused.body["error"]["details"];
            assert_eq!(details["quota"], name);
            let number = |field: &str| details[field].as_i64().unwrap();
            assert!(number("used") + number("asked") > number("limit") && number("asked") > 0, "{details}");
            assert_eq!(refused.headers.contains_key("retry-after"), code == "rate_limited", "{name}");
        }
        // What has ended is free again; a minute is not over by that.
        replica
            .database
            .sql("update operations set phase = 'superseded'; update sandboxes set observed = 'killed', desired = 'killed'")
            .await;
        let again = create(&replica.url, body).await;
        assert_eq!(again.status.as_u16(), if name == "creates_per_min" { 429 } else { 202 }, "{name}: {}", again.body);
        replica.database.sql("delete from sandboxes").await;
    }
    other.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn forks_and_resumes_count_and_quotas_are_shown() {
    let replica = Replica::start().await;
    let host = replica.host(1 << 20).await;
    let (one, two) = (replica.sandbox(host).await, replica.sandbox(host).await);
    replica
        .database
        .sql(&format!("update sandboxes set desired = 'paused', observed = 'paused' where id = '{two}'"))
        .await;
    replica.set_quotas(json!({"sandboxes": 4, "running": 1, "disk_mb": 1i64 << 40})).await;
    let resume = format!("/v1/sandboxes/{two}/resume?wait_sec=0");
    let refused = replica.as_team(Method::POST, &resume, None).await;
    assert_eq!(
        (refused.error(), &refused.body["error"]["details"]["quota"]),
        ((429, "quota_exceeded"), &json!("running"))
    );
    let shown = replica.as_team(Method::GET, &format!("/v1/sandboxes/{two}"), None).await;
    assert_eq!(shown.body["status"], "paused", "nothing was written");
    let fork = format!("/v1/sandboxes/{one}/fork?wait_sec=0");
    assert_eq!(replica.as_team(Method::POST, &fork, Some(json!({"count": 1}))).await.error(), (429, "quota_exceeded"));
    replica.set_quotas(json!({"sandboxes": 4, "running": 9})).await;
    let refused = replica.as_team(Method::POST, &fork, Some(json!({"count": 3}))).await;
    assert_eq!((refused.error(), &refused.body["error"]["details"]["asked"]), ((429, "quota_exceeded"), &json!(3)));
    assert_eq!(replica.as_team(Method::POST, &fork, Some(json!({"count": 2}))).await.status, 202);
    assert_eq!(replica.as_team(Method::POST, &resume, None).await.status, 202);

    let shown = replica.as_team(Method::GET, "/v1/teams/self/quotas", None).await.body;
    let of =
        |name: &str| shown["quotas"].as_array().unwrap().iter().find(|quota| quota["name"] == name).unwrap().clone();
    assert_eq!(of("sandboxes"), json!({"name": "sandboxes", "limit": 4, "used": 4, "is_own": true}));
    assert_eq!(of("running"), json!({"name": "running", "limit": 9, "used": 4, "is_own": true}));
    assert_eq!(of("memory_mb"), json!({"name": "memory_mb", "used": 2048, "is_own": false}));
    let team = replica.own_team().await;
    assert_eq!(shown["team_id"], json!(team));
    assert_eq!(replica.as_admin(Method::GET, &format!("/v1/teams/{team}/quotas"), None).await.body, shown);
    // Another team has its own, and sees no other.
    let foreign = replica.foreign_key().await;
    let theirs = replica.call(Who::Key(&foreign), Method::GET, "/v1/teams/self/quotas", None).await.body;
    assert!(theirs["quotas"].as_array().unwrap().iter().all(|quota| quota["used"] == 0), "{theirs}");
    let path = format!("/v1/teams/{team}/quotas");
    for wrong in [
        json!({"sandboxes": -1}),
        json!({"vcpus": 1.5}),
        json!({"running": "2"}),
        json!({"disk_mb": (1i64 << 40) + 1}),
        json!([]),
    ] {
        assert_eq!(
            replica.as_admin(Method::PUT, &path, Some(wrong.clone())).await.error(),
            (400, "invalid_request"),
            "{wrong}"
        );
    }
    let nobody = format!("/v1/teams/{}/quotas", Replica::no_team());
    for method in [Method::GET, Method::PUT] {
        assert_eq!(replica.as_admin(method, &nobody, Some(json!({}))).await.error(), (404, "not_found"));
    }
    assert_eq!(
        replica.as_admin(Method::GET, "/v1/teams/nonsense/quotas", None).await.error(),
        (400, "invalid_request")
    );
}

/// The platform's defaults hold for teams that have no limits of their own.
#[tokio::test(flavor = "multi_thread")]
async fn a_default_quota_holds_until_a_team_has_its_own() {
    let capacity = Capacity { quota_sandboxes: Some(1), ..Capacity::default() };
    let replica = Replica::with(Database::new().await, capacity).await;
    replica.host(1 << 20).await;
    assert_eq!(replica.create(json!({})).await.status, 202);
    assert_eq!(replica.create(json!({})).await.error(), (429, "quota_exceeded"));
    replica.set_quotas(json!({"sandboxes": 2})).await;
    assert_eq!(replica.create(json!({})).await.status, 202);
    replica.set_quotas(json!({})).await;
    assert_eq!(replica.create(json!({})).await.error(), (429, "quota_exceeded"));
    // Zero is a limit, too.
    replica.set_quotas(json!({"sandboxes": 0})).await;
    replica.database.sql("update sandboxes set observed = 'killed', desired = 'killed'").await;
    assert_eq!(replica.create(json!({})).await.error(), (429, "quota_exceeded"));
    let audited = replica.database.sql("select count(*) from audit where action = 'team.quotas'").await;
    assert_eq!(audited.trim(), "3");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_draining_host_takes_nothing_new_and_keeps_what_it_has() {
    let replica = Replica::start().await;
    let host = replica.host(4096).await;
    let (runs, pauses) = (replica.sandbox(host).await, replica.sandbox(host).await);
    replica
        .database
        .sql(&format!("update sandboxes set desired = 'paused', observed = 'paused' where id = '{pauses}'"))
        .await;
    let turn = async |verb: &str| replica.as_admin(Method::POST, &format!("/v1/hosts/{host}/{verb}"), None).await;
    for _ in 0..2 {
        let draining = turn("drain").await;
        assert_eq!((draining.status.as_u16(), &draining.body["status"]), (200, &json!("draining")));
        let held = &draining.body["held"];
        assert_eq!((&held["running"], &held["paused"], &held["memory_mb"]), (&json!(1), &json!(1), &json!(512)));
    }
    let refused = replica.create(json!({})).await;
    assert_eq!(refused.error(), (503, "no_hosts_available"));
    assert_eq!(refused.body["error"]["details"]["short"], json!(["hosts"]));
    let fork = format!("/v1/sandboxes/{runs}/fork?wait_sec=0");
    assert_eq!(replica.as_team(Method::POST, &fork, None).await.error(), (503, "no_hosts_available"));
    let shown = replica.as_team(Method::GET, &format!("/v1/sandboxes/{runs}"), None).await;
    assert_eq!(shown.body["status"], "running");
    let resumed = replica.as_team(Method::POST, &format!("/v1/sandboxes/{pauses}/resume?wait_sec=0"), None).await;
    assert_eq!(resumed.status, 202, "what is paused there runs again there");
    // Silent and draining: both are said.
    replica.silent_since(&[host], 100).await;
    let shown = replica.as_admin(Method::GET, &format!("/v1/hosts/{host}"), None).await.body;
    assert_eq!((&shown["status"], &shown["is_draining"]), (&json!("unreachable"), &json!(true)));
    replica.silent_since(&[host], 0).await;
    for _ in 0..2 {
        assert_eq!(turn("undrain").await.body["status"], json!("online"));
    }
    assert_eq!(replica.create(json!({})).await.status, 202);
    let audited =
        replica.database.sql("select count(*) from audit where action in ('host.drain', 'host.undrain')").await;
    assert_eq!(audited.trim(), "2", "what changes nothing is no record");
    let pending = replica.as_admin(Method::POST, "/v1/hosts", Some(json!({"type": "regular"}))).await;
    let pending = pending.body["host"]["id"].as_str().unwrap().to_owned();
    let answer = replica.as_admin(Method::POST, &format!("/v1/hosts/{pending}/drain"), None).await;
    assert_eq!(answer.error(), (409, "invalid_state"));
    let nowhere = HostId(uuid::Uuid::nil());
    let answer = replica.as_admin(Method::POST, &format!("/v1/hosts/{nowhere}/drain"), None).await;
    assert_eq!(answer.error(), (404, "not_found"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_preview_says_what_a_removal_would_lose() {
    let replica = Replica::start().await;
    let host = replica.host(4096).await;
    let (runs, pauses) = (replica.sandbox(host).await, replica.sandbox(host).await);
    replica
        .database
        .sql(&format!(
            "update sandboxes set desired = 'paused', observed = 'paused' where id = '{pauses}';
             update hosts set unclaimed = '{{sb0000000000000000000000}}';
             insert into snapshots (id, team_id, name, sandbox_id, host_id, template, vcpus, memory_mib, disk_mib, default_user, state)
             select gen_random_uuid(), team_id, 'kept', '{runs}', '{}', 'minimal', 1, 512, 5120, '', 'ready' from api_keys order by created_at limit 1",
            host.0
        ))
        .await;
    let path = format!("/v1/hosts/{host}/delete-preview");
    let preview = replica.as_admin(Method::GET, &path, None).await.body;
    assert_eq!(preview["sandbox_ids"], json!([runs.as_str(), pauses.as_str()]));
    assert_eq!(preview["sandboxes"][0], json!({"id": runs.as_str(), "status": "running"}));
    assert_eq!(preview["sandboxes"][1], json!({"id": pauses.as_str(), "status": "paused"}));
    assert_eq!(preview["snapshots"], json!(["kept"]));
    assert_eq!(preview["unclaimed"], json!(["sb0000000000000000000000"]));
    assert_eq!(preview["host"]["held"]["snapshots"], 1);
    let delete = async |query: &str| replica.as_admin(Method::DELETE, &format!("/v1/hosts/{host}{query}"), None).await;
    assert_eq!(delete("").await.error(), (409, "host_has_sandboxes"));
    assert_eq!(delete("?force=false").await.error(), (409, "host_has_sandboxes"));
    assert_eq!(delete("?force=perhaps").await.error(), (400, "invalid_request"));
    assert_eq!(replica.as_admin(Method::GET, &path, None).await.body, preview, "a refusal changes nothing");
    assert_eq!(delete("?force=true").await.status, 204);
    for sandbox in [runs, pauses] {
        let shown = replica.as_team(Method::GET, &format!("/v1/sandboxes/{sandbox}"), None).await.body;
        assert_eq!((&shown["status"], &shown["reason"]), (&json!("stopped"), &json!("host_removed")));
    }
    assert_eq!(replica.as_admin(Method::GET, &path, None).await.error(), (404, "not_found"));
    assert_eq!(replica.as_team(Method::GET, "/v1/snapshots", None).await.body, json!([]));
}

/// Three of five hosts fall silent together: one alarm, and nothing becomes of it, however long it lasts.
#[tokio::test(flavor = "multi_thread")]
async fn silence_of_most_hosts_changes_nothing_but_words() {
    let capacity = Capacity { silence_grace_sec: Some(0), ..Capacity::default() };
    let replica = Replica::with(Database::new().await, capacity).await;
    let (other, _) = replica.another().await;
    let mut hosts = Vec::new();
    for _ in 0..5 {
        hosts.push(replica.host(4096).await);
    }
    let mut sandboxes = Vec::new();
    for host in &hosts {
        sandboxes.push(replica.sandbox(*host).await);
    }
    let before =
        replica.database.sql("select id, desired, revision, observed, host_id from sandboxes order by id").await;
    replica.silent_since(&hosts[..3], 100).await;
    until("the brake", || replica.is_braked()).await;
    // Something that else would be looked into at once, and an idle one that else would end.
    replica
        .database
        .sql(&format!(
            "update sandboxes set absent_since = now() - interval '1 hour';
             update hosts set idle_reported_at = now();
             update sandboxes set idle_timeout_sec = 60, idle_since = now() - interval '1 day' where id = '{}'",
            sandboxes[4]
        ))
        .await;
    replica.silent_since(&hosts[..3], 86_400).await;
    tokio::time::sleep(Duration::from_secs(6)).await;
    let after =
        replica.database.sql("select id, desired, revision, observed, host_id from sandboxes order by id").await;
    assert_eq!(after, before);
    assert!(replica.is_braked().await, "it stays while they are silent, however long ago it began");
    let shown = replica.as_team(Method::GET, &format!("/v1/sandboxes/{}", sandboxes[0]), None).await.body;
    assert_eq!((&shown["status"], &shown["reason"]), (&json!("running"), &json!("host_silent")));
    let silence = replica.as_admin(Method::GET, "/v1/hosts/silence", None).await.body;
    assert_eq!((&silence["hosts"], &silence["silent"]), (&json!(5), &json!(3)));
    let alarms = "select count(*) from audit where action = 'silence_brake.on'";
    assert_eq!(replica.database.sql(alarms).await.trim(), "1", "of two replicas");
    // New ones go to those that are heard.
    let made = replica.create(json!({})).await.body;
    assert!(hosts[3..].iter().any(|host| made["host_id"] == json!(host.to_string())), "{made}");
    replica.silent_since(&hosts[..1], 0).await;
    until("the release", async || !replica.is_braked().await).await;
    // What was said before is too old by now.
    replica.database.sql("update hosts set idle_reported_at = now()").await;
    until("the end of the idle one", async || {
        let shown = replica.as_team(Method::GET, &format!("/v1/sandboxes/{}", sandboxes[4]), None).await.body;
        shown["status"] != "running"
    })
    .await;
    other.stop().await;
}

/// Few hosts, or hosts one after the other: what is known of each by its own word is enough.
#[tokio::test(flavor = "multi_thread")]
async fn a_few_silent_hosts_are_no_alarm_and_lose_nothing() {
    let capacity = Capacity { silence_grace_sec: Some(0), ..Capacity::default() };
    let replica = Replica::with(Database::new().await, capacity).await;
    let mut hosts = Vec::new();
    for _ in 0..4 {
        hosts.push(replica.host(4096).await);
    }
    let sandbox = replica.sandbox(hosts[0]).await;
    replica.silent_since(&hosts[..2], 100).await;
    replica.silent_since(&hosts[2..3], 10_000).await;
    tokio::time::sleep(Duration::from_secs(7)).await;
    assert!(!replica.is_braked().await, "two fell silent together, and one long before");
    let shown = replica.as_team(Method::GET, &format!("/v1/sandboxes/{sandbox}"), None).await.body;
    assert_eq!((&shown["status"], &shown["reason"]), (&json!("running"), &json!("host_silent")));
}

/// What hosts say against what is wished.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_paused_is_never_given_up_for_want_of_a_word() {
    let replica = Replica::start().await;
    let host = replica.host(4096).await;
    let id = replica.sandbox(host).await;
    replica.database.sql("update sandboxes set desired = 'paused', observed = 'paused', revision = 2").await;
    let jwt = replica.token_of_host(host);
    let beat = async |sequence: u64, sandboxes: Value| {
        let body = json!({"epoch": 1, "sequence": sequence, "agent_run": "a", "memory_free_mb": 1000, "disk_free_mb": 10_000,
            "complete": true, "sandboxes": sandboxes, "facts": {"arch": "x86_64", "cpu_cores": 2, "memory_mb": 4096,
            "disk_gb": 20, "isolation": "fake", "agent_version": "0.1.0", "templates": ["minimal"]}});
        let answer =
            replica.call(Who::Bearer(&jwt), Method::POST, &format!("/v1/hosts/{host}/heartbeat"), Some(body)).await;
        assert_eq!(answer.status, 200, "{}", answer.body);
    };
    let state = async || replica.database.sql("select observed from sandboxes").await.trim().to_owned();
    // Not named, and the host cannot be asked: it stays.
    beat(1, json!([])).await;
    tokio::time::sleep(Duration::from_secs(4)).await;
    assert_eq!(state().await, "paused");
    // As if the host had said so of this one.
    let gone = replica.serving.app.store.sandbox_is_gone(&id, 2, "the host no longer has it").await.unwrap();
    assert_eq!(gone, store::Update::Changed);
    let shown = replica.as_team(Method::GET, &format!("/v1/sandboxes/{id}"), None).await.body;
    assert_eq!(shown["status"], "missing", "the row stays");
    beat(2, json!([{"id": id.as_str(), "observed": "paused", "revision": 2}])).await;
    assert_eq!(state().await, "paused", "it was found again");
    // It runs although it is to be paused: it is told again.
    beat(3, json!([{"id": id.as_str(), "observed": "running", "revision": 2}])).await;
    assert_eq!(state().await, "pausing");
    let open = replica.database.sql("select count(*) from operations where kind = 'pause' and phase = 'open'").await;
    assert_eq!(open.trim(), "1");
    // Of an older wish it says nothing.
    replica.database.sql("update operations set phase = 'done'; update sandboxes set observed = 'paused'").await;
    beat(4, json!([{"id": id.as_str(), "observed": "running", "revision": 1}])).await;
    assert_eq!(state().await, "paused");
}

/// Three hosts are asked for one sandbox, and no more.
#[tokio::test(flavor = "multi_thread")]
async fn after_three_hosts_it_is_given_up() {
    let replica = Replica::start().await;
    for _ in 0..5 {
        replica.host(4096).await;
    }
    let answer = replica.as_team(Method::POST, "/v1/sandboxes?wait_sec=60", Some(json!({}))).await;
    assert_eq!(answer.error(), (503, "host_unavailable"));
    let refused =
        replica.database.sql("select array_length(refused_hosts, 1) from operations where kind = 'run'").await;
    assert_eq!(refused.trim(), "3");
}
