//! Create, kill, adoption, failure and the fences, with processes in place of microVMs.

mod stage;

use std::time::Duration;

use host_agent::sandbox::WishError;
use host_agent::sandbox::fence::Refusal;
use host_agent::sandbox::state::Spec;
use model::sandbox::{Kept, Observed};
use stage::{Stage, create, fence, forked, id, kill, pause, pause_keeping, snapshot, snapshot_id, soon, spec};

#[test]
fn fake_envd() {
    stage::fake_envd();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sandbox_lives_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let stage = Stage::new(dir.path());
    let sandboxes = stage.agent().await;

    let view = create(&sandboxes, &id(1), 1).await;

    assert_eq!(view.observed, Observed::Running);
    assert_eq!(view.envd_version, "test");
    let names: Vec<_> = view.steps.iter().map(|(name, _)| *name).collect();
    assert_eq!(
        names,
        ["reserve", "network", "cgroup", "disk", "memory", "start", "microvm", "health", "template", "init", "commit"]
    );
    assert!(sandboxes.guest(&id(1)).is_ok());
    // Sent again, it is the same one.
    assert_eq!(create(&sandboxes, &id(1), 1).await.incarnation, view.incarnation);

    let view = kill(&sandboxes, &id(1), 2).await;

    assert_eq!(view.observed, Observed::Killed);
    assert_eq!(stage.leftovers(), Vec::<String>::new());
    assert_eq!(kill(&sandboxes, &id(1), 2).await.observed, Observed::Killed);
    assert_eq!(sandboxes.get(&id(1)).await.unwrap().unwrap().view.observed, Observed::Killed);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_sandbox_never_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let stage = Stage::new(dir.path());
    let sandboxes = stage.agent().await;
    // A kill that overtakes its create.
    assert_eq!(kill(&sandboxes, &id(1), 2).await.observed, Observed::Killed);
    let late = sandboxes.ensure_running(&id(1), fence(1), spec(), soon()).await;
    assert!(matches!(late, Err(WishError::Refused(Refusal::Stale { .. }))), "{late:?}");
    // Also after a restart, and for a newer revision.
    let sandboxes = stage.agent().await;
    assert_eq!(create(&sandboxes, &id(1), 3).await.observed, Observed::Killed);
    assert_eq!(stage.leftovers(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn older_epochs_and_revisions_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let stage = Stage::new(dir.path());
    let sandboxes = stage.agent().await;
    create(&sandboxes, &id(1), 5).await;
    let old = sandboxes.ensure_killed(&id(1), fence(4), soon()).await;
    assert!(matches!(old, Err(WishError::Refused(Refusal::Stale { .. }))), "{old:?}");
    sandboxes.see_epoch(7);
    let old = sandboxes.ensure_killed(&id(1), fence(6), soon()).await;
    assert!(matches!(old, Err(WishError::StaleEpoch { epoch: 1, seen: 7 })), "{old:?}");
    let mut now = fence(6);
    now.epoch = 7;
    sandboxes.ensure_killed(&id(1), now, soon()).await.unwrap();
    assert_eq!(stage.leftovers(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_adopts_what_runs() {
    let dir = tempfile::tempdir().unwrap();
    let stage = Stage::new(dir.path());
    let first = stage.agent().await;
    let before = create(&first, &id(1), 1).await;
    first.stop(Duration::from_secs(5)).await;
    drop(first);

    let second = stage.agent().await;

    let after = second.get(&id(1)).await.unwrap().unwrap().view;
    assert_eq!(after.observed, Observed::Running);
    assert_eq!((after.incarnation, after.envd_version), (before.incarnation, before.envd_version));
    second.guest(&id(1)).unwrap().health(Duration::from_secs(1)).await.unwrap();
    kill(&second, &id(1), 2).await;
    assert_eq!(stage.leftovers(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_microvm_that_ends_fails_its_sandbox_alone() {
    let dir = tempfile::tempdir().unwrap();
    let stage = Stage::new(dir.path());
    let sandboxes = stage.agent().await;
    create(&sandboxes, &id(1), 1).await;
    let other = create(&sandboxes, &id(2), 1).await;
    let tag = sandboxes.context().tag.clone();
    let uid = tag.uid(1);
    host_agent::sweep::sweep(uid).unwrap();

    let view = wait(&sandboxes, 1, |view| view.observed == Observed::Failed && view.settled).await;

    assert!(view.reason.contains("ended"), "{}", view.reason);
    assert!(sandboxes.guest(&id(1)).is_err());
    assert_eq!(sandboxes.get(&id(2)).await.unwrap().unwrap().view, other);
    // What a customer may want back is still there; what costs the host is not.
    let directory = dir.path().join("pool/sandboxes").join(id(1).as_str());
    assert!(directory.join("disk").exists());
    assert!(!directory.join("memory").exists());
    assert!(!dir.path().join("slots/1").exists());
    // It ran: no wish makes a fresh guest under the same id.
    assert_eq!(create(&sandboxes, &id(1), 2).await.observed, Observed::Failed);
    kill(&sandboxes, &id(1), 3).await;
    kill(&sandboxes, &id(2), 3).await;
    assert_eq!(stage.leftovers(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_that_leaves_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let stage = Stage::new(dir.path());
    let sandboxes = stage.agent().await;
    // Held in the middle, else it might be over before anybody looks.
    let hold = dir.path().join(stage::SLOW_BASE);
    std::fs::write(&hold, "").unwrap();
    let call = sandboxes.clone();
    let task = tokio::spawn(async move { create(&call, &id(1), 1).await });
    wait(&sandboxes, 1, |view| view.observed == Observed::Starting).await;
    task.abort();
    std::fs::remove_file(hold).unwrap();
    wait(&sandboxes, 1, |view| view.observed == Observed::Running).await;
    kill(&sandboxes, &id(1), 2).await;
    assert_eq!(stage.leftovers(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_in_the_middle_of_a_create_wins() {
    let dir = tempfile::tempdir().unwrap();
    let stage = Stage::new(dir.path());
    let sandboxes = stage.agent().await;
    for n in 1..=10 {
        let call = sandboxes.clone();
        let create = tokio::spawn(async move { call.ensure_running(&id(n), fence(1), spec(), soon()).await });
        tokio::task::yield_now().await;
        let view = kill(&sandboxes, &id(n), 2).await;
        assert_eq!(view.observed, Observed::Killed);
        // Whatever the create's caller hears, it is not that it runs.
        match create.await.unwrap() {
            Ok(view) => assert_ne!(view.observed, Observed::Running),
            Err(error) => assert!(matches!(error, WishError::Refused(_)), "{error}"),
        }
    }
    assert_eq!(stage.leftovers(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_does_not_wait_for_a_base() {
    let dir = tempfile::tempdir().unwrap();
    let stage = Stage::new(dir.path());
    let sandboxes = stage.agent().await;
    std::fs::write(dir.path().join(stage::SLOW_BASE), "").unwrap();
    let call = sandboxes.clone();
    let create = tokio::spawn(async move { call.ensure_running(&id(1), fence(1), spec(), soon()).await });
    // The cgroup is the step before.
    let cgroup = dir.path().join("cgroups").join(id(1).as_str());
    while !cgroup.exists() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(kill(&sandboxes, &id(1), 2).await.observed, Observed::Killed);
    assert_ne!(create.await.unwrap().unwrap().observed, Observed::Running);
    assert_eq!(stage.leftovers(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sandbox_whose_task_died_is_not_absent() {
    let dir = tempfile::tempdir().unwrap();
    let stage = Stage::new(dir.path());
    let sandboxes = stage.agent().await;
    create(&sandboxes, &id(1), 1).await;
    let uids = sandboxes.uids();
    let bomb = dir.path().join(stage::BOMB);
    std::fs::write(&bomb, "").unwrap();
    // The task dies while it takes the sandbox down.
    let _ = sandboxes.ensure_killed(&id(1), fence(2), soon()).await;
    for _ in 0..20 {
        assert_eq!(sandboxes.list().len(), 1);
        assert_eq!(sandboxes.uids(), uids);
        assert!(sandboxes.get(&id(1)).await.unwrap().is_some());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let meanwhile = sandboxes.ensure_killed(&id(1), fence(3), soon()).await;
    assert!(matches!(meanwhile, Err(WishError::Restarting)), "{meanwhile:?}");
    std::fs::remove_file(&bomb).unwrap();
    wait(&sandboxes, 1, |view| view.observed == Observed::Killed).await;
    assert_eq!(stage.leftovers(), Vec::<String>::new());
}

/// Taking down is begun anew by a newer wish, a death of the task, or the next agent: what it ends again must be its own.
#[tokio::test(flavor = "multi_thread")]
async fn a_slot_is_nobody_elses_before_its_sandbox_is_down() {
    for newer_wish in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let stage = Stage::new(dir.path());
        let sandboxes = stage.agent().await;
        create(&sandboxes, &id(1), 1).await;
        // The network is released before the cgroup.
        let bomb = dir.path().join(stage::BOMB);
        std::fs::write(&bomb, "").unwrap();
        let _ = sandboxes.ensure_paused(&id(1), fence(2), Kept::Memory, soon()).await;
        while dir.path().join("slots/1").exists() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let other = create(&sandboxes, &id(2), 1).await;
        std::fs::remove_file(&bomb).unwrap();
        let observed = if newer_wish {
            while let Err(WishError::Restarting) = sandboxes.ensure_killed(&id(1), fence(3), soon()).await {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            Observed::Killed
        } else {
            Observed::Paused
        };
        wait(&sandboxes, 1, |view| view.observed == observed).await;
        // Time to hear of an end.
        tokio::time::sleep(Duration::from_millis(300)).await;
        let after = sandboxes.get(&id(2)).await.unwrap().unwrap().view;
        assert_eq!((after.observed, &after.process), (Observed::Running, &other.process));
        kill(&sandboxes, &id(2), 2).await;
        if !newer_wish {
            kill(&sandboxes, &id(1), 3).await;
        }
        assert_eq!(stage.leftovers(), Vec::<String>::new());
        // Its number is free again.
        create(&sandboxes, &id(3), 1).await;
        assert!(dir.path().join("slots/1").exists());
        kill(&sandboxes, &id(3), 2).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_runs_without_a_readable_journal_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let stage = Stage::new(dir.path());
    let first = stage.agent().await;
    create(&first, &id(1), 1).await;
    let uid = first.context().tag.uid(1);
    first.stop(Duration::from_secs(5)).await;
    drop(first);
    let directory = dir.path().join("pool/sandboxes").join(id(1).as_str());
    std::fs::write(directory.join("state.json"), "{\"format\":1,").unwrap();
    // As the real ground makes it.
    std::os::unix::fs::chown(directory.join("disk"), Some(uid), Some(uid)).unwrap();

    for _ in 0..2 {
        let second = stage.agent().await;

        assert!(second.list().is_empty());
        assert_eq!(second.set_aside().await.unwrap(), [uid].into());
        assert_eq!(host_agent::sweep::living(uid..=uid).unwrap(), [uid].into());
    }
    host_agent::sweep::sweep(uid).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_paused_sandbox_has_its_saved_state_alone_and_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let stage = Stage::new(dir.path());
    let mut sandboxes = stage.agent().await;
    let directory = dir.path().join("pool/sandboxes").join(id(1).as_str());
    let mut before = create(&sandboxes, &id(1), 1).await;
    for round in 1..=3 {
        // What the guest would have written.
        std::fs::write(directory.join("disk"), format!("disk {round}")).unwrap();
        std::fs::write(directory.join("memory"), format!("memory {round}")).unwrap();
        let view = pause(&sandboxes, &id(1), 2 * round).await;
        assert_eq!((view.observed, view.reason.as_str()), (Observed::Paused, ""));
        let steps: Vec<_> = view.steps.iter().map(|(name, _)| *name).collect();
        assert_eq!(steps, ["begin", "quiet", "save", "stopped", "seal"]);
        // Sent again, it is the same.
        assert_eq!(pause(&sandboxes, &id(1), 2 * round).await.observed, Observed::Paused);
        assert!(sandboxes.guest(&id(1)).is_err());
        assert_eq!(stage.leftovers(), [format!("pool/sandboxes/{}", id(1))]);
        let entries = std::fs::read_dir(&directory).unwrap().map(|entry| entry.unwrap().file_name());
        let mut names: Vec<_> = entries.map(|name| name.into_string().unwrap()).collect();
        names.retain(|name| !name.starts_with("console"));
        names.sort();
        assert_eq!(names, [format!("gen-{round:05}"), "state.json".to_owned()]);
        // The next agent knows it too.
        sandboxes.stop(Duration::from_secs(5)).await;
        sandboxes = stage.agent().await;
        assert_eq!(sandboxes.get(&id(1)).await.unwrap().unwrap().view.observed, Observed::Paused);

        let view = create(&sandboxes, &id(1), 2 * round + 1).await;
        assert_eq!((view.observed, view.reason.as_str()), (Observed::Running, ""));
        assert_ne!(view.incarnation, before.incarnation);
        assert_eq!(std::fs::read_to_string(directory.join("disk")).unwrap(), format!("disk {round}"));
        assert_eq!(std::fs::read_to_string(directory.join("memory")).unwrap(), format!("memory {round}"));
        sandboxes.guest(&id(1)).unwrap().health(Duration::from_secs(1)).await.unwrap();
        before = view;
    }
    kill(&sandboxes, &id(1), 8).await;
    assert_eq!(stage.leftovers(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn of_a_disk_alone_a_sandbox_boots_and_what_is_not_flushed_is_not_paused() {
    let dir = tempfile::tempdir().unwrap();
    let stage = Stage::new(dir.path());
    let sandboxes = stage.agent().await;
    create(&sandboxes, &id(1), 1).await;
    // Not its first state: a copy of it has another number.
    assert_eq!(pause(&sandboxes, &id(1), 2).await.kept, Some(Kept::Memory));
    let before = create(&sandboxes, &id(1), 3).await;
    let directory = dir.path().join("pool/sandboxes").join(id(1).as_str());
    std::fs::write(directory.join("disk"), "written").unwrap();
    std::fs::write(directory.join("memory"), "thought").unwrap();

    // With its memory it could be paused; without, what it has not flushed would be lost.
    std::fs::write(dir.path().join(stage::UNFLUSHED), "").unwrap();
    let view = pause_keeping(Kept::Disk, &sandboxes, &id(1), 4).await;
    assert_eq!((view.observed, &view.incarnation), (Observed::Running, &before.incarnation));
    assert!(view.reason.contains("disk"), "{}", view.reason);
    std::fs::remove_file(dir.path().join(stage::UNFLUSHED)).unwrap();

    let view = pause_keeping(Kept::Disk, &sandboxes, &id(1), 5).await;
    assert_eq!((view.observed, view.reason.as_str(), view.kept), (Observed::Paused, "", Some(Kept::Disk)));
    let state = directory.join("gen-00002");
    let end = soon();
    while !state.join("digests").exists() {
        assert!(tokio::time::Instant::now() < end, "nobody makes digests");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let files = || {
        let entries = std::fs::read_dir(&state).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        entries.filter(|name| name != "digests").collect::<std::collections::BTreeSet<_>>()
    };
    assert_eq!(files(), ["disk", "manifest"].map(str::to_owned).into());
    // The other kind of pause, wished now, changes nothing of what is there.
    let view = pause(&sandboxes, &id(1), 6).await;
    assert_eq!((view.observed, view.kept), (Observed::Paused, Some(Kept::Disk)));
    assert_eq!(files().len(), 2);
    snapshot(&sandboxes, &id(1), snapshot_id(1)).await.unwrap();
    sandboxes.stop(Duration::from_secs(5)).await;
    let sandboxes = stage.agent().await;
    assert_eq!(sandboxes.get(&id(1)).await.unwrap().unwrap().view.kept, Some(Kept::Disk));
    // A manifest that is damaged is no reason to take its disk for one without memory; nor is a turned bit booted.
    for (revision, file) in [(7, "manifest"), (8, "disk")] {
        let whole = std::fs::read(state.join(file)).unwrap();
        std::fs::write(state.join(file), &whole[1..]).unwrap();
        let view = create(&sandboxes, &id(1), revision).await;
        assert_eq!(view.observed, Observed::Paused, "{file}");
        assert!(view.reason.contains("damaged"), "{file}: {}", view.reason);
        std::fs::write(state.join(file), whole).unwrap();
    }

    for (n, spec, revision) in [(1, spec(), 9), (2, forked(snapshot_id(1)), 1)] {
        let view = sandboxes.ensure_running(&id(n), fence(revision), spec, soon()).await.unwrap();
        assert_eq!((view.observed, view.reason.as_str()), (Observed::Running, ""));
        let place = dir.path().join("pool/sandboxes").join(id(n).as_str());
        let content = |file: &str| std::fs::read_to_string(place.join(file)).unwrap();
        assert_eq!((content("disk").as_str(), content("memory").as_str()), ("written", "memory"), "it was booted");
        // It can be saved in both ways again.
        assert_eq!(pause(&sandboxes, &id(n), revision + 1).await.observed, Observed::Paused);
        let again = sandboxes.ensure_running(&id(n), fence(revision + 2), view_spec(n), soon()).await.unwrap();
        assert_eq!((again.observed, again.reason.as_str()), (Observed::Running, ""));
        assert_eq!(pause_keeping(Kept::Disk, &sandboxes, &id(n), revision + 3).await.observed, Observed::Paused);
        kill(&sandboxes, &id(n), revision + 4).await;
    }
    sandboxes.remove_snapshot(snapshot_id(1)).await.unwrap();
    assert_eq!(stage.leftovers(), Vec::<String>::new());
}

/// Of the sandboxes of the test above.
fn view_spec(n: u128) -> Spec {
    if n == 1 { spec() } else { forked(snapshot_id(1)) }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_saved_state_that_cannot_be_loaded_stays_what_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let stage = Stage::new(dir.path());
    let sandboxes = stage.agent().await;
    create(&sandboxes, &id(1), 1).await;
    pause(&sandboxes, &id(1), 2).await;
    let state = dir.path().join("pool/sandboxes").join(id(1).as_str()).join("gen-00001");
    let end = soon();
    while !state.join("digests").exists() {
        assert!(tokio::time::Instant::now() < end, "nobody makes digests");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let mut revision = 3;
    for file in ["device", "memory"] {
        let whole = std::fs::read(state.join(file)).unwrap();
        let mut turned = whole.clone();
        *turned.last_mut().unwrap() ^= 1;
        std::fs::write(state.join(file), turned).unwrap();

        let view = create(&sandboxes, &id(1), revision).await;

        assert_eq!(view.observed, Observed::Paused, "{file}");
        assert!(view.reason.contains("damaged"), "{}", view.reason);
        assert_eq!(stage.leftovers(), [format!("pool/sandboxes/{}", id(1))]);
        // The same wish is not tried again; a new one is.
        assert_eq!(create(&sandboxes, &id(1), revision).await.observed, Observed::Paused);
        std::fs::write(state.join(file), whole).unwrap();
        revision += 1;
    }
    assert_eq!(create(&sandboxes, &id(1), revision).await.observed, Observed::Running);
    kill(&sandboxes, &id(1), revision + 1).await;
    assert_eq!(stage.leftovers(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_create_of_its_kind_boots_and_the_next_ones_are_restored() {
    let dir = tempfile::tempdir().unwrap();
    let stage = Stage::new(dir.path());
    std::fs::write(dir.path().join(stage::EDITION), "one").unwrap();
    let sandboxes = stage.agent().await;
    let templates = dir.path().join("pool/templates");
    let kept = || -> Vec<_> {
        let places = std::fs::read_dir(&templates).unwrap().map(|entry| entry.unwrap().path());
        places.map(|place| place.join("gen-00001")).filter(|sealed| sealed.exists()).collect()
    };
    let until_kept = async |count: usize| {
        let end = soon();
        while kept().len() != count {
            assert!(tokio::time::Instant::now() < end, "{:?}", kept());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let is_restored = |n: u128| {
        let state = dir.path().join("pool/sandboxes").join(id(n).as_str()).join("state.json");
        let state: serde_json::Value = serde_json::from_slice(&std::fs::read(state).unwrap()).unwrap();
        state["record"]["phase"]["run"]["template_generation"].is_string()
    };
    // Two at once: one of them leaves the state behind, both run.
    let [first, second] = futures::future::join_all([1, 2].map(|n| {
        let sandboxes = sandboxes.clone();
        async move { create(&sandboxes, &id(n), 1).await }
    }))
    .await
    .try_into()
    .unwrap();
    assert_eq!([first.observed, second.observed], [Observed::Running; 2], "{} {}", first.reason, second.reason);
    assert!(!is_restored(1) && !is_restored(2));
    until_kept(1).await;

    // Who is restored is somebody of its own, and can be paused and resumed like any other; another agent knows the state too.
    assert_eq!(create(&sandboxes, &id(3), 1).await.observed, Observed::Running);
    assert!(is_restored(3));
    sandboxes.guest(&id(3)).unwrap().health(Duration::from_secs(1)).await.unwrap();
    assert_eq!(pause(&sandboxes, &id(3), 2).await.observed, Observed::Paused);
    sandboxes.stop(Duration::from_secs(5)).await;
    let sandboxes = stage.agent().await;
    assert_eq!(create(&sandboxes, &id(3), 3).await.observed, Observed::Running);
    let other = Spec { memory_mib: 512, ..spec() };
    let view = sandboxes.ensure_running(&id(4), fence(1), other, soon()).await.unwrap();
    assert_eq!(view.observed, Observed::Running);
    assert!(!is_restored(4), "of another shape");
    until_kept(2).await;

    // What is of no use any more costs a boot and nothing else.
    for place in kept() {
        std::fs::write(place.join("device"), "other").unwrap();
    }
    // Its end may still be under way when the boot is over: then it is the next one that leaves a state behind.
    let mut others = Vec::new();
    for n in 5.. {
        assert_eq!(create(&sandboxes, &id(n), 1).await.observed, Observed::Running);
        assert!(!is_restored(n));
        others.push(n);
        let kept_by_it = tokio::time::timeout(Duration::from_secs(2), until_kept(2)).await;
        if kept_by_it.is_ok() {
            break;
        }
        assert!(n < 9, "none of them is kept: {:?}", kept());
    }
    std::fs::write(dir.path().join(stage::EDITION), "two").unwrap();
    assert_eq!(create(&sandboxes, &id(20), 1).await.observed, Observed::Running);
    assert!(!is_restored(20), "the template was published anew");
    until_kept(3).await;
    for n in (1..=4).chain(others).chain([20]) {
        kill(&sandboxes, &id(n), 9).await;
    }
    assert_eq!(stage.leftovers(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn wishes_to_pause_are_taken_as_late_as_they_come() {
    let dir = tempfile::tempdir().unwrap();
    let stage = Stage::new(dir.path());
    let sandboxes = stage.agent().await;
    let unknown = sandboxes.ensure_paused(&id(1), fence(1), Kept::Memory, soon()).await;
    assert!(matches!(unknown, Err(WishError::UnknownSandbox)), "{unknown:?}");
    // In the middle of the create: it runs first.
    let hold = dir.path().join(stage::SLOW_BASE);
    std::fs::write(&hold, "").unwrap();
    let call = sandboxes.clone();
    let creating = tokio::spawn(async move { call.ensure_running(&id(1), fence(1), spec(), soon()).await });
    wait(&sandboxes, 1, |view| view.observed == Observed::Starting).await;
    let call = sandboxes.clone();
    let pausing = tokio::spawn(async move { pause(&call, &id(1), 2).await });
    wait(&sandboxes, 1, |view| view.fence.revision == 2).await;
    std::fs::remove_file(hold).unwrap();
    assert_eq!(pausing.await.unwrap().observed, Observed::Paused);
    creating.await.unwrap().unwrap();
    let old = sandboxes.ensure_paused(&id(1), fence(1), Kept::Memory, soon()).await;
    assert!(matches!(old, Err(WishError::Refused(Refusal::Stale { .. }))), "{old:?}");
    // Back and forth without waiting: the last wish stands.
    let revisions = 3..40;
    let wishes = revisions.clone().map(|revision| {
        let sandboxes = sandboxes.clone();
        tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis(3 * revision)).await;
            if revision % 2 == 0 {
                sandboxes.ensure_paused(&id(1), fence(revision), Kept::Memory, soon()).await
            } else {
                sandboxes.ensure_running(&id(1), fence(revision), spec(), soon()).await
            }
        })
    });
    for wish in futures::future::join_all(wishes).await {
        match wish.unwrap() {
            Ok(_) | Err(WishError::Refused(Refusal::Stale { .. }) | WishError::Busy) => {}
            Err(error) => panic!("{error}"),
        }
    }
    let view = wait(&sandboxes, 1, |view| view.settled && view.fence.revision == 39).await;
    assert_eq!(view.observed, Observed::Running, "{}", view.reason);
    // A kill wins over a pause, too.
    let call = sandboxes.clone();
    let pausing = tokio::spawn(async move { call.ensure_paused(&id(1), fence(40), Kept::Memory, soon()).await });
    tokio::task::yield_now().await;
    assert_eq!(kill(&sandboxes, &id(1), 41).await.observed, Observed::Killed);
    let _ = pausing.await.unwrap();
    assert_eq!(stage.leftovers(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_is_taken_of_what_runs_and_of_what_is_paused_and_outlives_both() {
    let dir = tempfile::tempdir().unwrap();
    let stage = Stage::new(dir.path());
    let sandboxes = stage.agent().await;
    let directory = |n: u128| dir.path().join("pool/sandboxes").join(id(n).as_str());
    let content = |n: u128, file: &str| std::fs::read_to_string(directory(n).join(file)).unwrap();
    let before = create(&sandboxes, &id(1), 1).await;
    std::fs::write(directory(1).join("disk"), "disk 1").unwrap();
    std::fs::write(directory(1).join("memory"), "memory 1").unwrap();
    // Several who want the same one at once: it is one.
    let source = id(1);
    let wants = (0..8).map(|_| snapshot(&sandboxes, &source, snapshot_id(1)));
    futures::future::join_all(wants).await.into_iter().collect::<Result<Vec<()>, _>>().unwrap();
    let view = sandboxes.get(&id(1)).await.unwrap().unwrap().view;
    assert_eq!((view.observed, &view.incarnation), (Observed::Running, &before.incarnation));
    let steps: Vec<_> = view.steps.iter().map(|(name, _)| *name).collect();
    assert_eq!(steps, ["begin", "quiet", "save", "continue", "stopped", "thaw", "seal", "commit"]);
    sandboxes.guest(&id(1)).unwrap().health(Duration::from_secs(1)).await.unwrap();
    std::fs::write(directory(1).join("disk"), "disk 2").unwrap();

    let view = sandboxes.ensure_running(&id(2), fence(1), forked(snapshot_id(1)), soon()).await.unwrap();
    assert_eq!((view.observed, view.reason.as_str()), (Observed::Running, ""));
    assert_eq!((content(2, "disk"), content(2, "memory")), ("disk 1".to_owned(), "memory 1".to_owned()));
    // A child is like any other, also after its snapshot has gone; so is the snapshot of a child, and of one that is paused.
    assert_eq!(pause(&sandboxes, &id(1), 2).await.observed, Observed::Paused);
    snapshot(&sandboxes, &id(1), snapshot_id(2)).await.unwrap();
    assert_eq!(sandboxes.get(&id(1)).await.unwrap().unwrap().view.observed, Observed::Paused);
    kill(&sandboxes, &id(1), 3).await;
    sandboxes.remove_snapshot(snapshot_id(1)).await.unwrap();
    assert_eq!(pause(&sandboxes, &id(2), 2).await.observed, Observed::Paused);
    sandboxes.stop(Duration::from_secs(5)).await;
    let sandboxes = stage.agent().await;
    let view = sandboxes.ensure_running(&id(2), fence(3), forked(snapshot_id(1)), soon()).await.unwrap();
    assert_eq!((view.observed, view.reason.as_str()), (Observed::Running, ""));
    let view = sandboxes.ensure_running(&id(3), fence(1), forked(snapshot_id(2)), soon()).await.unwrap();
    assert_eq!(view.observed, Observed::Running, "{}", view.reason);
    assert_eq!(content(3, "disk"), "disk 2");

    // What was removed never comes back, what never was is not there.
    let removed = snapshot(&sandboxes, &id(2), snapshot_id(1)).await;
    assert!(matches!(removed, Err(WishError::SnapshotRemoved)), "{removed:?}");
    for absent in [1, 7] {
        let refused = sandboxes.ensure_running(&id(4), fence(1), forked(snapshot_id(absent)), soon()).await;
        assert!(matches!(refused, Err(WishError::SnapshotRemoved)), "{refused:?}");
    }
    // Of another shape than the snapshot's it cannot be.
    let other = Spec { memory_mib: 512, ..forked(snapshot_id(2)) };
    let view = sandboxes.ensure_running(&id(5), fence(1), other, soon()).await.unwrap();
    assert_eq!(view.observed, Observed::Failed);
    assert!(view.reason.contains("shape"), "{}", view.reason);
    for gone in [1, 9] {
        let refused = snapshot(&sandboxes, &id(gone), snapshot_id(9)).await;
        assert!(matches!(refused, Err(WishError::NoState(_) | WishError::UnknownSandbox)), "{refused:?}");
    }
    for n in [2, 3, 5] {
        kill(&sandboxes, &id(n), 9).await;
    }
    sandboxes.remove_snapshot(snapshot_id(2)).await.unwrap();
    sandboxes.remove_snapshot(snapshot_id(3)).await.unwrap();
    assert_eq!(stage.leftovers(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn snapshots_pauses_and_a_kill_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let stage = Stage::new(dir.path());
    let sandboxes = stage.agent().await;
    for n in 1..=10u128 {
        create(&sandboxes, &id(n), 1).await;
        let wishes = (1..=6u64).map(|wish| {
            let sandboxes = sandboxes.clone();
            tokio::spawn(async move {
                tokio::time::sleep(Duration::from_millis(wish * n as u64 % 7)).await;
                let snapshot = snapshot_id(n * 100 + u128::from(wish));
                match wish {
                    1 | 4 => sandboxes.ensure_snapshot(&id(n), 1, snapshot, soon()).await.map(drop),
                    2 => sandboxes.ensure_paused(&id(n), fence(2), Kept::Memory, soon()).await.map(drop),
                    3 => sandboxes.ensure_running(&id(n), fence(3), spec(), soon()).await.map(drop),
                    5 => sandboxes.ensure_snapshot(&id(n), 1, snapshot_id(n * 100 + 1), soon()).await.map(drop),
                    _ => sandboxes.ensure_killed(&id(n), fence(4), soon()).await.map(drop),
                }
            })
        });
        for wish in futures::future::join_all(wishes).await {
            match wish.unwrap() {
                Ok(()) | Err(WishError::Refused(_) | WishError::NoState(_) | WishError::Busy) => {}
                Err(error) => panic!("{error}"),
            }
        }
        assert_eq!(kill(&sandboxes, &id(n), 5).await.observed, Observed::Killed);
        // Half of one is nothing; whole ones stay until they are removed.
        for wish in [1, 4] {
            sandboxes.remove_snapshot(snapshot_id(n * 100 + wish)).await.unwrap();
        }
    }
    assert_eq!(stage.leftovers(), Vec::<String>::new());
}

async fn wait(
    sandboxes: &std::sync::Arc<host_agent::sandbox::Sandboxes>,
    n: u128,
    wanted: impl Fn(&host_agent::sandbox::state::View) -> bool,
) -> host_agent::sandbox::state::View {
    let end = soon();
    loop {
        if let Some(published) = sandboxes.get(&id(n)).await.unwrap()
            && wanted(&published.view)
        {
            return published.view;
        }
        assert!(tokio::time::Instant::now() < end, "sandbox {n} never got there: {:?}", sandboxes.list());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
