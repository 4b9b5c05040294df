//! What envd says on the guest's console, when something needs saying.

use std::fmt::Arguments;
use std::io::Write as _;

/// One line. A console that fails is no reason to fail: `eprintln!` would panic.
pub fn say(line: Arguments<'_>) {
    let _ = writeln!(std::io::stderr().lock(), "envd: {line}");
}
