//! `docs/compat/wrenn.md`: each route of the published API with the test that proves it, made of `wrenn.routes` beside it.
//!
//! What is checked, here and by `xtask tidy`: that the page is current, that each route is in the OpenAPI document, that each test that is
//! named exists, and that only what says why is without one.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::run;

const ROUTES: &str = "docs/compat/wrenn.routes";
const PAGE: &str = "docs/compat/wrenn.md";
const OPENAPI: &str = "docs/openapi.json";
/// Beside the API, and so not in the document.
const UNDOCUMENTED: [&str; 3] = ["/health", "/docs", "/openapi.yaml"];
const LATER: &str = "later:";

#[derive(clap::Args)]
pub struct Arguments {}

struct Route<'a> {
    section: &'a str,
    method: &'a str,
    path: &'a str,
    proof: &'a str,
    note: &'a str,
}

pub fn run(_: &Arguments) -> Result<()> {
    let root = run::root();
    let mut findings = Vec::new();
    let page = page(&root, &mut findings)?;
    if !findings.is_empty() {
        bail!("{ROUTES}:\n{}", findings.join("\n"));
    }
    std::fs::write(root.join(PAGE), page).with_context(|| format!("write {PAGE}"))
}

/// For `xtask tidy`.
pub fn check(root: &Path, findings: &mut Vec<String>) -> Result<()> {
    let page = page(root, findings)?;
    if std::fs::read_to_string(root.join(PAGE)).unwrap_or_default() != page {
        findings.push(format!("{PAGE}: is not what {ROUTES} says; run `scripts/xtask compat`"));
    }
    Ok(())
}

fn page(root: &Path, findings: &mut Vec<String>) -> Result<String> {
    let text = std::fs::read_to_string(root.join(ROUTES)).with_context(|| format!("read {ROUTES}"))?;
    let routes = parsed(&text)?;
    let known = documented(root)?;
    for route in &routes {
        if let Some(problem) = problem(root, &known, route) {
            findings.push(format!("{ROUTES}: {} {}: {problem}", route.method, route.path));
        }
    }
    Ok(written(&routes))
}

fn parsed(text: &str) -> Result<Vec<Route<'_>>> {
    let mut section = "";
    let mut routes = Vec::new();
    for line in text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')) {
        if let Some(title) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            section = title;
            continue;
        }
        let mut parts = line.split('|').map(str::trim);
        let (method, path) =
            parts.next().and_then(|name| name.split_once(' ')).context("a line begins with METHOD /path")?;
        let (Some(proof), Some(note), None) = (parts.next(), parts.next(), parts.next()) else {
            bail!("{ROUTES}: {line:?} has not three parts");
        };
        routes.push(Route { section, method, path, proof, note });
    }
    Ok(routes)
}

/// `METHOD /path` of the OpenAPI document.
fn documented(root: &Path) -> Result<BTreeSet<String>> {
    let text = std::fs::read_to_string(root.join(OPENAPI)).with_context(|| format!("read {OPENAPI}"))?;
    let document: Value = serde_json::from_str(&text).with_context(|| format!("read {OPENAPI}"))?;
    let paths = document["paths"].as_object().context("the document has paths")?;
    let methods = paths.iter().flat_map(|(path, item)| {
        let methods = item.as_object().into_iter().flat_map(|item| item.keys());
        methods.map(move |method| format!("{} {path}", method.to_uppercase()))
    });
    Ok(methods.collect())
}

fn problem(root: &Path, known: &BTreeSet<String>, route: &Route<'_>) -> Option<String> {
    if let Some(why) = route.proof.strip_prefix(LATER) {
        return why.trim().is_empty().then(|| "says not why it is for later".to_owned());
    }
    let ours = route.path.replacen("/v1/capsules", "/v1/sandboxes", 1);
    if !UNDOCUMENTED.contains(&route.path) && !known.contains(&format!("{} {ours}", route.method)) {
        return Some(format!("is not in {OPENAPI}"));
    }
    let proofs: Vec<&str> = route.proof.split(',').map(str::trim).filter(|proof| !proof.is_empty()).collect();
    if proofs.is_empty() {
        return Some("has no test".to_owned());
    }
    proofs.into_iter().find_map(|proof| {
        let (file, function) = proof.split_once("::").unwrap_or((proof, ""));
        let text = std::fs::read_to_string(root.join(file)).unwrap_or_default();
        (text.is_empty() || !text.contains(&format!("fn {function}"))).then(|| format!("there is no test {proof}"))
    })
}

fn written(routes: &[Route<'_>]) -> String {
    let holes = routes.iter().filter(|route| route.proof.starts_with(LATER)).count();
    let mut page = format!(
        "# The published Wrenn API, route by route\n\n\
         Made by `scripts/xtask compat` of [wrenn.routes](wrenn.routes); `make check` fails when it is not current, when a route is not there, or when a\n\
         test that it names is not. `/v1/capsules` and `/v1/sandboxes` are the same routes. Beside these there are others: [openapi.json](../openapi.json).\n\n\
         {} of {} routes are there and proven by a test.\n",
        routes.len() - holes,
        routes.len()
    );
    let mut section = "";
    for route in routes {
        if route.section != section {
            section = route.section;
            let _ = write!(page, "\n## {section}\n\n| route | proven by | differs |\n|---|---|---|\n");
        }
        let proof = match route.proof.strip_prefix(LATER) {
            Some(why) => format!("**not yet**: {}", why.trim()),
            None => route.proof.split(',').map(|proof| shown(proof.trim())).collect::<Vec<_>>().join(", "),
        };
        let _ = writeln!(page, "| `{} {}` | {proof} | {} |", route.method, route.path, route.note);
    }
    page
}

/// The test, linked to its file.
fn shown(proof: &str) -> String {
    let (file, function) = proof.split_once("::").unwrap_or((proof, ""));
    let name = if function.is_empty() { file.rsplit('/').next().unwrap_or(file) } else { function };
    format!("[`{name}`](../../{file})")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read_and_what_lacks_a_test_is_found() {
        let text = "# x\n[Files]\nPOST /v1/capsules/{id}/a | f.rs::g | n\nGET /v1/b | later: why |\nGET /v1/c | | \n";
        let routes = parsed(text).unwrap();
        assert_eq!((routes[0].section, routes[0].method, routes[0].note), ("Files", "POST", "n"));
        let known = ["POST /v1/sandboxes/{id}/a", "GET /v1/c"].map(str::to_owned).into();
        let root = tempfile::tempdir().unwrap();
        let problems = || routes.iter().map(|route| problem(root.path(), &known, route)).collect::<Vec<_>>();
        assert_eq!(problems()[0].as_deref(), Some("there is no test f.rs::g"));
        assert_eq!(problems()[1], None);
        assert_eq!(problems()[2].as_deref(), Some("has no test"));
        std::fs::write(root.path().join("f.rs"), "fn g() {}").unwrap();
        assert_eq!(problems()[0], None);
        assert!(written(&routes).contains("2 of 3 routes"));
        assert!(parsed("GET /v1/b | x").is_err());
    }
}
