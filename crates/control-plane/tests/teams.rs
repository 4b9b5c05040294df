//! Teams: who may do what in them, how people join and go, and what happens when many try at once.

mod replica;

use futures::future::join_all;
use model::access::Role;
use model::ids::UserId;
use replica::{Person, Replica, Team, Who};
use reqwest::Method;
use serde_json::{Value, json};
use store::audit::Actor;
use store::users::Governed;

impl Team {
    fn path(&self, rest: &str) -> String {
        format!("/v1/teams/{}{rest}", self.id)
    }
}

async fn set_role(replica: &Replica, team: &Team, by: &Person, of: UserId, role: &str) -> (u16, String) {
    let path = team.path(&format!("/members/{of}"));
    let answer = replica.as_person(by, Method::PATCH, &path, Some(json!({ "role": role }))).await;
    (answer.status.as_u16(), answer.code().to_owned())
}

fn done() -> (u16, String) {
    (204, String::new())
}

fn refused(status: u16, code: &str) -> (u16, String) {
    (status, code.to_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_team_is_made_used_and_deleted() {
    let replica = Replica::start().await;
    let person = replica.person("a@example.org").await;
    let made = replica.as_person(&person, Method::POST, "/v1/teams", Some(json!({"name": " Research "}))).await;
    assert_eq!(made.status, 201, "{}", made.body);
    assert_eq!(
        (&made.body["name"], &made.body["role"], &made.body["is_byoc"]),
        (&json!("Research"), &json!("owner"), &json!(false))
    );
    let id = made.body["id"].as_str().unwrap();
    let path = format!("/v1/teams/{id}");
    assert_eq!(
        replica.as_person(&person, Method::PATCH, &path, Some(json!({"name": "R&D"}))).await.error(),
        (400, "invalid_request")
    );
    assert_eq!(replica.as_person(&person, Method::PATCH, &path, Some(json!({"name": "R and D"}))).await.status, 204);
    let got = replica.as_person(&person, Method::GET, &path, None).await;
    assert_eq!((&got.body["team"]["name"], got.body["members"].as_array().unwrap().len()), (&json!("R and D"), 1));
    // The session acts for it once it is told to.
    let switched =
        replica.as_person(&person, Method::POST, "/v1/auth/switch-team", Some(json!({ "team_id": id }))).await;
    let token = switched.body["token"].as_str().unwrap();
    let key = replica.call(Who::Bearer(token), Method::POST, "/v1/api-keys", Some(json!({}))).await;
    assert_eq!(key.body["team_id"], id);
    let key = key.body["key"].as_str().unwrap();
    replica.host(4096).await;
    let body = Some(json!({"template": "minimal", "memory_mb": 512}));
    let sandbox = replica.call(Who::Key(key), Method::POST, "/v1/sandboxes?wait_sec=0", body).await;
    assert_eq!(sandbox.status, 202, "{}", sandbox.body);
    assert_eq!(replica.as_person(&person, Method::DELETE, &path, None).await.error(), (409, "team_not_empty"));
    replica.database.sql("update sandboxes set desired = 'killed', observed = 'killed'").await;
    assert_eq!(replica.as_person(&person, Method::DELETE, &path, None).await.status, 204);
    assert_eq!(replica.as_person(&person, Method::GET, &path, None).await.error(), (404, "not_found"));
    assert_eq!(replica.call(Who::Key(key), Method::GET, "/v1/sandboxes", None).await.error(), (401, "unauthorized"));
    assert_eq!(replica.call(Who::Bearer(token), Method::GET, "/v1/sandboxes", None).await.error(), (403, "no_team"));
    for action in ["team.create", "team.rename", "team.delete"] {
        assert_eq!(replica.audited(action).await, 1, "{action}");
    }
    // The platform's own team stays.
    let teams = replica.as_admin(Method::GET, "/v1/teams", None).await;
    let platform = format!("/v1/teams/{}", teams.body[0]["id"].as_str().unwrap());
    assert_eq!(replica.as_admin(Method::DELETE, &platform, None).await.error(), (403, "forbidden"));
}

#[tokio::test(flavor = "multi_thread")]
async fn roles_say_who_decides_about_whom() {
    let replica = Replica::start().await;
    let team = replica.team().await;
    let Team { owner, admin, member, .. } = &team;
    let set = async |by: &Person, of: &Person, role: &str| set_role(&replica, &team, by, of.id, role).await;
    assert_eq!(set(member, member, "admin").await, refused(403, "forbidden"));
    assert_eq!(set(admin, member, "admin").await, done());
    assert_eq!(set(admin, member, "owner").await, refused(403, "forbidden"));
    assert_eq!(set(admin, owner, "member").await, refused(403, "forbidden"));
    assert_eq!(set(owner, owner, "admin").await, refused(409, "last_owner"));
    assert_eq!(set(owner, member, "king").await, refused(400, "invalid_request"));
    assert_eq!(set(owner, admin, "owner").await, done());
    assert_eq!(set(owner, owner, "member").await, done());
    assert_eq!(set(owner, admin, "member").await, refused(403, "forbidden"), "what was is over");
    let nobody = replica.person("n@example.org").await;
    assert_eq!(set(admin, &nobody, "member").await, refused(404, "not_found"));
    let remove = async |by: &Person, of: &Person| {
        replica.as_person(by, Method::DELETE, &team.path(&format!("/members/{}", of.id)), None).await.status.as_u16()
    };
    assert_eq!(remove(member, admin).await, 403);
    // The keys that somebody made go with them.
    let key = replica.as_person(owner, Method::POST, "/v1/api-keys", Some(json!({}))).await;
    let key = key.body["key"].as_str().unwrap();
    assert_eq!(replica.call(Who::Key(key), Method::GET, "/v1/sandboxes", None).await.status, 200);
    assert_eq!(remove(admin, owner).await, 204);
    assert_eq!(replica.call(Who::Key(key), Method::GET, "/v1/sandboxes", None).await.status, 401);
    let leave = async |who: &Person| replica.as_person(who, Method::POST, &team.path("/leave"), None).await;
    assert_eq!(leave(admin).await.error(), (409, "last_owner"));
    assert_eq!(leave(member).await.status, 204);
    assert_eq!(leave(member).await.error(), (404, "not_found"));
    // Existing people are added by their address.
    let add = async |email: &str| {
        replica.as_person(admin, Method::POST, &team.path("/members"), Some(json!({ "email": email }))).await
    };
    let added = add("N@example.org").await;
    assert_eq!((added.status.as_u16(), &added.body["role"]), (201, &json!("member")), "{}", added.body);
    assert_eq!(add("n@example.org").await.error(), (400, "invalid_request"));
    assert_eq!(add("unknown@example.org").await.error(), (404, "not_found"));
    let members = replica.as_person(admin, Method::GET, &team.path("/members"), None).await;
    assert_eq!(members.body.as_array().unwrap().len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_open_what_they_say_for_as_long_as_they_say() {
    let replica = Replica::start().await;
    let team = replica.team().await;
    let make = async |by: &Person, body: Value| replica.as_person(by, Method::POST, "/v1/api-keys", Some(body)).await;
    let plain = make(&team.member, json!({})).await;
    let scopes = plain.body["scopes"].as_array().unwrap();
    assert!(!scopes.contains(&json!("api-keys")) && scopes.len() == 5, "{}", plain.body);
    let narrow = make(&team.owner, json!({"scopes": ["sandboxes:read", "api-keys", "api-keys"]})).await;
    assert_eq!(narrow.body["scopes"], json!(["sandboxes:read", "api-keys"]));
    let narrow_key = narrow.body["key"].as_str().unwrap();
    let by_key =
        |method: Method, path: &'static str, body: Value| replica.call(Who::Key(narrow_key), method, path, Some(body));
    assert_eq!(by_key(Method::GET, "/v1/sandboxes", json!({})).await.status, 200);
    let refused = by_key(Method::POST, "/v1/sandboxes", json!({})).await;
    assert_eq!(
        (refused.error(), &refused.body["error"]["details"]["scope"]),
        ((403, "forbidden"), &json!("sandboxes:write"))
    );
    // No key makes one that opens more.
    assert_eq!(
        by_key(Method::POST, "/v1/api-keys", json!({"scopes": ["sandboxes:write"]})).await.error(),
        (403, "forbidden")
    );
    let less = by_key(Method::POST, "/v1/api-keys", json!({})).await;
    assert_eq!(less.body["scopes"], json!(["sandboxes:read"]));
    for (field, wrong) in [
        ("scopes", json!([])),
        ("scopes", json!(["everything"])),
        ("expires_at", json!("2001-01-01T00:00:00Z")),
        ("expires_at", json!("soon")),
    ] {
        let answer = make(&team.owner, json!({ field: wrong })).await;
        assert_eq!(
            (answer.error(), &answer.body["error"]["details"]["field"]),
            ((400, "invalid_request"), &json!(field))
        );
    }
    let short = make(&team.owner, json!({"expires_at": chrono::Utc::now() + chrono::TimeDelta::hours(1)})).await;
    let short = short.body["key"].as_str().unwrap();
    let spelled = short.replace("wrn_", "e2b_");
    assert_eq!(replica.call(Who::Key(&spelled), Method::GET, "/v1/sandboxes", None).await.status, 200);
    replica.database.sql("update api_keys set expires_at = now() where expires_at is not null").await;
    for key in [short, &spelled] {
        assert_eq!(
            replica.call(Who::Key(key), Method::GET, "/v1/sandboxes", None).await.error(),
            (401, "unauthorized")
        );
    }
    // A member removes their own, an admin everybody's.
    let path = |key: &replica::Answer| format!("/v1/api-keys/{}", key.body["id"].as_str().unwrap());
    assert_eq!(replica.as_person(&team.member, Method::DELETE, &path(&narrow), None).await.error(), (403, "forbidden"));
    assert_eq!(replica.as_person(&team.member, Method::DELETE, &path(&plain), None).await.status, 204);
    assert_eq!(replica.as_person(&team.admin, Method::DELETE, &path(&narrow), None).await.status, 204);
    let listed = replica.as_person(&team.member, Method::GET, "/v1/api-keys", None).await;
    assert!(listed.body.as_array().unwrap().iter().all(|key| key.get("key").is_none()), "{}", listed.body);
}

/// An invitation by an administrator of the platform, who sees the token.
async fn invited(replica: &Replica, team: &Team, email: &str, role: &str) -> Value {
    replica.database.sql(&format!("update users set is_admin = true where id = '{}'", team.owner.id.0)).await;
    let body = json!({"email": email, "role": role});
    let made = replica.as_person(&team.owner, Method::POST, &team.path("/invitations"), Some(body)).await;
    assert_eq!(made.status, 201, "{}", made.body);
    made.body
}

#[tokio::test(flavor = "multi_thread")]
async fn an_invitation_is_taken_once_by_its_person_in_its_time() {
    let replica = Replica::start().await;
    let team = replica.team().await;
    let invite = async |by: &Person, role: &str| {
        let body = json!({"email": "x@example.org", "role": role});
        replica.as_person(by, Method::POST, &team.path("/invitations"), Some(body)).await
    };
    assert_eq!(invite(&team.member, "member").await.error(), (403, "forbidden"));
    assert_eq!(invite(&team.admin, "owner").await.error(), (403, "forbidden"));
    let made = invite(&team.admin, "admin").await;
    assert!(made.status == 201 && made.body.get("token").is_none(), "only administrators see it: {}", made.body);
    // Somebody who has an account.
    let person = replica.person("a@example.org").await;
    let other = replica.person("b@example.org").await;
    let first = invited(&replica, &team, "A@example.org", "admin").await;
    let second = invited(&replica, &team, "a@example.org", "admin").await;
    let accept = async |who: &Person, token: &Value| {
        replica.as_person(who, Method::POST, "/v1/invitations/accept", Some(json!({ "token": token }))).await
    };
    assert_eq!(accept(&person, &first["token"]).await.error(), (400, "invalid_token"), "only the newest works");
    assert_eq!(accept(&other, &second["token"]).await.error(), (403, "forbidden"));
    let joined = accept(&person, &second["token"]).await;
    assert_eq!((joined.status.as_u16(), &joined.body["role"]), (200, &json!("admin")), "{}", joined.body);
    assert_eq!(accept(&person, &second["token"]).await.error(), (400, "invalid_token"));
    // Somebody who has none signs up with it, and is in at once.
    let third = invited(&replica, &team, "c@example.org", "member").await;
    let sign_up = async |email: &str, token: &Value| {
        let body = json!({"email": email, "password": "correct horse", "name": "C", "invitation": token});
        replica.call(Who::Nobody, Method::POST, "/v1/auth/signup", Some(body)).await
    };
    assert_eq!(sign_up("d@example.org", &third["token"]).await.error(), (403, "forbidden"));
    let signed_up = sign_up("c@example.org", &third["token"]).await;
    assert_eq!((signed_up.status.as_u16(), &signed_up.body["team_id"]), (200, &third["team_id"]), "{}", signed_up.body);
    // Revoked, and over.
    let fourth = invited(&replica, &team, "b@example.org", "member").await;
    let path = team.path(&format!("/invitations/{}", fourth["id"].as_str().unwrap()));
    let listed = replica.as_person(&team.owner, Method::GET, &team.path("/invitations"), None).await;
    assert!(listed.body.as_array().unwrap().iter().any(|one| one["id"] == fourth["id"] && one.get("token").is_none()));
    assert_eq!(replica.as_person(&team.owner, Method::DELETE, &path, None).await.status, 204);
    assert_eq!(replica.as_person(&team.owner, Method::DELETE, &path, None).await.error(), (404, "not_found"));
    assert_eq!(accept(&other, &fourth["token"]).await.error(), (400, "invalid_token"));
    let fifth = invited(&replica, &team, "b@example.org", "member").await;
    replica.database.sql("update invitations set expires_at = now()").await;
    assert_eq!(accept(&other, &fifth["token"]).await.error(), (400, "invalid_token"));
}

/// Sixteen at once: one invitation lets one in, once.
#[tokio::test(flavor = "multi_thread")]
async fn an_invitation_that_is_taken_by_many_is_taken_once() {
    let replica = Replica::start().await;
    let team = replica.team().await;
    let person = replica.person("a@example.org").await;
    let made = invited(&replica, &team, "a@example.org", "member").await;
    let accept =
        || replica.as_person(&person, Method::POST, "/v1/invitations/accept", Some(json!({"token": made["token"]})));
    let answers = join_all((0..16).map(|_| accept())).await;
    let joined = answers.iter().filter(|answer| answer.status == 200).count();
    assert_eq!(joined, 1);
    assert!(answers.iter().all(|answer| answer.status == 200 || answer.error() == (400, "invalid_token")));
    assert_eq!(replica.audited("invitation.accept").await, 1);
    // The same by sign-up: one account.
    let made = invited(&replica, &team, "new@example.org", "member").await;
    let body =
        json!({"email": "new@example.org", "password": "correct horse", "name": "N", "invitation": made["token"]});
    replica.database.sql("delete from attempts").await;
    let answers =
        join_all((0..5).map(|_| replica.call(Who::Nobody, Method::POST, "/v1/auth/signup", Some(body.clone())))).await;
    assert_eq!(answers.iter().filter(|answer| answer.status == 200).count(), 1);
    assert_eq!(replica.database.sql("select count(*) from users where email = 'new@example.org'").await.trim(), "1");
}

/// Sixteen owners who all go, or put each other down, at once: one is left.
#[tokio::test(flavor = "multi_thread")]
async fn there_is_always_an_owner() {
    let replica = Replica::start().await;
    let team = replica.team().await;
    let mut owners = Vec::new();
    for number in 0..15 {
        let person = replica.person(&format!("o{number}@example.org")).await;
        replica.join(team.id, person.id, Role::Owner).await;
        owners.push(person);
    }
    owners.push(Person { id: team.owner.id, token: team.owner.token.clone() });
    let go = async |number: usize, person: &Person| {
        let id = person.id.to_string();
        let answer = match number % 3 {
            0 => replica.as_person(person, Method::POST, &team.path("/leave"), None).await,
            1 => {
                let body = Some(json!({"role": "member"}));
                replica.as_person(person, Method::PATCH, &team.path(&format!("/members/{id}")), body).await
            }
            _ => replica.as_person(person, Method::DELETE, &team.path(&format!("/members/{id}")), None).await,
        };
        (answer.status.as_u16(), answer.code().to_owned())
    };
    let answers = join_all(owners.iter().enumerate().map(|(number, person)| go(number, person))).await;
    let gone = answers.iter().filter(|answer| **answer == done()).count();
    assert_eq!(gone, 15, "{answers:?}");
    assert_eq!(answers.iter().filter(|answer| **answer == refused(409, "last_owner")).count(), 1, "{answers:?}");
    let left = format!("select count(*) from team_members where team_id = '{}' and role = 'owner'", team.id.0);
    assert_eq!(replica.database.sql(&left).await.trim(), "1");
}

/// Two administrators who take each other's rights at once, sixteen times: one is left.
#[tokio::test(flavor = "multi_thread")]
async fn there_is_always_an_administrator() {
    let replica = Replica::start().await;
    let store = &replica.serving.app.store;
    let actor = Actor::platform("test");
    let first = store.any_administrator().await.unwrap().unwrap();
    let second = replica.person("a@example.org").await.id;
    for _ in 0..16 {
        replica.database.sql("update users set is_admin = true, status = 'active'").await;
        let (one, other) =
            tokio::join!(store.set_administrator(first, false, &actor), store.set_active(second, false, &actor));
        let mut outcomes = [one.unwrap(), other.unwrap()];
        outcomes.sort_by_key(|outcome| *outcome != Governed::Done);
        assert_eq!(outcomes, [Governed::Done, Governed::LastAdministrator]);
    }
}

/// Sixteen replicas that start at once on an empty database make one administrator.
#[tokio::test(flavor = "multi_thread")]
async fn the_first_administrator_is_one() {
    let database = testkit::postgres::Database::new().await;
    let store = store::Store::new(&database.url).unwrap();
    store.migrate().await.unwrap();
    let start = || async {
        let (user, team) = (UserId(uuid::Uuid::now_v7()), model::ids::TeamId(uuid::Uuid::now_v7()));
        store.make_first_administrator(user, team, "admin@localhost", "hash").await.unwrap()
    };
    let made = join_all((0..16).map(|_| start())).await;
    assert_eq!(made.iter().filter(|made| **made).count(), 1);
    assert_eq!(database.sql("select count(*) from users where is_admin").await.trim(), "1");
}
