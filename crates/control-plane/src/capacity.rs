//! Settings of what is sold: how much of hosts, how it is spread over them, how much a team may have, and when silence is too much.

use std::time::Duration;

use store::placement;
use store::quotas::Limits;
use store::silence::Brake;

use crate::config::Misconfigured;

/// Two periods of the hosts' heartbeats.
const SILENCE_GRACE_SEC: u64 = 60;

/// Unset is the default; numbers out of range are refused.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Capacity {
    /// vCPUs sold for each core of a host [default: 16]
    #[arg(long, env = "WRENN_VCPUS_PER_CORE", global = true)]
    pub vcpus_per_core: Option<i64>,
    /// How much of a host's memory is sold, in percent [default: 100]
    #[arg(long, env = "WRENN_MEMORY_PERCENT", global = true)]
    pub memory_percent: Option<i64>,
    /// Of each thin disk's size one part in so many is counted [default: 16]
    #[arg(long, env = "WRENN_DISK_OVERCOMMIT", global = true)]
    pub disk_overcommit: Option<i64>,
    /// spread (the emptiest host first) or pack (the fullest first) [default: spread]
    #[arg(long, env = "WRENN_PLACEMENT", global = true)]
    pub placement: Option<String>,
    /// How many sandboxes, running or paused, a team may have that has no quota of its own [default: no limit]
    #[arg(long, env = "WRENN_QUOTA_SANDBOXES", global = true)]
    pub quota_sandboxes: Option<i64>,
    /// How many of them may run
    #[arg(long, env = "WRENN_QUOTA_RUNNING", global = true)]
    pub quota_running: Option<i64>,
    /// How many vCPUs those that run may have together
    #[arg(long, env = "WRENN_QUOTA_VCPUS", global = true)]
    pub quota_vcpus: Option<i64>,
    /// How much memory those that run may have together, in MiB
    #[arg(long, env = "WRENN_QUOTA_MEMORY_MB", global = true)]
    pub quota_memory_mb: Option<i64>,
    /// How large the disks of all may be together, in MiB
    #[arg(long, env = "WRENN_QUOTA_DISK_MB", global = true)]
    pub quota_disk_mb: Option<i64>,
    /// How many creates and forks a team may ask for in a minute
    #[arg(long, env = "WRENN_QUOTA_CREATES_PER_MIN", global = true)]
    pub quota_creates_per_min: Option<i64>,
    /// How many hosts must fall silent together, as more than half of all, for nothing to be concluded from it [default: 3]
    #[arg(long, env = "WRENN_SILENCE_BRAKE_HOSTS", global = true)]
    pub silence_brake_hosts: Option<i64>,
    /// For tests, which cannot wait for a minute: how long a replica listens before it counts silent hosts, in seconds
    #[arg(long, env = "WRENN_TEST_SILENCE_GRACE_SEC", hide = true, global = true)]
    pub silence_grace_sec: Option<u64>,
}

impl Capacity {
    pub fn rules(&self) -> Result<store::Rules, Misconfigured> {
        let default = placement::Rules::default();
        let strategy = self.placement.as_deref().filter(|word| !word.is_empty()).map(str::parse).transpose();
        let quotas = [
            ("WRENN_QUOTA_SANDBOXES", self.quota_sandboxes),
            ("WRENN_QUOTA_RUNNING", self.quota_running),
            ("WRENN_QUOTA_VCPUS", self.quota_vcpus),
            ("WRENN_QUOTA_MEMORY_MB", self.quota_memory_mb),
            ("WRENN_QUOTA_DISK_MB", self.quota_disk_mb),
            ("WRENN_QUOTA_CREATES_PER_MIN", self.quota_creates_per_min),
        ];
        for (setting, limit) in quotas {
            within(setting, limit, 0..=QUOTA_MAX)?;
        }
        Ok(store::Rules {
            placement: placement::Rules {
                vcpus_per_core: within("WRENN_VCPUS_PER_CORE", self.vcpus_per_core, 1..=1024)?
                    .unwrap_or(default.vcpus_per_core),
                memory_percent: within("WRENN_MEMORY_PERCENT", self.memory_percent, 1..=1000)?
                    .unwrap_or(default.memory_percent),
                disk_overcommit: within("WRENN_DISK_OVERCOMMIT", self.disk_overcommit, 1..=1024)?
                    .unwrap_or(default.disk_overcommit),
                strategy: strategy
                    .map_err(|_| Misconfigured {
                        setting: "WRENN_PLACEMENT",
                        problem: format!("{:?} is no such word", self.placement.as_deref().unwrap_or_default()),
                        cure: "give spread or pack",
                    })?
                    .unwrap_or(default.strategy),
            },
            quotas: Limits {
                sandboxes: self.quota_sandboxes,
                running: self.quota_running,
                vcpus: self.quota_vcpus,
                memory_mb: self.quota_memory_mb,
                disk_mb: self.quota_disk_mb,
                creates_per_min: self.quota_creates_per_min,
            },
            brake: Brake {
                hosts_min: within("WRENN_SILENCE_BRAKE_HOSTS", self.silence_brake_hosts, 1..=QUOTA_MAX)?
                    .unwrap_or(Brake::default().hosts_min),
            },
        })
    }

    pub fn silence_grace(&self) -> Duration {
        Duration::from_secs(self.silence_grace_sec.unwrap_or(SILENCE_GRACE_SEC))
    }
}

/// More than any team has of anything, and far from where sums overflow.
pub const QUOTA_MAX: i64 = 1 << 40;

fn within(
    setting: &'static str,
    value: Option<i64>,
    range: std::ops::RangeInclusive<i64>,
) -> Result<Option<i64>, Misconfigured> {
    match value {
        Some(wrong) if !range.contains(&wrong) => Err(Misconfigured {
            setting,
            problem: format!("{wrong} is not from {} to {}", range.start(), range.end()),
            cure: "give a number in that range, or leave it out for the default",
        }),
        value => Ok(value),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn says_which_setting_is_wrong_and_has_defaults() {
        let wrong = [
            Capacity { vcpus_per_core: Some(0), ..Capacity::default() },
            Capacity { memory_percent: Some(-1), ..Capacity::default() },
            Capacity { disk_overcommit: Some(0), ..Capacity::default() },
            Capacity { placement: Some("random".to_owned()), ..Capacity::default() },
            Capacity { quota_vcpus: Some(-1), ..Capacity::default() },
            Capacity { silence_brake_hosts: Some(0), ..Capacity::default() },
        ];
        let said: Vec<&str> = wrong.iter().map(|capacity| capacity.rules().unwrap_err().setting).collect();
        assert_eq!(
            said,
            [
                "WRENN_VCPUS_PER_CORE",
                "WRENN_MEMORY_PERCENT",
                "WRENN_DISK_OVERCOMMIT",
                "WRENN_PLACEMENT",
                "WRENN_QUOTA_VCPUS",
                "WRENN_SILENCE_BRAKE_HOSTS"
            ]
        );
        assert_eq!(Capacity::default().rules().unwrap(), store::Rules::default());
    }
}
