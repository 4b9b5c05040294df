//! Teams as administrators of the platform see them.

use chrono::{DateTime, Utc};
use model::ids::TeamId;

use crate::teams::Team;
use crate::{Store, StoreError};

/// Of one page.
pub const PAGE: i64 = 100;

#[derive(Debug, Clone, PartialEq)]
pub struct Standing {
    pub team: Team,
    pub deleted_at: Option<DateTime<Utc>>,
    pub members: i64,
    /// The owner who has been it for longest; none of a team that was deleted.
    pub owner_name: Option<String>,
    pub owner_email: Option<String>,
    /// Neither ended nor paused.
    pub active_sandboxes: i64,
    /// Of its own.
    pub hosts: i64,
}

impl Store {
    /// Teams by the time at which they came, page 1 first, and how many there are.
    pub async fn all_teams(&self, page: i64) -> Result<(Vec<Standing>, i64), StoreError> {
        let total = sqlx::query_scalar!(r#"select count(*) as "count!" from teams"#).fetch_one(&self.pool).await?;
        let rows = sqlx::query!(
            r#"select t.id, t.name, t.slug, t.is_byoc, t.created_at, t.deleted_at, owner.name as "owner_name?", owner.email as "owner_email?",
                   (select count(*) from team_members m where m.team_id = t.id) as "members!",
                   (select count(*) from sandboxes s where s.team_id = t.id
                       and s.observed not in ('killed', 'failed', 'paused', 'lost')) as "active!",
                   (select count(*) from hosts h where h.team_id = t.id) as "hosts!"
               from (select * from teams order by created_at, id limit $1 offset $2) t
               left join lateral (
                   select u.name, u.email from team_members m join users u on u.id = m.user_id
                   where m.team_id = t.id and m.role = 'owner' order by m.created_at, m.user_id limit 1) owner on true
               order by t.created_at, t.id"#,
            PAGE,
            (page - 1) * PAGE
        )
        .fetch_all(&self.pool)
        .await?;
        let standing = rows.into_iter().map(|row| Standing {
            team: Team {
                id: TeamId(row.id),
                name: row.name,
                slug: row.slug,
                is_byoc: row.is_byoc,
                created_at: row.created_at,
            },
            deleted_at: row.deleted_at,
            members: row.members,
            owner_name: row.owner_name,
            owner_email: row.owner_email,
            active_sandboxes: row.active,
            hosts: row.hosts,
        });
        Ok((standing.collect(), total))
    }
}
