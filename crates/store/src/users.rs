//! People: who they are, whether they may log in, and who administers the platform.

use chrono::{DateTime, Utc};
use model::ids::{SessionId, TeamId, UserId};

use crate::account_tokens::{self, NewAccountToken};
use crate::audit::{self, Actor};
use crate::outbox::{self, Outgoing};
use crate::{Store, StoreError, Tx, sessions};

/// Of one page of [`Store::users`].
pub const PAGE: i64 = 100;
/// Of one answer of [`Store::users_by_beginning`].
const SEARCH_MAX: i64 = 10;

#[derive(Debug, Clone, PartialEq)]
pub struct User {
    pub id: UserId,
    pub email: String,
    pub name: String,
    /// PHC string; none for people who log in elsewhere.
    pub password_hash: Option<String>,
    pub is_admin: bool,
    pub status: UserStatus,
    pub created_at: DateTime<Utc>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UserStatus {
    /// Has not yet shown that the address is theirs.
    Pending,
    Active,
    Disabled,
}

impl UserStatus {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Active => "active",
            Self::Disabled => "disabled",
        }
    }

    fn parse(text: &str) -> Result<Self, StoreError> {
        [Self::Pending, Self::Active, Self::Disabled]
            .into_iter()
            .find(|status| status.as_str() == text)
            .ok_or_else(|| StoreError::Damaged { row: "users".to_owned(), column: "status" })
    }
}

pub struct NewUser {
    pub id: UserId,
    pub email: String,
    pub name: String,
    /// None for people who set it when they activate their account.
    pub password_hash: Option<String>,
}

#[derive(Debug, PartialEq, Eq)]
pub enum SignedUp {
    Made,
    EmailTaken,
    /// Somebody has just signed up with this address, and has a link.
    Cooldown,
}

/// What came of an administrator's change of somebody.
#[derive(Debug, PartialEq, Eq)]
pub enum Governed {
    Done,
    Missing,
    /// Then nobody could administer the platform.
    LastAdministrator,
}

/// A person as administrators see them.
#[derive(Debug, Clone, PartialEq)]
pub struct Person {
    pub user: User,
    pub teams_joined: i64,
    pub teams_owned: i64,
}

struct Row {
    id: uuid::Uuid,
    email: String,
    name: String,
    password_hash: Option<String>,
    is_admin: bool,
    status: String,
    created_at: DateTime<Utc>,
}

impl Row {
    fn user(self) -> Result<User, StoreError> {
        Ok(User {
            id: UserId(self.id),
            email: self.email,
            name: self.name,
            password_hash: self.password_hash,
            is_admin: self.is_admin,
            status: UserStatus::parse(&self.status)?,
            created_at: self.created_at,
        })
    }
}

impl Store {
    pub async fn user_by_email(&self, email: &str) -> Result<Option<User>, StoreError> {
        let row = sqlx::query_as!(
            Row,
            "select id, email, name, password_hash, is_admin, status, created_at from users where lower(email) = lower($1)",
            email
        )
        .fetch_optional(&self.pool)
        .await?;
        row.map(Row::user).transpose()
    }

    pub async fn user(&self, id: UserId) -> Result<Option<User>, StoreError> {
        let row = sqlx::query_as!(
            Row,
            "select id, email, name, password_hash, is_admin, status, created_at from users where id = $1",
            id.0
        )
        .fetch_optional(&self.pool)
        .await?;
        row.map(Row::user).transpose()
    }

    pub async fn has_administrator(&self) -> Result<bool, StoreError> {
        Ok(sqlx::query_scalar!(r#"select exists (select 1 from users where is_admin) as "there!""#)
            .fetch_one(&self.pool)
            .await?)
    }

    /// An administrator who can log in, whoever it is.
    pub async fn any_administrator(&self) -> Result<Option<UserId>, StoreError> {
        let id = sqlx::query_scalar!(
            "select id from users where is_admin and status = 'active' order by created_at limit 1"
        )
        .fetch_optional(&self.pool)
        .await?;
        Ok(id.map(UserId))
    }

    /// The platform's team and its first administrator, when there is no administrator. True when this call made them.
    pub async fn make_first_administrator(
        &self,
        user: UserId,
        team: TeamId,
        email: &str,
        password_hash: &str,
    ) -> Result<bool, StoreError> {
        let mut tx = self.begin().await?;
        // Two replicas that start together must not both print a password.
        sqlx::query!("lock table users in share row exclusive mode").execute(&mut *tx).await?;
        if sqlx::query_scalar!(r#"select exists (select 1 from users where is_admin) as "there!""#)
            .fetch_one(&mut *tx)
            .await?
        {
            return Ok(false);
        }
        sqlx::query!(
            "insert into teams (id, name, is_platform) values ($1, 'platform', true) on conflict do nothing",
            team.0
        )
        .execute(&mut *tx)
        .await?;
        let new = NewUser {
            id: user,
            email: email.to_owned(),
            name: "Administrator".to_owned(),
            password_hash: Some(password_hash.to_owned()),
        };
        if !insert(&mut tx, &new, UserStatus::Active).await? {
            return Ok(false);
        }
        sqlx::query!("update users set is_admin = true where id = $1", user.0).execute(&mut *tx).await?;
        sqlx::query!(
            "insert into team_members (team_id, user_id, role) select id, $1, 'owner' from teams where is_platform",
            user.0
        )
        .execute(&mut *tx)
        .await?;
        audit::record(&mut tx, &Actor::platform("start"), "user.create", &user.to_string(), serde_json::json!({}))
            .await?;
        tx.commit().await?;
        Ok(true)
    }

    /// A person who is not active yet, with the token by which they become it. One who signed up with the address before, and let the link
    /// run out, gives way.
    pub async fn sign_up(
        &self,
        new: &NewUser,
        token: &NewAccountToken,
        mail: &Outgoing,
        actor: &Actor,
    ) -> Result<SignedUp, StoreError> {
        let mut tx = self.begin().await?;
        sqlx::query!(
            "delete from users where lower(email) = lower($1) and status = 'pending' and not exists
                 (select 1 from account_tokens t where t.user_id = users.id and t.used_at is null and t.expires_at > now())",
            new.email
        )
        .execute(&mut *tx)
        .await?;
        if !insert(&mut tx, new, UserStatus::Pending).await? {
            let status = sqlx::query_scalar!("select status from users where lower(email) = lower($1)", new.email)
                .fetch_optional(&mut *tx)
                .await?;
            let is_pending = status.as_deref() == Some(UserStatus::Pending.as_str());
            return Ok(if is_pending { SignedUp::Cooldown } else { SignedUp::EmailTaken });
        }
        account_tokens::insert(&mut tx, token).await?;
        outbox::put(&mut tx, mail).await?;
        audit::record(&mut tx, actor, "user.create", &new.id.to_string(), serde_json::json!({})).await?;
        tx.commit().await?;
        Ok(SignedUp::Made)
    }

    pub async fn rename_user(&self, id: UserId, name: &str, actor: &Actor) -> Result<(), StoreError> {
        let mut tx = self.begin().await?;
        sqlx::query!("update users set name = $2 where id = $1", id.0, name).execute(&mut *tx).await?;
        audit::record(&mut tx, actor, "user.rename", &id.to_string(), serde_json::json!({})).await?;
        tx.commit().await?;
        Ok(())
    }

    /// All sessions but the one that asks end: whoever knew the old password is out.
    pub async fn change_password(
        &self,
        id: UserId,
        password_hash: &str,
        keep: SessionId,
        notice: &Outgoing,
        actor: &Actor,
    ) -> Result<(), StoreError> {
        let mut tx = self.begin().await?;
        set_password(&mut tx, id, password_hash, Some(keep)).await?;
        outbox::put(&mut tx, notice).await?;
        audit::record(&mut tx, actor, "user.password", &id.to_string(), serde_json::json!({})).await?;
        tx.commit().await?;
        Ok(())
    }

    /// People by the time at which they came, page 1 first, and how many there are.
    pub async fn users(&self, page: i64) -> Result<(Vec<Person>, i64), StoreError> {
        let total = sqlx::query_scalar!(r#"select count(*) as "count!" from users"#).fetch_one(&self.pool).await?;
        let rows = sqlx::query!(
            r#"select id, email, name, is_admin, status, created_at,
                   (select count(*) from team_members m where m.user_id = users.id) as "joined!",
                   (select count(*) from team_members m where m.user_id = users.id and role = 'owner') as "owned!"
               from users order by created_at, id limit $1 offset $2"#,
            PAGE,
            (page - 1) * PAGE
        )
        .fetch_all(&self.pool)
        .await?;
        let mut people = Vec::new();
        for row in rows {
            let user = User {
                id: UserId(row.id),
                email: row.email,
                name: row.name,
                password_hash: None,
                is_admin: row.is_admin,
                status: UserStatus::parse(&row.status)?,
                created_at: row.created_at,
            };
            people.push(Person { user, teams_joined: row.joined, teams_owned: row.owned });
        }
        Ok((people, total))
    }

    /// People who may log in, by how their address begins.
    pub async fn users_by_beginning(&self, begins: &str) -> Result<Vec<(UserId, String)>, StoreError> {
        let rows = sqlx::query!(
            "select id, email from users where starts_with(lower(email), lower($1)) and status = 'active'
             order by lower(email) limit $2",
            begins,
            SEARCH_MAX
        )
        .fetch_all(&self.pool)
        .await?;
        Ok(rows.into_iter().map(|row| (UserId(row.id), row.email)).collect())
    }

    /// Whoever is put out loses sessions, links and keys in the same moment; whoever comes back logs in anew.
    pub async fn set_active(&self, id: UserId, to: bool, actor: &Actor) -> Result<Governed, StoreError> {
        let mut tx = self.begin().await?;
        sqlx::query!("lock table users in share row exclusive mode").execute(&mut *tx).await?;
        if !to && is_last_administrator(&mut tx, id).await? {
            return Ok(Governed::LastAdministrator);
        }
        let status = if to { UserStatus::Active } else { UserStatus::Disabled };
        let changed =
            sqlx::query!("update users set status = $2 where id = $1", id.0, status.as_str()).execute(&mut *tx).await?;
        if changed.rows_affected() == 0 {
            return Ok(Governed::Missing);
        }
        if !to {
            sessions::end_others(&mut tx, id, None).await?;
            sqlx::query!("delete from account_tokens where user_id = $1", id.0).execute(&mut *tx).await?;
            sqlx::query!("delete from api_keys where created_by = $1", id.0).execute(&mut *tx).await?;
        }
        let action = if to { "user.enable" } else { "user.disable" };
        audit::record(&mut tx, actor, action, &id.to_string(), serde_json::json!({})).await?;
        tx.commit().await?;
        Ok(Governed::Done)
    }

    pub async fn set_administrator(&self, id: UserId, to: bool, actor: &Actor) -> Result<Governed, StoreError> {
        let mut tx = self.begin().await?;
        sqlx::query!("lock table users in share row exclusive mode").execute(&mut *tx).await?;
        if !to && is_last_administrator(&mut tx, id).await? {
            return Ok(Governed::LastAdministrator);
        }
        let changed = sqlx::query!("update users set is_admin = $2 where id = $1", id.0, to).execute(&mut *tx).await?;
        if changed.rows_affected() == 0 {
            return Ok(Governed::Missing);
        }
        audit::record(&mut tx, actor, "user.admin", &id.to_string(), serde_json::json!({ "admin": to })).await?;
        tx.commit().await?;
        Ok(Governed::Done)
    }
}

/// False: there is somebody with this address.
pub(crate) async fn insert(tx: &mut Tx, new: &NewUser, status: UserStatus) -> Result<bool, StoreError> {
    let made = sqlx::query!(
        "insert into users (id, email, name, password_hash, status) values ($1, $2, $3, $4, $5) on conflict do nothing",
        new.id.0,
        new.email,
        new.name,
        new.password_hash,
        status.as_str()
    )
    .execute(&mut **tx)
    .await?;
    Ok(made.rows_affected() == 1)
}

/// Whoever signed up with this address and never showed that it is theirs stands in nobody's way who has.
pub(crate) async fn give_way(tx: &mut Tx, email: &str) -> Result<(), StoreError> {
    sqlx::query!("delete from users where lower(email) = lower($1) and status = 'pending'", email)
        .execute(&mut **tx)
        .await?;
    Ok(())
}

/// The old password opens nothing from now on, and neither do links and sessions of before.
pub(crate) async fn set_password(
    tx: &mut Tx,
    id: UserId,
    password_hash: &str,
    keep: Option<SessionId>,
) -> Result<(), StoreError> {
    sqlx::query!("update users set password_hash = $2 where id = $1", id.0, password_hash).execute(&mut **tx).await?;
    sqlx::query!("delete from account_tokens where user_id = $1 and used_at is null", id.0).execute(&mut **tx).await?;
    sessions::end_others(tx, id, keep).await
}

/// The table must be locked: two who put each other out at once must not both find the other.
pub(crate) async fn is_last_administrator(tx: &mut Tx, id: UserId) -> Result<bool, StoreError> {
    let last = sqlx::query_scalar!(
        r#"select exists (select 1 from users where id = $1 and is_admin and status = 'active')
               and not exists (select 1 from users where id <> $1 and is_admin and status = 'active') as "last!""#,
        id.0
    )
    .fetch_one(&mut **tx)
    .await?;
    Ok(last)
}
