//! Creates that claim what stands by: each is somebody of its own, whoever dies; and what stands by is nobody's and stays with nobody.

use std::collections::BTreeSet;
use std::time::{SystemTime, UNIX_EPOCH};

use reqwest::Method;
use serde_json::json;
use whole_machine::crash_points::CrashPoints;
use whole_machine::platform::{CREATE_LIMIT, Options, Platform};
use whole_machine::standbys::{READY_LIMIT, microvms, standbys, until_ready, was_standby};
use whole_machine::wait;

fn options(at_most: usize) -> Options {
    let env = [("WRENN_STANDBYS".to_owned(), at_most.to_string())];
    Options { env: env.into(), pool_mib: Some(8192), ..Options::default() }
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_claimed_is_somebody_of_its_own() {
    let platform = Platform::start_with(&options(2));
    // The first boots, the second is restored and says that there is a demand.
    let mut all = vec![platform.create().await];
    let first_state = || std::fs::read_dir(platform.dir.join("pool/templates")).unwrap().flatten().count();
    wait::until("the booted state is kept", READY_LIMIT, || async { (first_state() == 1).then_some(()) }).await;
    for _ in 0..2 {
        all.push(platform.create().await);
    }
    until_ready(&platform, 2).await;
    let facts =
        "hostname; cat /etc/machine-id; head -c 16 /dev/urandom | od -An -tx1; cat /proc/sys/kernel/random/uuid";
    let mut seen = [const { BTreeSet::new() }; 5];
    for round in 0..4 {
        if round % 2 == 0 {
            until_ready(&platform, 2).await;
        }
        let id = platform.create().await;
        assert!(was_standby(&platform, &id), "round {round}");
        let began = now();
        let (code, said) = platform.shell(&id, &format!("date +%s.%N; {facts}")).await;
        let ended = now();
        assert_eq!(code, 0, "{said}");
        let (date, facts) = said.split_once('\n').unwrap();
        let theirs: f64 = date.parse().unwrap();
        assert!((began - 1.0..ended + 1.0).contains(&theirs), "{theirs} is not between {began} and {ended}");
        let token = platform.guest(&id).access_token;
        for (fact, seen) in facts.lines().map(str::to_owned).chain([token]).zip(&mut seen) {
            assert!(seen.insert(fact.clone()), "{fact} is another's too");
        }
        assert!(facts.starts_with(id.as_str()), "{facts}");
        all.push(id);
    }
    // What the guest's kernel has said is in the log, as for any other.
    let log = |id: &str| String::from_utf8(platform.wrenn(&["sandbox", "logs", id]).stdout).unwrap();
    assert!(log(&all[3]).starts_with(log(&all[0]).lines().next().unwrap()));

    // It is paused and resumed as any other, adopted by another agent, and what stood by ends with the old one.
    let id = all.last().unwrap().clone();
    assert_eq!(platform.shell(&id, "echo disk >/root/kept; echo memory >/dev/shm/kept").await.0, 0);
    until_ready(&platform, 2).await;
    let before = standbys(&platform);
    platform.kill_9("wrenn-agent");
    platform.wait_ready().await;
    let kept = "cat /root/kept /dev/shm/kept";
    assert_eq!(platform.shell_soon(&id, kept).await, (0, "disk\nmemory\n".to_owned()));
    assert!(before.iter().all(|place| !place.exists()), "{:?}", standbys(&platform));
    for verb in ["pause", "resume"] {
        let (status, sandbox) =
            platform.call(Method::POST, &format!("/v1/sandboxes/{id}/{verb}?wait_sec=60"), None).await;
        assert_eq!(status, 200, "{sandbox}");
    }
    assert_eq!(platform.shell(&id, kept).await, (0, "disk\nmemory\n".to_owned()));

    // One whose VMM was ended is claimed by nobody.
    platform.create().await;
    until_ready(&platform, 1).await;
    for pid in microvms(&platform) {
        // SAFETY: the pid was just found to be a VMM of this very platform.
        unsafe { libc::kill(pid, libc::SIGKILL) };
    }
    let id = platform.create().await;
    assert!(!was_standby(&platform, &id));
    assert_eq!(platform.shell(&id, "echo fine").await, (0, "fine\n".to_owned()));
    assert_eq!(platform.finish(), Default::default());
}

/// Kills the agent at each step of the making and of the claim of a standby, and at each step of the create that has claimed one.
#[tokio::test(flavor = "multi_thread")]
async fn the_agent_dies_at_every_step_of_a_claim() {
    let deaths = CrashPoints::new();
    let mut options = options(1);
    options.env.extend(deaths.env());
    let platform = Platform::start_with(&options);
    let witness = platform.create().await;
    // One that nobody disturbs names the points.
    let id = platform.create().await;
    until_ready(&platform, 1).await;
    platform.kill(&id).await;
    deaths.forget_passed();
    let id = platform.create().await;
    assert!(was_standby(&platform, &id));
    until_ready(&platform, 1).await;
    platform.kill(&id).await;
    let mut points = deaths.passed_by_agent();
    points.retain(|point| point.starts_with("standby.") || point.starts_with("create."));
    for point in ["start.before", "start.after", "stop.after", "claim.before", "claim.after"] {
        assert!(points.contains(&format!("standby.{point}")), "{points:?}");
    }
    for point in points {
        until_demand(&platform).await;
        deaths.arm(&point);
        let (status, created) =
            platform.call(Method::POST, "/v1/sandboxes?wait_sec=0", Some(json!({"memory_mb": 256}))).await;
        assert!(matches!(status.as_u16(), 201 | 202), "{point}: {status} {created}");
        let id = created["id"].as_str().unwrap();
        platform.wait_status(id, "running", CREATE_LIMIT).await;
        assert_eq!(platform.shell_soon(id, "echo alive; hostname").await, (0, format!("alive\n{id}\n")), "{point}");
        // From the claim on the create is finished by another agent, not begun anew.
        let is_claimed =
            point.starts_with("create.") && point != "create.reserve.before" || point == "standby.claim.after";
        assert!(!is_claimed || was_standby(&platform, id), "{point}");
        wait::until("the point is reached", READY_LIMIT, || async { deaths.has_come().then_some(()) }).await;
        platform.wait_ready().await;
        platform.kill(id).await;
        eprintln!("survived a kill -9 at {point}");
    }
    assert_eq!(platform.shell_soon(&witness, "echo witness").await, (0, "witness\n".to_owned()));
    platform.kill(&witness).await;
    assert_eq!(platform.finish(), Default::default());
}

/// Another agent has to hear of the kind first; then one stands by.
async fn until_demand(platform: &Platform) {
    if standbys(platform).is_empty() {
        let id = platform.create().await;
        platform.kill(&id).await;
    }
    until_ready(platform, 1).await;
}

/// A snapshot that creates come back to: its users' processes run in what was claimed, and not in what stands by.
#[tokio::test(flavor = "multi_thread")]
async fn what_stands_by_in_a_snapshot_runs_for_nobody_until_it_is_claimed() {
    let platform = Platform::start_with(&options(2));
    let source = platform.create().await;
    let ticks = "setsid sh -c 'while :; do echo $(hostname) $(date +%s.%N) >>/root/ran; sleep 0.05; done' >/dev/null 2>&1 </dev/null &";
    assert_eq!(platform.shell(&source, ticks).await.0, 0);
    assert_eq!(platform.shell(&source, "until [ -s /root/ran ]; do sleep 0.1; done").await.0, 0);
    let wanted = json!({"sandbox_id": source, "name": "ticking"});
    let (status, made) = platform.call(Method::POST, "/v1/snapshots?wait_sec=60", Some(wanted)).await;
    assert_eq!(status, 201, "{made}");
    let create = async || platform.create_with(json!({"template": "ticking"})).await;
    let began_first = now();
    let mut all = vec![source.clone(), create().await];
    assert!(!was_standby(&platform, &all[1]));
    tokio::time::sleep(std::time::Duration::from_secs(4)).await;
    all.push(create().await);
    for _ in 0..2 {
        until_ready(&platform, 1).await;
        // What stands by long enough would be let run by the guest's watchdog, if its time went on.
        tokio::time::sleep(std::time::Duration::from_secs(3)).await;
        let began = now();
        let id = create().await;
        assert!(was_standby(&platform, &id));
        let (code, said) = platform.shell(&id, "sleep 2; cat /root/ran; hostname; cat /etc/machine-id").await;
        let mut lines: Vec<&str> = said.lines().collect();
        let (machine, host) = (lines.pop().unwrap(), lines.pop().unwrap());
        assert_eq!((code, host, machine.len()), (0, id.as_str(), 32), "{said}");
        let ran: Vec<(&str, f64)> = lines
            .iter()
            .filter_map(|line| line.split_once(' '))
            .map(|(host, at)| (host, at.parse().unwrap()))
            .collect();
        let (own, before): (Vec<_>, Vec<_>) = ran.iter().partition(|(_, at)| *at > began - 1.0);
        // The first may have asked for its name before the snapshot and for the time after it.
        assert!(own.len() > 1 && own[1..].iter().all(|(host, _)| *host == id), "{said}");
        assert!([&source, &id].iter().any(|it| *it == own[0].0), "{said}");
        let saved_at = before.last().map_or(0.0, |(_, at)| *at);
        assert!(saved_at < began_first, "it ran while it stood by: {said}");
        assert!(!before.is_empty() && before.iter().all(|(host, _)| *host == source), "{said}");
        all.push(id);
    }
    // It is somebody's: deleted, nothing of it stands by any more.
    until_ready(&platform, 1).await;
    assert_eq!(platform.call(Method::DELETE, "/v1/snapshots/ticking", None).await.0, 204);
    wait::until("what stood by in it has ended", READY_LIMIT, || async {
        standbys(&platform).is_empty().then_some(())
    })
    .await;
    for id in &all {
        platform.kill(id).await;
    }
    assert_eq!(platform.finish(), Default::default());
}
