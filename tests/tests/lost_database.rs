//! The drill of docs/how-to/backup.md with real microVMs: the control plane and its database are lost, and come back as they were some time
//! before. Sandboxes notice nothing, what was paused is resumed, and what the database does not know is told of and left alone.

use std::collections::BTreeMap;
use std::process::Command;
use std::time::Duration;

use reqwest::Method;
use serde_json::Value;
use testkit::postgres::Database;
use whole_machine::platform::{Options, Platform, program};
use whole_machine::wait;

const HEALED: Duration = Duration::from_secs(90);

fn on(database: &Database) -> Options {
    Options { env: BTreeMap::from([("DATABASE_URL".to_owned(), database.url.clone())]), ..Options::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restored_control_plane_finds_its_hosts_and_deletes_nothing() {
    let database = Database::on_own_server().await;
    let mut platform = Platform::start_with(&on(&database));
    let (paused, running) = (platform.create().await, platform.create().await);
    for id in [&paused, &running] {
        platform.shell(id, "echo kept > /root/kept").await;
    }
    platform.call(Method::POST, &format!("/v1/sandboxes/{paused}/pause"), None).await;
    platform.wait_status(&paused, "paused", HEALED).await;
    let incarnation = platform.get(&running).await["incarnation"].clone();

    // The backup: a dump, and the secret.
    let kept = tempfile::tempdir().unwrap();
    database.dump(&kept.path().join("wrenn.dump")).await;
    std::fs::copy(platform.dir.join("secret"), kept.path().join("secret")).unwrap();
    let later = platform.create().await;
    platform.shell(&later, "echo later > /root/kept").await;
    let before = platform.objects();

    // The loss: programs, database and secret. The sandboxes of the host go on.
    platform.kill_up();
    database.stop_server().await;
    std::fs::remove_file(platform.dir.join("secret")).unwrap();
    assert_eq!(platform.objects().get("microvms"), Some(&2));

    let restored = Database::on_own_server().await;
    restored.restore(&kept.path().join("wrenn.dump")).await;
    std::fs::copy(kept.path().join("secret"), platform.dir.join("secret")).unwrap();
    let host = platform.host_id.clone();
    platform.restart(&on(&restored));

    assert_eq!(platform.host_id, host);
    let sandbox = platform.wait_status(&running, "running", HEALED).await;
    assert_eq!(sandbox["incarnation"], incarnation, "it was never touched");
    assert_eq!(platform.shell_soon(&running, "cat /root/kept").await, (0, "kept\n".to_owned()));
    let token = Command::new(program("wrenn-cp"))
        .arg("admin-token")
        .current_dir(&platform.dir)
        .env("WRENN_DIR", &platform.dir)
        .env("DATABASE_URL", &restored.url)
        .output()
        .unwrap();
    assert!(token.status.success(), "{}", String::from_utf8_lossy(&token.stderr));
    let administrator = String::from_utf8(token.stdout).unwrap().trim().to_owned();
    // The one that was made after the dump is nobody's, and there.
    let unclaimed: Value = wait::until("the host to tell of what nobody knows", HEALED, || async {
        let url = format!("{}/v1/hosts/{host}/inspect", platform.api);
        let inspected: Value =
            platform.http.get(url).bearer_auth(&administrator).send().await.ok()?.json().await.ok()?;
        let unclaimed = inspected["unclaimed"].clone();
        unclaimed.as_array().is_some_and(|ids| !ids.is_empty()).then_some(unclaimed)
    })
    .await;
    assert_eq!(unclaimed, serde_json::json!([later]));
    assert_eq!(platform.call(Method::GET, &format!("/v1/sandboxes/{later}"), None).await.0, 404);
    assert_eq!(platform.objects(), before, "nothing was taken away");
    // What was paused comes back where it stood.
    platform.call(Method::POST, &format!("/v1/sandboxes/{paused}/resume"), None).await;
    platform.wait_status(&paused, "running", HEALED).await;
    assert_eq!(platform.shell_soon(&paused, "cat /root/kept").await, (0, "kept\n".to_owned()));
    assert_eq!(platform.objects().get("microvms"), Some(&3));
    assert_eq!(platform.finish(), Default::default());
}
