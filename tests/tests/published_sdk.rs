//! The published Wrenn SDKs, unmodified, against the whole platform: the scripts below `published_sdk/` say what is right.

use std::path::Path;
use std::process::Command;

use testkit::sdk;
use whole_machine::platform::Platform;

/// The longer one makes two sandboxes; 20 s on an idle machine.
const SCRIPT_SECONDS_MAX: &str = "240";

#[test]
fn the_published_python_sdk_makes_uses_pauses_and_destroys_sandboxes() {
    // It says that it needs Python 3.13, and runs on what Debian 12 has.
    let sdk = sdk::python("wrenn==0.3.0", &["--ignore-requires-python"]);
    run(&Platform::start(), &sdk, "lifecycle.py", &[]);
}

/// They differ in what a terminal's frames are, and in nothing that a server could know them by.
#[tokio::test(flavor = "multi_thread")]
async fn both_generations_of_the_published_sdk_have_terminals_and_processes_in_the_background() {
    let platform = Platform::start();
    for version in ["wrenn==0.1.2", "wrenn==0.3.0"] {
        let sdk = sdk::python(version, &["--ignore-requires-python"]);
        let id = platform.create().await;
        eprintln!("{version}");
        tokio::task::block_in_place(|| run(&platform, &sdk, "terminal.py", &[&id]));
        platform.kill(&id).await;
    }
}

fn run(platform: &Platform, sdk: &Path, script: &str, args: &[&str]) {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/published_sdk").join(script);
    let mut command = Command::new("timeout");
    command.args(["--kill-after=5", SCRIPT_SECONDS_MAX]).arg(sdk.join("bin/python")).arg(script).args(args);
    command.envs([("WRENN_BASE_URL", &platform.api), ("WRENN_API_KEY", &platform.api_key)]);
    for name in ["http_proxy", "https_proxy", "all_proxy"] {
        command.env_remove(name).env_remove(name.to_uppercase());
    }
    sdk::run(command.env("PYTHONDONTWRITEBYTECODE", "1"));
}
