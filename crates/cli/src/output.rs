//! What goes to standard output: JSON for scripts, tables and sentences for people. Progress goes to standard error, on a terminal only.

use std::io::{IsTerminal as _, Write as _};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;

use crate::failure::{Doing as _, Failure};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    Human,
    Json,
}

/// Prints `value` as JSON, or what `human` makes of it.
pub fn show<T: Serialize>(format: Format, value: &T, human: impl FnOnce(&T) -> String) -> Result<(), Failure> {
    let text = match format {
        Format::Json => serde_json::to_string(value).doing(|| "write JSON".to_owned())?,
        Format::Human => human(value),
    };
    print_line(&text)
}

/// A closed pipe (`wrenn sandbox list | head -1`) is an end, not a panic.
pub fn print_line(text: &str) -> Result<(), Failure> {
    if text.is_empty() {
        return Ok(());
    }
    let mut out = std::io::stdout().lock();
    match writeln!(out, "{text}").and_then(|()| out.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(error).doing(|| "write to standard output".to_owned())
        }
        _ => Ok(()),
    }
}

/// Columns without lines: easy to read, and to cut.
pub fn table(head: &[&str], rows: Vec<Vec<String>>) -> String {
    let mut table = comfy_table::Table::new();
    table.load_style(comfy_table::presets::NOTHING).set_header(head.iter().copied());
    for row in rows {
        table.add_row(row);
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table.lines().map(|line| line.trim_end().to_owned()).collect::<Vec<_>>().join("\n")
}

/// Two columns: names and values, those without a value left out.
pub fn facts(rows: &[(&str, String)]) -> String {
    let width = rows.iter().filter(|(_, value)| !value.is_empty()).map(|(name, _)| name.len()).max().unwrap_or(0);
    rows.iter()
        .filter(|(_, value)| !value.is_empty())
        .map(|(name, value)| format!("{name:width$}  {value}"))
        .collect::<Vec<_>>()
        .join("\n")
}

/// How long ago, in the two largest units.
pub fn age(since: chrono::DateTime<chrono::Utc>) -> String {
    let seconds = (chrono::Utc::now() - since).num_seconds().max(0);
    match seconds {
        0..=119 => format!("{seconds} s"),
        120..=7199 => format!("{} min", seconds / 60),
        7200..=172_799 => format!("{} h {} min", seconds / 3600, seconds % 3600 / 60),
        _ => format!("{} d", seconds / 86_400),
    }
}

/// A spinner with a sentence while something takes its time; nothing where standard error is no terminal.
pub fn spinner(format: Format, what: &str) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(None, target(format));
    bar.set_style(ProgressStyle::with_template("{spinner} {msg} {elapsed}").expect("the template is a constant"));
    bar.set_message(what.to_owned());
    if !bar.is_hidden() {
        bar.enable_steady_tick(Duration::from_millis(120));
    }
    bar
}

/// A bar of bytes; a counter when the size is not known.
pub fn bytes_bar(format: Format, total: Option<u64>) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(total, target(format));
    let template = match total {
        Some(_) => "{bar:30} {bytes}/{total_bytes} {bytes_per_sec} {eta}",
        None => "{spinner} {bytes} {bytes_per_sec}",
    };
    bar.set_style(ProgressStyle::with_template(template).expect("the templates are constants"));
    bar
}

fn target(format: Format) -> ProgressDrawTarget {
    match format {
        Format::Human if std::io::stderr().is_terminal() => ProgressDrawTarget::stderr(),
        _ => ProgressDrawTarget::hidden(),
    }
}
