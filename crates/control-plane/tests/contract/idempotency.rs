//! Calls that are repeated under one key, of everything that makes something.

use reqwest::Method;
use serde_json::{Value, json};

use crate::replica::{Answer, Person, Replica, Team, Who};

impl Replica {
    async fn again(&self, who: &Person, path: &str, key: &str, body: &Value) -> Answer {
        let request = self.http.post(format!("{}{path}", self.url)).header("Idempotency-Key", key).json(body);
        self.send(Who::Bearer(&who.token), request).await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_teams_do_is_done_once() {
    let replica = Replica::start().await;
    let Team { id, owner, .. } = replica.team().await;
    replica.person("joins@example.org").await;
    for (path, body, other, audited) in [
        ("/v1/teams".to_owned(), json!({"name": "ours"}), json!({"name": "theirs"}), "team.create"),
        (
            format!("/v1/teams/{id}/members"),
            json!({"email": "joins@example.org"}),
            json!({"email": "JOINS@example.org"}),
            "member.add",
        ),
        (
            format!("/v1/teams/{id}/invitations"),
            json!({"email": "comes@example.org"}),
            json!({"email": "comes@example.org", "role": "admin"}),
            "invitation.create",
        ),
    ] {
        let before = replica.audited(audited).await;
        let calls = (0..10).map(|_| replica.again(&owner, &path, "once", &body));
        let answers = futures::future::join_all(calls).await;
        for answer in &answers {
            assert_eq!((answer.status.as_u16(), &answer.body), (201, &answers[0].body), "{path}");
        }
        assert_eq!(replica.audited(audited).await, before + 1, "{path}");
        assert_eq!(
            replica.again(&owner, &path, "once", &other).await.error(),
            (422, "idempotency_key_reused"),
            "{path}"
        );
        for wrong in ["", &"x".repeat(256), "a\tb"] {
            assert_eq!(replica.again(&owner, &path, wrong, &body).await.error(), (400, "invalid_request"), "{path}");
        }
    }
    // What was made is gone: it is not made again.
    let made = replica.again(&owner, "/v1/teams", "gone", &json!({"name": "short"})).await;
    let path = format!("/v1/teams/{}", made.body["id"].as_str().unwrap());
    assert_eq!(replica.as_person(&owner, Method::DELETE, &path, None).await.status, 204);
    assert_eq!(replica.again(&owner, "/v1/teams", "gone", &json!({"name": "short"})).await.error(), (404, "not_found"));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_administrator_is_told_the_same_secret_again() {
    let replica = Replica::start().await;
    let id = replica.as_admin(Method::POST, "/v1/teams", Some(json!({"name": "ours"}))).await.body["id"].clone();
    let path = format!("/v1/teams/{}/invitations", id.as_str().unwrap());
    let admin = Person { id: model::ids::UserId(uuid::Uuid::nil()), token: replica.admin.clone() };
    let first = replica.again(&admin, &path, "k", &json!({"email": "a@example.org"})).await;
    let second = replica.again(&admin, &path, "k", &json!({"email": "a@example.org"})).await;
    assert!(first.body["token"].is_string(), "{}", first.body);
    assert_eq!(first.body, second.body);
}

/// Also where a call may be repeated without a key.
#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_no_route_takes_is_refused_everywhere() {
    let replica = Replica::start().await;
    let host = replica.host(4096).await;
    let sandbox = replica.sandbox(host).await;
    for rest in ["/pause", "/resume", "/timeout", "/ping"] {
        let url = format!("{}/v1/sandboxes/{sandbox}{rest}?wait_sec=0", replica.url);
        let send = async |key: &str| {
            let request = replica.http.post(&url).header("Idempotency-Key", key).json(&json!({}));
            replica.send(Who::Key(&replica.key), request).await
        };
        assert_eq!(send(&"x".repeat(256)).await.error(), (400, "invalid_request"), "{rest}");
        assert_ne!(send(&"x".repeat(255)).await.status, 400, "{rest}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn while_the_first_one_is_held_up_the_others_are_told_so() {
    let replica = Replica::start().await;
    let Team { owner, .. } = replica.team().await;
    let scope = format!("{} POST /v1/teams", owner.id);
    let hold = format!(
        "begin; insert into idempotency (scope, key, args_hash, subject, expires_at)
         values ('{scope}', 'held', '', 'x', now() + interval '1 h'); select pg_sleep(8); rollback"
    );
    let held = replica.database.sql(&hold);
    let called = async {
        tokio::time::sleep(std::time::Duration::from_millis(500)).await;
        replica.again(&owner, "/v1/teams", "held", &json!({"name": "ours"})).await
    };
    let (_, answer) = tokio::join!(held, called);
    assert_eq!(answer.error(), (409, "operation_in_progress"));
    assert!(answer.headers.contains_key("retry-after"));
    assert_eq!(replica.again(&owner, "/v1/teams", "held", &json!({"name": "ours"})).await.status, 201);
}
