//! The database is put back to an old copy beneath hosts that live: nothing is deleted, and the rows become true again.

use std::time::Duration;

use reqwest::Method;

use super::cluster::{Cluster, wait};
use super::host::Host;
use super::truth;

const TRUE_AGAIN_MAX: Duration = Duration::from_secs(60);

#[tokio::test(flavor = "multi_thread")]
async fn an_old_copy_of_the_database_deletes_nothing() {
    let mut cluster = Cluster::start(2).await;
    let host = Host::join(&cluster).await;
    let team = cluster.team.clone();
    let untouched = team.running("untouched").await;
    let saved = team.running("saved").await;
    team.verb(&saved, "pause").await;
    let (resumed, paused_later, killed_later, killed_before) = (
        team.running("resumed later").await,
        team.running("paused later").await,
        team.running("killed later").await,
        team.running("killed before").await,
    );
    team.verb(&resumed, "pause").await;
    team.verb(&killed_before, "kill").await;
    truth::judge(&cluster, &[&host]).await;

    let dump = cluster.dir.path().join("dump");
    let (server, name) = (cluster.database.server().clone(), cluster.database.name().to_owned());
    server.dump(&name, &dump).unwrap();
    team.verb(&resumed, "resume").await;
    team.verb(&paused_later, "pause").await;
    assert_eq!(team.verb(&killed_later, "kill").await.status, 204);
    let made_later = team.running("made later").await;
    truth::judge(&cluster, &[&host]).await;
    let (alive, files) = (host.alive(), host.files_of(&paused_later));

    for replica in &mut cluster.replicas {
        replica.kill();
    }
    server.restore(&name, &dump).unwrap();
    for number in 0..2 {
        cluster.restart(number).await;
    }
    host.wait_attached(Duration::from_secs(30)).await;
    // What the host says is heard at once, and asked about where it says nothing.
    for (id, wanted) in [
        (&untouched, "running"),
        (&saved, "paused"),
        (&resumed, "running"),
        (&paused_later, "paused"),
        (&killed_later, "error"),
        (&killed_before, "stopped"),
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
    assert_eq!(host.files_of(&paused_later), files);
    assert!(!alive.contains_key(&killed_later), "what was killed does not run");

    // It can be worked with as if nothing had been.
    assert_eq!(team.verb(&paused_later, "resume").await.status, 200);
    assert_eq!(team.verb(&resumed, "pause").await.status, 200);
    assert_eq!(team.verb(&killed_later, "kill").await.status, 204);
    let unclaimed = host.alive().remove(&made_later).expect("it lives on");
    assert_eq!(alive[&made_later], unclaimed);
    assert_eq!(cluster.count("audit where action = 'host.fence'").await, 0, "its tickets are later ones");
    let caught_up = cluster.count("audit where action = 'sandbox.catch_up'").await;
    assert_eq!(caught_up, 2, "one record for each that the host knew better");
    let rest = || async { cluster.count("operations where phase = 'open'").await == 0 };
    wait("the platform to rest", truth::REST_MAX, rest).await;
}
