//! Who may call what: every route of the table with every kind of caller. What each is answered is computed from the table.

mod replica;

use chrono::TimeDelta;
use control_plane::http::access::{Policy, TABLE};
use model::access::{Role, Scope};
use model::ids::TeamId;
use replica::{Replica, Slots, Who, path};
use reqwest::Method;
use serde_json::json;

/// Who calls, as far as the table tells them apart.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
    /// No credential, or one that opens nothing.
    Nobody,
    /// A person of the team to which the things of the path belong.
    In(Role),
    /// A person of another team.
    Stranger,
    /// An administrator of the platform, of another team.
    Administrator,
    /// A key of the team with all scopes.
    Key,
    OtherKey,
    /// A key of the team with a scope that no route but the listing of snapshots needs.
    NarrowKey,
    Host,
}

#[derive(Debug, PartialEq)]
enum Expected {
    /// Status and code.
    Refused(u16, &'static str),
    /// The handler decides.
    Passes,
}

/// Whose host is in the paths.
#[derive(Debug, Clone, Copy, PartialEq)]
enum HostOf {
    Platform,
    Team,
}

/// The table's word.
fn expected(policy: Policy, route: &str, kind: Kind, host: HostOf) -> Expected {
    use Expected::{Passes, Refused};
    let forbidden = Refused(403, "forbidden");
    match (policy, kind) {
        (Policy::Open, _) | (Policy::Host, Kind::Host) => Passes,
        (Policy::Host, _) | (_, Kind::Nobody | Kind::Host) => Refused(401, "unauthorized"),
        (Policy::Team(Scope::SnapshotsRead), Kind::NarrowKey) => Passes,
        (Policy::Team(_), Kind::NarrowKey) => forbidden,
        (Policy::Team(_), _) => Passes,
        (_, Kind::Key | Kind::OtherKey | Kind::NarrowKey) => forbidden,
        (Policy::Person | Policy::NewHost(_), _)
        | (Policy::Administrator | Policy::Platform | Policy::Hosts(_), Kind::Administrator) => Passes,
        // Those that one sees: perhaps none.
        (Policy::Hosts(Role::Member), _) if !route.contains("{id}") => Passes,
        (Policy::Hosts(least), Kind::In(role)) if host == HostOf::Team && role >= least => Passes,
        (Policy::Hosts(_), Kind::In(_)) if host == HostOf::Team => forbidden,
        (Policy::Hosts(_), _) => Refused(404, "not_found"),
        (Policy::Administrator | Policy::Platform, _) => forbidden,
        (Policy::Member(least), Kind::In(role)) if role >= least => Passes,
        (Policy::Member(_), Kind::In(_)) => forbidden,
        (Policy::Member(_), Kind::Stranger | Kind::Administrator) => Refused(404, "not_found"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_route_answers_every_caller_as_the_table_says() {
    all_cells(HostOf::Platform).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_route_answers_every_caller_where_the_host_is_a_teams() {
    all_cells(HostOf::Team).await;
}

async fn all_cells(host_of: HostOf) {
    let replica = Replica::start().await;
    let store = &replica.serving.app.store;
    let host = replica.host(65_536).await;
    let ours = replica.team().await;
    let theirs = replica.team().await;
    let administrator = store.any_administrator().await.unwrap().unwrap();
    let sandbox = replica.sandbox(host).await;
    replica.database.sql(&format!("update sandboxes set team_id = '{}'", ours.id.0)).await;
    if host_of == HostOf::Team {
        let owned = format!("update hosts set kind = 'byoc', team_id = '{}'", ours.id.0);
        replica.database.sql(&owned).await;
    }
    let slots = Slots { team: ours.id, host: host.to_string(), sandbox: sandbox.to_string() };

    let key = |body: serde_json::Value| {
        let replica = &replica;
        let owner = &ours.owner;
        async move {
            let made = replica.as_person(owner, Method::POST, "/v1/api-keys", Some(body)).await;
            assert_eq!(made.status, 201, "{}", made.body);
            (made.body["id"].as_str().unwrap().to_owned(), made.body["key"].as_str().unwrap().to_owned())
        }
    };
    let all: Vec<&str> = Scope::ALL.iter().map(|scope| scope.as_str()).collect();
    let whole = key(json!({"scopes": all})).await.1;
    let narrow = key(json!({"scopes": ["snapshots:read"]})).await.1;
    let expired = key(json!({"scopes": all, "expires_at": chrono::Utc::now() + TimeDelta::hours(1)})).await.1;
    replica.database.sql("update api_keys set expires_at = now() - interval '1 s' where expires_at is not null").await;
    let (deleted_id, deleted) = key(json!({"scopes": all})).await;
    let gone = replica.as_person(&ours.owner, Method::DELETE, &format!("/v1/api-keys/{deleted_id}"), None).await;
    assert_eq!(gone.status, 204);
    let foreign = replica.foreign_key().await;
    let unknown = format!("wrn_{}", "0".repeat(64));
    let disabled = replica.person("disabled@example.org").await;
    replica.join(ours.id, disabled.id, Role::Admin).await;
    replica.database.sql(&format!("update users set status = 'disabled' where id = '{}'", disabled.id.0)).await;
    let revoked = replica.session(ours.owner.id).await;
    assert_eq!(replica.call(Who::Bearer(&revoked), Method::POST, "/v1/auth/logout", None).await.status, 204);
    let old = replica.token_of_user(ours.owner.id, TimeDelta::hours(25));
    let sessionless = replica.token_of_user(ours.owner.id, TimeDelta::zero());
    let of_host = replica.token_of_host(host);

    let nobodies = [
        ("nothing", Who::Nobody),
        ("an unknown key", Who::Key(&unknown)),
        ("a deleted key", Who::Key(&deleted)),
        ("an expired key", Who::Key(&expired)),
        ("no key", Who::Key("wrn_")),
        ("no token", Who::Bearer("x.y.z")),
        ("an expired token", Who::Bearer(&old)),
        ("a token without its session", Who::Bearer(&sessionless)),
        ("a disabled person", Who::Bearer(&disabled.token)),
        ("a revoked session", Who::Bearer(&revoked)),
    ];
    let keys = [
        ("the team's key", Kind::Key, Who::Key(&whole)),
        ("another team's key", Kind::OtherKey, Who::Key(&foreign)),
        ("a key without the scope", Kind::NarrowKey, Who::Key(&narrow)),
        ("a host", Kind::Host, Who::Bearer(&of_host)),
    ];
    let people = [
        ("the owner", Kind::In(Role::Owner), ours.owner.id),
        ("an admin", Kind::In(Role::Admin), ours.admin.id),
        ("a member", Kind::In(Role::Member), ours.member.id),
        ("another team's owner", Kind::Stranger, theirs.owner.id),
        ("an administrator", Kind::Administrator, administrator),
    ];
    let mut cells = 0;
    for (method, route, policy) in TABLE {
        let path = path(route, &slots);
        let method: Method = method.parse().unwrap();
        // What a call of before may have ended.
        replica.database.sql("update sandboxes set desired = 'running', observed = 'running'").await;
        replica.join(ours.id, ours.admin.id, Role::Admin).await;
        replica.join(ours.id, ours.member.id, Role::Member).await;
        let sessions: Vec<String> =
            futures::future::join_all(people.iter().map(|(_, _, user)| replica.session(*user))).await;
        let people = people.iter().zip(&sessions).map(|((what, kind, _), token)| (*what, *kind, Who::Bearer(token)));
        let nobodies = nobodies.iter().map(|(what, who)| (*what, Kind::Nobody, *who));
        for (what, kind, who) in nobodies.chain(keys).chain(people) {
            let answer = replica.call(who, method.clone(), &path, Some(json!({}))).await;
            let cell = format!("{method} {path} by {what}: {} {}", answer.status, answer.body);
            match expected(policy, route, kind, host_of) {
                Expected::Refused(status, code) => assert_eq!(answer.error(), (status, code), "{cell}"),
                Expected::Passes => {
                    assert!(!["unauthorized", "forbidden", "no_team"].contains(&answer.code()), "{cell}");
                    // Of what is another team's, nobody sees that it is there.
                    let is_foreign = matches!(kind, Kind::OtherKey | Kind::Stranger | Kind::Administrator);
                    let is_of_a_team = matches!(policy, Policy::Team(_)) && route.contains("{id}");
                    if is_foreign && is_of_a_team && answer.status != 400 && answer.status != 415 {
                        assert!(answer.status == 404 || route.starts_with("/v1/api-keys"), "{cell}");
                    }
                }
            }
            cells += 1;
        }
    }
    assert_eq!(cells, TABLE.len() * (nobodies.len() + keys.len() + people.len()));
}

/// Neither status nor text tells whether there is such a team.
#[tokio::test(flavor = "multi_thread")]
async fn another_persons_teams_do_not_exist() {
    let replica = Replica::start().await;
    let (ours, theirs) = (replica.team().await, replica.team().await);
    let host = String::new();
    for (method, route, policy) in TABLE {
        if !matches!(policy, Policy::Member(_)) {
            continue;
        }
        let ask = |team: TeamId| {
            let path = path(route, &Slots { team, host: host.clone(), sandbox: host.clone() });
            let body = json!({"name": "x", "email": "a@example.org", "role": "member"});
            let (replica, who) = (&replica, Who::Bearer(&ours.owner.token));
            async move { replica.call(who, method.parse().unwrap(), &path, Some(body)).await }
        };
        let (foreign, unknown) = (ask(theirs.id).await, ask(TeamId(uuid::Uuid::nil())).await);
        assert_eq!(foreign.error(), (404, "not_found"), "{method} {route}");
        let same = |answer: &replica::Answer| {
            let mut body = answer.body.clone();
            body["error"]["request_id"] = json!("");
            body
        };
        assert_eq!(same(&foreign), same(&unknown), "{method} {route}");
    }
    // A session of somebody else's, and one that never was.
    let path = |id: String| format!("/v1/me/sessions/{id}");
    let others = replica.as_person(&theirs.owner, Method::GET, "/v1/me/sessions", None).await;
    let id = others.body[0]["id"].as_str().unwrap().to_owned();
    let refused = replica.as_person(&ours.owner, Method::DELETE, &path(id), None).await;
    assert_eq!(refused.error(), (404, "not_found"));
    assert_eq!(replica.as_person(&theirs.owner, Method::GET, "/v1/me", None).await.status, 200, "it goes on");
    let switched = json!({"team_id": theirs.id.to_string()});
    let refused = replica.as_person(&ours.owner, Method::POST, "/v1/auth/switch-team", Some(switched)).await;
    assert_eq!(refused.error(), (404, "not_found"));
}

/// Nor of hosts: the platform's, another team's, and none at all are the same to who decides in a team.
#[tokio::test(flavor = "multi_thread")]
async fn another_teams_hosts_do_not_exist() {
    let replica = Replica::start().await;
    let (ours, theirs) = (replica.team().await, replica.team().await);
    let (platforms, foreign) = (replica.host(4096).await, replica.host(4096).await);
    let owned = format!(
        "update teams set is_byoc = true where id in ('{0}', '{1}');
         update hosts set kind = 'byoc', team_id = '{1}' where id = '{2}'",
        ours.id.0, theirs.id.0, foreign.0
    );
    replica.database.sql(&owned).await;
    let mut count = 0;
    for (method, route, policy) in TABLE {
        if !matches!(policy, Policy::Hosts(_)) || !route.contains("{id}") {
            continue;
        }
        let ask = |host: String| {
            let path = path(route, &Slots { team: ours.id, host, sandbox: String::new() });
            let (replica, who) = (&replica, Who::Bearer(&ours.owner.token));
            async move {
                let answer = replica.call(who, method.parse().unwrap(), &path, Some(json!({"tag": "gpu"}))).await;
                assert_eq!(answer.error(), (404, "not_found"), "{method} {path}");
                let mut body = answer.body;
                body["error"]["request_id"] = json!("");
                body
            }
        };
        let unknown = ask(model::ids::HostId(uuid::Uuid::nil()).to_string()).await;
        assert_eq!(ask(foreign.to_string()).await, unknown, "{method} {route}");
        assert_eq!(ask(platforms.to_string()).await, unknown, "{method} {route}");
        count += 1;
    }
    assert_eq!(count, 11, "routes of one host");
    let list = replica.as_person(&ours.owner, Method::GET, "/v1/hosts", None).await;
    assert_eq!(list.body, json!([]));
    let new = |team: TeamId| {
        let body = json!({"type": "byoc", "team_id": team.to_string()});
        replica.as_person(&ours.owner, Method::POST, "/v1/hosts", Some(body))
    };
    let (foreign, unknown) = (new(theirs.id).await, new(TeamId(uuid::Uuid::nil())).await);
    assert_eq!(foreign.error(), (404, "not_found"));
    assert_eq!(foreign.body["error"]["message"], unknown.body["error"]["message"]);
    assert_eq!(unknown.error(), (404, "not_found"));
}

/// A foreign thing and one that does not exist give the same answer.
#[tokio::test(flavor = "multi_thread")]
async fn another_teams_things_do_not_exist() {
    let replica = Replica::start().await;
    let host = replica.host(4096).await;
    let sandbox = replica.sandbox(host).await;
    let foreign = replica.foreign_key().await;
    for (method, route, policy) in TABLE {
        if !matches!(policy, Policy::Team(_))
            || !route.starts_with("/v1/sandboxes/{id}") && route != "/v1/snapshots/{id}"
        {
            continue;
        }
        let method: Method = method.parse().unwrap();
        let ask = |id: &str| {
            let request = replica.http.request(
                method.clone(),
                format!(
                    "{}{}",
                    replica.url,
                    path(
                        route,
                        &Slots { team: TeamId(uuid::Uuid::nil()), host: String::new(), sandbox: id.to_owned() }
                    )
                ),
            );
            match route {
                _ if route.ends_with("/write") => {
                    let form = reqwest::multipart::Form::new().text("path", "/tmp/x").text("file", "x");
                    request.multipart(form)
                }
                _ if route.ends_with("/stream") || route.ends_with("/pty") => request
                    .header("connection", "upgrade")
                    .header("upgrade", "websocket")
                    .header("sec-websocket-version", "13")
                    .header("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
                _ => request.json(
                    &json!({"cmd": "true", "path": "/tmp/x", "from": "/tmp/x", "to": "/tmp/y", "metadata": {"a": "b"}}),
                ),
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
    assert_eq!(login("admin@localhost", "correct horse").await.error(), (403, "account_disabled"));
    assert_eq!(
        login("admin@localhost", "wrong").await.error(),
        (401, "unauthorized"),
        "told only to who knows the password"
    );
    assert_eq!(replica.call(Who::Bearer(token), Method::GET, "/v1/hosts", None).await.error(), (401, "unauthorized"));
}
