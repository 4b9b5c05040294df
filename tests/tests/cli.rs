//! The command line as people use it: a terminal in a sandbox, files that are fetched in two goes, output and events that are followed.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::process::{Child, Output, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use whole_machine::platform::Platform;
use whole_machine::terminal::Terminal;
use whole_machine::wait;

/// Under emulation, on a busy machine.
const SOON: Duration = Duration::from_secs(60);

fn text(output: &Output) -> String {
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout.clone()).unwrap().trim().to_owned()
}

fn pid(child: &Child) -> Pid {
    Pid::from_raw(i32::try_from(child.id()).unwrap())
}

/// The tag of a shell that was left: behind `--attach` in what was said then.
fn tag_in(shown: &str) -> String {
    let (_, rest) = shown.split_once("--attach ").unwrap_or_else(|| panic!("no tag in {shown:?}"));
    rest.chars().take_while(|c| c.is_ascii_alphanumeric() || *c == '-').collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_terminal_in_a_sandbox() {
    let platform = Platform::start();
    let id = platform.create().await;
    let mut shell = Terminal::run(platform.command(&["shell", &id]), 100, 30);
    let before = shell.settings();
    shell.wait_raw(SOON);
    shell.type_in("echo $((6 * 7))-$TERM\r");
    shell.wait_for("42-", SOON);
    shell.type_in("stty size\r");
    shell.wait_for("30 100", SOON);
    shell.resize(120, 40);
    // The size comes before what is typed after it.
    tokio::time::sleep(Duration::from_millis(300)).await;
    shell.type_in("stty size\r");
    shell.wait_for("40 120", SOON);
    // Ctrl-C is the shell's.
    shell.type_in("sleep 1000\r");
    tokio::time::sleep(Duration::from_secs(1)).await;
    shell.type_in("\u{3}");
    shell.type_in("echo interrupted=$?\r");
    shell.wait_for("interrupted=130", SOON);

    // The control plane dies and is back: the shell is the same one.
    shell.type_in("kept=$((20 + 3)); echo st$((1))ored\r");
    shell.wait_for("st1ored", SOON);
    shell.forget();
    platform.kill_9("wrenn-cp");
    shell.wait_for("connected again", SOON);
    shell.type_in("echo kept=$kept\r");
    shell.wait_for("kept=23", SOON);

    shell.type_in("\u{1d}d");
    assert_eq!(shell.exit_code(SOON), Some(0), "{}", shell.shown());
    assert_eq!(shell.settings().local_flags, before.local_flags);
    platform.wait_ready().await;
    let tag = tag_in(&shell.shown());
    assert!(text(&platform.wrenn(&["sandbox", "ps", &id])).contains(&tag));

    let mut shell = Terminal::run(platform.command(&["shell", &id, "--attach", &tag]), 80, 24);
    shell.wait_for("kept=23", SOON);
    shell.type_in("exit 7\r");
    assert_eq!(shell.exit_code(SOON), Some(7), "{}", shell.shown());

    // From a pipe.
    let mut piped = platform.command(&["shell", &id]);
    let mut piped = piped.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    piped.stdin.take().unwrap().write_all(b"echo $((40 + 4)); exit 3\n").unwrap();
    let output = piped.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stdout).contains("44"), "{output:?}");

    // It is paused under somebody's hands.
    let mut shell = Terminal::run(platform.command(&["shell", &id]), 80, 24);
    shell.wait_raw(SOON);
    shell.type_in("echo $((50 + 5))\r");
    shell.wait_for("55", SOON);
    text(&platform.wrenn(&["sandbox", "pause", &id]));
    assert_eq!(shell.exit_code(SOON), Some(125), "{}", shell.shown());
    let tag = tag_in(&shell.shown());
    text(&platform.wrenn(&["sandbox", "resume", &id]));
    let mut shell = Terminal::run(platform.command(&["shell", &id, "--attach", &tag]), 80, 24);
    shell.wait_for("55", SOON);
    shell.type_in("\u{1d}k");
    assert_eq!(shell.exit_code(SOON), Some(137), "{}", shell.shown());
    platform.kill(&id).await;
    assert_eq!(platform.finish(), Default::default());
}

#[tokio::test(flavor = "multi_thread")]
async fn files_there_and_back() {
    let platform = Platform::start();
    let id = platform.create().await;
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let at = |path: &str| format!("{id}:{path}");
    let wrenn = |arguments: &[&str]| platform.wrenn(arguments);

    // A tree, there and back.
    let tree = dir.path().join("tree");
    std::fs::create_dir_all(tree.join("a/b")).unwrap();
    std::fs::create_dir(tree.join("empty")).unwrap();
    std::fs::write(tree.join("a/b/ü ö"), "deep").unwrap();
    std::fs::write(tree.join("top"), vec![7; 300_000]).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", tree.join("link")).unwrap();
    text(&wrenn(&["files", "put", "-r", tree.to_str().unwrap(), &at("tree")]));
    text(&wrenn(&["files", "mkdir", &at("tree/made/deep")]));
    assert_eq!(wrenn(&["files", "mkdir", &at("tree/made")]).status.code(), Some(1));
    text(&wrenn(&["files", "mkdir", "-p", &at("tree/made")]));
    let back = dir.path().join("back");
    text(&wrenn(&["files", "get", "-r", &at("tree"), back.to_str().unwrap()]));
    assert_eq!(std::fs::read(back.join("a/b/ü ö")).unwrap(), b"deep");
    assert_eq!(std::fs::read(back.join("top")).unwrap(), vec![7; 300_000]);
    assert!(back.join("empty").is_dir() && back.join("made/deep").is_dir() && !back.join("link").exists());

    // Names that would steer a terminal.
    platform.shell(&id, "touch \"$(printf 'tree/ev\\033[2Jil')\"").await;
    let listed = text(&wrenn(&["files", "ls", &at("tree")]));
    assert!(listed.contains("ev\\u{1b}[2Jil") && !listed.contains('\u{1b}'), "{listed}");
    let document: Value =
        serde_json::from_str(&text(&wrenn(&["files", "ls", &at(""), "--depth", "3", "--json"]))).unwrap();
    assert!(
        document["entries"]
            .as_array()
            .unwrap()
            .iter()
            .any(|entry| entry["path"].as_str().is_some_and(|path| path.ends_with("/tree/a/b"))),
        "{document}"
    );

    // One is renamed, one goes; a directory only when that is meant.
    text(&wrenn(&["files", "mv", &at("tree/top"), "tree/a"]));
    assert_eq!(text(&wrenn(&["files", "stat", &at("tree/a/top"), "--json"])).matches("300000").count(), 1);
    assert_eq!(wrenn(&["files", "rm", &at("tree/a")]).status.code(), Some(2));
    text(&wrenn(&["files", "rm", "-r", &at("tree/a")]));
    assert_eq!(wrenn(&["files", "stat", &at("tree/a")]).status.code(), Some(1));
    text(&wrenn(&["files", "rm", "-f", &at("tree/a")]));

    // A large one, in two goes.
    let (_, sum) =
        platform.shell(&id, "head -c 200000000 /dev/urandom >large && sha256sum large | cut -d' ' -f1").await;
    let (large, into) = (dir.path().join("large"), dir.path().to_str().unwrap().to_owned());
    let mut first = platform.command(&["files", "get", &at("large"), &into]);
    let mut first = first.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let part = || {
        let mut entries = std::fs::read_dir(dir.path()).unwrap().flatten();
        entries.find(|entry| entry.file_name().to_string_lossy().starts_with(".wrenn-part-"))
    };
    let came = wait::until("a part of the file", SOON, || async {
        part().map(|part| part.metadata().unwrap().len()).filter(|length| *length > 1 << 20)
    });
    came.await;
    kill(pid(&first), Signal::SIGINT).unwrap();
    assert_eq!(first.wait().unwrap().code(), Some(130));
    let kept = part().expect("what came is kept").metadata().unwrap();
    assert!(kept.len() > 1 << 20 && kept.len() < 200_000_000 && !large.exists(), "{}", kept.len());
    text(&wrenn(&["files", "get", &at("large"), &into]));
    // The very file that the first one began.
    assert_eq!(std::fs::metadata(&large).unwrap().ino(), kept.ino());
    let summed = std::process::Command::new("sha256sum").arg(&large).output().unwrap();
    assert!(String::from_utf8_lossy(&summed.stdout).starts_with(sum.trim()), "{sum}");
    assert!(part().is_none());
    // By standard input and output.
    let mut put = platform.command(&["files", "put", "-", &at("piped")]);
    let mut put = put.stdin(Stdio::piped()).spawn().unwrap();
    put.stdin.take().unwrap().write_all(b"from a pipe").unwrap();
    assert!(put.wait().unwrap().success());
    assert_eq!(wrenn(&["files", "cat", &at("piped")]).stdout, b"from a pipe");
    platform.kill(&id).await;
    assert_eq!(platform.finish(), Default::default());
}

/// Lines of a command that goes on, as they come.
struct Followed {
    child: Child,
    lines: std::sync::mpsc::Receiver<String>,
}

impl Followed {
    fn of(platform: &Platform, arguments: &[&str]) -> Self {
        let mut child = platform.command(arguments).stdout(Stdio::piped()).spawn().unwrap();
        let (tell, lines) = std::sync::mpsc::channel();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        std::thread::spawn(move || stdout.lines().map_while(Result::ok).try_for_each(|line| tell.send(line)));
        Self { child, lines }
    }

    fn wait_for(&self, what: &str, is_it: impl Fn(&str) -> bool) -> String {
        let began = Instant::now();
        let mut heard = Vec::new();
        while began.elapsed() < SOON {
            if let Ok(line) = self.lines.recv_timeout(Duration::from_millis(200)) {
                if is_it(&line) {
                    return line;
                }
                heard.push(line);
            }
        }
        panic!("{what} did not come, but {heard:?}");
    }
}

impl Drop for Followed {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_happens_is_followed() {
    let platform = Platform::start();
    let events = Followed::of(&platform, &["events", "-f", "--json"]);
    // It listens when it hears of the first one; until then others are made.
    let id = text(&platform.wrenn(&["sandbox", "create", "--metadata", "app=web"]));
    let of = |line: &str, event: &str| {
        let heard: Value = serde_json::from_str(line).unwrap();
        heard["event"] == event && heard["resource"]["id"] == id.as_str()
    };
    events.wait_for("the create", |line| of(line, "capsule.create"));

    // Lists, and what they are asked by.
    assert_eq!(text(&platform.wrenn(&["sandbox", "list", "-q", "--metadata", "app=web", "--status", "running"])), id);
    text(&platform.wrenn(&["sandbox", "edit", &id, "--metadata", "app=db", "--metadata", "stage=test"]));
    assert_eq!(text(&platform.wrenn(&["sandbox", "list", "-q", "--metadata", "app=web"])), "");
    assert_eq!(text(&platform.wrenn(&["sandbox", "list", "-q", "--limit", "1", "--metadata", "stage=test"])), id);

    // A process that goes on by itself.
    let script = "i=0; while [ $i -lt 1000 ]; do i=$((i + 1)); echo line-$i; sleep 0.2; done; exit 9";
    let tag = text(&platform.wrenn(&["sandbox", "exec", &id, "-b", "--tag", "counts", "--", "sh", "-c", script]));
    assert_eq!(tag, "counts");
    assert_eq!(
        platform.wrenn(&["sandbox", "exec", &id, "-b", "--tag", "counts", "--", "true"]).status.code(),
        Some(125)
    );
    let mut followed = Followed::of(&platform, &["logs", "-f", &id, "counts"]);
    followed.wait_for("its first line", |line| line == "line-1");
    followed.wait_for("a later one", |line| line == "line-10");
    let kept = text(&platform.wrenn(&["logs", &id, "counts"]));
    assert!(kept.starts_with("line-1\n") && kept.contains("line-10"), "{kept}");
    // The control plane dies: what was missed comes, and each line once.
    platform.kill_9("wrenn-cp");
    let next = |number: u32| followed.wait_for("the next one", |line| line == format!("line-{number}"));
    for number in 11..=40 {
        next(number);
    }
    platform.wait_ready().await;
    text(&platform.wrenn(&["sandbox", "signal", &id, "counts", "--signal", "term"]));
    let ended = wait::until("the end of what is followed", SOON, || {
        let ended = followed.child.try_wait().unwrap();
        async move { ended }
    });
    assert_eq!(ended.await.code(), Some(137));
    assert!(!text(&platform.wrenn(&["sandbox", "ps", &id])).contains("counts"));
    assert!(!text(&platform.wrenn(&["logs", &id])).is_empty(), "the console says something");

    // Events came through all that.
    text(&platform.wrenn(&["sandbox", "pause", &id]));
    events.wait_for("the pause", |line| of(line, "capsule.pause"));
    text(&platform.wrenn(&["sandbox", "kill", &id]));
    events.wait_for("the end", |line| of(line, "capsule.destroy"));
    drop(events);
    let kept: Value = serde_json::from_str(&text(&platform.wrenn(&["events", "--json", "--sandbox", &id]))).unwrap();
    let kinds: Vec<&str> = kept.as_array().unwrap().iter().filter_map(|event| event["event"].as_str()).collect();
    assert!(kinds.contains(&"capsule.create") && kinds.contains(&"sandbox.metadata.changed"), "{kinds:?}");
    assert!(text(&platform.wrenn(&["usage"])).contains("VCPU HOURS"));
    assert!(text(&platform.wrenn(&["sandbox", "stats"])).contains("most in 30 days"));
    assert_eq!(platform.finish(), Default::default());
}
