//! Every crash point of a life: an error there, and the death of the agent there. Nothing may be left behind, what runs goes on running,
//! and what was said to be paused can be resumed.
//!
//! The deaths are those of a child, a copy of this test program, because a crash point's `abort` takes the whole process.

mod stage;

use std::collections::HashSet;
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use host_agent::sandbox::Sandboxes;
use host_agent::sandbox::points::CRASHPOINTS;
use model::sandbox::{Kept, Observed};
use stage::{Stage, create, fence, forked, id, kill, pause_keeping, snapshot, snapshot_id, soon};

/// Of the kill at the end.
const LAST: u64 = 9;
/// Tells the test `life` where to play.
const CHILD: &str = "STAGE_CHILD";
/// In its environment: of what is paused the disk alone is kept.
const DISK_ONLY: &str = "STAGE_DISK_ONLY";

#[test]
fn fake_envd() {
    stage::fake_envd();
}

/// Not a test of its own: what the children do. One sandbox is made, snapshotted, paused, snapshotted, resumed and killed; a second one
/// that ran before is left alone.
#[test]
fn life() {
    let Some(dir) = std::env::var_os(CHILD) else { return };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let stage = Stage::new(Path::new(&dir));
        with_editions(Path::new(&dir));
        let sandboxes = stage.agent().await;
        let view = create(&sandboxes, &id(1), 1).await;
        if view.observed == Observed::Failed {
            // A new wish begins anew.
            assert_eq!(create(&sandboxes, &id(1), 2).await.observed, Observed::Running, "after {}", view.reason);
        }
        if snapshot(&sandboxes, &id(1), snapshot_id(1)).await.is_err() {
            let view = sandboxes.get(&id(1)).await.unwrap().unwrap().view;
            assert_eq!(view.observed, Observed::Running, "a snapshot that does not come about changes nothing");
            snapshot(&sandboxes, &id(1), snapshot_id(1)).await.unwrap();
        }
        let kept = if std::env::var_os(DISK_ONLY).is_some() { Kept::Disk } else { Kept::Memory };
        let view = pause_keeping(kept, &sandboxes, &id(1), 3).await;
        if view.observed != Observed::Paused {
            assert_eq!(view.observed, Observed::Running, "a pause that does not come about leaves it running");
            assert!(!view.reason.is_empty());
            let again = pause_keeping(kept, &sandboxes, &id(1), 4).await;
            assert_eq!(again.observed, Observed::Paused, "after {}", view.reason);
        }
        if snapshot(&sandboxes, &id(1), snapshot_id(2)).await.is_err() {
            let view = sandboxes.get(&id(1)).await.unwrap().unwrap().view;
            assert_eq!(view.observed, Observed::Paused, "a snapshot that does not come about changes nothing");
            snapshot(&sandboxes, &id(1), snapshot_id(2)).await.unwrap();
        }
        let view = create(&sandboxes, &id(1), 5).await;
        if view.observed != Observed::Running {
            assert_eq!(view.observed, Observed::Paused, "a resume that does not come about leaves it paused");
            assert!(!view.reason.is_empty());
            assert_eq!(create(&sandboxes, &id(1), 6).await.observed, Observed::Running, "after {}", view.reason);
        }
        assert_eq!(kill(&sandboxes, &id(1), LAST).await.observed, Observed::Killed);
        remove_snapshots(&sandboxes).await;
        sandboxes.stop(Duration::from_secs(5)).await;
    });
}

async fn remove_snapshots(sandboxes: &Sandboxes) {
    for n in [1, 2] {
        sandboxes.remove_snapshot(snapshot_id(n)).await.unwrap();
    }
}

/// From now on a create that boots leaves the booted state behind, and the next one is restored from it.
fn with_editions(dir: &Path) {
    std::fs::write(dir.join(stage::EDITION), "one").unwrap();
}

/// Plays `life` in a child with these crash points; its signal, if one ended it.
fn play(dir: &Path, points: &str, kept: Kept, list: Option<&Path>) -> Option<i32> {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", "life", "--nocapture", "--test-threads=1"])
        .env_remove("WRENN_CRASHPOINTS_FILE")
        .env("WRENN_CRASHPOINTS", points)
        .env(CHILD, dir)
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    if kept == Kept::Disk {
        command.env(DISK_ONLY, "yes");
    }
    if let Some(list) = list {
        command.env("WRENN_CRASHPOINTS_LIST", list);
    }
    let output = command.output().unwrap();
    assert!(
        output.status.success() || output.status.signal().is_some(),
        "{points}: {}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    output.status.signal()
}

#[test]
fn a_life_reaches_exactly_the_listed_points() {
    let dir = tempfile::tempdir().unwrap();
    let list = dir.path().join("reached");
    assert_eq!(play(&dir.path().join("stage"), "", Kept::Memory, Some(&list)), None);
    let text = std::fs::read_to_string(&list).unwrap();
    // A resume is a create that begins with what was saved: it passes the same points once more.
    let mut seen = HashSet::new();
    let reached: Vec<&str> = text.lines().filter(|point| seen.insert(*point)).collect();
    assert_eq!(reached, CRASHPOINTS);
    assert!(CRASHPOINTS.iter().all(|point| text.lines().filter(|line| line == point).count() == times(point)));
    assert_eq!(CRASHPOINTS.iter().collect::<HashSet<_>>().len(), CRASHPOINTS.len());
}

/// How often a life passes a point.
fn times(point: &str) -> usize {
    if point.starts_with("create.") { 2 } else { 1 }
}

/// Each passing of each point.
fn passings() -> impl Iterator<Item = (&'static str, usize)> {
    CRASHPOINTS.iter().flat_map(|point| (1..=times(point)).map(move |nth| (*point, nth)))
}

/// Those at which it matters what a pause keeps.
fn of_a_pause() -> impl Iterator<Item = (&'static str, usize)> {
    passings().filter(|(point, nth)| match point.split_once('.') {
        Some(("pause" | "park" | "copy", _)) => true,
        Some(("create", _)) => *nth == 2,
        _ => false,
    })
}

#[test]
fn an_error_at_any_point_leaves_nothing() {
    let both =
        passings().map(|passing| (passing, Kept::Memory)).chain(of_a_pause().map(|passing| (passing, Kept::Disk)));
    for ((point, nth), kept) in both {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(play(dir.path(), &format!("{point}={nth}*error"), kept, None), None, "{point} {nth} {kept}");
        assert_eq!(Stage::new(dir.path()).leftovers(), Vec::<String>::new(), "{point} {nth} {kept}");
    }
}

#[test]
fn the_agents_death_at_any_point_leaves_nothing() {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let booted = passings().map(|(point, nth)| (point, nth, false, Kept::Memory));
    // Once more, with a booted state that the neighbour has left behind.
    let restored = passings().filter(|(point, nth)| point.starts_with("create.") && *nth == 1);
    let restored = restored.map(|(point, nth)| (point, nth, true, Kept::Memory));
    let disk_only = of_a_pause().map(|(point, nth)| (point, nth, false, Kept::Disk));
    for (point, nth, is_restored, kept) in booted.chain(restored).chain(disk_only) {
        let dir = tempfile::tempdir().unwrap();
        let stage = Stage::new(dir.path());
        // A neighbour that runs all the time.
        let neighbour = runtime.block_on(async {
            if is_restored {
                with_editions(dir.path());
            }
            let sandboxes = stage.agent().await;
            let view = create(&sandboxes, &id(9), 1).await;
            let booted = || std::fs::read_dir(dir.path().join("pool/templates")).unwrap().flatten().next();
            while is_restored && !booted().is_some_and(|place| place.path().join("gen-00001").exists()) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            sandboxes.stop(Duration::from_secs(5)).await;
            view
        });

        let ended = play(dir.path(), &format!("{point}={nth}*abort"), kept, None);
        assert_eq!(ended, Some(libc::SIGKILL), "{point} {nth}");

        runtime.block_on(async {
            let sandboxes = stage.agent().await;
            settle(&sandboxes, point).await;
            let adopted = sandboxes.get(&id(9)).await.unwrap().unwrap().view;
            assert_eq!(
                (adopted.observed, &adopted.incarnation),
                (Observed::Running, &neighbour.incarnation),
                "{point}"
            );
            let is_half = point.starts_with("create.") && point != "create.commit.after";
            if is_half && nth == 2 || point.starts_with("park.") || point == "pause.seal.after" {
                let found = sandboxes.get(&id(1)).await.unwrap().unwrap().view;
                assert_eq!(found.observed, Observed::Paused, "{point} {nth}: {}", found.reason);
                // Of a resume that was not written down yet nothing was cut off.
                let is_told = is_half && point != "create.reserve.before";
                assert_eq!(found.reason.contains("interrupted"), is_told, "{point}: {}", found.reason);
                // The wish that was cut off, sent again; or a new one.
                let again = create(&sandboxes, &id(1), if is_half { 5 } else { 6 }).await;
                assert_eq!(again.observed, Observed::Running, "{point}: {}", again.reason);
            } else if point.starts_with("snapshot.") || point.starts_with("copy.") {
                // Valid or not there; the same wish, sent again, makes it, and others begin with it.
                let n = if point.starts_with("copy.") { 2 } else { 1 };
                let found = sandboxes.get(&id(1)).await.unwrap().unwrap().view;
                let stays = if n == 2 { Observed::Paused } else { Observed::Running };
                assert_eq!(found.observed, stays, "{point}: {}", found.reason);
                snapshot(&sandboxes, &id(1), snapshot_id(n)).await.unwrap();
                let spec = forked(snapshot_id(n));
                let child = sandboxes.ensure_running(&id(2), fence(1), spec, soon()).await.unwrap();
                assert_eq!(child.observed, Observed::Running, "{point}: {}", child.reason);
                assert_eq!(kill(&sandboxes, &id(2), 2).await.observed, Observed::Killed, "{point}");
            } else if point.starts_with("pause.") {
                let found = sandboxes.get(&id(1)).await.unwrap().unwrap().view;
                assert_eq!(found.observed, Observed::Running, "{point}: {}", found.reason);
                assert_eq!(pause_keeping(kept, &sandboxes, &id(1), 3).await.observed, Observed::Paused, "{point}");
            } else if is_half {
                // Nothing of it is left but the word that it failed; the same wish makes it anew.
                if let Some(found) = sandboxes.get(&id(1)).await.unwrap() {
                    assert_eq!(found.view.observed, Observed::Failed, "{point}");
                    assert!(found.view.reason.contains("interrupted"), "{point}: {}", found.view.reason);
                }
                let again = create(&sandboxes, &id(1), 1).await;
                assert_eq!(again.observed, Observed::Running, "{point}: {}", again.reason);
            }
            assert_eq!(kill(&sandboxes, &id(1), LAST).await.observed, Observed::Killed, "{point}");
            assert_eq!(kill(&sandboxes, &id(9), LAST).await.observed, Observed::Killed, "{point}");
            remove_snapshots(&sandboxes).await;
            sandboxes.stop(Duration::from_secs(5)).await;
        });
        assert_eq!(stage.leftovers(), Vec::<String>::new(), "{point}");
    }
}

/// Waits until everything that was taken up has come to its end.
async fn settle(sandboxes: &Sandboxes, point: &str) {
    let end = soon();
    while sandboxes.list().iter().any(|view| !view.settled) {
        assert!(tokio::time::Instant::now() < end, "{point}: {:?}", sandboxes.list());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
