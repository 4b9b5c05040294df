//! What stands by: claimed, refilled, ended by whoever comes next; with processes in place of microVMs.

mod stage;

use std::sync::Arc;
use std::time::Duration;

use host_agent::sandbox::Sandboxes;
use host_agent::sandbox::state::Spec;
use model::ids::SandboxId;
use model::sandbox::Observed;
use serde_json::Value;
use stage::{Stage, create, fence, id, kill, pause, soon, spec};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

#[test]
fn fake_envd() {
    stage::fake_envd();
}

struct Agent {
    sandboxes: Arc<Sandboxes>,
    keeper: JoinHandle<()>,
    stop: CancellationToken,
}

impl Agent {
    async fn start(stage: &Stage, at_most: usize) -> Self {
        let sandboxes = stage.agent_with_standbys(at_most).await;
        let stop = CancellationToken::new();
        let standbys = sandboxes.context().standbys.clone().unwrap();
        let keeper = tokio::spawn(standbys.keep(sandboxes.context().clone(), stop.clone()));
        Self { sandboxes, keeper, stop }
    }

    fn ready(&self) -> usize {
        self.sandboxes.context().standbys.as_ref().unwrap().ready()
    }

    async fn until_ready(&self, count: usize) {
        let reached = async {
            while self.ready() != count {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(40), reached)
            .await
            .unwrap_or_else(|_| panic!("{} are ready", self.ready()));
    }

    /// In order.
    async fn end(self) {
        self.sandboxes.stop(Duration::from_secs(5)).await;
        self.stop.cancel();
        self.keeper.await.unwrap();
    }

    /// As if it had been killed.
    async fn vanish(self) {
        self.keeper.abort();
        self.sandboxes.stop(Duration::ZERO).await;
    }
}

/// A stage on which creates are restored, and the booted state of the usual kind is there.
async fn stage(dir: &std::path::Path) -> Stage {
    let stage = Stage::new(dir);
    std::fs::write(dir.join(stage::EDITION), "one").unwrap();
    let sandboxes = stage.agent().await;
    create(&sandboxes, &id(100), 1).await;
    kill(&sandboxes, &id(100), 2).await;
    let kept = || {
        std::fs::read_dir(dir.join("pool/templates"))
            .unwrap()
            .flatten()
            .any(|place| place.path().join("gen-00001").exists())
    };
    while !kept() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    sandboxes.stop(Duration::from_secs(5)).await;
    stage
}

fn journal(stage: &Stage, id: &SandboxId) -> Value {
    let path = stage.dir.join("pool/sandboxes").join(id.as_str()).join("state.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn was_standby(stage: &Stage, id: &SandboxId) -> bool {
    journal(stage, id)["record"]["phase"]["run"]["standby"].is_object()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_create_claims_what_stands_by_and_another_is_made() {
    let dir = tempfile::tempdir().unwrap();
    let stage = stage(dir.path()).await;
    let agent = Agent::start(&stage, 2).await;
    create(&agent.sandboxes, &id(1), 1).await;
    assert!(!was_standby(&stage, &id(1)), "nobody had asked for one");
    agent.until_ready(1).await;

    let view = create(&agent.sandboxes, &id(2), 1).await;

    assert_eq!(view.observed, Observed::Running);
    assert!(was_standby(&stage, &id(2)));
    let names: Vec<_> = view.steps.iter().map(|(name, _)| *name).collect();
    assert_eq!(
        names,
        ["reserve", "network", "cgroup", "disk", "memory", "start", "microvm", "health", "template", "init", "commit"]
    );
    // Two have been asked for within a moment, and another kind, of which there is none yet.
    let large = Spec { memory_mib: 512, ..spec() };
    agent.sandboxes.ensure_running(&id(3), fence(1), large, soon()).await.unwrap();
    assert!(!was_standby(&stage, &id(3)));
    agent.until_ready(2).await;
    // It is like any other: paused, resumed, killed.
    let paused = pause(&agent.sandboxes, &id(2), 2).await;
    assert_eq!(paused.observed, Observed::Paused);
    assert!(!dir.path().join("pool/sandboxes").join(id(2).as_str()).join("unsettled").exists(), "the mark is gone");
    assert_eq!(create(&agent.sandboxes, &id(2), 3).await.observed, Observed::Running);
    assert!(!was_standby(&stage, &id(2)));
    for n in 1..=3 {
        kill(&agent.sandboxes, &id(n), 9).await;
    }
    agent.end().await;
    assert_eq!(stage.leftovers(), Vec::<String>::new());
    assert_eq!(std::fs::read_dir(dir.path().join("pool/standbys")).unwrap().count(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_does_not_go_at_once_goes_later() {
    let dir = tempfile::tempdir().unwrap();
    let stage = stage(dir.path()).await;
    let agent = Agent::start(&stage, 1).await;
    create(&agent.sandboxes, &id(1), 1).await;
    agent.until_ready(1).await;
    let standbys = agent.sandboxes.context().standbys.clone().unwrap();
    let slots = standbys.slots();
    let groups = std::fs::read_dir(dir.path().join("cgroups")).unwrap().flatten().map(|group| group.path());
    let is_one = |group: &std::path::PathBuf| group.file_name().unwrap().to_str().unwrap().starts_with("standby-");
    let obstacle = groups.into_iter().find(is_one).unwrap().join("busy");
    std::fs::write(&obstacle, "").unwrap();

    standbys.make_room(agent.sandboxes.context()).await;

    assert_eq!((agent.ready(), standbys.slots()), (0, slots), "it is not forgotten");
    std::fs::remove_file(obstacle).unwrap();
    let gone = async {
        while !standbys.slots().is_empty() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), gone).await.expect("its end is tried again");
    kill(&agent.sandboxes, &id(1), 2).await;
    agent.end().await;
    assert_eq!(stage.leftovers(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_dead_agent_kept_is_ended_and_what_was_claimed_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let stage = stage(dir.path()).await;
    let agent = Agent::start(&stage, 2).await;
    create(&agent.sandboxes, &id(1), 1).await;
    agent.until_ready(1).await;
    let before = create(&agent.sandboxes, &id(2), 1).await;
    agent.until_ready(2).await;
    agent.vanish().await;
    assert_eq!(journal(&stage, &id(2))["record"]["phase"]["is"], "running");

    let agent = Agent::start(&stage, 2).await;
    let after = agent.sandboxes.get(&id(2)).await.unwrap().unwrap().view;
    assert_eq!((after.observed, after.incarnation), (Observed::Running, before.incarnation));
    assert_eq!(agent.ready(), 0, "a new agent has none of the old one");
    for n in 1..=2 {
        kill(&agent.sandboxes, &id(n), 9).await;
    }
    agent.end().await;
    assert_eq!(stage.leftovers(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn one_that_died_is_not_claimed_and_all_give_way() {
    let dir = tempfile::tempdir().unwrap();
    let stage = stage(dir.path()).await;
    let agent = Agent::start(&stage, 1).await;
    create(&agent.sandboxes, &id(1), 1).await;
    agent.until_ready(1).await;
    let context = agent.sandboxes.context().clone();
    let standbys = context.standbys.clone().unwrap();
    for slot in standbys.slots() {
        host_agent::sweep::sweep(context.tag.uid(slot)).unwrap();
    }
    assert_eq!(create(&agent.sandboxes, &id(2), 1).await.observed, Observed::Running);
    assert!(!was_standby(&stage, &id(2)));
    agent.until_ready(1).await;

    context.make_room().await;

    assert_eq!((agent.ready(), standbys.slots().len()), (0, 0));
    assert_eq!(create(&agent.sandboxes, &id(3), 1).await.observed, Observed::Running);
    for n in 1..=3 {
        kill(&agent.sandboxes, &id(n), 9).await;
    }
    agent.end().await;
    assert_eq!(stage.leftovers(), Vec::<String>::new());
}

/// In its directory from the claim on: no state can be written there as long as this lies in the way.
fn block(place: &std::path::Path) {
    std::fs::create_dir(place.join("state.json.tmp")).unwrap();
}

fn unblock(stage: &Stage, id: &SandboxId) {
    std::fs::remove_dir(stage.dir.join("pool/sandboxes").join(id.as_str()).join("state.json.tmp")).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_acknowledged_before_it_was_written_down_is_not_lost() {
    let dir = tempfile::tempdir().unwrap();
    let stage = stage(dir.path()).await;
    let agent = Agent::start(&stage, 2).await;
    create(&agent.sandboxes, &id(1), 1).await;
    create(&agent.sandboxes, &id(2), 1).await;
    agent.until_ready(2).await;
    for place in std::fs::read_dir(dir.path().join("pool/standbys")).unwrap().flatten() {
        block(&place.path());
    }
    for n in [3, 4] {
        assert_eq!(create(&agent.sandboxes, &id(n), 1).await.observed, Observed::Running);
        assert!(was_standby(&stage, &id(n)));
        assert_eq!(journal(&stage, &id(n))["record"]["phase"]["is"], "making");
    }
    // It is tried again, here because somebody asks for the sandbox.
    unblock(&stage, &id(3));
    create(&agent.sandboxes, &id(3), 2).await;
    let written = async {
        while journal(&stage, &id(3))["record"]["phase"]["is"] != "running" {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), written).await.expect("it is written down once it can be");

    // The host goes down, or only this microVM and the agent, before it could be written down.
    let uid = agent.sandboxes.get(&id(4)).await.unwrap().unwrap().uid.unwrap();
    agent.vanish().await;
    host_agent::sweep::sweep(uid).unwrap();
    unblock(&stage, &id(4));
    let agent = Agent::start(&stage, 2).await;
    let again = agent.sandboxes.ensure_running(&id(4), fence(1), spec(), soon()).await;
    assert!(again.as_ref().map_or(true, |view| view.observed == Observed::Failed), "{again:?}");
    assert_eq!(agent.sandboxes.get(&id(4)).await.unwrap().unwrap().view.observed, Observed::Failed);
    assert!(dir.path().join("pool/sandboxes").join(id(4).as_str()).join("disk").exists(), "it is a customer's");
    for n in 1..=4 {
        kill(&agent.sandboxes, &id(n), 9).await;
    }
    agent.end().await;
    assert_eq!(stage.leftovers(), Vec::<String>::new());
}
