//! What a host's kernel and files say of its sandboxes, whoever serves there.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use host_agent::identity::Tag;
use model::ids::HostId;

use super::stage;

/// In the environment of a microVM's process: of which sandbox it is.
const SANDBOX: &str = "STAGE_SANDBOX";
/// A line for each microVM that was begun: sandbox and incarnation.
const LAUNCHES: &str = "launches";

pub struct Place {
    pub id: HostId,
    pub tag: Tag,
    /// The host's directory.
    pub dir: PathBuf,
}

/// The process of a microVM, which is written down in the host's directory.
pub fn body(dir: &Path, launch: &microvm::Launch) -> Command {
    // pool/sandboxes/<id>/run/<incarnation>
    let names: Vec<_> = launch.dir.iter().rev().take(3).map(|name| name.to_string_lossy()).collect();
    let (sandbox, incarnation) = (&names[2], &names[0]);
    let mut launches = std::fs::File::options().create(true).append(true).open(dir.join(LAUNCHES)).unwrap();
    // One call, so that lines do not mix.
    launches.write_all(format!("{sandbox} {incarnation}\n").as_bytes()).unwrap();
    let mut command = stage::body(launch);
    command.env(SANDBOX, sandbox.as_ref());
    command
}

impl Place {
    /// Sandboxes with a living process, by what the kernel says, and the processes.
    pub fn alive(&self) -> BTreeMap<String, BTreeSet<i32>> {
        let mut alive: BTreeMap<String, BTreeSet<i32>> = BTreeMap::new();
        for pid in stage::processes_of(&self.tag) {
            let Ok(user) = std::fs::metadata(format!("/proc/{pid}")).map(|data| data.uid()) else { continue };
            let environ = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            let variables = String::from_utf8_lossy(&environ);
            let of = variables.split('\0').find_map(|pair| pair.strip_prefix(SANDBOX)?.strip_prefix('='));
            let of = of.map_or_else(|| format!("nobody's, of user {user}"), ToOwned::to_owned);
            alive.entry(of).or_default().insert(pid);
        }
        alive
    }

    /// Sandbox and incarnation of each microVM that was begun.
    pub fn launches(&self) -> Vec<(String, String)> {
        let text = std::fs::read_to_string(self.dir.join(LAUNCHES)).unwrap_or_default();
        let parts = |line: &str| line.split_once(' ').map(|(id, run)| (id.to_owned(), run.to_owned()));
        text.lines().filter_map(parts).collect()
    }

    /// How often a microVM of the sandbox was begun.
    pub fn launches_of(&self, id: &str) -> usize {
        self.launches().iter().filter(|(of, _)| of == id).count()
    }

    /// What lies in the sandbox's directory.
    pub fn files_of(&self, id: &str) -> BTreeSet<String> {
        self.names(&format!("pool/sandboxes/{id}"))
    }

    /// What lies in a directory of the host.
    pub fn names(&self, dir: &str) -> BTreeSet<String> {
        let names = std::fs::read_dir(self.dir.join(dir)).into_iter().flatten().flatten();
        names.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
    }

    /// Whether saved memory of it lies there.
    pub fn has_saved(&self, id: &str) -> bool {
        self.files_of(id).iter().any(|name| name.starts_with("gen-") && !name.ends_with(".tmp"))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        end_microvms(&self.tag);
    }
}

/// Of a host that is given up.
pub fn end_microvms(tag: &Tag) {
    for pid in stage::processes_of(tag) {
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
    }
}
