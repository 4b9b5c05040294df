//! The published Wrenn SDKs, unmodified, against the whole platform: the scripts in `published_sdk/` say what is right.

use std::path::Path;
use std::process::Command;

use testkit::sdk;
use whole_machine::platform::Platform;

/// Four sandboxes and a minute of waiting at most; 90 s on an idle machine.
const SCRIPT_SECONDS_MAX: &str = "420";

/// They say that they need Python 3.13, and run on what Debian 12 has.
fn runs(package: &str, script: &str) {
    let sdk = sdk::python(package, &["--ignore-requires-python"]);
    let platform = Platform::start();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/published_sdk").join(script);
    let mut command = Command::new("timeout");
    command.args(["--kill-after=5", SCRIPT_SECONDS_MAX]).arg(sdk.join("bin/python")).arg(script);
    command.envs([("WRENN_BASE_URL", &platform.api), ("WRENN_API_KEY", &platform.api_key)]);
    for name in ["http_proxy", "https_proxy", "all_proxy"] {
        command.env_remove(name).env_remove(name.to_uppercase());
    }
    sdk::run(command.env("PYTHONDONTWRITEBYTECODE", "1"));
}

#[test]
fn programs_for_the_sdk_of_today_run_unmodified() {
    runs("wrenn==0.3.0", "wrenn_0_3.py");
}

#[test]
fn programs_for_the_sdk_before_it_run_unmodified() {
    runs("wrenn==0.1.2", "wrenn_0_1.py");
}
