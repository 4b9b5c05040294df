//! Running a program to its end: its output is shown only when it fails, with the command that failed.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};

/// The standard output of a program that must succeed.
pub fn output(command: &mut Command) -> Result<Vec<u8>> {
    let described = format!("{command:?}");
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("start {described}"))?;
    if !output.status.success() {
        bail!("{described}: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr));
    }
    Ok(output.stdout)
}

pub fn text(command: &mut Command) -> Result<String> {
    Ok(String::from_utf8_lossy(&output(command)?).trim().to_owned())
}

/// The root of the checkout that this program was built in.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask lies below the root").to_owned()
}
