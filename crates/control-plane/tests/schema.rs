//! The whole API against its own document, by a program that makes requests out of it: `schemathesis`.
//!
//! For each operation it sends what the document allows and what it does not, and judges the answers: no status, media type or body that
//! the document has not, nothing wrong taken for right, no method that is not there, nothing without a credential; and never a 500.

mod replica;

use std::path::Path;
use std::process::Command;

use replica::Replica;
use serde_json::Value;
use testkit::sdk;

/// Of each operation.
const EXAMPLES: &str = "10";
const SECONDS_MAX: &str = "400";
const CHECKS: &str = "status_code_conformance,content_type_conformance,response_schema_conformance,\
    response_headers_conformance,negative_data_rejection,unsupported_method,ignored_auth,use_after_free";
/// What would end the session that it is done with, streams without an end, and links to other sites.
const LEFT_OUT: &str = "^/v1/me$|^/v1/me/sessions|^/v1/me/password|^/v1/auth/logout|^/v1/auth/switch-team|^/v1/events/.*stream|^/auth/oauth";

#[tokio::test(flavor = "multi_thread")]
async fn every_answer_is_one_that_the_document_has() {
    let schemathesis = tokio::task::spawn_blocking(|| sdk::python("schemathesis==4.32.5", &[])).await.unwrap();
    let replica = Replica::start().await;
    let host = replica.host(65_536).await;
    let sandbox = replica.sandbox(host).await;
    let dir = tempfile::tempdir().unwrap();
    let document = replica.http.get(format!("{}/openapi.json", replica.url)).send().await.unwrap();
    let mut document: Value = document.json().await.unwrap();
    let yaml = replica.http.get(format!("{}/openapi.yaml", replica.url)).send().await.unwrap();
    assert_eq!(yaml.headers()["content-type"], "application/yaml");
    assert_eq!(serde_json::from_str::<Value>(&yaml.text().await.unwrap()).unwrap(), document);
    // What nobody may be answered, although the document must say what it would look like.
    for operation in document["paths"]
        .as_object_mut()
        .unwrap()
        .values_mut()
        .flat_map(|item| item.as_object_mut().unwrap().values_mut())
    {
        if let Some(responses) = operation.get_mut("responses").and_then(Value::as_object_mut) {
            responses.remove("500");
        }
    }
    std::fs::write(dir.path().join("openapi.json"), document.to_string()).unwrap();
    // Ids of things that exist, beside those that it thinks of: else all that it sees is 404. No host is there that would end a wait.
    let config = format!(
        "[parameters]\n\"query.wait_sec\" = 1\n\
         [[operations]]\ninclude-path-regex = \"^/v1/sandboxes/\"\nparameters = {{ \"path.id\" = \"{sandbox}\" }}\n\
         [[operations]]\ninclude-path-regex = \"^/v1/hosts/\"\nparameters = {{ \"path.id\" = \"{host}\" }}\n"
    );
    std::fs::write(dir.path().join("schemathesis.toml"), config).unwrap();
    let mut command = Command::new("timeout");
    command.args(["--kill-after=5", SECONDS_MAX]).arg(schemathesis.join("bin/python"));
    command.args(["-m", "schemathesis.cli", "run", "openapi.json", "--url", &replica.url]);
    command.arg("-H").arg(format!("Authorization: Bearer {}", replica.admin));
    command.args([
        "-n",
        EXAMPLES,
        "--seed",
        &seed(),
        "--checks",
        CHECKS,
        "--phases",
        "examples,coverage,fuzzing,stateful",
    ]);
    command.args(["--exclude-path-regex", LEFT_OUT, "--suppress-health-check", "all", "--warnings", "off"]);
    command.args(["--request-timeout", "60", "--no-shrink", "--continue-on-failure"]);
    for name in ["http_proxy", "https_proxy", "all_proxy"] {
        command.env_remove(name).env_remove(name.to_uppercase());
    }
    let place: &Path = dir.path();
    command.current_dir(place).env("PYTHONDONTWRITEBYTECODE", "1").env("NO_COLOR", "1");
    let output = tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}\n{}", String::from_utf8_lossy(&output.stderr));
    let tested = said.lines().find_map(|line| line.trim().strip_prefix("Tested:")).unwrap_or_default();
    assert!(tested.trim().parse().is_ok_and(|count: usize| count > 90), "{said}");
}

/// Another one each day would be another test each day; `WRENN_TEST_SEED` plays others.
fn seed() -> String {
    std::env::var("WRENN_TEST_SEED").unwrap_or_else(|_| "1".to_owned())
}
