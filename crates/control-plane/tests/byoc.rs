//! Hosts of a team's own: who may have them, who sees them, what is placed on them and what never is, and what their teams are told.

mod replica;

use std::time::{Duration, Instant};

use api::host::host_name;
use control_plane::capacity::Capacity;
use model::ids::{HostId, TeamId};
use rcgen::{CertificateParams, KeyPair};
use replica::{Answer, Person, Replica, Team, Who};
use reqwest::Method;
use serde_json::{Value, json};
use testkit::postgres::Database;

const NO_TEAM: TeamId = TeamId(uuid::Uuid::nil());

impl Replica {
    async fn let_have_hosts(&self, team: TeamId) -> Answer {
        self.as_admin(Method::PUT, &format!("/v1/admin/teams/{team}/byoc"), Some(json!({"enabled": true}))).await
    }

    /// A team that may have hosts.
    async fn byoc_team(&self) -> Team {
        let team = self.team().await;
        assert_eq!(self.let_have_hosts(team.id).await.status, 204);
        team
    }

    async fn add_host(&self, by: &Person, team: TeamId) -> Answer {
        let body =
            json!({"type": "byoc", "team_id": team.to_string(), "provider": "own", "availability_zone": "cellar"});
        self.as_person(by, Method::POST, "/v1/hosts", Some(body)).await
    }

    /// A host of a team that nobody answers for.
    async fn host_of(&self, team: &Team, memory_mb: i64) -> HostId {
        let made = self.add_host(&team.owner, team.id).await;
        assert_eq!(made.status, 201, "{}", made.body);
        let id: HostId = made.body["host"]["id"].as_str().unwrap().parse().unwrap();
        self.database
            .sql(&format!(
                "update hosts set state = 'active', address = '127.0.0.1:1', arch = 'x86_64', cpu_cores = 64, memory_mb = {memory_mb},
                 disk_gb = 100, isolation = 'fake', agent_version = '0', templates = '{{minimal,own}}', disk_free_mb = 100000,
                 last_heartbeat_at = now() where id = '{}'",
                id.0
            ))
            .await;
        id
    }

    async fn create(&self, by: &Person, body: Value) -> Answer {
        self.as_person(by, Method::POST, "/v1/sandboxes?wait_sec=0", Some(body)).await
    }

    async fn sandbox_of(&self, team: TeamId, host: HostId) -> String {
        let id = model::ids::SandboxId::from_random(rand::random()).to_string();
        self.database
            .sql(&format!(
                "insert into sandboxes (id, team_id, template, vcpus, memory_mib, disk_mib, desired, observed, host_id, host_epoch)
                 values ('{id}', '{}', 'minimal', 1, 512, 5120, 'running', 'running', '{}', 1)",
                team.0, host.0
            ))
            .await;
        id
    }

    async fn count(&self, of: &str) -> i64 {
        self.database.sql(&format!("select count(*) from {of}")).await.trim().parse().unwrap()
    }
}

fn ids(list: &Value) -> Vec<String> {
    let mut ids: Vec<String> =
        list.as_array().unwrap().iter().map(|one| one["id"].as_str().unwrap().to_owned()).collect();
    ids.sort();
    ids
}

fn sorted(hosts: &[HostId]) -> Vec<String> {
    let mut ids: Vec<String> = hosts.iter().map(ToString::to_string).collect();
    ids.sort();
    ids
}

async fn until(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let began = Instant::now();
    while !condition().await {
        assert!(began.elapsed() < Duration::from_secs(30), "{what} did not come");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_administrator_lets_a_team_have_hosts_and_there_is_no_way_back() {
    let replica = Replica::start().await;
    let team = replica.team().await;
    let path = format!("/v1/admin/teams/{}/byoc", team.id);
    let shown = || async {
        let own = replica.as_person(&team.owner, Method::GET, &format!("/v1/teams/{}", team.id), None).await;
        let list = replica.as_person(&team.member, Method::GET, "/v1/teams", None).await;
        let all = replica.as_admin(Method::GET, "/v1/admin/teams", None).await;
        let of_all = all.body["teams"].as_array().unwrap().iter().find(|one| one["id"] == json!(team.id.to_string()));
        let of_all = of_all.unwrap().clone();
        (own.body["team"]["is_byoc"] == true, list.body[0]["is_byoc"] == true, of_all["is_byoc"] == true)
    };
    assert_eq!(shown().await, (false, false, false));
    assert_eq!(replica.add_host(&team.owner, team.id).await.error(), (403, "forbidden"), "not yet");
    let by_owner = replica.as_person(&team.owner, Method::PUT, &path, Some(json!({"enabled": true}))).await;
    assert_eq!(by_owner.error(), (403, "forbidden"));
    let off = replica.as_admin(Method::PUT, &path, Some(json!({"enabled": false}))).await;
    assert_eq!(off.error(), (400, "invalid_request"));
    assert_eq!(replica.let_have_hosts(NO_TEAM).await.error(), (404, "not_found"));
    let platforms = replica.as_admin(Method::GET, "/v1/teams", None).await.body[0]["id"].as_str().unwrap().to_owned();
    let refused = replica.let_have_hosts(platforms.parse().unwrap()).await;
    assert_eq!(refused.error(), (403, "forbidden"), "the platform's own team");

    for _ in 0..3 {
        assert_eq!(replica.let_have_hosts(team.id).await.status, 204);
    }
    assert_eq!(shown().await, (true, true, true));
    assert_eq!(replica.audited("team.set_byoc").await, 1, "once");
    let off = replica.as_admin(Method::PUT, &path, Some(json!({"enabled": false}))).await;
    assert_eq!(off.error(), (400, "invalid_request"));
    assert_eq!(shown().await, (true, true, true));
}

#[tokio::test(flavor = "multi_thread")]
async fn owners_and_admins_add_hosts_of_their_team() {
    let replica = Replica::start().await;
    let (ours, theirs) = (replica.byoc_team().await, replica.byoc_team().await);
    let made = replica.add_host(&ours.owner, ours.id).await;
    assert_eq!(made.status, 201, "{}", made.body);
    let host = &made.body["host"];
    assert_eq!(
        (&host["type"], &host["team_id"], &host["team_name"], &host["provider"], &host["status"]),
        (&json!("byoc"), &json!(ours.id.to_string()), &json!("ours"), &json!("own"), &json!("pending"))
    );
    assert!(made.body["registration_token"].as_str().is_some_and(|token| token.len() > 20));
    assert_eq!(replica.add_host(&ours.admin, ours.id).await.status, 201);
    assert_eq!(replica.add_host(&ours.member, ours.id).await.error(), (403, "forbidden"));
    assert_eq!(replica.add_host(&ours.owner, theirs.id).await.error(), (404, "not_found"));
    assert_eq!(replica.add_host(&ours.owner, NO_TEAM).await.error(), (404, "not_found"));
    let regular = replica.as_person(&ours.owner, Method::POST, "/v1/hosts", Some(json!({"type": "regular"}))).await;
    assert_eq!(regular.error(), (403, "forbidden"));
    let body = json!({"type": "byoc", "team_id": ours.id.to_string()});
    let by_key = replica.as_team(Method::POST, "/v1/hosts", Some(body.clone())).await;
    assert_eq!(by_key.error(), (403, "forbidden"), "hosts are for people");
    assert_eq!(replica.as_admin(Method::POST, "/v1/hosts", Some(body.clone())).await.status, 201);
    let without = json!({"type": "byoc", "team_id": NO_TEAM.to_string()});
    assert_eq!(replica.as_admin(Method::POST, "/v1/hosts", Some(without)).await.error(), (404, "not_found"));
    assert_eq!(replica.count("hosts").await, 3);

    // They are rows that a team makes by itself.
    replica
        .database
        .sql(&format!(
            "insert into hosts (id, kind, team_id, created_by) select gen_random_uuid(), 'byoc', '{}', 'test' from generate_series(1, 256)",
            theirs.id.0
        ))
        .await;
    assert_eq!(replica.add_host(&theirs.owner, theirs.id).await.error(), (429, "quota_exceeded"));

    // Repeated, it is one host and one token.
    let again = || {
        let request = replica.http.request(Method::POST, format!("{}/v1/hosts", replica.url));
        replica.send(Who::Bearer(&ours.owner.token), request.header("idempotency-key", "k").json(&body))
    };
    let (first, second) = (again().await, again().await);
    assert_eq!(first.status, 201, "{}", first.body);
    assert_eq!(first.body, second.body);

    // What is done with it is the team's to know: its admins, not its members, and not the platform.
    let log = async |by: &Person| {
        let path = "/v1/audit-logs?resource_type=host";
        replica.as_person(by, Method::GET, path, None).await.body["items"].as_array().unwrap().clone()
    };
    let seen = log(&ours.admin).await;
    assert_eq!(seen.len(), 4, "{seen:?}");
    assert!(seen.iter().all(|entry| entry["action"] == "create" && entry["scope"] == "admin"), "{seen:?}");
    assert!(log(&ours.member).await.is_empty() && log(&theirs.owner).await.is_empty());
    let platforms = replica.as_admin(Method::GET, "/v1/admin/audit-logs?resource_type=host", None).await;
    assert_eq!(platforms.body["items"], json!([]));
}

#[tokio::test(flavor = "multi_thread")]
async fn everybody_sees_the_hosts_that_are_theirs_to_see() {
    let replica = Replica::start().await;
    let (ours, theirs) = (replica.byoc_team().await, replica.byoc_team().await);
    let platforms = replica.host(4096).await;
    let (mine, other) = (replica.host_of(&ours, 4096).await, replica.host_of(&theirs, 4096).await);
    let list = async |by: &Person| ids(&replica.as_person(by, Method::GET, "/v1/hosts", None).await.body);
    for person in [&ours.owner, &ours.admin, &ours.member] {
        assert_eq!(list(person).await, sorted(&[mine]));
    }
    assert_eq!(list(&theirs.member).await, sorted(&[other]));
    let all = replica.as_admin(Method::GET, "/v1/hosts", None).await.body;
    assert_eq!(ids(&all), sorted(&[platforms, mine, other]));
    let named = all.as_array().unwrap().iter().find(|host| host["id"] == json!(mine.to_string())).unwrap();
    assert_eq!((&named["type"], &named["team_name"]), (&json!("byoc"), &json!("ours")));
    let regular = all.as_array().unwrap().iter().find(|host| host["id"] == json!(platforms.to_string())).unwrap();
    assert!(regular["type"] == "regular" && regular.get("team_id").is_none(), "{regular}");

    // Whoever decides in two teams decides about the hosts of both, whatever team the session acts in.
    replica.join(theirs.id, ours.owner.id, model::access::Role::Admin).await;
    let path = format!("/v1/hosts/{other}/drain");
    assert_eq!(replica.as_person(&ours.owner, Method::POST, &path, None).await.status, 200);
    let path = format!("/v1/hosts/{mine}/drain");
    assert_eq!(replica.as_person(&theirs.owner, Method::POST, &path, None).await.error(), (404, "not_found"));
    assert_eq!(replica.as_person(&ours.member, Method::POST, &path, None).await.error(), (403, "forbidden"));
    // And with the place in the team goes the right.
    replica.database.sql(&format!("delete from team_members where user_id = '{}'", ours.admin.id.0)).await;
    assert_eq!(replica.as_person(&ours.admin, Method::POST, &path, None).await.error(), (404, "not_found"));
}

/// From the record to the removal, by the team alone.
#[tokio::test(flavor = "multi_thread")]
async fn a_team_looks_after_its_host_by_itself() {
    let replica = Replica::start().await;
    let team = replica.byoc_team().await;
    let host = replica.host_of(&team, 4096).await;
    let of = |rest: &str| format!("/v1/hosts/{host}{rest}");
    let by = async |method: Method, rest: &str, body: Option<Value>| {
        replica.as_person(&team.admin, method, &of(rest), body).await
    };
    assert_eq!(by(Method::POST, "/tags", Some(json!({"tag": "gpu"}))).await.status, 204);
    assert_eq!(replica.as_person(&team.member, Method::GET, &of("/tags"), None).await.body, json!(["gpu"]));
    assert_eq!(by(Method::DELETE, "/tags/gpu", None).await.status, 204);
    assert_eq!(by(Method::POST, "/drain", None).await.body["status"], "draining");
    assert_eq!(replica.create(&team.owner, json!({})).await.error(), (503, "no_hosts_available"));
    assert_eq!(by(Method::POST, "/undrain", None).await.body["status"], "online");
    replica.database.sql("update hosts set state = 'fenced'").await;
    assert_eq!(by(Method::POST, "/unfence", None).await.body["status"], "online");
    assert_eq!(by(Method::POST, "/token", None).await.error(), (409, "invalid_state"));
    let sandbox = replica.sandbox_of(team.id, host).await;
    let preview = by(Method::GET, "/delete-preview", None).await.body;
    assert_eq!(preview["sandbox_ids"], json!([sandbox]));
    assert_eq!(by(Method::DELETE, "", None).await.error(), (409, "host_has_sandboxes"));
    assert_eq!(by(Method::DELETE, "?force=true", None).await.status, 204);
    assert_eq!(by(Method::GET, "", None).await.error(), (404, "not_found"));
    let shown = replica.as_person(&team.owner, Method::GET, &format!("/v1/sandboxes/{sandbox}"), None).await.body;
    assert_eq!((&shown["status"], &shown["reason"]), (&json!("stopped"), &json!("host_removed")));
    // A deletion of the host takes its token's power with it; a new one has a new token.
    let waiting = replica.add_host(&team.owner, team.id).await.body;
    let id = waiting["host"]["id"].as_str().unwrap();
    let again = replica.as_person(&team.owner, Method::POST, &format!("/v1/hosts/{id}/token"), None).await;
    assert_eq!(again.status, 201, "{}", again.body);
    assert_ne!(again.body["registration_token"], waiting["registration_token"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn sandboxes_go_to_the_teams_own_hosts_and_nobody_elses_there() {
    let replica = Replica::start().await;
    let (ours, plain) = (replica.byoc_team().await, replica.team().await);
    let none = replica.create(&ours.owner, json!({})).await;
    assert_eq!(none.error(), (503, "no_hosts_available"), "{}", none.body);
    assert_eq!(none.body["error"]["details"]["short"], json!(["team_hosts"]), "{}", none.body);
    // The platform's host has room, and is none of theirs.
    let platforms = replica.host(65_536).await;
    let none = replica.create(&ours.owner, json!({})).await;
    assert_eq!(none.body["error"]["details"]["short"], json!(["team_hosts"]), "{}", none.body);

    let own = replica.host_of(&ours, 2048).await;
    for _ in 0..4 {
        let made = replica.create(&ours.owner, json!({"memory_mb": 512})).await;
        assert_eq!(made.body["host_id"], json!(own.to_string()), "{}", made.body);
    }
    let full = replica.create(&ours.owner, json!({"memory_mb": 512})).await;
    assert_eq!(
        (full.error(), &full.body["error"]["details"]["short"]),
        ((503, "no_hosts_available"), &json!(["memory"]))
    );
    for _ in 0..4 {
        let made = replica.create(&plain.owner, json!({"memory_mb": 512})).await;
        assert_eq!(made.body["host_id"], json!(platforms.to_string()), "{}", made.body);
    }
    // Without the platform's host there is none for the others, however empty the team's is.
    replica.database.sql("update sandboxes set desired = 'killed', observed = 'killed'").await;
    replica.database.sql(&format!("update hosts set state = 'draining' where id = '{}'", platforms.0)).await;
    let none = replica.create(&plain.owner, json!({})).await;
    assert_eq!(none.body["error"]["details"]["short"], json!(["hosts"]), "{}", none.body);
    assert_eq!(replica.create(&ours.owner, json!({})).await.status, 202);

    // What a team's host says it has is nothing to others: neither offered to them, nor a name that they may not give.
    replica.database.sql(&format!("update hosts set state = 'active' where id = '{}'", platforms.0)).await;
    let names = async |by: &Person| {
        let list = replica.as_person(by, Method::GET, "/v1/snapshots?type=base", None).await.body;
        list.as_array().unwrap().iter().map(|one| one["name"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(names(&ours.member).await, ["minimal", "own"]);
    assert_eq!(names(&plain.member).await, ["minimal"]);
    let unknown = replica.create(&plain.owner, json!({"template": "own"})).await;
    assert_eq!(unknown.error(), (404, "not_found"));
    assert_eq!(replica.create(&ours.owner, json!({"template": "own"})).await.status, 202);
    let sandbox = replica.sandbox_of(plain.id, platforms).await;
    let body = json!({"sandbox_id": sandbox, "name": "own"});
    let taken = replica.as_person(&plain.owner, Method::POST, "/v1/snapshots?wait_sec=0", Some(body)).await;
    assert_eq!(taken.status, 202, "{}", taken.body);
    let ours_too = replica.sandbox_of(ours.id, own).await;
    let body = json!({"sandbox_id": ours_too, "name": "own"});
    let reserved = replica.as_person(&ours.owner, Method::POST, "/v1/snapshots?wait_sec=0", Some(body)).await;
    assert_eq!(reserved.error(), (409, "name_reserved"));
}

/// What a team had before it got hosts of its own stays where it is, and goes on there.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_on_the_platforms_hosts_stays_there() {
    let replica = Replica::start().await;
    let team = replica.team().await;
    let platforms = replica.host(65_536).await;
    let sandbox = replica.sandbox_of(team.id, platforms).await;
    replica.database.sql("update sandboxes set desired = 'paused', observed = 'paused'").await;
    replica.let_have_hosts(team.id).await;
    let own = replica.host_of(&team, 65_536).await;
    let path = format!("/v1/sandboxes/{sandbox}/resume?wait_sec=0");
    let resumed = replica.as_person(&team.owner, Method::POST, &path, None).await;
    assert_eq!((resumed.status.as_u16(), &resumed.body["host_id"]), (202, &json!(platforms.to_string())));
    let forked = replica.sandbox_of(team.id, platforms).await;
    let path = format!("/v1/sandboxes/{forked}/fork?wait_sec=0");
    let forked = replica.as_person(&team.owner, Method::POST, &path, Some(json!({}))).await;
    assert_eq!(forked.status, 202, "{}", forked.body);
    let there = format!("sandboxes where host_id = '{}'", platforms.0);
    assert_eq!(replica.count(&there).await, 3);
    assert_eq!(replica.create(&team.owner, json!({})).await.body["host_id"], json!(own.to_string()));
}

/// A program of before knows nothing of whose hosts are: the database itself refuses.
#[tokio::test(flavor = "multi_thread")]
async fn no_program_puts_a_foreign_sandbox_onto_a_teams_host() {
    let replica = Replica::start().await;
    let (ours, plain) = (replica.byoc_team().await, replica.team().await);
    let (own, platforms) = (replica.host_of(&ours, 4096).await, replica.host(4096).await);
    let row = |team: TeamId, host: HostId| {
        format!(
            "insert into sandboxes (id, team_id, template, vcpus, memory_mib, disk_mib, desired, observed, host_id)
             values ('{}', '{}', 'minimal', 1, 512, 5120, 'running', 'running', '{}')",
            model::ids::SandboxId::from_random(rand::random()),
            team.0,
            host.0
        )
    };
    // Each in a block that swallows what is refused.
    let tried = async |statement: String| {
        let before = replica.count("sandboxes where host_id is not null").await;
        let block = format!("do $$ begin {statement}; exception when check_violation then null; end $$");
        replica.database.sql(&block).await;
        replica.count("sandboxes where host_id is not null").await - before
    };
    assert_eq!(tried(row(plain.id, own)).await, 0, "another team's onto a team's host");
    assert_eq!(tried(row(ours.id, own)).await, 1);
    assert_eq!(tried(row(plain.id, platforms)).await, 1);
    let moved = format!("update sandboxes set host_id = '{}' where team_id = '{}'", own.0, plain.id.0);
    tried(moved).await;
    assert_eq!(replica.count(&format!("sandboxes where host_id = '{}'", own.0)).await, 1);
    for wrong in [
        format!("update hosts set team_id = null where id = '{}'", own.0),
        format!("update hosts set team_id = '{}' where id = '{}'", ours.id.0, platforms.0),
    ] {
        tried(wrong).await;
    }
    assert_eq!(replica.count("hosts where (kind = 'byoc') <> (team_id is not null)").await, 0);
}

/// Its team hears of it once when a host goes, and once when it is back, of two replicas that look; the platform is not held up by it.
#[tokio::test(flavor = "multi_thread")]
async fn a_team_is_told_once_of_a_host_that_goes_and_comes() {
    let capacity = Capacity { silence_grace_sec: Some(0), ..Capacity::default() };
    let replica = Replica::with(Database::new().await, capacity).await;
    let (other, _) = replica.another().await;
    let team = replica.byoc_team().await;
    let platforms = replica.host(4096).await;
    let mut hosts = Vec::new();
    for _ in 0..4 {
        hosts.push(replica.host_of(&team, 4096).await);
    }
    let heard = async |sec: i64| {
        let all = format!("update hosts set last_heartbeat_at = now() - interval '{sec} s' where team_id is not null");
        replica.database.sql(&all).await;
    };
    for round in 1..=2 {
        heard(100).await;
        until("the word that they went", async || replica.audited("host.marked_down").await >= 4 * round).await;
        // The other replica has looked as well.
        tokio::time::sleep(Duration::from_secs(6)).await;
        assert_eq!(replica.audited("host.marked_down").await, 4 * round);
        assert_eq!(replica.audited("host.marked_up").await, 4 * (round - 1));
        heard(0).await;
        until("the word that they are back", async || replica.audited("host.marked_up").await >= 4 * round).await;
    }
    tokio::time::sleep(Duration::from_secs(6)).await;
    assert_eq!((replica.audited("host.marked_down").await, replica.audited("host.marked_up").await), (8, 8));
    // Four of five fell silent together, and that was their team's affair.
    assert_eq!(replica.audited("silence_brake.on").await, 0);
    let silence = replica.as_admin(Method::GET, "/v1/hosts/silence", None).await.body;
    assert_eq!((&silence["hosts"], &silence["silent"]), (&json!(1), &json!(0)));
    // A host of the platform leaves no such word.
    replica
        .database
        .sql(&format!("update hosts set last_heartbeat_at = now() - interval '100 s' where id = '{}'", platforms.0))
        .await;
    tokio::time::sleep(Duration::from_secs(6)).await;
    assert_eq!(replica.audited("host.marked_down").await, 8);
    // All members see it, and nothing else of hosts.
    let log = replica.as_person(&team.member, Method::GET, "/v1/audit-logs?resource_type=host", None).await.body;
    let items = log["items"].as_array().unwrap();
    assert_eq!(items.len(), 16, "{log}");
    let told = |verb: &str| items.iter().find(|entry| entry["action"] == verb).unwrap();
    let of = |entry: &Value| {
        ["scope", "status", "actor_type"].map(|field| entry[field].as_str().unwrap_or_default().to_owned())
    };
    assert_eq!(of(told("marked_down")), ["team", "error", "system"]);
    assert_eq!(of(told("marked_up")), ["team", "success", "system"]);
    other.stop().await;
}

/// Where a team's host is, its team says; who it is, it cannot say.
#[tokio::test(flavor = "multi_thread")]
async fn a_teams_host_is_certified_for_its_own_name_wherever_it_is() {
    let replica = Replica::start().await;
    let team = replica.byoc_team().await;
    let made = replica.add_host(&team.owner, team.id).await.body;
    let key = KeyPair::generate().unwrap();
    let csr = CertificateParams::default().serialize_request(&key).unwrap().pem().unwrap();
    let facts = json!({"arch": "x86_64", "cpu_cores": 2, "memory_mb": 4096, "disk_gb": 20, "isolation": "emulation",
        "agent_version": "0.1.0", "templates": ["minimal"]});
    let body = |address: &str| {
        let mut body = facts.clone();
        body["token"] = made["registration_token"].clone();
        body["csr_pem"] = json!(csr);
        body["address"] = json!(address);
        body
    };
    let id: HostId = made["host"]["id"].as_str().unwrap().parse().unwrap();
    let reserved = body(&format!("{}:50051", host_name(id)));
    let refused = replica.call(Who::Nobody, Method::POST, "/v1/hosts/register", Some(reserved)).await;
    assert_eq!(refused.error(), (400, "invalid_request"));
    let names = |pem: &Value| {
        let (_, pem) = x509_parser::pem::parse_x509_pem(pem.as_str().unwrap().as_bytes()).unwrap();
        let certificate = pem.parse_x509().unwrap();
        let names = certificate.subject_alternative_name().unwrap().unwrap();
        let names = names.value.general_names.iter().map(ToString::to_string);
        names.filter(|name| name.starts_with("DNSName")).collect::<Vec<_>>()
    };
    let joined = replica.call(Who::Nobody, Method::POST, "/v1/hosts/register", Some(body("127.0.0.1:50051"))).await;
    assert_eq!(joined.status, 201, "{}", joined.body);
    let own = vec![format!("DNSName({})", host_name(id))];
    assert_eq!(names(&joined.body["cert_pem"]), own);
    let token = joined.body["token"].as_str().unwrap();
    let again = json!({"csr_pem": csr, "address": "127.0.0.1:50052"});
    let path = format!("/v1/hosts/{id}/renew");
    let renewed = replica.call(Who::Bearer(token), Method::POST, &path, Some(again)).await;
    assert_eq!(renewed.status, 200, "{}", renewed.body);
    assert_eq!(names(&renewed.body["cert_pem"]), own);
    // What it does itself is its team's to know, too.
    let log = replica.as_person(&team.owner, Method::GET, "/v1/audit-logs?resource_type=host", None).await.body;
    let actions: Vec<&str> =
        log["items"].as_array().unwrap().iter().map(|entry| entry["action"].as_str().unwrap()).collect();
    assert_eq!(actions, ["renew", "register", "create"]);
}

/// What a team's host says of other teams' sandboxes, or of other hosts', changes nothing of theirs.
#[tokio::test(flavor = "multi_thread")]
async fn the_word_of_a_teams_host_is_about_its_own() {
    let replica = Replica::start().await;
    let (ours, theirs) = (replica.byoc_team().await, replica.byoc_team().await);
    let (own, other, platforms) =
        (replica.host_of(&ours, 4096).await, replica.host_of(&theirs, 4096).await, replica.host(4096).await);
    let victims = [
        replica.sandbox_of(theirs.id, other).await,
        replica.sandbox_of(theirs.id, platforms).await,
        replica.sandbox_of(ours.id, platforms).await,
    ];
    let rows = "select id, desired, observed, revision, reason, incarnation, absent_since, idle_since from sandboxes order by id";
    let before = replica.database.sql(rows).await;
    let said: Vec<Value> = victims
        .iter()
        .map(|id| json!({"id": id, "observed": "failed", "revision": 9, "incarnation": "x", "reason": "x", "idle_sec": 100_000}))
        .collect();
    let beat = json!({"epoch": 1, "sequence": 1, "agent_run": "a", "memory_free_mb": 1000, "disk_free_mb": 10_000,
        "complete": true, "sandboxes": said, "facts": {"arch": "x86_64", "cpu_cores": 2, "memory_mb": 4096, "disk_gb": 20,
            "isolation": "fake", "agent_version": "0.1.0", "templates": ["minimal", "bait"]}});
    let jwt = replica.token_of_host(own);
    let path = |host: HostId| format!("/v1/hosts/{host}/heartbeat");
    let taken = replica.call(Who::Bearer(&jwt), Method::POST, &path(own), Some(beat.clone())).await;
    assert_eq!(taken.status, 200, "{}", taken.body);
    assert!(taken.body.get("idle_timeouts").is_none(), "{}", taken.body);
    assert_eq!(replica.database.sql(rows).await, before);
    for foreign in [other, platforms] {
        let refused = replica.call(Who::Bearer(&jwt), Method::POST, &path(foreign), Some(beat.clone())).await;
        assert_eq!(refused.error(), (403, "forbidden"));
    }
    // It is no alarm of the platform's what a team's host claims to have.
    let numbers = replica.serving.app.store.numbers().await.unwrap();
    assert_eq!(numbers.unclaimed, 0);
    assert_eq!((numbers.hosts, numbers.team_hosts), (vec![("active".to_owned(), 1)], vec![("active".to_owned(), 2)]));
    let preview = replica.as_person(&ours.owner, Method::GET, &format!("/v1/hosts/{own}/delete-preview"), None).await;
    assert_eq!(preview.body["unclaimed"].as_array().unwrap().len(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_team_goes_without_hosts_or_with_them() {
    let replica = Replica::start().await;
    let (team, other) = (replica.byoc_team().await, replica.byoc_team().await);
    let (own, others) = (replica.host_of(&team, 4096).await, replica.host_of(&other, 4096).await);
    let platforms = replica.host(4096).await;
    let on_own = replica.sandbox_of(team.id, own).await;
    let elsewhere = replica.sandbox_of(team.id, platforms).await;
    let state = async |id: &str| {
        replica.database.sql(&format!("select desired, host_id is null from sandboxes where id = '{id}'")).await
    };
    let empty = replica.byoc_team().await;
    let waiting = replica.add_host(&empty.owner, empty.id).await.body["host"]["id"].as_str().unwrap().to_owned();
    let path = format!("/v1/teams/{}", empty.id);
    let refused = replica.as_person(&empty.owner, Method::DELETE, &path, None).await;
    assert_eq!(refused.error(), (409, "team_not_empty"));
    let removed = replica.as_person(&empty.owner, Method::DELETE, &format!("/v1/hosts/{waiting}"), None).await;
    assert_eq!(removed.status, 204);
    assert_eq!(replica.as_person(&empty.owner, Method::DELETE, &path, None).await.status, 204);
    assert_eq!(replica.let_have_hosts(empty.id).await.error(), (404, "not_found"));

    let listed = replica.as_admin(Method::GET, "/v1/admin/teams", None).await.body;
    let shown = listed["teams"].as_array().unwrap().iter().find(|one| one["id"] == json!(team.id.to_string())).unwrap();
    assert_eq!(shown["host_count"], 1);
    let jwt = replica.token_of_host(own);
    let gone = replica.as_admin(Method::DELETE, &format!("/v1/admin/teams/{}", team.id), None).await;
    assert_eq!(gone.status, 204, "{}", gone.body);
    let hosts = ids(&replica.as_admin(Method::GET, "/v1/hosts", None).await.body);
    assert_eq!(hosts, sorted(&[others, platforms]));
    assert_eq!((state(&on_own).await.trim(), state(&elsewhere).await.trim()), ("killed|t", "killed|f"));
    assert_eq!(replica.count("operations where phase = 'open' and kind = 'kill'").await, 1, "its host is told");
    let beat = json!({"epoch": 1, "sequence": 1, "agent_run": "a", "memory_free_mb": 0, "disk_free_mb": 0, "complete": true,
        "sandboxes": [], "facts": {"arch": "x", "cpu_cores": 2, "memory_mb": 4096, "disk_gb": 20, "isolation": "fake",
        "agent_version": "0", "templates": []}});
    let path = format!("/v1/hosts/{own}/heartbeat");
    let refused = replica.call(Who::Bearer(&jwt), Method::POST, &path, Some(beat)).await;
    assert_eq!(refused.error(), (401, "unauthorized"));
    assert_eq!(replica.audited("host.delete").await, 2);
}

/// A host is added and its team deleted at the same time, over and over: no host is left that is nobody's.
#[tokio::test(flavor = "multi_thread")]
async fn no_host_outlives_its_team() {
    let replica = Replica::start().await;
    for _ in 0..12 {
        let team = replica.byoc_team().await;
        let adding = (0..4).map(|_| replica.add_host(&team.owner, team.id));
        let path = format!("/v1/admin/teams/{}", team.id);
        let (added, gone) =
            tokio::join!(futures::future::join_all(adding), replica.as_admin(Method::DELETE, &path, None));
        assert_eq!(gone.status, 204, "{}", gone.body);
        assert!(added.iter().all(|answer| matches!(answer.status.as_u16(), 201 | 403 | 404)));
    }
    assert_eq!(replica.count("hosts").await, 0);
}
