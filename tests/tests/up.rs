//! `wrenn up` as a supervisor: what dies comes back where it was, and its own death costs no sandbox.

use std::time::Duration;

use whole_machine::platform::{Options, Platform};
use whole_machine::wait;

const HEALED: Duration = Duration::from_secs(60);

#[tokio::test(flavor = "multi_thread")]
async fn kill_9_of_up_costs_no_sandbox_and_the_next_one_finds_everything() {
    let mut platform = Platform::start();
    let id = platform.create().await;
    platform.shell(&id, "echo kept > /root/kept").await;
    let incarnation = platform.get(&id).await["incarnation"].clone();
    let (host, key) = (platform.host_id.clone(), platform.api_key.clone());
    platform.kill_up();
    wait::until("the programs to end with it", HEALED, || async {
        (platform.pid_of("wrenn-cp").is_none() && platform.pid_of("wrenn-agent").is_none()).then_some(())
    })
    .await;
    assert_eq!(platform.objects().get("microvms"), Some(&1), "the sandbox goes on");
    platform.restart(&Options::default());
    assert_eq!((&platform.host_id, &platform.api_key), (&host, &key), "the same platform");
    let sandbox = platform.wait_status(&id, "running", HEALED).await;
    assert_eq!(sandbox["incarnation"], incarnation);
    assert_eq!(platform.shell(&id, "cat /root/kept").await, (0, "kept\n".to_owned()));
    platform.kill_up();
    assert_eq!(platform.finish(), Default::default(), "down ends what a killed `up` has left");
}

/// 127.0.0.2 answers only where the program listens on every address, so it stands for the address of a network.
#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_control_plane_listens_where_the_first_one_did() {
    let platform = Platform::start_with(&Options {
        listen: Some("0.0.0.0:0".to_owned()),
        args: vec!["--no-agent".to_owned()],
        ..Options::default()
    });
    let port = platform.api.rsplit_once(':').expect("an address with a port").1;
    let other = format!("http://127.0.0.2:{port}/health");
    assert_eq!(platform.http.get(&other).send().await.unwrap().status(), 200);
    for _ in 0..2 {
        let before = platform.kill_9("wrenn-cp");
        wait::until("another control plane", HEALED, || async {
            let is_new = platform.pid_of("wrenn-cp").is_some_and(|pid| pid != before);
            let answer = platform.http.get(&other).send().await.ok()?;
            (is_new && answer.status() == 200).then_some(())
        })
        .await;
    }
}

#[test]
fn what_cannot_be_is_said_before_anything_is_started() {
    let scratch = tempfile::tempdir().unwrap();
    let (file, elsewhere) = (scratch.path().join("file"), scratch.path().join("elsewhere"));
    std::fs::write(&file, "x").unwrap();
    std::fs::create_dir(&elsewhere).unwrap();
    std::fs::write(elsewhere.join("secret"), "x").unwrap();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = taken.local_addr().unwrap().to_string();
    let text = |path: &std::path::Path| path.to_str().unwrap().to_owned();
    let dir = text(&scratch.path().join("dir"));
    let wrong = [
        (vec!["up", "--dir", &dir, "--listen", "8000"], "--listen"),
        (vec!["up", "--dir", &dir, "--listen", &taken, "--no-agent"], "--listen"),
        (vec!["up", "--dir", file.to_str().unwrap()], "file"),
        (vec!["up", "--dir", &dir, "--artifacts", "/nonexistent-folder"], "nonexistent-folder"),
        (vec!["down", "--dir", "/nonexistent-folder"], "nonexistent-folder"),
        (vec!["down", "--purge", "--dir", elsewhere.to_str().unwrap()], "nothing was done"),
    ];
    for (args, says) in wrong {
        let output = std::process::Command::new(whole_machine::platform::program("wrenn"))
            .args(&args)
            .env_remove("WRENN_DIR")
            .stdin(std::process::Stdio::null())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && said.contains(says) && !said.contains("panicked"), "{args:?}: {said}");
    }
    assert!(elsewhere.join("secret").exists());
    // The one that failed after its database was started has ended it.
    let left = std::process::Command::new(whole_machine::platform::program("wrenn"))
        .args(["down", "--purge", "--dir", &dir])
        .output()
        .unwrap();
    assert!(left.status.success() || !scratch.path().join("dir").exists(), "{}", String::from_utf8_lossy(&left.stderr));
}
