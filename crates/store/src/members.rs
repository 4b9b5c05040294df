//! Who is in a team, and as what. Changes of one team wait for each other and look at the roles of now, so that there is always an owner.

use chrono::{DateTime, Utc};
use model::access::Role;
use model::ids::{TeamId, UserId};
use uuid::Uuid;

use crate::audit::{self, Actor};
use crate::idempotency::{self, Claim};
use crate::outbox::{self, Outgoing};
use crate::teams::role;
use crate::{Store, StoreError, Tx};

/// Of one team.
pub const MEMBERS_MAX: i64 = 1000;

#[derive(Debug, Clone, PartialEq)]
pub struct Member {
    pub user: UserId,
    pub name: String,
    pub email: String,
    pub role: Role,
    pub joined_at: DateTime<Utc>,
}

#[derive(Debug, PartialEq)]
pub enum Added {
    Made(Member),
    /// Whom the first call under this key added.
    Repeated(Member),
    OtherArguments,
    /// Whom the first call under this key added has left since.
    Gone,
    Already,
    /// Nobody who may log in has this address.
    NoUser,
    TooMany,
    /// The team was deleted.
    NoTeam,
}

#[derive(Debug, PartialEq, Eq)]
pub enum MemberChange {
    Done,
    /// Then nobody could decide about the team.
    LastOwner,
    /// Who asks may not decide that.
    Forbidden,
    Missing,
}

struct Row {
    user_id: Uuid,
    name: String,
    email: String,
    role: String,
    created_at: DateTime<Utc>,
}

impl Row {
    fn member(self) -> Result<Member, StoreError> {
        Ok(Member {
            user: UserId(self.user_id),
            name: self.name,
            email: self.email,
            role: role(&self.role)?,
            joined_at: self.created_at,
        })
    }
}

impl Store {
    pub async fn members(&self, team: TeamId) -> Result<Vec<Member>, StoreError> {
        let rows = sqlx::query_as!(
            Row,
            "select m.user_id, u.name, u.email, m.role, m.created_at from team_members m join users u on u.id = m.user_id
             where m.team_id = $1 order by m.created_at, m.user_id limit $2",
            team.0,
            MEMBERS_MAX
        )
        .fetch_all(&self.pool)
        .await?;
        rows.into_iter().map(Row::member).collect()
    }

    /// Somebody who has an account joins as a member.
    pub async fn add_member(
        &self,
        team: TeamId,
        email: &str,
        notice: &Outgoing,
        key: Option<&idempotency::Key>,
        actor: &Actor,
    ) -> Result<Added, StoreError> {
        let mut tx = self.begin().await?;
        if !locked(&mut tx, team).await? {
            return Ok(Added::NoTeam);
        }
        let user = sqlx::query!("select id from users where lower(email) = lower($1) and status = 'active'", email)
            .fetch_optional(&mut *tx)
            .await?;
        let Some(user) = user else { return Ok(Added::NoUser) };
        if let Some(key) = key {
            match idempotency::claim(&mut tx, key, &UserId(user.id).to_string()).await? {
                Claim::New => {}
                Claim::OtherArguments => return Ok(Added::OtherArguments),
                Claim::Repeated(subject) => {
                    let first: UserId =
                        subject.parse().map_err(|_| StoreError::Damaged { row: key.key.clone(), column: "subject" })?;
                    let first = member(&mut tx, team, first).await?;
                    return Ok(first.map_or(Added::Gone, Added::Repeated));
                }
            }
        }
        match join(&mut tx, team, UserId(user.id), Role::Member).await? {
            Joined::Made => {}
            Joined::Already => return Ok(Added::Already),
            Joined::TooMany => return Ok(Added::TooMany),
        }
        let id = UserId(user.id).to_string();
        outbox::put(&mut tx, notice).await?;
        audit::record(&mut tx, actor, "member.add", &id, serde_json::json!({ "role": "member" })).await?;
        let added = member(&mut tx, team, UserId(user.id)).await?;
        tx.commit().await?;
        Ok(added.map_or(Added::Gone, Added::Made))
    }

    pub async fn change_role(
        &self,
        team: TeamId,
        user: UserId,
        to: Role,
        by: UserId,
        actor: &Actor,
    ) -> Result<MemberChange, StoreError> {
        let mut tx = self.begin().await?;
        let from = match decided(&mut tx, team, user, Some(to), by).await? {
            Ok(from) => from,
            Err(refused) => return Ok(refused),
        };
        sqlx::query!(
            "update team_members set role = $3 where team_id = $1 and user_id = $2",
            team.0,
            user.0,
            to.as_str()
        )
        .execute(&mut *tx)
        .await?;
        let details = serde_json::json!({ "from": from.as_str(), "to": to.as_str() });
        audit::record(&mut tx, actor, "member.role", &user.to_string(), details).await?;
        tx.commit().await?;
        Ok(MemberChange::Done)
    }

    /// The keys that they made for the team go with them: they know what opens.
    pub async fn remove_member(
        &self,
        team: TeamId,
        user: UserId,
        by: UserId,
        actor: &Actor,
    ) -> Result<MemberChange, StoreError> {
        let mut tx = self.begin().await?;
        if let Err(refused) = decided(&mut tx, team, user, None, by).await? {
            return Ok(refused);
        }
        sqlx::query!("delete from team_members where team_id = $1 and user_id = $2", team.0, user.0)
            .execute(&mut *tx)
            .await?;
        let keys = sqlx::query!("delete from api_keys where team_id = $1 and created_by = $2", team.0, user.0)
            .execute(&mut *tx)
            .await?;
        let action = if user == by { "member.leave" } else { "member.remove" };
        let details = serde_json::json!({ "keys_removed": keys.rows_affected() });
        audit::record(&mut tx, actor, action, &user.to_string(), details).await?;
        tx.commit().await?;
        Ok(MemberChange::Done)
    }
}

pub(crate) enum Joined {
    Made,
    Already,
    TooMany,
}

/// The team's row must be locked.
pub(crate) async fn join(tx: &mut Tx, team: TeamId, user: UserId, as_what: Role) -> Result<Joined, StoreError> {
    let count = sqlx::query_scalar!(r#"select count(*) as "count!" from team_members where team_id = $1"#, team.0)
        .fetch_one(&mut **tx)
        .await?;
    if count >= MEMBERS_MAX {
        return Ok(Joined::TooMany);
    }
    let made = sqlx::query!(
        "insert into team_members (team_id, user_id, role) values ($1, $2, $3) on conflict do nothing",
        team.0,
        user.0,
        as_what.as_str()
    )
    .execute(&mut **tx)
    .await?;
    Ok(if made.rows_affected() == 1 { Joined::Made } else { Joined::Already })
}

/// From now on no other change of the team's members is made. False when there is no such team.
pub(crate) async fn locked(tx: &mut Tx, team: TeamId) -> Result<bool, StoreError> {
    let row = sqlx::query!("select id from teams where id = $1 and deleted_at is null for no key update", team.0)
        .fetch_optional(&mut **tx)
        .await?;
    Ok(row.is_some())
}

/// What the member is now, when `by` may make them `to` (none: gone) and an owner is left.
async fn decided(
    tx: &mut Tx,
    team: TeamId,
    user: UserId,
    to: Option<Role>,
    by: UserId,
) -> Result<Result<Role, MemberChange>, StoreError> {
    if !locked(tx, team).await? {
        return Ok(Err(MemberChange::Missing));
    }
    let roles =
        sqlx::query!("select user_id, role from team_members where team_id = $1", team.0).fetch_all(&mut **tx).await?;
    let of = |who: UserId| roles.iter().find(|row| row.user_id == who.0).map(|row| role(&row.role)).transpose();
    let Some(from) = of(user)? else { return Ok(Err(MemberChange::Missing)) };
    let may = of(by)?.is_some_and(|asks| asks.decides(from, to.unwrap_or(Role::Member)));
    // Anybody may go.
    let is_leaving = user == by && to.is_none();
    if !(may || is_leaving) {
        return Ok(Err(MemberChange::Forbidden));
    }
    let owners = roles.iter().filter(|row| row.role == Role::Owner.as_str()).count();
    if from == Role::Owner && to != Some(Role::Owner) && owners == 1 {
        return Ok(Err(MemberChange::LastOwner));
    }
    Ok(Ok(from))
}

async fn member(tx: &mut Tx, team: TeamId, user: UserId) -> Result<Option<Member>, StoreError> {
    let row = sqlx::query_as!(
        Row,
        "select m.user_id, u.name, u.email, m.role, m.created_at from team_members m join users u on u.id = m.user_id
         where m.team_id = $1 and m.user_id = $2",
        team.0,
        user.0
    )
    .fetch_optional(&mut **tx)
    .await?;
    row.map(Row::member).transpose()
}
