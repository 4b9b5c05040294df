//! Who people are at other sites by which they log in. A site's name for a person never changes; addresses do, so that an address opens an
//! account only the first time, when both sides say that it is the person's.

use model::ids::UserId;
use uuid::Uuid;

use crate::audit::{self, Actor, ActorKind};
use crate::users::{self, NewUser, UserStatus};
use crate::{Store, StoreError, Tx};

/// Of one person: one for each site that a platform knows.
const IDENTITIES_MAX: i64 = 100;

/// What a site says of who has logged in there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claimed {
    pub provider: &'static str,
    pub subject: String,
    /// Only one that the site has verified.
    pub email: Option<String>,
    pub name: String,
}

#[derive(Debug, PartialEq, Eq)]
pub enum Entered {
    As(UserId),
    /// An account has the address, and nobody has shown there that it is theirs.
    Pending,
    Disabled,
    /// The site does not say of any address that it is the person's.
    NotVerified,
    /// Nobody has the address, and no account is to be made.
    NoAccount,
    /// The account with the address is bound to somebody else at that site.
    Taken,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unknown {
    Refused,
    SignedUp,
}

#[derive(Debug, PartialEq, Eq)]
pub enum Disconnected {
    Done,
    /// Nothing would be left by which to log in.
    LastMethod,
    Missing,
}

impl Store {
    /// The account of who has logged in at a site: bound before, bound now by an address that both sides have verified, or made.
    pub async fn enter(&self, claimed: &Claimed, unknown: Unknown, request_id: &str) -> Result<Entered, StoreError> {
        let mut tx = self.begin().await?;
        if let Some(known) = known(&mut tx, claimed).await? {
            tx.commit().await?;
            return Ok(known);
        }
        let Some(email) = &claimed.email else { return Ok(Entered::NotVerified) };
        let there =
            sqlx::query!("select id, status from users where lower(email) = lower($1) for no key update", email)
                .fetch_optional(&mut *tx)
                .await?;
        let user = match there {
            Some(row) if row.status == UserStatus::Pending.as_str() => return Ok(Entered::Pending),
            Some(row) if row.status != UserStatus::Active.as_str() => return Ok(Entered::Disabled),
            Some(row) => {
                let user = UserId(row.id);
                if !bind(&mut tx, claimed, user).await? {
                    return Ok(Entered::Taken);
                }
                let details = serde_json::json!({ "provider": claimed.provider, "by": "email" });
                audit::record(&mut tx, &its_person(user, request_id), "user.connect", &user.to_string(), details)
                    .await?;
                user
            }
            None if unknown == Unknown::Refused => return Ok(Entered::NoAccount),
            None => {
                let user = UserId(Uuid::now_v7());
                let new = NewUser { id: user, email: email.clone(), name: claimed.name.clone(), password_hash: None };
                // Of two logins that make the account at once the second finds it made, and is tried again by its person.
                if !users::insert(&mut tx, &new, UserStatus::Active).await? || !bind(&mut tx, claimed, user).await? {
                    return Ok(Entered::Taken);
                }
                let details = serde_json::json!({ "by": claimed.provider });
                audit::record(&mut tx, &its_person(user, request_id), "user.create", &user.to_string(), details)
                    .await?;
                user
            }
        };
        tx.commit().await?;
        Ok(Entered::As(user))
    }

    /// Binds who has logged in at a site to a person who is logged in here. False: one of both is bound already.
    pub async fn connect_identity(&self, claimed: &Claimed, user: UserId, actor: &Actor) -> Result<bool, StoreError> {
        let mut tx = self.begin().await?;
        if !bind(&mut tx, claimed, user).await? {
            return Ok(false);
        }
        let details = serde_json::json!({ "provider": claimed.provider, "by": "person" });
        audit::record(&mut tx, actor, "user.connect", &user.to_string(), details).await?;
        tx.commit().await?;
        Ok(true)
    }

    pub async fn disconnect_identity(
        &self,
        user: UserId,
        provider: &str,
        actor: &Actor,
    ) -> Result<Disconnected, StoreError> {
        let mut tx = self.begin().await?;
        // Two that are taken away at once must not both find the other.
        let has_password = sqlx::query_scalar!(
            r#"select password_hash is not null as "has!" from users where id = $1 for no key update"#,
            user.0
        )
        .fetch_optional(&mut *tx)
        .await?;
        let bound = sqlx::query_scalar!("select provider from identities where user_id = $1", user.0)
            .fetch_all(&mut *tx)
            .await?;
        if !bound.iter().any(|bound| bound == provider) {
            return Ok(Disconnected::Missing);
        }
        if has_password != Some(true) && bound.len() == 1 {
            return Ok(Disconnected::LastMethod);
        }
        sqlx::query!("delete from identities where user_id = $1 and provider = $2", user.0, provider)
            .execute(&mut *tx)
            .await?;
        let details = serde_json::json!({ "provider": provider });
        audit::record(&mut tx, actor, "user.disconnect", &user.to_string(), details).await?;
        tx.commit().await?;
        Ok(Disconnected::Done)
    }

    /// The sites by which a person logs in.
    pub async fn providers_of(&self, user: UserId) -> Result<Vec<String>, StoreError> {
        Ok(sqlx::query_scalar!(
            "select provider from identities where user_id = $1 order by provider limit $2",
            user.0,
            IDENTITIES_MAX
        )
        .fetch_all(&self.pool)
        .await?)
    }
}

/// Whom the identity is bound to.
async fn known(tx: &mut Tx, claimed: &Claimed) -> Result<Option<Entered>, StoreError> {
    let row = sqlx::query!(
        "select u.id, u.status from identities i join users u on u.id = i.user_id where i.provider = $1 and i.subject = $2",
        claimed.provider,
        claimed.subject
    )
    .fetch_optional(&mut **tx)
    .await?;
    let Some(row) = row else { return Ok(None) };
    if row.status != UserStatus::Active.as_str() {
        return Ok(Some(Entered::Disabled));
    }
    if let Some(email) = &claimed.email {
        sqlx::query!(
            "update identities set email = $3 where provider = $1 and subject = $2 and email <> $3",
            claimed.provider,
            claimed.subject,
            email
        )
        .execute(&mut **tx)
        .await?;
    }
    Ok(Some(Entered::As(UserId(row.id))))
}

/// False: the identity is somebody's, or the person has another one of that site.
async fn bind(tx: &mut Tx, claimed: &Claimed, user: UserId) -> Result<bool, StoreError> {
    let made = sqlx::query!(
        "insert into identities (provider, subject, user_id, email) values ($1, $2, $3, $4) on conflict do nothing",
        claimed.provider,
        claimed.subject,
        user.0,
        claimed.email.as_deref().unwrap_or_default()
    )
    .execute(&mut **tx)
    .await?;
    Ok(made.rows_affected() == 1)
}

fn its_person(user: UserId, request_id: &str) -> Actor {
    Actor { kind: ActorKind::User, id: user.to_string(), team: None, request_id: request_id.to_owned() }
}
