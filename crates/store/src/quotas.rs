//! What a team may have, and what it has: looked at in the transaction that adds to it, under the team's row lock, so that creates at the
//! same time never exceed it together.

use model::ids::TeamId;
use model::shape::Shape;

use crate::audit::{self, Actor};
use crate::{Store, StoreError, Tx, members};

/// Creates are counted over this time.
const CREATES_SEC: f64 = 60.0;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quota {
    /// That run, are paused, or are on the way between.
    Sandboxes,
    /// Those of them that are not paused.
    Running,
    /// Of those that are not paused.
    Vcpus,
    /// Of those that are not paused; MiB.
    MemoryMb,
    /// Of all; MiB, as large as the disks may become.
    DiskMb,
    /// Creates and forks of the last minute, whatever became of them.
    CreatesPerMin,
}

impl Quota {
    pub const ALL: [Self; 6] =
        [Self::Sandboxes, Self::Running, Self::Vcpus, Self::MemoryMb, Self::DiskMb, Self::CreatesPerMin];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Sandboxes => "sandboxes",
            Self::Running => "running",
            Self::Vcpus => "vcpus",
            Self::MemoryMb => "memory_mb",
            Self::DiskMb => "disk_mb",
            Self::CreatesPerMin => "creates_per_min",
        }
    }
}

/// A number for each quota.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Each<T> {
    pub sandboxes: T,
    pub running: T,
    pub vcpus: T,
    pub memory_mb: T,
    pub disk_mb: T,
    pub creates_per_min: T,
}

impl<T: Copy> Each<T> {
    pub fn of(&self, quota: Quota) -> T {
        match quota {
            Quota::Sandboxes => self.sandboxes,
            Quota::Running => self.running,
            Quota::Vcpus => self.vcpus,
            Quota::MemoryMb => self.memory_mb,
            Quota::DiskMb => self.disk_mb,
            Quota::CreatesPerMin => self.creates_per_min,
        }
    }
}

/// None: no limit; of a team's own: the platform's default.
pub type Limits = Each<Option<i64>>;

impl Limits {
    fn or(&self, default: &Self) -> Self {
        Self {
            sandboxes: self.sandboxes.or(default.sandboxes),
            running: self.running.or(default.running),
            vcpus: self.vcpus.or(default.vcpus),
            memory_mb: self.memory_mb.or(default.memory_mb),
            disk_mb: self.disk_mb.or(default.disk_mb),
            creates_per_min: self.creates_per_min.or(default.creates_per_min),
        }
    }
}

/// The first quota that would be exceeded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exceeded {
    pub quota: Quota,
    pub limit: i64,
    pub used: i64,
    /// How much more was asked for.
    pub asked: i64,
}

/// Why a team may not have more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refused {
    Over(Exceeded),
    /// The team was deleted.
    NoTeam,
}

/// What a team may have and has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Account {
    pub limits: Limits,
    /// What of the limits is the team's own.
    pub own: Limits,
    pub used: Each<i64>,
}

/// So many new sandboxes of a shape.
pub(crate) fn of_new(shape: Shape, count: i64) -> Each<i64> {
    Each {
        sandboxes: count,
        disk_mb: count * i64::from(shape.disk().0),
        creates_per_min: count,
        ..of_paused(shape, count)
    }
}

/// Paused ones that are to run again.
pub(crate) fn of_paused(shape: Shape, count: i64) -> Each<i64> {
    Each {
        running: count,
        vcpus: count * i64::from(shape.vcpus()),
        memory_mb: count * i64::from(shape.memory().0),
        ..Each::default()
    }
}

/// What keeps the team from having this, too. None: until the transaction's end nobody deletes the team, nor, where it has limits, adds to
/// what it has.
pub(crate) async fn claim(
    tx: &mut Tx,
    defaults: &Limits,
    team: TeamId,
    asked: &Each<i64>,
) -> Result<Option<Refused>, StoreError> {
    let Some(own_limits) = kept(tx, team).await? else { return Ok(Some(Refused::NoTeam)) };
    let limits = own_limits.or(defaults);
    if limits == Limits::default() {
        return Ok(None);
    }
    sqlx::query!("select id from teams where id = $1 for no key update", team.0).fetch_optional(&mut **tx).await?;
    // Again, and what it has, in statements of their own: they see what was committed while the lock was waited for.
    let limits = own(tx, team).await?.or(defaults);
    let used = used(tx, team).await?;
    Ok(exceeded(&limits, &used, asked).map(Refused::Over))
}

/// Of what nothing is asked may be exceeded: a limit that is lowered takes nothing away.
fn exceeded(limits: &Limits, used: &Each<i64>, asked: &Each<i64>) -> Option<Exceeded> {
    Quota::ALL.into_iter().find_map(|quota| {
        let (limit, used, asked) = (limits.of(quota)?, used.of(quota), asked.of(quota));
        (asked > 0 && used.saturating_add(asked) > limit).then_some(Exceeded { quota, limit, used, asked })
    })
}

/// The team's own limits; from now on nobody deletes it. None: somebody did.
async fn kept(tx: &mut Tx, team: TeamId) -> Result<Option<Limits>, StoreError> {
    // The weakest lock that a deletion waits for, and that does not keep creates of one team from each other.
    let own = sqlx::query_as!(
        Limits,
        r#"select q.sandboxes as "sandboxes?", q.running as "running?", q.vcpus as "vcpus?", q.memory_mb as "memory_mb?",
               q.disk_mb as "disk_mb?", q.creates_per_min as "creates_per_min?"
           from teams t left join team_quotas q on q.team_id = t.id
           where t.id = $1 and t.deleted_at is null for key share of t"#,
        team.0
    )
    .fetch_optional(&mut **tx)
    .await?;
    Ok(own)
}

async fn own(tx: &mut Tx, team: TeamId) -> Result<Limits, StoreError> {
    let own = sqlx::query_as!(
        Limits,
        "select sandboxes, running, vcpus, memory_mb, disk_mb, creates_per_min from team_quotas where team_id = $1",
        team.0
    )
    .fetch_optional(&mut **tx)
    .await?;
    Ok(own.unwrap_or_default())
}

async fn used(tx: &mut Tx, team: TeamId) -> Result<Each<i64>, StoreError> {
    let held = sqlx::query!(
        r#"select count(*) as "sandboxes!", count(*) filter (where observed not in ('paused', 'lost')) as "running!",
               coalesce(sum(vcpus) filter (where observed not in ('paused', 'lost')), 0)::bigint as "vcpus!",
               coalesce(sum(memory_mib) filter (where observed not in ('paused', 'lost')), 0)::bigint as "memory_mb!",
               coalesce(sum(disk_mib), 0)::bigint as "disk_mb!"
           from sandboxes where team_id = $1 and observed <> 'killed' and observed <> 'failed'"#,
        team.0
    )
    .fetch_one(&mut **tx)
    .await?;
    let created = sqlx::query_scalar!(
        r#"select count(*) as "created!" from sandboxes where team_id = $1 and created_at > now() - make_interval(secs => $2)"#,
        team.0,
        CREATES_SEC
    )
    .fetch_one(&mut **tx)
    .await?;
    Ok(Each {
        sandboxes: held.sandboxes,
        running: held.running,
        vcpus: held.vcpus,
        memory_mb: held.memory_mb,
        disk_mb: held.disk_mb,
        creates_per_min: created,
    })
}

impl Store {
    /// What a team may have and has; none: there is no such team.
    pub async fn quotas(&self, team: TeamId) -> Result<Option<Account>, StoreError> {
        let mut tx = self.begin().await?;
        let is_there = sqlx::query_scalar!(
            r#"select exists (select 1 from teams where id = $1 and deleted_at is null) as "there!""#,
            team.0
        )
        .fetch_one(&mut *tx)
        .await?;
        if !is_there {
            return Ok(None);
        }
        self.account(&mut tx, team).await.map(Some)
    }

    /// Gives a team limits of its own; for those that are none the platform's defaults hold. None: there is no such team.
    pub async fn set_quotas(&self, team: TeamId, own: &Limits, actor: &Actor) -> Result<Option<Account>, StoreError> {
        let mut tx = self.begin().await?;
        if !members::locked(&mut tx, team).await? {
            return Ok(None);
        }
        sqlx::query!(
            "insert into team_quotas (team_id, sandboxes, running, vcpus, memory_mb, disk_mb, creates_per_min)
             values ($1, $2, $3, $4, $5, $6, $7)
             on conflict (team_id) do update set sandboxes = $2, running = $3, vcpus = $4, memory_mb = $5, disk_mb = $6,
                 creates_per_min = $7, updated_at = now()",
            team.0,
            own.sandboxes,
            own.running,
            own.vcpus,
            own.memory_mb,
            own.disk_mb,
            own.creates_per_min
        )
        .execute(&mut *tx)
        .await?;
        let facts: serde_json::Map<String, serde_json::Value> =
            Quota::ALL.iter().map(|quota| (quota.as_str().to_owned(), own.of(*quota).into())).collect();
        audit::record(&mut tx, actor, "team.quotas", &team.to_string(), facts.into()).await?;
        let account = self.account(&mut tx, team).await?;
        tx.commit().await?;
        Ok(Some(account))
    }

    async fn account(&self, tx: &mut Tx, team: TeamId) -> Result<Account, StoreError> {
        let own = own(tx, team).await?;
        Ok(Account { limits: own.or(&self.rules.quotas), own, used: used(tx, team).await? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_that_is_exceeded_is_named_and_what_is_not_asked_for_is_not_looked_at() {
        let limits = Limits { sandboxes: Some(3), memory_mb: Some(1024), ..Limits::default() };
        let used = Each { sandboxes: 2, running: 2, memory_mb: 512, ..Each::default() };
        let shape = Shape::new(1, 512, 1024).unwrap();
        let said = |used: &Each<i64>, asked: &Each<i64>| exceeded(&limits, used, asked).map(|over| over.quota);
        assert_eq!(said(&used, &of_new(shape, 1)), None);
        assert_eq!(said(&used, &of_new(shape, 2)), Some(Quota::Sandboxes));
        let full = Each { sandboxes: 5, memory_mb: 1024, ..used };
        assert_eq!(said(&full, &of_paused(shape, 1)), Some(Quota::MemoryMb), "a resume makes no new sandbox");
        assert_eq!(exceeded(&Limits::default(), &full, &of_new(shape, 64)), None);
    }

    #[test]
    fn a_teams_own_limit_goes_before_the_default() {
        let default = Limits { sandboxes: Some(3), vcpus: Some(4), ..Limits::default() };
        let own = Limits { sandboxes: Some(0), ..Limits::default() };
        assert_eq!(own.or(&default), Limits { sandboxes: Some(0), vcpus: Some(4), ..Limits::default() });
    }
}
