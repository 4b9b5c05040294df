//! Replicas that do a part of the work: one answers, another one carries out, and they know of each other by the database alone.

mod process;

use std::time::Duration;

use process::{Administrator, Process, command};
use reqwest::Method;
use serde_json::json;
use testkit::metrics::{scrape, until};
use testkit::postgres::Database;

#[tokio::test(flavor = "multi_thread")]
async fn one_answers_and_another_one_carries_out() {
    let database = Database::new().await;
    let dir = tempfile::tempdir().unwrap();
    let api = Process::start(&database.url, dir.path(), &[("WRENN_ROLES", "api")]).await;
    let administrator = Administrator::of(&database.url, dir.path()).await;
    administrator.host(&api.url, &database, "127.0.0.1:1").await;
    let body = || Some(json!({"memory_mb": 256}));

    let (status, made) = administrator.call(&api.url, Method::POST, "/v1/sandboxes?wait_sec=1", body()).await;

    // Taken, and nobody is there who works on it.
    assert_eq!((status.as_u16(), made["status"].as_str()), (202, Some("starting")), "{made}");
    let open = "select count(*) from operations where phase = 'open' and lease_owner is null and attempts = 0";
    assert_eq!(database.sql(open).await.trim(), "1");
    let page = scrape(api.metrics.unwrap()).await;
    assert_eq!(page.value("wrenn_operations_running", &[]), Some(0.0));
    assert_eq!(page.value("wrenn_operations_open", &[("kind", "run")]), Some(1.0));

    let mut workers = Process::start(&database.url, dir.path(), &[("WRENN_ROLES", "workers")]).await;
    let failed = [("kind", "run"), ("outcome", "failed")];
    let count = |page: &testkit::metrics::Page| page.value("wrenn_operation_duration_seconds_count", &failed);
    until(workers.metrics.unwrap(), "the end of the create", |page| count(page) == Some(1.0)).await;
    // One that is there already hears of it: the answer comes when the worker has given the host up.
    let (status, refused) = administrator.call(&api.url, Method::POST, "/v1/sandboxes?wait_sec=60", body()).await;
    assert_eq!((status.as_u16(), refused["error"]["code"].as_str()), (503, Some("host_unavailable")), "{refused}");
    assert_eq!(scrape(api.metrics.unwrap()).await.sum("wrenn_operation_duration_seconds_count"), 0.0);
    // It answers whether it is well, and nothing else.
    for (path, status) in [("/health/ready", 200), ("/health/live", 200), ("/v1/sandboxes", 404), ("/docs", 404)] {
        assert_eq!(administrator.call(&workers.url, Method::GET, path, None).await.0, status, "{path}");
    }
    workers.signal("TERM");
    assert!(workers.ended(Duration::from_secs(15)).await.success());
}

#[test]
fn roles_that_are_not_there_are_refused_with_the_settings_name() {
    let dir = tempfile::tempdir().unwrap();
    for (roles, said) in [("api,edge", "edge is not there"), ("api,worker", "\"worker\" is no role")] {
        let output = command("postgres://x@localhost/x", dir.path()).env("WRENN_ROLES", roles).output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(78), "{text}");
        assert!(text.contains("WRENN_ROLES") && text.contains(said), "{text}");
    }
}
