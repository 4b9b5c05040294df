//! Published SDKs, installed once for all checkouts and kept outside of them.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// A Python package in an environment of its own, which is bound to the interpreter that made it. `options` are pip's.
pub fn python(package: &str, options: &[&str]) -> PathBuf {
    let interpreter = said(Command::new("python3").arg("--version")).replace(' ', "-").to_lowercase();
    let key = format!("{interpreter}-{}", package.replace("==", "-"));
    installed(&key, |dir| {
        run(Command::new("python3").args(["-m", "venv"]).arg(dir));
        // By module: the script pip names the directory's present place.
        let mut pip = Command::new(dir.join("bin/python"));
        run(pip.args(["-m", "pip", "install", "--quiet"]).args(options).arg(package));
    })
}

/// A package of npm.
pub fn javascript(package: &str) -> PathBuf {
    installed(&format!("javascript-{}", package.replace('@', "-")), |dir| {
        let mut npm = Command::new("npm");
        run(npm.args(["install", "--no-audit", "--no-fund", "--silent", "--prefix"]).arg(dir).arg(package));
    })
}

/// The directory with this SDK; `install` fills an empty one when there is none yet. It is filled beside its place and renamed when it is
/// whole, under a lock, so that nothing half looks finished.
fn installed(key: &str, install: impl FnOnce(&Path)) -> PathBuf {
    let kind = cache().join("sdk");
    fs::create_dir_all(&kind).unwrap();
    let place = kind.join(key);
    let lock = File::create(kind.join(format!("{key}.lock"))).unwrap();
    lock.lock().unwrap();
    if !place.exists() {
        eprintln!("installing {key} ...");
        let unfinished = kind.join(format!("{key}.tmp"));
        let _ = fs::remove_dir_all(&unfinished);
        fs::create_dir(&unfinished).unwrap();
        install(&unfinished);
        fs::rename(&unfinished, &place).unwrap();
    }
    place
}

/// `WRENN_CACHE`, else below the user's cache directory.
fn cache() -> PathBuf {
    let from = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    from("WRENN_CACHE")
        .or_else(|| from("XDG_CACHE_HOME").map(|path| path.join("wrenn")))
        .or_else(|| from("HOME").map(|path| path.join(".cache/wrenn")))
        .expect("WRENN_CACHE, XDG_CACHE_HOME or HOME is set")
}

fn said(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    assert!(output.status.success(), "{command:?}: {}", output.status);
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// To its end, which must be a good one.
pub fn run(command: &mut Command) {
    let status = command.stdin(Stdio::null()).status().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    assert!(status.success(), "{command:?}: {status}");
}
