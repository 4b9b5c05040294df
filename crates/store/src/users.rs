//! People and their teams: the first administrator, and who may log in.

use model::ids::{TeamId, UserId};

use crate::audit::{self, Actor};
use crate::{Store, StoreError};

#[derive(Debug, Clone, PartialEq)]
pub struct User {
    pub id: UserId,
    pub email: String,
    pub name: String,
    /// PHC string; none for people who log in elsewhere.
    pub password_hash: Option<String>,
    pub is_admin: bool,
    pub is_active: bool,
    /// The team that the user joined first.
    pub team: Option<TeamId>,
}

struct Row {
    id: uuid::Uuid,
    email: String,
    name: String,
    password_hash: Option<String>,
    is_admin: bool,
    status: String,
    team_id: Option<uuid::Uuid>,
}

impl From<Row> for User {
    fn from(row: Row) -> Self {
        Self {
            id: UserId(row.id),
            email: row.email,
            name: row.name,
            password_hash: row.password_hash,
            is_admin: row.is_admin,
            is_active: row.status == "active",
            team: row.team_id.map(TeamId),
        }
    }
}

impl Store {
    pub async fn user_by_email(&self, email: &str) -> Result<Option<User>, StoreError> {
        let row = sqlx::query_as!(
            Row,
            r#"select id, email, name, password_hash, is_admin, status,
                   (select team_id from team_members m where m.user_id = users.id order by created_at limit 1) as "team_id?"
               from users where lower(email) = lower($1)"#,
            email
        )
        .fetch_optional(&self.pool)
        .await?;
        Ok(row.map(User::from))
    }

    pub async fn user(&self, id: UserId) -> Result<Option<User>, StoreError> {
        let row = sqlx::query_as!(
            Row,
            r#"select id, email, name, password_hash, is_admin, status,
                   (select team_id from team_members m where m.user_id = users.id order by created_at limit 1) as "team_id?"
               from users where id = $1"#,
            id.0
        )
        .fetch_optional(&self.pool)
        .await?;
        Ok(row.map(User::from))
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
        sqlx::query!(
            "insert into users (id, email, name, password_hash, is_admin) values ($1, $2, 'Administrator', $3, true)",
            user.0,
            email,
            password_hash
        )
        .execute(&mut *tx)
        .await?;
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
}
