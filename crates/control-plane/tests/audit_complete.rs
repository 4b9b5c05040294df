//! Every route that changes something leaves exactly its record, in the transaction of the change. Each is called twice: with an audit that
//! refuses, when nothing at all may change, and with one that does not.
//!
//! Generated from the table of routes: one that is new fails here until it is said what it writes down, or why it writes nothing.

mod replica;

use std::time::{Duration, Instant};

use control_plane::http::access::TABLE;
use model::access::Role;
use model::ids::{BuildId, HostId, SandboxId, TeamId};
use rcgen::{CertificateParams, KeyPair};
use replica::{Answer, Person, Replica, Team, Who};
use reqwest::Method;
use serde_json::{Value, json};

/// Routes of whose calls no record is kept.
const UNRECORDED: [(&str, &str, &str); 22] = [
    ("POST", "/v1/channels/test", "nothing here changes; what was told is with who was told"),
    ("POST", "/v1/hosts/{id}/heartbeat", "what a host says of itself, every few seconds, is no act of anybody"),
    ("POST", "/v1/sandboxes/{id}/ping", "the sandbox stays what it is; only its idle time begins anew"),
    ("POST", "/v1/sandboxes/{id}/exec", IN_THE_SANDBOX),
    ("DELETE", "/v1/sandboxes/{id}/processes/{selector}", IN_THE_SANDBOX),
    ("POST", "/v1/sandboxes/{id}/files/read", IN_THE_SANDBOX),
    ("POST", "/v1/sandboxes/{id}/files/write", IN_THE_SANDBOX),
    ("POST", "/v1/sandboxes/{id}/files/stream/read", IN_THE_SANDBOX),
    ("POST", "/v1/sandboxes/{id}/files/stream/write", IN_THE_SANDBOX),
    ("PUT", "/v1/sandboxes/{id}/files/content", IN_THE_SANDBOX),
    ("POST", "/v1/sandboxes/{id}/files/list", IN_THE_SANDBOX),
    ("POST", "/v1/sandboxes/{id}/files/stat", IN_THE_SANDBOX),
    ("POST", "/v1/sandboxes/{id}/files/mkdir", IN_THE_SANDBOX),
    ("POST", "/v1/sandboxes/{id}/files/move", IN_THE_SANDBOX),
    ("POST", "/v1/sandboxes/{id}/files/remove", IN_THE_SANDBOX),
    ("POST", "/v1/admin/capsules/{id}/exec", IN_THE_SANDBOX),
    ("DELETE", "/v1/admin/capsules/{id}/processes/{selector}", IN_THE_SANDBOX),
    ("POST", "/v1/admin/capsules/{id}/files/read", IN_THE_SANDBOX),
    ("POST", "/v1/admin/capsules/{id}/files/write", IN_THE_SANDBOX),
    ("POST", "/v1/admin/capsules/{id}/files/list", IN_THE_SANDBOX),
    ("POST", "/v1/admin/capsules/{id}/files/mkdir", IN_THE_SANDBOX),
    ("POST", "/v1/admin/capsules/{id}/files/remove", IN_THE_SANDBOX),
];
const IN_THE_SANDBOX: &str = "what happens within a sandbox is its team's own, and nothing of the platform changes";

/// What every change changes, but for what passes by itself: times of use, tries, and how far hosts are with what they were asked.
const STATE: &str = "
    select string_agg(line, '|' order by line) from (
        select 'user' || row(id, email, name, password_hash, is_admin, status)::text as line from users
        union all select 'team' || row(id, name, is_byoc, deleted_at)::text from teams
        union all select 'member' || row(team_id, user_id, role)::text from team_members
        union all select 'key' || row(id, team_id, name)::text from api_keys
        union all select 'session' || row(id, user_id, team_id)::text from sessions
        union all select 'token' || row(token_hash, used_at)::text from account_tokens
        union all select 'invitation' || row(id, accepted_at)::text from invitations
        union all select 'identity' || row(provider, subject, user_id)::text from identities
        union all select 'host' || row(id, state, address, tags, epoch)::text from hosts
        union all select 'registration' || row(token_hash, used_by_key)::text from registration_tokens
        union all select 'sandbox' || row(id, desired, revision, timeout_sec, metadata)::text from sandboxes
        union all select 'snapshot' || row(id, name, state = 'removing')::text from snapshots
        union all select 'quota' || row(team_id, vcpus, sandboxes)::text from team_quotas
        union all select 'build' || row(id, state = 'cancelled')::text from builds
        union all select 'channel' || row(id, name, config, events)::text from channels
        union all select 'mail' || row(id)::text from outbox
        union all select 'idempotency' || row(scope, key)::text from idempotency) lines";

struct Scene {
    replica: Replica,
    host: HostId,
}

/// A call that changes something, ready to be made.
struct Act {
    who: Caller,
    path: String,
    body: Option<Value>,
    records: &'static [&'static str],
}

enum Caller {
    Nobody,
    Bearer(String),
}

fn act(who: &Person, path: impl Into<String>, body: Value, records: &'static [&'static str]) -> Act {
    Act { who: Caller::Bearer(who.token.clone()), path: path.into(), body: Some(body), records }
}

impl Scene {
    async fn sql(&self, statements: &str) -> String {
        self.replica.database.sql(statements).await.trim().to_owned()
    }

    fn by_admin(&self, path: impl Into<String>, body: Value, records: &'static [&'static str]) -> Act {
        Act { who: Caller::Bearer(self.replica.admin.clone()), path: path.into(), body: Some(body), records }
    }

    fn by_nobody(path: &str, body: Value, records: &'static [&'static str]) -> Act {
        Act { who: Caller::Nobody, path: path.to_owned(), body: Some(body), records }
    }

    async fn person(&self) -> (Person, String) {
        let email = format!("{:x}@example.org", rand::random::<u64>());
        (self.replica.person(&email).await, email)
    }

    /// Somebody with a link for an activation, or for a new password.
    async fn link(&self, is_active: bool) -> Value {
        let (person, _) = self.person().await;
        if !is_active {
            self.sql(&format!("update users set status = 'pending' where id = '{}'", person.id.0)).await;
        }
        let path = format!("/v1/admin/users/{}/link", person.id);
        let link = self.replica.as_admin(Method::POST, &path, None).await;
        assert_eq!(link.status, 201, "{}", link.body);
        link.body["token"].clone()
    }

    async fn sandbox(&self, team: TeamId, observed: &str) -> SandboxId {
        let id = self.replica.sandbox(self.host).await;
        let desired = if observed == "paused" { "paused" } else { "running" };
        self.sql(&format!(
            "update sandboxes set team_id = '{}', desired = '{desired}', observed = '{observed}' where id = '{id}'",
            team.0
        ))
        .await;
        id
    }

    async fn new_host(&self) -> (String, Value) {
        let made = self.replica.as_admin(Method::POST, "/v1/hosts", Some(json!({"type": "regular"}))).await;
        (made.body["host"]["id"].as_str().unwrap().to_owned(), made.body["registration_token"].clone())
    }

    async fn tagged(&self) -> String {
        let (id, _) = self.new_host().await;
        let path = format!("/v1/hosts/{id}/tags");
        let tagged = self.replica.as_admin(Method::POST, &path, Some(json!({"tag": "gpu"}))).await;
        assert!(tagged.status.is_success(), "{}", tagged.body);
        id
    }

    /// The route's call, on things of its own.
    async fn prepared(&self, method: &str, route: &str) -> Option<Act> {
        Some(match route.split('/').nth(2).unwrap_or_default() {
            "auth" | "me" | "invitations" => self.of_people(method, route).await?,
            "teams" | "api-keys" => self.of_teams(method, route).await?,
            "channels" => self.of_channels(method, route).await?,
            "admin" if route.starts_with("/v1/admin/users") || route.starts_with("/v1/admin/teams") => {
                self.of_administrators(method, route).await?
            }
            "admin" => self.of_platform(method, route).await?,
            "hosts" => self.of_hosts(method, route).await?,
            _ => self.of_sandboxes(method, route).await?,
        })
    }

    async fn of_people(&self, method: &str, route: &str) -> Option<Act> {
        let (person, email) = self.person().await;
        Some(match (method, route) {
            ("POST", "/v1/auth/signup") => {
                let email = format!("new-{email}");
                let body = json!({"email": email, "password": "correct horse", "name": "Ada"});
                Self::by_nobody(route, body, &["user.create"])
            }
            // Who has activated the account is in.
            ("POST", "/v1/auth/activate") => {
                let body = json!({"token": self.link(false).await, "password": "correct horse"});
                Self::by_nobody(route, body, &["user.activate", "session.open"])
            }
            ("POST", "/v1/auth/login") => {
                let hash = control_plane::passwords::hash("correct horse").await;
                self.sql(&format!("update users set password_hash = '{hash}' where id = '{}'", person.id.0)).await;
                let body = json!({"email": email, "password": "correct horse"});
                Self::by_nobody(route, body, &["session.open"])
            }
            ("POST", "/v1/auth/logout") => act(&person, route, json!({}), &["session.end"]),
            ("POST", "/v1/auth/switch-team") => {
                let team = self.replica.team().await;
                self.replica.join(team.id, person.id, Role::Member).await;
                act(&person, route, json!({"team_id": team.id.to_string()}), &["session.switch_team"])
            }
            ("POST", "/v1/me/password/reset") => Self::by_nobody(route, json!({ "email": email }), &["user.link"]),
            ("POST", "/v1/me/password/reset/confirm") => {
                let body = json!({"token": self.link(true).await, "new_password": "another horse"});
                Self::by_nobody(route, body, &["user.password_reset"])
            }
            ("PATCH", "/v1/me") => act(&person, route, json!({"name": "Grace"}), &["user.rename"]),
            // With them goes the team in which nobody else is.
            ("DELETE", "/v1/me") => {
                act(&person, route, json!({ "confirmation": email }), &["team.delete", "user.delete"])
            }
            ("POST", "/v1/me/password") => {
                let body = json!({"new_password": "another horse", "confirm_password": "another horse"});
                act(&person, route, body, &["user.password"])
            }
            ("DELETE", "/v1/me/sessions/{id}") => {
                self.replica.session(person.id).await;
                let listed = self.replica.as_person(&person, Method::GET, "/v1/me/sessions", None).await;
                let other = listed.body.as_array().unwrap().iter().find(|session| session["current"] == false).unwrap();
                let path = format!("/v1/me/sessions/{}", other["id"].as_str().unwrap());
                act(&person, path, json!({}), &["session.end"])
            }
            ("DELETE", "/v1/me/providers/{provider}") => {
                self.sql(&format!(
                    "update users set password_hash = 'x' where id = '{0}';
                     insert into identities (provider, subject, user_id, email) values ('oidc', '{0}', '{0}', '')",
                    person.id.0
                ))
                .await;
                act(&person, "/v1/me/providers/oidc", json!({}), &["user.disconnect"])
            }
            ("POST", "/v1/invitations/accept") => {
                let own = self.replica.as_admin(Method::GET, "/v1/me", None).await.body["team_id"].clone();
                let path = format!("/v1/teams/{}/invitations", own.as_str().unwrap());
                let made = self.replica.as_admin(Method::POST, &path, Some(json!({ "email": email }))).await;
                act(&person, route, json!({"token": made.body["token"]}), &["invitation.accept"])
            }
            _ => return None,
        })
    }

    async fn of_teams(&self, method: &str, route: &str) -> Option<Act> {
        let Team { id, owner, admin, member } = self.replica.team().await;
        let of = |rest: &str| format!("/v1/teams/{id}{rest}");
        let (_, email) = self.person().await;
        Some(match (method, route) {
            ("POST", "/v1/teams") => act(&owner, route, json!({"name": "New"}), &["team.create"]),
            ("PATCH", "/v1/teams/{id}") => act(&owner, of(""), json!({"name": "Other"}), &["team.rename"]),
            ("DELETE", "/v1/teams/{id}") => act(&owner, of(""), json!({}), &["team.delete"]),
            ("PUT", "/v1/teams/{id}/quotas") => self.by_admin(of("/quotas"), json!({"vcpus": 7}), &["team.quotas"]),
            ("POST", "/v1/teams/{id}/members") => {
                act(&owner, of("/members"), json!({ "email": email }), &["member.add"])
            }
            ("PATCH", "/v1/teams/{id}/members/{user_id}") => {
                act(&owner, of(&format!("/members/{}", member.id)), json!({"role": "admin"}), &["member.role"])
            }
            ("DELETE", "/v1/teams/{id}/members/{user_id}") => {
                act(&admin, of(&format!("/members/{}", member.id)), json!({}), &["member.remove"])
            }
            ("POST", "/v1/teams/{id}/leave") => act(&member, of("/leave"), json!({}), &["member.leave"]),
            ("POST", "/v1/teams/{id}/invitations") => {
                act(&admin, of("/invitations"), json!({"email": "i@example.org"}), &["invitation.create"])
            }
            ("DELETE", "/v1/teams/{id}/invitations/{invitation_id}") => {
                let body = json!({"email": "i@example.org"});
                let made = self.replica.as_person(&admin, Method::POST, &of("/invitations"), Some(body)).await;
                let path = of(&format!("/invitations/{}", made.body["id"].as_str().unwrap()));
                act(&admin, path, json!({}), &["invitation.revoke"])
            }
            ("POST", "/v1/api-keys") => act(&member, route, json!({"name": "k"}), &["api_key.create"]),
            ("DELETE", "/v1/api-keys/{id}") => {
                let made = self.replica.as_person(&member, Method::POST, "/v1/api-keys", Some(json!({}))).await;
                let path = format!("/v1/api-keys/{}", made.body["id"].as_str().unwrap());
                act(&member, path, json!({}), &["api_key.delete"])
            }
            _ => return None,
        })
    }

    async fn of_channels(&self, method: &str, route: &str) -> Option<Act> {
        let Team { member, .. } = self.replica.team().await;
        let config = json!({"url": "http://127.0.0.1:1/"});
        let new = json!({"name": "ops", "provider": "webhook", "config": config, "events": ["host.down"]});
        if (method, route) == ("POST", "/v1/channels") {
            return Some(act(&member, route, new, &["channel.create"]));
        }
        let made = self.replica.as_person(&member, Method::POST, "/v1/channels", Some(new)).await;
        let path = format!("/v1/channels/{}", made.body["id"].as_str().unwrap());
        Some(match (method, route) {
            ("PATCH", "/v1/channels/{id}") => act(&member, path, json!({"name": "other"}), &["channel.update"]),
            ("PUT", "/v1/channels/{id}/config") => {
                act(&member, format!("{path}/config"), json!({ "config": config }), &["channel.rotate_config"])
            }
            ("DELETE", "/v1/channels/{id}") => act(&member, path, json!({}), &["channel.delete"]),
            _ => return None,
        })
    }

    async fn of_administrators(&self, method: &str, route: &str) -> Option<Act> {
        let (person, email) = self.person().await;
        let of = |rest: &str| format!("/v1/admin/users/{}{rest}", person.id);
        Some(match (method, route) {
            ("DELETE", "/v1/admin/teams/{id}") => {
                let team = self.replica.team().await;
                self.sandbox(team.id, "running").await;
                self.by_admin(format!("/v1/admin/teams/{}", team.id), json!({}), &["team.delete"])
            }
            ("PUT", "/v1/admin/teams/{id}/byoc") => {
                let team = self.replica.team().await;
                self.by_admin(format!("/v1/admin/teams/{}/byoc", team.id), json!({"enabled": true}), &["team.set_byoc"])
            }
            ("POST", "/v1/admin/users") => {
                self.by_admin(route, json!({"email": format!("new-{email}"), "name": "Ada"}), &["user.create"])
            }
            ("PUT", "/v1/admin/users/{id}/active") => {
                self.by_admin(of("/active"), json!({"active": false}), &["user.disable"])
            }
            ("PUT", "/v1/admin/users/{id}/admin") => {
                self.by_admin(of("/admin"), json!({"admin": true}), &["user.admin"])
            }
            ("POST", "/v1/admin/users/{id}/link") => self.by_admin(of("/link"), json!({}), &["user.link"]),
            _ => return None,
        })
    }

    /// The platform's own team's.
    async fn of_platform(&self, method: &str, route: &str) -> Option<Act> {
        let platform = self.replica.serving.app.store.platform_team().await.unwrap().unwrap();
        let sandbox = self.sandbox(platform, "running").await;
        let path = format!("{}?wait_sec=0", route.replace("{id}", sandbox.as_str()));
        Some(match (method, route) {
            // There is nothing of that name to begin with: nothing more comes of it.
            ("POST", "/v1/admin/builds") => {
                let body = json!({"name": "new", "base_template": "nothing", "recipe": ["RUN true"]});
                self.by_admin(route, body, &["build.create"])
            }
            ("POST", "/v1/admin/builds/{id}/cancel") => {
                let id = BuildId(uuid::Uuid::now_v7());
                self.sql(&format!(
                    "insert into builds (id, name, base_template, recipe, vcpus, memory_mib, disk_mib, skip_pre_post, state, total_steps,
                         attempts, lease_until)
                     values ('{}', 'old', 'minimal', '[]', 1, 512, 1024, true, 'running', 0, 1, now() + interval '1 h')",
                    id.0
                ))
                .await;
                self.by_admin(route.replace("{id}", &id.to_string()), json!({}), &["build.cancel"])
            }
            ("DELETE", "/v1/admin/templates/{id}") => {
                self.sql(&format!(
                    "insert into snapshots (id, team_id, name, sandbox_id, host_id, template, vcpus, memory_mib, disk_mib, default_user, state,
                         is_published)
                     values (gen_random_uuid(), '{}', 'old', '{sandbox}', '{}', 'minimal', 1, 512, 1024, '', 'ready', true)",
                    platform.0, self.host.0
                ))
                .await;
                self.by_admin("/v1/admin/templates/old", json!({}), &["snapshot.delete"])
            }
            ("POST", "/v1/admin/capsules") => self.by_admin(path, json!({"memory_mb": 512}), &["sandbox.create"]),
            ("DELETE", "/v1/admin/capsules/{id}") => self.by_admin(path, json!({}), &["sandbox.kill"]),
            ("POST", "/v1/admin/capsules/{id}/snapshot") => {
                self.by_admin(path, json!({"name": "published"}), &["sandbox.snapshot"])
            }
            _ => return None,
        })
    }

    async fn of_hosts(&self, method: &str, route: &str) -> Option<Act> {
        let csr =
            || CertificateParams::default().serialize_request(&KeyPair::generate().unwrap()).unwrap().pem().unwrap();
        let of = |id: &str| route.replace("{id}", id).replace("{tag}", "gpu");
        Some(match (method, route) {
            ("POST", "/v1/hosts") => self.by_admin(route, json!({"type": "regular"}), &["host.create"]),
            ("DELETE", "/v1/hosts/{id}") => self.by_admin(of(&self.new_host().await.0), json!({}), &["host.delete"]),
            ("POST", "/v1/hosts/{id}/token") => self.by_admin(of(&self.new_host().await.0), json!({}), &["host.token"]),
            ("POST", "/v1/hosts/{id}/drain") => {
                self.by_admin(of(&self.replica.host(4096).await.to_string()), json!({}), &["host.drain"])
            }
            ("POST", "/v1/hosts/{id}/undrain") => {
                let host = self.replica.host(4096).await;
                self.sql(&format!("update hosts set state = 'draining' where id = '{}'", host.0)).await;
                self.by_admin(of(&host.to_string()), json!({}), &["host.undrain"])
            }
            ("POST", "/v1/hosts/{id}/unfence") => {
                let host = self.replica.host(4096).await;
                self.sql(&format!("update hosts set state = 'fenced' where id = '{}'", host.0)).await;
                self.by_admin(of(&host.to_string()), json!({}), &["host.unfence"])
            }
            ("POST", "/v1/hosts/{id}/tags") => {
                self.by_admin(of(&self.new_host().await.0), json!({"tag": "gpu"}), &["host.tag"])
            }
            ("DELETE", "/v1/hosts/{id}/tags/{tag}") => {
                self.by_admin(of(&self.tagged().await), json!({}), &["host.untag"])
            }
            ("POST", "/v1/hosts/register") => {
                let (_, token) = self.new_host().await;
                let body = json!({"token": token, "address": "127.0.0.1:50051", "csr_pem": csr(), "arch": "x86_64", "cpu_cores": 2,
                    "memory_mb": 4096, "disk_gb": 20, "isolation": "emulation", "agent_version": "0.1.0", "templates": ["minimal"]});
                Self::by_nobody(route, body, &["host.register"])
            }
            ("POST", "/v1/hosts/{id}/renew") => {
                let host = self.replica.host(4096).await;
                let who = Caller::Bearer(self.replica.token_of_host(host));
                let body = json!({"csr_pem": csr(), "address": "127.0.0.1:50052"});
                Act { who, path: of(&host.to_string()), body: Some(body), records: &["host.renew"] }
            }
            _ => return None,
        })
    }

    async fn of_sandboxes(&self, method: &str, route: &str) -> Option<Act> {
        let Team { id: team, owner, .. } = self.replica.team().await;
        let observed = if route.ends_with("/resume") { "paused" } else { "running" };
        let sandbox = self.sandbox(team, observed).await;
        let path = format!("{}?wait_sec=0", route.replace("{id}", sandbox.as_str()));
        Some(match (method, route) {
            ("POST", "/v1/sandboxes") => act(&owner, path, json!({"memory_mb": 512}), &["sandbox.create"]),
            ("DELETE", "/v1/sandboxes/{id}") => act(&owner, path, json!({}), &["sandbox.kill"]),
            ("POST", "/v1/sandboxes/{id}/pause") => act(&owner, path, json!({}), &["sandbox.pause"]),
            ("POST", "/v1/sandboxes/{id}/resume") => act(&owner, path, json!({}), &["sandbox.resume"]),
            ("POST", "/v1/sandboxes/{id}/fork") => act(&owner, path, json!({}), &["sandbox.fork"]),
            ("PATCH", "/v1/sandboxes/{id}") => {
                act(&owner, path, json!({"metadata": {"a": "b"}}), &["sandbox.metadata"])
            }
            ("POST", "/v1/sandboxes/{id}/timeout") => {
                act(&owner, path, json!({"timeout_sec": 77}), &["sandbox.timeout"])
            }
            ("POST", "/v1/snapshots") => {
                let body = json!({"sandbox_id": sandbox.as_str(), "name": "kept"});
                act(&owner, path, body, &["sandbox.snapshot"])
            }
            ("DELETE", "/v1/snapshots/{id}") => {
                self.sql(&format!(
                    "insert into snapshots (id, team_id, name, sandbox_id, host_id, template, vcpus, memory_mib, disk_mib, default_user, state)
                     values (gen_random_uuid(), '{}', 'old', '{sandbox}', '{}', 'minimal', 1, 512, 1024, '', 'ready')",
                    team.0, self.host.0
                ))
                .await;
                act(&owner, "/v1/snapshots/old", json!({}), &["snapshot.delete"])
            }
            _ => return None,
        })
    }

    async fn call(&self, method: &str, act: &Act) -> Answer {
        let who = match &act.who {
            Caller::Nobody => Who::Nobody,
            Caller::Bearer(token) => Who::Bearer(token),
        };
        self.replica.call(who, method.parse().unwrap(), &act.path, act.body.clone()).await
    }

    /// Until the mail of what was prepared is delivered. Creates on a host that does not answer fail by themselves, which raises a revision:
    /// they have failed already.
    async fn quiet(&self) {
        self.sql("update sandboxes set observed = 'failed' where observed = 'starting'").await;
        let began = Instant::now();
        while self.sql("select count(*) from outbox").await != "0" {
            assert!(began.elapsed() < Duration::from_secs(30), "the outbox is emptied");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// What was written down since, with the request that it is of. What the platform notices by itself is nobody's act.
    async fn records(&self, since: &str) -> Vec<(String, String)> {
        let rows = self
            .sql(&format!("select action, request_id from audit where id > {since} and action not like 'silence_brake.%' and actor_id <> 'builds' order by id"))
            .await;
        let row = |line: &str| line.split_once('|').map(|(action, id)| (action.to_owned(), id.to_owned())).unwrap();
        rows.lines().map(row).collect()
    }
}

/// Lines that are in one alone.
fn differences<'a>(before: &'a str, after: &'a str) -> Vec<&'a str> {
    let lines = |text: &'a str| text.split('|').collect::<std::collections::BTreeSet<_>>();
    lines(before).symmetric_difference(&lines(after)).copied().collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_change_is_written_down_with_the_change_itself() {
    let replica = Replica::start().await;
    let host = replica.host(1 << 20).await;
    let scene = Scene { replica, host };
    scene
        .sql("create function refuse() returns trigger language plpgsql as $$ begin raise exception 'no audit'; end $$")
        .await;
    let mut count = 0;
    for (method, route, _) in TABLE {
        if method == "GET" {
            continue;
        }
        let is_unrecorded = UNRECORDED.iter().any(|(m, r, why)| (*m, *r) == (method, route) && !why.is_empty());
        let Some(act) = scene.prepared(method, route).await else {
            assert!(is_unrecorded, "{method} {route}: say what it writes down, or why nothing");
            continue;
        };
        assert!(!is_unrecorded, "{method} {route}: is it written down or not?");
        let is_behind = route == "/v1/me/password/reset";

        scene.quiet().await;
        scene.sql("create trigger refuse before insert on audit for each row execute function refuse()").await;
        let before = scene.sql(STATE).await;
        let refused = scene.call(method, &act).await;
        if is_behind {
            // The answer is the same in any case; the change is made, or not, behind it.
            tokio::time::sleep(Duration::from_millis(500)).await;
        } else {
            assert_eq!(refused.error(), (500, "internal_error"), "{method} {route}: {}", refused.body);
        }
        let after = scene.sql(STATE).await;
        let changed = differences(&before, &after);
        assert!(changed.is_empty(), "{method} {route} changed something without writing it down: {changed:?}");
        scene.sql("drop trigger refuse on audit").await;

        let since = scene.sql("select coalesce(max(id), 0) from audit").await;
        let done = scene.call(method, &act).await;
        assert!(done.status.is_success(), "{method} {route}: {} {}", done.status, done.body);
        let began = Instant::now();
        while is_behind && scene.records(&since).await.is_empty() && began.elapsed() < Duration::from_secs(10) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let records = scene.records(&since).await;
        let actions: Vec<&str> = records.iter().map(|(action, _)| action.as_str()).collect();
        assert_eq!(actions, act.records, "{method} {route}");
        // Hosts' own calls say who they are by their token, and have no request that anybody asks about.
        if !actions[0].starts_with("host.re") {
            let id = done.headers["x-request-id"].to_str().unwrap();
            assert!(records.iter().all(|(_, of)| of == id), "{method} {route}: {records:?} of {id}");
        }
        assert_ne!(scene.sql(STATE).await, before, "{method} {route} changed nothing: the test would not see it");
        count += 1;
    }
    let mutating = TABLE.iter().filter(|(method, _, _)| *method != "GET").count();
    assert_eq!(count + UNRECORDED.len(), mutating);
}
