//! Saving a paused microVM to two files, and making one from them.

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::os::unix::net::UnixStream;
use std::path::Path;

use crate::calls::{BackendType, HugePagesOfLoad, MemoryBackend, SnapshotCreate, SnapshotLoad, SnapshotType};
use crate::config::{Configuration, HugePages};
use crate::devices::Devices;
use crate::fault::{Fault, os_text};
use crate::guest::Guest;
use crate::hooks::{self, Hook};
use crate::machine::{Machine, bytes_of};
use crate::memory::{Memory, PAGE};
use crate::state_file::{self, DeviceState, Unwritable};

impl Machine {
    /// The device state first, then the memory. After an error the changed pages still count as changed.
    pub fn create_snapshot(&mut self, request: &SnapshotCreate) -> Result<(), Fault> {
        let refused = |cause: String| Fault::new(format!("Create snapshot error: {cause}"));
        let guest = self.started()?;
        if guest.is_running() {
            return Err(refused(
                "Cannot save the microVM state: Operation not allowed: save/restore unavailable while running"
                    .to_owned(),
            ));
        }
        let mut guest = guest.state();
        let state = DeviceState {
            configuration: self.configuration.clone(),
            counter: guest.counter,
            memory_digest: guest.memory.digest(),
            pci: self.pci,
        };
        state_file::write(&request.snapshot_path, self.release.snapshot_format(), &state).map_err(|e| {
            refused(match &e {
                Unwritable::File(what, cause) => {
                    format!("Cannot perform {what} on the snapshot backing file: {}", os_text(cause))
                }
                _ => e.to_string(),
            })
        })?;
        let lost = hooks::for_path("/snapshot/create").into_iter().find_map(|hook| match hook {
            Hook::Lose(text) => Some(text),
            _ => None,
        });
        if let Some(text) = lost {
            guest.memory.forget_changes();
            return Err(refused(text));
        }
        write_memory(&guest.memory, &request.mem_file_path, request.snapshot_type).map_err(|(what, cause)| {
            refused(format!(
                "Cannot write memory file: Cannot perform {what} on the memory backing file: {}",
                os_text(&cause)
            ))
        })?;
        guest.memory.forget_changes();
        Ok(())
    }

    /// After any refusal but the first two the process is too dirty to be used.
    pub fn load_snapshot(&mut self, request: &SnapshotLoad) -> Result<(), Fault> {
        let backend = backend_of(request)?;
        self.not_started()?;
        let refused = |cause: String| Fault::new(format!("Load snapshot error: {cause}"));
        if self.boots {
            return Err(refused(
                "Loading a microVM snapshot not allowed after configuring boot-specific resources.".to_owned(),
            ));
        }
        if request.mem_file_path.is_some() || request.enable_diff_snapshots {
            self.log.warn("PUT /snapshot/load: mem_file_path and enable_diff_snapshots fields are deprecated.");
        }
        self.restore(request, &backend).map_err(|fault| {
            let refused = refused(format!("Failed to restore from snapshot: {}", fault.message));
            self.log.error(&refused.message);
            refused.fatal()
        })
    }

    fn restore(&mut self, request: &SnapshotLoad, backend: &MemoryBackend) -> Result<(), Fault> {
        let state = state_file::read(&request.snapshot_path, self.release.snapshot_format())
            .map_err(|e| Fault::new(format!("Failed to get snapshot state from file: {e}")))?;
        let mut configuration = state.configuration;
        override_devices(&mut configuration, request)?;
        configuration.machine.track_dirty_pages = request.track_dirty_pages || request.enable_diff_snapshots;
        configuration.machine.huge_pages = match request.huge_pages {
            HugePagesOfLoad::Snapshot => configuration.machine.huge_pages,
            HugePagesOfLoad::None => HugePages::None,
            HugePagesOfLoad::Transparent => HugePages::Transparent,
            HugePagesOfLoad::Hugetlbfs2M => HugePages::Hugetlbfs2M,
        };
        let mut memory = load_memory(backend, &configuration)?;
        if memory.digest() != state.memory_digest {
            return Err(Fault::new("simulated guest: its memory is not what it was"));
        }
        let devices = Devices::restore(&configuration)?;
        let guest = Guest::restore(memory, state.counter, self.open_serial()?);
        if request.resume_vm {
            guest.resume();
        }
        self.configuration = configuration;
        self.devices = devices;
        self.pci = state.pci;
        self.guest = Some(guest);
        Ok(())
    }
}

/// One of the two ways of naming the memory, and only one.
fn backend_of(request: &SnapshotLoad) -> Result<MemoryBackend, Fault> {
    match (&request.mem_backend, &request.mem_file_path) {
        (Some(_), Some(_)) => {
            Err(Fault::json("too many fields: either `mem_backend` or `mem_file_path` exclusively is required"))
        }
        (None, None) => Err(Fault::json("missing field: either `mem_backend` or `mem_file_path` is required")),
        (Some(backend), None) => Ok(backend.clone()),
        (None, Some(path)) => Ok(MemoryBackend { backend_path: path.clone(), backend_type: BackendType::File }),
    }
}

fn override_devices(configuration: &mut Configuration, request: &SnapshotLoad) -> Result<(), Fault> {
    for wanted in &request.network_overrides {
        let network = configuration.networks.iter_mut().find(|network| network.iface_id == wanted.iface_id);
        let network = network.ok_or_else(|| Fault::new("Unknown Network Device."))?;
        network.host_dev_name.clone_from(&wanted.host_dev_name);
    }
    if let Some(wanted) = &request.vsock_override {
        let vsock = configuration.vsock.as_mut().ok_or_else(|| Fault::new("Unknown Vsock Device."))?;
        vsock.uds_path.clone_from(&wanted.uds_path);
    }
    Ok(())
}

fn load_memory(backend: &MemoryBackend, configuration: &Configuration) -> Result<Memory, Fault> {
    let machine = &configuration.machine;
    let refused = |cause: &str| Fault::new(format!("Failed to load guest memory: {cause}"));
    match backend.backend_type {
        BackendType::Uffd => {
            UnixStream::connect(&backend.backend_path).map_err(|e| {
                refused(&format!(
                    "Error creating guest memory from uffd: Failed to connect to UDS Unix stream: {}",
                    os_text(&e)
                ))
            })?;
            Err(refused("Error creating guest memory from uffd: not simulated"))
        }
        BackendType::File if machine.huge_pages == HugePages::Hugetlbfs2M => Err(refused(
            "Error creating guest memory from file: Cannot restore hugetlbfs backed snapshot by mapping the memory file. \
             Please use uffd.",
        )),
        BackendType::File => {
            map_file(&backend.backend_path, bytes_of(machine), machine.track_dirty_pages).map_err(|e| {
                refused(&format!("Error creating guest memory from file: Failed to load guest memory: {}", os_text(&e)))
            })
        }
    }
}

fn map_file(path: &Path, bytes: usize, track: bool) -> io::Result<Memory> {
    let file = File::open(path)?;
    if file.metadata()?.len() < bytes as u64 {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the file is smaller than the guest's memory"));
    }
    Memory::of_file(&file, bytes, track)
}

/// A file of the memory's size is written into: a Diff merges its pages there. One of another size is emptied first.
fn write_memory(memory: &Memory, path: &Path, kind: SnapshotType) -> Result<(), (&'static str, io::Error)> {
    let file = OpenOptions::new().write(true).create(true).truncate(false).open(path).map_err(|e| ("open", e))?;
    let existing = file.metadata().map_err(|e| ("metadata", e))?.len();
    let in_place = existing == memory.bytes();
    if !in_place {
        file.set_len(0).map_err(|e| ("set_length", e))?;
        file.set_len(memory.bytes()).map_err(|e| ("set_length", e))?;
    }
    match kind {
        SnapshotType::Diff => write_pages(memory, &file, memory.changed()),
        SnapshotType::Full => {
            // A new file is zeros already: what the guest never filled stays a hole.
            let pages = (0..memory.pages()).filter(|page| in_place || !memory.is_zero(*page)).collect();
            write_pages(memory, &file, &pages)
        }
    }
    .map_err(|e| ("write", e))?;
    file.sync_all().map_err(|e| ("sync_all", e))
}

fn write_pages(memory: &Memory, file: &File, pages: &BTreeSet<u32>) -> io::Result<()> {
    pages.iter().try_for_each(|page| file.write_all_at(memory.read(*page), u64::from(*page) * PAGE as u64))
}
