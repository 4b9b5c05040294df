//! Who did what: one entry beside each change, written in the change's own transaction.

use model::ids::TeamId;
use serde_json::Value;

use crate::{StoreError, Tx};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ActorKind {
    User,
    ApiKey,
    Host,
    Platform,
}

impl ActorKind {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::User => "user",
            Self::ApiKey => "api_key",
            Self::Host => "host",
            Self::Platform => "platform",
        }
    }
}

/// In whose name a change happens.
#[derive(Debug, Clone)]
pub struct Actor {
    pub kind: ActorKind,
    /// The id of the user, key or host in its public form; the name of a part of the platform.
    pub id: String,
    pub team: Option<TeamId>,
    pub request_id: String,
}

impl Actor {
    /// A reconciler.
    pub fn platform(part: &str) -> Self {
        Self { kind: ActorKind::Platform, id: part.to_owned(), team: None, request_id: String::new() }
    }
}

pub(crate) async fn record(
    tx: &mut Tx,
    actor: &Actor,
    action: &str,
    subject: &str,
    details: Value,
) -> Result<(), StoreError> {
    sqlx::query!(
        "insert into audit (team_id, actor_kind, actor_id, action, subject, request_id, details) values ($1, $2, $3, $4, $5, $6, $7)",
        actor.team.map(|team| team.0),
        actor.kind.as_str(),
        actor.id,
        action,
        subject,
        actor.request_id,
        details,
    )
    .execute(&mut **tx)
    .await?;
    Ok(())
}
