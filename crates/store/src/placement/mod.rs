//! Which host gets a sandbox: a reservation made under the host's row lock, so that two placements never sell the same memory.
//!
//! What is reserved is the sum over the rows of the host's sandboxes, and not a counter beside them: a counter has to be right after each
//! of a dozen transitions, of every version of this program that runs at once, and one that has drifted sells what is not there. The sum
//! is taken over one host's rows by an index after that host is locked; to find a host, over a sample of hosts, so that it does not grow
//! with the fleet.

mod rank;

use model::ids::{HostId, TeamId};
use model::shape::Shape;
use sqlx::Connection as _;
use uuid::Uuid;

pub use rank::{Dimension, Rules, Shortage, Strategy, UnknownStrategy};
use rank::{Need, Standing};

use crate::{HOST_SILENCE_MAX, StoreError, Tx};

/// Hosts that are looked at first, at random: their best one is nearly as good as the best of all.
const SAMPLE: i64 = 64;
/// Looked at when the sample has no room.
const HOSTS_MAX: i64 = 5000;
/// Hosts that are locked, one after the other, before it is said that there is no room.
const CANDIDATES_MAX: usize = 16;

/// What a create asks of its host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Asked {
    /// The host has all of them.
    pub tags: Vec<String>,
    /// None: the platform's.
    pub strategy: Option<Strategy>,
}

pub(crate) struct Wanted<'a> {
    /// Of whose own hosts one is chosen, if it is to have its own, and else of the platform's. No other team's host takes it.
    pub team: TeamId,
    pub template: &'a str,
    pub shape: Shape,
    /// So many of them, on one host.
    pub count: i64,
    pub asked: &'a Asked,
    pub refused: &'a [Uuid],
}

impl Wanted<'_> {
    fn need(&self, rules: &Rules) -> Need {
        let memory_mib = i64::from(self.shape.memory().0);
        let pool_mib = memory_mib + i64::from(self.shape.disk().0) / rules.disk_overcommit;
        Need {
            vcpus: self.count * i64::from(self.shape.vcpus()),
            memory_mib: self.count * memory_mib,
            pool_mib: self.count * pool_mib,
        }
    }
}

struct Row {
    id: Uuid,
    epoch: i64,
    cpu_cores: Option<i64>,
    memory_mb: Option<i64>,
    disk_gb: Option<i64>,
    disk_free_mb: Option<i64>,
    vcpus: i64,
    memory_mib: i64,
    pool_mib: i64,
    coming_mib: i64,
    has_kind: bool,
}

impl From<&Row> for Standing {
    fn from(row: &Row) -> Self {
        Self {
            id: HostId(row.id),
            cpu_cores: row.cpu_cores.unwrap_or_default(),
            memory_mb: row.memory_mb.unwrap_or_default(),
            disk_gb: row.disk_gb,
            disk_free_mib: row.disk_free_mb,
            reserved: Need { vcpus: row.vcpus, memory_mib: row.memory_mib, pool_mib: row.pool_mib },
            coming_mib: row.coming_mib,
            has_kind: row.has_kind,
        }
    }
}

/// What is reserved on hosts; the literal names them as `h`, from `$6` on. What is paused, or has ended, reserves nothing: it asks again.
macro_rules! standings {
    ($hosts:literal, $wanted:expr, $rules:expr $(, $argument:expr)*) => {
        sqlx::query_as!(
            Row,
            r#"select h.id, h.epoch, h.cpu_cores, h.memory_mb, h.disk_gb, h.disk_free_mb, reserved.vcpus as "vcpus!",
                   reserved.memory_mib as "memory_mib!", reserved.pool_mib as "pool_mib!", reserved.coming_mib as "coming_mib!",
                   reserved.has_kind as "has_kind!"
               from "# + $hosts + r#" cross join lateral (
                   select coalesce(sum(s.vcpus), 0)::bigint as vcpus, coalesce(sum(s.memory_mib), 0)::bigint as memory_mib,
                       coalesce(sum(s.memory_mib + s.disk_mib / $1::bigint), 0)::bigint as pool_mib,
                       coalesce(sum(s.memory_mib + s.disk_mib / $1::bigint) filter (
                           where s.observed in ('starting', 'resuming') or s.created_at > h.last_heartbeat_at), 0)::bigint as coming_mib,
                       coalesce(bool_or(s.template = $2 and s.vcpus = $3 and s.memory_mib = $4 and s.disk_mib = $5
                           and s.observed = 'running'), false) as has_kind
                   from sandboxes s
                   where s.host_id = h.id and s.observed not in ('killed', 'failed', 'paused', 'lost')) reserved"#,
            $rules.disk_overcommit,
            $wanted.template,
            i32::from($wanted.shape.vcpus()),
            crate::sandboxes::mib($wanted.shape.memory().0),
            crate::sandboxes::mib($wanted.shape.disk().0)
            $(, $argument)*
        )
    };
}

/// Who is to be on a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Whose {
    New,
    /// What is there already and asks for its memory again, also on a host that takes no new ones, and on one whose pool is
    /// full: most of its part of that it has.
    Paused,
}

/// The best host that still has room when its row is locked. The caller's transaction writes the sandbox's `host_id`, which is the
/// reservation.
pub(crate) async fn choose(
    tx: &mut Tx,
    rules: &Rules,
    wanted: &Wanted<'_>,
) -> Result<Result<(HostId, i64), Shortage>, StoreError> {
    let need = wanted.need(rules);
    let strategy = wanted.asked.strategy.unwrap_or(rules.strategy);
    let mut standings = Vec::new();
    for count_max in [SAMPLE, HOSTS_MAX] {
        let rows = standings!(
            "(select * from hosts where state = 'active' and last_heartbeat_at > now() - make_interval(secs => $6) and $2 = any(templates)
                and id <> all($7) and tags @> $8
                and team_id is not distinct from (select id from teams where id = $10 and is_byoc) order by random() limit $9) h",
            wanted,
            rules,
            HOST_SILENCE_MAX.as_secs_f64(),
            wanted.refused,
            &wanted.asked.tags,
            count_max,
            wanted.team.0
        )
        .fetch_all(&mut **tx)
        .await?;
        standings = rows.iter().map(Standing::from).collect();
        let ranked = rank::ranked(&standings, &need, rules, strategy);
        let candidates = &ranked[..ranked.len().min(CANDIDATES_MAX)];
        // Whoever is placed on the best host at this moment is not waited for while another one will do.
        for host in candidates {
            if let Some(epoch) = reserved(tx, *host, rules, wanted, Whose::New, Lock::IfFree).await? {
                return Ok(Ok((*host, epoch)));
            }
        }
        for host in candidates {
            if let Some(epoch) = reserved(tx, *host, rules, wanted, Whose::New, Lock::Wait).await? {
                return Ok(Ok((*host, epoch)));
            }
        }
        if i64::try_from(rows.len()).unwrap_or(i64::MAX) < count_max {
            break;
        }
    }
    Ok(Err(shortage(tx, wanted, &standings, &need, rules).await?))
}

/// Whether what is paused on that host has room to run there again. The caller's transaction writes that it does.
pub(crate) async fn has_room(
    tx: &mut Tx,
    host: HostId,
    rules: &Rules,
    wanted: &Wanted<'_>,
) -> Result<bool, StoreError> {
    Ok(reserved(tx, host, rules, wanted, Whose::Paused, Lock::Wait).await?.is_some())
}

/// The host's epoch, if it takes this beside what it has, or what is short there. The caller's transaction writes what is there
/// then.
pub(crate) async fn reserve_on(
    tx: &mut Tx,
    host: HostId,
    rules: &Rules,
    wanted: &Wanted<'_>,
) -> Result<Result<i64, Shortage>, StoreError> {
    if let Some(epoch) = reserved(tx, host, rules, wanted, Whose::New, Lock::Wait).await? {
        return Ok(Ok(epoch));
    }
    let rows = standings!(
        "(select * from hosts where id = $6 and state = 'active' and (team_id is null or team_id = $7)) h",
        wanted,
        rules,
        host.0,
        wanted.team.0
    )
    .fetch_all(&mut **tx)
    .await?;
    let standings: Vec<Standing> = rows.iter().map(Standing::from).collect();
    let short = match standings.is_empty() {
        true => Shortage(vec![Dimension::Hosts]),
        false => rank::shortage(&standings, &wanted.need(rules), rules).unwrap_or(Shortage(vec![Dimension::Tags])),
    };
    Ok(Err(short))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lock {
    Wait,
    /// Not while somebody else has it.
    IfFree,
}

/// The host's epoch, if it has room when its row is locked. The lock on one that has none is given back, so that two placements that try
/// several hosts never wait for each other.
async fn reserved(
    tx: &mut Tx,
    host: HostId,
    rules: &Rules,
    wanted: &Wanted<'_>,
    whose: Whose,
    lock: Lock,
) -> Result<Option<i64>, StoreError> {
    let mut attempt = (**tx).begin().await?;
    let also = if whose == Whose::Paused { "draining" } else { "active" };
    let locked = match lock {
        Lock::Wait => {
            sqlx::query_scalar!(
                "select id from hosts where id = $1 and state in ('active', $2) and (team_id is null or team_id = $3) for no key update",
                host.0,
                also,
                wanted.team.0
            )
            .fetch_optional(&mut *attempt)
            .await?
        }
        Lock::IfFree => {
            sqlx::query_scalar!(
                "select id from hosts where id = $1 and state in ('active', $2) and (team_id is null or team_id = $3)
                 for no key update skip locked",
                host.0,
                also,
                wanted.team.0
            )
            .fetch_optional(&mut *attempt)
            .await?
        }
    };
    if locked.is_none() {
        attempt.rollback().await?;
        return Ok(None);
    }
    // A statement of its own, so that it sees what was committed while the lock was waited for.
    let row =
        standings!("(select * from hosts where id = $6 and tags @> $7) h", wanted, rules, host.0, &wanted.asked.tags)
            .fetch_optional(&mut *attempt)
            .await?;
    let fitting = row.filter(|row| {
        let mut standing = Standing::from(row);
        if whose == Whose::Paused {
            standing.disk_free_mib = None;
        }
        standing.short(&wanted.need(rules), rules).is_empty()
    });
    match fitting {
        Some(row) => {
            attempt.commit().await?;
            Ok(Some(row.epoch))
        }
        None => {
            attempt.rollback().await?;
            Ok(None)
        }
    }
}

/// Why none of these hosts, which are all that may be asked, takes it.
async fn shortage(
    tx: &mut Tx,
    wanted: &Wanted<'_>,
    standings: &[Standing],
    need: &Need,
    rules: &Rules,
) -> Result<Shortage, StoreError> {
    if !standings.is_empty() {
        // One that had room had none any more when it was locked: what was short then is what all of them fight for.
        let short = rank::shortage(standings, need, rules);
        return Ok(short.unwrap_or_else(|| Shortage(vec![Dimension::Memory])));
    }
    let there = sqlx::query!(
        r#"with own as (select id from teams where id = $4 and is_byoc)
           select exists (select 1 from own) as "own!",
               exists (select 1 from hosts where state = 'active' and last_heartbeat_at > now() - make_interval(secs => $1)
                   and $2 = any(templates) and id <> all($3) and team_id is not distinct from (select id from own)) as "any!""#,
        HOST_SILENCE_MAX.as_secs_f64(),
        wanted.template,
        wanted.refused,
        wanted.team.0
    )
    .fetch_one(&mut **tx)
    .await?;
    Ok(Shortage(vec![match (there.any, there.own) {
        (true, _) => Dimension::Tags,
        (false, true) => Dimension::TeamHosts,
        (false, false) => Dimension::Hosts,
    }]))
}
