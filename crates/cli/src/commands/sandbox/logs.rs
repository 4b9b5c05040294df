//! `wrenn sandbox logs ID`: the console, as text.

use std::process::ExitCode;

use serde_json::json;

use crate::client::Client;
use crate::credentials::Options;
use crate::failure::Failure;
use crate::output::{Format, show};

#[derive(clap::Args)]
pub struct Arguments {
    id: String,
}

pub async fn run(arguments: &Arguments, options: &Options, format: Format) -> Result<ExitCode, Failure> {
    let client = Client::of_user(options)?;
    let text = client.get_text(client.url(&["v1", "sandboxes", &arguments.id, "console"])).await?;
    show(format, &json!({ "console": text }), |_| printable(&text))?;
    Ok(ExitCode::SUCCESS)
}

/// The guest is not trusted: what it writes must not steer this terminal.
fn printable(text: &str) -> String {
    text.trim_end().chars().filter(|c| !c.is_control() || matches!(c, '\n' | '\t')).collect()
}

#[cfg(test)]
mod tests {
    #[test]
    fn escapes_of_the_guest_do_not_reach_the_terminal() {
        assert_eq!(super::printable("a\r\n\x1b[2Jb\u{9b}1m\n"), "a\n[2Jb1m");
    }
}
