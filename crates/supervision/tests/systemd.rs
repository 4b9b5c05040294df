//! The words that systemd waits for, heard at the other end of its socket. Environments are a process's, so the speaker is this program
//! once more.

use std::os::unix::net::UnixDatagram;
use std::process::{Command, Stdio};
use std::time::Duration;

const SPEAKER: &str = "SUPERVISION_TEST_SPEAKS";

#[test]
fn systemd_hears_that_it_serves_and_lives() {
    if std::env::var_os(SPEAKER).is_some() {
        return speak();
    }
    let dir = std::env::temp_dir().join(format!("supervision-test-{}", std::process::id()));
    std::fs::create_dir(&dir).unwrap();
    let socket = UnixDatagram::bind(dir.join("notify")).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let mut speaker = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "systemd_hears_that_it_serves_and_lives"])
        .env(SPEAKER, "1")
        .env("NOTIFY_SOCKET", dir.join("notify"))
        .env("WATCHDOG_USEC", "300000")
        .env_remove("WATCHDOG_PID")
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let mut heard = Vec::new();
    while heard.last().is_none_or(|last| last != "STOPPING=1") {
        let mut text = [0; 256];
        let count = socket.recv(&mut text).unwrap();
        heard.push(String::from_utf8_lossy(&text[..count]).trim().to_owned());
    }
    assert!(speaker.wait().unwrap().success());
    std::fs::remove_dir_all(dir).unwrap();
    let [first, alive @ .., _] = &heard[..] else { panic!("{heard:?}") };
    assert_eq!(first, "READY=1");
    assert!(alive.len() >= 2 && alive.iter().all(|word| word == "WATCHDOG=1"), "{heard:?}");
}

fn speak() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    runtime.block_on(async {
        supervision::ready();
        // At once, after 100 and after 200 ms.
        let alive = tokio::time::timeout(Duration::from_millis(250), supervision::keep_alive()).await;
        assert!(alive.is_err(), "it keeps on");
        supervision::ending();
    });
}

#[test]
fn where_nobody_has_asked_nothing_is_said() {
    if std::env::var_os("NOTIFY_SOCKET").is_some() || std::env::var_os("WATCHDOG_USEC").is_some() {
        println!("SKIPPED: a service manager runs this test");
        return;
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    supervision::ready();
    let over =
        runtime.block_on(async { tokio::time::timeout(Duration::from_secs(5), supervision::keep_alive()).await });
    assert!(over.is_ok(), "there is nothing to keep telling");
}
