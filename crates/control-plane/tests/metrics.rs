//! What a replica tells Prometheus: in the right form, as its table and its document say, nowhere that a tenant could read it, and that
//! each number for an invariant moves when the invariant is touched.

mod process;

use model::ids::HostId;
use process::{Administrator, Process};
use reqwest::Method;
use serde_json::json;
use testkit::metrics::{documented, get, is_documented, scrape, until};
use testkit::postgres::Database;

use control_plane::measures::TABLE;

const DOCUMENT: &str = include_str!("../../../docs/how-to/monitoring.md");
const RULES: &str = include_str!("../../../deploy/prometheus/wrenn.rules.yml");

#[test]
fn the_document_has_every_metric_and_the_rules_ask_for_no_other() {
    is_documented(DOCUMENT, TABLE).unwrap();
    let known = documented(DOCUMENT);
    for (number, line) in RULES.lines().enumerate().filter(|(_, line)| !line.trim_start().starts_with('#')) {
        let words = line.split(|letter: char| !letter.is_ascii_alphanumeric() && letter != '_');
        for word in words.filter(|word| word.starts_with("wrenn_")) {
            let stem = ["_bucket", "_sum", "_count"].iter().find_map(|end| word.strip_suffix(end)).unwrap_or(word);
            assert!(known.contains(stem) || known.contains(word), "line {}: {word} is no metric", number + 1);
        }
    }
    // Every invariant has a rule, and each rule a line of what to do that the document has.
    for metric in TABLE.iter().filter(|metric| metric.guards.is_some()) {
        assert!(RULES.contains(metric.name), "{} guards an invariant and no rule asks for it", metric.name);
    }
    let alerts: Vec<&str> = RULES.lines().filter_map(|line| line.trim().strip_prefix("- alert: ")).collect();
    assert!(alerts.len() > 10, "{alerts:?}");
    for alert in &alerts {
        assert!(DOCUMENT.contains(&format!("\n### {alert}\n")), "{alert} has no runbook in the document");
    }
    assert_eq!(RULES.matches("runbook_url:").count(), alerts.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn numbers_are_told_on_loopback_alone_and_move_with_what_they_count() {
    let database = Database::on_own_server().await;
    let dir = tempfile::tempdir().unwrap();
    let process = Process::start(&database.url, dir.path(), &[]).await;
    let metrics = process.metrics.expect("it was wished");
    let administrator = Administrator::of(&database.url, dir.path()).await;
    let ask = async |method, path: &str, body| administrator.call(&process.url, method, path, body).await;

    // Not on the port that tenants reach, not even for an administrator.
    assert_eq!(ask(Method::GET, "/metrics", None).await.0, 404);
    assert!(get(metrics, "/").await.0.starts_with("HTTP/1.1 404 "));
    assert!(get(metrics, "/health/live").await.0.starts_with("HTTP/1.1 200 "));

    let first = scrape(metrics).await;
    first.conforms(TABLE).unwrap();
    for metric in TABLE.iter().filter(|metric| metric.guards.is_some() && metric.labels.is_empty()) {
        assert_eq!(first.value(metric.name, &[]), Some(0.0), "{} on a new platform", metric.name);
    }
    assert_eq!(first.value("wrenn_database_up", &[]), Some(1.0));

    // A create that no host takes, one that a quota forbids, and one that nobody is there for.
    let create = async || ask(Method::POST, "/v1/sandboxes?wait_sec=0", Some(json!({"memory_mb": 256}))).await;
    assert_eq!(create().await.0, 503);
    let host = administrator.host(&process.url, &database, "127.0.0.1:1").await;
    assert_eq!(create().await.0, 202);
    database.sql("insert into team_quotas (team_id, sandboxes) select id, 0 from teams").await;
    assert_eq!(create().await.0, 429);
    let page = until(metrics, "the end of an operation", |page| {
        page.value("wrenn_operation_duration_seconds_count", &[("kind", "run"), ("outcome", "failed")]) == Some(1.0)
    })
    .await;
    page.conforms(TABLE).unwrap();
    assert_eq!(page.value("wrenn_placement_failures_total", &[("short", "hosts")]), Some(2.0));
    assert_eq!(page.value("wrenn_quota_refusals_total", &[("quota", "sandboxes")]), Some(1.0));
    assert_eq!(page.value("wrenn_hosts", &[("state", "active")]), Some(1.0));
    assert!(page.value("wrenn_host_call_failures_total", &[("cause", "unreachable")]) > Some(0.0));
    let of_creates = |status| [("route", "/v1/sandboxes"), ("method", "POST"), ("status", status)];
    for status in ["2xx", "4xx", "5xx"] {
        let count = page.value("wrenn_http_request_duration_seconds_count", &of_creates(status));
        assert_eq!(count, Some(1.0), "{status}");
    }
    // Paths that are no routes share one series, whatever stands in them.
    for path in ["/nothing/1", "/nothing/2", "/metrics"] {
        ask(Method::GET, path, None).await;
    }
    let page = scrape(metrics).await;
    let none = [("route", "none"), ("method", "GET"), ("status", "4xx")];
    assert!(page.value("wrenn_http_request_duration_seconds_count", &none) >= Some(3.0));

    // Each number for an invariant, when that is touched.
    let id: HostId = host.parse().unwrap();
    let lost = "insert into sandboxes (id, team_id, template, vcpus, memory_mib, disk_mib, desired, observed)
        select 'sb00000000000000000000ab', id, 'minimal', 1, 256, 1024, 'paused', 'lost' from teams limit 1";
    database.sql(lost).await;
    database.sql(&format!("update hosts set unclaimed = '{{a,b}}' where id = '{}'", id.0)).await;
    database.sql("insert into silence_brake (silent, hosts) values (3, 4)").await;
    // Held by a replica that is not there, and taken up by nobody until the lock is gone.
    database
        .sql(
            "insert into operations (id, sandbox_id, kind, revision, not_before, deadline)
             values (gen_random_uuid(), 'sb00000000000000000000ab', 'run', 1, now() + interval '1 hour', now() - interval '1 hour')",
        )
        .await;
    let page = until(metrics, "what guards invariants", |page| {
        [
            ("wrenn_lost_sandboxes", 1.0),
            ("wrenn_unclaimed_sandboxes", 2.0),
            ("wrenn_brake_active", 1.0),
            ("wrenn_operations_overdue", 1.0),
        ]
        .iter()
        .all(|(name, value)| page.value(name, &[]) == Some(*value))
    })
    .await;
    page.conforms(TABLE).unwrap();
    assert_eq!(page.value("wrenn_sandboxes", &[("state", "lost")]), Some(1.0));
    assert!(page.value("wrenn_operation_oldest_seconds", &[("kind", "run")]) >= Some(0.0));

    // Without a database it still tells what it knows, and does not repeat what it knew.
    database.stop_server().await;
    let page = until(metrics, "that the database is away", |page| {
        page.value("wrenn_database_up", &[]) == Some(0.0)
            && page.value("wrenn_reconcile_lag_seconds", &[("reconciler", "claim")]) > Some(1.0)
    })
    .await;
    page.conforms(TABLE).unwrap();
    assert_eq!(page.value("wrenn_scrape_complete", &[]), Some(0.0));
    assert!(page.value("wrenn_lost_sandboxes", &[]).unwrap().is_nan());
    database.start_server().await;
    until(metrics, "that the database is back", |page| {
        page.value("wrenn_database_up", &[]) == Some(1.0)
            && page.value("wrenn_reconcile_lag_seconds", &[("reconciler", "claim")]) < Some(1.0)
    })
    .await;
}
