//! What is sent to an address to show that it is somebody's: works once, for one purpose, for a short time. Only its hash is kept.

use chrono::{DateTime, Utc};
use model::ids::UserId;

use crate::audit::{self, Actor, ActorKind};
use crate::outbox::{self, Outgoing};
use crate::users::{self, UserStatus};
use crate::{Store, StoreError, Tx};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    Activation,
    PasswordReset,
}

impl Purpose {
    fn as_str(self) -> &'static str {
        match self {
            Self::Activation => "activation",
            Self::PasswordReset => "password_reset",
        }
    }
}

pub struct NewAccountToken {
    pub user: UserId,
    pub purpose: Purpose,
    pub hash: [u8; 32],
    pub expires_at: DateTime<Utc>,
}

#[derive(Debug, PartialEq)]
pub enum Activated {
    /// Who may log in from now on.
    Now(UserId),
    /// The account was active already.
    Already,
    /// The person has none yet, and must give one.
    NeedsPassword,
    /// Unknown, used, or over.
    Invalid,
}

impl Store {
    /// A new token; older ones of its purpose stop working. False when the person is not in a state in which it would help.
    pub async fn issue_account_token(
        &self,
        new: &NewAccountToken,
        mail: Option<&Outgoing>,
        actor: &Actor,
    ) -> Result<bool, StoreError> {
        let mut tx = self.begin().await?;
        let wanted = match new.purpose {
            Purpose::Activation => UserStatus::Pending,
            Purpose::PasswordReset => UserStatus::Active,
        };
        let there = sqlx::query!(
            "select id from users where id = $1 and status = $2 for no key update",
            new.user.0,
            wanted.as_str()
        )
        .fetch_optional(&mut *tx)
        .await?;
        if there.is_none() {
            return Ok(false);
        }
        sqlx::query!(
            "delete from account_tokens where user_id = $1 and kind = $2 and used_at is null",
            new.user.0,
            new.purpose.as_str()
        )
        .execute(&mut *tx)
        .await?;
        insert(&mut tx, new).await?;
        if let Some(mail) = mail {
            outbox::put(&mut tx, mail).await?;
        }
        let details = serde_json::json!({ "purpose": new.purpose.as_str() });
        audit::record(&mut tx, actor, "user.link", &new.user.to_string(), details).await?;
        tx.commit().await?;
        Ok(true)
    }

    /// `password_hash` is for people who have none.
    pub async fn activate(
        &self,
        hash: &[u8; 32],
        password_hash: Option<&str>,
        request_id: &str,
    ) -> Result<Activated, StoreError> {
        let mut tx = self.begin().await?;
        let found = sqlx::query!(
            r#"select t.user_id, t.used_at is null and t.expires_at > now() as "is_open!", u.status,
                   u.password_hash is not null as "has_password!"
               from account_tokens t join users u on u.id = t.user_id
               where t.token_hash = $1 and t.kind = 'activation' for update"#,
            hash
        )
        .fetch_optional(&mut *tx)
        .await?;
        let Some(found) = found else { return Ok(Activated::Invalid) };
        if found.status == UserStatus::Active.as_str() {
            return Ok(Activated::Already);
        }
        if !found.is_open || found.status != UserStatus::Pending.as_str() {
            return Ok(Activated::Invalid);
        }
        if !found.has_password && password_hash.is_none() {
            return Ok(Activated::NeedsPassword);
        }
        sqlx::query!("update account_tokens set used_at = now() where token_hash = $1", hash).execute(&mut *tx).await?;
        sqlx::query!(
            "update users set status = 'active', password_hash = coalesce(password_hash, $2) where id = $1",
            found.user_id,
            password_hash
        )
        .execute(&mut *tx)
        .await?;
        let user = UserId(found.user_id);
        let actor = its_person(user, request_id);
        audit::record(&mut tx, &actor, "user.activate", &user.to_string(), serde_json::json!({})).await?;
        tx.commit().await?;
        Ok(Activated::Now(user))
    }

    /// The password is another one, all sessions of its person have ended, and their address gets the notice. False when the token opens
    /// nothing.
    pub async fn reset_password(
        &self,
        hash: &[u8; 32],
        password_hash: &str,
        notice: impl FnOnce(&str) -> Outgoing + Send,
        request_id: &str,
    ) -> Result<bool, StoreError> {
        let mut tx = self.begin().await?;
        let found = sqlx::query!(
            "update account_tokens t set used_at = now() from users u
             where t.token_hash = $1 and t.kind = 'password_reset' and t.used_at is null and t.expires_at > now()
                 and u.id = t.user_id and u.status = 'active'
             returning t.user_id, u.email",
            hash
        )
        .fetch_optional(&mut *tx)
        .await?;
        let Some(found) = found else { return Ok(false) };
        let user = UserId(found.user_id);
        users::set_password(&mut tx, user, password_hash, None).await?;
        outbox::put(&mut tx, &notice(&found.email)).await?;
        let actor = its_person(user, request_id);
        audit::record(&mut tx, &actor, "user.password_reset", &user.to_string(), serde_json::json!({})).await?;
        tx.commit().await?;
        Ok(true)
    }
}

pub(crate) async fn insert(tx: &mut Tx, new: &NewAccountToken) -> Result<(), StoreError> {
    sqlx::query!(
        "insert into account_tokens (token_hash, user_id, kind, expires_at) values ($1, $2, $3, $4)",
        &new.hash,
        new.user.0,
        new.purpose.as_str(),
        new.expires_at
    )
    .execute(&mut **tx)
    .await?;
    Ok(())
}

/// Whoever holds the token acts as its person.
fn its_person(user: UserId, request_id: &str) -> Actor {
    Actor { kind: ActorKind::User, id: user.to_string(), team: None, request_id: request_id.to_owned() }
}
