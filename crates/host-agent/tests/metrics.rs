//! What the agent tells Prometheus: in the right form, as its table and its document say, and that each number for an invariant moves
//! when the invariant is touched. Without kernel objects: a VMM that leaks is for the tests of whole machines.

mod platform;
mod port;
mod stage;

use api::host::{EnsureKilledRequest, EnsureRunningRequest, Fence, SandboxSpec};
use host_agent::measures::{self, TABLE};
use model::sandbox::{Kept, Observed};
use port::Port;
use stage::{create, id, kill, pause, pause_keeping};
use testkit::metrics::{documented, get, is_documented, scrape, until};

const DOCUMENT: &str = include_str!("../../../docs/how-to/monitoring.md");
const RULES: &str = include_str!("../../../deploy/prometheus/wrenn.rules.yml");

#[test]
fn fake_envd() {
    stage::fake_envd();
}

#[test]
fn the_document_has_every_metric_and_each_invariant_a_rule() {
    is_documented(DOCUMENT, TABLE).unwrap();
    for metric in TABLE.iter().filter(|metric| metric.guards.is_some()) {
        assert!(RULES.contains(metric.name), "{} guards an invariant and no rule asks for it", metric.name);
    }
    for name in documented(DOCUMENT).iter().filter(|name| name.starts_with("wrenn_agent_")) {
        assert!(TABLE.iter().any(|metric| metric.name == name), "{name} is documented and no metric");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn numbers_are_told_and_move_with_what_they_count() {
    let port = Port::with(microvm::fake::Fake::with_body(stage::body)).await;
    let sandboxes = port.agent.sandboxes.clone();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let metrics = listener.local_addr().unwrap();
    let telemetry = telemetry::install(TABLE, "test").unwrap();
    let agent = port.agent.clone();
    let look: telemetry::Look = Box::new(move || Box::pin(measures::look(agent.clone())));
    tokio::spawn(telemetry::serve(listener, telemetry, look, port.stop.clone()));

    let page = scrape(metrics).await;
    page.conforms(TABLE).unwrap();
    for metric in TABLE.iter().filter(|metric| metric.guards.is_some()) {
        assert_eq!(page.value(metric.name, &[]), Some(0.0), "{} on a new host", metric.name);
    }
    assert!(get(metrics, "/health/live").await.0.starts_with("HTTP/1.1 200 "));
    assert_eq!(page.value("wrenn_agent_link_up", &[]), Some(1.0));

    // A call that is out of date: the sandbox was killed at a later revision.
    let fence = |revision| Fence { host_epoch: 1, revision, operation_id: "op".to_owned(), ..Default::default() };
    let kill_call = EnsureKilledRequest { sandbox_id: id(9).to_string(), fence: fence(5).into(), ..Default::default() };
    port.client().ensure_killed(kill_call).await.unwrap();
    let late = EnsureRunningRequest {
        sandbox_id: id(9).to_string(),
        fence: fence(1).into(),
        spec: SandboxSpec {
            template: "minimal".to_owned(),
            vcpus: 1,
            memory_mib: 256,
            disk_mib: 1024,
            ..Default::default()
        }
        .into(),
        ..Default::default()
    };
    assert!(port.client().ensure_running(late).await.is_err());

    // A pause that does not come about, one that does, and a resume from what was damaged meanwhile.
    create(&sandboxes, &id(1), 1).await;
    let unflushed = port.stage.dir.join(stage::UNFLUSHED);
    std::fs::write(&unflushed, "").unwrap();
    assert_eq!(pause_keeping(Kept::Disk, &sandboxes, &id(1), 2).await.observed, Observed::Running);
    std::fs::remove_file(&unflushed).unwrap();
    assert_eq!(pause(&sandboxes, &id(1), 3).await.observed, Observed::Paused);
    let manifest = manifest_of(&port.stage.dir.join("pool/sandboxes").join(id(1).to_string()));
    let whole = std::fs::read(&manifest).unwrap();
    std::fs::write(&manifest, &whole[1..]).unwrap();
    assert_eq!(create(&sandboxes, &id(1), 4).await.observed, Observed::Paused);
    std::fs::write(&manifest, whole).unwrap();

    // A microVM that ends by itself.
    assert_eq!(create(&sandboxes, &id(1), 5).await.observed, Observed::Running);
    let tag = sandboxes.context().tag.clone();
    for pid in stage::processes_of(&tag) {
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL).unwrap();
    }
    std::fs::create_dir(port.stage.dir.join("pool/quarantine/of-somebody")).unwrap();
    let caught = std::panic::catch_unwind(|| panic!("the test wants it counted"));
    assert!(caught.is_err());

    let page = until(metrics, "what guards invariants", |page| {
        [
            ("wrenn_agent_stale_commands_refused_total", 1.0),
            ("wrenn_agent_pause_rollback_total", 1.0),
            ("wrenn_agent_snapshot_corrupt_total", 1.0),
            ("wrenn_agent_sandbox_exits_total", 1.0),
            ("wrenn_agent_quarantined_sandboxes", 1.0),
            ("wrenn_panics_total", 1.0),
        ]
        .iter()
        .all(|(name, value)| page.value(name, &[]) == Some(*value))
    })
    .await;
    page.conforms(TABLE).unwrap();
    let call =
        |call, outcome| page.value("wrenn_agent_call_duration_seconds_count", &[("call", call), ("outcome", outcome)]);
    assert_eq!(call("EnsureKilled", "ok"), Some(1.0));
    assert_eq!(call("EnsureRunning", "refused"), Some(1.0));
    let step = |verb, step, outcome| {
        page.value("wrenn_agent_step_duration_seconds_count", &[("verb", verb), ("step", step), ("outcome", outcome)])
    };
    assert!(step("create", "commit", "done") >= Some(2.0));
    assert_eq!(step("pause", "seal", "done"), Some(1.0));
    assert_eq!(page.value("wrenn_agent_sandboxes", &[("state", "failed")]), Some(1.0));
    kill(&sandboxes, &id(1), 6).await;
    port.stop.cancel();
}

/// Of its only saved state.
fn manifest_of(sandbox: &std::path::Path) -> std::path::PathBuf {
    let mut places = vec![sandbox.to_owned()];
    while let Some(place) = places.pop() {
        for entry in std::fs::read_dir(place).unwrap().flatten() {
            match entry.file_type().unwrap().is_dir() {
                true => places.push(entry.path()),
                false if entry.file_name() == "manifest" => return entry.path(),
                false => {}
            }
        }
    }
    panic!("{} has no saved state", sandbox.display());
}
