//! Who may call which route: one table, looked at before any handler runs. A route that is not in the table answers nobody.

use axum::extract::{FromRequestParts, MatchedPath, RawPathParams, Request, State};
use axum::middleware::Next;
use axum::response::Response;
use chrono::{DateTime, Utc};
use http::request::Parts;
use http::{HeaderMap, Method};
use model::access::{Role, Scope};
use model::ids::{ApiKeyId, HostId, SessionId, TeamId, UserId};
use store::api_keys::KeyBy;
use store::audit::{Actor, ActorKind};
use store::hosts::Sees;
use store::sessions::{SessionBy, Standing};

use super::credentials::{self, Credential};
use super::errors::{ApiError, REQUEST_ID};
use super::idempotency;
use super::rights::{self, Grant};
use crate::app::App;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Policy {
    /// Anybody.
    Open,
    /// A person, in whatever team.
    Person,
    /// The team's things: a key with this scope, or a person of the team.
    Team(Scope),
    /// A person who has at least this role in the team that the path names. To others there is no such team.
    Member(Role),
    /// An administrator of the platform.
    Administrator,
    /// An administrator of the platform, for its own team's things.
    Platform,
    /// The host that the path names, or the list of them: an administrator of the platform, or a person who has at least this role in the team
    /// whose host it is. To others there is no such host.
    Hosts(Role),
    /// A host that is to be: an administrator of the platform, or a person who has at least this role in the team that the body names.
    NewHost(Role),
    /// The host's own token.
    Host,
}

use Policy::{Administrator, Host, Hosts, Member, NewHost, Open, Person, Platform, Team};
use Role::{Admin as AsAdmin, Member as AsMember, Owner as AsOwner};
use Scope::{ApiKeys, Channels, SandboxesRead, SandboxesUse, SandboxesWrite, SnapshotsRead, SnapshotsWrite};

/// For a connection and the few questions about who calls: a server that lives answers or cancels each within seconds.
const LOOK_TIME_MAX: std::time::Duration = std::time::Duration::from_secs(12);

/// Method, route, policy. `/v1/capsules` is `/v1/sandboxes` under its other name.
pub const TABLE: [(&str, &str, Policy); 143] = [
    ("GET", "/", Open),
    ("GET", "/health", Open),
    ("GET", "/health/ready", Open),
    ("GET", "/health/live", Open),
    ("GET", "/openapi.json", Open),
    ("GET", "/openapi.yaml", Open),
    ("GET", "/docs", Open),
    ("GET", "/docs/", Open),
    ("GET", "/docs/{*rest}", Open),
    ("POST", "/v1/auth/signup", Open),
    ("POST", "/v1/auth/activate", Open),
    ("POST", "/v1/auth/login", Open),
    ("POST", "/v1/auth/logout", Person),
    ("POST", "/v1/auth/switch-team", Person),
    ("GET", "/auth/oauth/{provider}", Open),
    ("GET", "/auth/oauth/{provider}/callback", Open),
    ("GET", "/v1/me/providers/{provider}/connect", Person),
    ("DELETE", "/v1/me/providers/{provider}", Person),
    ("POST", "/v1/me/password/reset", Open),
    ("POST", "/v1/me/password/reset/confirm", Open),
    ("GET", "/v1/me", Person),
    ("DELETE", "/v1/me", Person),
    ("PATCH", "/v1/me", Person),
    ("POST", "/v1/me/password", Person),
    ("GET", "/v1/me/sessions", Person),
    ("DELETE", "/v1/me/sessions/{id}", Person),
    ("GET", "/v1/teams", Person),
    ("POST", "/v1/teams", Person),
    ("GET", "/v1/teams/{id}", Member(AsMember)),
    ("PATCH", "/v1/teams/{id}", Member(AsAdmin)),
    ("DELETE", "/v1/teams/{id}", Member(AsOwner)),
    ("GET", "/v1/teams/{id}/members", Member(AsMember)),
    ("POST", "/v1/teams/{id}/members", Member(AsAdmin)),
    ("PATCH", "/v1/teams/{id}/members/{user_id}", Member(AsAdmin)),
    ("DELETE", "/v1/teams/{id}/members/{user_id}", Member(AsAdmin)),
    ("POST", "/v1/teams/{id}/leave", Member(AsMember)),
    ("GET", "/v1/teams/{id}/invitations", Member(AsAdmin)),
    ("POST", "/v1/teams/{id}/invitations", Member(AsAdmin)),
    ("DELETE", "/v1/teams/{id}/invitations/{invitation_id}", Member(AsAdmin)),
    ("POST", "/v1/invitations/accept", Person),
    ("GET", "/v1/users/search", Person),
    ("GET", "/v1/audit-logs", Person),
    ("GET", "/v1/admin/audit-logs", Administrator),
    ("GET", "/v1/admin/fleet", Administrator),
    ("GET", "/v1/admin/teams", Administrator),
    ("DELETE", "/v1/admin/teams/{id}", Administrator),
    ("PUT", "/v1/admin/teams/{id}/byoc", Administrator),
    ("GET", "/v1/admin/users", Administrator),
    ("POST", "/v1/admin/users", Administrator),
    ("PUT", "/v1/admin/users/{id}/active", Administrator),
    ("PUT", "/v1/admin/users/{id}/admin", Administrator),
    ("POST", "/v1/admin/users/{id}/link", Administrator),
    ("GET", "/v1/admin/templates", Administrator),
    ("DELETE", "/v1/admin/templates/{id}", Platform),
    ("POST", "/v1/admin/builds", Platform),
    ("GET", "/v1/admin/builds", Administrator),
    ("GET", "/v1/admin/builds/{id}", Administrator),
    ("POST", "/v1/admin/builds/{id}/cancel", Platform),
    ("POST", "/v1/admin/capsules", Platform),
    ("GET", "/v1/admin/capsules", Platform),
    ("GET", "/v1/admin/capsules/{id}", Platform),
    ("DELETE", "/v1/admin/capsules/{id}", Platform),
    ("POST", "/v1/admin/capsules/{id}/snapshot", Platform),
    ("POST", "/v1/admin/capsules/{id}/exec", Platform),
    ("GET", "/v1/admin/capsules/{id}/exec/stream", Platform),
    ("GET", "/v1/admin/capsules/{id}/processes", Platform),
    ("DELETE", "/v1/admin/capsules/{id}/processes/{selector}", Platform),
    ("GET", "/v1/admin/capsules/{id}/processes/{selector}/stream", Platform),
    ("GET", "/v1/admin/capsules/{id}/pty", Platform),
    ("GET", "/v1/admin/capsules/{id}/metrics", Platform),
    ("POST", "/v1/admin/capsules/{id}/files/read", Platform),
    ("POST", "/v1/admin/capsules/{id}/files/write", Platform),
    ("POST", "/v1/admin/capsules/{id}/files/list", Platform),
    ("POST", "/v1/admin/capsules/{id}/files/mkdir", Platform),
    ("POST", "/v1/admin/capsules/{id}/files/remove", Platform),
    ("POST", "/v1/api-keys", Team(ApiKeys)),
    ("GET", "/v1/api-keys", Team(ApiKeys)),
    ("DELETE", "/v1/api-keys/{id}", Team(ApiKeys)),
    ("POST", "/v1/hosts", NewHost(AsAdmin)),
    ("GET", "/v1/hosts", Hosts(AsMember)),
    ("GET", "/v1/hosts/{id}", Hosts(AsMember)),
    ("DELETE", "/v1/hosts/{id}", Hosts(AsAdmin)),
    ("POST", "/v1/hosts/{id}/token", Hosts(AsAdmin)),
    ("GET", "/v1/hosts/{id}/inspect", Hosts(AsAdmin)),
    ("GET", "/v1/hosts/{id}/delete-preview", Hosts(AsAdmin)),
    ("POST", "/v1/hosts/{id}/drain", Hosts(AsAdmin)),
    ("POST", "/v1/hosts/{id}/undrain", Hosts(AsAdmin)),
    ("POST", "/v1/hosts/{id}/unfence", Hosts(AsAdmin)),
    ("GET", "/v1/hosts/{id}/tags", Hosts(AsMember)),
    ("POST", "/v1/hosts/{id}/tags", Hosts(AsAdmin)),
    ("DELETE", "/v1/hosts/{id}/tags/{tag}", Hosts(AsAdmin)),
    ("GET", "/v1/hosts/silence", Administrator),
    ("POST", "/v1/hosts/register", Open),
    ("POST", "/v1/hosts/{id}/renew", Host),
    ("POST", "/v1/hosts/{id}/heartbeat", Host),
    ("GET", "/v1/teams/self/quotas", Team(SandboxesRead)),
    ("GET", "/v1/teams/{id}/quotas", Administrator),
    ("PUT", "/v1/teams/{id}/quotas", Administrator),
    ("POST", "/v1/sandboxes", Team(SandboxesWrite)),
    ("GET", "/v1/sandboxes", Team(SandboxesRead)),
    ("GET", "/v1/sandboxes/{id}", Team(SandboxesRead)),
    ("PATCH", "/v1/sandboxes/{id}", Team(SandboxesWrite)),
    ("DELETE", "/v1/sandboxes/{id}", Team(SandboxesWrite)),
    ("POST", "/v1/sandboxes/{id}/pause", Team(SandboxesWrite)),
    ("POST", "/v1/sandboxes/{id}/resume", Team(SandboxesWrite)),
    ("POST", "/v1/sandboxes/{id}/timeout", Team(SandboxesWrite)),
    ("POST", "/v1/sandboxes/{id}/ping", Team(SandboxesUse)),
    ("POST", "/v1/sandboxes/{id}/fork", Team(SandboxesWrite)),
    ("GET", "/v1/sandboxes/{id}/timeline", Team(SandboxesRead)),
    ("POST", "/v1/sandboxes/{id}/exec", Team(SandboxesUse)),
    ("GET", "/v1/sandboxes/{id}/exec/stream", Team(SandboxesUse)),
    ("GET", "/v1/sandboxes/{id}/processes", Team(SandboxesRead)),
    ("DELETE", "/v1/sandboxes/{id}/processes/{selector}", Team(SandboxesUse)),
    ("GET", "/v1/sandboxes/{id}/processes/{selector}/stream", Team(SandboxesUse)),
    ("GET", "/v1/sandboxes/{id}/pty", Team(SandboxesUse)),
    ("GET", "/v1/sandboxes/{id}/console", Team(SandboxesRead)),
    ("POST", "/v1/sandboxes/{id}/files/read", Team(SandboxesUse)),
    ("POST", "/v1/sandboxes/{id}/files/write", Team(SandboxesUse)),
    ("POST", "/v1/sandboxes/{id}/files/stream/read", Team(SandboxesUse)),
    ("POST", "/v1/sandboxes/{id}/files/stream/write", Team(SandboxesUse)),
    ("GET", "/v1/events", Team(SandboxesRead)),
    ("GET", "/v1/events/stream", Team(SandboxesRead)),
    ("GET", "/v1/events/all/stream", Team(SandboxesRead)),
    ("GET", "/v1/sandboxes/{id}/files/content", Team(SandboxesUse)),
    ("PUT", "/v1/sandboxes/{id}/files/content", Team(SandboxesUse)),
    ("POST", "/v1/sandboxes/{id}/files/list", Team(SandboxesUse)),
    ("POST", "/v1/sandboxes/{id}/files/stat", Team(SandboxesUse)),
    ("POST", "/v1/sandboxes/{id}/files/mkdir", Team(SandboxesUse)),
    ("POST", "/v1/sandboxes/{id}/files/move", Team(SandboxesUse)),
    ("POST", "/v1/sandboxes/{id}/files/remove", Team(SandboxesUse)),
    ("GET", "/v1/sandboxes/{id}/metrics", Team(SandboxesRead)),
    ("GET", "/v1/sandboxes/stats", Team(SandboxesRead)),
    ("GET", "/v1/sandboxes/usage", Team(SandboxesRead)),
    ("POST", "/v1/snapshots", Team(SnapshotsWrite)),
    ("GET", "/v1/snapshots", Team(SnapshotsRead)),
    ("DELETE", "/v1/snapshots/{id}", Team(SnapshotsWrite)),
    ("GET", "/v1/channels", Team(Channels)),
    ("POST", "/v1/channels", Team(Channels)),
    ("POST", "/v1/channels/test", Team(Channels)),
    ("GET", "/v1/channels/{id}", Team(Channels)),
    ("PATCH", "/v1/channels/{id}", Team(Channels)),
    ("DELETE", "/v1/channels/{id}", Team(Channels)),
    ("PUT", "/v1/channels/{id}/config", Team(Channels)),
];

pub fn policy(method: &Method, route: &str) -> Option<Policy> {
    let route = match route.strip_prefix("/v1/capsules") {
        Some(rest) => format!("/v1/sandboxes{rest}"),
        None => route.to_owned(),
    };
    TABLE.iter().find(|(m, r, _)| *m == method.as_str() && *r == route).map(|(_, _, policy)| *policy)
}

/// Who calls, with the right to act for a team.
#[derive(Debug, Clone)]
pub struct Caller {
    pub team: TeamId,
    pub who: Who,
    /// What a person is in the team; keys have scopes instead.
    pub role: Option<Role>,
    /// All of them for persons.
    pub scopes: Vec<Scope>,
    /// To whom it is shown that something was done: none is the platform.
    pub acts_in: Option<TeamId>,
    pub request_id: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Who {
    User(UserId),
    Key(ApiKeyId),
}

impl Caller {
    pub fn actor(&self) -> Actor {
        let (kind, id) = match self.who {
            Who::User(id) => (ActorKind::User, id.to_string()),
            Who::Key(id) => (ActorKind::ApiKey, id.to_string()),
        };
        Actor { kind, id, team: self.acts_in, request_id: self.request_id.clone() }
    }

    pub fn user(&self) -> Option<UserId> {
        match self.who {
            Who::User(id) => Some(id),
            Who::Key(_) => None,
        }
    }
}

/// A person with a session, whatever they are in teams.
#[derive(Debug, Clone)]
pub struct PersonCaller {
    pub user: UserId,
    pub session: SessionId,
    pub session_ends: DateTime<Utc>,
    pub is_admin: bool,
    /// In whose name the session acts, and what the person is there.
    pub team: Option<(TeamId, Role)>,
    /// Of a session in a cookie: what its page must show.
    pub csrf_token: Option<String>,
    pub request_id: String,
}

impl PersonCaller {
    pub fn actor(&self) -> Actor {
        self.actor_in(None)
    }

    pub fn actor_in(&self, team: Option<TeamId>) -> Actor {
        Actor { kind: ActorKind::User, id: self.user.to_string(), team, request_id: self.request_id.clone() }
    }
}

/// A person of the team that the path names.
#[derive(Debug, Clone)]
pub struct MemberCaller {
    pub person: PersonCaller,
    pub team: TeamId,
    pub role: Role,
}

impl MemberCaller {
    pub fn actor(&self) -> Actor {
        self.person.actor_in(Some(self.team))
    }
}

/// The caller is an administrator of the platform.
#[derive(Debug, Clone)]
pub struct Admin(pub Caller);

/// A person, and the hosts about which they may ask: of a route that names one, that one's team; else those that they see.
#[derive(Debug, Clone)]
pub struct HostsCaller {
    pub person: PersonCaller,
    pub sees: Sees,
    /// The team of the host that the path names; none: the platform's.
    pub owner: Option<TeamId>,
}

impl HostsCaller {
    /// What is done with a team's host is that team's to know.
    pub fn actor(&self) -> Actor {
        self.person.actor_in(self.owner)
    }
}

/// The caller is this host.
#[derive(Debug, Clone, Copy)]
pub struct HostCaller(pub HostId);

/// The id of the request, for routes that anybody may call.
#[derive(Debug, Clone)]
pub struct RequestId(pub String);

/// A database that vanished without a word keeps a question for as long as TCP does; whoever calls is told sooner.
async fn in_time<T>(look: impl Future<Output = Result<T, ApiError>>) -> Result<T, ApiError> {
    tokio::time::timeout(LOOK_TIME_MAX, look).await.unwrap_or_else(|_| Err(ApiError::unavailable()))
}

/// The layer in front of every route.
pub async fn check(
    State(app): State<App>,
    route: MatchedPath,
    params: RawPathParams,
    mut request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    // HEAD is answered by the handlers of GET.
    let method = if request.method() == Method::HEAD { Method::GET } else { request.method().clone() };
    let Some(policy) = policy(&method, route.as_str()) else {
        // Known routes with other methods end in the router's own answer, which says which methods there are.
        let known = TABLE.iter().any(|(_, r, _)| *r == route.as_str() || route.as_str().starts_with("/v1/capsules"));
        return if known { Ok(next.run(request).await) } else { Err(ApiError::not_found("route")) };
    };
    let request_id = request.headers().get(REQUEST_ID).and_then(|id| id.to_str().ok()).unwrap_or_default().to_owned();
    let (headers, method) = (request.headers().clone(), request.method().clone());
    idempotency::is_well_formed(&headers)?;
    let now = tokio::time::Instant::now();
    // Where anybody may come, nobody is told apart by what they show.
    let shown = if matches!(policy, Open | Host) { None } else { credentials::credential(&headers)? };
    let mut standing = match shown.map(|credential| app.limits.of_credential(&credential, now)) {
        None => None,
        Some(Ok(standing)) => standing,
        Some(Err(too_many)) => return Ok(too_many.response()),
    };
    let asked = Asked { app: &app, headers: &headers, method: &method, request_id };
    let extensions = request.extensions_mut();
    let person;
    let grant = match policy {
        Open => {
            extensions.insert(RequestId(asked.request_id));
            return Ok(next.run(request).await);
        }
        Host => {
            let token = credentials::bearer(&headers)?.ok_or_else(ApiError::unauthorized)?;
            let host = app.tokens.host(&token).ok_or_else(ApiError::unauthorized)?;
            extensions.insert(HostCaller(host));
            return Ok(next.run(request).await);
        }
        Team(scope) => {
            let (caller, grant) = in_time(asked.team(scope)).await?;
            if let Err(too_many) = app.limits.of_team(caller.team, now) {
                return Ok(too_many.response());
            }
            person = caller.user();
            extensions.insert(caller);
            grant
        }
        Person => {
            let who = in_time(asked.person()).await?;
            person = Some(who.user);
            let grant = Grant::session(policy, who.session, None);
            extensions.insert(who);
            grant
        }
        Member(least) => {
            let who = in_time(asked.person()).await?;
            person = Some(who.user);
            let team = params.iter().find(|(name, _)| *name == "id").map(|(_, id)| id).unwrap_or_default();
            let team: TeamId = team.parse().map_err(|error| ApiError::invalid("id", format!("is {error}")))?;
            let role = app.store.role_in(team, who.user).await?.ok_or_else(|| ApiError::not_found("team"))?;
            at_least(least, role)?;
            let grant = Grant::session(policy, who.session, Some(team));
            extensions.insert(MemberCaller { person: who, team, role });
            grant
        }
        NewHost(_) => {
            let who = in_time(asked.person()).await?;
            person = Some(who.user);
            let grant = Grant::session(policy, who.session, None);
            extensions.insert(who);
            grant
        }
        Hosts(least) => {
            let named = params.iter().find(|(name, _)| *name == "id").map(|(_, id)| id.to_owned());
            let (caller, grant) = in_time(asked.hosts(least, named)).await?;
            person = Some(caller.person.user);
            extensions.insert(caller);
            grant
        }
        Administrator => {
            let (admin, grant) = in_time(asked.administrator()).await?;
            person = admin.0.user();
            extensions.insert(admin);
            grant
        }
        Platform => {
            let (caller, grant) = in_time(asked.platform()).await?;
            person = caller.user();
            extensions.insert(caller);
            grant
        }
    };
    extensions.insert(grant.clone());
    if let Some(person) = person {
        match app.limits.of_person(person, now) {
            Ok(of_person) => standing = of_person,
            Err(too_many) => return Ok(too_many.response()),
        }
    }
    // Rights that are lost end what goes on, as a client does that leaves.
    tokio::select! {
        response = next.run(request) => {
            let mut response = rights::bounded(response, &app, &grant);
            if let Some(standing) = standing {
                standing.write(response.headers_mut());
            }
            Ok(response)
        }
        () = rights::lost(&app, &grant) => Err(ApiError::unauthorized()),
    }
}

pub fn at_least(least: Role, role: Role) -> Result<(), ApiError> {
    if role < least { Err(ApiError::forbidden("the role in this team does not allow that")) } else { Ok(()) }
}

/// A request, as far as it says who sends it.
struct Asked<'a> {
    app: &'a App,
    headers: &'a HeaderMap,
    method: &'a Method,
    request_id: String,
}

impl Asked<'_> {
    async fn team(&self, scope: Scope) -> Result<(Caller, Grant), ApiError> {
        let request_id = self.request_id.clone();
        if let Some(Credential::Key(hash)) = credentials::credential(self.headers)? {
            let key = self.app.store.use_api_key(KeyBy::Hash(&hash)).await?.ok_or_else(ApiError::unauthorized)?;
            if !key.scopes.contains(&scope) {
                return Err(
                    ApiError::forbidden("the scopes of this API key do not allow that").with("scope", scope.as_str())
                );
            }
            let grant = Grant::key(Team(scope), key.id);
            let who = Who::Key(key.id);
            let acts_in = Some(key.team);
            return Ok((Caller { team: key.team, who, role: None, scopes: key.scopes, acts_in, request_id }, grant));
        }
        let person = self.person().await?;
        let (team, role) = person.team.ok_or_else(ApiError::no_team)?;
        let grant = Grant::session(Team(scope), person.session, Some(team));
        let who = Who::User(person.user);
        let caller =
            Caller { team, who, role: Some(role), scopes: Scope::ALL.to_vec(), acts_in: Some(team), request_id };
        Ok((caller, grant))
    }

    async fn administrator(&self) -> Result<(Admin, Grant), ApiError> {
        let person = self.person().await?;
        if !person.is_admin {
            return Err(ApiError::forbidden("only administrators may do this"));
        }
        let (team, role) = person.team.ok_or_else(ApiError::no_team)?;
        let grant = Grant::session(Administrator, person.session, Some(team));
        let who = Who::User(person.user);
        let request_id = self.request_id.clone();
        let caller = Caller { team, who, role: Some(role), scopes: Scope::ALL.to_vec(), acts_in: None, request_id };
        Ok((Admin(caller), grant))
    }

    /// What is done so is the platform's to know, not its team's.
    async fn platform(&self) -> Result<(Caller, Grant), ApiError> {
        let person = self.person().await?;
        if !person.is_admin {
            return Err(ApiError::forbidden("only administrators may do this"));
        }
        let team = self.app.store.platform_team().await?.ok_or_else(ApiError::no_team)?;
        let grant = Grant::session(Platform, person.session, None);
        let who = Who::User(person.user);
        let request_id = self.request_id.clone();
        let caller = Caller { team, who, role: None, scopes: Scope::ALL.to_vec(), acts_in: None, request_id };
        Ok((caller, grant))
    }

    async fn hosts(&self, least: Role, named: Option<String>) -> Result<(HostsCaller, Grant), ApiError> {
        let person = self.person().await?;
        let (sees, owner, team) = match named {
            None if person.is_admin => (Sees::All, None, None),
            None => {
                let (team, role) = person.team.ok_or_else(ApiError::no_team)?;
                at_least(least, role)?;
                (Sees::Of(team), None, Some(team))
            }
            Some(id) => {
                let id: HostId = id.parse().map_err(|error| ApiError::invalid("id", format!("is {error}")))?;
                let no_host = || ApiError::not_found("host");
                let owner = self.app.store.team_of_host(id).await?;
                if person.is_admin {
                    (Sees::All, owner.ok_or_else(no_host)?, None)
                } else {
                    // A host of the platform, another team's, and none at all are the same.
                    let team = owner.flatten().ok_or_else(no_host)?;
                    let role = self.app.store.role_in(team, person.user).await?.ok_or_else(no_host)?;
                    at_least(least, role)?;
                    (Sees::Of(team), Some(team), Some(team))
                }
            }
        };
        let grant = Grant::session(Hosts(least), person.session, team);
        Ok((HostsCaller { person, sees, owner }, grant))
    }

    /// The credential says which session; what its person is now is in the database.
    async fn person(&self) -> Result<PersonCaller, ApiError> {
        let (standing, csrf_token) = match credentials::credential(self.headers)? {
            Some(Credential::Token(token)) => {
                let named = self.app.tokens.user(&token).ok_or_else(ApiError::unauthorized)?;
                let standing = self.app.store.standing(SessionBy::Id(named.session), Some(named.team)).await?;
                (standing.filter(|standing| standing.user == named.user), None)
            }
            Some(Credential::Cookie { hash, csrf_token }) => {
                let standing = self.app.store.standing(SessionBy::Cookie(hash), None).await?;
                if standing.is_some() {
                    credentials::own_page(self.headers, self.method, &csrf_token, &self.app.accounts.public_url)?;
                }
                (standing, Some(csrf_token))
            }
            Some(Credential::Key(hash)) => {
                self.app.store.use_api_key(KeyBy::Hash(&hash)).await?.ok_or_else(ApiError::unauthorized)?;
                return Err(ApiError::forbidden("this needs a person's token (Authorization: Bearer), not an API key"));
            }
            None => (None, None),
        };
        let Standing { session, user, is_admin, team, role, expires_at } =
            standing.ok_or_else(ApiError::unauthorized)?;
        let request_id = self.request_id.clone();
        let team = team.zip(role);
        Ok(PersonCaller { user, session, session_ends: expires_at, is_admin, team, csrf_token, request_id })
    }
}

macro_rules! from_check {
    ($($type:ty),+) => {$(
        impl<S: Send + Sync> FromRequestParts<S> for $type {
            type Rejection = ApiError;

            async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
                // Absent only when the table gives the route another policy than its handler wants.
                parts.extensions.get::<Self>().cloned().ok_or_else(ApiError::internal)
            }
        }
    )+};
}

from_check!(Caller, PersonCaller, MemberCaller, HostsCaller, Admin, HostCaller, RequestId, Grant);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capsules_are_sandboxes() {
        assert_eq!(policy(&Method::POST, "/v1/capsules"), Some(Team(SandboxesWrite)));
        assert_eq!(policy(&Method::GET, "/v1/capsules/{id}/console"), Some(Team(SandboxesRead)));
        assert_eq!(policy(&Method::PUT, "/v1/sandboxes"), None);
    }
}
