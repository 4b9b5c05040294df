//! What must be so when the faults are over: the rows say of each sandbox what its host's kernel and files say.

use std::collections::BTreeSet;
use std::time::Duration;

use super::cluster::{Cluster, wait};
use super::place::Place;

/// The longest that the platform may take to come to rest.
pub const REST_MAX: Duration = Duration::from_secs(60);

/// Nothing is under way any more.
pub async fn rest(cluster: &Cluster) -> Duration {
    let restless = "operations where phase = 'open'";
    wait("the platform to rest", REST_MAX, || async { cluster.count(restless).await == 0 }).await
}

/// Rests, and judges all sandboxes.
pub async fn judge(cluster: &Cluster, hosts: &[&Place]) {
    rest(cluster).await;
    // What a host says after its last change is told at once, but it is told by a call.
    let mut faults = vec!["not looked yet".to_owned()];
    for _ in 0..100 {
        faults = differences(cluster, hosts).await;
        if faults.is_empty() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert!(faults.is_empty(), "rows and hosts disagree: {faults:#?}");
    let wrong = "select sandbox_id, kind, count(*) from operations where kind not in ('clean', 'exit', 'snapshot')
         group by sandbox_id, kind, revision having count(*) > 1";
    let twice = cluster.rows(wrong).await;
    assert!(twice.iter().all(|row| row[1] == "kill" || row[1] == "pause"), "one wish, two operations: {twice:?}");
}

async fn differences(cluster: &Cluster, hosts: &[&Place]) -> Vec<String> {
    let mut faults = Vec::new();
    let alive: Vec<_> = hosts.iter().map(|host| (host, host.alive())).collect();
    let mut rows: BTreeSet<String> = BTreeSet::new();
    for row in cluster.rows("select id, desired, observed, coalesce(host_id::text, '') from sandboxes").await {
        let [id, desired, observed, host] = row.try_into().expect("four columns");
        let on: Vec<&&Place> =
            alive.iter().filter(|(_, alive)| alive.contains_key(&id)).map(|(host, _)| *host).collect();
        let is_where_it_should = on.iter().all(|there| there.id.0.to_string() == host);
        let home = hosts.iter().find(|there| there.id.0.to_string() == host);
        let is_right = match observed.as_str() {
            "running" => on.len() == 1 && is_where_it_should,
            "paused" => on.is_empty() && home.is_some_and(|home| home.has_saved(&id)),
            "killed" | "failed" => on.is_empty(),
            _ => false,
        };
        let is_wished = desired == observed || observed == "failed";
        if !is_right || !is_wished {
            faults.push(format!("{id}: wished {desired}, {observed} on {host}, and lives on {} hosts", on.len()));
        }
        if observed == "killed" && hosts.iter().any(|host| host.files_of(&id).contains("disk")) {
            faults.push(format!("{id} is killed, and its disk is there"));
        }
        rows.insert(id);
    }
    for (host, alive) in &alive {
        for id in alive.keys().filter(|id| !rows.contains(*id)) {
            faults.push(format!("{id} lives on {} and is in no row", host.id));
        }
    }
    faults
}

/// Each of these acts has been written down as often as it happened.
pub async fn judge_audit(cluster: &Cluster) {
    let made = cluster.count("sandboxes").await;
    let audited = cluster.count("audit where action in ('sandbox.create', 'sandbox.fork')").await;
    assert_eq!(made, audited, "sandboxes, and records of creates");
    let kills = "audit where action = 'sandbox.kill'";
    let killed = cluster.count("sandboxes where desired = 'killed'").await;
    assert_eq!(killed, cluster.count(kills).await, "killed sandboxes, and records of kills");
}
