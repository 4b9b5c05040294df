//! What a device holds open on the host: disks, taps, the vsock's listener. Opened when they are configured, not when the guest starts.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use crate::config::{Configuration, Drive, NetworkInterface, Pmem, Vsock};
use crate::fault::{Fault, os_text};

#[derive(Default)]
pub struct Devices {
    drives: BTreeMap<String, File>,
    pmem: BTreeMap<String, File>,
    taps: BTreeMap<String, File>,
    vsock: Option<(PathBuf, UnixListener)>,
}

impl Devices {
    /// Everything a snapshot names, at the paths it names.
    pub fn restore(configuration: &Configuration) -> Result<Self, Fault> {
        let mut devices = Self::default();
        let failed = |what: &str, fault: Fault| {
            let cause = fault.message;
            Fault::new(format!(
                "Failed to build microVM from snapshot: Failed to restore devices: Error restoring {what} device: {cause}"
            ))
        };
        for drive in &configuration.drives {
            devices.add_drive(drive).map_err(|fault| failed("Block", fault))?;
        }
        for network in &configuration.networks {
            devices.add_network(network).map_err(|fault| failed("Net", fault))?;
        }
        if let Some(vsock) = &configuration.vsock {
            devices.add_vsock(vsock).map_err(|fault| failed("Vsock", fault))?;
        }
        for pmem in &configuration.pmem {
            devices.add_pmem(pmem).map_err(|fault| failed("Pmem", fault))?;
        }
        Ok(devices)
    }

    pub fn add_drive(&mut self, drive: &Drive) -> Result<(), Fault> {
        let Some(path) = &drive.path_on_host else {
            return Err(Fault::new(if drive.socket.is_some() {
                "Unable to create the vhost-user block device: vhost-user is not simulated"
            } else {
                "Unable to create the virtio block device: Invalid configuration: neither path_on_host nor socket"
            }));
        };
        let file = open_backing(path, drive.is_read_only.unwrap_or(false))
            .map_err(|fault| Fault::new(format!("Unable to create the virtio block device: {}", fault.message)))?;
        self.drives.insert(drive.drive_id.clone(), file);
        Ok(())
    }

    pub fn add_pmem(&mut self, pmem: &Pmem) -> Result<(), Fault> {
        let file = OpenOptions::new().read(true).write(!pmem.read_only).open(&pmem.path_on_host);
        let file = file.map_err(|e| Fault::new(format!("Error accessing backing file: {}", os_text(&e))))?;
        if file.metadata().is_ok_and(|metadata| metadata.len() == 0) {
            return Err(Fault::new("Error accessing backing file: File size is 0"));
        }
        self.pmem.insert(pmem.id.clone(), file);
        Ok(())
    }

    pub fn add_network(&mut self, network: &NetworkInterface) -> Result<(), Fault> {
        // The old one first: the kernel gives a tap to one descriptor at a time.
        self.taps.remove(&network.iface_id);
        let tap = open_tap(&network.host_dev_name).map_err(|e| {
            Fault::new(format!(
                "Could not create the network device: Open tap device failed: Error while creating ifreq structure: {}. \
                 Invalid TUN/TAP Backend provided by {}. Check our documentation on setting up the network devices.",
                os_text(&e),
                network.host_dev_name
            ))
        })?;
        self.taps.insert(network.iface_id.clone(), tap);
        Ok(())
    }

    pub fn add_vsock(&mut self, vsock: &Vsock) -> Result<(), Fault> {
        if let Some((path, listener)) = self.vsock.take() {
            drop(listener);
            let _ = std::fs::remove_file(path);
        }
        let listener = UnixListener::bind(&vsock.uds_path).map_err(|e| {
            Fault::new(format!(
                "Cannot create backend for vsock device: Error binding to the host-side Unix socket: {}",
                os_text(&e)
            ))
        })?;
        self.vsock = Some((vsock.uds_path.clone(), listener));
        Ok(())
    }

    pub fn remove_drive(&mut self, id: &str) {
        self.drives.remove(id);
    }

    pub fn remove_network(&mut self, id: &str) {
        self.taps.remove(id);
    }

    pub fn remove_pmem(&mut self, id: &str) {
        self.pmem.remove(id);
    }
}

fn open_backing(path: &Path, read_only: bool) -> Result<File, Fault> {
    OpenOptions::new().read(true).write(!read_only).open(path).map_err(|e| {
        Fault::new(format!(
            "Virtio backend error: Error manipulating the backing file: {} {}",
            os_text(&e),
            path.display()
        ))
    })
}

/// As root a tap that does not exist is made by this, silently.
fn open_tap(name: &str) -> io::Result<File> {
    // An interface's name ends with a zero inside its field.
    if name.is_empty() || name.len() >= libc::IFNAMSIZ {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun")?;
    // SAFETY: all fields of ifreq may be zero.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (place, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *place = byte.cast_signed();
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(flags).expect("below the sign bit");
    // SAFETY: an ifreq is what this ioctl takes, and it lives until the call is over.
    if unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(file)
}
