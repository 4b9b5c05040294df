//! Credentials of machines, known by the SHA-256 of their 32 random bytes.

use chrono::{DateTime, Utc};
use model::access::Scope;
use model::ids::{ApiKeyId, TeamId, UserId};
use uuid::Uuid;

use crate::audit::{self, Actor};
use crate::idempotency::{self, Claim};
use crate::{Store, StoreError, teams};

/// `last_used` is written at most this often: a key that is used thousands of times a second must not be a row that all wait for.
const LAST_USED_STEP_SEC: f64 = 60.0;
/// Of one team; more is a mistake in somebody's script.
pub const KEYS_MAX: i64 = 1000;

#[derive(Debug, Clone, PartialEq)]
pub struct ApiKey {
    pub id: ApiKeyId,
    pub team: TeamId,
    pub name: String,
    pub key_prefix: String,
    pub created_by: Option<UserId>,
    pub created_at: DateTime<Utc>,
    pub last_used: Option<DateTime<Utc>>,
    pub scopes: Vec<Scope>,
    pub expires_at: Option<DateTime<Utc>>,
}

/// What a key that opens something opens.
#[derive(Debug, Clone, PartialEq)]
pub struct KeyStanding {
    pub id: ApiKeyId,
    pub team: TeamId,
    pub scopes: Vec<Scope>,
}

/// How a request, or a stream that has been open for a while, names its key.
#[derive(Debug, Clone, Copy)]
pub enum KeyBy<'a> {
    Hash(&'a [u8; 32]),
    Id(ApiKeyId),
}

pub struct NewApiKey {
    pub id: ApiKeyId,
    pub team: TeamId,
    pub name: String,
    pub key_hash: [u8; 32],
    pub key_prefix: String,
    pub created_by: Option<UserId>,
    pub scopes: Vec<Scope>,
    pub expires_at: Option<DateTime<Utc>>,
}

#[derive(Debug, PartialEq, Eq)]
pub enum Removed {
    Done,
    Missing,
    /// Somebody else made it, and who asks may remove their own only.
    NotOwn,
}

pub enum Created {
    Made(ApiKey),
    /// What the first call under the same idempotency key made.
    Repeated(ApiKey),
    OtherArguments,
    /// The team has [`KEYS_MAX`].
    TooMany,
    /// The first call's key was deleted since.
    Gone,
    /// The team was deleted.
    NoTeam,
}

struct Row {
    id: Uuid,
    team_id: Uuid,
    name: String,
    key_prefix: String,
    created_by: Option<Uuid>,
    created_at: DateTime<Utc>,
    last_used: Option<DateTime<Utc>>,
    scopes: Vec<String>,
    expires_at: Option<DateTime<Utc>>,
}

impl From<Row> for ApiKey {
    fn from(row: Row) -> Self {
        Self {
            id: ApiKeyId(row.id),
            team: TeamId(row.team_id),
            name: row.name,
            key_prefix: row.key_prefix,
            created_by: row.created_by.map(UserId),
            created_at: row.created_at,
            last_used: row.last_used,
            scopes: known(&row.scopes),
            expires_at: row.expires_at,
        }
    }
}

/// A word that a newer program wrote opens nothing here.
fn known(scopes: &[String]) -> Vec<Scope> {
    scopes.iter().filter_map(|scope| scope.parse().ok()).collect()
}

impl Store {
    pub async fn create_api_key(
        &self,
        new: &NewApiKey,
        key: Option<&idempotency::Key>,
        actor: &Actor,
    ) -> Result<Created, StoreError> {
        let mut tx = self.begin().await?;
        if let Some(key) = key {
            match idempotency::claim(&mut tx, key, &new.id.to_string()).await? {
                Claim::New => {}
                Claim::OtherArguments => return Ok(Created::OtherArguments),
                Claim::Repeated(subject) => {
                    let id: ApiKeyId =
                        subject.parse().map_err(|_| StoreError::Damaged { row: key.key.clone(), column: "subject" })?;
                    let first = sqlx::query_as!(
                        Row,
                        "select id, team_id, name, key_prefix, created_by, created_at, last_used, scopes, expires_at from api_keys
                         where id = $1 and team_id = $2",
                        id.0,
                        new.team.0
                    )
                    .fetch_optional(&mut *tx)
                    .await?;
                    return Ok(first.map_or(Created::Gone, |row| Created::Repeated(row.into())));
                }
            }
        }
        if !teams::stays(&mut tx, new.team).await? {
            return Ok(Created::NoTeam);
        }
        let count = sqlx::query_scalar!(r#"select count(*) as "count!" from api_keys where team_id = $1"#, new.team.0)
            .fetch_one(&mut *tx)
            .await?;
        if count >= KEYS_MAX {
            return Ok(Created::TooMany);
        }
        let row = sqlx::query_as!(
            Row,
            "insert into api_keys (id, team_id, name, key_hash, key_prefix, created_by, scopes, expires_at)
             values ($1, $2, $3, $4, $5, $6, $7, $8)
             returning id, team_id, name, key_prefix, created_by, created_at, last_used, scopes, expires_at",
            new.id.0,
            new.team.0,
            new.name,
            &new.key_hash,
            new.key_prefix,
            new.created_by.map(|user| user.0),
            &new.scopes.iter().map(ToString::to_string).collect::<Vec<_>>(),
            new.expires_at,
        )
        .fetch_one(&mut *tx)
        .await?;
        let details = serde_json::json!({
            "name": new.name,
            "scopes": new.scopes.iter().map(|scope| scope.as_str()).collect::<Vec<_>>(),
            "expires_at": new.expires_at,
        });
        audit::record(&mut tx, actor, "api_key.create", &new.id.to_string(), details).await?;
        tx.commit().await?;
        Ok(Created::Made(row.into()))
    }

    pub async fn api_keys(&self, team: TeamId) -> Result<Vec<ApiKey>, StoreError> {
        let rows = sqlx::query_as!(
            Row,
            "select id, team_id, name, key_prefix, created_by, created_at, last_used, scopes, expires_at from api_keys
             where team_id = $1 order by created_at, id limit $2",
            team.0,
            KEYS_MAX
        )
        .fetch_all(&self.pool)
        .await?;
        Ok(rows.into_iter().map(ApiKey::from).collect())
    }

    /// `own_only`: the person who may remove no keys but their own.
    pub async fn delete_api_key(
        &self,
        team: TeamId,
        id: ApiKeyId,
        own_only: Option<UserId>,
        actor: &Actor,
    ) -> Result<Removed, StoreError> {
        let mut tx = self.begin().await?;
        let maker = sqlx::query_scalar!(
            "select created_by from api_keys where id = $1 and team_id = $2 for update",
            id.0,
            team.0
        )
        .fetch_optional(&mut *tx)
        .await?;
        let Some(maker) = maker else { return Ok(Removed::Missing) };
        if own_only.is_some_and(|user| maker != Some(user.0)) {
            return Ok(Removed::NotOwn);
        }
        sqlx::query!("delete from api_keys where id = $1", id.0).execute(&mut *tx).await?;
        audit::record(&mut tx, actor, "api_key.delete", &id.to_string(), serde_json::json!({})).await?;
        tx.commit().await?;
        Ok(Removed::Done)
    }

    /// The key, when its time is not over; its use is noted.
    pub async fn use_api_key(&self, by: KeyBy<'_>) -> Result<Option<KeyStanding>, StoreError> {
        let (hash, id) = match by {
            KeyBy::Hash(hash) => (Some(hash.as_slice()), None),
            KeyBy::Id(id) => (None, Some(id.0)),
        };
        let found = sqlx::query!(
            r#"select id, team_id, scopes, (last_used is null or last_used < now() - make_interval(secs => $3)) as "note!"
               from api_keys where (key_hash = $1 or id = $2) and (expires_at is null or expires_at > now())"#,
            hash,
            id,
            LAST_USED_STEP_SEC
        )
        .fetch_optional(&self.pool)
        .await?;
        let Some(found) = found else { return Ok(None) };
        if found.note {
            sqlx::query!("update api_keys set last_used = now() where id = $1", found.id).execute(&self.pool).await?;
        }
        Ok(Some(KeyStanding { id: ApiKeyId(found.id), team: TeamId(found.team_id), scopes: known(&found.scopes) }))
    }
}
