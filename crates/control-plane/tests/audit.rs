//! The audit as it is read: by whom, in pages, and what of.

mod replica;

use replica::{Replica, Who};
use reqwest::Method;
use serde_json::{Value, json};

fn items(answer: &replica::Answer) -> &Vec<Value> {
    assert_eq!(answer.status, 200, "{}", answer.body);
    answer.body["items"].as_array().unwrap()
}

fn actions(answer: &replica::Answer) -> Vec<String> {
    let said =
        |item: &Value| format!("{}.{}", item["resource_type"].as_str().unwrap(), item["action"].as_str().unwrap());
    items(answer).iter().map(said).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn members_see_what_was_done_with_things_and_admins_what_was_done_with_people() {
    let replica = Replica::start().await;
    let team = replica.team().await;
    let other = replica.team().await;
    let key = replica.as_person(&team.owner, Method::POST, "/v1/api-keys", Some(json!({"name": "ci"}))).await;
    let invite = json!({"email": "new@example.org"});
    let path = format!("/v1/teams/{}/invitations", team.id);
    assert_eq!(replica.as_person(&team.admin, Method::POST, &path, Some(invite)).await.status, 201);
    replica.as_person(&other.owner, Method::POST, "/v1/api-keys", Some(json!({"name": "theirs"}))).await;
    for (person, sees_people) in [(&team.owner, true), (&team.admin, true), (&team.member, false)] {
        let seen = actions(&replica.as_person(person, Method::GET, "/v1/audit-logs", None).await);
        assert!(seen.contains(&"api_key.create".to_owned()), "{seen:?}");
        assert_eq!(seen.iter().filter(|action| *action == "api_key.create").count(), 1, "of another team: {seen:?}");
        assert_eq!(seen.contains(&"invitation.create".to_owned()), sees_people, "{seen:?}");
        assert_eq!(seen.contains(&"session.open".to_owned()), sees_people, "{seen:?}");
    }
    let made = replica.as_person(&team.member, Method::GET, "/v1/audit-logs?action=create", None).await;
    let entry = &items(&made)[0];
    assert_eq!(
        (&entry["actor_type"], &entry["actor_id"], &entry["actor_name"]),
        (&json!("user"), &json!(team.owner.id.to_string()), &json!("Somebody"))
    );
    assert_eq!((&entry["resource_id"], &entry["metadata"]["name"]), (&key.body["id"], &json!("ci")));
    assert_eq!((&entry["scope"], &entry["status"]), (&json!("team"), &json!("success")));
    assert_eq!(entry["request_id"], json!(key.headers["x-request-id"].to_str().unwrap()));
    // Who is in no team sees none, and a key is no person.
    let key = key.body["key"].as_str().unwrap();
    assert_eq!(replica.call(Who::Key(key), Method::GET, "/v1/audit-logs", None).await.error(), (403, "forbidden"));
    let gone = format!("/v1/teams/{}/members/{}", team.id, team.member.id);
    assert_eq!(replica.as_person(&team.owner, Method::DELETE, &gone, None).await.status, 204);
    let refused = replica.as_person(&team.member, Method::GET, "/v1/audit-logs", None).await;
    assert_eq!(refused.error(), (403, "no_team"));
    let removed = replica.as_person(&team.admin, Method::GET, "/v1/audit-logs?resource_type=member", None).await;
    assert_eq!(actions(&removed), ["member.remove"]);
    assert_eq!((&items(&removed)[0]["scope"], &items(&removed)[0]["status"]), (&json!("admin"), &json!("warning")));
}

#[tokio::test(flavor = "multi_thread")]
async fn administrators_see_what_was_done_with_the_platform_and_nobody_else_does() {
    let replica = Replica::start().await;
    let team = replica.team().await;
    let host = replica.host(4096).await;
    replica.person("a@example.org").await;
    let own_team = replica.as_admin(Method::GET, "/v1/audit-logs", None).await;
    let seen = actions(&own_team);
    assert!(!seen.iter().any(|action| action.starts_with("host.") || action.starts_with("user.")), "{seen:?}");
    let all = replica.as_admin(Method::GET, "/v1/admin/audit-logs", None).await;
    let made = items(&all).iter().find(|item| item["resource_id"] == host.to_string()).expect("the host's create");
    assert_eq!(
        (&made["resource_type"], &made["action"], &made["scope"]),
        (&json!("host"), &json!("create"), &json!("platform"))
    );
    let first = items(&all).last().unwrap();
    assert_eq!((&first["actor_type"], &first["action"]), (&json!("system"), &json!("create")), "{first}");
    // Limits that an administrator gives are seen by whom they concern.
    let path = format!("/v1/teams/{}/quotas", team.id);
    assert_eq!(replica.as_admin(Method::PUT, &path, Some(json!({"sandboxes": 3}))).await.status, 200);
    let theirs = replica.as_person(&team.member, Method::GET, "/v1/audit-logs?action=team.quotas", None).await;
    assert_eq!(items(&theirs)[0]["metadata"]["sandboxes"], 3);
    let of_team = format!("/v1/admin/audit-logs?team_id={}&resource_type=session", team.id);
    let seen = actions(&replica.as_admin(Method::GET, &of_team, None).await);
    assert_eq!(seen, ["session.open"; 3]);
    for role in [&team.owner, &team.member] {
        assert_eq!(
            replica.as_person(role, Method::GET, "/v1/admin/audit-logs", None).await.error(),
            (403, "forbidden")
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_hold_every_entry_once() {
    let replica = Replica::start().await;
    let team = replica.team().await;
    // Of one transaction and one instant, with others between them.
    replica
        .database
        .sql(&format!(
            "insert into audit (team_id, actor_kind, actor_id, action, subject)
             select case when n % 3 = 0 then null else '{}'::uuid end, 'platform', 'x', case when n % 2 = 0 then 'sandbox.kill' else 'sandbox.create' end,
                 'n' || n from generate_series(1, 500) n",
            team.id.0
        ))
        .await;
    let mut seen: Vec<String> = Vec::new();
    let mut path = "/v1/audit-logs?resource_type=sandbox&action=kill&limit=7".to_owned();
    loop {
        let page = replica.as_person(&team.member, Method::GET, &path, None).await;
        let of_page = items(&page);
        if of_page.is_empty() {
            assert!(page.body.get("next_before_id").is_none(), "{}", page.body);
            break;
        }
        assert!(of_page.len() <= 7);
        seen.extend(of_page.iter().map(|item| item["resource_id"].as_str().unwrap().to_owned()));
        // Those who write while somebody reads change nothing of the pages to come.
        replica
            .database
            .sql(&format!(
                "insert into audit (team_id, actor_kind, actor_id, action, subject) values ('{}', 'platform', 'x', 'sandbox.kill', 'late')",
                team.id.0
            ))
            .await;
        let at = page.body["next_before"].as_str().unwrap().replace('+', "%2B");
        let id = page.body["next_before_id"].as_str().unwrap();
        path = format!("/v1/audit-logs?resource_type=sandbox&action=kill&limit=7&before={at}&before_id={id}");
    }
    let expected: Vec<String> = (1..=500).rev().filter(|n| n % 2 == 0 && n % 3 != 0).map(|n| format!("n{n}")).collect();
    assert_eq!(seen, expected);
    let none = replica.as_person(&team.member, Method::GET, "/v1/audit-logs?before=2020-01-01T00:00:00Z", None).await;
    assert!(items(&none).is_empty());
    for wrong in ["limit=0", "limit=201", "before=x", "before_id=7"] {
        let refused = replica.as_person(&team.member, Method::GET, &format!("/v1/audit-logs?{wrong}"), None).await;
        let field = wrong.split('=').next().unwrap();
        assert_eq!(
            (refused.error(), &refused.body["error"]["details"]["field"]),
            ((400, "invalid_request"), &json!(field))
        );
    }
}
