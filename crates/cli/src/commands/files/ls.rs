//! `wrenn files ls SANDBOX[:PATH]`.

use std::process::ExitCode;

use chrono::DateTime;

use super::As;
use super::remote::{Remote, is_directory};
use crate::client::Client;
use crate::credentials::Options;
use crate::failure::Failure;
use crate::output::{Format, show, table};
use crate::place::InSandbox;
use crate::printable::escaped;
use api::v1::files::{FileEntries, FileEntry};

#[derive(clap::Args)]
pub struct Arguments {
    /// SANDBOX:PATH; SANDBOX alone is the home in it.
    place: String,
    /// So many levels: 1 is the directory itself.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    depth: u32,
    #[command(flatten)]
    who: As,
}

pub async fn run(arguments: &Arguments, options: &Options, format: Format) -> Result<ExitCode, Failure> {
    let client = Client::of_user(options)?;
    let remote = Remote { client: &client, user: arguments.who.user.as_deref() };
    let place = InSandbox::or_home(&arguments.place)?;
    let entry = remote.stat(&place).await?;
    let listing = match is_directory(&entry) {
        true => remote.list(&place, arguments.depth).await?,
        // As `ls` of a file.
        false => FileEntries { entries: vec![entry] },
    };
    show(format, &listing, |listing| {
        let rows = listing.entries.iter().map(|entry| row(entry, arguments.depth > 1)).collect();
        table(&["MODE", "OWNER", "GROUP", "SIZE", "MODIFIED", "NAME"], rows)
    })?;
    Ok(ExitCode::SUCCESS)
}

fn row(entry: &FileEntry, is_deep: bool) -> Vec<String> {
    let name = escaped(if is_deep { &entry.path } else { &entry.name });
    let name = match (&entry.symlink_target, is_directory(entry)) {
        (Some(target), _) => format!("{name} -> {}", escaped(target)),
        (None, true) => format!("{name}/"),
        (None, false) => name,
    };
    vec![
        escaped(&entry.permissions),
        escaped(&entry.owner),
        escaped(&entry.group),
        entry.size.to_string(),
        time(entry.modified_at),
        name,
    ]
}

/// Of the guest, so it may be anything.
pub fn time(seconds: i64) -> String {
    DateTime::from_timestamp(seconds, 0).map(|at| at.format("%Y-%m-%d %H:%M:%S").to_string()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_the_guest_are_shown_and_not_obeyed() {
        let entry = FileEntry {
            name: "a\x1b[2J\n".into(),
            path: "/tmp/a".into(),
            kind: "symlink".into(),
            size: 3,
            mode: 0o777,
            permissions: "lrwxrwxrwx".into(),
            owner: "ro\rot".into(),
            group: "root".into(),
            modified_at: i64::MAX,
            symlink_target: Some("b\x07".into()),
        };
        let row = row(&entry, false);
        assert_eq!(row, ["lrwxrwxrwx", "ro\\rot", "root", "3", "", "a\\u{1b}[2J\\n -> b\\u{7}"]);
    }
}
