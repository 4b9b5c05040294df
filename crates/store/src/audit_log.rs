//! Reads what was written down of who did what, newest first, a page at a time.

use std::collections::{BTreeSet, HashMap};

use chrono::{DateTime, Utc};
use model::ids::{ApiKeyId, TeamId, UserId};
use serde_json::Value;
use uuid::Uuid;

use crate::{Store, StoreError};

/// Of one page.
pub const PAGE_MAX: i64 = 200;

#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    pub id: i64,
    pub at: DateTime<Utc>,
    pub actor_kind: String,
    /// In its public form.
    pub actor_id: String,
    /// Empty: the actor is gone, or is no person and no key.
    pub actor_name: String,
    /// Kind of the subject and verb, with a dot between them.
    pub action: String,
    pub subject: String,
    pub request_id: String,
    pub details: Value,
}

/// Where a page begins: the newest entry that is older.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Before {
    #[default]
    Nothing,
    Entry(i64),
    Instant(DateTime<Utc>),
}

#[derive(Debug, Clone, Default, PartialEq)]
pub struct Asked {
    /// None: the platform's own.
    pub team: Option<TeamId>,
    /// Kinds of subjects, or whole actions, that the asker may see. Empty: all.
    pub visible: Vec<String>,
    /// Kinds of subjects. Empty: all.
    pub kinds: Vec<String>,
    /// Verbs, or whole actions. Empty: all.
    pub actions: Vec<String>,
    pub before: Before,
    /// At most [`PAGE_MAX`].
    pub limit: i64,
}

struct Row {
    id: i64,
    at: DateTime<Utc>,
    actor_kind: String,
    actor_id: String,
    action: String,
    subject: String,
    request_id: String,
    details: Value,
}

impl Store {
    pub async fn audit_log(&self, asked: &Asked) -> Result<Vec<Entry>, StoreError> {
        let (before_id, before_at) = match asked.before {
            Before::Nothing => (None, None),
            Before::Entry(id) => (Some(id), None),
            Before::Instant(at) => (None, Some(at)),
        };
        let rows = sqlx::query_as!(
            Row,
            "select id, at, actor_kind, actor_id, action, subject, request_id, details from audit
             where team_id is not distinct from $1
                 and ($2::bigint is null or id < $2) and ($3::timestamptz is null or at < $3)
                 and (cardinality($4::text[]) = 0 or split_part(action, '.', 1) = any($4) or action = any($4))
                 and (cardinality($5::text[]) = 0 or split_part(action, '.', 1) = any($5))
                 and (cardinality($6::text[]) = 0 or split_part(action, '.', 2) = any($6) or action = any($6))
             order by id desc limit $7",
            asked.team.map(|team| team.0),
            before_id,
            before_at,
            &asked.visible,
            &asked.kinds,
            &asked.actions,
            asked.limit.min(PAGE_MAX)
        )
        .fetch_all(&self.pool)
        .await?;
        let names = self.names_of(rows.iter().map(|row| row.actor_id.as_str())).await?;
        let entry = |row: Row| Entry {
            actor_name: names.get(&row.actor_id).cloned().unwrap_or_default(),
            id: row.id,
            at: row.at,
            actor_kind: row.actor_kind,
            actor_id: row.actor_id,
            action: row.action,
            subject: row.subject,
            request_id: row.request_id,
            details: row.details,
        };
        Ok(rows.into_iter().map(entry).collect())
    }

    /// What people and keys are called now.
    pub(crate) async fn names_of<'a>(
        &self,
        ids: impl Iterator<Item = &'a str> + Clone,
    ) -> Result<HashMap<String, String>, StoreError> {
        let users: BTreeSet<Uuid> = ids.clone().filter_map(|id| id.parse().ok().map(|id: UserId| id.0)).collect();
        let keys: BTreeSet<Uuid> = ids.filter_map(|id| id.parse().ok().map(|id: ApiKeyId| id.0)).collect();
        let (users, keys) = (Vec::from_iter(users), Vec::from_iter(keys));
        let mut names = HashMap::new();
        if !users.is_empty() {
            let found = sqlx::query!("select id, name from users where id = any($1)", &users).fetch_all(&self.pool);
            names.extend(found.await?.into_iter().map(|row| (UserId(row.id).to_string(), row.name)));
        }
        if !keys.is_empty() {
            let found = sqlx::query!("select id, name from api_keys where id = any($1)", &keys).fetch_all(&self.pool);
            names.extend(found.await?.into_iter().map(|row| (ApiKeyId(row.id).to_string(), row.name)));
        }
        Ok(names)
    }
}
