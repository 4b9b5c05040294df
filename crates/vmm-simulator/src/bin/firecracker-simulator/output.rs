//! Where the VMM writes for people: serial line, log and metrics. None of it is part of a snapshot.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::time::Instant;

use crate::config::{Level, Logger, Serial, TokenBucket};

/// Never waits for a reader: a FIFO that nobody reads is an error.
pub fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().write(true).create(true).truncate(false).custom_flags(libc::O_NONBLOCK).open(path)
}

/// What the guest prints. A reader that is slow or gone loses lines; the guest does not wait.
pub struct SerialLine {
    target: Option<File>,
    bucket: Option<Bucket>,
}

impl SerialLine {
    pub fn open(config: &Serial) -> io::Result<Self> {
        let target = config.serial_out_path.as_deref().map(open).transpose()?;
        Ok(Self { target, bucket: config.rate_limiter.map(Bucket::new) })
    }

    pub fn write(&mut self, line: &str) {
        let line = format!("{line}\r\n");
        if self.bucket.as_mut().is_some_and(|bucket| !bucket.take(line.len() as u64)) {
            return;
        }
        let _ = match &mut self.target {
            Some(file) => file.write_all(line.as_bytes()),
            None => io::stdout().lock().write_all(line.as_bytes()),
        };
    }
}

/// What does not fit is dropped, and never delayed.
struct Bucket {
    config: TokenBucket,
    left: u64,
    burst: u64,
    since: Instant,
}

impl Bucket {
    fn new(config: TokenBucket) -> Self {
        Self { config, left: config.size, burst: config.one_time_burst.unwrap_or(0), since: Instant::now() }
    }

    fn take(&mut self, bytes: u64) -> bool {
        if self.burst >= bytes {
            self.burst -= bytes;
            return true;
        }
        let passed = u64::try_from(self.since.elapsed().as_millis()).unwrap_or(u64::MAX);
        let back = self.config.size.saturating_mul(passed) / self.config.refill_time.max(1);
        if back > 0 {
            self.left = self.left.saturating_add(back).min(self.config.size);
            self.since = Instant::now();
        }
        let fits = self.left >= bytes;
        if fits {
            self.left -= bytes;
        }
        fits
    }
}

/// Lines of one file, or of the standard output until a file is named.
pub struct Log {
    id: String,
    target: Option<File>,
    level: Level,
    show_level: bool,
}

impl Log {
    pub fn new(id: String) -> Self {
        Self { id, target: None, level: Level::Info, show_level: false }
    }

    pub fn configure(&mut self, config: &Logger) -> io::Result<()> {
        if let Some(path) = &config.log_path {
            self.target = Some(open(path)?);
        }
        self.level = config.level.unwrap_or(self.level);
        self.show_level = config.show_level.unwrap_or(self.show_level);
        Ok(())
    }

    pub fn error(&mut self, text: &str) {
        self.line(Level::Error, text);
    }

    pub fn warn(&mut self, text: &str) {
        self.line(Level::Warning, text);
    }

    pub fn info(&mut self, text: &str) {
        self.line(Level::Info, text);
    }

    fn line(&mut self, level: Level, text: &str) {
        if level > self.level {
            return;
        }
        let at = chrono::Local::now().format("%Y-%m-%dT%H:%M:%S%.9f");
        let shown = if self.show_level { format!(":{level:?}").to_uppercase() } else { String::new() };
        let line = format!("{at} [{}:main{shown}] {text}\n", self.id);
        let _ = match &mut self.target {
            Some(file) => file.write_all(line.as_bytes()),
            None => io::stdout().lock().write_all(line.as_bytes()),
        };
    }
}
