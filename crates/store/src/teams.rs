//! Teams: who owns sandboxes, snapshots and keys. One that is deleted keeps its row, because rows of its sandboxes outlive it.

use chrono::{DateTime, Utc};
use model::access::Role;
use model::ids::{TeamId, UserId};
use uuid::Uuid;

use crate::audit::{self, Actor};
use crate::idempotency::{self, Claim};
use crate::{Store, StoreError, Tx};

/// That one person may be in; more is a mistake in somebody's script.
pub const TEAMS_MAX: i64 = 100;

#[derive(Debug, Clone, PartialEq)]
pub struct Team {
    pub id: TeamId,
    pub name: String,
    pub slug: String,
    /// It has hosts of its own, and its new sandboxes go there alone.
    pub is_byoc: bool,
    pub created_at: DateTime<Utc>,
}

struct Row {
    id: Uuid,
    name: String,
    slug: String,
    is_byoc: bool,
    created_at: DateTime<Utc>,
}

#[derive(Debug, PartialEq)]
pub enum Created {
    Made(Team),
    /// What the first call under this key made.
    Repeated(Team),
    OtherArguments,
    /// The person is in [`TEAMS_MAX`].
    TooMany,
    /// What the first call under this key made was deleted since.
    Gone,
}

/// What came of the wish that a team have hosts of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ByocChange {
    Done,
    /// The platform's own team, whose hosts are the platform's.
    Platform,
    Missing,
}

impl From<Row> for Team {
    fn from(row: Row) -> Self {
        Self { id: TeamId(row.id), name: row.name, slug: row.slug, is_byoc: row.is_byoc, created_at: row.created_at }
    }
}

impl Store {
    /// The teams of a person, in the order in which they joined, with what they are there.
    pub async fn teams_of(&self, user: UserId) -> Result<Vec<(Team, Role)>, StoreError> {
        let rows = sqlx::query!(
            "select t.id, t.name, t.slug, t.is_byoc, t.created_at, m.role from teams t join team_members m on m.team_id = t.id
             where m.user_id = $1 and t.deleted_at is null order by m.created_at, t.id limit $2",
            user.0,
            TEAMS_MAX
        )
        .fetch_all(&self.pool)
        .await?;
        rows.into_iter()
            .map(|row| {
                let (id, role) = (TeamId(row.id), role(&row.role)?);
                let team =
                    Team { id, name: row.name, slug: row.slug, is_byoc: row.is_byoc, created_at: row.created_at };
                Ok((team, role))
            })
            .collect()
    }

    pub async fn team(&self, id: TeamId) -> Result<Option<Team>, StoreError> {
        let row = sqlx::query_as!(
            Row,
            "select id, name, slug, is_byoc, created_at from teams where id = $1 and deleted_at is null",
            id.0
        )
        .fetch_optional(&self.pool)
        .await?;
        Ok(row.map(Team::from))
    }

    /// The platform's own, which its first start has made.
    pub async fn platform_team(&self) -> Result<Option<TeamId>, StoreError> {
        let id = sqlx::query_scalar!("select id from teams where is_platform").fetch_optional(&self.pool).await?;
        Ok(id.map(TeamId))
    }

    /// None when the person is not in the team, or there is none.
    pub async fn role_in(&self, team: TeamId, user: UserId) -> Result<Option<Role>, StoreError> {
        let found = sqlx::query_scalar!(
            "select m.role from team_members m join teams t on t.id = m.team_id
             where m.team_id = $1 and m.user_id = $2 and t.deleted_at is null",
            team.0,
            user.0
        )
        .fetch_optional(&self.pool)
        .await?;
        found.map(|found| role(&found)).transpose()
    }

    /// A team whose owner is `owner`.
    pub async fn create_team(
        &self,
        id: TeamId,
        name: &str,
        owner: UserId,
        key: Option<&idempotency::Key>,
        actor: &Actor,
    ) -> Result<Created, StoreError> {
        let mut tx = self.begin().await?;
        if let Some(key) = key {
            match idempotency::claim(&mut tx, key, &id.to_string()).await? {
                Claim::New => {}
                Claim::OtherArguments => return Ok(Created::OtherArguments),
                Claim::Repeated(subject) => {
                    let first =
                        subject.parse().map_err(|_| StoreError::Damaged { row: key.key.clone(), column: "subject" })?;
                    // Nobody waits for a second connection while holding one.
                    tx.rollback().await?;
                    return Ok(self.team(first).await?.map_or(Created::Gone, Created::Repeated));
                }
            }
        }
        // Two calls of one person must not both find room.
        sqlx::query!("select id from users where id = $1 for no key update", owner.0).fetch_one(&mut *tx).await?;
        let count = sqlx::query_scalar!(r#"select count(*) as "count!" from team_members where user_id = $1"#, owner.0)
            .fetch_one(&mut *tx)
            .await?;
        if count >= TEAMS_MAX {
            return Ok(Created::TooMany);
        }
        let team = insert(&mut tx, id, name, owner).await?;
        let actor = Actor { team: Some(id), ..actor.clone() };
        audit::record(&mut tx, &actor, "team.create", &id.to_string(), serde_json::json!({ "name": name })).await?;
        tx.commit().await?;
        Ok(Created::Made(team))
    }

    /// False when there is no such team.
    pub async fn rename_team(&self, id: TeamId, name: &str, actor: &Actor) -> Result<bool, StoreError> {
        let mut tx = self.begin().await?;
        let renamed = sqlx::query!("update teams set name = $2 where id = $1 and deleted_at is null", id.0, name)
            .execute(&mut *tx)
            .await?;
        if renamed.rows_affected() == 0 {
            return Ok(false);
        }
        audit::record(&mut tx, actor, "team.rename", &id.to_string(), serde_json::json!({ "name": name })).await?;
        tx.commit().await?;
        Ok(true)
    }
}

impl Store {
    /// From now on the team may have hosts of its own, and its new sandboxes go there alone. There is no way back: what it has on its
    /// hosts could be nowhere else.
    pub async fn let_have_hosts(&self, id: TeamId, actor: &Actor) -> Result<ByocChange, StoreError> {
        let mut tx = self.begin().await?;
        let team = sqlx::query!(
            "select is_platform, is_byoc from teams where id = $1 and deleted_at is null for no key update",
            id.0
        )
        .fetch_optional(&mut *tx)
        .await?;
        match team {
            None => return Ok(ByocChange::Missing),
            Some(team) if team.is_platform => return Ok(ByocChange::Platform),
            Some(team) if team.is_byoc => return Ok(ByocChange::Done),
            Some(_) => {}
        }
        sqlx::query!("update teams set is_byoc = true where id = $1", id.0).execute(&mut *tx).await?;
        audit::record(&mut tx, actor, "team.set_byoc", &id.to_string(), serde_json::json!({})).await?;
        tx.commit().await?;
        Ok(ByocChange::Done)
    }
}

/// Whether the team may have hosts of its own; from now on nobody deletes it, nor adds another one. None: there is no such team.
pub(crate) async fn may_have_hosts(tx: &mut Tx, team: TeamId) -> Result<Option<bool>, StoreError> {
    Ok(sqlx::query_scalar!("select is_byoc from teams where id = $1 and deleted_at is null for no key update", team.0)
        .fetch_optional(&mut **tx)
        .await?)
}

/// The team that the person joined first, made when there is none.
pub(crate) async fn first_team(tx: &mut Tx, user: UserId) -> Result<TeamId, StoreError> {
    // Two first logins must not make two teams.
    let name = sqlx::query_scalar!("select name from users where id = $1 for no key update", user.0)
        .fetch_one(&mut **tx)
        .await?;
    let first = sqlx::query_scalar!(
        "select m.team_id from team_members m join teams t on t.id = m.team_id
         where m.user_id = $1 and t.deleted_at is null order by m.created_at, m.team_id limit 1",
        user.0
    )
    .fetch_optional(&mut **tx)
    .await?;
    match first {
        Some(team) => Ok(TeamId(team)),
        None => Ok(insert(tx, TeamId(Uuid::now_v7()), &format!("{name}'s Team"), user).await?.id),
    }
}

/// Whether there is such a team; from now on nobody deletes it. Whatever adds something to a team asks this before it locks anything else,
/// because a deletion locks the team first.
pub(crate) async fn stays(tx: &mut Tx, team: TeamId) -> Result<bool, StoreError> {
    let row = sqlx::query!("select id from teams where id = $1 and deleted_at is null for key share", team.0)
        .fetch_optional(&mut **tx)
        .await?;
    Ok(row.is_some())
}

async fn insert(tx: &mut Tx, id: TeamId, name: &str, owner: UserId) -> Result<Team, StoreError> {
    let row = sqlx::query_as!(
        Row,
        "insert into teams (id, name) values ($1, $2) returning id, name, slug, is_byoc, created_at",
        id.0,
        name
    )
    .fetch_one(&mut **tx)
    .await?;
    sqlx::query!("insert into team_members (team_id, user_id, role) values ($1, $2, 'owner')", id.0, owner.0)
        .execute(&mut **tx)
        .await?;
    Ok(row.into())
}

pub(crate) fn role(text: &str) -> Result<Role, StoreError> {
    text.parse().map_err(|_| StoreError::Damaged { row: "team_members".to_owned(), column: "role" })
}
