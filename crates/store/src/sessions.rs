//! Logins: each is a row, so that each can be ended. What the person is now is looked up with it, every time.

use chrono::{DateTime, Utc};
use model::access::Role;
use model::ids::{SessionId, TeamId, UserId};
use uuid::Uuid;

use crate::audit::{self, Actor, ActorKind};
use crate::{Store, StoreError, Tx};

/// `last_seen_at` is written at most this often.
const LAST_SEEN_STEP_SEC: f64 = 60.0;
/// Of one person; the oldest give way. More is a script that logs in for each of its calls.
const SESSIONS_MAX: i64 = 1000;

pub struct NewSession {
    pub id: SessionId,
    pub user: UserId,
    /// SHA-256 of what the browser keeps.
    pub cookie_hash: Option<[u8; 32]>,
    pub expires_at: DateTime<Utc>,
    /// The hash that the password was found to fit. When it was replaced since, no session is opened.
    pub verified: Option<String>,
    pub request_id: String,
}

/// How a request names its session.
#[derive(Debug, Clone, Copy)]
pub enum SessionBy {
    Id(SessionId),
    Cookie([u8; 32]),
}

/// A session that lives, of a person who may log in, and what they are in the team they act for.
#[derive(Debug, Clone, PartialEq)]
pub struct Standing {
    pub session: SessionId,
    pub user: UserId,
    pub is_admin: bool,
    pub team: Option<TeamId>,
    /// None when the person is not in that team, or no longer.
    pub role: Option<Role>,
    pub expires_at: DateTime<Utc>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Session {
    pub id: SessionId,
    pub is_browser: bool,
    pub created_at: DateTime<Utc>,
    pub last_seen_at: DateTime<Utc>,
    pub expires_at: DateTime<Utc>,
}

struct Row {
    id: Uuid,
    is_browser: bool,
    created_at: DateTime<Utc>,
    last_seen_at: DateTime<Utc>,
    expires_at: DateTime<Utc>,
}

impl From<Row> for Session {
    fn from(row: Row) -> Self {
        Self {
            id: SessionId(row.id),
            is_browser: row.is_browser,
            created_at: row.created_at,
            last_seen_at: row.last_seen_at,
            expires_at: row.expires_at,
        }
    }
}

impl Store {
    /// The team in whose name the person acts: the one that they joined first, which is made when they are in none. None when the person
    /// may not log in, or not any more by what was verified.
    pub async fn open_session(&self, new: &NewSession) -> Result<Option<TeamId>, StoreError> {
        let mut tx = self.begin().await?;
        let Some(team) = open(&mut tx, new).await? else { return Ok(None) };
        tx.commit().await?;
        Ok(Some(team))
    }

    /// `team` goes before the session's own. Its use is noted.
    pub async fn standing(&self, by: SessionBy, team: Option<TeamId>) -> Result<Option<Standing>, StoreError> {
        let (id, cookie_hash) = match by {
            SessionBy::Id(id) => (Some(id.0), None),
            SessionBy::Cookie(hash) => (None, Some(hash.to_vec())),
        };
        let found = sqlx::query!(
            r#"select s.id, s.user_id, u.is_admin, coalesce($3, s.team_id) as "team_id: Uuid", m.role as "role?", s.expires_at,
                   s.last_seen_at < now() - make_interval(secs => $4) as "note!"
               from sessions s
               join users u on u.id = s.user_id and u.status = 'active'
               left join team_members m on m.user_id = s.user_id and m.team_id = coalesce($3, s.team_id)
               where (s.id = $1 or s.cookie_hash = $2) and s.expires_at > now()"#,
            id,
            cookie_hash,
            team.map(|team| team.0),
            LAST_SEEN_STEP_SEC
        )
        .fetch_optional(&self.pool)
        .await?;
        let Some(found) = found else { return Ok(None) };
        if found.note {
            sqlx::query!("update sessions set last_seen_at = now() where id = $1", found.id)
                .execute(&self.pool)
                .await?;
        }
        Ok(Some(Standing {
            session: SessionId(found.id),
            user: UserId(found.user_id),
            is_admin: found.is_admin,
            team: found.team_id.map(TeamId),
            role: found.role.map(|role| crate::teams::role(&role)).transpose()?,
            expires_at: found.expires_at,
        }))
    }

    pub async fn sessions(&self, user: UserId) -> Result<Vec<Session>, StoreError> {
        let rows = sqlx::query_as!(
            Row,
            r#"select id, cookie_hash is not null as "is_browser!", created_at, last_seen_at, expires_at from sessions
               where user_id = $1 and expires_at > now() order by created_at desc, id limit $2"#,
            user.0,
            SESSIONS_MAX
        )
        .fetch_all(&self.pool)
        .await?;
        Ok(rows.into_iter().map(Session::from).collect())
    }

    /// False when the person has no such session.
    pub async fn end_session(&self, user: UserId, id: SessionId, actor: &Actor) -> Result<bool, StoreError> {
        let mut tx = self.begin().await?;
        let ended =
            sqlx::query!("delete from sessions where id = $1 and user_id = $2", id.0, user.0).execute(&mut *tx).await?;
        if ended.rows_affected() == 0 {
            return Ok(false);
        }
        audit::record(&mut tx, actor, "session.end", &id.to_string(), serde_json::json!({})).await?;
        tx.commit().await?;
        Ok(true)
    }

    /// The team for which a session of a browser acts from now on. False when the person is not in it.
    pub async fn switch_team(&self, session: SessionId, team: TeamId, actor: &Actor) -> Result<bool, StoreError> {
        let mut tx = self.begin().await?;
        let switched = sqlx::query!(
            "update sessions set team_id = $2 where id = $1 and exists
                 (select 1 from team_members m where m.team_id = $2 and m.user_id = sessions.user_id)",
            session.0,
            team.0
        )
        .execute(&mut *tx)
        .await?;
        if switched.rows_affected() == 0 {
            return Ok(false);
        }
        audit::record(&mut tx, actor, "session.switch_team", &session.to_string(), serde_json::json!({})).await?;
        tx.commit().await?;
        Ok(true)
    }
}

async fn open(tx: &mut Tx, new: &NewSession) -> Result<Option<TeamId>, StoreError> {
    // Locked, so that a change of the password, or of the person's right to be here, comes before this or ends it.
    let may = sqlx::query!(
        "select id from users where id = $1 and status = 'active' and ($2::text is null or password_hash = $2)
         for no key update",
        new.user.0,
        new.verified
    )
    .fetch_optional(&mut **tx)
    .await?;
    if may.is_none() {
        return Ok(None);
    }
    let team = crate::teams::first_team(tx, new.user).await?;
    sqlx::query!(
        "delete from sessions where id in
             (select id from sessions where user_id = $1 order by created_at desc offset $2)",
        new.user.0,
        SESSIONS_MAX - 1
    )
    .execute(&mut **tx)
    .await?;
    sqlx::query!(
        "insert into sessions (id, user_id, team_id, cookie_hash, expires_at) values ($1, $2, $3, $4, $5)",
        new.id.0,
        new.user.0,
        team.0,
        new.cookie_hash.as_ref().map(<[u8; 32]>::as_slice),
        new.expires_at
    )
    .execute(&mut **tx)
    .await?;
    let actor =
        Actor { kind: ActorKind::User, id: new.user.to_string(), team: Some(team), request_id: new.request_id.clone() };
    audit::record(tx, &actor, "session.open", &new.id.to_string(), serde_json::json!({})).await?;
    Ok(Some(team))
}

/// All of a person's but one.
pub(crate) async fn end_others(tx: &mut Tx, user: UserId, but: Option<SessionId>) -> Result<(), StoreError> {
    sqlx::query!(
        "delete from sessions where user_id = $1 and id is distinct from $2",
        user.0,
        but.map(|session| session.0)
    )
    .execute(&mut **tx)
    .await?;
    Ok(())
}
