//! What a thousand hosts cost that do nothing but say that they live, each with a hundred sandboxes: of one core, in percent.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use tokio::task::JoinSet;
use tokio::time::Instant;
use whole_machine::figures::{Figure, Judged, Limit};

use super::control_plane::ControlPlane;

const HOSTS: usize = 1000;
const SANDBOXES_EACH: usize = 100;
/// Of each host, by the contract.
const PERIOD: Duration = Duration::from_secs(30);
const ROUNDS: usize = 3;
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
}

pub async fn measure() -> Result<Judged> {
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
    beat(&control_plane, &mut hosts, 0).await?;
    let mut percents = Vec::new();
    for round in 1..=ROUNDS {
        let before = control_plane.processor_sec()?;
        let began = Instant::now();
        beat(&control_plane, &mut hosts, round).await?;
        percents.push((control_plane.processor_sec()? - before) / began.elapsed().as_secs_f64() * 100.0);
    }
    Ok(Figure::of("heartbeats_of_1000_hosts", "% of a core", percents).judged(Limit::P50(PERCENT_MAX)))
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
    let sandboxes: Vec<Value> = (0..SANDBOXES_EACH)
        .map(|n| json!({"id": format!("sb{:022}", number * SANDBOXES_EACH + n), "observed": "running", "revision": 1}))
        .collect();
    Ok(Host {
        url: format!("{}/v1/hosts/{id}/heartbeat", control_plane.base),
        token: registered["token"].as_str().context("the host has a token")?.to_owned(),
        body: json!({"epoch": registered["epoch"], "agent_run": "bench", "ticket": "", "facts": facts, "memory_free_mb": 200_000,
            "disk_free_mb": 4_000_000, "complete": true, "sandboxes": sandboxes}),
    })
}

/// One heartbeat of each, spread over a period.
async fn beat(control_plane: &ControlPlane, hosts: &mut [Host], round: usize) -> Result<()> {
    let began = Instant::now();
    let mut calls = JoinSet::new();
    let count = u32::try_from(hosts.len()).context("they are few")?;
    for (number, host) in (0u32..).zip(hosts.iter_mut()) {
        tokio::time::sleep_until(began + PERIOD * number / count).await;
        host.body["sequence"] = json!(round + 1);
        let request = control_plane.http.post(&host.url).bearer_auth(&host.token).json(&host.body);
        calls.spawn(async move {
            let answer = request.send().await?;
            let status = answer.status();
            ensure!(status == 200, "a heartbeat was answered with {status}");
            let answer: Value = answer.json().await?;
            Ok((number, answer["ticket"].clone()))
        });
    }
    tokio::time::sleep_until(began + PERIOD).await;
    for answered in calls.join_all().await {
        let (number, ticket) = answered?;
        hosts[usize::try_from(number)?].body["ticket"] = ticket;
    }
    Ok(())
}
