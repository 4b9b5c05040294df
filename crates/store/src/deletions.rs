//! How teams and people go. A team takes its keys, members and invitations with it; its row stays, because rows of its sandboxes outlive it.

use model::ids::{TeamId, UserId};

use crate::audit::{self, Actor};
use crate::outbox::{self, Outgoing};
use crate::{Store, StoreError, Tx, hosts, users, wishes};

#[derive(Debug, PartialEq)]
pub enum Deleted {
    Done,
    /// It has sandboxes, snapshots or hosts.
    NotEmpty,
    /// The platform's own.
    Platform,
    Missing,
}

#[derive(Debug, PartialEq)]
pub enum Left {
    /// With so many teams that had nobody else.
    Gone(usize),
    /// These have other members, and no other owner.
    LastOwner(Vec<TeamId>),
    LastAdministrator,
    Missing,
}

impl Store {
    /// A team in which nothing is, and that has no hosts.
    pub async fn delete_team(&self, id: TeamId, actor: &Actor) -> Result<Deleted, StoreError> {
        let mut tx = self.begin().await?;
        if let Some(refused) = locked(&mut tx, id).await? {
            return Ok(refused);
        }
        let is_used = sqlx::query_scalar!(
            r#"select exists (select 1 from sandboxes where team_id = $1 and observed <> 'killed')
                   or exists (select 1 from snapshots where team_id = $1)
                   or exists (select 1 from hosts where team_id = $1) as "used!""#,
            id.0
        )
        .fetch_one(&mut *tx)
        .await?;
        if is_used {
            return Ok(Deleted::NotEmpty);
        }
        end(&mut tx, id, actor).await?;
        tx.commit().await?;
        Ok(Deleted::Done)
    }

    /// A team with all that is in it: its sandboxes are killed, its snapshots removed. Its own hosts go at once with what is on them: nobody
    /// is left who decides about them, and what runs there is for who has the machines to end.
    pub async fn delete_team_with_all(&self, id: TeamId, actor: &Actor) -> Result<Deleted, StoreError> {
        let mut tx = self.begin().await?;
        if let Some(refused) = locked(&mut tx, id).await? {
            return Ok(refused);
        }
        end(&mut tx, id, actor).await?;
        tx.commit().await?;
        Ok(Deleted::Done)
    }

    /// A person, with sessions, keys and the teams in which nobody else is. The audit keeps their id.
    pub async fn delete_user(&self, id: UserId, notice: &Outgoing, actor: &Actor) -> Result<Left, StoreError> {
        let mut tx = self.begin().await?;
        // As where administrators are made: the last one must not go.
        sqlx::query!("lock table users in share row exclusive mode").execute(&mut *tx).await?;
        if users::is_last_administrator(&mut tx, id).await? {
            return Ok(Left::LastAdministrator);
        }
        let teams = sqlx::query_scalar!(
            "select id from teams where deleted_at is null and id in (select team_id from team_members where user_id = $1)
             order by id for update",
            id.0
        )
        .fetch_all(&mut *tx)
        .await?;
        let places = sqlx::query!(
            r#"select m.team_id, t.is_platform,
                   (select count(*) from team_members o where o.team_id = m.team_id and o.user_id <> $1) as "others!",
                   m.role = 'owner' and not exists (select 1 from team_members o
                       where o.team_id = m.team_id and o.user_id <> $1 and o.role = 'owner') as "last_owner!"
               from team_members m join teams t on t.id = m.team_id where m.user_id = $1 and m.team_id = any($2)"#,
            id.0,
            &teams
        )
        .fetch_all(&mut *tx)
        .await?;
        let kept: Vec<TeamId> = places
            .iter()
            .filter(|place| place.last_owner && (place.others > 0 || place.is_platform))
            .map(|place| TeamId(place.team_id))
            .collect();
        if !kept.is_empty() {
            return Ok(Left::LastOwner(kept));
        }
        let mut ended = 0;
        for place in places.iter().filter(|place| place.others == 0) {
            let team = TeamId(place.team_id);
            end(&mut tx, team, &Actor { team: Some(team), ..actor.clone() }).await?;
            ended += 1;
        }
        // What they made for teams that go on opens nothing: they know it. Sessions, links and places in teams go with the row.
        sqlx::query!("delete from api_keys where created_by = $1", id.0).execute(&mut *tx).await?;
        let gone = sqlx::query!("delete from users where id = $1", id.0).execute(&mut *tx).await?;
        if gone.rows_affected() == 0 {
            return Ok(Left::Missing);
        }
        outbox::put(&mut tx, notice).await?;
        audit::record(&mut tx, actor, "user.delete", &id.to_string(), serde_json::json!({ "teams": ended })).await?;
        tx.commit().await?;
        Ok(Left::Gone(ended))
    }
}

/// From now on nobody adds anything to the team. What keeps it from being deleted, if anything does.
async fn locked(tx: &mut Tx, id: TeamId) -> Result<Option<Deleted>, StoreError> {
    // Stronger than the lock of a member's change: what is being made for the team is waited for, and seen by the statements after this.
    let team = sqlx::query!("select is_platform from teams where id = $1 and deleted_at is null for update", id.0)
        .fetch_optional(&mut **tx)
        .await?;
    Ok(match team {
        None => Some(Deleted::Missing),
        Some(team) if team.is_platform => Some(Deleted::Platform),
        Some(_) => None,
    })
}

/// The team's row must be locked.
async fn end(tx: &mut Tx, id: TeamId, actor: &Actor) -> Result<(), StoreError> {
    let hosts = hosts::end_of_team(tx, id, &Actor { team: Some(id), ..actor.clone() }).await?;
    let sandboxes = wishes::end_of_team(tx, id).await?;
    let snapshots = sqlx::query!(
        "update snapshots set state = 'removing', updated_at = now() where team_id = $1 and state <> 'removing'",
        id.0
    )
    .execute(&mut **tx)
    .await?;
    sqlx::query!("update teams set deleted_at = now() where id = $1", id.0).execute(&mut **tx).await?;
    sqlx::query!("delete from api_keys where team_id = $1", id.0).execute(&mut **tx).await?;
    sqlx::query!("delete from channels where team_id = $1", id.0).execute(&mut **tx).await?;
    sqlx::query!("delete from invitations where team_id = $1", id.0).execute(&mut **tx).await?;
    sqlx::query!("delete from team_members where team_id = $1", id.0).execute(&mut **tx).await?;
    let details = serde_json::json!({ "sandboxes": sandboxes, "snapshots": snapshots.rows_affected(), "hosts": hosts });
    audit::record(tx, actor, "team.delete", &id.to_string(), details).await
}
