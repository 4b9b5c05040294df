//! A control plane that is lost and comes back from what docs/how-to/backup.md says to keep; and what is left when the secret was not kept.
//! Hosts here are rows; that real ones go on is for the tests of whole machines.

mod process;

use std::os::unix::fs::PermissionsExt as _;

use process::{Administrator, Process, command};
use reqwest::Method;
use serde_json::{Value, json};
use testkit::postgres::Database;

/// The request of a host with a key of its own.
fn request(token: &str) -> Value {
    let key = rcgen::KeyPair::generate().unwrap();
    let csr = rcgen::CertificateParams::default().serialize_request(&key).unwrap().pem().unwrap();
    let mut request = facts();
    request["token"] = token.into();
    request["csr_pem"] = csr.into();
    request["address"] = "127.0.0.1:50051".into();
    request
}

fn facts() -> Value {
    json!({"arch": "x86_64", "cpu_cores": 2, "memory_mb": 1024, "disk_gb": 10, "isolation": "fake", "agent_version": "0",
        "templates": ["minimal"]})
}

async fn with_key(url: &str, key: &str) -> u16 {
    let request = reqwest::Client::new().get(format!("{url}/v1/sandboxes")).header("X-API-Key", key);
    request.send().await.unwrap().status().as_u16()
}

async fn beat(url: &str, host: &str, token: &str) -> u16 {
    let body = json!({
        "agent_run": "r", "sequence": 1, "epoch": 1, "complete": false, "sandboxes": [], "memory_free_mb": 1, "disk_free_mb": 1,
        "facts": facts(),
    });
    let request =
        reqwest::Client::new().post(format!("{url}/v1/hosts/{host}/heartbeat")).bearer_auth(token).json(&body);
    request.send().await.unwrap().status().as_u16()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dump_and_the_secret_bring_everything_back_and_a_dump_alone_what_it_can() {
    let database = Database::new().await;
    let lost = tempfile::tempdir().unwrap();
    let mut first = Process::start(&database.url, lost.path(), &[]).await;
    let administrator = Administrator::of(&database.url, lost.path()).await;
    let ask = async |url: &str, method, path: &str, body| administrator.call(url, method, path, body).await;
    let (status, made) = ask(&first.url, Method::POST, "/v1/hosts", Some(json!({"type": "regular"}))).await;
    assert_eq!(status, 201, "{made}");
    let host = made["host"]["id"].as_str().unwrap().to_owned();
    let registration = request(made["registration_token"].as_str().unwrap());
    let (status, credentials) = ask(&first.url, Method::POST, "/v1/hosts/register", Some(registration)).await;
    assert_eq!(status, 201, "{credentials}");
    let (host_token, authority) = (credentials["token"].as_str().unwrap(), &credentials["ca_cert_pem"]);
    let (_, key) = ask(&first.url, Method::POST, "/v1/api-keys", Some(json!({}))).await;
    let key = key["key"].as_str().unwrap();
    assert_eq!((with_key(&first.url, key).await, beat(&first.url, &host, host_token).await), (200, 200));

    // What is kept, and the loss of the rest.
    let kept = tempfile::tempdir().unwrap();
    database.dump(&kept.path().join("wrenn.dump")).await;
    std::fs::copy(lost.path().join("secret"), kept.path().join("secret")).unwrap();
    first.kill().await;
    drop((first, lost));

    // Another machine, another PostgreSQL.
    let restored = Database::on_own_server().await;
    restored.restore(&kept.path().join("wrenn.dump")).await;
    let fresh = tempfile::tempdir().unwrap();
    std::fs::copy(kept.path().join("secret"), fresh.path().join("secret")).unwrap();
    std::fs::set_permissions(fresh.path().join("secret"), std::fs::Permissions::from_mode(0o600)).unwrap();
    let mut second = Process::start(&restored.url, fresh.path(), &[]).await;
    assert_eq!(with_key(&second.url, key).await, 200, "keys");
    assert_eq!(ask(&second.url, Method::GET, "/v1/hosts", None).await.0, 200, "sessions");
    assert_eq!(beat(&second.url, &host, host_token).await, 200, "hosts");
    second.kill().await;

    // The secret is lost: nothing starts as if it were not, and nothing is changed by the attempt.
    let empty = tempfile::tempdir().unwrap();
    let refused = command(&restored.url, empty.path()).output().unwrap();
    let said = String::from_utf8_lossy(&refused.stderr);
    assert_eq!(refused.status.code(), Some(78), "{said}");
    assert!(said.contains("restore WRENN_DIR/secret, or WRENN_SECRET"), "{said}");
    assert_eq!(restored.sql("select count(*) from keyring").await.trim(), "1");

    // As the document says: another secret, and each host asks for its place anew.
    restored.sql("delete from keyring; update hosts set state = 'pending'").await;
    let third = Process::start(&restored.url, empty.path(), &[]).await;
    assert_eq!(with_key(&third.url, key).await, 200, "keys are no secret's");
    assert_eq!(ask(&third.url, Method::GET, "/v1/hosts", None).await.0, 401, "sessions are over");
    assert_eq!(beat(&third.url, &host, host_token).await, 401, "hosts are not known by their tokens");
    let administrator = Administrator::of(&restored.url, empty.path()).await;
    let path = format!("/v1/hosts/{host}/token");
    let (status, again) = administrator.call(&third.url, Method::POST, &path, None).await;
    assert_eq!(status, 201, "{again}");
    let registration = request(again["registration_token"].as_str().unwrap());
    let (status, credentials) =
        administrator.call(&third.url, Method::POST, "/v1/hosts/register", Some(registration)).await;
    assert_eq!((status.as_u16(), credentials["host"]["id"].as_str()), (201, Some(host.as_str())), "{credentials}");
    assert_ne!(&credentials["ca_cert_pem"], authority, "the authority is a new one");
    let token = credentials["token"].as_str().unwrap();
    let epoch: Value = credentials["epoch"].clone();
    // Commands for what was there before bear it, and an older one would be refused.
    assert_eq!(epoch, 1);
    assert_eq!(beat(&third.url, &host, token).await, 200);
}
