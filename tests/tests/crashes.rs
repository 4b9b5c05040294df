//! Programs die at any instant: nothing is lost, nothing leaks, guests go on.

use std::time::Duration;

use reqwest::Method;
use serde_json::json;
use whole_machine::crash_points::CrashPoints;
use whole_machine::platform::{CREATE_LIMIT, Options, Platform};

/// How long after its death a program and its state may take to be true again (restart, adoption, repair).
const HEALED: Duration = Duration::from_secs(60);

/// Kills the agent at each journaled step of create and of kill. What was wished comes true all the same, and nothing is left.
#[tokio::test(flavor = "multi_thread")]
async fn the_agent_dies_at_every_step_of_create_and_kill() {
    let deaths = CrashPoints::new();
    let platform = Platform::start_with(&Options { env: deaths.env(), ..Options::default() });
    let before = platform.objects();

    // One undisturbed life names the points.
    let id = platform.create().await;
    platform.kill(&id).await;
    platform.expect_objects(&before).await;
    let points = deaths.passed_by_agent();
    assert!(points.iter().filter(|point| point.starts_with("create.")).count() >= 8, "{points:?}");
    assert!(points.iter().filter(|point| point.starts_with("kill.")).count() >= 4, "{points:?}");

    let witness = platform.create().await;
    for point in &points {
        deaths.arm(point);
        let (status, created) =
            platform.call(Method::POST, "/v1/sandboxes?wait_sec=0", Some(json!({"memory_mb": 256}))).await;
        assert!(matches!(status.as_u16(), 201 | 202), "{point}: {status} {created}");
        let id = created["id"].as_str().unwrap();
        platform.wait_status(id, "running", CREATE_LIMIT).await;
        assert_eq!(platform.shell_soon(id, "echo alive").await, (0, "alive\n".to_owned()), "{point}");
        platform.kill(id).await;
        deaths.expect_death(point);
        eprintln!("survived a kill -9 at {point}");
    }
    platform.wait_ready().await;
    assert_eq!(platform.shell(&witness, "echo witness").await, (0, "witness\n".to_owned()));
    platform.kill(&witness).await;
    platform.expect_objects(&before).await;
    assert_eq!(platform.finish(), Default::default());
}

/// Kills the agent at each step of a pause and of the resume after it. It is paused or it runs, never anything else, and comes back whole.
#[tokio::test(flavor = "multi_thread")]
async fn the_agent_dies_at_every_step_of_pause_and_resume() {
    let deaths = CrashPoints::new();
    let platform = Platform::start_with(&Options { env: deaths.env(), ..Options::default() });
    let before = platform.objects();
    let id = platform.create().await;
    platform.shell(&id, "echo memory >/dev/shm/kept; echo disk >/root/kept").await;
    let turn = async |verb: &str, wanted: &str| {
        // The agent may die under the call: its wish stands, and is fulfilled when the agent is back.
        let (status, answer) =
            platform.call(Method::POST, &format!("/v1/sandboxes/{id}/{verb}?wait_sec=0"), None).await;
        assert!(matches!(status.as_u16(), 200 | 202), "{verb}: {status} {answer}");
        platform.wait_status(&id, wanted, HEALED).await;
    };
    // One undisturbed turn names the points.
    deaths.forget_passed();
    turn("pause", "paused").await;
    turn("resume", "running").await;
    let points = deaths.passed_by_agent();
    assert!(
        ["pause.seal.after", "park.settle.after", "create.commit.after"]
            .iter()
            .all(|it| points.iter().any(|point| point == it))
    );
    for point in points {
        deaths.arm(&point);
        turn("pause", "paused").await;
        turn("resume", "running").await;
        deaths.expect_death(&point);
        let said = platform.shell(&id, "cat /dev/shm/kept /root/kept").await;
        assert_eq!(said, (0, "memory\ndisk\n".to_owned()), "{point}");
    }
    platform.kill(&id).await;
    platform.expect_objects(&before).await;
    assert_eq!(platform.finish(), Default::default());
}

/// Kills the agent at each step of a snapshot of a running sandbox and of a paused one. The snapshot is made all the same, and what it is of
/// is what it was.
#[tokio::test(flavor = "multi_thread")]
async fn the_agent_dies_at_every_step_of_a_snapshot() {
    let deaths = CrashPoints::new();
    let platform = Platform::start_with(&Options { env: deaths.env(), ..Options::default() });
    let before = platform.objects();
    let id = platform.create().await;
    platform.shell(&id, "echo memory >/dev/shm/kept; echo disk >/root/kept").await;
    let kept = || std::fs::read_dir(platform.dir.join("pool/snapshots")).unwrap().count();
    for (what, count) in [("running", 14), ("paused", 2)] {
        if what == "paused" {
            let (status, _) = platform.call(Method::POST, &format!("/v1/sandboxes/{id}/pause?wait_sec=60"), None).await;
            assert_eq!(status, 200);
        }
        let take = async |name: &str| {
            let body = json!({"sandbox_id": id, "name": name});
            let (status, made) = platform.call(Method::POST, "/v1/snapshots?wait_sec=100", Some(body)).await;
            assert_eq!((status.as_u16(), made["status"].as_str()), (201, Some(what)), "{name}: {made}");
            let (status, _) = platform.call(Method::DELETE, &format!("/v1/snapshots/{name}"), None).await;
            assert_eq!(status, 204);
        };
        // One that nobody disturbs names the points.
        deaths.forget_passed();
        take("quiet").await;
        let points = deaths.passed_by_agent();
        assert_eq!(points.len(), count, "{points:?}");
        for point in points {
            deaths.arm(&point);
            take(&point).await;
            deaths.expect_death(&point);
            if what == "running" {
                let said = platform.shell_soon(&id, "cat /dev/shm/kept /root/kept").await;
                assert_eq!(said, (0, "memory\ndisk\n".to_owned()), "{point}");
            }
        }
    }
    let (status, _) = platform.call(Method::POST, &format!("/v1/sandboxes/{id}/resume?wait_sec=60"), None).await;
    assert_eq!(status, 200);
    assert_eq!(platform.shell(&id, "cat /dev/shm/kept /root/kept").await, (0, "memory\ndisk\n".to_owned()));
    whole_machine::wait::until("no snapshot is left", HEALED, || async { (kept() == 0).then_some(()) }).await;
    platform.kill(&id).await;
    platform.expect_objects(&before).await;
    assert_eq!(platform.finish(), Default::default());
}

/// kill -9 of the agent under a running guest: the guest does not notice, and is adopted.
#[tokio::test(flavor = "multi_thread")]
async fn a_killed_agent_adopts_its_running_sandboxes() {
    let platform = Platform::start();
    let id = platform.create().await;
    // The guest measures its own pauses: the longest gap between two looks at its clock.
    let canary = "import time\nworst=0\nlast=time.monotonic()\nwhile True:\n time.sleep(0.005)\n now=time.monotonic()\n worst=max(worst,now-last)\n last=now\n \
                  open('/tmp/worst.new','w').write(str(worst))\n import os; os.rename('/tmp/worst.new','/tmp/worst')\n";
    platform
        .shell(
            &id,
            &format!("cat > /root/canary.py <<'X'\n{canary}X\nsetsid python3 /root/canary.py >/dev/null 2>&1 &"),
        )
        .await;
    let incarnation = platform.get(&id).await["incarnation"].clone();
    let vmm = whole_machine::objects::microvms(&platform.tag());
    assert_eq!(vmm.len(), 1);
    for _ in 0..3 {
        platform.kill_9("wrenn-agent");
        platform.wait_ready().await;
        let began = std::time::Instant::now();
        loop {
            let (status, outcome) = platform
                .call(Method::POST, &format!("/v1/sandboxes/{id}/exec"), Some(json!({"cmd": "echo", "args": ["hi"]})))
                .await;
            if status == 200 {
                assert_eq!(outcome["stdout"], "hi\n");
                break;
            }
            assert!(began.elapsed() < HEALED, "{status} {outcome}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
    assert_eq!(whole_machine::objects::microvms(&platform.tag()), vmm, "the same process");
    assert_eq!(platform.get(&id).await["incarnation"], incarnation, "the same incarnation");
    let vcpu_stops = platform.shell(&id, "cat /tmp/worst").await.1;
    let worst: f64 = vcpu_stops.trim().parse().unwrap_or_else(|e| panic!("{vcpu_stops:?}: {e}"));
    println!("longest pause of the guest over 3 kills of the agent: {:.0} ms", worst * 1000.0);
    platform.kill(&id).await;
    assert_eq!(platform.finish(), Default::default());
}

/// kill -9 of the control plane between every commit and its effect: another start finishes what was accepted.
#[tokio::test(flavor = "multi_thread")]
async fn the_control_plane_dies_and_the_wish_comes_true() {
    let platform = Platform::start();
    let before = platform.objects();
    for delay_ms in [0u64, 30, 300] {
        let (status, created) =
            platform.call(Method::POST, "/v1/sandboxes?wait_sec=0", Some(json!({"memory_mb": 256}))).await;
        assert!(matches!(status.as_u16(), 201 | 202), "{status} {created}");
        tokio::time::sleep(Duration::from_millis(delay_ms)).await;
        platform.kill_9("wrenn-cp");
        platform.wait_ready().await;
        let id = created["id"].as_str().unwrap();
        platform.wait_status(id, "running", CREATE_LIMIT).await;
        let request = platform
            .http
            .delete(format!("{}/v1/sandboxes/{id}?wait_sec=0", platform.api))
            .header("X-API-Key", &platform.api_key);
        request.send().await.unwrap();
        platform.kill_9("wrenn-cp");
        platform.wait_ready().await;
        platform.wait_status(id, "stopped", HEALED).await;
    }
    platform.expect_objects(&before).await;
}

/// The VMM of one sandbox dies: that sandbox says so within seconds, its neighbour does not notice.
#[tokio::test(flavor = "multi_thread")]
async fn a_killed_vmm_fails_its_own_sandbox_only() {
    let platform = Platform::start();
    let before = platform.objects();
    let first = platform.create().await;
    let victim = whole_machine::objects::microvms(&platform.tag())[0];
    let second = platform.create().await;
    // SAFETY: the pid was just found to be the VMM of this very platform.
    unsafe { libc::kill(victim, libc::SIGKILL) };
    let failed = platform.wait_status(&first, "error", Duration::from_secs(5)).await;
    assert!(failed["reason"].as_str().is_some_and(|reason| !reason.is_empty()), "{failed}");
    assert_eq!(platform.shell(&second, "echo fine").await, (0, "fine\n".to_owned()));
    platform.kill(&first).await;
    platform.kill(&second).await;
    platform.expect_objects(&before).await;
}

/// PostgreSQL goes away: 503 and nothing else meanwhile, full service after it is back, guests untouched.
#[tokio::test(flavor = "multi_thread")]
async fn postgresql_dies_and_comes_back() {
    let platform = Platform::start();
    let id = platform.create().await;
    let postmaster: i32 = std::fs::read_to_string(platform.dir.join("postgres/data/postmaster.pid"))
        .ok()
        .and_then(|text| text.lines().next().and_then(|line| line.trim().parse().ok()))
        .expect("the postmaster's pid");
    // SAFETY: the pid is that of the cluster in this very platform's directory.
    unsafe { libc::kill(postmaster, libc::SIGKILL) };
    let began = std::time::Instant::now();
    let mut unavailable = 0;
    loop {
        let (status, answer) = platform.call(Method::GET, &format!("/v1/sandboxes/{id}"), None).await;
        match status.as_u16() {
            200 if began.elapsed() > Duration::from_secs(3) => break,
            200 => {}
            503 => {
                assert_eq!(answer["error"]["code"], "unavailable", "{answer}");
                unavailable += 1;
            }
            other => panic!("{other} while PostgreSQL was away: {answer}"),
        }
        assert!(began.elapsed() < HEALED, "no service {HEALED:?} after PostgreSQL was killed");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    println!("answers 503 while PostgreSQL was away: {unavailable}");
    assert_eq!(platform.shell(&id, "echo here").await, (0, "here\n".to_owned()));
    platform.kill(&id).await;
}

/// Random numbers that a printed seed gives again.
struct Dice(u64);

impl Dice {
    fn below(&mut self, end: u64) -> u64 {
        // xorshift64: never 0 when it does not begin as 0.
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }
}

/// Control plane and agent are killed at random instants while sandboxes are made, used and killed: every wish comes true, every sandbox
/// that was said to run answers, and nothing is left.
async fn storm(rounds: u32, seed: u64) {
    println!("seed {seed}");
    let mut dice = Dice(seed);
    let platform = Platform::start();
    let before = platform.objects();
    let witness = platform.create().await;
    platform.shell(&witness, "echo kept > /root/kept").await;
    let incarnation = platform.get(&witness).await["incarnation"].clone();
    for round in 0..rounds {
        let key = format!("storm-{round}");
        let create = || {
            let request = platform.http.post(format!("{}/v1/sandboxes?wait_sec=0", platform.api));
            let request = request.header("X-API-Key", &platform.api_key).header("Idempotency-Key", &key);
            request.json(&json!({"memory_mb": 256})).send()
        };
        let victims = match dice.below(3) {
            0 => vec!["wrenn-cp"],
            1 => vec!["wrenn-agent"],
            _ => vec!["wrenn-agent", "wrenn-cp"],
        };
        let first = tokio::spawn(create());
        tokio::time::sleep(Duration::from_millis(dice.below(1500))).await;
        // One that is between its death and its next start cannot be killed.
        for name in victims.into_iter().filter(|name| platform.pid_of(name).is_some()) {
            platform.kill_9(name);
        }
        drop(first.await);
        platform.wait_ready().await;
        // The answer may be lost with the program that gave it: the same key asks again.
        let answer = whole_machine::wait::until("an answer", HEALED, || async {
            let answer = create().await.ok()?;
            matches!(answer.status().as_u16(), 201 | 202).then_some(answer.json::<serde_json::Value>().await.ok()?)
        })
        .await;
        let id = answer["id"].as_str().unwrap();
        platform.wait_status(id, "running", CREATE_LIMIT).await;
        assert_eq!(
            platform.shell_soon(id, "echo alive").await,
            (0, "alive\n".to_owned()),
            "round {round} of seed {seed}"
        );
        let _ = platform
            .http
            .delete(format!("{}/v1/sandboxes/{id}?wait_sec=0", platform.api))
            .header("X-API-Key", &platform.api_key)
            .send()
            .await;
        if dice.below(2) == 0 {
            tokio::time::sleep(Duration::from_millis(dice.below(100))).await;
            let name = ["wrenn-agent", "wrenn-cp"][usize::from(dice.below(2) == 0)];
            if platform.pid_of(name).is_some() {
                platform.kill_9(name);
            }
            platform.wait_ready().await;
            let _ = platform
                .http
                .delete(format!("{}/v1/sandboxes/{id}?wait_sec=0", platform.api))
                .header("X-API-Key", &platform.api_key)
                .send()
                .await;
        }
        platform.wait_status(id, "stopped", HEALED).await;
        assert_eq!(
            platform.shell_soon(&witness, "cat /root/kept").await,
            (0, "kept\n".to_owned()),
            "round {round} of seed {seed}"
        );
    }
    assert_eq!(platform.get(&witness).await["incarnation"], incarnation, "seed {seed}");
    platform.kill(&witness).await;
    platform.expect_objects(&before).await;
    assert_eq!(platform.finish(), Default::default(), "seed {seed}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_few_kills_at_random_instants_lose_nothing() {
    storm(20, 0x5eed).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes half an hour: make check-long"]
async fn hundreds_of_kills_at_random_instants_lose_nothing() {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    storm(200, now.as_nanos() as u64 | 1).await;
}
