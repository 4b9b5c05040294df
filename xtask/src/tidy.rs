//! `xtask tidy`: what the compiler does not check of the house's rules. Every finding names the file and the rule; all are told at once.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::{compat, run};

/// Which of our crates each may use. Arrows run from programs to promises to nouns; two programs never depend on each other.
const ARROWS: [(&str, &[&str]); 16] = [
    ("model", &[]),
    ("api", &["model"]),
    ("crashpoint", &[]),
    ("supervision", &[]),
    ("telemetry", &[]),
    ("microvm", &[]),
    ("store", &["model"]),
    ("envd", &["api"]),
    ("cli", &["api", "supervision"]),
    ("control-plane", &["api", "model", "store", "crashpoint", "supervision", "telemetry"]),
    ("host-agent", &["api", "model", "microvm", "crashpoint", "supervision", "telemetry"]),
    ("initramfs", &[]),
    ("testkit", &["api", "model", "store", "microvm", "crashpoint", "control-plane", "host-agent", "telemetry"]),
    ("vmm-simulator", &[]),
    // Nothing of these ships, so they may have what tests have.
    ("whole-machine", &["testkit", "microvm", "vmm-simulator"]),
    ("xtask", &["testkit"]),
];
/// Tests of the whole machine and chores.
const CHORES: [&str; 2] = ["whole-machine", "xtask"];
/// Only in tests and chores.
const DEV_ONLY: [&str; 2] = ["testkit", "vmm-simulator"];
/// Who may speak SQL.
const SQL: [&str; 2] = ["store", "testkit"];
/// Such a name gives a file no reason to refuse anything.
const NAMES_REFUSED: [&str; 6] = ["utils", "util", "helpers", "common", "misc", "manager"];
/// A path of one machine in a file of the repository is a mistake on every other machine.
const PLACES_REFUSED: [&str; 3] = ["/work/", "/root/.", "/tmp/brief"];
/// Lock files name where packages come from; only the public registry is the same for everybody.
const REGISTRY: &str = "registry+https://github.com/rust-lang/crates.io-index";

#[derive(clap::Args)]
pub struct Arguments {}

pub fn run(_: &Arguments) -> Result<()> {
    let root = run::root();
    let files = tracked(&root)?;
    let metadata = metadata(&root)?;
    let mut findings = Vec::new();
    arrows(&metadata, &mut findings);
    licences(&root, &metadata, &mut findings)?;
    compat::check(&root, &mut findings)?;
    for file in &files {
        names(file, &mut findings);
        // What was removed and not yet committed is still listed.
        let Ok(text) = std::fs::read_to_string(root.join(file)) else { continue };
        opens_with_docs(file, &text, &mut findings);
        speaks_sql(file, &text, &mut findings);
        places(file, &text, &mut findings);
    }
    error_pages(&root, &files, &mut findings)?;
    make_targets(&root, &files, &mut findings)?;
    links(&root, &files, &mut findings);
    prepared_queries(&root, &files, &mut findings);
    if findings.is_empty() {
        println!("tidy: {} files, {} rules of arrows, nothing to say", files.len(), ARROWS.len());
        return Ok(());
    }
    findings.iter().for_each(|finding| eprintln!("tidy: {finding}"));
    bail!("{} findings", findings.len())
}

fn tracked(root: &Path) -> Result<Vec<PathBuf>> {
    let list = run::text(Command::new("git").args(["ls-files"]).current_dir(root)).context("list the tracked files")?;
    Ok(list.lines().map(PathBuf::from).collect())
}

fn metadata(root: &Path) -> Result<Value> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command
        .args(["metadata", "--format-version=1", "--locked", "--filter-platform=x86_64-unknown-linux-gnu"])
        .current_dir(root);
    Ok(serde_json::from_slice(&run::output(&mut command)?)?)
}

fn text<'a>(value: &'a Value, field: &str) -> &'a str {
    value[field].as_str().unwrap_or_default()
}

fn items<'a>(value: &'a Value, field: &str) -> impl Iterator<Item = &'a Value> {
    value[field].as_array().into_iter().flatten()
}

fn arrows(metadata: &Value, findings: &mut Vec<String>) {
    let allowed: BTreeMap<&str, &[&str]> = ARROWS.into_iter().collect();
    let ours: Vec<&Value> = items(metadata, "packages").filter(|package| package["source"].is_null()).collect();
    let names: BTreeSet<&str> = ours.iter().map(|package| text(package, "name")).collect();
    for package in &ours {
        let name = text(package, "name");
        let Some(may) = allowed.get(name) else {
            findings.push(format!("the crate {name} has no place in the table of arrows (xtask/src/tidy.rs)"));
            continue;
        };
        for dependency in items(package, "dependencies") {
            let to = text(dependency, "name");
            let is_dev = dependency["kind"] == "dev";
            if !names.contains(to) {
                continue;
            }
            // Tests may use testkit, and what their own crate may use; nothing ships with them.
            let fine = if is_dev {
                to != "cli" && to != "xtask"
            } else {
                may.contains(&to) && (CHORES.contains(&name) || !DEV_ONLY.contains(&to))
            };
            if !fine {
                findings.push(format!("{name} depends on {to}: the arrows do not allow it"));
            }
        }
    }
}

/// Of what is built for Linux: every package's licence is on the list of deny.toml, and it comes from the public registry.
fn licences(root: &Path, metadata: &Value, findings: &mut Vec<String>) -> Result<()> {
    let deny = std::fs::read_to_string(root.join("deny.toml")).context("read deny.toml")?;
    let allowed = quoted(&deny, "allow = [");
    let denied = quoted(&deny, "deny = [");
    if allowed.is_empty() {
        bail!("deny.toml allows no licence");
    }
    let used = built(root)?;
    for package in items(metadata, "packages") {
        let name = format!("{} v{}", text(package, "name"), text(package, "version"));
        if !used.contains(&name) {
            continue;
        }
        if denied.iter().any(|crate_name| crate_name == text(package, "name")) {
            findings.push(format!("{name} is banned by deny.toml"));
        }
        if package["source"].is_null() {
            continue;
        }
        if text(package, "source") != REGISTRY {
            findings.push(format!("{name} comes from {}", text(package, "source")));
        }
        let licence = text(package, "license");
        if !permitted(licence, &allowed) {
            findings.push(format!("{name}: its licence {licence:?} is not on the list of deny.toml"));
        }
    }
    Ok(())
}

/// What is really built, as `name v1.2.3`: the metadata also lists what features that are off would pull in.
fn built(root: &Path) -> Result<BTreeSet<String>> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command
        .args(["tree", "--workspace", "--locked", "--edges=normal,build,dev", "--prefix=none", "--format={p}"])
        .args(["--target=x86_64-unknown-linux-gnu"])
        .current_dir(root);
    let tree = run::text(&mut command)?;
    Ok(tree.lines().map(|line| line.split(' ').take(2).collect::<Vec<_>>().join(" ")).collect())
}

/// The texts in quotation marks of the list that begins with `head`; comments are skipped.
fn quoted(toml: &str, head: &str) -> Vec<String> {
    let Some(begin) = toml.find(&format!("\n{head}")) else { return Vec::new() };
    let body = toml[begin + head.len() + 1..].lines().take_while(|line| line.trim() != "]");
    body.filter(|line| !line.trim_start().starts_with('#'))
        .flat_map(|line| line.split('"').skip(1).step_by(2).map(str::to_owned).collect::<Vec<_>>())
        .collect()
}

/// An SPDX expression of OR, AND, WITH and brackets; the old `/` stands for OR.
fn permitted(expression: &str, allowed: &[String]) -> bool {
    let expression = expression.replace('/', " OR ").replace('(', " ( ").replace(')', " ) ");
    let words: Vec<&str> = expression.split_whitespace().collect();
    let mut at = 0;
    !words.is_empty() && either(&words, &mut at, allowed) && at == words.len()
}

fn either(words: &[&str], at: &mut usize, allowed: &[String]) -> bool {
    let mut fine = both(words, at, allowed);
    while words.get(*at) == Some(&"OR") {
        *at += 1;
        fine |= both(words, at, allowed);
    }
    fine
}

fn both(words: &[&str], at: &mut usize, allowed: &[String]) -> bool {
    let mut fine = one(words, at, allowed);
    while words.get(*at) == Some(&"AND") {
        *at += 1;
        fine &= one(words, at, allowed);
    }
    fine
}

fn one(words: &[&str], at: &mut usize, allowed: &[String]) -> bool {
    let Some(word) = words.get(*at) else { return false };
    *at += 1;
    if *word == "(" {
        let fine = either(words, at, allowed);
        let is_closed = words.get(*at) == Some(&")");
        *at += 1;
        return fine && is_closed;
    }
    let mut licence = (*word).to_owned();
    if words.get(*at) == Some(&"WITH") {
        licence = format!("{licence} WITH {}", words.get(*at + 1).unwrap_or(&""));
        *at += 2;
    }
    allowed.contains(&licence)
}

fn names(file: &Path, findings: &mut Vec<String>) {
    for part in file.iter() {
        let stem = Path::new(part).file_stem().unwrap_or_default().to_string_lossy().to_lowercase();
        if NAMES_REFUSED.contains(&stem.as_str()) {
            findings.push(format!("{}: the name {stem} says nothing; name it by noun or verb", file.display()));
        }
    }
}

fn is_rust(file: &Path) -> bool {
    file.extension().is_some_and(|extension| extension == "rs")
}

fn opens_with_docs(file: &Path, text: &str, findings: &mut Vec<String>) {
    if is_rust(file) && !text.starts_with("//!") && !text.starts_with("#!") {
        findings.push(format!("{}: open it with //! (what it is, what it refuses)", file.display()));
    }
}

fn speaks_sql(file: &Path, text: &str, findings: &mut Vec<String>) {
    let Some(name) = crate_of(file) else { return };
    if is_rust(file) && !SQL.contains(&name.as_str()) && (text.contains("sqlx::") || text.contains("use sqlx")) {
        findings.push(format!("{}: only the store speaks SQL", file.display()));
    }
}

fn crate_of(file: &Path) -> Option<String> {
    let mut parts = file.iter();
    (parts.next()? == "crates").then(|| parts.next().map(|part| part.to_string_lossy().into_owned()))?
}

fn places(file: &Path, text: &str, findings: &mut Vec<String>) {
    // This list itself.
    if file == Path::new("xtask/src/tidy.rs") {
        return;
    }
    for (number, line) in text.lines().enumerate() {
        for place in PLACES_REFUSED.iter().filter(|place| line.contains(**place)) {
            findings.push(format!("{}:{}: names {place}, a place of one machine", file.display(), number + 1));
        }
    }
}

/// Each public error code has a page, and each page a code.
fn error_pages(root: &Path, files: &[PathBuf], findings: &mut Vec<String>) -> Result<()> {
    let place = files.iter().find(|file| {
        file.ends_with("control-plane/src/http/error.rs") || file.ends_with("control-plane/src/http/errors.rs")
    });
    let Some(place) = place else { return Ok(()) };
    let source = std::fs::read_to_string(root.join(place))?;
    let source = source.split("#[cfg(test)]").next().unwrap_or_default();
    let codes: BTreeSet<String> =
        source.split('"').skip(1).step_by(2).filter(|word| is_code(word)).map(str::to_owned).collect();
    let pages: BTreeSet<String> = files
        .iter()
        .filter(|file| file.starts_with("docs/errors"))
        .filter_map(|file| Some(file.file_stem()?.to_string_lossy().into_owned()))
        .filter(|stem| stem != "README" && stem != "index")
        .collect();
    // Words of other meaning stand in quotation marks too; a code is what both sides know, and what the wire types call one.
    let known = known_codes();
    for code in codes.iter().filter(|code| known.contains(&code.as_str())).filter(|code| !pages.contains(*code)) {
        findings.push(format!("{}: the code {code} has no page docs/errors/{code}.md", place.display()));
    }
    for page in pages.iter().filter(|page| !codes.contains(*page)) {
        findings.push(format!("docs/errors/{page}.md: {} knows no such code", place.display()));
    }
    Ok(())
}

fn is_code(word: &str) -> bool {
    word.len() > 3 && word.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_')
}

fn known_codes() -> Vec<&'static str> {
    "invalid_request unauthorized forbidden not_found method_not_allowed request_timeout invalid_state operation_in_progress conflict \
     template_in_use host_has_sandboxes gone too_large headers_too_large unsupported_media_type idempotency_key_reused quota_exceeded \
     rate_limited internal_error agent_error host_unavailable no_hosts_available unavailable deadline_exceeded insufficient_storage \
     not_acceptable not_implemented unsupported"
        .split_whitespace()
        .collect()
}

/// What the documents tell people to type exists.
fn make_targets(root: &Path, files: &[PathBuf], findings: &mut Vec<String>) -> Result<()> {
    let makefile = std::fs::read_to_string(root.join("Makefile")).context("read Makefile")?;
    let targets: BTreeSet<&str> = makefile
        .lines()
        .filter(|line| !line.starts_with(['\t', '#', '.', ' ']) && !line.contains(":="))
        .filter_map(|line| line.split_once(':'))
        .flat_map(|(names, _)| names.split_whitespace())
        .collect();
    for file in files.iter().filter(|file| file.extension().is_some_and(|extension| extension == "md")) {
        let Ok(text) = std::fs::read_to_string(root.join(file)) else { continue };
        for target in typed(&text, "make ") {
            if !targets.contains(target.as_str()) {
                findings
                    .push(format!("{}: tells of `make {target}`, which the Makefile does not have", file.display()));
            }
        }
    }
    Ok(())
}

/// Words after `command` where it begins code: after a backtick, or at the beginning of a line of a code block.
fn typed(text: &str, command: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut in_block = false;
    for line in text.lines() {
        if line.trim_start().starts_with("```") {
            in_block = !in_block;
            continue;
        }
        let starts: Vec<&str> = if in_block {
            line.trim_start().strip_prefix(command).into_iter().collect()
        } else {
            line.split('`').skip(1).step_by(2).filter_map(|code| code.strip_prefix(command)).collect()
        };
        for rest in starts {
            let word: String = rest.chars().take_while(|c| c.is_ascii_alphanumeric() || *c == '-').collect();
            if !word.is_empty() {
                found.push(word);
            }
        }
    }
    found
}

/// Links from one document to another file of the repository.
fn links(root: &Path, files: &[PathBuf], findings: &mut Vec<String>) {
    for file in files.iter().filter(|file| file.extension().is_some_and(|extension| extension == "md")) {
        let Ok(text) = std::fs::read_to_string(root.join(file)) else { continue };
        for target in text.split("](").skip(1).filter_map(|rest| rest.split_once(')')).map(|(target, _)| target) {
            let path = target.split('#').next().unwrap_or_default();
            let folder = file.parent().unwrap_or(Path::new(""));
            if !path.is_empty() && !path.contains(':') && !root.join(folder).join(path).exists() {
                findings.push(format!("{}: the link to {target} leads nowhere", file.display()));
            }
        }
    }
}

/// A fresh clone compiles without a database only with what `xtask sqlx` wrote.
fn prepared_queries(root: &Path, files: &[PathBuf], findings: &mut Vec<String>) {
    let uses_macros = files.iter().filter(|file| file.starts_with("crates/store/src")).any(|file| {
        std::fs::read_to_string(root.join(file)).is_ok_and(|text| {
            text.contains("query!(") || text.contains("query_as!(") || text.contains("query_scalar!(")
        })
    });
    let prepared = files.iter().any(|file| file.iter().any(|part| part == ".sqlx"));
    if uses_macros && !prepared {
        findings.push("crates/store checks its queries at compile time, and no .sqlx directory is tracked: run `cargo xtask sqlx`".to_owned());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn licence_expressions_are_understood() {
        let allowed: Vec<String> = ["MIT", "Apache-2.0", "Apache-2.0 WITH LLVM-exception"].map(str::to_owned).to_vec();
        for (expression, fine) in [
            ("MIT", true),
            ("MIT OR GPL-3.0", true),
            ("GPL-3.0 OR MIT", true),
            ("MIT AND GPL-3.0", false),
            ("MIT/Apache-2.0", true),
            ("(MIT OR GPL-3.0) AND Apache-2.0", true),
            ("(GPL-3.0 OR MPL-2.0) AND Apache-2.0", false),
            ("Apache-2.0 WITH LLVM-exception OR GPL-2.0", true),
            ("Apache-2.0 WITH Other", false),
            ("", false),
            ("MIT MIT", false),
            ("(MIT", false),
        ] {
            assert_eq!(permitted(expression, &allowed), fine, "{expression}");
        }
    }

    #[test]
    fn lists_are_read_without_their_comments() {
        let toml = "[x]\nallow = [\n  # \"GPL\",\n  \"MIT\",\n]\ndeny = [\n    { crate = \"ring\" },\n]\n";
        assert_eq!(
            (quoted(toml, "allow = ["), quoted(toml, "deny = [")),
            (vec!["MIT".to_owned()], vec!["ring".to_owned()])
        );
    }

    #[test]
    fn commands_in_documents_are_found() {
        let text = "Use `make demo`; make nothing of this.\n```\nmake check\n  make up DIR=x\n```\n";
        assert_eq!(typed(text, "make "), ["demo", "check", "up"]);
    }
}
