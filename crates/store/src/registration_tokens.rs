//! One-time tokens by which machines become hosts.
//!
//! A token opens one host, once, for an hour. The key that used it may ask again within the hour, because the answer may have been
//! lost; anybody else gets nothing.

use std::time::Duration;

use model::ids::HostId;

use crate::audit::{self, Actor, ActorKind};
use crate::beats::Tickets;
use crate::hosts::{Change, Facts, Host, hosts};
use crate::idempotency::{self, Claim};
use crate::{Store, StoreError, Tx};

pub const LIFE: Duration = Duration::from_secs(3600);

pub enum Registered {
    Done(Box<Host>),
    /// Unknown, expired, or used by another key.
    Refused,
}

pub enum NewToken {
    Made(Host),
    Repeated(Host),
    OtherArguments,
    Missing,
    /// The host has registered; it needs no token.
    Registered,
}

pub(crate) async fn insert(tx: &mut Tx, host: HostId, token_hash: &[u8; 32]) -> Result<(), StoreError> {
    sqlx::query!(
        "insert into registration_tokens (token_hash, host_id, expires_at) values ($1, $2, now() + make_interval(secs => $3))",
        token_hash,
        host.0,
        LIFE.as_secs_f64()
    )
    .execute(&mut **tx)
    .await?;
    Ok(())
}

impl Store {
    /// Another token for a host that has not registered; the ones before open nothing any more.
    pub async fn new_registration_token(
        &self,
        host: HostId,
        token_hash: &[u8; 32],
        key: Option<&idempotency::Key>,
        actor: &Actor,
    ) -> Result<NewToken, StoreError> {
        let mut tx = self.begin().await?;
        let Some(row) = hosts!("where id = $2 for update of hosts", host.0).fetch_optional(&mut *tx).await? else {
            return Ok(NewToken::Missing);
        };
        let row = Host::from(row);
        if let Some(key) = key {
            match idempotency::claim(&mut tx, key, &host.to_string()).await? {
                Claim::New => {}
                Claim::OtherArguments => return Ok(NewToken::OtherArguments),
                Claim::Repeated(_) => return Ok(NewToken::Repeated(row)),
            }
        }
        if row.state != crate::hosts::HostState::Pending {
            return Ok(NewToken::Registered);
        }
        sqlx::query!("delete from registration_tokens where host_id = $1 and used_at is null", host.0)
            .execute(&mut *tx)
            .await?;
        insert(&mut tx, host, token_hash).await?;
        audit::record(&mut tx, actor, "host.token", &host.to_string(), serde_json::json!({})).await?;
        tx.commit().await?;
        Ok(NewToken::Made(row))
    }

    /// Redeems a token: `key_hash` is the SHA-256 of the public key that the host will prove to own.
    pub async fn register_host(
        &self,
        token_hash: &[u8; 32],
        key_hash: &[u8; 32],
        address: &str,
        facts: &Facts,
    ) -> Result<Registered, StoreError> {
        let mut tx = self.begin().await?;
        let token = sqlx::query!(
            "select host_id, used_by_key from registration_tokens where token_hash = $1 and expires_at > now() for update",
            token_hash
        )
        .fetch_optional(&mut *tx)
        .await?;
        let Some(token) = token else { return Ok(Registered::Refused) };
        if token.used_by_key.as_ref().is_some_and(|used_by| used_by != key_hash) {
            return Ok(Registered::Refused);
        }
        let host = HostId(token.host_id);
        sqlx::query!(
            "update registration_tokens set used_at = coalesce(used_at, now()), used_by_key = $2 where token_hash = $1",
            token_hash,
            key_hash
        )
        .execute(&mut *tx)
        .await?;
        sqlx::query!(
            "update hosts set state = case when state = 'pending' then 'active' else state end, address = $2, arch = $3,
                 cpu_cores = $4, memory_mb = $5, disk_gb = $6, isolation = $7, agent_version = $8, templates = $9,
                 last_heartbeat_at = now(), updated_at = now()
             where id = $1",
            host.0,
            address,
            facts.arch,
            facts.cpu_cores,
            facts.memory_mb,
            facts.disk_gb,
            facts.isolation,
            facts.agent_version,
            &facts.templates,
        )
        .execute(&mut *tx)
        .await?;
        let row = Host::from(hosts!("where id = $2", host.0).fetch_one(&mut *tx).await?);
        if token.used_by_key.is_none() {
            audit::record(&mut tx, &itself(&row), "host.register", &host.to_string(), serde_json::json!({})).await?;
        }
        tx.commit().await?;
        Ok(Registered::Done(Box::new(row)))
    }

    /// A registered host that renews its credentials, perhaps at another address. Refused where two machines may be the host, and this one
    /// may be the copy. `ticket` is as in a heartbeat; it is not used up.
    pub async fn move_host(&self, host: HostId, address: &str, ticket: Option<i64>) -> Result<Change, StoreError> {
        let mut tx = self.begin().await?;
        let there = sqlx::query!(
            r#"select address <> $2 as "moves!", state = 'fenced' as "is_fenced!", ticket_issued, ticket_shown from hosts
               where id = $1 and state <> 'pending' for no key update"#,
            host.0,
            address
        )
        .fetch_optional(&mut *tx)
        .await?;
        let Some(there) = there else { return Ok(Change::Missing) };
        let tickets = Tickets { issued: there.ticket_issued, shown: there.ticket_shown };
        if there.is_fenced || tickets.are_past(ticket) {
            return Ok(Change::Refused);
        }
        let moves = there.moves;
        if moves {
            sqlx::query!("update hosts set address = $2, updated_at = now() where id = $1", host.0, address)
                .execute(&mut *tx)
                .await?;
        }
        let row = Host::from(hosts!("where id = $2", host.0).fetch_one(&mut *tx).await?);
        let facts = serde_json::json!({ "moved": moves });
        audit::record(&mut tx, &itself(&row), "host.renew", &host.to_string(), facts).await?;
        tx.commit().await?;
        Ok(Change::Done(Box::new(row)))
    }
}

/// What a team's host does is that team's to know.
fn itself(host: &Host) -> Actor {
    let team = host.owner.as_ref().map(|owner| owner.team);
    Actor { kind: ActorKind::Host, id: host.id.to_string(), team, request_id: String::new() }
}
