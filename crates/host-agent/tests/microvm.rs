//! The whole agent on this machine: the real program, real network slots, real disks, real microVMs.
//!
//! Needs root, QEMU and the directory `WRENN_TEST_ARTIFACTS` with `kernels/` and `images/` in it; without them it says so and does nothing.

mod platform;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use api::host::__buffa::oneof::exec_response::Event;
use api::host::{
    EnsureKilledRequest, EnsureRunningRequest, ExecRequest, Fence, GetConsoleRequest, GetHostRequest,
    GetSandboxRequest, ListSandboxesRequest, SandboxSpec, SandboxState,
};
use connectrpc::ConnectError;
use model::ids::SandboxId;
use platform::{Client, Platform};

/// The agent as a process; killed with the test.
struct Agent {
    child: Child,
    url: String,
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

struct Machine {
    dir: PathBuf,
    platform: Platform,
    /// One at a time: emulated guests beside each other only measure each other.
    _turn: tokio::sync::MutexGuard<'static, ()>,
}

impl Drop for Machine {
    fn drop(&mut self) {
        let status = self.command().arg("--stop-all").status();
        assert!(status.is_ok_and(|status| status.success()) || std::thread::panicking(), "--stop-all failed");
        let held = self.held();
        assert!(held.is_empty() || std::thread::panicking(), "--stop-all has left {held:?}");
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

impl Machine {
    async fn new() -> Option<Self> {
        let Some(artifacts) = std::env::var_os("WRENN_TEST_ARTIFACTS").map(PathBuf::from) else {
            eprintln!("skipped: WRENN_TEST_ARTIFACTS is not set");
            return None;
        };
        static TURN: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());
        let turn = TURN.lock().await;
        let dir = PathBuf::from(format!("/var/tmp/wrenn-agent-test-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        for name in ["kernels", "images"] {
            std::os::unix::fs::symlink(artifacts.join(name), dir.join(name)).unwrap();
        }
        Some(Self { dir, platform: Platform::start().await, _turn: turn })
    }

    /// What the kernel has of this WRENN_DIR, found without asking the agent.
    fn held(&self) -> Vec<String> {
        let Ok(tag) = std::fs::read_to_string(self.dir.join("agent-id")) else { return Vec::new() };
        let tag = &tag[..8];
        let look = "cat /proc/mounts; losetup -a; ls /run/netns; ip -o link; nft list tables; find /sys/fs/cgroup -type d; ps -eo args";
        let output = Command::new("sh").args(["-c", look]).output().unwrap();
        let (dir, text) = (self.dir.to_str().unwrap(), String::from_utf8_lossy(&output.stdout).into_owned());
        let ours = |line: &&str| line.contains(dir) || line.contains(tag);
        text.lines().filter(ours).filter(|line| !line.contains("wrenn-agent ")).map(str::to_owned).collect()
    }

    fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_wrenn-agent"));
        command
            .env("WRENN_DIR", &self.dir)
            .env("WRENN_POOL_MIB", "6144")
            // What is counted here is the sandboxes' alone.
            .env("WRENN_STANDBYS", "0")
            .env_remove("WRENN_CP_URL")
            .stdin(Stdio::null());
        command
    }

    /// Starts the agent and waits until it serves, and acts: the platform has heard of it. Or until it has died.
    async fn start(&self, environment: &[(&str, &Path)]) -> Agent {
        let ready = self.dir.join("ready.json");
        let _ = std::fs::remove_file(&ready);
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let address = format!("127.0.0.1:{port}");
        let mut command = self.command();
        command
            .args(["--address", &address, "--listen", &address, "--cp-url", &self.platform.url])
            .args(["--register", "one-time"])
            .arg("--ready-file")
            .arg(&ready);
        for (name, value) in environment {
            command.env(name, value);
        }
        let child = command.spawn().unwrap();
        let mut agent = Agent { child, url: format!("https://{address}") };
        wait(Duration::from_secs(60), "the agent does not serve", async || ready.exists()).await;
        let client = self.client(&agent);
        wait(Duration::from_secs(60), "the agent is not heard of", async || {
            let unheard = |notes: &[String]| notes.iter().any(|note| note.contains("has not answered a heartbeat yet"));
            let host = client.get_host(GetHostRequest::default()).await.map(|host| host.into_owned());
            host.is_ok_and(|host| !unheard(&host.notes)) || agent.child.try_wait().unwrap().is_some()
        })
        .await;
        agent
    }

    fn client(&self, agent: &Agent) -> Client {
        self.platform.authority.control_plane(&agent.url)
    }
}

async fn wait(at_most: Duration, what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let end = Instant::now() + at_most;
    while !condition().await {
        assert!(Instant::now() < end, "{what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn id(n: u128) -> String {
    SandboxId::from_random(n).to_string()
}

fn fence(revision: u64) -> Fence {
    Fence { host_epoch: 1, revision, operation_id: format!("op-{revision}"), ..Default::default() }
}

async fn create(client: &Client, n: u128, revision: u64) -> SandboxState {
    try_create(client, n, revision).await.unwrap()
}

async fn try_create(client: &Client, n: u128, revision: u64) -> Result<SandboxState, ConnectError> {
    let request = EnsureRunningRequest {
        sandbox_id: id(n),
        fence: fence(revision).into(),
        spec: SandboxSpec {
            template: "minimal".to_owned(),
            vcpus: 1,
            memory_mib: 256,
            disk_mib: 2048,
            envs: [("GREETING".to_owned(), "hello".to_owned())].into_iter().collect(),
            default_user: "root".to_owned(),
            ..Default::default()
        }
        .into(),
        ..Default::default()
    };
    Ok(client.ensure_running(request).await?.into_owned().state.into_option().unwrap())
}

async fn kill(client: &Client, n: u128, revision: u64) -> SandboxState {
    let request = EnsureKilledRequest { sandbox_id: id(n), fence: fence(revision).into(), ..Default::default() };
    client.ensure_killed(request).await.unwrap().into_owned().state.into_option().unwrap()
}

async fn run(client: &Client, n: u128, cmd: &str) -> Result<(String, i32), ConnectError> {
    let request = ExecRequest {
        sandbox_id: id(n),
        cmd: "/bin/sh".to_owned(),
        args: vec!["-c".to_owned(), cmd.to_owned()],
        ..Default::default()
    };
    let mut stream = client.exec(request).await?;
    let mut out = Vec::new();
    while let Some(message) = stream.message().await? {
        match message.to_owned_message().event {
            Some(Event::Stdout(bytes) | Event::Stderr(bytes)) => out.extend(bytes),
            Some(Event::End(end)) => return Ok((String::from_utf8_lossy(&out).into_owned(), end.exit_code)),
            _ => {}
        }
    }
    panic!("no end: {}", String::from_utf8_lossy(&out))
}

fn timings(state: &SandboxState) -> String {
    let steps: Vec<_> = state.steps.iter().map(|step| format!("{} {:.1}", step.name, step.ms)).collect();
    steps.join(", ")
}

async fn objects(client: &Client) -> std::collections::BTreeMap<String, u64> {
    let host = client.get_host(GetHostRequest::default()).await.unwrap().into_owned();
    host.objects.into_iter().collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_real_microvm_from_create_to_kill() {
    let Some(machine) = Machine::new().await else { return };
    let agent = machine.start(&[]).await;
    let client = machine.client(&agent);
    let host = client.get_host(GetHostRequest::default()).await.unwrap().into_owned();
    eprintln!("host: {} {} {} {:?}", host.vmm, host.vmm_version, host.isolation, host.notes);
    let before = objects(&client).await;
    for n in 1..=3 {
        let begin = Instant::now();
        let state = create(&client, n, 1).await;
        let console = client.get_console(GetConsoleRequest { sandbox_id: id(n), ..Default::default() }).await;
        if state.observed != "running" {
            panic!(
                "{}: {:?}",
                state.reason,
                console.map(|c| String::from_utf8_lossy(&c.into_owned().tail).into_owned())
            );
        }
        eprintln!("create {n}: {:?}: {}", begin.elapsed(), timings(&state));
    }
    // What one sandbox has, by kind.
    let during = objects(&client).await;
    let more = |kind: &str| during[kind] - before[kind];
    for kind in ["sandboxes", "microvms", "namespaces", "links", "taps", "sandbox_dirs", "run_dirs"] {
        assert_eq!(more(kind), 3, "{kind}: {during:?}");
    }
    if host.cgroup_driver == "none" {
        eprintln!("no limits: {:?}", host.notes);
    } else {
        assert!(more("cgroups") >= 3, "{during:?}");
    }
    let (out, _) = run(&client, 1, "df -m / | tail -n 1").await.unwrap();
    let mib: u64 = out.split_whitespace().nth(1).unwrap().parse().unwrap();
    assert!((1700..=2048).contains(&mib), "the root file system has not the size that was asked for: {out}");
    let (out, code) = run(&client, 1, "echo $GREETING; uname -r; id -un; exit 7").await.unwrap();
    eprintln!("{out}");
    assert!(out.starts_with("hello\n") && out.ends_with("root\n"), "{out}");
    assert_eq!(code, 7);
    for _ in 0..3 {
        let begin = Instant::now();
        run(&client, 1, "true").await.unwrap();
        eprintln!("exec: {:?}", begin.elapsed());
    }
    for n in 1..=3 {
        let begin = Instant::now();
        let state = kill(&client, n, 2).await;
        assert_eq!(state.observed, "killed");
        eprintln!("kill {n}: {:?}: {}", begin.elapsed(), timings(&state));
    }
    eprintln!("agent: {} MiB", host.agent_rss_bytes >> 20);
    assert_eq!(without_own(before), without_own(objects(&client).await));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_pool_takes_no_more() {
    let Some(machine) = Machine::new().await else { return };
    // Less than the reserve and one guest's memory.
    let agent = machine.start(&[("WRENN_POOL_MIB", Path::new("1200"))]).await;
    let client = machine.client(&agent);
    let before = without_own(objects(&client).await);
    let refused = try_create(&client, 1, 1).await.unwrap_err();
    assert_eq!(refused.code, connectrpc::ErrorCode::ResourceExhausted, "{refused:?}");
    assert!(refused.to_string().contains("disk"), "{refused}");
    assert_eq!(before, without_own(objects(&client).await));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_goes_on_when_its_journal_is_damaged() {
    let Some(machine) = Machine::new().await else { return };
    let agent = machine.start(&[]).await;
    let client = machine.client(&agent);
    for n in 1..=2 {
        assert_eq!(create(&client, n, 1).await.observed, "running");
    }
    drop(agent);
    let damaged = machine.dir.join("pool/sandboxes").join(id(1)).join("state.json");
    std::fs::write(&damaged, "{").unwrap();
    let disk_owner = std::os::unix::fs::MetadataExt::uid(&std::fs::metadata(damaged.with_file_name("disk")).unwrap());
    let namespace = format!("-{}", disk_owner & 0x7fff);
    for n in 3..=4 {
        let agent = machine.start(&[]).await;
        let client = machine.client(&agent);
        let list = client.list_sandboxes(ListSandboxesRequest::default()).await.unwrap().into_owned();
        assert!(list.complete);
        assert_eq!(list.sandboxes.iter().map(|sandbox| sandbox.sandbox_id.clone()).collect::<Vec<_>>(), [id(2)]);
        assert_eq!(run(&client, 2, "echo alive").await.unwrap().0, "alive\n");
        // Neither its process nor its network is taken, and nobody else gets them.
        let state = create(&client, n, 1).await;
        assert_eq!(state.observed, "running", "{}", state.reason);
        let held = machine.held();
        assert!(held.iter().any(|line| line.starts_with("wrn-") && line.ends_with(&namespace)), "{held:?}");
        assert_eq!(host_agent::sweep::living(disk_owner..=disk_owner).unwrap(), [disk_owner].into());
        assert_eq!(kill(&client, n, 2).await.observed, "killed");
        assert_eq!(objects(&client).await["microvms"], 2);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_goes_on_when_the_pool_became_full_below_it() {
    let Some(machine) = Machine::new().await else { return };
    let agent = machine.start(&[("WRENN_POOL_MIB", Path::new("3072"))]).await;
    let client = machine.client(&agent);
    assert_eq!(create(&client, 1, 1).await.observed, "running");
    // The booted state that it leaves behind gives back room at its end.
    wait(Duration::from_secs(30), "the booted state is still being kept", async || {
        let places = std::fs::read_dir(machine.dir.join("pool/templates")).into_iter().flatten().flatten();
        !places.map(|place| place.path().join("gen-00001.tmp")).any(|half| half.exists())
    })
    .await;
    let path = machine.dir.join("pool/filler");
    let filler = std::fs::File::create(&path).unwrap();
    let mut length = 0;
    // Down to single blocks.
    for piece in [256_u64 << 20, 16 << 20, 1 << 20, 4096] {
        while rustix::fs::fallocate(&filler, rustix::fs::FallocateFlags::empty(), length, piece).is_ok() {
            length += piece;
        }
    }
    // More than XFS can still find: it has reserved some for pages that the guest wrote while they were shared with that state.
    let write = "dd if=/dev/zero of=/root/big bs=1M count=96 conv=fsync 2>&1";
    let written = tokio::time::timeout(Duration::from_secs(110), run(&client, 1, write)).await;
    let (out, code) = written.expect("the guest stands still").unwrap();
    eprintln!("{out}");
    assert_ne!(code, 0, "the pool was not full: {out}");
    assert_eq!(run(&client, 1, "echo alive").await.unwrap().0, "alive\n");
    std::fs::remove_file(&path).unwrap();
    assert_eq!(run(&client, 1, "echo alive").await.unwrap().0, "alive\n");
    assert_eq!(kill(&client, 1, 2).await.observed, "killed");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_console_outlives_the_microvm_and_the_agent() {
    let Some(machine) = Machine::new().await else { return };
    let agent = machine.start(&[]).await;
    let client = machine.client(&agent);
    assert_eq!(create(&client, 1, 1).await.observed, "running");
    let console = async |client: &Client| {
        let request = GetConsoleRequest { sandbox_id: id(1), ..Default::default() };
        let tail = client.get_console(request).await.map(|answer| answer.into_owned().tail);
        tail.map(|tail| String::from_utf8_lossy(&tail).into_owned())
    };
    run(&client, 1, "echo the first words >/dev/ttyS0").await.unwrap();
    wait(Duration::from_secs(10), "the console says nothing", async || {
        console(&client).await.unwrap().contains("the first words")
    })
    .await;
    // What was read out of the VMM is not lost with the agent that did.
    drop(agent);
    let agent = machine.start(&[]).await;
    let client = machine.client(&agent);
    run(&client, 1, "echo the last words >/dev/ttyS0").await.unwrap();
    wait(Duration::from_secs(10), "the console has forgotten", async || {
        let text = console(&client).await.unwrap();
        text.contains("the first words") && text.contains("the last words")
    })
    .await;
    run(&client, 1, "echo o >/proc/sysrq-trigger").await.ok();
    wait(Duration::from_secs(5), "the end was not noticed", async || {
        let request = GetSandboxRequest { sandbox_id: id(1), ..Default::default() };
        client.get_sandbox(request).await.unwrap().into_owned().state.observed == "failed"
    })
    .await;
    for _ in 0..2 {
        let text = console(&client).await.unwrap();
        assert!(text.contains("the first words") && text.contains("the last words"), "{text}");
        assert!(text.len() <= 64 * 1024);
    }
    drop(agent);
    let agent = machine.start(&[]).await;
    let client = machine.client(&agent);
    assert!(console(&client).await.unwrap().contains("the last words"));
    kill(&client, 1, 2).await;
    assert!(console(&client).await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_greedy_guest_harms_nobody_and_is_not_killed_for_it() {
    let Some(machine) = Machine::new().await else { return };
    let agent = machine.start(&[]).await;
    let client = machine.client(&agent);
    for n in 1..=2 {
        assert_eq!(create(&client, n, 1).await.observed, "running");
    }
    // All the memory that the guest has, and more pages of its disk than the host may cache for it.
    let (_, code) = run(&client, 1, "python3 -c 'b = bytearray(1 << 30)'").await.unwrap();
    assert_ne!(code, 0);
    let (out, code) = run(&client, 1, "dd if=/dev/zero of=/root/big bs=1M count=320 conv=fsync 2>&1").await.unwrap();
    assert_eq!(code, 0, "{out}");
    let (out, code) = run(&client, 1, "cat /root/big | wc -c").await.unwrap();
    assert_eq!((out.trim(), code), ("335544320", 0));
    for name in ["memory.max_usage_in_bytes", "memory.failcnt", "memory.peak", "cpu.stat"] {
        let host = client.get_host(GetHostRequest::default()).await.unwrap().into_owned();
        let places = std::fs::read_to_string(machine.dir.join("agent-cgroups")).unwrap_or_default();
        let value =
            places.lines().find_map(|place| std::fs::read_to_string(Path::new(place).join(id(1)).join(name)).ok());
        eprintln!("{} {name}: {value:?}", host.cgroup_driver);
    }
    for n in 1..=2 {
        assert_eq!(run(&client, n, "echo alive").await.unwrap().0, "alive\n");
        kill(&client, n, 2).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn stop_all_ends_what_a_dead_agent_left() {
    let Some(machine) = Machine::new().await else { return };
    let agent = machine.start(&[("WRENN_STANDBYS", Path::new("4"))]).await;
    let client = machine.client(&agent);
    for n in 1..=2 {
        assert_eq!(create(&client, n, 1).await.observed, "running");
    }
    wait(Duration::from_secs(60), "no microVM stands by", async || {
        std::fs::read_dir(machine.dir.join("pool/standbys")).is_ok_and(|mut places| places.next().is_some())
    })
    .await;
    // In the middle of making it, or just after.
    drop(agent);
    let held = machine.held();
    assert!(held.len() >= 10, "{held:?}");
    assert!(machine.command().arg("--stop-all").status().unwrap().success());
    let held = machine.held();
    assert!(held.is_empty(), "{held:?}");
    // The next start finds everything of use again.
    let agent = machine.start(&[]).await;
    let client = machine.client(&agent);
    assert_eq!(create(&client, 3, 1).await.observed, "running");
}

/// What sandboxes hold; the agent's own descriptors and threads come and go.
fn without_own(mut objects: std::collections::BTreeMap<String, u64>) -> std::collections::BTreeMap<String, u64> {
    for own in ["agent_fds", "agent_threads", "agent_sockets"] {
        objects.remove(own);
    }
    objects
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_does_not_notice_the_agents_death() {
    let Some(machine) = Machine::new().await else { return };
    let agent = machine.start(&[]).await;
    let client = machine.client(&agent);
    let before = create(&client, 1, 1).await;
    assert_eq!(before.observed, "running", "{}", before.reason);
    // The guest itself measures its longest pause.
    let watch = "python3 -c 'import time; last=time.monotonic(); worst=0\nend=last+60\nwhile time.monotonic()<end:\n time.sleep(0.01); now=time.monotonic(); worst=max(worst,now-last); last=now\n open(\"/tmp/worst\",\"w\").write(str(worst))' >/dev/null 2>&1 &";
    run(&client, 1, watch).await.unwrap();
    let worst = async |client: &Client| run(client, 1, "cat /tmp/worst").await.unwrap().0.trim().parse::<f64>().ok();
    // Of a guest that is left alone on a machine as busy as this one is.
    let mut calm = 0.0;
    wait(Duration::from_secs(20), "the guest does not watch", async || {
        calm = worst(&client).await.unwrap_or(0.0);
        calm > 0.0
    })
    .await;
    drop(agent);
    let begin = Instant::now();
    let agent = machine.start(&[]).await;
    let client = machine.client(&agent);
    eprintln!("serving {:?} after its death", begin.elapsed());
    assert!(begin.elapsed() < Duration::from_secs(3), "{:?}", begin.elapsed());
    let list = client.list_sandboxes(ListSandboxesRequest::default()).await.unwrap().into_owned();
    assert!(list.complete);
    let after = client
        .get_sandbox(GetSandboxRequest { sandbox_id: id(1), ..Default::default() })
        .await
        .unwrap()
        .into_owned()
        .state;
    assert_eq!((after.observed.as_str(), &after.incarnation), ("running", &before.incarnation));
    // The file may be empty for a moment, while it is written anew.
    let mut longest = None;
    wait(Duration::from_secs(20), "the guest no longer watches", async || {
        longest = worst(&client).await;
        longest.is_some()
    })
    .await;
    let worst = longest.expect("waited for it");
    eprintln!("longest pause of the guest: {worst} s, {calm} s before");
    assert!(worst < f64::max(0.1, 3.0 * calm), "the guest stood still for {worst} s");
    // The end of the microVM is noticed within a second.
    run(&client, 1, "echo o >/proc/sysrq-trigger").await.ok();
    wait(Duration::from_secs(5), "the end was not noticed", async || {
        let request = GetSandboxRequest { sandbox_id: id(1), ..Default::default() };
        client.get_sandbox(request).await.unwrap().into_owned().state.observed == "failed"
    })
    .await;
    assert_eq!(kill(&client, 1, 2).await.observed, "killed");
}

/// Without `WRENN_TEST_ALL` some of the points: those around which most exists.
#[tokio::test(flavor = "multi_thread")]
async fn the_agents_death_leaves_nothing() {
    let Some(machine) = Machine::new().await else { return };
    let all = std::env::var_os("WRENN_TEST_ALL").is_some();
    let some = [
        "create.network.after",
        "create.start.after",
        "create.health.before",
        "kill.microvm.before",
        "kill.network.after",
    ];
    // The life below has no pause.
    let points = host_agent::sandbox::points::CRASHPOINTS.iter().filter(|point| {
        let is_passed = point.starts_with("create.") || point.starts_with("kill.");
        is_passed && (all || some.contains(point))
    });
    let calm = machine.start(&[]).await;
    let before = without_own(objects(&machine.client(&calm)).await);
    let neighbour = create(&machine.client(&calm), 1000, 1).await;
    drop(calm);
    for (n, point) in points.enumerate() {
        let n = u128::try_from(n).unwrap();
        let spec = format!("{point}=abort");
        let mut agent = machine.start(&[("WRENN_CRASHPOINTS", Path::new(&spec))]).await;
        let client = machine.client(&agent);
        let begin = Instant::now();
        let request =
            |revision| EnsureKilledRequest { sandbox_id: id(n), fence: fence(revision).into(), ..Default::default() };
        let life = async {
            try_create(&client, n, 1).await?;
            client.ensure_killed(request(2)).await.map(drop)
        };
        assert!(life.await.is_err(), "{point}: the agent did not die");
        wait(Duration::from_secs(10), "the agent lives", async || agent.child.try_wait().unwrap().is_some()).await;

        let agent = machine.start(&[]).await;
        let client = machine.client(&agent);
        let found = client
            .get_sandbox(GetSandboxRequest { sandbox_id: id(1000), ..Default::default() })
            .await
            .unwrap()
            .into_owned();
        assert_eq!(
            (found.state.observed.as_str(), &found.state.incarnation),
            ("running", &neighbour.incarnation),
            "{point}"
        );
        if point.starts_with("create.") && *point != "create.commit.after" {
            let again = create(&client, n, 1).await;
            assert_eq!(again.observed, "running", "{point}: {}", again.reason);
        }
        assert_eq!(kill(&client, n, 3).await.observed, "killed", "{point}");
        eprintln!("{point}: {:?}", begin.elapsed());
        drop(agent);
    }
    let agent = machine.start(&[]).await;
    let client = machine.client(&agent);
    run(&client, 1000, "true").await.unwrap();
    kill(&client, 1000, 2).await;
    assert_eq!(before, without_own(objects(&client).await));
}
