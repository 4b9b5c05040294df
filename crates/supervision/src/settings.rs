//! The names of all settings, and what a mistyped one was meant to be.

use tracing::warn;

/// Every setting there is, each on a line of its own, as a comment.
const ALL: &str = include_str!("../../../.env.example");
const PREFIX: &str = "WRENN_";
/// Only tests and their runners read these, and each may have its own.
const OF_TESTS: &str = "WRENN_TEST_";
/// Two names are nearly the same from here on, for who mistyped one. From 0 to 1.
const ALIKE: f64 = 0.85;

/// Whether some program of the platform reads it.
pub fn is_known(name: &str) -> bool {
    known().any(|known| known == name)
}

/// `; is NAME meant?` where a known name is nearly this one, else nothing: the end of a sentence that says that there is none such.
pub fn meant(name: &str) -> String {
    let nearest = known().map(|known| (strsim::jaro_winkler(known, name), known));
    let nearest = nearest.filter(|(likeness, _)| *likeness >= ALIKE).max_by(|a, b| a.0.total_cmp(&b.0));
    nearest.map(|(_, known)| format!("; is {known} meant?")).unwrap_or_default()
}

/// Says in the log which variables of the environment look like settings and are none: somebody believes in them. No reason not to start,
/// because the environment may be meant for another version.
pub fn warn_of_unknown() {
    // Their values may be secrets, and are not looked at.
    let names = std::env::vars_os().filter_map(|(name, _)| name.into_string().ok());
    for name in unknown(names) {
        warn!("the environment has {name}, and there is no such setting{}", meant(&name));
    }
}

fn unknown(names: impl Iterator<Item = String>) -> impl Iterator<Item = String> {
    names.filter(|name| name.starts_with(PREFIX) && !name.starts_with(OF_TESTS) && !is_known(name))
}

fn known() -> impl Iterator<Item = &'static str> {
    ALL.lines().filter_map(|line| line.strip_prefix("# ")?.split_once('=')).map(|(name, _)| name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_looks_like_a_setting_and_is_none_is_named_with_what_was_meant() {
        let names = ["WRENN_LOG", "WRENN_LOGG", "PATH", "WRENN_TEST_SEED", "WRENN_ZZZZZ", "wrenn_log", "DATABASE_URL"];
        let found: Vec<_> = unknown(names.into_iter().map(ToOwned::to_owned)).collect();
        assert_eq!(found, ["WRENN_LOGG", "WRENN_ZZZZZ"]);
        assert_eq!(meant("WRENN_LOGG"), "; is WRENN_LOG meant?");
        assert_eq!(meant("WRENN_ZZZZZ"), "");
    }
}
