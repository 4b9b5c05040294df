//! Which of several hosts is best for a sandbox, and what is short where none will do. Pure: numbers in, order out.

use std::cmp::Ordering;
use std::fmt;
use std::str::FromStr;

use model::ids::HostId;

/// A host with less free disk gets no new sandbox; the agent's own reserve has the last word.
pub(super) const DISK_FREE_MIN_MIB: i64 = 1024;
/// What an agent's admission keeps of its pool's size.
const DISK_RESERVE_MIB: i64 = 1024;
/// Hosts that are as full to one part in so many are alike, and other things decide between them.
const STEPS: f64 = 10.0;

/// How sandboxes are put onto hosts that have room.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Strategy {
    /// The emptiest host first: each sandbox has the most to itself, and a host that dies takes the fewest with it.
    #[default]
    Spread,
    /// The fullest host first: other hosts stay empty, for large sandboxes or to be taken away.
    Pack,
}

impl Strategy {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Spread => "spread",
            Self::Pack => "pack",
        }
    }
}

/// It is neither `spread` nor `pack`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("must be spread or pack")]
pub struct UnknownStrategy;

impl FromStr for Strategy {
    type Err = UnknownStrategy;

    fn from_str(word: &str) -> Result<Self, UnknownStrategy> {
        [Self::Spread, Self::Pack].into_iter().find(|known| known.as_str() == word).ok_or(UnknownStrategy)
    }
}

/// How much of its hosts a platform sells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rules {
    /// vCPUs for each core: sandboxes wait most of the time, and cgroups share the cores fairly.
    pub vcpus_per_core: i64,
    /// Of a host's memory; beyond 100 only what guests leave untouched can be sold.
    pub memory_percent: i64,
    /// Disks are thin: of each one's size one part in so many counts, beside its memory, which is written into the pool at a pause. As
    /// the agent's own admission has it.
    pub disk_overcommit: i64,
    pub strategy: Strategy,
}

impl Default for Rules {
    fn default() -> Self {
        Self { vcpus_per_core: 16, memory_percent: 100, disk_overcommit: 16, strategy: Strategy::Spread }
    }
}

/// What is to be reserved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Need {
    pub vcpus: i64,
    pub memory_mib: i64,
    /// Of the pool: memory, and the part of the disk that counts.
    pub pool_mib: i64,
}

/// A host and what is reserved on it.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Standing {
    pub id: HostId,
    pub cpu_cores: i64,
    pub memory_mb: i64,
    /// Rounded down. None: the host has not said.
    pub disk_gb: Option<i64>,
    /// As its last heartbeat had it.
    pub disk_free_mib: Option<i64>,
    pub reserved: Need,
    /// Of the pool, by what has begun since that heartbeat or is only about to.
    pub coming_mib: i64,
    /// It has run a sandbox of this kind, and so has the kind's booted state.
    pub has_kind: bool,
}

/// What of a host may be too little.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dimension {
    /// None is there that could be asked at all.
    Hosts,
    /// None of the team's own, which alone take its new sandboxes.
    TeamHosts,
    /// None has the tags.
    Tags,
    Cpu,
    Memory,
    Disk,
}

impl Dimension {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Hosts => "hosts",
            Self::TeamHosts => "team_hosts",
            Self::Tags => "tags",
            Self::Cpu => "cpu",
            Self::Memory => "memory",
            Self::Disk => "disk",
        }
    }
}

/// What keeps a sandbox from being placed: of the host that comes closest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shortage(pub Vec<Dimension>);

impl fmt::Display for Shortage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.as_slice() {
            [Dimension::Hosts] => f.write_str("no host that takes new sandboxes has the template and is online"),
            [Dimension::TeamHosts] => f.write_str(
                "the team has hosts of its own, and none of them that takes new sandboxes has the template and is online",
            ),
            [Dimension::Tags] => f.write_str("no host has these tags"),
            short => {
                let words: Vec<&str> = short.iter().map(|dimension| dimension.as_str()).collect();
                write!(f, "no host has room for the sandbox: {} is short", words.join(" and "))
            }
        }
    }
}

impl Standing {
    /// What is too little here; nothing: it has room. By what is reserved, whether or not it is used, so that nothing is sold twice.
    pub fn short(&self, need: &Need, rules: &Rules) -> Vec<Dimension> {
        let fits = |reserved: i64, more: i64, sold: i64| reserved.saturating_add(more) <= sold;
        let mut short = Vec::new();
        if !fits(self.reserved.vcpus, need.vcpus, self.sold_vcpus(rules)) {
            short.push(Dimension::Cpu);
        }
        if !fits(self.reserved.memory_mib, need.memory_mib, self.sold_memory(rules)) {
            short.push(Dimension::Memory);
        }
        let has_pool = self.sold_pool().is_none_or(|sold| fits(self.reserved.pool_mib, need.pool_mib, sold));
        if !has_pool || self.disk_free_mib.is_some_and(|free| free < DISK_FREE_MIN_MIB) {
            short.push(Dimension::Disk);
        }
        short
    }

    fn sold_vcpus(&self, rules: &Rules) -> i64 {
        self.cpu_cores.saturating_mul(rules.vcpus_per_core)
    }

    fn sold_memory(&self, rules: &Rules) -> i64 {
        self.memory_mb.saturating_mul(rules.memory_percent) / 100
    }

    /// What is sold here is at least what the agent admits, whose word is the last: the size was rounded down.
    fn sold_pool(&self) -> Option<i64> {
        self.disk_gb.map(|gib| gib.saturating_add(1).saturating_mul(1024).saturating_sub(DISK_RESERVE_MIB))
    }

    /// Whether the pool has room now. If not it may still make some: booted states of templates give way.
    fn is_free(&self, need: &Need) -> bool {
        self.disk_free_mib.is_none_or(|free| free - self.coming_mib - DISK_RESERVE_MIB >= need.pool_mib)
    }

    /// From 0 to 1: the part that is reserved of what most is reserved of, with this.
    fn fullness(&self, need: &Need, rules: &Rules) -> f64 {
        let part = |reserved: i64, more: i64, sold: i64| (reserved + more) as f64 / sold.max(1) as f64;
        let cpu = part(self.reserved.vcpus, need.vcpus, self.sold_vcpus(rules));
        let memory = part(self.reserved.memory_mib, need.memory_mib, self.sold_memory(rules));
        let pool = self.sold_pool().map_or(0.0, |sold| part(self.reserved.pool_mib, need.pool_mib, sold));
        cpu.max(memory).max(pool)
    }
}

/// Those with room, the best first: whose pool has room now, then by how full they are, then those that have the kind's booted state.
pub(super) fn ranked(standings: &[Standing], need: &Need, rules: &Rules, strategy: Strategy) -> Vec<HostId> {
    let mut fit: Vec<(&Standing, f64)> = standings
        .iter()
        .filter(|standing| standing.short(need, rules).is_empty())
        .map(|standing| (standing, standing.fullness(need, rules)))
        .collect();
    let by_fullness = |one: f64, other: f64| match strategy {
        Strategy::Spread => one.total_cmp(&other),
        Strategy::Pack => other.total_cmp(&one),
    };
    fit.sort_by(|(one, one_full), (other, other_full)| -> Ordering {
        let step = |full: f64| (full * STEPS).floor();
        (other.is_free(need).cmp(&one.is_free(need)))
            .then_with(|| by_fullness(step(*one_full), step(*other_full)))
            .then_with(|| other.has_kind.cmp(&one.has_kind))
            .then_with(|| by_fullness(*one_full, *other_full))
            .then_with(|| one.id.0.cmp(&other.id.0))
    });
    fit.into_iter().map(|(standing, _)| standing.id).collect()
}

/// What is short on the host that comes closest; none when one has room.
pub(super) fn shortage(standings: &[Standing], need: &Need, rules: &Rules) -> Option<Shortage> {
    let short = standings.iter().map(|standing| standing.short(need, rules)).min_by_key(Vec::len);
    short.filter(|short| !short.is_empty()).map(Shortage)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(number: u128, memory_mb: i64, reserved_mib: i64) -> Standing {
        Standing {
            id: HostId(uuid::Uuid::from_u128(number)),
            cpu_cores: 4,
            memory_mb,
            disk_gb: Some(100),
            disk_free_mib: Some(90_000),
            reserved: Need { vcpus: 1, memory_mib: reserved_mib, pool_mib: reserved_mib },
            coming_mib: 0,
            has_kind: false,
        }
    }

    const NEED: Need = Need { vcpus: 1, memory_mib: 512, pool_mib: 832 };

    fn order(standings: &[Standing], strategy: Strategy) -> Vec<u128> {
        ranked(standings, &NEED, &Rules::default(), strategy).iter().map(|id| id.0.as_u128()).collect()
    }

    #[test]
    fn the_strategy_says_which_end_is_best() {
        let hosts = [host(1, 8192, 0), host(2, 8192, 4096), host(3, 8192, 7680), host(4, 8192, 7681)];
        assert_eq!(order(&hosts, Strategy::Spread), [1, 2, 3]);
        assert_eq!(order(&hosts, Strategy::Pack), [3, 2, 1]);
    }

    #[test]
    fn between_alike_hosts_the_booted_state_decides_and_a_full_pool_comes_last() {
        let warm = Standing { has_kind: true, ..host(2, 8192, 100) };
        assert_eq!(order(&[host(1, 8192, 0), warm.clone()], Strategy::Spread), [2, 1]);
        // Not when it is much fuller.
        let fuller = Standing { reserved: Need { memory_mib: 4096, ..warm.reserved }, ..warm.clone() };
        assert_eq!(order(&[host(1, 8192, 0), fuller], Strategy::Spread), [1, 2]);
        // Its pool is taken by what may give way, so it is asked, but last.
        let crowded = Standing { disk_free_mib: Some(1900), coming_mib: 100, ..warm };
        assert_eq!(order(&[host(1, 8192, 4096), crowded], Strategy::Spread), [1, 2]);
    }

    #[test]
    fn says_what_is_short_where_it_is_nearest() {
        let said = |standings: &[Standing], need: Need| {
            let short = shortage(standings, &need, &Rules::default());
            short.map(|short| short.0.into_iter().map(Dimension::as_str).collect::<Vec<_>>())
        };
        let full = host(1, 1024, 1024);
        assert_eq!(said(std::slice::from_ref(&full), NEED), Some(vec!["memory"]));
        let large = Need { vcpus: 64, memory_mib: 1 << 20, pool_mib: 1 << 20 };
        assert_eq!(said(std::slice::from_ref(&full), large), Some(vec!["cpu", "memory", "disk"]));
        assert_eq!(said(&[full.clone(), host(2, 1 << 21, 0)], Need { vcpus: 64, ..NEED }), Some(vec!["cpu"]));
        assert_eq!(said(&[full, host(2, 8192, 0)], NEED), None);
        assert_eq!(said(&[], NEED), None);
        let silent_of_disk = Standing { disk_gb: None, disk_free_mib: None, ..host(1, 8192, 0) };
        assert_eq!(said(&[silent_of_disk], Need { pool_mib: 1 << 40, ..NEED }), None);
    }

    #[test]
    fn factors_are_what_is_sold() {
        let rules = Rules { vcpus_per_core: 2, memory_percent: 150, ..Rules::default() };
        let standing = host(1, 1000, 1000);
        let fits = |need: Need| standing.short(&need, &rules).is_empty();
        assert!(fits(Need { vcpus: 7, memory_mib: 500, pool_mib: 0 }));
        assert!(!fits(Need { vcpus: 8, memory_mib: 500, pool_mib: 0 }));
        assert!(!fits(Need { vcpus: 7, memory_mib: 501, pool_mib: 0 }));
    }

    #[test]
    fn the_words_come_back() {
        for strategy in [Strategy::Spread, Strategy::Pack] {
            assert_eq!(strategy.as_str().parse(), Ok(strategy));
        }
        assert_eq!("random".parse::<Strategy>(), Err(UnknownStrategy));
    }
}
