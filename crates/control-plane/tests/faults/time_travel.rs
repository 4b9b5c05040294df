//! The database is put back to an old copy beneath hosts that live: nothing is deleted, and the rows become true again.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use reqwest::Method;

use super::cluster::{Cluster, wait};
use super::host::Host;
use super::truth;

const TRUE_AGAIN_MAX: Duration = Duration::from_secs(60);

/// What is done to sandboxes before and after the moment to which the database goes back.
pub struct Story {
    untouched: String,
    saved: String,
    resumed: String,
    paused_later: String,
    killed_later: String,
    killed_before: String,
}

/// What hosts and clients know, and the database has forgotten.
pub struct Forgotten {
    made_later: String,
    alive: BTreeMap<String, BTreeSet<i32>>,
    files: BTreeSet<String>,
}

impl Story {
    pub async fn begin(cluster: &Cluster, host: &Host) -> Self {
        let team = &cluster.team;
        let story = Self {
            untouched: team.running("untouched").await,
            saved: team.running("saved").await,
            resumed: team.running("resumed later").await,
            paused_later: team.running("paused later").await,
            killed_later: team.running("killed later").await,
            killed_before: team.running("killed before").await,
        };
        team.verb(&story.saved, "pause").await;
        team.verb(&story.resumed, "pause").await;
        team.verb(&story.killed_before, "kill").await;
        truth::judge(cluster, &[host]).await;
        story
    }

    pub async fn go_on(&self, cluster: &Cluster, host: &Host) -> Forgotten {
        let team = &cluster.team;
        team.verb(&self.resumed, "resume").await;
        team.verb(&self.paused_later, "pause").await;
        assert_eq!(team.verb(&self.killed_later, "kill").await.status, 204);
        let made_later = team.running("made later").await;
        truth::judge(cluster, &[host]).await;
        Forgotten { made_later, alive: host.alive(), files: host.files_of(&self.paused_later) }
    }

    /// After the replicas have gone on from the older database.
    pub async fn is_true_again(&self, cluster: &Cluster, host: &Host, forgotten: Forgotten) {
        let Forgotten { made_later, alive, files } = forgotten;
        let team = &cluster.team;
        host.wait_attached(Duration::from_secs(30)).await;
        // What the host says is heard at once, and asked about where it says nothing.
        for (id, wanted) in [
            (&self.untouched, "running"),
            (&self.saved, "paused"),
            (&self.resumed, "running"),
            (&self.paused_later, "paused"),
            (&self.killed_later, "error"),
            (&self.killed_before, "stopped"),
        ] {
            team.wait_status(id, wanted, TRUE_AGAIN_MAX).await;
        }
        let preview = format!("/v1/hosts/{}/delete-preview", host.id);
        let preview = cluster.admin.call(Method::GET, &preview, None).await.unwrap();
        assert_eq!(preview.body["unclaimed"], serde_json::json!([made_later]), "{}", preview.body);
        assert_eq!(team.verb(&made_later, "get").await.status, 404, "it is nobody's here");
        // Not by a reconciler that comes later either.
        tokio::time::sleep(Duration::from_secs(5)).await;
        assert_eq!(host.alive(), alive, "processes of sandboxes");
        assert_eq!(host.files_of(&self.paused_later), files);
        assert!(!alive.contains_key(&self.killed_later), "what was killed does not run");

        // It can be worked with as if nothing had been.
        assert_eq!(team.verb(&self.paused_later, "resume").await.status, 200);
        assert_eq!(team.verb(&self.resumed, "pause").await.status, 200);
        assert_eq!(team.verb(&self.killed_later, "kill").await.status, 204);
        let unclaimed = host.alive().remove(&made_later).expect("it lives on");
        assert_eq!(alive[&made_later], unclaimed);
        assert_eq!(cluster.count("audit where action = 'host.fence'").await, 0, "its tickets are later ones");
        let caught_up = cluster.count("audit where action = 'sandbox.catch_up'").await;
        assert_eq!(caught_up, 2, "one record for each that the host knew better");
        let rest = || async { cluster.count("operations where phase = 'open'").await == 0 };
        wait("the platform to rest", truth::REST_MAX, rest).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_old_copy_of_the_database_deletes_nothing() {
    let mut cluster = Cluster::start(2).await;
    let host = Host::join(&cluster).await;
    let story = Story::begin(&cluster, &host).await;
    let dump = cluster.dir.path().join("dump");
    let (server, name) = (cluster.database.server().clone(), cluster.database.name().to_owned());
    server.dump(&name, &dump).unwrap();
    let forgotten = story.go_on(&cluster, &host).await;
    for replica in &mut cluster.replicas {
        replica.kill();
    }
    server.restore(&name, &dump).unwrap();
    for number in 0..2 {
        cluster.restart(number).await;
    }
    story.is_true_again(&cluster, &host, forgotten).await;
}
