//! Lists by what is asked of them, page by page; and labels that change.

use model::ids::SandboxId;
use reqwest::Method;
use serde_json::{Value, json};

use crate::replica::{Replica, Who};

fn ids(body: &Value) -> Vec<String> {
    body.as_array().unwrap_or_else(|| panic!("{body}")).iter().map(|it| it["id"].as_str().unwrap().to_owned()).collect()
}

impl Replica {
    async fn label(&self, id: &SandboxId, sets: &str) {
        self.database.sql(&format!("update sandboxes set {sets} where id = '{id}'")).await;
    }

    async fn listed(&self, query: &str) -> Vec<String> {
        let answer = self.as_team(Method::GET, &format!("/v1/sandboxes?{query}"), None).await;
        assert_eq!(answer.status, 200, "{query}: {}", answer.body);
        ids(&answer.body)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_list_has_what_is_asked_for_and_its_pages_go_on_with_it() {
    let replica = Replica::start().await;
    let host = replica.host(1 << 20).await;
    let mut made = Vec::new();
    for number in 0..9 {
        let id = replica.sandbox(host).await;
        let labels =
            json!({"env": if number % 3 == 0 { "prod" } else { "test" }, "n": number.to_string(), "%_'": "\\ \"ü"});
        replica.label(&id, &format!("metadata = $m${labels}$m$, created_at = now() - interval '{number} hours'")).await;
        made.push(id);
    }
    replica.label(&made[1], "desired = 'paused', observed = 'paused'").await;
    replica.label(&made[2], "observed = 'failed'").await;
    replica.label(&made[3], "template = 'other'").await;
    let named = |numbers: &[usize]| numbers.iter().map(|n| made[*n].to_string()).collect::<Vec<_>>();
    for (query, expected) in [
        ("status=paused", named(&[1])),
        ("status=paused,error", named(&[1, 2])),
        ("status=error&status=paused", named(&[1, 2])),
        ("status=resuming", named(&[])),
        ("template=other", named(&[3])),
        ("template=%25", named(&[])),
        ("metadata.env=prod", named(&[0, 3, 6])),
        ("metadata.env=prod&metadata.n=3", named(&[3])),
        ("metadata.env=prod&metadata.n=4", named(&[])),
        ("metadata.env=pro%25", named(&[])),
        ("metadata.%25_%27=%5C%20%22%C3%BC&metadata.n=8", named(&[8])),
        ("metadata.env=prod&status=running&template=minimal", named(&[0, 6])),
    ] {
        assert_eq!(replica.listed(query).await, expected, "{query}");
    }
    let instant =
        (chrono::Utc::now() - chrono::TimeDelta::minutes(150)).to_rfc3339_opts(chrono::SecondsFormat::Secs, true);
    assert_eq!(replica.listed(&format!("created_after={instant}")).await, named(&[0, 1, 2]));
    assert_eq!(replica.listed(&format!("created_before={instant}&limit=2")).await, named(&[3, 4]));
    for limit in [1, 2, 5, 6, 7] {
        let mut found = Vec::new();
        let mut next = format!("?limit={limit}&metadata.env=test&status=running,paused,error");
        loop {
            let page = replica.as_team(Method::GET, &format!("/v1/capsules{next}"), None).await;
            found.extend(ids(&page.body));
            let Some(link) = page.headers.get("link") else { break };
            let link = link.to_str().unwrap();
            next = link.strip_prefix('<').and_then(|rest| rest.strip_suffix(">; rel=\"next\"")).unwrap().to_owned();
            assert!(next.contains("cursor=") && next.contains("metadata.env=test"), "{next}");
        }
        assert_eq!(found, named(&[1, 2, 4, 5, 7, 8]), "{limit}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cursor_is_good_for_its_own_list_alone() {
    let replica = Replica::start().await;
    let host = replica.host(1 << 20).await;
    for _ in 0..3 {
        replica.sandbox(host).await;
    }
    let page = replica.as_team(Method::GET, "/v1/sandboxes?limit=1", None).await;
    let link = page.headers["link"].to_str().unwrap().to_owned();
    let cursor = link.split("cursor=").nth(1).unwrap().split(['&', '>']).next().unwrap();
    assert_eq!(replica.listed(&format!("cursor={cursor}")).await.len(), 2, "the limit is free");
    let foreign = replica.foreign_key().await;
    let path = format!("/v1/sandboxes?cursor={cursor}");
    let theirs = replica.call(Who::Key(&foreign), Method::GET, &path, None).await;
    let mut answers = vec![("foreign".to_owned(), theirs)];
    let forged = format!("{}{}", if cursor.starts_with('A') { "B" } else { "A" }, &cursor[1..]);
    for query in [
        format!("cursor={forged}"),
        format!("cursor={cursor}&status=running"),
        format!("cursor={cursor}&template=minimal"),
        "cursor=".to_owned(),
        "cursor=x".to_owned(),
        format!("cursor={}", "A".repeat(5000)),
    ] {
        let answer = replica.as_team(Method::GET, &format!("/v1/sandboxes?{query}"), None).await;
        answers.push((query, answer));
    }
    for (what, answer) in answers {
        assert_eq!(answer.error(), (400, "invalid_request"), "{what}");
        assert_eq!(answer.body["error"]["details"]["field"], "cursor", "{what}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn labels_change_one_by_one() {
    let replica = Replica::start().await;
    let host = replica.host(1 << 20).await;
    let id = replica.sandbox(host).await;
    let path = format!("/v1/sandboxes/{id}");
    let patch =
        async |metadata: Value| replica.as_team(Method::PATCH, &path, Some(json!({ "metadata": metadata }))).await;
    assert_eq!(patch(json!({"a": "1", "b": "2"})).await.body["metadata"], json!({"a": "1", "b": "2"}));
    assert_eq!(patch(json!({"a": null, "c": "3", "none": null})).await.body["metadata"], json!({"b": "2", "c": "3"}));
    assert_eq!(replica.listed("metadata.c=3").await, [id.to_string()]);
    let many: serde_json::Map<String, Value> = (0..31).map(|n| (format!("n{n}"), json!("x"))).collect();
    for wrong in [
        json!({}),
        json!({"": "x"}),
        json!({"a\nb": "x"}),
        json!({"a": "x".repeat(257)}),
        json!({"a": 1}),
        json!({"kernel_version": "x"}),
        json!({"envd_version": null}),
        Value::Object(many),
    ] {
        let answer = patch(wrong.clone()).await;
        assert_eq!(answer.error(), (400, "invalid_request"), "{wrong}");
        assert!(answer.body["error"]["details"]["field"].as_str().unwrap().starts_with("metadata"), "{wrong}");
    }
    let made = replica.as_team(Method::POST, "/v1/sandboxes", Some(json!({"metadata": {"vmm_version": "x"}}))).await;
    assert_eq!(made.error(), (400, "invalid_request"));
    let foreign = replica.foreign_key().await;
    let body = Some(json!({"metadata": {"a": "b"}}));
    assert_eq!(replica.call(Who::Key(&foreign), Method::PATCH, &path, body.clone()).await.error(), (404, "not_found"));
    replica.label(&id, "desired = 'killed', observed = 'killed'").await;
    assert_eq!(replica.as_team(Method::PATCH, &path, body).await.error(), (409, "invalid_state"));
    assert_eq!(replica.audited("sandbox.metadata").await, 2);
}
