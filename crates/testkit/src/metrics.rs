//! Reads what a program tells Prometheus, strictly: what another reader might understand in another way is an error here. Compares it, and
//! the document about it, with the program's table.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::Duration;

use telemetry::{Kind, Metric, Words};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

/// Nothing on loopback takes longer.
const READ_TIME_MAX: Duration = Duration::from_secs(10);

/// A name and its labels.
type Series = (String, BTreeMap<String, String>);

/// One page of numbers.
#[derive(Debug)]
pub struct Page {
    types: BTreeMap<String, String>,
    samples: BTreeMap<Series, f64>,
}

/// The head and the body of an answer.
pub async fn get(address: SocketAddr, path: &str) -> (String, String) {
    let read = async {
        let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").expect("an answer has a head");
        (head.to_owned(), body.to_owned())
    };
    tokio::time::timeout(READ_TIME_MAX, read).await.expect("metrics are told in time")
}

/// What is told now.
pub async fn scrape(address: SocketAddr) -> Page {
    let (head, body) = get(address, "/metrics").await;
    assert!(head.starts_with("HTTP/1.1 200 "), "{head}\n{body}");
    assert!(head.to_lowercase().contains("content-type: text/plain; version=0.0.4"), "{head}");
    Page::parse(&body).unwrap_or_else(|problem| panic!("{problem}\n{body}"))
}

/// Scrapes until the page is as wanted.
pub async fn until(address: SocketAddr, what: &str, is_so: impl Fn(&Page) -> bool) -> Page {
    let end = tokio::time::Instant::now() + Duration::from_secs(30);
    loop {
        let page = scrape(address).await;
        if is_so(&page) {
            return page;
        }
        assert!(tokio::time::Instant::now() < end, "{what} does not come: {page:?}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

impl Page {
    pub fn parse(text: &str) -> Result<Self, String> {
        if !text.ends_with('\n') {
            return Err("the last line has no end".to_owned());
        }
        let mut page = Self { types: BTreeMap::new(), samples: BTreeMap::new() };
        let mut helped = BTreeSet::new();
        for line in text.lines().filter(|line| !line.is_empty()) {
            let wrong = |what: &str| format!("{what}: {line:?}");
            if let Some(help) = line.strip_prefix("# HELP ") {
                let (name, _) = help.split_once(' ').ok_or_else(|| wrong("help without a text"))?;
                if !helped.insert(name.to_owned()) {
                    return Err(wrong("a second help"));
                }
            } else if let Some(kind) = line.strip_prefix("# TYPE ") {
                let (name, kind) = kind.split_once(' ').ok_or_else(|| wrong("no type"))?;
                if !["counter", "gauge", "histogram"].contains(&kind) || !is_name(name) {
                    return Err(wrong("a wrong type"));
                }
                if page.types.insert(name.to_owned(), kind.to_owned()).is_some() {
                    return Err(wrong("a second type"));
                }
            } else if line.starts_with('#') {
                return Err(wrong("neither HELP nor TYPE"));
            } else {
                let (name, labels, value) = sample(line).ok_or_else(|| wrong("no sample"))?;
                if page.family(&name).is_none() {
                    return Err(wrong("a sample before its type"));
                }
                if page.samples.insert((name, labels), value).is_some() {
                    return Err(wrong("a second sample"));
                }
            }
        }
        page.histograms()?;
        Ok(page)
    }

    /// Name and type of the metric whose sample bears this name.
    fn family<'a>(&'a self, sample: &'a str) -> Option<(&'a str, &'a str)> {
        if let Some(kind) = self.types.get(sample).filter(|kind| *kind != "histogram") {
            return Some((sample, kind));
        }
        let stem = ["_bucket", "_sum", "_count"].iter().find_map(|end| sample.strip_suffix(end))?;
        self.types.get(stem).filter(|kind| *kind == "histogram").map(|kind| (stem, kind.as_str()))
    }

    /// Buckets never fall, end with all, and agree with the count.
    fn histograms(&self) -> Result<(), String> {
        let mut buckets: BTreeMap<Series, Vec<(f64, f64)>> = BTreeMap::new();
        for ((name, labels), value) in &self.samples {
            let Some(stem) = name.strip_suffix("_bucket").filter(|stem| self.types.contains_key(*stem)) else {
                continue;
            };
            let mut labels = labels.clone();
            let bound = labels.remove("le").ok_or_else(|| format!("{name} has no bound"))?;
            let bound = number(&bound).ok_or_else(|| format!("{name} has the bound {bound:?}"))?;
            buckets.entry((stem.to_owned(), labels)).or_default().push((bound, *value));
        }
        for ((stem, labels), mut found) in buckets {
            found.sort_by(|a, b| a.0.total_cmp(&b.0));
            let falls = found.windows(2).any(|pair| pair[0].1 > pair[1].1);
            let count = self.samples.get(&(format!("{stem}_count"), labels.clone()));
            let last = found.last().copied().unwrap_or_default();
            if falls || last.0 != f64::INFINITY || count != Some(&last.1) {
                return Err(format!("{stem} {labels:?} does not add up"));
            }
            if !self.samples.contains_key(&(format!("{stem}_sum"), labels)) {
                return Err(format!("{stem} has no sum"));
            }
        }
        Ok(())
    }

    /// Of the sample with exactly these labels.
    pub fn value(&self, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
        let labels = labels.iter().map(|(name, word)| ((*name).to_owned(), (*word).to_owned())).collect();
        self.samples.get(&(name.to_owned(), labels)).copied()
    }

    /// Over all labels; 0 where there is no sample.
    pub fn sum(&self, name: &str) -> f64 {
        self.samples.iter().filter(|((known, _), _)| known == name).map(|(_, value)| value).sum()
    }

    /// Everything that is told is in the table, of the table's type and with the table's words, and what has no labels is told.
    pub fn conforms(&self, table: &[Metric]) -> Result<(), String> {
        let known: BTreeMap<&str, &Metric> = table.iter().map(|metric| (metric.name, metric)).collect();
        for (name, labels) in self.samples.keys() {
            let (family, kind) = self.family(name).expect("parsed samples have types");
            let metric = known.get(family).ok_or_else(|| format!("{family} is in no table"))?;
            if kind != word(metric.kind) {
                return Err(format!("{family} is told as a {kind}"));
            }
            let own: BTreeMap<&String, &String> = labels.iter().filter(|(label, _)| *label != "le").collect();
            let names: BTreeSet<&str> = own.keys().map(|label| label.as_str()).collect();
            if names != metric.labels.iter().map(|label| label.name).collect() {
                return Err(format!("{family} has the labels {names:?}"));
            }
            for label in metric.labels {
                let word = own[&label.name.to_owned()].as_str();
                if let Words::Of(words) = label.words
                    && !words.contains(&word)
                {
                    return Err(format!("{family} has {}={word:?}", label.name));
                }
            }
        }
        for metric in table.iter().filter(|metric| metric.labels.is_empty() && !matches!(metric.kind, Kind::Seconds(_)))
        {
            self.value(metric.name, &[]).ok_or_else(|| format!("{} is not told", metric.name))?;
        }
        Ok(())
    }
}

/// The rows of the table in docs/how-to/monitoring.md.
pub fn rows(table: &[Metric]) -> Vec<String> {
    let row = |metric: &Metric| {
        let labels: Vec<String> = metric
            .labels
            .iter()
            .map(|label| match label.words {
                Words::Of(words) => format!("`{}`: {}", label.name, words.join(", ")),
                Words::Open(bound) => format!("`{}`: {bound}", label.name),
            })
            .collect();
        let guards = metric.guards.unwrap_or_default();
        format!("| `{}` | {} | {} | {} | {guards} |", metric.name, word(metric.kind), labels.join("; "), metric.help)
    };
    table.iter().map(row).collect()
}

/// The document's table is that of the program.
pub fn is_documented(document: &str, table: &[Metric]) -> Result<(), String> {
    let missing: Vec<String> =
        rows(table).into_iter().filter(|row| !document.lines().any(|line| line == row)).collect();
    if missing.is_empty() { Ok(()) } else { Err(format!("these rows are missing:\n{}", missing.join("\n"))) }
}

/// The names in the first column of a document's tables.
pub fn documented(document: &str) -> BTreeSet<String> {
    let name = |line: &str| Some(line.strip_prefix("| `wrenn_")?.split('`').next()?.to_owned());
    document.lines().filter_map(name).map(|rest| format!("wrenn_{rest}")).collect()
}

fn word(kind: Kind) -> &'static str {
    match kind {
        Kind::Counter => "counter",
        Kind::Gauge => "gauge",
        Kind::Seconds(_) => "histogram",
    }
}

fn is_name(text: &str) -> bool {
    let mut letters = text.chars();
    letters.next().is_some_and(|first| first.is_ascii_alphabetic() || first == '_')
        && letters.all(|letter| letter.is_ascii_alphanumeric() || letter == '_')
}

fn number(text: &str) -> Option<f64> {
    match text {
        "+Inf" => Some(f64::INFINITY),
        "NaN" => Some(f64::NAN),
        _ => text.parse().ok().filter(|value: &f64| value.is_finite()),
    }
}

type Sample = (String, BTreeMap<String, String>, f64);

fn sample(line: &str) -> Option<Sample> {
    let end = line.find(['{', ' '])?;
    let (name, mut rest) = line.split_at(end);
    let mut labels = BTreeMap::new();
    if let Some(inside) = rest.strip_prefix('{') {
        rest = inside;
        loop {
            let (label, after) = rest.split_once("=\"")?;
            let (word, after) = quoted(after)?;
            if !is_name(label) || labels.insert(label.to_owned(), word).is_some() {
                return None;
            }
            match after.strip_prefix(',') {
                Some(more) => rest = more,
                None => {
                    rest = after.strip_prefix('}')?;
                    break;
                }
            }
        }
    }
    let value = number(rest.strip_prefix(' ')?)?;
    is_name(name).then(|| (name.to_owned(), labels, value))
}

/// What stands before the closing quotation mark, and what comes after it.
fn quoted(text: &str) -> Option<(String, &str)> {
    let mut word = String::new();
    let mut letters = text.char_indices();
    while let Some((at, letter)) = letters.next() {
        match letter {
            '"' => return Some((word, &text[at + 1..])),
            '\\' => word.push(match letters.next()?.1 {
                'n' => '\n',
                other @ ('\\' | '"') => other,
                _ => return None,
            }),
            other => word.push(other),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_is_right() {
        let text = "# HELP a_total Of a\n# TYPE a_total counter\na_total{b=\"c\\\"d\",e=\"f\"} 3\n\n# TYPE h histogram\n\
                    h_bucket{le=\"0.5\"} 1\nh_bucket{le=\"+Inf\"} 2\nh_sum 1.5\nh_count 2\n# TYPE g gauge\ng NaN\n";
        let page = Page::parse(text).unwrap();
        assert_eq!(page.value("a_total", &[("b", "c\"d"), ("e", "f")]), Some(3.0));
        assert_eq!(page.sum("h_count"), 2.0);
        assert!(page.value("g", &[]).unwrap().is_nan());
        assert_eq!(page.value("g", &[("x", "y")]), None);
    }

    #[test]
    fn refuses_what_is_wrong() {
        for text in [
            "# TYPE a gauge\na 1",
            "a 1\n",
            "# TYPE a gauge\na 1\na 1\n",
            "# TYPE a gauge\n# TYPE a gauge\na 1\n",
            "# TYPE a summary\n",
            "# TYPE a gauge\na{b=\"c} 1\n",
            "# TYPE a gauge\na{b=\"c\",b=\"d\"} 1\n",
            "# TYPE a gauge\na{b=\"c\"}1\n",
            "# TYPE a gauge\na one\n",
            "# TYPE a gauge\na inf\n",
            "# note\n",
            "# TYPE h histogram\nh_bucket{le=\"1\"} 2\nh_bucket{le=\"+Inf\"} 1\nh_sum 1\nh_count 1\n",
            "# TYPE h histogram\nh_bucket{le=\"1\"} 1\nh_sum 1\nh_count 1\n",
            "# TYPE h histogram\nh_bucket{le=\"+Inf\"} 1\nh_sum 1\nh_count 2\n",
            "# TYPE h histogram\nh 1\n",
        ] {
            assert!(Page::parse(text).is_err(), "{text}");
        }
    }
}
