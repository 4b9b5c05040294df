//! Modules for tests of what the kernel of this machine may lack: Debian's stock kernel has them, in a guest.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};

use super::package::{self, Package, find};
use super::{META, collect};
use crate::artifact::{self, Key};

/// Raised when the recipe below changes what comes out.
const RECIPE: &str = "lab-1";
const KIND: &str = "lab";

/// What the tests need; what these need themselves comes with them. What is built into the kernel is in no file.
const WANTED: [&str; 4] = ["loop", "dm-snapshot", "xfs", "crc32c_generic"];

#[derive(clap::Args)]
pub struct Arguments {
    /// Where to put `lab/`; `current` in the cache when absent.
    #[arg(long)]
    out: Option<PathBuf>,
}

/// `lab/`: the modules, `order` with their names as they are to be loaded, `version` of the kernel in `kernels/` that they are for.
pub fn run(arguments: &Arguments) -> Result<()> {
    let out = match &arguments.out {
        Some(out) => out.clone(),
        None => artifact::cache()?.join("current"),
    };
    let made = package::with(META, |package| {
        let version = format!("{} {}", package.name, package.file_version);
        artifact::get(KIND, Key::default().text(RECIPE).text(&version).text(&WANTED.join(" ")), |dir| {
            make(package, dir)
        })
    })?;
    artifact::publish_folder(&made, &out.join(KIND))
}

fn make(package: &Package, out: &Path) -> Result<()> {
    let scratch = tempfile::tempdir_in(out)?;
    let tree = package.fetch(scratch.path())?;
    let below = find(&tree.join("lib/modules"), |_| true)?.context("the package holds no modules")?;
    let builtin = fs::read_to_string(below.join("modules.builtin")).unwrap_or_default();
    let mut found = Vec::new();
    collect(&below.join("kernel"), &mut found)?;
    let named = |path: &PathBuf| Some((plain(path.file_name()?.to_str()?.strip_suffix(".ko")?), path.clone()));
    let files: BTreeMap<String, PathBuf> = found.iter().filter_map(named).collect();
    let mut order = Vec::new();
    for name in WANTED {
        if !builtin.contains(&format!("/{name}.ko")) {
            load(&plain(name), &files, &mut order)?;
        }
    }
    for name in &order {
        fs::copy(&files[name], out.join(format!("{name}.ko")))?;
    }
    let lines: String = order.iter().map(|name| format!("{name}.ko\n")).collect();
    fs::write(out.join("order"), lines)?;
    Ok(fs::write(out.join("version"), package.semver()?)?)
}

/// A module after those that it depends on.
fn load(name: &str, files: &BTreeMap<String, PathBuf>, order: &mut Vec<String>) -> Result<()> {
    if order.iter().any(|loaded| loaded == name) {
        return Ok(());
    }
    let Some(file) = files.get(name) else { bail!("the package has no module {name}") };
    for needed in needs(&fs::read(file)?) {
        load(&needed, files, order)?;
    }
    order.push(name.to_owned());
    Ok(())
}

/// What a module says of itself: `depends=a,b`, ended by a zero.
fn needs(module: &[u8]) -> Vec<String> {
    const MARK: &[u8] = b"\0depends=";
    let Some(at) = module.windows(MARK.len()).position(|part| part == MARK) else { return Vec::new() };
    let text = &module[at + MARK.len()..];
    let end = text.iter().position(|byte| *byte == 0).unwrap_or(0);
    let names = String::from_utf8_lossy(&text[..end]).into_owned();
    names.split(',').filter(|name| !name.is_empty()).map(plain).collect()
}

/// Files and dependencies spell the same module in two ways.
fn plain(name: &str) -> String {
    name.replace('-', "_")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_says_what_it_needs() {
        assert_eq!(needs(b"x\0license=GPL\0depends=dm-mod,dm-bufio\0name=dm_snapshot\0"), ["dm_mod", "dm_bufio"]);
        assert!(needs(b"x\0depends=\0").is_empty() && needs(b"nothing").is_empty());
    }

    #[test]
    fn what_is_needed_comes_first() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, needs: &str| {
            let path = dir.path().join(name);
            fs::write(&path, format!("\0depends={needs}\0")).unwrap();
            (name.to_owned(), path)
        };
        let files = [file("a", "b,c"), file("b", "c"), file("c", "")].into();
        let mut order = Vec::new();
        load("a", &files, &mut order).unwrap();
        assert_eq!(order, ["c", "b", "a"]);
        assert!(load("d", &files, &mut order).is_err());
    }
}
