//! A whole fleet comes back at once after the control plane was away.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use api::v1::hosts::{Heartbeat, HostFacts, ReportedSandbox};
use chrono::{TimeDelta, Utc};
use host_agent::credentials::{Credentials, HostToken, KeyPem};
use host_agent::heartbeat::{self, Beat, Link};
use host_agent::ticket::Ticket;
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use super::cluster::{Cluster, wait};

const BACK_MAX: Duration = Duration::from_secs(60);
const REPLICA_KIB_MAX: u64 = 512 * 1024;
const SANDBOXES: usize = 20;

async fn herd(hosts: usize) {
    let mut cluster = Cluster::alone(2).await;
    let one = "gen_random_uuid(), 'regular', 'active', '127.0.0.1:1', 'x86_64', 64, 262144, 4000, 4000000, 'fake', '0',
        '{minimal}', 'herd', now()";
    cluster
        .database
        .sql(&format!(
            "insert into hosts (id, kind, state, address, arch, cpu_cores, memory_mb, disk_gb, disk_free_mb, isolation, agent_version,
                 templates, created_by, last_heartbeat_at) select {one} from generate_series(1, {hosts});
             insert into sandboxes (id, team_id, template, vcpus, memory_mib, disk_mib, desired, observed, host_id, host_epoch)
             select 'sb' || lpad((row_number() over ())::text, 22, '0'), (select team_id from api_keys order by created_at limit 1), 'minimal', 1, 512, 5120,
                 'running', 'running', h.id, h.epoch from hosts h, generate_series(1, {SANDBOXES})"
        ))
        .await;
    let tokens = cluster.tokens();
    let stop = CancellationToken::new();
    let facts = HostFacts {
        arch: "x86_64".to_owned(),
        cpu_cores: 64,
        memory_mb: 262_144,
        disk_gb: 4000,
        ..HostFacts::default()
    };
    let url = format!("http://{}", cluster.balancer.address());
    let rows = "select h.id, string_agg(s.id, ',') from hosts h join sandboxes s on s.host_id = h.id group by h.id";
    for row in cluster.rows(rows).await {
        let id = model::ids::HostId(row[0].parse().unwrap());
        let sandboxes = row[1].split(',').map(|id| ReportedSandbox {
            id: id.to_owned(),
            observed: "running".to_owned(),
            revision: 1,
            ..ReportedSandbox::default()
        });
        let report =
            Heartbeat { complete: true, facts: facts.clone(), sandboxes: sandboxes.collect(), ..Heartbeat::default() };
        let credentials = Credentials {
            host: HostToken {
                format: 1,
                host_id: id.to_string(),
                token: tokens.for_host(id, Utc::now()).0,
                token_issued_at: Utc::now(),
                token_expires_at: Utc::now() + TimeDelta::days(30),
                epoch: 1,
                cp_url: url.parse().unwrap(),
                address: "127.0.0.1:1".to_owned(),
                registered_with: String::new(),
            },
            cert_pem: String::new(),
            ca_pem: String::new(),
            key_pem: KeyPem(String::new()),
        };
        let ticket = Ticket::load(&cluster.dir.path().join(id.to_string()), &id.to_string());
        let beat = Beat {
            ticket,
            report: Box::new(move || {
                let report = report.clone();
                Box::pin(async move { report })
            }),
            changed: Arc::new(Notify::new()),
            credentials: watch::channel(credentials).1,
            epoch_seen: Box::new(|_| {}),
            idle_timeouts: Box::new(drop),
            link: watch::channel(Link::Unknown).0,
        };
        tokio::spawn(heartbeat::run(beat, stop.clone()));
    }
    let silent = "hosts where last_heartbeat_at is null or agent_run = '' or heartbeat_sequence = 0";
    wait("the first heartbeats", BACK_MAX, || async { cluster.count(silent).await == 0 }).await;

    let down = Instant::now();
    for replica in &mut cluster.replicas {
        replica.kill();
    }
    // Long enough for all to have found out: a period and its jitter.
    tokio::time::sleep(Duration::from_secs(36)).await;
    let before = cluster.rows("select now()").await.remove(0).remove(0);
    for number in 0..2 {
        cluster.restart(number).await;
    }
    let up = Instant::now();
    let took = Arc::<Mutex<Vec<Duration>>>::default();
    let (asked, client, end) = (took.clone(), cluster.team.clone(), stop.clone());
    let user = tokio::spawn(async move {
        while !end.is_cancelled() {
            let began = Instant::now();
            let answer = client.call(reqwest::Method::GET, "/v1/sandboxes?limit=1", None).await.unwrap();
            assert_eq!(answer.status, 200, "{}", answer.body);
            asked.lock().unwrap().push(began.elapsed());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    let missing = format!("hosts where last_heartbeat_at < '{before}'");
    let back = wait("the fleet to be back", BACK_MAX, || async { cluster.count(&missing).await == 0 }).await;
    stop.cancel();
    user.await.unwrap();
    let mut took = took.lock().unwrap().clone();
    took.sort();
    let p99 = took[took.len() * 99 / 100];
    let kib: Vec<u64> = cluster.replicas.iter().map(|replica| replica.peak_kib()).collect();
    println!(
        "{hosts} hosts are back after {back:?} (down for {:?}), API p99 {p99:?} of {}, {kib:?} KiB",
        up - down,
        took.len()
    );
    assert!(kib.iter().all(|kib| *kib < REPLICA_KIB_MAX), "{kib:?} KiB");
    let wrong = cluster.count("sandboxes where observed <> 'running' or absent_since is not null").await;
    assert_eq!(wrong, 0, "what they have was there all the time");
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "a thousand hosts for two minutes: make check-long"]
async fn a_thousand_hosts_that_come_back_at_once_are_all_heard() {
    herd(1000).await;
}
