//! Conditions of a download (RFC 9110, 13): whether the client has the file already, and whether its range is of this file.

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt as _;
use std::time::{Duration, SystemTime};

use chrono::{DateTime, Utc};
use http::header::{ETAG, IF_MATCH, IF_MODIFIED_SINCE, IF_NONE_MATCH, IF_RANGE, IF_UNMODIFIED_SINCE, LAST_MODIFIED};
use http::{HeaderMap, HeaderName, HeaderValue};

/// A file that was changed less long ago may change again without its times telling: the kernel's clock for them ticks every few
/// milliseconds.
const SETTLED_AFTER: Duration = Duration::from_secs(1);

/// What identifies the content of a file at one time.
pub struct Validators {
    /// Quoted, without `W/`.
    tag: String,
    /// Until a file has settled its tag is weak: good to say "you have it", not good to join two parts of it.
    is_weak: bool,
    /// HTTP knows whole seconds only.
    modified: i64,
}

#[derive(Debug, PartialEq, Eq)]
pub enum Verdict {
    Send,
    /// 304
    Unmodified,
    /// 412
    Failed,
}

impl Validators {
    /// `coding` is part of the tag: packed it is another representation.
    pub fn of(metadata: &Metadata, coding: &str, now: SystemTime) -> Self {
        let changed = metadata.mtime().max(metadata.ctime());
        let age = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs().cast_signed() - changed;
        let [inode, size] = [metadata.ino(), metadata.size()];
        let [modified, changed] =
            [(metadata.mtime(), metadata.mtime_nsec()), (metadata.ctime(), metadata.ctime_nsec())]
                .map(|(seconds, nanoseconds)| seconds.wrapping_mul(1_000_000_000).wrapping_add(nanoseconds));
        Self {
            tag: format!("\"{inode:x}-{size:x}-{modified:x}-{changed:x}{coding}\""),
            is_weak: age <= SETTLED_AFTER.as_secs().cast_signed(),
            modified: metadata.mtime(),
        }
    }

    pub fn add_to(&self, headers: &mut HeaderMap) {
        let tag = format!("{}{}", if self.is_weak { "W/" } else { "" }, self.tag);
        let modified = DateTime::<Utc>::from_timestamp(self.modified, 0);
        let modified = modified.map(|time| time.format("%a, %d %b %Y %H:%M:%S GMT").to_string());
        for (name, value) in [(ETAG, Some(tag)), (LAST_MODIFIED, modified)] {
            if let Some(value) = value.and_then(|value| HeaderValue::from_str(&value).ok()) {
                headers.insert(name, value);
            }
        }
    }

    /// In the order of RFC 9110, 13.2.2.
    pub fn judge(&self, headers: &HeaderMap) -> Verdict {
        if headers.contains_key(IF_MATCH) {
            if !tags(headers, IF_MATCH).any(|tag| tag == "*" || self.is_strongly(tag)) {
                return Verdict::Failed;
            }
        } else if date(headers, IF_UNMODIFIED_SINCE).is_some_and(|date| self.modified > date) {
            return Verdict::Failed;
        }
        if headers.contains_key(IF_NONE_MATCH) {
            if tags(headers, IF_NONE_MATCH).any(|tag| tag == "*" || tag.strip_prefix("W/").unwrap_or(tag) == self.tag) {
                return Verdict::Unmodified;
            }
        } else if date(headers, IF_MODIFIED_SINCE).is_some_and(|date| self.modified <= date) {
            return Verdict::Unmodified;
        }
        Verdict::Send
    }

    /// Whether a range may be taken from this file.
    pub fn are_of_range(&self, headers: &HeaderMap) -> bool {
        let Some(condition) = headers.get(IF_RANGE) else { return true };
        let condition = condition.to_str().unwrap_or_default().trim();
        if condition.contains('"') {
            return self.is_strongly(condition);
        }
        // A date is weak until the second is over.
        !self.is_weak && parse_date(condition) == Some(self.modified)
    }

    fn is_strongly(&self, tag: &str) -> bool {
        !self.is_weak && tag == self.tag
    }
}

/// Ours hold no comma.
fn tags(headers: &HeaderMap, name: HeaderName) -> impl Iterator<Item = &str> {
    let values = headers.get_all(name).into_iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).map(str::trim)
}

/// `None` when there is none or none that can be read: such a condition is ignored.
fn date(headers: &HeaderMap, name: HeaderName) -> Option<i64> {
    headers.get(name).and_then(|value| parse_date(value.to_str().ok()?))
}

fn parse_date(text: &str) -> Option<i64> {
    DateTime::parse_from_rfc2822(text).ok().map(|date| date.timestamp())
}

#[cfg(test)]
mod tests {
    use super::*;

    const THEN: &str = "Sun, 06 Nov 1994 08:49:37 GMT";
    const BEFORE: &str = "Sun, 06 Nov 1994 08:49:36 GMT";

    fn settled() -> Validators {
        Validators { tag: "\"a\"".into(), is_weak: false, modified: 784_111_777 }
    }

    fn headers(all: &[(HeaderName, &str)]) -> HeaderMap {
        all.iter().map(|(name, value)| (name.clone(), value.parse().unwrap())).collect()
    }

    #[test]
    fn conditions_in_their_order() {
        for (asked, verdict) in [
            (&[][..], Verdict::Send),
            (&[(IF_NONE_MATCH, "\"a\"")], Verdict::Unmodified),
            (&[(IF_NONE_MATCH, "\"b\", W/\"a\"")], Verdict::Unmodified),
            (&[(IF_NONE_MATCH, "*")], Verdict::Unmodified),
            (&[(IF_NONE_MATCH, "\"b\""), (IF_MODIFIED_SINCE, THEN)], Verdict::Send),
            (&[(IF_MODIFIED_SINCE, THEN)], Verdict::Unmodified),
            (&[(IF_MODIFIED_SINCE, BEFORE)], Verdict::Send),
            (&[(IF_MODIFIED_SINCE, "yesterday")], Verdict::Send),
            (&[(IF_MATCH, "\"a\"")], Verdict::Send),
            (&[(IF_MATCH, "W/\"a\"")], Verdict::Failed),
            (&[(IF_MATCH, "\"b\""), (IF_NONE_MATCH, "\"a\"")], Verdict::Failed),
            (&[(IF_UNMODIFIED_SINCE, BEFORE)], Verdict::Failed),
            (&[(IF_UNMODIFIED_SINCE, THEN)], Verdict::Send),
        ] {
            assert_eq!(settled().judge(&headers(asked)), verdict, "{asked:?}");
        }
    }

    #[test]
    fn a_range_is_of_the_same_file_or_not_taken() {
        for (condition, same) in
            [("\"a\"", true), ("\"b\"", false), ("W/\"a\"", false), (THEN, true), (BEFORE, false), ("x", false)]
        {
            assert_eq!(settled().are_of_range(&headers(&[(IF_RANGE, condition)])), same, "{condition}");
        }
        let fresh = Validators { is_weak: true, ..settled() };
        for condition in ["\"a\"", "W/\"a\"", THEN] {
            assert!(!fresh.are_of_range(&headers(&[(IF_RANGE, condition)])), "{condition}");
        }
        assert!(fresh.are_of_range(&HeaderMap::new()));
        assert_eq!(fresh.judge(&headers(&[(IF_NONE_MATCH, "W/\"a\"")])), Verdict::Unmodified);
    }

    #[test]
    fn what_is_told_can_be_asked() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let metadata = file.as_file().metadata().unwrap();
        let later = metadata.modified().unwrap() + Duration::from_secs(5);
        let mut told = HeaderMap::new();
        Validators::of(&metadata, "", later).add_to(&mut told);
        let asked = [(IF_NONE_MATCH, ETAG), (IF_MODIFIED_SINCE, LAST_MODIFIED)];
        for (condition, header) in asked {
            let asked = HeaderMap::from_iter([(condition, told[&header].clone())]);
            assert_eq!(Validators::of(&metadata, "", later).judge(&asked), Verdict::Unmodified, "{header}");
        }
        let asked = HeaderMap::from_iter([(IF_NONE_MATCH, told[ETAG].clone())]);
        assert_eq!(Validators::of(&metadata, "-gzip", later).judge(&asked), Verdict::Send);
        Validators::of(&metadata, "", metadata.modified().unwrap()).add_to(&mut told);
        assert!(told[ETAG].to_str().unwrap().starts_with("W/"));
    }
}
