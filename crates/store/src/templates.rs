//! Which templates a team's sandboxes can begin with: what the hosts say that take them. These are the platform's, or the team's own; what one
//! team's hosts say is nothing to another team.

use model::ids::TeamId;

use crate::{HOST_SILENCE_MAX, Store, StoreError};

impl Store {
    /// What sandboxes of the team can begin with, by name: the templates of the hosts that take them.
    pub async fn offered_templates(&self, team: TeamId) -> Result<Vec<String>, StoreError> {
        Ok(sqlx::query_scalar!(
            r#"select distinct unnest(templates) as "name!" from hosts
               where state <> 'pending' and team_id is not distinct from (select id from teams where id = $1 and is_byoc) order by 1"#,
            team.0
        )
        .fetch_all(&self.pool)
        .await?)
    }

    /// True when some host that takes the team's sandboxes offers the template.
    pub async fn template_is_offered(&self, team: TeamId, template: &str) -> Result<bool, StoreError> {
        Ok(sqlx::query_scalar!(
            r#"select exists (select 1 from hosts where state <> 'pending' and $1 = any(templates)
                   and team_id is not distinct from (select id from teams where id = $2 and is_byoc)) as "there!""#,
            template,
            team.0
        )
        .fetch_one(&self.pool)
        .await?)
    }

    /// True when some host that takes the team's sandboxes has been heard of lately.
    pub async fn any_host_online(&self, team: TeamId) -> Result<bool, StoreError> {
        Ok(sqlx::query_scalar!(
            r#"select exists (select 1 from hosts where state = 'active' and last_heartbeat_at > now() - make_interval(secs => $1)
                   and team_id is not distinct from (select id from teams where id = $2 and is_byoc)) as "there!""#,
            HOST_SILENCE_MAX.as_secs_f64(),
            team.0
        )
        .fetch_one(&self.pool)
        .await?)
    }
}
