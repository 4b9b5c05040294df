//! Devices of a machine: put before the start (over PCI some also after it), changed and taken away while it runs.

use std::fs::File;

use serde_json::Value;

use crate::calls::{DriveChange, NetworkInterfaceChange, PmemChange};
use crate::config::{
    Balloon, BootSource, CpuConfig, Drive, Entropy, MemoryHotplug, MmdsConfig, NetworkInterface, Pmem, Vsock,
};
use crate::fault::{Fault, os_text};
use crate::machine::Machine;

impl Machine {
    pub fn put_boot_source(&mut self, source: BootSource) -> Result<(), Fault> {
        self.boot_put()?;
        let refused = |what: &str, cause: &std::io::Error| {
            Fault::new(format!("Boot source error: The {what} file cannot be opened: {}", os_text(cause)))
        };
        File::open(&source.kernel_image_path).map_err(|e| refused("kernel", &e))?;
        if let Some(initrd) = &source.initrd_path {
            File::open(initrd).map_err(|e| refused("initrd", &e))?;
        }
        self.configuration.boot_source = Some(source);
        Ok(())
    }

    /// Of a boot alone, and yet a snapshot may be loaded after it.
    pub fn put_cpu_config(&mut self, config: CpuConfig) -> Result<(), Fault> {
        self.not_started()?;
        self.configuration.cpu = Some(config);
        Ok(())
    }

    pub fn put_drive(&mut self, drive: Drive) -> Result<(), Fault> {
        self.hotplug_put()?;
        let drives = &mut self.configuration.drives;
        if drive.is_root_device && drives.iter().any(|one| one.is_root_device && one.drive_id != drive.drive_id) {
            return Err(Fault::new("Drive config error: A root block device already exists!"));
        }
        self.devices.add_drive(&drive).map_err(|fault| within("Drive config error", fault))?;
        put(drives, drive, |one| &one.drive_id);
        Ok(())
    }

    pub fn put_network(&mut self, network: NetworkInterface) -> Result<(), Fault> {
        self.hotplug_put()?;
        let networks = &mut self.configuration.networks;
        let same_mac = |one: &&NetworkInterface| one.iface_id != network.iface_id && one.guest_mac == network.guest_mac;
        if let Some(mac) = &network.guest_mac {
            let address: Vec<&str> = mac.split(':').collect();
            if address.len() != 6 || address.iter().any(|byte| byte.len() != 2 || u8::from_str_radix(byte, 16).is_err())
            {
                return Err(Fault::json(format!("invalid MAC address: {mac}")));
            }
            if networks.iter().any(|one| same_mac(&one)) {
                return Err(Fault::new(format!("Network config error: The MAC address is already in use: {mac}")));
            }
        }
        self.devices.add_network(&network).map_err(|fault| within("Network config error", fault))?;
        put(networks, network, |one| &one.iface_id);
        Ok(())
    }

    pub fn put_pmem(&mut self, pmem: Pmem) -> Result<(), Fault> {
        self.hotplug_put()?;
        self.devices.add_pmem(&pmem).map_err(|fault| within("Pmem device error", fault))?;
        put(&mut self.configuration.pmem, pmem, |one| &one.id);
        Ok(())
    }

    pub fn put_vsock(&mut self, vsock: Vsock) -> Result<(), Fault> {
        self.boot_put()?;
        // Addresses 0 to 2 are those of the hypervisor and the host.
        if vsock.guest_cid < 3 {
            return Err(Fault::json(format!("invalid value: {}, expected a guest_cid of at least 3", vsock.guest_cid)));
        }
        self.devices.add_vsock(&vsock).map_err(|fault| within("Vsock config error", fault))?;
        self.configuration.vsock = Some(vsock);
        Ok(())
    }

    pub fn put_balloon(&mut self, balloon: Balloon) -> Result<(), Fault> {
        self.boot_put()?;
        if u64::from(balloon.amount_mib) > self.configuration.machine.mem_size_mib {
            return Err(Fault::new("Balloon config error: Amount of pages requested is too large."));
        }
        self.configuration.balloon = Some(balloon);
        Ok(())
    }

    pub fn put_entropy(&mut self, entropy: Entropy) -> Result<(), Fault> {
        self.boot_put()?;
        self.configuration.entropy = Some(entropy);
        Ok(())
    }

    pub fn put_memory_hotplug(&mut self, hotplug: MemoryHotplug) -> Result<(), Fault> {
        self.boot_put()?;
        let sizes_fit = hotplug.block_size_mib >= 2
            && hotplug.block_size_mib.is_power_of_two()
            && hotplug.slot_size_mib.is_multiple_of(hotplug.block_size_mib)
            && hotplug.slot_size_mib > 0
            && hotplug.total_size_mib >= hotplug.slot_size_mib
            && hotplug.total_size_mib.is_multiple_of(hotplug.slot_size_mib);
        if !sizes_fit {
            return Err(Fault::new("Memory hotplug config error: Sizes must be multiples: block, slot, total"));
        }
        self.configuration.memory_hotplug = Some(hotplug);
        Ok(())
    }

    pub fn put_mmds_config(&mut self, config: MmdsConfig) -> Result<(), Fault> {
        self.boot_put()?;
        let known = |id: &String| self.configuration.networks.iter().any(|network| &network.iface_id == id);
        if config.network_interfaces.is_empty() {
            return Err(Fault::new(
                "MMDS config error: The list of network interface IDs that allow forwarding MMDS requests is empty.",
            ));
        }
        if !config.network_interfaces.iter().all(known) {
            return Err(Fault::new(
                "MMDS config error: The list of network interface IDs provided contains at least one ID that does not \
                 correspond to any existing network interface.",
            ));
        }
        self.configuration.mmds = Some(config);
        Ok(())
    }

    /// Possible at any time: no snapshot has it.
    pub fn put_mmds(&mut self, data: Value) -> Result<(), Fault> {
        self.keep_mmds(data)
    }

    pub fn patch_mmds(&mut self, change: Value) -> Result<(), Fault> {
        let mut data =
            self.mmds.clone().ok_or_else(|| Fault::new("MMDS error: The MMDS data store is not initialized."))?;
        merge(&mut data, change);
        self.keep_mmds(data)
    }

    fn keep_mmds(&mut self, data: Value) -> Result<(), Fault> {
        if data.to_string().len() > self.mmds_bytes_max {
            return Err(Fault::too_large(
                "MMDS limit exceeded error: The MMDS patch request doesn't fit or the data store is full.",
            ));
        }
        self.mmds = Some(data);
        Ok(())
    }

    /// Another file may become the disk while the guest stands still or runs.
    pub fn patch_drive(&mut self, change: DriveChange) -> Result<(), Fault> {
        self.started()?;
        let mut drive = self
            .configuration
            .drives
            .iter()
            .find(|one| one.drive_id == change.drive_id)
            .cloned()
            .ok_or_else(|| Fault::new("Drive config error: Unable to patch the block device: Device not found"))?;
        if change.path_on_host.is_some() {
            drive.path_on_host = change.path_on_host;
            self.devices.add_drive(&drive).map_err(|fault| within("Drive config error", fault))?;
        }
        drive.rate_limiter = change.rate_limiter.or(drive.rate_limiter);
        put(&mut self.configuration.drives, drive, |one| &one.drive_id);
        Ok(())
    }

    pub fn patch_network(&mut self, change: NetworkInterfaceChange) -> Result<(), Fault> {
        self.started()?;
        let network = self.configuration.networks.iter_mut().find(|one| one.iface_id == change.iface_id);
        let network = network.ok_or_else(|| Fault::new("Network config error: Device not found"))?;
        network.rx_rate_limiter = change.rx_rate_limiter.or(network.rx_rate_limiter);
        network.tx_rate_limiter = change.tx_rate_limiter.or(network.tx_rate_limiter);
        Ok(())
    }

    pub fn patch_pmem(&mut self, change: PmemChange) -> Result<(), Fault> {
        self.started()?;
        let pmem = self.configuration.pmem.iter_mut().find(|one| one.id == change.id);
        let pmem = pmem.ok_or_else(|| Fault::new("Pmem device error: Device not found"))?;
        pmem.rate_limiter = change.rate_limiter.or(pmem.rate_limiter);
        Ok(())
    }

    /// No driver of this guest ever comes up.
    pub fn patch_balloon(&self) -> Result<(), Fault> {
        self.started()?;
        Err(Fault::new(match &self.configuration.balloon {
            Some(_) => "Balloon update error: Device not activated yet.",
            None => "Balloon update error: Device not found.",
        }))
    }

    /// The interval can be changed, and not switched on or off.
    pub fn patch_balloon_statistics(&mut self, interval_s: u16) -> Result<(), Fault> {
        self.started()?;
        let balloon = self.configuration.balloon.as_mut();
        let balloon = balloon.ok_or_else(|| Fault::new("Balloon update error: Device not found."))?;
        if (balloon.stats_polling_interval_s == 0) != (interval_s == 0) {
            return Err(Fault::new("Balloon update error: Cannot enable/disable the statistics after boot."));
        }
        balloon.stats_polling_interval_s = interval_s;
        Ok(())
    }

    pub fn patch_memory_hotplug(&self) -> Result<(), Fault> {
        self.started()?;
        Err(Fault::new(match &self.configuration.memory_hotplug {
            Some(_) => "Memory hotplug update error: Device is not active",
            None => "Memory hotplug update error: Device not found",
        }))
    }

    pub fn delete_drive(&mut self, id: &str) -> Result<(), Fault> {
        self.unpluggable()?;
        take(&mut self.configuration.drives, |one| one.drive_id == id)?;
        self.devices.remove_drive(id);
        Ok(())
    }

    pub fn delete_network(&mut self, id: &str) -> Result<(), Fault> {
        self.unpluggable()?;
        take(&mut self.configuration.networks, |one| one.iface_id == id)?;
        self.devices.remove_network(id);
        Ok(())
    }

    pub fn delete_pmem(&mut self, id: &str) -> Result<(), Fault> {
        self.unpluggable()?;
        take(&mut self.configuration.pmem, |one| one.id == id)?;
        self.devices.remove_pmem(id);
        Ok(())
    }

    fn unpluggable(&self) -> Result<(), Fault> {
        self.started()?;
        if self.pci {
            Ok(())
        } else {
            Err(Fault::new("The requested operation is not supported: Hotplug is only supported with PCI enabled."))
        }
    }
}

fn within(what: &str, fault: Fault) -> Fault {
    Fault { message: format!("{what}: {}", fault.message), ..fault }
}

/// In the place of the one with the same id, else at the end.
fn put<T>(list: &mut Vec<T>, new: T, id: impl Fn(&T) -> &String) {
    match list.iter().position(|one| id(one) == id(&new)) {
        Some(place) => list[place] = new,
        None => list.push(new),
    }
}

fn take<T>(list: &mut Vec<T>, is_it: impl Fn(&T) -> bool) -> Result<(), Fault> {
    let place = list.iter().position(is_it).ok_or_else(|| Fault::new("Hotplug error: Device not found"))?;
    list.remove(place);
    Ok(())
}

/// RFC 7396.
fn merge(target: &mut Value, change: Value) {
    let Value::Object(change) = change else {
        *target = change;
        return;
    };
    if !target.is_object() {
        *target = Value::Object(serde_json::Map::new());
    }
    let target = target.as_object_mut().expect("made one just now");
    for (key, value) in change {
        if value.is_null() {
            target.remove(&key);
        } else {
            merge(target.entry(key).or_insert(Value::Null), value);
        }
    }
}
