//! Which host gets a sandbox: a reservation made under the host's row lock, so that two placements never sell the same memory.

use model::ids::HostId;
use uuid::Uuid;

use crate::{HOST_SILENCE_MAX, StoreError, Tx};

/// vCPUs sold per core: sandboxes wait most of the time, and cgroups share the cores fairly.
const VCPUS_PER_CORE: i64 = 16;
/// A host with less free disk gets no new sandbox; the agent's own reserve has the last word.
const DISK_FREE_MIN_MIB: i64 = 1024;
/// Hosts looked at before it is said that there is no room.
const CANDIDATES_MAX: i64 = 16;

pub(crate) struct Wanted<'a> {
    pub template: &'a str,
    pub vcpus: i64,
    pub memory_mib: i64,
    pub refused: &'a [Uuid],
}

/// The host with the most memory to give that still has room when its row is locked. The caller's transaction writes the sandbox's
/// `host_id`, which is the reservation.
pub(crate) async fn choose(tx: &mut Tx, wanted: &Wanted<'_>) -> Result<Option<(HostId, i64)>, StoreError> {
    let candidates = sqlx::query_scalar!(
        "select h.id from hosts h
         where h.state = 'active' and h.last_heartbeat_at > now() - make_interval(secs => $1) and $2 = any(h.templates)
             and h.id <> all($3) and h.memory_mb >= $4 and coalesce(h.disk_free_mb, $5) >= $5
         order by h.memory_mb - coalesce(
             (select sum(s.memory_mib) from sandboxes s
              where s.host_id = h.id and s.observed not in ('killed', 'failed', 'paused')), 0) desc
         limit $6",
        HOST_SILENCE_MAX.as_secs_f64(),
        wanted.template,
        wanted.refused,
        wanted.memory_mib,
        DISK_FREE_MIN_MIB,
        CANDIDATES_MAX,
    )
    .fetch_all(&mut **tx)
    .await?;
    for host in candidates {
        if let Some(epoch) = room_on(tx, host, wanted, "active").await? {
            return Ok(Some((HostId(host), epoch)));
        }
    }
    Ok(None)
}

/// Whether what is paused on that host has room to run there again, also on one that takes no new ones. The caller's transaction writes
/// that it does.
pub(crate) async fn has_room(tx: &mut Tx, host: HostId, wanted: &Wanted<'_>) -> Result<bool, StoreError> {
    Ok(room_on(tx, host.0, wanted, "draining").await?.is_some())
}

/// The host's epoch, if it takes this beside what it has. The caller's transaction writes what is there then.
pub(crate) async fn reserve_on(tx: &mut Tx, host: HostId, wanted: &Wanted<'_>) -> Result<Option<i64>, StoreError> {
    room_on(tx, host.0, wanted, "active").await
}

/// The host's epoch, if it has room when its row is locked. `also`: a state in which it may be beside `active`.
async fn room_on(tx: &mut Tx, host: Uuid, wanted: &Wanted<'_>, also: &str) -> Result<Option<i64>, StoreError> {
    let locked = sqlx::query!(
        "select epoch, memory_mb, cpu_cores from hosts where id = $1 and state in ('active', $2) for update",
        host,
        also
    )
    .fetch_optional(&mut **tx)
    .await?;
    let Some(locked) = locked else { return Ok(None) };
    // A statement of its own, so that it sees what was committed while the lock was waited for.
    let sold = sqlx::query!(
        r#"select coalesce(sum(memory_mib), 0)::bigint as "memory_mib!", coalesce(sum(vcpus), 0)::bigint as "vcpus!"
           from sandboxes where host_id = $1 and observed not in ('killed', 'failed', 'paused')"#,
        host
    )
    .fetch_one(&mut **tx)
    .await?;
    let has_memory = sold.memory_mib + wanted.memory_mib <= locked.memory_mb.unwrap_or_default();
    let has_cpu = sold.vcpus + wanted.vcpus <= locked.cpu_cores.unwrap_or_default() * VCPUS_PER_CORE;
    Ok((has_memory && has_cpu).then_some(locked.epoch))
}
