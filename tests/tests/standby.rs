//! Creates that claim what stands by: each is somebody of its own, whoever dies; and what stands by is nobody's and stays with nobody.

use std::collections::BTreeSet;
use std::time::{SystemTime, UNIX_EPOCH};

use reqwest::Method;
use serde_json::json;
use whole_machine::platform::{CREATE_LIMIT, Options, Platform};
use whole_machine::standbys::{READY_LIMIT, standbys, until_ready, was_standby};
use whole_machine::{objects, wait};

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
    for pid in objects::microvms(&platform.dir.join("pool/standbys")) {
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
    let scratch = tempfile::tempdir().unwrap();
    let (arm, list) = (scratch.path().join("arm"), scratch.path().join("list"));
    let env = [("WRENN_CRASHPOINTS_FILE", &arm), ("WRENN_CRASHPOINTS_LIST", &list)];
    let env = env.map(|(key, path)| (key.to_owned(), path.to_str().unwrap().to_owned()));
    let mut options = options(1);
    options.env.extend(env);
    let platform = Platform::start_with(&options);
    let witness = platform.create().await;
    // One that nobody disturbs names the points.
    let id = platform.create().await;
    until_ready(&platform, 1).await;
    platform.kill(&id).await;
    std::fs::write(&list, "").unwrap();
    let id = platform.create().await;
    assert!(was_standby(&platform, &id));
    until_ready(&platform, 1).await;
    platform.kill(&id).await;
    let reached = std::fs::read_to_string(&list).unwrap();
    let points: Vec<&str> =
        reached.lines().filter(|point| point.starts_with("standby.") || point.starts_with("create.")).collect();
    for point in ["start.before", "start.after", "stop.after", "claim.before", "claim.after"] {
        assert!(points.contains(&format!("standby.{point}").as_str()), "{points:?}");
    }
    for point in points {
        until_demand(&platform).await;
        std::fs::write(&arm, format!("{point}=abort")).unwrap();
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
        wait::until("the point is reached", READY_LIMIT, || async { (!arm.exists()).then_some(()) }).await;
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
