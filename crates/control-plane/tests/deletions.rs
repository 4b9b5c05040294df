//! What goes, and what must not be made any more when it does: teams that are deleted while others add to them, and people.

mod replica;

use std::collections::BTreeMap;
use std::time::Duration;

use chrono::Utc;
use control_plane::mail;
use model::access::{Role, Scope};
use model::ids::{ApiKeyId, HostId, InvitationId, SandboxId, TeamId};
use model::shape::Shape;
use replica::{Person, Replica, Team, Who};
use reqwest::Method;
use serde_json::json;
use store::api_keys::{Created as KeyCreated, NewApiKey};
use store::audit::Actor;
use store::deletions::Deleted;
use store::invitations::NewInvitation;
use store::members::Added;
use store::placement::Asked;
use store::policy::{Policy, PolicyChange};
use store::sandboxes::{Created, NewSandbox};
use store::snapshots::{Child, ForkWish, NewSnapshot, SnapshotWish};
use store::wishes::{ResumeOf, Turned};

impl Replica {
    fn new_sandbox(team: TeamId) -> NewSandbox {
        NewSandbox {
            id: SandboxId::from_random(rand::random()),
            team,
            template: "minimal".parse().unwrap(),
            snapshot: None,
            shape: Shape::new(1, 512, 1024).unwrap(),
            envs: BTreeMap::new(),
            metadata: BTreeMap::new(),
            default_user: String::new(),
            policy: Policy::default(),
            asked: Asked::default(),
        }
    }

    /// One in a state, in a team.
    async fn sandbox_of(&self, team: TeamId, host: HostId, observed: &str) -> SandboxId {
        let id = self.sandbox(host).await;
        let desired = if observed == "paused" { "paused" } else { "running" };
        self.database
            .sql(&format!(
                "update sandboxes set team_id = '{}', observed = '{observed}', desired = '{desired}' where id = '{id}'",
                team.0
            ))
            .await;
        id
    }

    async fn count(&self, of: &str) -> i64 {
        self.database.sql(&format!("select count(*) from {of}")).await.trim().parse().unwrap()
    }

    /// All that would still be somebody's.
    async fn assert_gone(&self, team: TeamId) {
        let team = team.0;
        for left in [
            format!("sandboxes where team_id = '{team}' and desired <> 'killed'"),
            format!("sandboxes s where team_id = '{team}' and observed <> 'killed' and not exists
                 (select 1 from operations o where o.sandbox_id = s.id and o.kind = 'kill' and o.revision = s.revision)"),
            format!("operations o join sandboxes s on s.id = o.sandbox_id
                 where s.team_id = '{team}' and o.phase = 'open' and o.kind not in ('kill', 'snapshot')"),
            format!("snapshots where team_id = '{team}' and state <> 'removing'"),
            format!("api_keys where team_id = '{team}'"),
            format!("invitations where team_id = '{team}'"),
            format!("team_members where team_id = '{team}'"),
        ] {
            assert_eq!(self.count(&left).await, 0, "{left}");
        }
    }
}

/// Whatever is made for a team at the moment of its deletion is either made before, and ends with it, or not at all.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_made_for_a_team_that_is_being_deleted() {
    let replica = Replica::start().await;
    let host = replica.host(1 << 22).await;
    replica.database.sql("update hosts set cpu_cores = 4096, disk_gb = 100000, disk_free_mb = 100000000").await;
    let (mut made, mut refused) = (0, 0);
    for round in 0..20 {
        let Team { id: team, owner, .. } = replica.team().await;
        replica.person(&format!("joins{round}@example.org")).await;
        let (running, paused) =
            (replica.sandbox_of(team, host, "running").await, replica.sandbox_of(team, host, "paused").await);
        let app = replica.serving.app.clone();
        let (store, lease, actor) = (app.store.clone(), app.lease(), Actor::platform("test"));
        let mut tasks: Vec<tokio::task::JoinHandle<bool>> = Vec::new();
        let delay = move |n: u64| tokio::time::sleep(Duration::from_micros(n * 300 * (round % 5)));
        for n in 0..6 {
            let (store, actor) = (store.clone(), actor.clone());
            tasks.push(tokio::spawn(async move {
                delay(n).await;
                let new = Replica::new_sandbox(team);
                matches!(store.create_sandbox(&new, &lease, None, &actor).await.unwrap(), Created::Made(..))
            }));
        }
        {
            let (store, actor, of) = (store.clone(), actor.clone(), running.clone());
            tasks.push(tokio::spawn(async move {
                let child = Child {
                    id: SandboxId::from_random(rand::random()),
                    envs: BTreeMap::new(),
                    metadata: BTreeMap::new(),
                    policy: PolicyChange::default(),
                };
                matches!(
                    store.wish_forked(team, &of, &[child], &lease, None, &actor).await.unwrap(),
                    ForkWish::Opened(_)
                )
            }));
        }
        {
            let (store, actor) = (store.clone(), actor.clone());
            tasks.push(tokio::spawn(async move {
                let name = "kept".parse().unwrap();
                let new = NewSnapshot { team, of: &running, name: &name, is_published: false, built: None };
                let wished = store.wish_snapshot(&new, &lease, None, &actor).await.unwrap();
                matches!(wished, SnapshotWish::Opened(..))
            }));
        }
        {
            let (store, actor) = (store.clone(), actor.clone());
            tasks.push(tokio::spawn(async move {
                let wished = store.wish_resumed(team, &paused, ResumeOf::Call, &lease, &actor).await.unwrap();
                assert!(matches!(wished, Turned::Wrong(_) | Turned::Missing), "it does not run again by itself");
                let wished = store.wish_resumed(team, &paused, ResumeOf::Wish, &lease, &actor).await.unwrap();
                matches!(wished, Turned::Opened(_))
            }));
        }
        {
            let (store, actor) = (store.clone(), actor.clone());
            tasks.push(tokio::spawn(async move {
                let new = NewApiKey {
                    id: ApiKeyId(uuid::Uuid::now_v7()),
                    team,
                    name: "k".to_owned(),
                    key_hash: rand::random(),
                    key_prefix: "wrn_".to_owned(),
                    created_by: None,
                    scopes: Scope::ALL.to_vec(),
                    expires_at: None,
                };
                matches!(store.create_api_key(&new, None, &actor).await.unwrap(), KeyCreated::Made(_))
            }));
        }
        {
            let (store, actor, secret) = (store.clone(), actor.clone(), app.secret.clone());
            tasks.push(tokio::spawn(async move {
                let notice = mail::outgoing(&secret, "x@example.org", "x", "x", Utc::now());
                let added = store.add_member(team, &format!("joins{round}@example.org"), &notice, None, &actor).await;
                matches!(added.unwrap(), Added::Made(_))
            }));
        }
        {
            let (store, actor, secret, by) = (store.clone(), actor.clone(), app.secret.clone(), owner.id);
            tasks.push(tokio::spawn(async move {
                let new = NewInvitation {
                    id: InvitationId(uuid::Uuid::now_v7()),
                    team,
                    email: "i@example.org".to_owned(),
                    role: Role::Member,
                    token_hash: rand::random(),
                    by,
                    expires_at: Utc::now() + Duration::from_secs(60),
                };
                let mail = mail::outgoing(&secret, "i@example.org", "x", "x", Utc::now());
                matches!(store.invite(&new, &mail, None, &actor).await.unwrap(), store::invitations::Invited::Made(_))
            }));
        }
        delay(2).await;
        assert_eq!(store.delete_team_with_all(team, &actor).await.unwrap(), Deleted::Done);
        for task in tasks {
            if task.await.unwrap() { made += 1 } else { refused += 1 }
        }
        replica.assert_gone(team).await;
        // Later it is the same, and it has no quotas.
        let late = store.create_sandbox(&Replica::new_sandbox(team), &lease, None, &actor).await.unwrap();
        assert!(matches!(late, Created::NoTeam));
        assert_eq!(store.quotas(team).await.unwrap(), None);
        assert_eq!(store.delete_team_with_all(team, &actor).await.unwrap(), Deleted::Missing);
    }
    assert!(made > 0 && refused > 0, "both come before and after are met: {made} made, {refused} refused");
}

/// As above for an owner's deletion, which waits for an empty team.
#[tokio::test(flavor = "multi_thread")]
async fn an_owner_deletes_an_empty_team_or_none() {
    let replica = Replica::start().await;
    replica.host(1 << 22).await;
    let mut outcomes = [0, 0];
    for round in 0..20 {
        let Team { id: team, .. } = replica.team().await;
        let app = replica.serving.app.clone();
        let (store, lease, actor) = (app.store.clone(), app.lease(), Actor::platform("test"));
        let create = {
            let (store, actor) = (store.clone(), actor.clone());
            tokio::spawn(async move {
                tokio::time::sleep(Duration::from_micros(round * 200)).await;
                store.create_sandbox(&Replica::new_sandbox(team), &lease, None, &actor).await.unwrap()
            })
        };
        let deleted = store.delete_team(team, &actor).await.unwrap();
        let created = create.await.unwrap();
        match deleted {
            Deleted::Done => {
                assert!(matches!(created, Created::NoTeam));
                replica.assert_gone(team).await;
                outcomes[0] += 1;
            }
            Deleted::NotEmpty => {
                assert!(matches!(created, Created::Made(..)));
                outcomes[1] += 1;
            }
            other => panic!("{other:?}"),
        }
    }
    assert!(outcomes[0] > 0, "{outcomes:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn administrators_see_all_teams_and_end_them() {
    let replica = Replica::start().await;
    let host = replica.host(4096).await;
    let team = replica.team().await;
    let sandbox = replica.sandbox_of(team.id, host, "running").await;
    let key = replica.as_person(&team.owner, Method::POST, "/v1/api-keys", Some(json!({}))).await;
    let key = key.body["key"].as_str().unwrap();
    let find = async || {
        let all = replica.as_admin(Method::GET, "/v1/admin/teams", None).await;
        assert_eq!((all.status.as_u16(), &all.body["per_page"]), (200, &json!(100)), "{}", all.body);
        assert_eq!(all.body["total"], json!(all.body["teams"].as_array().unwrap().len()));
        let id = json!(team.id.to_string());
        all.body["teams"].as_array().unwrap().iter().find(|found| found["id"] == id).unwrap().clone()
    };
    let before = find().await;
    assert_eq!(
        (&before["member_count"], &before["active_sandbox_count"], &before["deleted_at"]),
        (&json!(3), &json!(1), &json!(null))
    );
    assert!(before["owner_email"].as_str().unwrap().starts_with("owner-"), "{before}");
    let refused = replica.as_admin(Method::GET, "/v1/admin/teams?page=0", None).await;
    assert_eq!(refused.error(), (400, "invalid_request"));
    let path = format!("/v1/admin/teams/{}", team.id);
    assert_eq!(replica.as_admin(Method::DELETE, &path, None).await.status, 204);
    assert_eq!(replica.as_admin(Method::DELETE, &path, None).await.error(), (404, "not_found"));
    replica.assert_gone(team.id).await;
    let wish = replica.database.sql(&format!("select desired, revision from sandboxes where id = '{sandbox}'")).await;
    assert_eq!(wish.trim(), "killed|2");
    let after = find().await;
    assert!(after["deleted_at"].is_string() && after["owner_name"].is_null(), "{after}");
    assert_eq!(replica.call(Who::Key(key), Method::GET, "/v1/sandboxes", None).await.error(), (401, "unauthorized"));
    let quotas = format!("/v1/teams/{}/quotas", team.id);
    assert_eq!(replica.as_admin(Method::GET, &quotas, None).await.error(), (404, "not_found"));
    assert_eq!(replica.as_admin(Method::PUT, &quotas, Some(json!({"vcpus": 1}))).await.error(), (404, "not_found"));
    let own = replica.as_admin(Method::GET, "/v1/me", None).await.body["team_id"].as_str().unwrap().to_owned();
    let platforms = replica.as_admin(Method::DELETE, &format!("/v1/admin/teams/{own}"), None).await;
    assert_eq!(platforms.error(), (403, "forbidden"));
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_deletes_their_account_is_out_at_once_and_what_they_did_stays() {
    let replica = Replica::start().await;
    let host = replica.host(4096).await;
    let team = replica.team().await;
    let Person { id, .. } = team.owner;
    let email =
        replica.as_person(&team.owner, Method::GET, "/v1/me", None).await.body["email"].as_str().unwrap().to_owned();
    let delete = |who: &Person, confirmation: &str| {
        let (replica, token) = (&replica, who.token.clone());
        let body = json!({ "confirmation": confirmation });
        async move { replica.call(Who::Bearer(&token), Method::DELETE, "/v1/me", Some(body)).await }
    };
    let slip = delete(&team.owner, "x@example.org").await;
    assert_eq!(
        (slip.error(), &slip.body["error"]["details"]["field"]),
        ((400, "invalid_request"), &json!("confirmation"))
    );
    let last = delete(&team.owner, &email).await;
    assert_eq!(last.error(), (409, "owns_team_with_members"));
    assert_eq!(last.body["error"]["details"]["team_ids"], json!([team.id.to_string()]));
    replica.join(team.id, team.admin.id, Role::Owner).await;
    // A key for the team that goes on, a team of their own with something in it.
    let key = replica.as_person(&team.owner, Method::POST, "/v1/api-keys", Some(json!({}))).await;
    let key = key.body["key"].as_str().unwrap();
    let own = replica.as_person(&team.owner, Method::POST, "/v1/teams", Some(json!({"name": "Own"}))).await;
    let own: TeamId = own.body["id"].as_str().unwrap().parse().unwrap();
    let sandbox = replica.sandbox_of(own, host, "running").await;
    assert_eq!(delete(&team.owner, &email.to_uppercase()).await.status, 204);
    for who in [Who::Bearer(&team.owner.token), Who::Key(key)] {
        assert_eq!(replica.call(who, Method::GET, "/v1/sandboxes", None).await.error(), (401, "unauthorized"));
    }
    replica.assert_gone(own).await;
    let wish = replica.database.sql(&format!("select desired from sandboxes where id = '{sandbox}'")).await;
    assert_eq!(wish.trim(), "killed");
    for table in ["users where id", "sessions where user_id", "team_members where user_id", "api_keys where created_by"]
    {
        assert_eq!(replica.count(&format!("{table} = '{}'", id.0)).await, 0, "{table}");
    }
    assert!(replica.count(&format!("audit where actor_id = '{id}'")).await > 0);
    assert_eq!((replica.audited("user.delete").await, replica.audited("team.delete").await), (1, 1));
    let members = format!("/v1/teams/{}/members", team.id);
    let members = replica.as_person(&team.admin, Method::GET, &members, None).await;
    assert_eq!(members.body.as_array().unwrap().len(), 2, "the team goes on");
    // The address is free again, and the last administrator stays.
    let signed_up = json!({"email": email, "password": "correct horse", "name": "Ada"});
    assert_eq!(replica.call(Who::Nobody, Method::POST, "/v1/auth/signup", Some(signed_up)).await.status, 201);
    let refused = replica.as_admin(Method::DELETE, "/v1/me", Some(json!({"confirmation": "admin@localhost"}))).await;
    assert_eq!(refused.error(), (409, "conflict"));
}

/// Two owners who go at once: one of them stays, because somebody must.
#[tokio::test(flavor = "multi_thread")]
async fn of_two_owners_who_go_at_once_one_stays() {
    let replica = Replica::start().await;
    for _ in 0..8 {
        let team = replica.team().await;
        replica.join(team.id, team.admin.id, Role::Owner).await;
        let go = |who: &Person, role: &str| {
            let confirmation = format!("{role}-{}@example.org", who.id.0.simple());
            let (replica, token) = (&replica, who.token.clone());
            async move {
                let body = Some(json!({ "confirmation": confirmation }));
                replica.call(Who::Bearer(&token), Method::DELETE, "/v1/me", body).await
            }
        };
        let (first, second) = tokio::join!(go(&team.owner, "owner"), go(&team.admin, "admin"));
        let mut codes = [first.status.as_u16(), second.status.as_u16()];
        codes.sort_unstable();
        assert_eq!(codes, [204, 409], "{} {}", first.body, second.body);
        let owners = format!("team_members where team_id = '{}' and role = 'owner'", team.id.0);
        assert_eq!(replica.count(&owners).await, 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn people_are_found_by_how_their_address_begins() {
    let replica = Replica::start().await;
    let person = replica.person("ada@example.org").await;
    replica.person("ada_b@example.org").await;
    let gone = replica.person("ada@example.net").await;
    replica.database.sql(&format!("update users set status = 'disabled' where id = '{}'", gone.id.0)).await;
    let search = async |text: &str| {
        replica.as_person(&person, Method::GET, &format!("/v1/users/search?email={text}"), None).await
    };
    let found = search("ADA@ex").await;
    assert_eq!(
        found.body,
        json!([{"user_id": person.id.to_string(), "email": "ada@example.org"}]),
        "no wildcards, none who is out"
    );
    assert_eq!(search("ad%25%40ex").await.body, json!([]));
    for wrong in ["", "ab", "ada", "a%00@", &"x@".repeat(200)] {
        assert_eq!(search(wrong).await.error(), (400, "invalid_request"), "{wrong}");
    }
    let mut codes = Vec::new();
    for _ in 0..61 {
        codes.push(search("nobody@").await.status.as_u16());
    }
    assert_eq!((codes[0], codes[60]), (200, 429), "nobody reads out who has an account");
}
