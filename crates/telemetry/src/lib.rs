//! What a program counts and measures of itself, and the port on which Prometheus reads it.
//!
//! Each program has one table of its [`Metric`]s: names, words of labels, what they say. What is not in the table is not described and
//! not in docs/how-to/monitoring.md, which a test compares with the table. Labels have words from closed lists (or the routes of the API):
//! no id is ever one. Used by control plane and host agent; it refuses to know what they measure.

mod listen;
mod serve;

use std::sync::OnceLock;
use std::time::Duration;

use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use tokio_util::sync::CancellationToken;

pub use listen::{BadListen, Listen};
pub use serve::{Look, serve};

/// A panic anywhere in the program, also one that was caught. Part of every table.
pub const PANICS: Metric = Metric {
    name: "wrenn_panics_total",
    kind: Kind::Counter,
    labels: &[],
    help: "Panics of this program, also those after which it went on",
    guards: Some("I17"),
};
/// Whether the values that are looked up when somebody asks are all of this moment. Part of every table.
pub const SCRAPE_COMPLETE: Metric = Metric {
    name: "wrenn_scrape_complete",
    kind: Kind::Gauge,
    labels: &[],
    help: "1 when everything that is looked up for this answer was looked up in time, else 0",
    guards: None,
};
/// Part of every table.
pub const BUILD: Metric = Metric {
    name: "wrenn_build_info",
    kind: Kind::Gauge,
    labels: &[Label { name: "version", words: Words::Open("the program's version") }],
    help: "Always 1; of which version the program is",
    guards: None,
};

/// Samples of histograms wait in memory until they are put into their buckets.
const UPKEEP_EVERY: Duration = Duration::from_secs(5);
/// Beyond so many series that begin at zero a table asks for too much.
const ZEROS_MAX: usize = 64;

/// One name, as it is told.
#[derive(Debug, Clone, Copy)]
pub struct Metric {
    pub name: &'static str,
    pub kind: Kind,
    pub labels: &'static [Label],
    pub help: &'static str,
    /// The invariants that are broken, or about to be, when it moves: then it is a page, not a graph.
    pub guards: Option<&'static str>,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Kind {
    Counter,
    Gauge,
    /// Seconds, in buckets with these upper bounds.
    Seconds(&'static [f64]),
}

#[derive(Debug, Clone, Copy)]
pub struct Label {
    pub name: &'static str,
    pub words: Words,
}

#[derive(Debug, Clone, Copy)]
pub enum Words {
    /// All that there are.
    Of(&'static [&'static str]),
    /// What bounds them.
    Open(&'static str),
}

#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    #[error("{name} has buckets that cannot be used")]
    Buckets { name: &'static str },
    #[error("something else counts for this process already")]
    Taken,
}

/// A count as a value; beyond four thousand millions it stays there.
pub fn counted(number: usize) -> f64 {
    u32::try_from(number).unwrap_or(u32::MAX).into()
}

/// What is wrong with the names of a table, for its test: each is there once, begins with `wrenn_` and says its unit.
pub fn misnamed(table: &[Metric]) -> Vec<&'static str> {
    let is_wrong = |metric: &Metric| {
        let is_twice = table.iter().filter(|other| other.name == metric.name).count() > 1;
        let is_counter = metric.kind == Kind::Counter;
        let is_time = matches!(metric.kind, Kind::Seconds(_));
        is_twice
            || !metric.name.starts_with("wrenn_")
            || metric.name.ends_with("_total") != is_counter
            || is_time && !metric.name.ends_with("_seconds")
    };
    table.iter().filter(|metric| is_wrong(metric)).map(|metric| metric.name).collect()
}

/// The numbers of this process.
#[derive(Clone)]
pub struct Telemetry {
    handle: PrometheusHandle,
}

/// Begins to count, once for the whole process; whoever comes later gets the same.
pub fn install(table: &'static [Metric], version: &'static str) -> Result<Telemetry, InstallError> {
    static INSTALLED: OnceLock<Telemetry> = OnceLock::new();
    static TURN: std::sync::Mutex<()> = std::sync::Mutex::new(());
    let _turn = TURN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if let Some(telemetry) = INSTALLED.get() {
        return Ok(telemetry.clone());
    }
    let mut builder = PrometheusBuilder::new();
    for metric in table {
        if let Kind::Seconds(bounds) = metric.kind {
            builder = builder
                .set_buckets_for_metric(Matcher::Full(metric.name.to_owned()), bounds)
                .map_err(|_| InstallError::Buckets { name: metric.name })?;
        }
    }
    let recorder = builder.build_recorder();
    let telemetry = Telemetry { handle: recorder.handle() };
    metrics::set_global_recorder(recorder).map_err(|_| InstallError::Taken)?;
    table.iter().for_each(describe);
    metrics::gauge!(BUILD.name, "version" => version).set(1.0);
    count_panics();
    Ok(INSTALLED.get_or_init(|| telemetry).clone())
}

impl Telemetry {
    /// The text format of Prometheus, version 0.0.4.
    pub fn render(&self) -> String {
        self.handle.render()
    }

    /// Keeps what nobody asks for small. For a tracked task.
    pub async fn keep(self, stop: CancellationToken) {
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(UPKEEP_EVERY) => self.handle.run_upkeep(),
            }
        }
    }
}

/// Says what it means; a counter is there from the beginning, because a rise from nothing is none to Prometheus.
fn describe(metric: &Metric) {
    match metric.kind {
        Kind::Counter => {
            metrics::describe_counter!(metric.name, metric.help);
            for labels in combinations(metric.labels) {
                metrics::counter!(metric.name, labels).increment(0);
            }
        }
        Kind::Gauge => metrics::describe_gauge!(metric.name, metric.help),
        Kind::Seconds(_) => metrics::describe_histogram!(metric.name, metrics::Unit::Seconds, metric.help),
    }
}

/// Every set of labels; none where there are too many, or where they are not known.
fn combinations(labels: &[Label]) -> Vec<Vec<metrics::Label>> {
    let mut found = vec![Vec::new()];
    for label in labels {
        let Words::Of(words) = label.words else { return Vec::new() };
        found = found
            .into_iter()
            .flat_map(|so_far: Vec<metrics::Label>| {
                words.iter().map(move |word| {
                    let mut with = so_far.clone();
                    with.push(metrics::Label::from_static_parts(label.name, word));
                    with
                })
            })
            .collect();
        if found.len() > ZEROS_MAX {
            return Vec::new();
        }
    }
    found
}

/// Whoever catches a panic, and be it the runtime, has it counted.
fn count_panics() {
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        metrics::counter!(PANICS.name).increment(1);
        before(panic);
    }));
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: [Metric; 4] = [
        PANICS,
        BUILD,
        Metric {
            name: "wrenn_test_total",
            kind: Kind::Counter,
            labels: &[
                Label { name: "kind", words: Words::Of(&["a", "b"]) },
                Label { name: "outcome", words: Words::Of(&["good", "bad"]) },
            ],
            help: "A test's",
            guards: None,
        },
        Metric {
            name: "wrenn_test_seconds",
            kind: Kind::Seconds(&[0.1, 1.0]),
            labels: &[],
            help: "A test's",
            guards: None,
        },
    ];

    #[test]
    fn tells_what_was_counted_and_what_was_not_yet() {
        let telemetry = install(&TABLE, "1").unwrap();
        metrics::counter!("wrenn_test_total", "kind" => "a", "outcome" => "bad").increment(2);
        metrics::histogram!("wrenn_test_seconds").record(0.5);
        let panicked = std::panic::catch_unwind(|| panic!("counted"));
        assert!(panicked.is_err());
        // A second install is the first one.
        let text = install(&TABLE, "1").unwrap().render();
        // The series of one name come in no order.
        let sorted = |text: String| {
            let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
            lines.sort();
            lines
        };
        assert_eq!(sorted(text.clone()), sorted(telemetry.render()));
        for line in [
            "# TYPE wrenn_test_total counter",
            "wrenn_test_total{kind=\"a\",outcome=\"bad\"} 2",
            "wrenn_test_total{kind=\"b\",outcome=\"good\"} 0",
            "wrenn_test_seconds_bucket{le=\"0.1\"} 0",
            "wrenn_test_seconds_bucket{le=\"1\"} 1",
            "wrenn_panics_total 1",
            "wrenn_build_info{version=\"1\"} 1",
        ] {
            assert!(text.lines().any(|told| told == line), "{line} is not in\n{text}");
        }
    }

    #[test]
    fn what_is_not_bounded_does_not_begin_at_zero() {
        let open = Label { name: "route", words: Words::Open("routes") };
        assert!(combinations(&[open]).is_empty());
        let many = Label { name: "x", words: Words::Of(&["0", "1", "2", "3", "4", "5", "6", "7", "8"]) };
        assert!(combinations(&[many, many]).is_empty());
        assert_eq!(combinations(&[many]).len(), 9);
        assert_eq!(combinations(&[]).len(), 1);
    }
}
