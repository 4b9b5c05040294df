//! Deaths at chosen points of the programs of a platform: they read from one file where to die, and write into another what they pass.

use std::collections::BTreeMap;
use std::path::PathBuf;

pub struct CrashPoints {
    scratch: tempfile::TempDir,
}

impl CrashPoints {
    #[expect(clippy::new_without_default, reason = "it makes a directory")]
    pub fn new() -> Self {
        Self { scratch: tempfile::tempdir().unwrap() }
    }

    /// For the programs.
    pub fn env(&self) -> BTreeMap<String, String> {
        let files = [("WRENN_CRASHPOINTS_FILE", self.armed()), ("WRENN_CRASHPOINTS_LIST", self.list())];
        files.map(|(key, path)| (key.to_owned(), path.to_str().unwrap().to_owned())).into()
    }

    fn armed(&self) -> PathBuf {
        self.scratch.path().join("armed")
    }

    fn list(&self) -> PathBuf {
        self.scratch.path().join("list")
    }

    /// What was passed until now does not count.
    pub fn forget_passed(&self) {
        std::fs::write(self.list(), "").unwrap();
    }

    /// Those of the host agent, in order, each once. Not those of its heartbeats: they come when they come, whatever is done meanwhile.
    pub fn passed_by_agent(&self) -> Vec<String> {
        let mut points: Vec<String> = Vec::new();
        let list = std::fs::read_to_string(self.list()).unwrap();
        for point in list.lines().filter(|point| !point.starts_with("cp.") && !point.starts_with("ticket.")) {
            if !points.iter().any(|known| known == point) {
                points.push(point.to_owned());
            }
        }
        points
    }

    /// Whoever passes there next dies as by kill -9.
    pub fn arm(&self, point: &str) {
        std::fs::write(self.armed(), format!("{point}=abort")).unwrap();
    }

    /// Somebody has died where that was wanted.
    pub fn has_come(&self) -> bool {
        !self.armed().exists()
    }

    pub fn expect_death(&self, point: &str) {
        assert!(self.has_come(), "{point} was never reached");
    }
}
