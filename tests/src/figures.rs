//! Figures: percentiles beside a floor, a limit, and the file that they are written to.
//!
//! A file such as builds/bench.json is a list of entries `{"name","unit","n","p50","p95","p99","floor_p50","ratio"}`; `floor_p50` and
//! `ratio` are null where there is no floor. Where something may fail there is `success`, from 0 to 1, and where the ratio is that of the
//! 99th percentiles there is `floor_p99`. Each entry also carries `max`, its `limit` in words, `ok`, and the `date`, `commit` and
//! `machine` of the run, so that an entry tells all of itself wherever it is copied to.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

pub struct Figure {
    name: &'static str,
    unit: &'static str,
    values: Vec<f64>,
    floor: Vec<f64>,
    /// The part of all that was tried of which there is a value.
    success: Option<f64>,
    /// Which rank is compared with the same of the floor.
    compared: usize,
}

/// What must hold. A figure without values breaks every limit but none.
pub enum Limit {
    None,
    /// The median, or the percentile that is compared, over the floor's.
    Ratio(f64),
    /// The median over the floor's, where more is better.
    RatioAtLeast(f64),
    P50(f64),
    P50AndP99(f64, f64),
    P50AtLeast(f64),
    Max(f64),
}

pub struct Judged {
    figure: Figure,
    limit: Limit,
}

impl Figure {
    pub fn of(name: &'static str, unit: &'static str, mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        Self { name, unit, values, floor: Vec::new(), success: None, compared: 50 }
    }

    pub fn beside(self, mut floor: Vec<f64>) -> Self {
        floor.sort_by(f64::total_cmp);
        Self { floor, ..self }
    }

    /// Of so many tries; one that failed breaks every limit.
    pub fn of_tries(self, tries: usize) -> Self {
        let success = Some(self.values.len() as f64 / tries as f64);
        Self { success, ..self }
    }

    /// Its ratio is that of the 99th percentiles.
    pub fn by_p99(self) -> Self {
        Self { compared: 99, ..self }
    }

    pub fn judged(self, limit: Limit) -> Judged {
        Judged { figure: self, limit }
    }

    fn ratio(&self) -> Option<f64> {
        Some(percentile(&self.values, self.compared)? / percentile(&self.floor, self.compared)?)
    }
}

impl Judged {
    pub fn is_fine(&self) -> bool {
        if self.figure.success.is_some_and(|part| part < 1.0) {
            return false;
        }
        let ratio = || self.figure.ratio();
        let rank = |percent| percentile(&self.figure.values, percent);
        match self.limit {
            Limit::None => true,
            Limit::Ratio(limit) => ratio().is_some_and(|ratio| ratio <= limit),
            Limit::RatioAtLeast(limit) => ratio().is_some_and(|ratio| ratio >= limit),
            Limit::P50(limit) => rank(50).is_some_and(|p50| p50 <= limit),
            Limit::P50AndP99(p50, p99) => {
                rank(50).is_some_and(|found| found <= p50) && rank(99).is_some_and(|found| found <= p99)
            }
            Limit::P50AtLeast(limit) => rank(50).is_some_and(|p50| p50 >= limit),
            Limit::Max(limit) => rank(100).is_some_and(|max| max <= limit),
        }
    }

    fn limit(&self) -> Option<String> {
        match self.limit {
            Limit::None => None,
            Limit::Ratio(limit) => Some(format!("ratio at most {limit}")),
            Limit::RatioAtLeast(limit) => Some(format!("ratio at least {limit}")),
            Limit::P50(limit) => Some(format!("p50 at most {limit}")),
            Limit::P50AndP99(p50, p99) => Some(format!("p50 at most {p50}, p99 at most {p99}")),
            Limit::P50AtLeast(limit) => Some(format!("p50 at least {limit}")),
            Limit::Max(limit) => Some(format!("max at most {limit}")),
        }
    }

    fn entry(&self, run: &Run) -> Value {
        let figure = &self.figure;
        let rank = |percent| percentile(&figure.values, percent).map(rounded);
        let mut entry = json!({
            "name": figure.name,
            "unit": figure.unit,
            "n": figure.values.len(),
            "p50": rank(50),
            "p95": rank(95),
            "p99": rank(99),
            "max": rank(100),
            "floor_p50": percentile(&figure.floor, 50).map(rounded),
            "ratio": figure.ratio().map(rounded),
            "limit": self.limit(),
            "ok": self.is_fine(),
            "date": run.date,
            "commit": run.commit,
            "machine": run.machine,
        });
        if let Some(success) = figure.success {
            entry["success"] = rounded(success).into();
        }
        if figure.compared != 50 {
            entry["floor_p99"] = percentile(&figure.floor, 99).map(rounded).into();
        }
        entry
    }
}

/// Nearest rank of sorted values: the smallest that so many in a hundred do not exceed.
fn percentile(sorted: &[f64], percent: usize) -> Option<f64> {
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted.get(rank - 1).copied()
}

fn rounded(value: f64) -> f64 {
    (value * 100.0).round() / 100.0
}

/// What all figures of a run share.
struct Run {
    date: String,
    commit: String,
    machine: String,
}

pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("this package lies below the root").to_owned()
}

/// Where a run's figures are written to.
pub fn place(name: &str) -> PathBuf {
    root().join("builds").join(name)
}

/// Makes sure that there is no file of an earlier run, and that there can be one of this.
pub fn forget(place: &Path) -> Result<()> {
    let folder = place.parent().expect("a file lies in a folder");
    std::fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
    match std::fs::remove_file(place) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove the old {}", place.display()))
        }
        _ => Ok(()),
    }
}

/// Writes the file and prints a table. `how` says beside the machine in which way it was used.
pub fn write(place: &Path, figures: &[Judged], how: &str) -> Result<()> {
    let run = Run {
        date: chrono::Utc::now().to_rfc3339_opts(chrono::SecondsFormat::Secs, true),
        commit: commit(),
        machine: format!("{}, {how}", machine()),
    };
    let entries: Vec<Value> = figures.iter().map(|figure| figure.entry(&run)).collect();
    let text = format!("{:#}\n", Value::from(entries.clone()));
    std::fs::write(place, text).with_context(|| format!("write {}", place.display()))?;
    println!("{:<24}{:>5}{:>11}{:>11}{:>11}{:>11}{:>8}  limit", "", "n", "p50", "p95", "p99", "floor p50", "ratio");
    for entry in entries {
        let number = |field: &str| entry[field].as_f64().map_or(String::new(), |value| format!("{value:.2}"));
        println!(
            "{:<24}{:>5}{:>11}{:>11}{:>11}{:>11}{:>8}  {}{}",
            format!("{} ({})", entry["name"].as_str().unwrap_or_default(), entry["unit"].as_str().unwrap_or_default()),
            entry["n"],
            number("p50"),
            number("p95"),
            number("p99"),
            number("floor_p50"),
            number("ratio"),
            entry["limit"].as_str().unwrap_or("-"),
            if entry["ok"] == true { "" } else { ": BROKEN" },
        );
    }
    Ok(())
}

/// With a mark when what was built is not what was committed.
fn commit() -> String {
    let git = |arguments: &[&str]| {
        let output = Command::new("git").args(arguments).current_dir(root()).stdin(Stdio::null()).output().ok()?;
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let Some(commit) = git(&["rev-parse", "--short=12", "HEAD"]) else { return "unknown".to_owned() };
    let is_clean = git(&["status", "--porcelain"]).is_some_and(|changes| changes.is_empty());
    if is_clean { commit } else { format!("{commit}, changed") }
}

fn machine() -> String {
    let read = |file: &str| std::fs::read_to_string(file).unwrap_or_default();
    let after = |text: &str, head: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(head)).unwrap_or_default();
        line.trim_start_matches([' ', '\t', ':']).to_owned()
    };
    let cpu = after(&read("/proc/cpuinfo"), "model name");
    let kib: u64 = after(&read("/proc/meminfo"), "MemTotal").trim_end_matches(" kB").parse().unwrap_or_default();
    let cores = std::thread::available_parallelism().map_or(0, |cores| cores.get());
    let kernel = read("/proc/sys/kernel/osrelease");
    format!("{} x {cpu}, {} MiB, Linux {}", cores, kib / 1024, kernel.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_hold_or_break() {
        let figure = || Figure::of("x", "ms", vec![3.0, 1.0, 2.0]).beside(vec![2.0, 1.0, 2.0]);
        for (limit, is_fine) in [
            (Limit::None, true),
            (Limit::Ratio(1.0), true),
            (Limit::Ratio(0.9), false),
            (Limit::RatioAtLeast(1.0), true),
            (Limit::RatioAtLeast(1.1), false),
            (Limit::P50(2.0), true),
            (Limit::P50(1.9), false),
            (Limit::P50AtLeast(2.0), true),
            (Limit::P50AtLeast(2.1), false),
            (Limit::Max(3.0), true),
            (Limit::Max(2.9), false),
        ] {
            let judged = figure().judged(limit);
            assert_eq!(judged.is_fine(), is_fine, "{:?}", judged.limit());
        }
        let burst = |tries| Figure::of("x", "ms", vec![1.0, 4.0]).beside(vec![1.0, 2.0]).of_tries(tries).by_p99();
        assert!(burst(2).judged(Limit::Ratio(2.0)).is_fine() && !burst(2).judged(Limit::Ratio(1.9)).is_fine());
        assert!(!burst(3).judged(Limit::Ratio(2.0)).is_fine());
        // Nothing measured is nothing proved.
        assert!(!Figure::of("x", "ms", vec![]).judged(Limit::P50(1.0)).is_fine());
        assert!(!Figure::of("x", "ms", vec![]).judged(Limit::P50AtLeast(0.0)).is_fine());
        assert!(!Figure::of("x", "ms", vec![1.0]).judged(Limit::Ratio(1.0)).is_fine());
    }

    #[test]
    fn an_entry_has_what_is_promised() {
        let run = Run { date: "d".to_owned(), commit: "c".to_owned(), machine: "m".to_owned() };
        let values: Vec<f64> = (1..=100).rev().map(f64::from).collect();
        let entry = Figure::of("x", "ms", values).beside(vec![25.0]).judged(Limit::Ratio(2.0)).entry(&run);
        let expected = json!({
            "name": "x", "unit": "ms", "n": 100, "p50": 50.0, "p95": 95.0, "p99": 99.0, "max": 100.0, "floor_p50": 25.0, "ratio": 2.0,
            "limit": "ratio at most 2", "ok": true, "date": "d", "commit": "c", "machine": "m",
        });
        assert_eq!(entry, expected);
    }
}
