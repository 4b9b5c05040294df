//! What stands by in a platform, seen from outside.

use std::path::PathBuf;
use std::time::Duration;

use serde_json::Value;

use crate::platform::Platform;
use crate::{objects, wait};

pub const READY_LIMIT: Duration = Duration::from_secs(60);

pub fn standbys(platform: &Platform) -> Vec<PathBuf> {
    std::fs::read_dir(platform.dir.join("pool/standbys")).into_iter().flatten().flatten().map(|it| it.path()).collect()
}

/// Their VMMs.
pub fn microvms(platform: &Platform) -> Vec<i32> {
    objects::microvms_below(&platform.dir.join("pool/standbys"), &platform.tag())
}

/// Waits until there are at least so many, and all of them stand still.
pub async fn until_ready(platform: &Platform, count: usize) {
    wait::until("enough stand by", READY_LIMIT, || async {
        let all = standbys(platform).len();
        (all >= count && stopped(platform) == all).then_some(())
    })
    .await;
}

/// Standbys whose vCPUs stand still: their VMMs have used no processor for a while.
fn stopped(platform: &Platform) -> usize {
    let busy = || -> Vec<(i32, u64)> { microvms(platform).into_iter().map(|pid| (pid, ticks(pid))).collect() };
    let before = busy();
    std::thread::sleep(Duration::from_millis(300));
    let after = busy();
    after.iter().filter(|one| before.contains(one)).count()
}

fn ticks(pid: i32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_whitespace();
    fields.skip(11).take(2).filter_map(|field| field.parse::<u64>().ok()).sum()
}

pub fn was_standby(platform: &Platform, id: &str) -> bool {
    let text = std::fs::read(platform.dir.join("pool/sandboxes").join(id).join("state.json")).unwrap();
    let state: Value = serde_json::from_slice(&text).unwrap();
    state["record"]["phase"]["run"]["standby"].is_object()
}
