//! `xtask sqlx`: asks a throw-away PostgreSQL about every query of the store and keeps the answers in `.sqlx`, with which everybody
//! compiles. It needs no database of yours and never looks at DATABASE_URL.
//!
//! sqlx's macros write what they learn into SQLX_OFFLINE_DIR when they are compiled against a server; that is all that `cargo sqlx
//! prepare` does, too.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::SystemTime;

use anyhow::{Context as _, Result, bail, ensure};
use sha2::Digest as _;
use testkit::postgres::Server;

use crate::run;

const DATABASE: &str = "prepare";

#[derive(clap::Args)]
pub struct Arguments {
    /// Change nothing; fail when `.sqlx` is not what the queries and the migrations of now make.
    #[arg(long)]
    check: bool,
    /// For a release: keep what this version asks of the database, and what its migrations are, for the tests of versions to come.
    #[arg(long, conflicts_with = "check")]
    keep: bool,
}

/// File name to content.
type Prepared = BTreeMap<OsString, Vec<u8>>;

pub fn run(arguments: &Arguments) -> Result<()> {
    let root = run::root();
    let place = root.join(".sqlx");
    let asked = ask(&root)?;
    let kept = read(&place)?;
    let changed = differences(&kept, &asked);
    if arguments.check {
        ensure!(
            changed.is_empty(),
            "the queries of crates/store and .sqlx differ ({}): run `cargo xtask sqlx` and commit .sqlx",
            changed.join(", ")
        );
        println!("sqlx: {} queries, as they are in .sqlx", asked.len());
        return Ok(());
    }
    std::fs::create_dir_all(&place).with_context(|| format!("make {}", place.display()))?;
    for name in kept.keys().filter(|name| !asked.contains_key(*name)) {
        std::fs::remove_file(place.join(name)).with_context(|| format!("remove the stale {}", name.display()))?;
    }
    // What has not changed is not written again: compilers look at the time.
    for (name, content) in asked.iter().filter(|(name, content)| kept.get(*name) != Some(content)) {
        std::fs::write(place.join(name), content).with_context(|| format!("write {}", name.display()))?;
    }
    println!("sqlx: {} queries, {} files changed", asked.len(), changed.len());
    if arguments.keep { keep(&root, &asked) } else { Ok(()) }
}

/// The queries with the types of their columns, under the number of the newest migration; and each migration with its digest.
fn keep(root: &Path, asked: &Prepared) -> Result<()> {
    let folder = root.join("crates/store/tests/released");
    std::fs::create_dir_all(&folder).with_context(|| format!("make {}", folder.display()))?;
    let mut queries = Vec::new();
    for content in asked.values() {
        let answer: serde_json::Value = serde_json::from_slice(content)?;
        let columns: Vec<_> = answer["describe"]["columns"].as_array().into_iter().flatten().collect();
        let of = |field: &str| -> Vec<_> { columns.iter().map(|column| column[field].clone()).collect() };
        queries.push(serde_json::json!({ "query": answer["query"], "names": of("name"), "types": of("type_info") }));
    }
    queries.sort_by_key(|query| query["query"].as_str().unwrap_or_default().to_owned());
    let mut sums = String::new();
    let mut newest = String::new();
    for migration in migrations(&root.join("crates/store/migrations"))? {
        let name = migration.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let digest = sha2::Sha256::digest(std::fs::read(&migration)?);
        let hex: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        sums.push_str(&format!("{hex}  {name}\n"));
        newest = name.split('_').next().unwrap_or_default().to_owned();
    }
    let lines: Vec<String> = queries.iter().map(ToString::to_string).collect();
    std::fs::write(folder.join(format!("{newest}.json")), format!("[\n{}\n]\n", lines.join(",\n")))?;
    std::fs::write(folder.join("migrations.sha256"), sums)?;
    println!("sqlx: kept {} queries of the schema {newest}", queries.len());
    Ok(())
}

fn ask(root: &Path) -> Result<Prepared> {
    let server = Server::start().context("start a throw-away PostgreSQL")?;
    let url = server.create_database(DATABASE)?;
    for migration in migrations(&root.join("crates/store/migrations"))? {
        server.run_file(DATABASE, &migration).with_context(|| format!("apply {}", migration.display()))?;
    }
    let answers = tempfile::tempdir().context("make a scratch directory")?;
    let _touched = Touched::now(&root.join("crates/store/src/lib.rs"))?;
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut check = Command::new(cargo);
    check.args(["check", "--locked", "--quiet", "--package=store", "--lib"]).current_dir(root);
    check.env("DATABASE_URL", url).env("SQLX_OFFLINE", "false").env("SQLX_OFFLINE_DIR", answers.path());
    // Wrappers may answer from a cache, without running the macros.
    check.env_remove("RUSTC_WRAPPER").env_remove("RUSTC_WORKSPACE_WRAPPER");
    run::output(&mut check).context("compile the store against PostgreSQL")?;
    let asked = read(answers.path())?;
    if asked.is_empty() && !read(&root.join(".sqlx"))?.is_empty() {
        bail!("compiling the store wrote nothing about its queries: has it been compiled at all?");
    }
    Ok(asked)
}

/// A file that looks changed, because cargo compiles nothing when nothing has changed. Afterwards it is as old as it was, or every other
/// build would compile it once more.
struct Touched {
    file: File,
    before: SystemTime,
    touched: SystemTime,
}

impl Touched {
    fn now(path: &Path) -> Result<Self> {
        let touch = || {
            let file = File::options().append(true).open(path)?;
            let modified = || file.metadata()?.modified();
            let before = modified()?;
            file.set_modified(SystemTime::now())?;
            let touched = modified()?;
            Ok::<_, std::io::Error>(Self { file, before, touched })
        };
        touch().with_context(|| format!("touch {}", path.display()))
    }
}

impl Drop for Touched {
    fn drop(&mut self) {
        let is_untouched = self.file.metadata().and_then(|file| file.modified()).is_ok_and(|now| now == self.touched);
        // Whoever wrote it meanwhile has really changed it.
        if is_untouched && let Err(error) = self.file.set_modified(self.before) {
            eprintln!("the store will be compiled once more than needed: {error}");
        }
    }
}

/// In the order of their numbers, in which they are applied.
fn migrations(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(folder).with_context(|| format!("read {}", folder.display()))?;
    let mut files: Vec<PathBuf> = entries.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
    files.retain(|file| file.extension().is_some_and(|extension| extension == "sql"));
    files.sort();
    ensure!(!files.is_empty(), "there is no migration in {}", folder.display());
    Ok(files)
}

fn read(folder: &Path) -> Result<Prepared> {
    if !folder.exists() {
        return Ok(Prepared::new());
    }
    let entries = std::fs::read_dir(folder).with_context(|| format!("read {}", folder.display()))?;
    entries
        .map(|entry| {
            let entry = entry?;
            Ok((entry.file_name(), std::fs::read(entry.path())?))
        })
        .filter(|file| !matches!(file, Ok((name, _)) if !name.to_string_lossy().starts_with("query-")))
        .collect()
}

fn differences(kept: &Prepared, asked: &Prepared) -> Vec<String> {
    let missing = asked.keys().filter(|name| !kept.contains_key(*name)).map(|name| ("missing", name));
    let stale = kept.keys().filter(|name| !asked.contains_key(*name)).map(|name| ("stale", name));
    let other = asked.iter().filter(|(name, content)| kept.get(*name).is_some_and(|kept| kept != *content));
    let other = other.map(|(name, _)| ("other", name));
    missing.chain(stale).chain(other).map(|(what, name)| format!("{what} {}", name.display())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_difference_is_told() {
        let files = |all: &[(&str, &str)]| -> Prepared {
            all.iter().map(|(name, text)| (OsString::from(name), text.as_bytes().to_vec())).collect()
        };
        let kept = files(&[("a", "1"), ("b", "1"), ("c", "1")]);
        let asked = files(&[("a", "1"), ("b", "2"), ("d", "1")]);
        assert_eq!(differences(&kept, &asked), ["missing d", "stale c", "other b"]);
        assert!(differences(&kept, &kept).is_empty());
    }

    #[test]
    fn migrations_are_in_order() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["0010_x.sql", "0002_y.sql", "README.md"] {
            std::fs::write(dir.path().join(name), "").unwrap();
        }
        let names: Vec<_> =
            migrations(dir.path()).unwrap().iter().map(|file| file.file_name().unwrap().to_owned()).collect();
        assert_eq!(names, ["0002_y.sql", "0010_x.sql"]);
    }
}
