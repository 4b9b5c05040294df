//! Offers to join a team, sent to an address. Each is taken once, in its time, by the person with that address.

use chrono::{DateTime, Utc};
use model::access::Role;
use model::ids::{InvitationId, TeamId, UserId};
use uuid::Uuid;

use crate::audit::{self, Actor};
use crate::idempotency::{self, Claim};
use crate::members::{Joined, join, locked};
use crate::outbox::{self, Outgoing};
use crate::teams::role;
use crate::users::{self, NewUser, UserStatus};
use crate::{Store, StoreError, Tx};

/// Open ones of one team.
pub const INVITATIONS_MAX: i64 = 1000;

pub struct NewInvitation {
    pub id: InvitationId,
    pub team: TeamId,
    pub email: String,
    pub role: Role,
    pub token_hash: [u8; 32],
    pub by: UserId,
    pub expires_at: DateTime<Utc>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Invitation {
    pub id: InvitationId,
    pub team: TeamId,
    pub email: String,
    pub role: Role,
    pub invited_by: Option<UserId>,
    pub created_at: DateTime<Utc>,
    pub expires_at: DateTime<Utc>,
}

#[derive(Debug, PartialEq)]
pub enum Invited {
    Made(Invitation),
    /// What the first call under this key made.
    Repeated(Invitation),
    OtherArguments,
    /// What the first call under this key made was accepted, revoked or replaced since.
    Gone,
    /// The address is that of a member.
    Already,
    /// Who asks may not make somebody that.
    Forbidden,
    TooMany,
    Missing,
}

#[derive(Debug, PartialEq)]
pub enum Accepted {
    Joined(TeamId, Role),
    /// Unknown, taken, revoked or over.
    Invalid,
    /// It is for another address.
    OtherPerson,
    Already,
    /// The address has an account: its owner logs in and accepts.
    EmailTaken,
    TooMany,
}

struct Row {
    id: Uuid,
    team_id: Uuid,
    email: String,
    role: String,
    invited_by: Option<Uuid>,
    created_at: DateTime<Utc>,
    expires_at: DateTime<Utc>,
}

impl Row {
    fn invitation(self) -> Result<Invitation, StoreError> {
        Ok(Invitation {
            id: InvitationId(self.id),
            team: TeamId(self.team_id),
            email: self.email,
            role: role(&self.role)?,
            invited_by: self.invited_by.map(UserId),
            created_at: self.created_at,
            expires_at: self.expires_at,
        })
    }
}

impl Store {
    /// An open invitation of the same address is replaced: only the newest link works.
    pub async fn invite(
        &self,
        new: &NewInvitation,
        mail: &Outgoing,
        key: Option<&idempotency::Key>,
        actor: &Actor,
    ) -> Result<Invited, StoreError> {
        let mut tx = self.begin().await?;
        if let Some(key) = key {
            match idempotency::claim(&mut tx, key, &new.id.to_string()).await? {
                Claim::New => {}
                Claim::OtherArguments => return Ok(Invited::OtherArguments),
                Claim::Repeated(subject) => {
                    let first: InvitationId =
                        subject.parse().map_err(|_| StoreError::Damaged { row: key.key.clone(), column: "subject" })?;
                    let row = sqlx::query_as!(
                        Row,
                        "select id, team_id, email, role, invited_by, created_at, expires_at from invitations
                         where id = $1 and team_id = $2 and accepted_at is null",
                        first.0,
                        new.team.0
                    )
                    .fetch_optional(&mut *tx)
                    .await?;
                    return row.map_or(Ok(Invited::Gone), |row| row.invitation().map(Invited::Repeated));
                }
            }
        }
        if !locked(&mut tx, new.team).await? {
            return Ok(Invited::Missing);
        }
        let asks = sqlx::query_scalar!(
            "select role from team_members where team_id = $1 and user_id = $2",
            new.team.0,
            new.by.0
        )
        .fetch_optional(&mut *tx)
        .await?;
        let asks = asks.map(|text| role(&text)).transpose()?;
        if !asks.is_some_and(|asks| asks.decides(Role::Member, new.role)) {
            return Ok(Invited::Forbidden);
        }
        let is_member = sqlx::query_scalar!(
            r#"select exists (select 1 from team_members m join users u on u.id = m.user_id
                   where m.team_id = $1 and lower(u.email) = lower($2)) as "there!""#,
            new.team.0,
            new.email
        )
        .fetch_one(&mut *tx)
        .await?;
        if is_member {
            return Ok(Invited::Already);
        }
        sqlx::query!(
            "delete from invitations where team_id = $1 and lower(email) = lower($2) and accepted_at is null",
            new.team.0,
            new.email
        )
        .execute(&mut *tx)
        .await?;
        let open = sqlx::query_scalar!(
            r#"select count(*) as "count!" from invitations where team_id = $1 and accepted_at is null"#,
            new.team.0
        )
        .fetch_one(&mut *tx)
        .await?;
        if open >= INVITATIONS_MAX {
            return Ok(Invited::TooMany);
        }
        let row = sqlx::query_as!(
            Row,
            "insert into invitations (id, team_id, email, role, token_hash, invited_by, expires_at)
             values ($1, $2, $3, $4, $5, $6, $7)
             returning id, team_id, email, role, invited_by, created_at, expires_at",
            new.id.0,
            new.team.0,
            new.email,
            new.role.as_str(),
            &new.token_hash,
            new.by.0,
            new.expires_at
        )
        .fetch_one(&mut *tx)
        .await?;
        let details = serde_json::json!({ "email": new.email, "role": new.role.as_str() });
        outbox::put(&mut tx, mail).await?;
        audit::record(&mut tx, actor, "invitation.create", &new.id.to_string(), details).await?;
        tx.commit().await?;
        Ok(Invited::Made(row.invitation()?))
    }

    /// Those that nobody has taken, with those whose time is over.
    pub async fn invitations(&self, team: TeamId) -> Result<Vec<Invitation>, StoreError> {
        let rows = sqlx::query_as!(
            Row,
            "select id, team_id, email, role, invited_by, created_at, expires_at from invitations
             where team_id = $1 and accepted_at is null order by created_at, id limit $2",
            team.0,
            INVITATIONS_MAX
        )
        .fetch_all(&self.pool)
        .await?;
        rows.into_iter().map(Row::invitation).collect()
    }

    /// False when the team has no such open invitation.
    pub async fn revoke_invitation(&self, team: TeamId, id: InvitationId, actor: &Actor) -> Result<bool, StoreError> {
        let mut tx = self.begin().await?;
        let removed = sqlx::query!(
            "delete from invitations where id = $1 and team_id = $2 and accepted_at is null",
            id.0,
            team.0
        )
        .execute(&mut *tx)
        .await?;
        if removed.rows_affected() == 0 {
            return Ok(false);
        }
        audit::record(&mut tx, actor, "invitation.revoke", &id.to_string(), serde_json::json!({})).await?;
        tx.commit().await?;
        Ok(true)
    }

    /// Somebody who has an account joins.
    pub async fn accept_invitation(
        &self,
        token_hash: &[u8; 32],
        user: UserId,
        actor: &Actor,
    ) -> Result<Accepted, StoreError> {
        let mut tx = self.begin().await?;
        let Some(found) = claim(&mut tx, token_hash).await? else { return Ok(Accepted::Invalid) };
        let email = sqlx::query_scalar!("select email from users where id = $1", user.0).fetch_one(&mut *tx).await?;
        if !email.eq_ignore_ascii_case(&found.email) {
            return Ok(Accepted::OtherPerson);
        }
        let outcome = take(&mut tx, &found, user, actor).await?;
        if matches!(outcome, Accepted::Joined(..)) {
            tx.commit().await?;
        }
        Ok(outcome)
    }

    /// Somebody who has none gets one: that the link came to the address shows that it is theirs.
    pub async fn sign_up_invited(
        &self,
        token_hash: &[u8; 32],
        new: &NewUser,
        actor: &Actor,
    ) -> Result<Accepted, StoreError> {
        let mut tx = self.begin().await?;
        let Some(found) = claim(&mut tx, token_hash).await? else { return Ok(Accepted::Invalid) };
        if !new.email.eq_ignore_ascii_case(&found.email) {
            return Ok(Accepted::OtherPerson);
        }
        users::give_way(&mut tx, &new.email).await?;
        if !users::insert(&mut tx, new, UserStatus::Active).await? {
            return Ok(Accepted::EmailTaken);
        }
        audit::record(&mut tx, actor, "user.create", &new.id.to_string(), serde_json::json!({ "by": "invitation" }))
            .await?;
        let outcome = take(&mut tx, &found, new.id, actor).await?;
        if matches!(outcome, Accepted::Joined(..)) {
            tx.commit().await?;
        }
        Ok(outcome)
    }
}

/// The open invitation of this token, with its team and itself locked in the order in which all changes of members lock.
async fn claim(tx: &mut Tx, token_hash: &[u8; 32]) -> Result<Option<Invitation>, StoreError> {
    let team = sqlx::query_scalar!("select team_id from invitations where token_hash = $1", token_hash)
        .fetch_optional(&mut **tx)
        .await?;
    let Some(team) = team else { return Ok(None) };
    if !locked(tx, TeamId(team)).await? {
        return Ok(None);
    }
    let row = sqlx::query_as!(
        Row,
        "select id, team_id, email, role, invited_by, created_at, expires_at from invitations
         where token_hash = $1 and accepted_at is null and expires_at > now() for update",
        token_hash
    )
    .fetch_optional(&mut **tx)
    .await?;
    row.map(Row::invitation).transpose()
}

async fn take(tx: &mut Tx, found: &Invitation, user: UserId, actor: &Actor) -> Result<Accepted, StoreError> {
    match join(tx, found.team, user, found.role).await? {
        Joined::Made => {}
        Joined::Already => return Ok(Accepted::Already),
        Joined::TooMany => return Ok(Accepted::TooMany),
    }
    sqlx::query!("update invitations set accepted_at = now() where id = $1", found.id.0).execute(&mut **tx).await?;
    let actor = Actor { team: Some(found.team), ..actor.clone() };
    let details = serde_json::json!({ "user": user.to_string(), "role": found.role.as_str() });
    audit::record(tx, &actor, "invitation.accept", &found.id.to_string(), details).await?;
    Ok(Accepted::Joined(found.team, found.role))
}
