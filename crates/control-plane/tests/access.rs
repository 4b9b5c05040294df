//! Who may call what: every route of the table with every kind of credential.

mod replica;

use chrono::TimeDelta;
use control_plane::http::access::{Policy, TABLE};
use model::ids::UserId;
use replica::{Replica, Who};
use reqwest::Method;
use serde_json::json;

/// The table's route with things that exist in its slots.
fn path(route: &str, host: &str, sandbox: &str) -> String {
    let no_key = Replica::no_key();
    let id = if route.starts_with("/v1/hosts") { host } else { sandbox };
    let id = if route.starts_with("/v1/api-keys") { &no_key } else { id };
    let no_team = Replica::no_team();
    let id = if route.starts_with("/v1/teams") { &no_team } else { id };
    route.replace("{id}", id).replace("{tag}", "gpu").replace("{selector}", "1").replace("{*rest}", "index.css")
}

#[tokio::test(flavor = "multi_thread")]
async fn every_route_refuses_every_wrong_credential() {
    let replica = Replica::start().await;
    let host = replica.host(4096).await;
    let sandbox = replica.sandbox(host).await;
    let administrator = replica.serving.app.store.any_administrator().await.unwrap().unwrap();
    let deleted = {
        let made = replica.as_admin(Method::POST, "/v1/api-keys", Some(json!({"name": "short-lived"}))).await;
        let id = made.body["id"].as_str().unwrap();
        assert_eq!(replica.as_admin(Method::DELETE, &format!("/v1/api-keys/{id}"), None).await.status, 204);
        made.body["key"].as_str().unwrap().to_owned()
    };
    let expired = replica.token_of_user(administrator, TimeDelta::hours(25));
    let nobody = replica.token_of_user(UserId(uuid::Uuid::now_v7()), TimeDelta::zero());
    let of_host = replica.token_of_host(host);
    let unknown = format!("wrn_{}", "0".repeat(64));
    let wrong: [(&str, Who<'_>); 8] = [
        ("nothing", Who::Nobody),
        ("an unknown key", Who::Key(&unknown)),
        ("a deleted key", Who::Key(&deleted)),
        ("no key", Who::Key("wrn_")),
        ("no token", Who::Bearer("x.y.z")),
        ("an expired token", Who::Bearer(&expired)),
        ("a token of nobody", Who::Bearer(&nobody)),
        ("a host's token", Who::Bearer(&of_host)),
    ];
    let mut looked = 0;
    for (method, route, policy) in TABLE {
        let path = path(route, &host.to_string(), sandbox.as_str());
        let method: Method = method.parse().unwrap();
        // Nobody answers for the host, and that is not what is waited for.
        let waits = [
            "/v1/sandboxes",
            "/v1/sandboxes/{id}",
            "/v1/sandboxes/{id}/pause",
            "/v1/sandboxes/{id}/resume",
            "/v1/sandboxes/{id}/fork",
        ];
        let path = if waits.contains(&route) { format!("{path}?wait_sec=0") } else { path };
        for (what, who) in wrong {
            let answer = replica.call(who, method.clone(), &path, Some(json!({}))).await;
            let is_own_host = policy == Policy::Host && what == "a host's token";
            match policy {
                Policy::Open => assert_ne!(answer.code(), "forbidden", "{method} {route} with {what}"),
                _ if is_own_host => assert_ne!(answer.code(), "unauthorized", "{method} {route} with {what}"),
                _ => assert_eq!(answer.error(), (401, "unauthorized"), "{method} {route} with {what}"),
            }
            looked += 1;
        }
        let by_key = replica.call(Who::Key(&replica.key), method.clone(), &path, Some(json!({}))).await;
        match policy {
            Policy::Administrator => assert_eq!(by_key.error(), (403, "forbidden"), "{method} {route}"),
            Policy::Host => assert_eq!(by_key.error(), (401, "unauthorized"), "{method} {route}"),
            Policy::Team => assert_ne!(by_key.status, 401, "{method} {route}"),
            Policy::Open => {}
        }
        // Only what is not ended by the look itself.
        if method == Method::DELETE || waits.contains(&route) {
            replica.database.sql("update sandboxes set desired = 'running', observed = 'running'").await;
        }
    }
    assert_eq!(looked, TABLE.len() * wrong.len());
}

/// A foreign thing and one that does not exist give the same answer.
#[tokio::test(flavor = "multi_thread")]
async fn another_teams_things_do_not_exist() {
    let replica = Replica::start().await;
    let host = replica.host(4096).await;
    let sandbox = replica.sandbox(host).await;
    let foreign = replica.foreign_key().await;
    for (method, route, policy) in TABLE {
        if policy != Policy::Team || !route.starts_with("/v1/sandboxes/{id}") && route != "/v1/snapshots/{id}" {
            continue;
        }
        let method: Method = method.parse().unwrap();
        let ask = |id: &str| {
            let request = replica.http.request(method.clone(), format!("{}{}", replica.url, path(route, "", id)));
            match route {
                _ if route.ends_with("/write") => {
                    let form = reqwest::multipart::Form::new().text("path", "/tmp/x").text("file", "x");
                    request.multipart(form)
                }
                _ if route.ends_with("exec/stream") => request
                    .header("connection", "upgrade")
                    .header("upgrade", "websocket")
                    .header("sec-websocket-version", "13")
                    .header("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
                _ => request.json(&json!({"cmd": "true", "path": "/tmp/x"})),
            }
        };
        let theirs = replica.send(Who::Key(&foreign), ask(sandbox.as_str())).await;
        let nobodys = replica.send(Who::Key(&foreign), ask("sb0000000000000000000000")).await;
        assert_eq!(theirs.error(), (404, "not_found"), "{method} {route}");
        let same = |answer: &replica::Answer| {
            let mut body = answer.body.clone();
            body["error"]["request_id"] = json!("");
            body
        };
        assert_eq!(same(&theirs), same(&nobodys), "{method} {route}");
    }
    let listed = replica.call(Who::Key(&foreign), Method::GET, "/v1/sandboxes", None).await;
    assert_eq!(listed.body, json!([]));
    let still = replica.as_team(Method::GET, &format!("/v1/sandboxes/{sandbox}"), None).await;
    assert_eq!(still.body["status"], "running");
    // Of a sandbox that is named in a body, and by a name that another team has given. Nobody answers for the host.
    let snapshot = json!({"sandbox_id": sandbox.as_str(), "name": "theirs"});
    let refused = replica.call(Who::Key(&foreign), Method::POST, "/v1/snapshots", Some(snapshot.clone())).await;
    assert_eq!(refused.error(), (404, "not_found"));
    let made = replica.as_team(Method::POST, "/v1/snapshots?wait_sec=0", Some(snapshot)).await;
    assert_eq!((made.status.as_u16(), &made.body["name"]), (202, &json!("theirs")), "{}", made.body);
    let refused = replica.call(Who::Key(&foreign), Method::DELETE, "/v1/snapshots/theirs", None).await;
    assert_eq!(refused.error(), (404, "not_found"));
    let begun = Some(json!({"template": "theirs"}));
    let refused = replica.call(Who::Key(&foreign), Method::POST, "/v1/sandboxes?wait_sec=0", begun).await;
    assert_eq!(refused.error(), (404, "not_found"));
    let listed = replica.call(Who::Key(&foreign), Method::GET, "/v1/snapshots?type=snapshot", None).await;
    assert_eq!(listed.body, json!([]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_password_opens_only_with_the_right_one() {
    let replica = Replica::start().await;
    let hash = control_plane::passwords::hash("correct horse").await;
    replica.database.sql(&format!("update users set password_hash = '{hash}'")).await;
    let login = |email: &str, password: &str| {
        replica.call(Who::Nobody, Method::POST, "/v1/auth/login", Some(json!({"email": email, "password": password})))
    };
    let right = login("admin@localhost", "correct horse").await;
    assert_eq!(right.status, 200, "{}", right.body);
    let token = right.body["token"].as_str().unwrap();
    assert_eq!(replica.call(Who::Bearer(token), Method::GET, "/v1/hosts", None).await.status, 200);
    assert_eq!(login("ADMIN@localhost ", "correct horse").await.status, 200, "addresses have no case");
    for (email, password) in [
        ("admin@localhost", "wrong"),
        ("nobody@localhost", "correct horse"),
        ("", ""),
        ("admin@localhost", &"x".repeat(5000)),
    ] {
        assert_eq!(login(email, password).await.error(), (401, "unauthorized"), "{email}");
    }
    replica.database.sql("update users set status = 'disabled'").await;
    assert_eq!(login("admin@localhost", "correct horse").await.error(), (401, "unauthorized"));
    assert_eq!(replica.call(Who::Bearer(token), Method::GET, "/v1/hosts", None).await.error(), (401, "unauthorized"));
}
