//! A pool that is full at the k-th block that a step writes, for every k: what runs goes on running or is paused, never neither; what was
//! paused stays so; and once there is room again the same wish comes true.
//!
//! The pool is a small file system in memory, of which all but k pages are taken.

mod stage;

use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use host_agent::sandbox::state::View;
use host_agent::sandbox::{Sandboxes, WishError};
use model::ids::SandboxId;
use model::sandbox::Observed;
use stage::{Stage, create, forked, id, kill, pause, snapshot, snapshot_id, soon};

/// More than any step writes.
const PAGES_MAX: u64 = 16;
const PAGE: usize = 4096;

#[test]
fn fake_envd() {
    stage::fake_envd();
}

/// A file system with few pages, unmounted at the end.
struct SmallPool {
    at: PathBuf,
}

impl SmallPool {
    fn mount(at: &Path) -> Self {
        std::fs::create_dir_all(at).unwrap();
        let mounted =
            Command::new("mount").args(["-t", "tmpfs", "-o", "size=2m,mode=700", "small-pool"]).arg(at).status();
        assert!(mounted.unwrap().success(), "this test mounts a file system: it needs root");
        Self { at: at.to_owned() }
    }

    /// Leaves so many pages.
    fn fill(&self, pages: u64) {
        let mut file = File::create(self.at.join("filler")).unwrap();
        while file.write_all(&[1; PAGE]).is_ok() {}
        let length = file.metadata().unwrap().len();
        file.set_len(length / PAGE as u64 * PAGE as u64 - pages * PAGE as u64).unwrap();
    }

    fn empty(&self) {
        std::fs::remove_file(self.at.join("filler")).unwrap();
    }
}

impl Drop for SmallPool {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.at).status();
    }
}

/// What is so when nothing is under way any more.
async fn settled(sandboxes: &Sandboxes, name: &SandboxId) -> View {
    let end = soon();
    loop {
        let view = sandboxes.get(name).await.unwrap().unwrap().view;
        if view.settled {
            return view;
        }
        assert!(tokio::time::Instant::now() < end, "{view:?}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pool_that_is_full_at_any_write_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let pool = SmallPool::mount(&dir.path().join("pool"));
    let stage = Stage::new(dir.path());
    let sandboxes = stage.agent().await;
    let (mut refused, mut done) = ([0; 4], [0; 4]);
    for pages in 0..=PAGES_MAX {
        let name = id(u128::from(pages) + 1);
        let mut revision = 1;
        let mut next = || {
            revision += 1;
            revision
        };
        let mut count = |what: usize, is_done: bool| if is_done { done[what] += 1 } else { refused[what] += 1 };

        // A create: it runs, or there is nothing of it but the word that it failed.
        pool.fill(pages);
        let created = sandboxes.ensure_running(&name, stage::fence(1), stage::spec(), soon()).await;
        let runs = matches!(&created, Ok(view) if view.observed == Observed::Running);
        count(0, runs);
        pool.empty();
        if !runs {
            assert!(matches!(&created, Ok(view) if view.observed == Observed::Failed), "{pages}: {created:?}");
            assert_eq!(create(&sandboxes, &name, next()).await.observed, Observed::Running, "{pages}");
        }

        // A snapshot: it is there, or nothing of it is, and the sandbox runs either way.
        let wanted = snapshot_id(u128::from(pages) + 1);
        pool.fill(pages);
        let taken = snapshot(&sandboxes, &name, wanted).await;
        count(1, taken.is_ok());
        pool.empty();
        let view = settled(&sandboxes, &name).await;
        assert_eq!(view.observed, Observed::Running, "{pages}: {}", view.reason);
        if let Err(error) = taken {
            assert!(matches!(error, WishError::NotSaved(_)), "{pages}: {error}");
            assert_eq!(std::fs::read_dir(dir.path().join("pool/snapshots")).unwrap().count(), 0, "{pages}: {error}");
            snapshot(&sandboxes, &name, wanted).await.unwrap();
        }

        // A pause: it is paused or it runs.
        pool.fill(pages);
        let view = pause(&sandboxes, &name, next()).await;
        count(2, view.observed == Observed::Paused);
        pool.empty();
        if view.observed != Observed::Paused {
            assert_eq!(view.observed, Observed::Running, "{pages}: {}", view.reason);
            sandboxes.guest(&name).unwrap().health(Duration::from_secs(1)).await.unwrap();
            assert_eq!(pause(&sandboxes, &name, next()).await.observed, Observed::Paused, "{pages}");
        }

        // A resume: it runs or it stays paused.
        pool.fill(pages);
        let view = create(&sandboxes, &name, next()).await;
        count(3, view.observed == Observed::Running);
        pool.empty();
        if view.observed != Observed::Running {
            assert_eq!(view.observed, Observed::Paused, "{pages}: {}", view.reason);
            assert_eq!(create(&sandboxes, &name, next()).await.observed, Observed::Running, "{pages}");
        }

        // What was kept can be begun with, and a kill and a removal make room on a pool that has none.
        let child = id(u128::from(pages) + 100);
        let view = sandboxes.ensure_running(&child, stage::fence(1), forked(wanted), soon()).await.unwrap();
        assert_eq!(view.observed, Observed::Running, "{pages}: {}", view.reason);
        pool.fill(0);
        assert_eq!(kill(&sandboxes, &child, 2).await.observed, Observed::Killed, "{pages}");
        assert_eq!(kill(&sandboxes, &name, next()).await.observed, Observed::Killed, "{pages}");
        sandboxes.remove_snapshot(wanted).await.unwrap();
        pool.empty();
        assert_eq!(stage.leftovers(), Vec::<String>::new(), "{pages}");
    }
    // Each of them met a full pool, and with enough pages none.
    assert!(refused.iter().chain(&done).all(|times| *times > 0), "{refused:?} {done:?}");
    sandboxes.stop(Duration::from_secs(5)).await;
}
