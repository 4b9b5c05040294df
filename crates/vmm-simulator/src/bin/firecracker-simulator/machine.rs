//! The microVM: what was configured, what it holds open, and the guest once there is one.
//!
//! ```text
//!  configured --InstanceStart--> running <--PATCH /vm--> paused --/snapshot/create--> files
//!      |                                                   ^
//!      +-- /snapshot/load (nothing that boots configured) -+
//! ```

use std::fs::File;
use std::io::Write as _;

use serde_json::{Value, json};
use vmm_simulator::release::Release;

use crate::calls::{ActionType, MachineConfigChange, VmState};
use crate::config::{Configuration, CpuTemplate, HugePages, Logger, MachineConfig, Metrics, Serial};
use crate::devices::Devices;
use crate::fault::{Fault, os_text};
use crate::guest::Guest;
use crate::memory::Memory;
use crate::output::{Log, SerialLine};

pub struct Machine {
    pub id: String,
    pub release: Release,
    pub pci: bool,
    pub mmds_bytes_max: usize,
    pub log: Log,
    pub logger: Option<Logger>,
    pub metrics: Option<(Metrics, File)>,
    pub serial: Serial,
    pub configuration: Configuration,
    /// Something was put that only a boot needs: a snapshot is not loaded any more, also when the put was refused.
    pub boots: bool,
    pub devices: Devices,
    pub mmds: Option<Value>,
    pub guest: Option<Guest>,
}

impl Machine {
    pub fn new(id: String, release: Release, pci: bool, mmds_bytes_max: usize) -> Self {
        Self {
            log: Log::new(id.clone()),
            id,
            release,
            pci,
            mmds_bytes_max,
            logger: None,
            metrics: None,
            serial: Serial::default(),
            configuration: Configuration::default(),
            boots: false,
            devices: Devices::default(),
            mmds: None,
            guest: None,
        }
    }

    /// Refuses what is only possible before the start.
    pub fn not_started(&self) -> Result<(), Fault> {
        if self.guest.is_some() { Err(Fault::after_start()) } else { Ok(()) }
    }

    /// Refuses what is only possible after it.
    pub fn started(&self) -> Result<&Guest, Fault> {
        self.guest.as_ref().ok_or_else(Fault::before_start)
    }

    /// A put of something that belongs to a boot.
    pub fn boot_put(&mut self) -> Result<(), Fault> {
        self.not_started()?;
        self.boots = true;
        Ok(())
    }

    /// As `boot_put`, but over PCI also a started machine takes it.
    pub fn hotplug_put(&mut self) -> Result<(), Fault> {
        if self.guest.is_some() && self.pci { Ok(()) } else { self.boot_put() }
    }

    pub fn info(&self) -> Value {
        let state = match &self.guest {
            None => "Not started",
            Some(guest) if guest.is_running() => "Running",
            Some(_) => "Paused",
        };
        json!({ "app_name": "Firecracker", "id": self.id, "state": state, "vmm_version": self.release.to_string() })
    }

    pub fn full_config(&self) -> Value {
        let of = &self.configuration;
        json!({
            "balloon": of.balloon, "drives": of.drives, "boot-source": of.boot_source, "cpu-config": of.cpu,
            "logger": self.logger, "machine-config": of.machine, "metrics": self.metrics.as_ref().map(|(config, _)| config),
            "mmds-config": of.mmds, "network-interfaces": of.networks, "vsock": of.vsock, "entropy": of.entropy,
            "pmem": of.pmem, "memory-hotplug": of.memory_hotplug,
        })
    }

    pub fn put_machine_config(&mut self, config: MachineConfig) -> Result<(), Fault> {
        self.boot_put()?;
        check(&config)?;
        self.configuration.machine = config;
        Ok(())
    }

    pub fn patch_machine_config(&mut self, change: MachineConfigChange) -> Result<(), Fault> {
        self.boot_put()?;
        let mut config = self.configuration.machine.clone();
        config.vcpu_count = change.vcpu_count.unwrap_or(config.vcpu_count);
        config.mem_size_mib = change.mem_size_mib.unwrap_or(config.mem_size_mib);
        config.smt = change.smt.unwrap_or(config.smt);
        config.cpu_template = change.cpu_template.unwrap_or(config.cpu_template);
        config.track_dirty_pages = change.track_dirty_pages.unwrap_or(config.track_dirty_pages);
        config.huge_pages = change.huge_pages.unwrap_or(config.huge_pages);
        check(&config)?;
        self.configuration.machine = config;
        Ok(())
    }

    pub fn put_logger(&mut self, config: Logger) -> Result<(), Fault> {
        self.not_started()?;
        let opened = self.log.configure(&config);
        opened.map_err(|e| Fault::new(format!("Logger error: Failed to open target file: {}", os_text(&e))))?;
        self.logger = Some(config);
        Ok(())
    }

    pub fn put_metrics(&mut self, config: Metrics) -> Result<(), Fault> {
        self.not_started()?;
        let refused = |cause: &str| {
            Fault::new(format!("Metrics error: Cannot initialize the metrics system due to bad user input: {cause}"))
        };
        if self.metrics.is_some() {
            return Err(refused("Reinitialization of metrics not allowed."));
        }
        let file = crate::output::open(&config.metrics_path).map_err(|e| refused(&os_text(&e)))?;
        self.metrics = Some((config, file));
        Ok(())
    }

    /// The path is opened with the guest, and refused then.
    pub fn put_serial(&mut self, config: Serial) -> Result<(), Fault> {
        self.not_started()?;
        self.serial = config;
        Ok(())
    }

    /// Whether the process is to end.
    pub fn act(&mut self, action: ActionType) -> Result<bool, Fault> {
        match action {
            ActionType::InstanceStart => self.start()?,
            ActionType::FlushMetrics => self.flush_metrics()?,
            // A guest that listens to its keyboard shuts down, and that ends the process.
            ActionType::SendCtrlAltDel => return self.started().map(|_| true),
        }
        Ok(false)
    }

    pub fn patch_vm(&mut self, state: VmState) -> Result<(), Fault> {
        let guest = self.started()?;
        match state {
            VmState::Paused => guest.pause(),
            VmState::Resumed => guest.resume(),
        }
        Ok(())
    }

    pub fn open_serial(&self) -> Result<SerialLine, Fault> {
        let line = SerialLine::open(&self.serial);
        line.map_err(|e| Fault::new(format!("Error opening the serial output: {}", os_text(&e))))
    }

    fn start(&mut self) -> Result<(), Fault> {
        self.not_started()?;
        let refused = |cause: &str| Fault::new(format!("Start microvm error: {cause}"));
        let Some(boot) = &self.configuration.boot_source else {
            return Err(refused("Cannot start microvm without kernel configuration."));
        };
        let machine = &self.configuration.machine;
        if machine.cpu_template != CpuTemplate::None {
            return Err(refused(
                "Error getting CPU template: The current CPU model is not permitted to apply the CPU template.",
            ));
        }
        let kernel = std::fs::read(&boot.kernel_image_path);
        let kernel = kernel.map_err(|e| refused(&format!("Cannot load kernel: {}", os_text(&e))))?;
        if !is_kernel(&kernel) {
            return Err(refused(
                "Cannot load kernel due to invalid memory configuration or invalid kernel image: Kernel Loader: failed to \
                 load ELF kernel image",
            ));
        }
        let memory = Memory::empty(bytes_of(machine), machine.track_dirty_pages)
            .map_err(|e| refused(&format!("Cannot create the guest memory: {}", os_text(&e))))?;
        let serial = self.open_serial().map_err(|fault| refused(&fault.message))?;
        self.guest = Some(Guest::boot(memory, &kernel, serial));
        self.log.info("simulated guest: started");
        Ok(())
    }

    /// One line each time; without a file nothing is written and nothing is wrong.
    fn flush_metrics(&mut self) -> Result<(), Fault> {
        let counter = self.started()?.state().counter;
        let Some((config, file)) = &mut self.metrics else { return Ok(()) };
        let mut line = json!({
            "utc_timestamp_ms": chrono::Utc::now().timestamp_millis(),
            "vcpu": { "exit_io_out": counter },
        });
        if config.emit_id == Some(true) {
            line["id"] = json!(self.id);
        }
        if let Some(properties) = &config.properties {
            line["properties"] = properties.clone();
        }
        let written = file.write_all(format!("{line}\n").as_bytes());
        written.map_err(|e| Fault::new(format!("Internal VMM error: Cannot flush metrics: {}", os_text(&e))))
    }
}

pub fn bytes_of(machine: &MachineConfig) -> usize {
    usize::try_from(machine.mem_size_mib << 20).expect("checked when it was put")
}

fn check(config: &MachineConfig) -> Result<(), Fault> {
    /// As many as one machine may have.
    const VCPUS_MAX: u8 = 32;
    /// More than any host has; keeps sums of bytes in range.
    const MIB_MAX: u64 = 1 << 24;
    let odd_smt = config.smt && config.vcpu_count > 1 && !config.vcpu_count.is_multiple_of(2);
    if !(1..=VCPUS_MAX).contains(&config.vcpu_count) || odd_smt {
        return Err(Fault::new(
            "Machine config error: The vCPU number is invalid! The vCPU number can only be 1 or an even number when SMT is \
             enabled.",
        ));
    }
    let whole_pages = config.huge_pages == HugePages::None || config.mem_size_mib.is_multiple_of(2);
    if !(1..=MIB_MAX).contains(&config.mem_size_mib) || !whole_pages {
        return Err(Fault::new(
            "Machine config error: The memory size (MiB) is either 0, or not a multiple of the configured page size.",
        ));
    }
    Ok(())
}

/// An ELF file, or a bzImage by the mark in its set-up header.
fn is_kernel(image: &[u8]) -> bool {
    image.starts_with(b"\x7fELF") || image.get(0x202..0x206) == Some(b"HdrS")
}
