//! What a test wants to go wrong: lines of a file named `simulate` in the working directory, read at each call.
//!
//! A jail has no environment, so a file it is. The words:
//!
//! ```text
//! exit-at=/snapshot/create                    the process ends instead of answering
//! silent-at=/vm                               it never answers
//! slow-at=/snapshot/load:500                  it waits so many milliseconds first
//! fail-at=/snapshot/create:no space left      it refuses with this text and does nothing
//! lose-at=/snapshot/create:no space left      it refuses a save so, and does not know any more which pages were changed
//! ```

use std::time::Duration;

const FILE: &str = "simulate";

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Hook {
    Exit,
    Silent,
    Slow(Duration),
    Fail(String),
    Lose(String),
}

/// Those for one path, in the order of the file. A line that is not understood is for nobody.
pub fn for_path(path: &str) -> Vec<Hook> {
    let text = std::fs::read_to_string(FILE).unwrap_or_default();
    text.lines().filter_map(|line| parse(line, path)).collect()
}

fn parse(line: &str, path: &str) -> Option<Hook> {
    let (kind, what) = line.split_once('=')?;
    let (at, value) = what.split_once(':').unwrap_or((what, ""));
    if at != path {
        return None;
    }
    match kind {
        "exit-at" => Some(Hook::Exit),
        "silent-at" => Some(Hook::Silent),
        "slow-at" => value.parse().ok().map(Duration::from_millis).map(Hook::Slow),
        "fail-at" => Some(Hook::Fail(value.to_owned())),
        "lose-at" => Some(Hook::Lose(value.to_owned())),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_for_its_path() {
        for (line, hook) in [
            ("exit-at=/vm", Some(Hook::Exit)),
            ("exit-at=/vm/config", None),
            ("silent-at=/vm", Some(Hook::Silent)),
            ("slow-at=/vm:20", Some(Hook::Slow(Duration::from_millis(20)))),
            ("slow-at=/vm:soon", None),
            ("fail-at=/vm:a: b (os error 28)", Some(Hook::Fail("a: b (os error 28)".to_owned()))),
            ("", None),
        ] {
            assert_eq!(parse(line, "/vm"), hook, "{line}");
        }
    }
}
