//! What a thousand hosts cost that do nothing but say that they live, each with a hundred sandboxes: of one core, in percent. The floor is
//! what the same control plane takes when nobody says anything.
//!
//! They speak as agents do: a digest, once it is agreed on. That a list came each time is measured beside it; a fleet does that where in
//! each half minute something changes on every host.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use tokio::task::JoinSet;
use tokio::time::Instant;
use whole_machine::figures::{Figure, Judged, Limit};

use super::control_plane::ControlPlane;

const HOSTS: usize = 1000;
const SANDBOXES_EACH: usize = 100;
/// Of each host, by the contract.
const PERIOD: Duration = Duration::from_secs(30);
const ROUNDS: usize = 3;
const QUIET: Duration = Duration::from_secs(10);
const PERCENT_MAX: f64 = 5.0;
/// Any key will do: nobody calls these hosts.
const CSR: &str = "-----BEGIN CERTIFICATE REQUEST-----\n\
    MIHKMHICAQAwEDEOMAwGA1UEAwwFYmVuY2gwWTATBgcqhkjOPQIBBggqhkjOPQMB\n\
    BwNCAAR5WPAos6cQVo5orM1qCEpzSZV1CLhe+y9UqyxAAmrjDaAExp+JHwD2whsV\n\
    YNbVt25cLY6/vjWUZNILjFj82gD+oAAwCgYIKoZIzj0EAwIDSAAwRQIhANJVk3ds\n\
    AzzVmOViER59fDwgOt/4A00qzgucrLQmD1yjAiAfgrFRb8kb25k6wdU5gzpu8pUl\n\
    TwxGWsPuEQ/OeglbFA==\n\
    -----END CERTIFICATE REQUEST-----\n";

struct Host {
    url: String,
    token: String,
    body: Value,
    /// All that it has.
    sandboxes: Vec<Value>,
    digest: String,
    /// Whether the last answer said so.
    digest_suffices: bool,
}

impl Host {
    fn say(&mut self, as_list: bool) {
        let is_list = as_list || !self.digest_suffices;
        self.body["complete"] = json!(is_list);
        self.body["sandboxes"] = if is_list { json!(self.sandboxes) } else { json!([]) };
        self.body["digest"] = if is_list { Value::Null } else { json!(self.digest) };
    }
}

pub async fn measure() -> Result<Vec<Judged>> {
    let control_plane = ControlPlane::start("").await?;
    let mut hosts = Vec::with_capacity(HOSTS);
    for number in 0..HOSTS {
        hosts.push(host(&control_plane, number).await?);
    }
    control_plane.sql(&format!(
        "insert into sandboxes (id, team_id, template, vcpus, memory_mib, disk_mib, desired, observed, revision, host_id, host_epoch)
         select 'sb' || lpad((h.number * {SANDBOXES_EACH} + n)::text, 22, '0'), (select team_id from api_keys order by created_at limit 1), 'minimal', 1, 128,
             1024, 'running', 'running', 1, h.id, 1
         from (select id, row_number() over (order by created_at, id) - 1 as number from hosts) h, generate_series(0, {SANDBOXES_EACH} - 1) n;
         analyze"
    ))?;
    // Each says what it has; by then the tables are warm.
    beat(&control_plane, &mut hosts, true).await?;
    let (mut quiet, mut digests, mut lists) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let nothing = async || {
            tokio::time::sleep(QUIET).await;
            Ok(())
        };
        quiet.push(percent(&control_plane, nothing).await?);
    }
    for _ in 0..ROUNDS {
        digests.push(percent(&control_plane, async || beat(&control_plane, &mut hosts, false).await).await?);
        ensure!(hosts.iter().all(|host| host.digest_suffices), "a digest did not suffice");
    }
    lists.push(percent(&control_plane, async || beat(&control_plane, &mut hosts, true).await).await?);
    let digests = Figure::of("heartbeats_of_1000_hosts", "% of a core", digests).beside(quiet.clone());
    let lists = Figure::of("heartbeats_of_1000_hosts_as_lists", "% of a core", lists).beside(quiet);
    Ok(vec![digests.judged(Limit::P50(PERCENT_MAX)), lists.judged(Limit::None)])
}

/// Of a core, while this is done.
async fn percent(control_plane: &ControlPlane, work: impl AsyncFnOnce() -> Result<()>) -> Result<f64> {
    let before = control_plane.processor_sec()?;
    let began = Instant::now();
    work().await?;
    Ok((control_plane.processor_sec()? - before) / began.elapsed().as_secs_f64() * 100.0)
}

async fn host(control_plane: &ControlPlane, number: usize) -> Result<Host> {
    let made = control_plane.as_admin("/v1/hosts", &json!({"type": "regular"})).await?;
    let facts = json!({"arch": "x86_64", "cpu_cores": 64, "memory_mb": 262_144, "disk_gb": 4000, "isolation": "none",
        "agent_version": "0", "templates": ["minimal"]});
    let mut registration = facts.clone();
    registration["token"] = made["registration_token"].clone();
    registration["csr_pem"] = CSR.into();
    registration["address"] = "127.0.0.1:1".into();
    let registered = control_plane.as_admin("/v1/hosts/register", &registration).await?;
    let id = registered["host"]["id"].as_str().context("the host has an id")?;
    let ids: Vec<String> = (0..SANDBOXES_EACH).map(|n| format!("sb{:022}", number * SANDBOXES_EACH + n)).collect();
    let lines: Vec<String> = ids.iter().map(|id| format!("{id} running 1")).collect();
    Ok(Host {
        url: format!("{}/v1/hosts/{id}/heartbeat", control_plane.base),
        token: registered["token"].as_str().context("the host has a token")?.to_owned(),
        body: json!({"epoch": registered["epoch"], "agent_run": "bench", "ticket": "", "facts": facts, "memory_free_mb": 200_000,
            "disk_free_mb": 4_000_000, "sequence": 0}),
        sandboxes: ids.iter().map(|id| json!({"id": id, "observed": "running", "revision": 1})).collect(),
        digest: hex::encode(Sha256::digest(lines.join("\n"))),
        digest_suffices: false,
    })
}

/// One heartbeat of each, spread over a period.
async fn beat(control_plane: &ControlPlane, hosts: &mut [Host], as_list: bool) -> Result<()> {
    let began = Instant::now();
    let mut calls = JoinSet::new();
    let count = u32::try_from(hosts.len()).context("they are few")?;
    for (number, host) in (0u32..).zip(hosts.iter_mut()) {
        tokio::time::sleep_until(began + PERIOD * number / count).await;
        host.body["sequence"] = json!(host.body["sequence"].as_u64().unwrap_or_default() + 1);
        host.say(as_list);
        let request = control_plane.http.post(&host.url).bearer_auth(&host.token).json(&host.body);
        calls.spawn(async move {
            let answer = request.send().await?;
            let status = answer.status();
            ensure!(status == 200, "a heartbeat was answered with {status}");
            let answer: Value = answer.json().await?;
            Ok((number, answer["ticket"].clone(), answer["digest_suffices"] == true))
        });
    }
    tokio::time::sleep_until(began + PERIOD).await;
    for answered in calls.join_all().await {
        let (number, ticket, digest_suffices) = answered?;
        let host = &mut hosts[usize::try_from(number)?];
        host.body["ticket"] = ticket;
        host.digest_suffices = digest_suffices;
    }
    Ok(())
}
