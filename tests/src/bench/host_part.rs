//! What a create costs the host beside its VMM and its guest: the slot and its network, the control group, clones of disk and memory, the
//! run's directory, and what is written down. Of creates by restore on the real ground, one after the other, with slots made ahead.
//!
//! The agent measures each step; of the step in which the VMM starts, what the VMM took is taken away, and with it what goes on beside that
//! and is over sooner: a look at digests, reading ahead, the console of the template. The VMM's jail is the driver's to fill, so what that
//! takes is in the figures of `bench-driver`.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use whole_machine::figures::{Figure, Judged, Limit};
use whole_machine::platform::Platform;

use super::{claims, create};

const CREATES: usize = 40;
/// Not measured.
const WARM_UP: usize = 3;
/// By then the slot that was taken has been made good, and what the last one left is gone.
const REST: Duration = Duration::from_millis(700);
const P50_MAX: f64 = 5.0;
const STEPS: [(&str, &str); 6] = [
    ("reserve", "create_host_reserve"),
    ("network", "create_host_network"),
    ("cgroup", "create_host_cgroup"),
    ("disk", "create_host_disk"),
    ("memory", "create_host_memory"),
    ("commit", "create_host_commit"),
];

/// `platform` keeps no standbys.
pub async fn measure(platform: &Platform) -> Result<Vec<Judged>> {
    let mut sandboxes = Vec::new();
    let mut syncs = Vec::new();
    for round in 0..WARM_UP + CREATES {
        let (id, sandbox) = create(platform, &mut Vec::new()).await?;
        if round >= WARM_UP {
            let steps = sandbox["steps"].as_array().context("a sandbox without steps")?;
            ensure!(steps.iter().any(|step| step["name"] == "microvm"), "the VMM's part is not told: {sandbox}");
            sandboxes.push(sandbox);
            syncs.push(claims::sync(&platform.dir.join("pool"))?);
        }
        platform.kill(&id).await;
        tokio::time::sleep(REST).await;
    }
    let each = |part: &dyn Fn(&Value) -> f64| sandboxes.iter().map(part).collect::<Vec<_>>();
    let took = |sandbox: &Value, name: &str| claims::step(sandbox, name).unwrap_or_default();
    // The run's directory, and the record by which another agent takes the VMM over.
    let beside = |sandbox: &Value| took(sandbox, "start") - took(sandbox, "microvm");
    let all = |sandbox: &Value| STEPS.iter().map(|(name, _)| took(sandbox, name)).sum::<f64>() + beside(sandbox);
    let mut judged = vec![Figure::of("create_host_part", "ms", each(&all)).judged(Limit::P50(P50_MAX))];
    for (name, figure) in STEPS {
        judged.push(Figure::of(figure, "ms", each(&|sandbox| took(sandbox, name))).judged(Limit::None));
    }
    judged.push(Figure::of("create_host_record", "ms", each(&beside)).judged(Limit::None));
    judged.push(Figure::of("create_host_disk_sync", "ms", syncs).judged(Limit::None));
    Ok(judged)
}
