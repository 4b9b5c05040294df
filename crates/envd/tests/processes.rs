//! `process.Process` from outside: nothing of the output is lost, every process gets its end event, nobody runs as somebody else.

mod guest;

use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use guest::{CONNECT, Envd, START, basic, until};
use serde_json::json;
use tokio::time::timeout;

#[tokio::test]
async fn output_and_exit_codes() {
    let envd = Envd::start();
    let ran = envd.sh("echo out; echo err >&2; exit 7").await;
    assert_eq!((ran.stdout.as_slice(), ran.stderr.as_slice(), ran.exit_code()), (&b"out\n"[..], &b"err\n"[..], 7));
    assert_eq!(ran.end["exited"], true);
    assert_eq!(ran.end["status"], "exit status 7");
    assert_eq!(ran.end["error"], "exit status 7");
    let ran = envd.sh("true").await;
    assert_eq!((ran.exit_code(), &ran.end["error"], ran.error), (0, &json!(null), None));
}

#[tokio::test]
async fn a_thousand_fast_commands_all_end_with_all_their_output() {
    let envd = Envd::start();
    for batch in 0..50 {
        let runs = (0..20).map(|n| {
            let (envd, script) = (&envd, format!("echo {batch}-{n}; echo {n} >&2; exit {n}"));
            async move { (n, envd.sh(&script).await) }
        });
        for (n, ran) in futures::future::join_all(runs).await {
            assert_eq!(ran.text(), format!("{batch}-{n}\n"));
            assert_eq!((ran.stderr, ran.end["exitCode"].as_i64().unwrap_or(0)), (format!("{n}\n").into_bytes(), n));
        }
    }
    assert_eq!(envd.call("/process.Process/List", json!({})).await.unwrap(), json!({}));
    // Ended ones are remembered for a while, but not without bound.
    assert!(envd.resident_kib() < 32 * 1024, "{} KiB", envd.resident_kib());
}

#[tokio::test]
async fn fifty_megabytes_of_every_byte_arrive_in_order() {
    const SIZE: usize = 50_000_000;
    let envd = Envd::start();
    // A counter in each eight bytes: a lost, doubled or moved piece shows.
    let script = format!(
        "import sys,struct\nw=sys.stdout.buffer\nn=0\nwhile n<{SIZE}//8:\n m=min(n+8192,{SIZE}//8)\n w.write(struct.pack('<%dQ'%(m-n),*range(n*2654435761,m*2654435761,2654435761)))\n n=m"
    );
    let mut stream = envd.start_process("python3", &["-c", &script]).await;
    stream.pid().await;
    let ran = stream.outcome().await;
    assert_eq!(ran.stdout.len(), SIZE);
    let wrong =
        ran.stdout.chunks_exact(8).zip(0u64..).position(|(piece, n)| piece != (n * 2_654_435_761).to_le_bytes());
    assert_eq!(wrong, None);
    assert_eq!(ran.exit_code(), 0);
    assert!(envd.resident_kib() < 24 * 1024, "{} KiB", envd.resident_kib());
}

#[tokio::test]
async fn a_slow_client_slows_the_process_and_loses_nothing() {
    let envd = Envd::start();
    let mut stream = envd.start_process("/bin/sh", &["-c", "head -c 20000000 /dev/zero; exit 3"]).await;
    stream.pid().await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(envd.resident_kib() < 24 * 1024, "{} KiB wait for a client that does not read", envd.resident_kib());
    let ran = stream.outcome().await;
    assert_eq!((ran.stdout.len(), ran.exit_code()), (20_000_000, 3));
}

#[tokio::test]
async fn signals_end_whole_groups_and_say_so() {
    let envd = Envd::start();
    for (signal, status) in [("SIGNAL_SIGKILL", "signal: killed"), ("SIGNAL_SIGTERM", "signal: terminated")] {
        let mut stream = envd.start_process("/bin/sh", &["-c", "sleep 1000 & echo $!; wait; sleep 1000"]).await;
        let pid = stream.pid().await;
        let data = stream.event().await;
        let grandchild = STANDARD.decode(data["data"]["stdout"].as_str().unwrap()).unwrap();
        let grandchild = String::from_utf8(grandchild).unwrap().trim().to_owned();
        let asked = json!({"process": {"pid": pid}, "signal": signal});
        envd.call("/process.Process/SendSignal", asked.clone()).await.unwrap();
        let ran = stream.outcome().await;
        assert_eq!((ran.exit_code(), &ran.end["status"]), (-1, &json!(status)));
        assert_ne!(ran.end["exited"], true);
        assert_eq!(envd.call("/process.Process/SendSignal", asked).await, Err("not_found".into()));
        // Collected by whoever adopts orphans here: what counts is that it runs no more.
        until("the grandchild ends", async || {
            std::fs::read_to_string(format!("/proc/{grandchild}/stat")).map_or(true, |stat| stat.contains(") Z "))
        })
        .await;
    }
}

#[tokio::test]
async fn grandchildren_that_hold_or_flood_the_pipes_do_not_delay_the_end() {
    let envd = Envd::start();
    for script in [
        "sleep 30 & echo own; exit 4",
        "setsid sleep 30 & echo own; exit 4",
        "(while :; do echo flood; done) & echo own; exit 4",
    ] {
        let began = Instant::now();
        let mut stream = envd.start_process("/bin/sh", &["-c", &format!("echo $$; {script}")]).await;
        let pid = stream.pid().await;
        let ran = stream.outcome().await;
        assert!(ran.text().contains("own\n"), "{script}");
        assert_eq!(ran.exit_code(), 4, "{script}");
        assert!(began.elapsed() < Duration::from_secs(2), "{script}: {:?}", began.elapsed());
        // SAFETY: the group is that of the script that this test has started; its number cannot be another's while members live.
        unsafe { libc::kill(-i32::try_from(pid).unwrap(), libc::SIGKILL) };
    }
}

#[tokio::test]
async fn what_grandchildren_say_within_the_second_arrives() {
    let envd = Envd::start();
    let ran = envd.sh("(sleep 0.3; echo late; echo late >&2) & echo own; exit 4").await;
    assert_eq!((ran.text(), ran.stderr.as_slice(), ran.exit_code()), ("own\nlate\n", &b"late\n"[..], 4));
    // A client that takes its time is not taken for silence.
    let mut stream = envd.start_process("/bin/sh", &["-c", "(sleep 0.3; echo late) & head -c 3000000 /dev/zero"]).await;
    stream.pid().await;
    tokio::time::sleep(Duration::from_millis(1500)).await;
    let ran = stream.outcome().await;
    assert_eq!((ran.stdout.len(), ran.exit_code()), (3_000_005, 0));
    assert!(ran.stdout.ends_with(b"late\n"));
}

#[tokio::test]
async fn a_terminals_last_words_arrive() {
    let envd = Envd::start();
    for round in 0..20 {
        let asked = json!({"process": {"cmd": "/bin/sh", "args": ["-c", "seq 1 6000; exit 3"]}, "pty": {}});
        let mut stream = envd.stream(START, &[], asked).await;
        stream.pid().await;
        // Time for it to fill all there is to fill.
        tokio::time::sleep(Duration::from_millis(20)).await;
        let ran = stream.outcome().await;
        let expected: String = (1..=6000).map(|n| format!("{n}\r\n")).collect();
        assert!(ran.pty == expected.as_bytes(), "round {round}: {} of {} bytes", ran.pty.len(), expected.len());
        assert_eq!(ran.exit_code(), 3);
    }
}

#[tokio::test]
async fn who_comes_late_hears_what_was_said_and_what_it_missed() {
    let envd = Envd::start();
    let asked = json!({"process": {"cmd": "/bin/sh", "args": ["-c", "echo one; read x; echo two; exit 5"]}});
    let mut stream = envd.stream(START, &[], asked).await;
    let pid = stream.pid().await;
    stream.event().await;
    drop(stream);
    let connect = |from: &'static str| {
        let envd = &envd;
        async move { envd.stream(CONNECT, &[("x-output-from", from)], json!({"process": {"pid": pid}})).await }
    };
    let (all, rest) = (connect("0").await, connect("4").await);
    assert_eq!(
        (all.headers["x-output-from"].as_bytes(), rest.headers["x-output-from"].as_bytes()),
        (&b"0"[..], &b"4"[..])
    );
    let input = json!({"process": {"pid": pid}, "input": {"stdin": STANDARD.encode("\n")}});
    envd.call("/process.Process/SendInput", input).await.unwrap();
    assert_eq!(all.outcome().await.text(), "one\ntwo\n");
    assert_eq!(rest.outcome().await.text(), "two\n");
    // After the end, too.
    for (from, text) in [("0", "one\ntwo\n"), ("4", "two\n"), ("8", ""), ("never", "one\ntwo\n")] {
        let ran = connect(from).await.outcome().await;
        assert_eq!((ran.text(), ran.exit_code()), (text, 5), "{from}");
    }
}

#[tokio::test]
async fn the_callers_time_for_listening_ends_the_stream_alone() {
    let envd = Envd::start();
    let mut first = envd.start_process("/bin/sh", &["-c", "yes"]).await;
    let pid = first.pid().await;
    drop(first);
    let process = json!({"process": {"pid": pid}});
    let ran = envd.stream(CONNECT, &[("connect-timeout-ms", "300")], process.clone()).await.outcome().await;
    assert_eq!((ran.error.as_deref(), ran.stdout.is_empty()), (Some("deadline_exceeded"), false));
    assert_eq!(envd.call("/process.Process/List", json!({})).await.unwrap()["processes"][0]["pid"], pid);
    envd.call("/process.Process/SendSignal", json!({"process": {"pid": pid}, "signal": "SIGNAL_SIGKILL"}))
        .await
        .unwrap();
}

#[tokio::test]
async fn the_callers_time_is_the_commands_life() {
    let envd = Envd::start();
    let began = Instant::now();
    let asked = json!({"process": {"cmd": "/bin/sh", "args": ["-c", "echo early; sleep 60"]}});
    let stream = envd.stream(START, &[("connect-timeout-ms", "300")], asked).await;
    let ran = stream.outcome().await;
    assert_eq!((ran.text(), ran.error.as_deref()), ("early\n", Some("deadline_exceeded")));
    assert!(began.elapsed() < Duration::from_secs(5));
    until("nothing runs", async || envd.call("/process.Process/List", json!({})).await.unwrap() == json!({})).await;
}

#[tokio::test]
async fn a_client_that_leaves_ends_nothing_and_can_come_back() {
    let envd = Envd::start();
    let asked = json!({"process": {"cmd": "/bin/sh", "args": ["-c", "read line; echo got $line; exit 5"]}, "tag": "t"});
    let mut stream = envd.stream(START, &[], asked).await;
    let pid = stream.pid().await;
    drop(stream);
    let listed = envd.call("/process.Process/List", json!({})).await.unwrap();
    assert_eq!((&listed["processes"][0]["pid"], &listed["processes"][0]["tag"]), (&json!(pid), &json!("t")));
    let again = envd.stream(CONNECT, &[], json!({"process": {"tag": "t"}})).await;
    let input = json!({"process": {"pid": pid}, "input": {"stdin": STANDARD.encode("hello\n")}});
    envd.call("/process.Process/SendInput", input).await.unwrap();
    let ran = again.outcome().await;
    assert_eq!((ran.text(), ran.exit_code(), ran.pid), ("got hello\n", 5, pid));
    // Late comers hear how it ended.
    for selector in [json!({"tag": "t"}), json!({"pid": pid})] {
        let ran = envd.stream(CONNECT, &[], json!({"process": selector})).await.outcome().await;
        assert_eq!((ran.exit_code(), ran.pid), (5, pid));
    }
}

#[tokio::test]
async fn clients_that_vanish_leave_their_places() {
    let envd = Envd::start();
    let mut first = envd.start_process("sleep", &["1000"]).await;
    let pid = first.pid().await;
    // More than envd takes at once.
    for _ in 0..12 {
        let streams = (0..50).map(|_| async {
            let mut stream = envd.stream(CONNECT, &[], json!({"process": {"pid": pid}})).await;
            assert_eq!(stream.pid().await, pid);
        });
        futures::future::join_all(streams).await;
    }
    envd.call("/process.Process/SendSignal", json!({"process": {"pid": pid}, "signal": "SIGNAL_SIGKILL"}))
        .await
        .unwrap();
    assert_eq!(first.outcome().await.end["status"], "signal: killed");
}

#[tokio::test]
async fn input_can_be_closed_and_then_takes_no_more() {
    let envd = Envd::start();
    let mut stream = envd.stream(START, &[], json!({"process": {"cmd": "cat"}, "stdin": true})).await;
    let pid = stream.pid().await;
    let process = json!({"pid": pid});
    let input = json!({"process": process, "input": {"stdin": STANDARD.encode([0, 255, 10])}});
    envd.call("/process.Process/SendInput", input.clone()).await.unwrap();
    for _ in 0..2 {
        // Until cat is gone closing again is fine.
        let closed = envd.call("/process.Process/CloseStdin", json!({"process": process})).await;
        assert!(closed.is_ok() || closed == Err("not_found".into()), "{closed:?}");
    }
    let ran = stream.outcome().await;
    assert_eq!((ran.stdout.as_slice(), ran.exit_code()), (&[0, 255, 10][..], 0));
    assert_eq!(envd.call("/process.Process/SendInput", input).await, Err("not_found".into()));
}

#[tokio::test]
async fn input_of_a_caller_that_left_is_whole_and_close_waits_for_it() {
    let envd = Envd::start();
    // Reads nothing before it is told to, by a file that appears.
    let dir = tempfile::tempdir().unwrap();
    let go = dir.path().join("go");
    let script = format!("while [ ! -e {} ]; do sleep 0.02; done; wc -c", go.display());
    let asked = json!({"process": {"cmd": "/bin/sh", "args": ["-c", script]}, "stdin": true});
    let mut stream = envd.stream(START, &[], asked).await;
    let pid = stream.pid().await;
    let process = json!({"pid": pid});
    let large = json!({"process": process, "input": {"stdin": STANDARD.encode(vec![b'x'; 1_000_000])}});
    // Given up by its caller when the pipe has taken a part.
    let given_up = tokio::time::timeout(Duration::from_millis(300), envd.call("/process.Process/SendInput", large));
    assert!(given_up.await.is_err());
    let close = envd.call("/process.Process/CloseStdin", json!({"process": process}));
    let (closed, ()) = tokio::join!(close, async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        std::fs::write(&go, "").unwrap();
    });
    closed.unwrap();
    assert_eq!(stream.outcome().await.text().trim(), "1000000");
}

#[tokio::test]
async fn a_terminal_has_a_size_and_takes_input() {
    let envd = Envd::start();
    let asked = json!({"process": {"cmd": "/bin/sh", "args": ["-c", "stty size; tty >/dev/null && read x; stty size; echo $x $TERM"]},
        "pty": {"size": {"cols": 100, "rows": 30}}});
    let mut stream = envd.stream(START, &[], asked).await;
    let pid = stream.pid().await;
    let first = stream.event().await;
    assert_eq!(STANDARD.decode(first["data"]["pty"].as_str().unwrap()).unwrap(), b"30 100\r\n");
    let size = json!({"process": {"pid": pid}, "pty": {"size": {"cols": 70000, "rows": 5}}});
    envd.call("/process.Process/Update", size).await.unwrap();
    let input = json!({"process": {"pid": pid}, "input": {"pty": STANDARD.encode("hey\n")}});
    envd.call("/process.Process/SendInput", input).await.unwrap();
    let ran = stream.outcome().await;
    let text = String::from_utf8(ran.pty).unwrap();
    assert!(text.contains("5 1000\r\n") && text.ends_with("hey xterm-256color\r\n"), "{text:?}");
    assert_eq!(ran.end["exited"], true);
}

#[tokio::test]
async fn users_are_who_they_say_or_nobody() {
    let envd = Envd::start();
    let script = json!({"process": {"cmd": "/bin/sh", "args": ["-c", "id -u; id -G; echo $USER; cat /proc/self/oom_score_adj"]}});
    let as_nobody = basic("nobody");
    let ran = envd.stream(START, &[("authorization", &as_nobody)], script.clone()).await.outcome().await;
    assert_eq!(ran.text(), "65534\n65534\nnobody\n100\n");
    // A terminal is the user's own, so that it can be opened by name.
    let asked = json!({"process": {"cmd": "/bin/sh", "args": ["-c", "echo said >$(tty)"]}, "pty": {}});
    let ran = envd.stream(START, &[("authorization", &as_nobody)], asked).await.outcome().await;
    assert_eq!(String::from_utf8_lossy(&ran.pty), "said\r\n");
    // A directory is entered as the user.
    let closed = tempfile::tempdir().unwrap();
    std::fs::set_permissions(closed.path(), std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
    let asked = json!({"process": {"cmd": "true", "cwd": closed.path().to_str().unwrap()}});
    let ran = envd.stream(START, &[("authorization", &as_nobody)], asked).await.outcome().await;
    assert_eq!(ran.error.as_deref(), Some("permission_denied"));
    for unknown in ["nosuchuser", "4294967295", "root/../x"] {
        let ran = envd.stream(START, &[("authorization", &basic(unknown))], script.clone()).await.outcome().await;
        assert_eq!((ran.error.as_deref(), ran.stdout.len()), (Some("unauthenticated"), 0), "{unknown}");
    }
}

#[tokio::test]
async fn what_envd_ignores_its_processes_do_not() {
    let script = format!("trap '' HUP INT QUIT TERM; exec {} --standalone --port 0", env!("CARGO_BIN_EXE_envd"));
    let envd = Envd::start_by(std::process::Command::new("sh").args(["-c", &script]));
    for pty in [json!(null), json!({})] {
        let asked = json!({"process": {"cmd": "grep", "args": ["SigIgn", "/proc/self/status"]}, "pty": pty});
        let ran = envd.stream(START, &[], asked).await.outcome().await;
        let said = String::from_utf8([ran.stdout, ran.pty].concat()).unwrap();
        let ignored = u64::from_str_radix(said.trim().trim_start_matches("SigIgn:\t"), 16).unwrap();
        // The two that follow are the C library's own.
        assert_eq!(ignored & 0x7fff_ffff, 0, "{said}");
    }
}

#[tokio::test]
async fn what_cannot_be_started_says_why() {
    let envd = Envd::start();
    for (process, code) in [
        (json!({"cmd": ""}), "invalid_argument"),
        (json!({"cmd": "a\0b"}), "invalid_argument"),
        (json!({"cmd": "true", "args": ["a\0b"]}), "invalid_argument"),
        (json!({"cmd": "true", "cwd": "/no/such/place"}), "invalid_argument"),
        (json!({"cmd": "true", "cwd": "/etc/passwd"}), "invalid_argument"),
        (json!({"cmd": "true", "envs": {"A=B": "c"}}), "invalid_argument"),
        (json!({"cmd": "true", "envs": {"": "c"}}), "invalid_argument"),
        (json!({"cmd": "/no/such/program"}), "not_found"),
        (json!({"cmd": "no-such-program"}), "not_found"),
        (json!({"cmd": "/etc"}), "failed_precondition"),
        (json!({"cmd": "/etc/passwd"}), "failed_precondition"),
    ] {
        let ran = envd.stream(START, &[], json!({"process": process})).await.outcome().await;
        assert_eq!(ran.error.as_deref(), Some(code), "{process}");
    }
    let ran = envd.stream(START, &[], json!({})).await.outcome().await;
    assert_eq!(ran.error.as_deref(), Some("invalid_argument"));
}

#[tokio::test]
async fn selectors_reach_only_what_envd_has_started() {
    let envd = Envd::start();
    let own = u64::from(std::process::id());
    for pid in [0, 1, own, 4_294_967_295] {
        let process = json!({"pid": pid});
        for (method, message) in [
            ("SendSignal", json!({"process": process, "signal": "SIGNAL_SIGKILL"})),
            ("SendInput", json!({"process": process, "input": {"stdin": ""}})),
            ("CloseStdin", json!({"process": process})),
            ("Update", json!({"process": process})),
        ] {
            let answer = envd.call(&format!("/process.Process/{method}"), message).await;
            assert_eq!(answer, Err("not_found".into()), "{method} {pid}");
        }
        let ran = envd.stream(CONNECT, &[], json!({"process": process})).await.outcome().await;
        assert_eq!(ran.error.as_deref(), Some("not_found"));
    }
    let neither = envd.call("/process.Process/SendSignal", json!({"signal": "SIGNAL_SIGKILL"})).await;
    assert_eq!(neither, Err("invalid_argument".into()));
}

#[tokio::test]
async fn silence_is_filled_with_keepalives() {
    let envd = Envd::start();
    let asked = json!({"process": {"cmd": "sleep", "args": ["1.5"]}});
    let mut stream = envd.stream(START, &[("keepalive-ping-interval", "1")], asked).await;
    stream.pid().await;
    assert!(stream.event().await["keepalive"].is_object());
    assert_eq!(stream.outcome().await.exit_code(), 0);
}

#[tokio::test]
async fn a_process_that_is_traced_when_it_ends_holds_up_nobody() {
    if !nix::unistd::geteuid().is_root() {
        return eprintln!("skipped: only root may trace what is not its own child");
    }
    let envd = Envd::start();
    let mut stream = envd.start_process("sleep", &["1000"]).await;
    let pid = stream.pid().await;
    let traced = i32::try_from(pid).unwrap();
    let (begin, begun) = std::sync::mpsc::channel();
    let (let_go, held) = std::sync::mpsc::channel::<()>();
    let tracer = std::thread::spawn(move || {
        // SAFETY: plain system calls; the tracee is the process that was just started.
        let seized = unsafe { libc::ptrace(libc::PTRACE_SEIZE, traced, 0, 0) };
        begin.send(seized).unwrap();
        held.recv().unwrap();
        // SAFETY: as above; its status is not wanted.
        unsafe { libc::waitpid(traced, std::ptr::null_mut(), libc::__WALL) }
    });
    assert_eq!(begun.recv().unwrap(), 0);
    let kill = json!({"process": {"pid": pid}, "signal": "SIGNAL_SIGKILL"});
    envd.call("/process.Process/SendSignal", kill).await.unwrap();
    for _ in 0..5 {
        assert_eq!(envd.sh("echo on").await.text(), "on\n");
    }
    let_go.send(()).unwrap();
    assert_eq!(stream.outcome().await.end["status"], "signal: killed");
    assert_eq!(tracer.join().unwrap(), traced);
}

/// A file system whose server never answers: who enters it waits until it is taken away.
struct HungMount {
    at: tempfile::TempDir,
    _server: std::fs::File,
}

impl HungMount {
    fn new() -> Result<Self, String> {
        use std::os::fd::AsRawFd as _;
        let server = std::fs::File::options().read(true).write(true).open("/dev/fuse").map_err(|e| e.to_string())?;
        let at = tempfile::tempdir().unwrap();
        let options = format!("fd={},rootmode=40755,user_id=0,group_id=0", server.as_raw_fd());
        nix::mount::mount(Some("hung"), at.path(), Some("fuse"), nix::mount::MsFlags::empty(), Some(options.as_str()))
            .map_err(|e| format!("mount FUSE: {e}"))?;
        Ok(Self { at, _server: server })
    }
}

impl Drop for HungMount {
    fn drop(&mut self) {
        nix::mount::umount2(self.at.path(), nix::mount::MntFlags::MNT_FORCE | nix::mount::MntFlags::MNT_DETACH)
            .unwrap();
    }
}

#[tokio::test]
async fn a_mount_that_hangs_holds_up_nobody_else() {
    let hung = match HungMount::new() {
        Ok(hung) => hung,
        Err(why) => return eprintln!("skipped: {why}"),
    };
    let envd = Envd::start();
    let path = hung.at.path().to_str().unwrap();
    let hanging = async {
        let process = json!({"process": {"cmd": "true", "cwd": format!("{path}/x")}});
        let began = Instant::now();
        let ran = envd.stream(START, &[], process).await.outcome().await;
        assert_eq!(ran.error.as_deref(), Some("unavailable"));
        began.elapsed()
    };
    let others = async {
        let looking = envd.call("/filesystem.Filesystem/ListDir", json!({"path": path}));
        assert!(timeout(Duration::from_millis(500), looking).await.is_err(), "it does not hang");
        for n in 0..20 {
            let began = Instant::now();
            let ran = envd.sh(&format!("exit {n}")).await;
            assert_eq!(ran.exit_code(), n);
            assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
            assert_eq!(envd.exchange("GET", "/metrics", &[], "").await.0, 200);
        }
    };
    let (given_up, ()) = tokio::join!(hanging, others);
    assert!(given_up < Duration::from_secs(15), "{given_up:?}");
}
