//! The published Wrenn SDK, unmodified, against the whole platform: `published_sdk/lifecycle.py` says what is right.

use std::path::Path;
use std::process::Command;

use testkit::sdk;
use whole_machine::platform::Platform;

/// The script makes two sandboxes; 20 s on an idle machine.
const SCRIPT_SECONDS_MAX: &str = "240";

#[test]
fn the_published_python_sdk_makes_uses_pauses_and_destroys_sandboxes() {
    // It says that it needs Python 3.13, and runs on what Debian 12 has.
    let sdk = sdk::python("wrenn==0.3.0", &["--ignore-requires-python"]);
    let platform = Platform::start();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/published_sdk/lifecycle.py");
    let mut command = Command::new("timeout");
    command.args(["--kill-after=5", SCRIPT_SECONDS_MAX]).arg(sdk.join("bin/python")).arg(script);
    command.envs([("WRENN_BASE_URL", &platform.api), ("WRENN_API_KEY", &platform.api_key)]);
    for name in ["http_proxy", "https_proxy", "all_proxy"] {
        command.env_remove(name).env_remove(name.to_uppercase());
    }
    sdk::run(command.env("PYTHONDONTWRITEBYTECODE", "1"));
}
