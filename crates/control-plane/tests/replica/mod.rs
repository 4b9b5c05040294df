//! One replica of the control plane on a real PostgreSQL and a real port, and what a test needs to talk to it.

#![allow(dead_code)] // Each test program uses its part.

use chrono::{TimeDelta, Utc};
use control_plane::account_settings::AccountSettings;
use control_plane::capacity::Capacity;
use control_plane::config::{Config, Settings};
use control_plane::login;
use control_plane::rate_settings::RateSettings;
use control_plane::run::{self, Serving};
use control_plane::tokens::Named;
use model::access::{Role, Scope};
use model::ids::{ApiKeyId, BuildId, ChannelId, HostId, InvitationId, SandboxId, SessionId, TeamId, UserId};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use testkit::postgres::Database;

pub struct Replica {
    pub database: Database,
    pub url: String,
    pub admin: String,
    pub key: String,
    pub serving: Serving,
    pub http: reqwest::Client,
    pub config: Config,
    _dir: tempfile::TempDir,
}

pub struct Person {
    pub id: UserId,
    pub token: String,
}

pub struct Team {
    pub id: TeamId,
    pub owner: Person,
    pub admin: Person,
    pub member: Person,
}

/// How a request says who sends it.
#[derive(Clone, Copy)]
pub enum Who<'a> {
    Nobody,
    Key(&'a str),
    Bearer(&'a str),
}

pub struct Answer {
    pub status: StatusCode,
    pub headers: reqwest::header::HeaderMap,
    pub body: Value,
}

impl Answer {
    pub fn code(&self) -> &str {
        self.body["error"]["code"].as_str().unwrap_or_default()
    }

    /// Status and code, after a look at the shape that every error has.
    pub fn error(&self) -> (u16, &str) {
        let request_id = self.body["error"]["request_id"].as_str().unwrap_or_default();
        assert!(request_id.starts_with("req_"), "{}: {}", self.status, self.body);
        assert_eq!(self.headers["x-request-id"], request_id);
        assert_eq!(self.headers["content-type"], "application/json; charset=utf-8");
        assert_eq!(self.headers["cache-control"], "no-store");
        assert!(self.body["error"]["message"].as_str().is_some_and(|message| !message.is_empty()), "{}", self.body);
        let text = self.body.to_string();
        for secret in ["sqlx", "select ", "panicked", "/var/", "127.0.0.1"] {
            assert!(!text.contains(secret), "{secret:?} is told: {text}");
        }
        (self.status.as_u16(), self.code())
    }
}

impl Replica {
    pub async fn start() -> Self {
        Self::on(Database::new().await).await
    }

    pub async fn on(database: Database) -> Self {
        Self::with(database, Capacity::default()).await
    }

    pub async fn with(database: Database, capacity: Capacity) -> Self {
        Self::set_up(database, capacity, "open").await
    }

    /// Where nobody may sign up.
    pub async fn closed(database: Database) -> Self {
        Self::set_up(database, Capacity::default(), "closed").await
    }

    async fn set_up(database: Database, capacity: Capacity, signup: &str) -> Self {
        let accounts = AccountSettings { signup: Some(signup.to_owned()), ..AccountSettings::default() };
        Self::set_up_with(database, capacity, accounts).await
    }

    /// With settings of accounts of its own.
    pub async fn with_accounts(accounts: AccountSettings) -> Self {
        Self::set_up_with(Database::new().await, Capacity::default(), accounts).await
    }

    async fn set_up_with(database: Database, capacity: Capacity, accounts: AccountSettings) -> Self {
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let dir = tempfile::tempdir().unwrap();
        let rules = capacity.rules().unwrap();
        let silence_grace = capacity.silence_grace();
        let config = Config { rules, silence_grace, ..config_with(&database.url, dir.path(), accounts) };
        let serving = run::start(&config).await.unwrap();
        let app = serving.app.clone();
        let administrator = app.store.any_administrator().await.unwrap().expect("the first start made one");
        let mut replica = Self {
            url: format!("http://{}", serving.address),
            admin: login::open(&app.store, &app.tokens, administrator, "test").await.unwrap().unwrap(),
            key: String::new(),
            serving,
            http: reqwest::Client::builder().timeout(std::time::Duration::from_secs(30)).build().unwrap(),
            database,
            config,
            _dir: dir,
        };
        let all = json!({"scopes": Scope::ALL.iter().map(|scope| scope.as_str()).collect::<Vec<_>>()});
        let made = replica.call(Who::Bearer(&replica.admin), Method::POST, "/v1/api-keys", Some(all)).await;
        replica.key = made.body["key"].as_str().unwrap_or_else(|| panic!("{}", made.body)).to_owned();
        replica
    }

    /// A second one of the same platform; its address.
    pub async fn another(&self) -> (Serving, String) {
        let serving = run::start(&self.config).await.unwrap();
        let url = format!("http://{}", serving.address);
        (serving, url)
    }

    pub async fn call(&self, who: Who<'_>, method: Method, path: &str, body: Option<Value>) -> Answer {
        let mut request = self.http.request(method, format!("{}{path}", self.url));
        if let Some(body) = body {
            request = request.json(&body);
        }
        self.send(who, request).await
    }

    pub async fn send(&self, who: Who<'_>, request: reqwest::RequestBuilder) -> Answer {
        let request = match who {
            Who::Nobody => request,
            Who::Key(key) => request.header("X-API-Key", key),
            Who::Bearer(token) => request.bearer_auth(token),
        };
        let answer = request.send().await.unwrap();
        let (status, headers) = (answer.status(), answer.headers().clone());
        // A stream of events does not end.
        let is_stream =
            headers.get("content-type").is_some_and(|kind| kind.as_bytes().starts_with(b"text/event-stream"));
        let text = if is_stream { String::new() } else { answer.text().await.unwrap() };
        Answer { status, headers, body: serde_json::from_str(&text).unwrap_or(Value::String(text)) }
    }

    pub async fn as_admin(&self, method: Method, path: &str, body: Option<Value>) -> Answer {
        self.call(Who::Bearer(&self.admin), method, path, body).await
    }

    pub async fn as_team(&self, method: Method, path: &str, body: Option<Value>) -> Answer {
        self.call(Who::Key(&self.key), method, path, body).await
    }

    /// A registered host that nobody answers for, with room for `memory_mb`.
    pub async fn host(&self, memory_mb: i64) -> HostId {
        let made = self.as_admin(Method::POST, "/v1/hosts", Some(json!({"type": "regular"}))).await;
        let id: HostId = made.body["host"]["id"].as_str().unwrap().parse().unwrap();
        self.database
            .sql(&format!(
                "update hosts set state = 'active', address = '127.0.0.1:1', arch = 'x86_64', cpu_cores = 64, memory_mb = {memory_mb},
                 disk_gb = 100, isolation = 'fake', agent_version = '0', templates = '{{minimal}}', disk_free_mb = 100000,
                 last_heartbeat_at = now() where id = '{}'",
                id.0
            ))
            .await;
        id
    }

    /// A row of a sandbox that runs on a host.
    pub async fn sandbox(&self, host: HostId) -> SandboxId {
        let id = SandboxId::from_random(rand::random());
        self.database
            .sql(&format!(
                "insert into sandboxes (id, team_id, template, vcpus, memory_mib, disk_mib, desired, observed, host_id, host_epoch)
                 select '{id}', team_id, 'minimal', 1, 512, 5120, 'running', 'running', '{}', 1 from api_keys order by created_at limit 1",
                host.0
            ))
            .await;
        id
    }

    /// The API key of a team that owns nothing.
    pub async fn foreign_key(&self) -> String {
        let (key, hash, _) = control_plane::tokens::api_key(&rand::random());
        let team = uuid::Uuid::now_v7();
        self.database
            .sql(&format!(
                "insert into teams (id, name) values ('{team}', 'others');
                 insert into api_keys (id, team_id, name, key_hash, key_prefix, scopes)
                 values (gen_random_uuid(), '{team}', 'k', '\\x{}', 'wrn_xxxxxx', '{{{}}}')",
                hex::encode(hash),
                Scope::ALL.iter().map(|scope| scope.as_str()).collect::<Vec<_>>().join(",")
            ))
            .await;
        key
    }

    /// A person with a password that nobody knows, and a session.
    pub async fn person(&self, email: &str) -> Person {
        let id = UserId(uuid::Uuid::now_v7());
        self.database
            .sql(&format!("insert into users (id, email, name) values ('{}', '{email}', 'Somebody')", id.0))
            .await;
        Person { id, token: self.session(id).await }
    }

    /// The token of a new session.
    pub async fn session(&self, user: UserId) -> String {
        login::open(&self.serving.app.store, &self.serving.app.tokens, user, "test").await.unwrap().unwrap()
    }

    pub async fn join(&self, team: TeamId, user: UserId, role: Role) {
        self.database
            .sql(&format!(
                "insert into team_members (team_id, user_id, role) values ('{}', '{}', '{role}')
                 on conflict (team_id, user_id) do update set role = excluded.role",
                team.0, user.0
            ))
            .await;
    }

    /// A team of persons who are in no other.
    pub async fn team(&self) -> Team {
        let id = TeamId(uuid::Uuid::now_v7());
        self.database.sql(&format!("insert into teams (id, name) values ('{}', 'ours')", id.0)).await;
        let mut people = Vec::new();
        for role in [Role::Owner, Role::Admin, Role::Member] {
            let user = UserId(uuid::Uuid::now_v7());
            let email = format!("{role}-{}@example.org", user.0.simple());
            self.database
                .sql(&format!("insert into users (id, email, name) values ('{}', '{email}', 'Somebody')", user.0))
                .await;
            self.join(id, user, role).await;
            people.push(Person { id: user, token: self.session(user).await });
        }
        let member = people.pop().unwrap();
        let admin = people.pop().unwrap();
        let owner = people.pop().unwrap();
        Team { id, owner, admin, member }
    }

    pub async fn as_person(&self, person: &Person, method: Method, path: &str, body: Option<Value>) -> Answer {
        self.call(Who::Bearer(&person.token), method, path, body).await
    }

    /// How often something was written into the audit.
    pub async fn audited(&self, action: &str) -> usize {
        let count = self.database.sql(&format!("select count(*) from audit where action = '{action}'")).await;
        count.trim().parse().unwrap()
    }

    /// The id of a key that nobody has.
    pub fn no_key() -> String {
        ApiKeyId(uuid::Uuid::nil()).to_string()
    }

    /// The id of a team that is none.
    pub fn no_team() -> String {
        TeamId(uuid::Uuid::nil()).to_string()
    }

    /// A token that was made some time ago, of a session that is not over.
    pub fn token_of_user(&self, user: UserId, age: TimeDelta) -> String {
        let now = Utc::now();
        let none = uuid::Uuid::nil();
        let named = Named { user, session: SessionId(none), team: TeamId(none) };
        self.serving.app.tokens.for_user(named, now - age, now + TimeDelta::days(1))
    }

    pub fn token_of_host(&self, host: HostId) -> String {
        self.serving.app.tokens.for_host(host, Utc::now()).0
    }
}

/// What stands in the slots of paths.
pub struct Slots {
    pub team: TeamId,
    pub host: String,
    pub sandbox: String,
}

/// The table's route with things that exist in its slots, where that does not end them.
pub fn path(route: &str, slots: &Slots) -> String {
    let none = uuid::Uuid::nil();
    let id = match route.split('/').nth(2) {
        Some("hosts") => slots.host.clone(),
        Some("api-keys") => Replica::no_key(),
        Some("channels") => ChannelId(none).to_string(),
        Some("teams") => slots.team.to_string(),
        Some("admin") if route.starts_with("/v1/admin/capsules") => slots.sandbox.clone(),
        Some("admin") if route.starts_with("/v1/admin/templates") => "none".to_owned(),
        Some("admin") if route.starts_with("/v1/admin/builds") => BuildId(none).to_string(),
        Some("admin") => UserId(none).to_string(),
        Some("me") => SessionId(none).to_string(),
        _ => slots.sandbox.clone(),
    };
    let path = route
        .replace("{id}", &id)
        .replace("{selector}", "1")
        .replace("{tag}", "gpu")
        .replace("{provider}", "oidc")
        .replace("{user_id}", &UserId(none).to_string())
        .replace("{invitation_id}", &InvitationId(none).to_string())
        .replace("{*rest}", "index.css");
    if route.ends_with("/files/content") {
        return format!("{path}?path=/tmp/x");
    }
    // Nobody answers for the host, and that is not what is waited for.
    let waits = ["", "/{id}", "/{id}/pause", "/{id}/resume", "/{id}/fork"];
    match route.strip_prefix("/v1/sandboxes").or_else(|| route.strip_prefix("/v1/admin/capsules")) {
        Some(rest) if waits.contains(&rest) => format!("{path}?wait_sec=0"),
        _ => path,
    }
}

pub fn config(database_url: &str, dir: &std::path::Path) -> Config {
    let accounts = AccountSettings { signup: Some("open".to_owned()), ..AccountSettings::default() };
    config_with(database_url, dir, accounts)
}

fn config_with(database_url: &str, dir: &std::path::Path, accounts: AccountSettings) -> Config {
    let settings = Settings {
        database_url: Some(database_url.to_owned()),
        listen: "127.0.0.1:0".to_owned(),
        metrics_listen: Some("off".to_owned()),
        roles: None,
        stop_notice_sec: 0,
        dir: dir.to_owned(),
        host_networks: Some("127.0.0.0/8,10.0.0.0/8".to_owned()),
        channel_networks: Some("127.0.0.0/8".to_owned()),
        dev_host: None,
        secret: None,
        ready_file: None,
        idle_timeout_min_sec: 60,
        audit_kept_days: 0,
        capacity: Capacity::default(),
        accounts,
        rates: RateSettings::default(),
    };
    settings.check().unwrap()
}
