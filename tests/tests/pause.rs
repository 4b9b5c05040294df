//! A sandbox that was said to be paused comes back where it stood: its memory, its disk, its processes; with a new identity and the
//! present time. And one that could not be paused goes on running.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use tokio::sync::RwLock;
use whole_machine::objects;
use whole_machine::platform::{Options, Platform};

/// What measures how soon an answer comes has the machine for itself: the others may be beside one another.
static MACHINE: RwLock<()> = RwLock::const_new(());

/// Fills, zeroes and refills its memory and a file, step by step, and says what both hold.
const CANARY: &str = r#"
import hashlib, http.server, os, time
size = 8 << 20
memory = bytearray(size)
born = time.monotonic()
path = '/root/canary'
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        words = self.path.strip('/').split('/')
        if words[0] == 'step':
            n = int(words[1])
            page = 4096
            for at in range((n % 3) * page, size, 3 * page):
                memory[at:at + page] = bytes(page) if n % 2 else bytes([n % 251 + 1]) * page
            with open(path, 'r+b' if os.path.exists(path) else 'w+b') as file:
                file.seek((n % 5) << 18)
                file.write(bytes([n % 251]) * (1 << 18))
                file.flush()
                os.fsync(file.fileno())
        disk = hashlib.sha256(open(path, 'rb').read()).hexdigest() if os.path.exists(path) else ''
        said = f'{os.getpid()} {hashlib.sha256(memory).hexdigest()} {disk}\n'.encode()
        self.send_response(200)
        self.send_header('content-length', str(len(said)))
        self.end_headers()
        self.wfile.write(said)
    def log_message(self, *_):
        pass
http.server.HTTPServer(('127.0.0.1', 9000), Handler).serve_forever()
"#;

async fn canary(platform: &Platform, id: &str, path: &str) -> String {
    let (code, said) = platform.shell(id, &format!("curl -sS --max-time 20 http://127.0.0.1:9000/{path}")).await;
    assert_eq!(code, 0, "{said}");
    said
}

async fn turn(platform: &Platform, id: &str, verb: &str) -> (StatusCode, Value) {
    platform.call(Method::POST, &format!("/v1/sandboxes/{id}/{verb}?wait_sec=60"), None).await
}

/// The state in which nothing but itself tells two guests apart.
async fn identity(platform: &Platform, id: &str) -> [String; 3] {
    let script = "cat /etc/machine-id /proc/sys/kernel/random/uuid; head -c 16 /dev/urandom | od -An -tx1";
    let said = platform.shell(id, script).await.1;
    let parts: Vec<String> = said.lines().map(str::to_owned).collect();
    parts.try_into().unwrap_or_else(|_| panic!("{said:?}"))
}

/// A bit that turns on the disk while the sandbox is paused: it stays paused, untouched, and not an instruction of it runs.
#[tokio::test(flavor = "multi_thread")]
async fn a_saved_state_with_a_turned_bit_is_refused_and_stays() {
    let _beside = MACHINE.read().await;
    let platform = Platform::start();
    let id = platform.create().await;
    let place = |generation: u32| platform.dir.join("pool/sandboxes").join(&id).join(format!("gen-{generation:05}"));
    // The second state shares most of its files with the first one, whose digests it has from there.
    for generation in 1..=2 {
        let script = format!("head -c 4000000 /dev/urandom >/root/kept; echo {generation} >/dev/shm/kept; sync");
        assert_eq!(platform.shell(&id, &script).await.0, 0);
        assert_eq!(turn(&platform, &id, "pause").await.1["status"], "paused");
        whole_machine::wait::until("digests", Duration::from_secs(30), || async {
            place(generation).join("digests").exists().then_some(())
        })
        .await;
        for (file, marked) in [("memory", memory_in_use as fn(&Path) -> u64), ("disk", changed_disk)] {
            let path = place(generation).join(file);
            let at = marked(&path);
            flip(&path, at);
            let (_, answer) = turn(&platform, &id, "resume").await;
            let sandbox = platform.get(&id).await;
            assert_eq!(sandbox["status"], "paused", "{file}: {answer}");
            assert!(sandbox["reason"].as_str().is_some_and(|reason| reason.contains("damaged")), "{sandbox}");
            assert_eq!(objects::microvms(&platform.tag()), Vec::<i32>::new());
            flip(&path, at);
        }
        assert_eq!(turn(&platform, &id, "resume").await.1["status"], "running");
        assert_eq!(platform.shell(&id, "cat /dev/shm/kept").await, (0, format!("{generation}\n")));
    }
    assert_eq!(platform.finish(), Default::default());
}

/// In the middle of what the guest's memory holds.
fn memory_in_use(path: &Path) -> u64 {
    let data = data_of(path);
    data[data.len() / 2]
}

/// In what the disk holds and its template's does not.
fn changed_disk(path: &Path) -> u64 {
    let disk = std::fs::File::open(path).unwrap();
    let size = disk.metadata().unwrap().len();
    let images = std::fs::read_dir(path.ancestors().nth(4).unwrap().join("images")).unwrap().flatten();
    let base = images.map(|entry| entry.path()).find(|base| base.metadata().unwrap().len() == size);
    let base = std::fs::File::open(base.expect("the disk's base")).unwrap();
    let read = |file: &std::fs::File, at: u64| {
        use std::os::unix::fs::FileExt as _;
        let mut page = [0; 4096];
        file.read_exact_at(&mut page, at).unwrap();
        page
    };
    let mut pages = (0..size / 4096).map(|page| page * 4096);
    pages.rfind(|at| read(&disk, *at) != read(&base, *at)).expect("the guest has written to its disk")
}

/// Where data begins, in steps of a page.
fn data_of(path: &Path) -> Vec<u64> {
    let content = std::fs::read(path).unwrap();
    let pages = content.chunks(4096).enumerate().filter(|(_, page)| page.iter().any(|byte| *byte != 0));
    pages.map(|(at, _)| at as u64 * 4096).collect()
}

fn flip(path: &Path, at: u64) {
    use std::os::unix::fs::FileExt as _;
    let file = std::fs::File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1], at).unwrap();
    file.sync_all().unwrap();
}

async fn generations(count: u32) {
    let platform = Platform::start();
    let before = platform.objects();
    let id = platform.create().await;
    platform
        .shell(
            &id,
            &format!("cat >/root/canary.py <<'X'\n{CANARY}X\nsetsid python3 /root/canary.py >/root/canary.log 2>&1 &"),
        )
        .await;
    whole_machine::wait::until("the canary", Duration::from_secs(30), || async {
        let (code, _) = platform.shell(&id, "curl -s http://127.0.0.1:9000/hash").await;
        (code == 0).then_some(())
    })
    .await;
    let mut incarnations = vec![platform.get(&id).await["incarnation"].clone()];
    let mut identities = vec![identity(&platform, &id).await];
    let (mut pauses, mut resumes) = (Vec::new(), Vec::new());
    for n in 1..=count {
        let expected = canary(&platform, &id, &format!("step/{n}")).await;

        let began = Instant::now();
        let (status, paused) = turn(&platform, &id, "pause").await;
        pauses.push(began.elapsed().as_millis());
        assert_eq!((status.as_u16(), paused["status"].as_str()), (200, Some("paused")), "generation {n}: {paused}");

        // It costs no memory and nothing in the kernel, and does nothing.
        assert!(objects::microvms(&platform.tag()).is_empty());
        let left = platform.objects();
        let kept: Vec<_> = left.iter().filter(|(kind, n)| **n > before.get(*kind).copied().unwrap_or(0)).collect();
        assert_eq!(kept, [(&"sandbox_dirs", &1)], "generation {n}");
        if n == 1 {
            let (status, refused) = platform
                .call(Method::POST, &format!("/v1/sandboxes/{id}/exec"), Some(serde_json::json!({"cmd": "true"})))
                .await;
            assert_eq!((status.as_u16(), refused["error"]["code"].as_str()), (409, Some("invalid_state")), "{refused}");
            let (status, again) = turn(&platform, &id, "pause").await;
            assert_eq!((status.as_u16(), again["status"].as_str()), (200, Some("paused")), "{again}");
        }
        if n == 2 {
            // Whoever dies meanwhile: it is paused.
            platform.kill_9("wrenn-agent");
            platform.kill_9("wrenn-cp");
            platform.wait_ready().await;
            assert_eq!(platform.get(&id).await["status"], "paused");
        }

        let began = Instant::now();
        let (status, running) = turn(&platform, &id, "resume").await;
        resumes.push(began.elapsed().as_millis());
        assert_eq!((status.as_u16(), running["status"].as_str()), (200, Some("running")), "generation {n}: {running}");
        assert_eq!(canary(&platform, &id, "hash").await, expected, "generation {n}: pid, memory and disk");
        // The time is the present one, though the guest has slept.
        let said = platform.shell(&id, "date +%s.%N").await.1;
        let there: f64 = said.trim().parse().unwrap_or_else(|e| panic!("{said:?}: {e}"));
        let here = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs_f64();
        assert!((here - there).abs() < 1.0, "generation {n}: the guest's clock is {:.3} s behind", here - there);
        incarnations.push(running["incarnation"].clone());
        identities.push(identity(&platform, &id).await);
    }
    let differ = |all: &[String]| all.iter().collect::<std::collections::BTreeSet<_>>().len() == all.len();
    assert!(differ(&incarnations.iter().map(ToString::to_string).collect::<Vec<_>>()), "{incarnations:?}");
    for part in 0..3 {
        let all: Vec<_> = identities.iter().map(|identity| identity[part].clone()).collect();
        assert!(differ(&all), "{all:?}");
    }
    println!("milliseconds of pauses {pauses:?}, of resumes {resumes:?}");
    platform.kill(&id).await;
    platform.expect_objects(&before).await;
    assert_eq!(platform.finish(), Default::default());
}

/// Pauses and resumes while everything is under way that a client may have under way, and asks at once afterwards.
async fn cycles(count: u32) {
    let platform = Platform::start();
    let before = platform.objects();
    let id = platform.create().await;
    let mut bare = Vec::new();
    let mut answers = Vec::new();
    for n in 1..=count {
        // Commands and a terminal whose output flows, an upload and a download that are not over, connections that are kept, and one whose
        // peer says nothing.
        let guest = platform.guest(&id);
        let mut streams = Vec::new();
        for script in ["while :; do echo x; sleep 0.1; done", "exec sleep 1000", "cat /dev/zero | tr '\\0' y"] {
            let mut stream = guest.client.start_process("/bin/sh", &["-c", script]).await;
            stream.pid().await;
            streams.push(stream);
        }
        let terminal = serde_json::json!({"process": {"cmd": "/bin/sh"}, "pty": {"size": {"rows": 24, "cols": 80}}});
        let mut stream = guest.client.stream(testkit::envd::START, &[], terminal).await;
        stream.pid().await;
        streams.push(stream);
        let idle = futures::future::join_all((0..3).map(|_| guest.client.connection())).await;
        let half_open = guest.way.connect().unwrap();
        std::io::Write::write_all(
            &mut (&half_open),
            b"POST /files?path=/tmp/up HTTP/1.1\r\nHost: x\r\nContent-Length: 99999\r\n",
        )
        .unwrap();
        let command = serde_json::json!({"cmd": "/bin/sleep", "args": ["1000"]});
        let path = format!("/v1/sandboxes/{id}/exec");
        let command = platform.call(Method::POST, &path, Some(command));
        let pausing = async {
            tokio::time::sleep(Duration::from_millis(100)).await;
            turn(&platform, &id, "pause").await
        };
        let (ended, (status, paused)) = tokio::join!(tokio::time::timeout(Duration::from_secs(20), command), pausing);
        assert_eq!((status.as_u16(), paused["status"].as_str()), (200, Some("paused")), "cycle {n}: {paused}");
        // A command that waits for its end hears that there will be none.
        let (status, ended) =
            ended.unwrap_or_else(|_| panic!("cycle {n}: a command waits for a sandbox that is paused"));
        assert!(status.is_client_error() || status.is_server_error(), "cycle {n}: {status} {ended}");

        let began = Instant::now();
        let (status, running) = turn(&platform, &id, "resume").await;
        bare.push(began.elapsed());
        assert_eq!((status.as_u16(), running["status"].as_str()), (200, Some("running")), "cycle {n}: {running}");
        let began = Instant::now();
        assert_eq!(platform.shell(&id, "echo back").await, (0, "back\n".to_owned()), "cycle {n}");
        answers.push(began.elapsed());
        drop((streams, idle, half_open));
        platform.shell(&id, "pkill -f 'sleep 0.1|sleep 1000|tr .0'; true").await;
    }
    println!("resumes {bare:?}, the first answers after them {answers:?}");
    // A machine that is busy restores slowly, too.
    let limit = Duration::from_secs(2) + bare.iter().max().copied().unwrap_or_default();
    assert!(answers.iter().all(|took| *took < limit), "{answers:?}, resumes {bare:?}");
    platform.kill(&id).await;
    platform.expect_objects(&before).await;
    assert_eq!(platform.finish(), Default::default());
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_cycles_with_everything_under_way_answer_at_once() {
    let _alone = MACHINE.write().await;
    cycles(10).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes minutes: make check-long"]
async fn a_hundred_cycles_with_everything_under_way_answer_at_once() {
    let _alone = MACHINE.write().await;
    cycles(100).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn twenty_generations_keep_memory_disk_and_processes() {
    let _beside = MACHINE.read().await;
    generations(20).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes minutes: make check-long"]
async fn a_hundred_generations_keep_memory_disk_and_processes() {
    let _beside = MACHINE.read().await;
    generations(100).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sandbox_whose_time_is_over_is_paused_and_has_time_again_when_it_is_resumed() {
    let _beside = MACHINE.read().await;
    let platform = Platform::start();
    let made = platform.wrenn(&["sandbox", "create", "--timeout", "3", "--on-timeout", "pause", "--memory", "256"]);
    assert!(made.status.success(), "{made:?}");
    let id = String::from_utf8(made.stdout).unwrap().trim().to_owned();
    assert_eq!(platform.shell(&id, "echo kept >/dev/shm/kept").await.0, 0);
    let began = Instant::now();
    for _ in 0..2 {
        platform.wait_status(&id, "paused", Duration::from_secs(60)).await;
        // Paused it stays so, however long.
        tokio::time::sleep(Duration::from_secs(4)).await;
        assert_eq!(platform.get(&id).await["status"], "paused");
        assert!(platform.wrenn(&["sandbox", "resume", &id]).status.success());
    }
    // Another time while it runs.
    assert!(platform.wrenn(&["sandbox", "timeout", &id, "0"]).status.success());
    assert!(began.elapsed() > Duration::from_secs(8), "{:?}", began.elapsed());
    assert_eq!(platform.shell(&id, "cat /dev/shm/kept").await, (0, "kept\n".to_owned()));
    assert_eq!(platform.get(&id).await["on_timeout"], "pause");
    tokio::time::sleep(Duration::from_secs(4)).await;
    let sandbox = platform.get(&id).await;
    assert_eq!((&sandbox["status"], &sandbox["expires_at"]), (&Value::from("running"), &Value::Null));
    platform.kill(&id).await;
}

/// Guests are asked every ten seconds, so this is about the shortest that can be told from them.
const IDLE_SEC: u64 = 15;

#[tokio::test(flavor = "multi_thread")]
async fn what_is_idle_is_paused_and_what_works_or_is_used_is_not() {
    let _beside = MACHINE.read().await;
    let env = [("WRENN_TEST_IDLE_TIMEOUT_MIN_SEC".to_owned(), "1".to_owned())].into();
    let options = Options { env, pool_mib: Some(16_384), ..Options::default() };
    let platform = Arc::new(Platform::start_with(&options));
    let body = json!({"template": "minimal", "memory_mb": 256, "idle_timeout_sec": IDLE_SEC, "on_timeout": "pause"});
    let created: Vec<String> = futures::future::join_all((0..4).map(|_| platform.create_with(body.clone()))).await;
    let [idle, computing, called, pinged] = created.try_into().unwrap();

    // Left in the background: no call is open for it.
    let computes = "nohup sh -c 'while :; do :; done' >/dev/null 2>&1 & echo begun";
    assert_eq!(platform.shell(&computing, computes).await, (0, "begun\n".to_owned()));
    let open = tokio::spawn({
        let (platform, called) = (platform.clone(), called.clone());
        let command = json!({"cmd": "/bin/sleep", "args": ["1000"], "timeout_sec": 170});
        async move { platform.call(Method::POST, &format!("/v1/sandboxes/{called}/exec"), Some(command)).await }
    });
    let pings = tokio::spawn({
        let (platform, pinged) = (platform.clone(), pinged.clone());
        async move {
            loop {
                let ping = platform.call(Method::POST, &format!("/v1/sandboxes/{pinged}/ping"), None).await;
                assert_eq!(ping, (StatusCode::NO_CONTENT, Value::Null));
                tokio::time::sleep(Duration::from_secs(4)).await;
            }
        }
    });
    assert_eq!(platform.shell(&idle, "echo kept >/dev/shm/kept; exec sleep 1").await.0, 0);

    let began = Instant::now();
    platform.wait_status(&idle, "paused", Duration::from_secs(90)).await;
    let took = began.elapsed();
    assert!(took > Duration::from_secs(IDLE_SEC), "{took:?}");
    println!("paused {took:?} after its last use");
    // The others would be by then, too.
    tokio::time::sleep(Duration::from_secs(IDLE_SEC)).await;
    for (what, id) in [("computing", &computing), ("called", &called), ("pinged", &pinged)] {
        let sandbox = platform.get(id).await;
        assert_eq!(sandbox["status"], "running", "{what}: {sandbox}");
    }
    assert!(!open.is_finished() && !pings.is_finished());

    // It has its time again, and what is not used or does not work any more has an end.
    let (status, running) = turn(&platform, &idle, "resume").await;
    let resumed = Instant::now();
    assert_eq!((status.as_u16(), running["status"].as_str()), (200, Some("running")), "{running}");
    assert_eq!(platform.shell(&idle, "cat /dev/shm/kept").await, (0, "kept\n".to_owned()));
    platform.shell(&computing, "pkill -f while").await;
    pings.abort();
    open.abort();
    let limit = Duration::from_secs(90);
    for id in [&idle, &computing, &pinged] {
        platform.wait_status(id, "paused", limit).await;
    }
    assert!(resumed.elapsed() > Duration::from_secs(IDLE_SEC), "{:?}", resumed.elapsed());
    let timeline = platform.call(Method::GET, &format!("/v1/sandboxes/{idle}/timeline"), None).await.1;
    let kinds: Vec<_> = timeline.as_array().unwrap().iter().map(|entry| entry["kind"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["create", "pause", "resume", "pause"], "{timeline}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_pool_leaves_a_sandbox_running() {
    let _beside = MACHINE.read().await;
    let platform = Platform::start_with(&Options { pool_mib: Some(2560), ..Options::default() });
    let id = platform.create().await;
    let filler = platform.dir.join("pool/filler");
    let status = std::process::Command::new("sh")
        .args(["-c", "fallocate -l $(( $(df --output=avail -B1 \"$1\" | tail -1) - (16 << 20) )) \"$1/filler\"", "sh"])
        .arg(platform.dir.join("pool"))
        .status();
    assert!(status.is_ok_and(|status| status.success()));

    let (status, refused) = turn(&platform, &id, "pause").await;

    assert_eq!((status.as_u16(), refused["error"]["code"].as_str()), (507, Some("insufficient_storage")), "{refused}");
    assert!(refused["error"]["message"].as_str().is_some_and(|message| message.contains("disk")), "{refused}");
    let sandbox = platform.get(&id).await;
    assert_eq!(sandbox["status"], "running", "{sandbox}");
    assert!(sandbox["reason"].as_str().is_some_and(|reason| reason.contains("disk")), "{sandbox}");
    assert_eq!(platform.shell(&id, "echo on").await, (0, "on\n".to_owned()));
    std::fs::remove_file(filler).unwrap();
    let (status, paused) = turn(&platform, &id, "pause").await;
    assert_eq!((status.as_u16(), paused["status"].as_str()), (200, Some("paused")), "{paused}");
    // By the CLI, and in vain for what there is not.
    let output = platform.wrenn(&["sandbox", "resume", &id]);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(platform.shell(&id, "echo back").await, (0, "back\n".to_owned()));
    assert!(platform.wrenn(&["sandbox", "pause", &id]).status.success());
    assert!(!platform.wrenn(&["sandbox", "pause", "sb0000000000000000000000"]).status.success());
    platform.kill(&id).await;
    let (status, gone) = turn(&platform, &id, "resume").await;
    assert_eq!((status.as_u16(), gone["error"]["code"].as_str()), (409, Some("invalid_state")), "{gone}");
    assert_eq!(platform.finish(), Default::default());
}

/// Clients that leave in the middle, and many wishes at once: the last one stands and the sandbox is whole.
#[tokio::test(flavor = "multi_thread")]
async fn wishes_back_and_forth_end_in_the_last_one() {
    let _beside = MACHINE.read().await;
    let platform = Platform::start();
    let id = platform.create().await;
    platform.shell(&id, "echo kept >/dev/shm/kept").await;
    for round in 0..6u64 {
        for verb in ["pause", "resume", "pause", "resume"] {
            let url = format!("{}/v1/sandboxes/{id}/{verb}?wait_sec=60", platform.api);
            let request = platform.http.post(url).header("X-API-Key", &platform.api_key).send();
            // Its client leaves before the answer.
            let _ = tokio::time::timeout(Duration::from_millis(40 * round), request).await;
        }
        // What was on its way has arrived by then.
        tokio::time::sleep(Duration::from_millis(300)).await;
        let (status, answer) = turn(&platform, &id, "resume").await;
        assert_eq!(status, 200, "round {round}: {answer}");
        platform.wait_status(&id, "running", Duration::from_secs(30)).await;
        assert_eq!(platform.shell(&id, "cat /dev/shm/kept").await, (0, "kept\n".to_owned()), "round {round}");
    }
    // A kill wins over both.
    let path = format!("/v1/sandboxes/{id}/pause?wait_sec=0");
    assert_eq!(platform.call(Method::POST, &path, None).await.0, 202);
    platform.kill(&id).await;
    assert_eq!(platform.finish(), Default::default());
}
