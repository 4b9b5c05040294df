//! The routes: which body belongs to which call, and in which state a call is taken.

use hyper::{Method, StatusCode};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::calls::{
    Action, BalloonChange, BalloonHintingStart, BalloonStatisticsChange, DriveChange, MemoryHotplugChange,
    NetworkInterfaceChange, PmemChange, SnapshotCreate, SnapshotLoad, Vm,
};
use crate::config::{Drive, NetworkInterface, Pmem};
use crate::fault::Fault;
use crate::machine::Machine;

/// What a call is answered with when it is not refused.
#[derive(Debug, Default)]
pub struct Answer {
    pub body: Option<Value>,
    /// The process ends once this was sent.
    pub last: bool,
}

impl Answer {
    pub fn status(&self) -> StatusCode {
        if self.body.is_some() { StatusCode::OK } else { StatusCode::NO_CONTENT }
    }
}

pub fn handle(machine: &mut Machine, method: &Method, path: &str, body: &[u8]) -> Result<Answer, Fault> {
    let parts: Vec<&str> = path.trim_start_matches('/').split_terminator('/').collect();
    match method.as_str() {
        "GET" if !body.is_empty() => Err(Fault::new("GET request cannot have a body.")),
        "GET" => get(machine, &parts).map(|body| Answer { body: Some(body), last: false }),
        "PUT" if body.is_empty() => Err(Fault::new("Empty PUT request.")),
        "PUT" if parts == ["actions"] => {
            let last = machine.act(parse::<Action>(body)?.action_type)?;
            Ok(Answer { body: None, last })
        }
        "PUT" => put(machine, &parts, body).map(|()| Answer::default()),
        "PATCH" if body.is_empty() && parts.first() != Some(&"balloon") => Err(Fault::new("Empty PATCH request.")),
        "PATCH" => patch(machine, &parts, body).map(|()| Answer::default()),
        "DELETE" => delete(machine, &parts).map(|()| Answer::default()),
        other => Err(Fault::path(other, parts.join("/"))),
    }
}

fn get(machine: &mut Machine, parts: &[&str]) -> Result<Value, Fault> {
    let configuration = &machine.configuration;
    match parts {
        [] => Ok(machine.info()),
        ["version"] => Ok(json!({ "firecracker_version": machine.release.to_string() })),
        ["vm", "config"] => Ok(machine.full_config()),
        ["machine-config"] => Ok(to_json(&configuration.machine)),
        ["mmds"] => Ok(machine.mmds.clone().unwrap_or_else(|| json!({}))),
        ["balloon"] => configuration
            .balloon
            .as_ref()
            .map(to_json)
            .ok_or_else(|| Fault::new("Balloon config error: Device not found.")),
        ["balloon", "statistics"] => {
            machine.started()?;
            match &configuration.balloon {
                Some(balloon) if balloon.stats_polling_interval_s > 0 => {
                    let pages = balloon.amount_mib * 256;
                    Ok(json!({
                        "target_pages": pages, "actual_pages": 0, "target_mib": balloon.amount_mib, "actual_mib": 0,
                    }))
                }
                Some(_) => Err(Fault::new("Internal VMM error: Statistics for the balloon device are not enabled.")),
                None => Err(Fault::new("Internal VMM error: Device not found.")),
            }
        }
        ["balloon", "hinting", "status"] => {
            machine.started()?;
            match &configuration.balloon {
                Some(balloon) if balloon.free_page_hinting => Ok(json!({ "host_cmd": 0, "guest_cmd": null })),
                _ => Err(Fault::new("Balloon update error: Hinting is not enabled.")),
            }
        }
        ["hotplug", "memory"] => {
            machine.started()?;
            let hotplug = configuration.memory_hotplug.as_ref();
            let mut status = hotplug.map(to_json).ok_or_else(|| Fault::new("Internal VMM error: Device not found."))?;
            status["plugged_size_mib"] = json!(0);
            status["requested_size_mib"] = json!(0);
            Ok(status)
        }
        _ => Err(Fault::path("GET", parts.join("/"))),
    }
}

fn put(machine: &mut Machine, parts: &[&str], body: &[u8]) -> Result<(), Fault> {
    match parts {
        ["machine-config"] => machine.put_machine_config(parse(body)?),
        ["boot-source"] => machine.put_boot_source(parse(body)?),
        ["cpu-config"] => machine.put_cpu_config(parse(body)?),
        ["drives", id] => machine.put_drive(of_path(id, parse(body)?, |drive: &Drive| &drive.drive_id)?),
        ["network-interfaces", id] => {
            machine.put_network(of_path(id, parse(body)?, |network: &NetworkInterface| &network.iface_id)?)
        }
        ["pmem", id] => machine.put_pmem(of_path(id, parse(body)?, |pmem: &Pmem| &pmem.id)?),
        ["drives" | "network-interfaces" | "pmem"] => Err(Fault::new("The ID cannot be empty.")),
        ["vsock"] => machine.put_vsock(parse(body)?),
        ["balloon"] => machine.put_balloon(parse(body)?),
        ["entropy"] => machine.put_entropy(parse(body)?),
        ["hotplug", "memory"] => machine.put_memory_hotplug(parse(body)?),
        ["serial"] => machine.put_serial(parse(body)?),
        ["logger"] => machine.put_logger(parse(body)?),
        ["metrics"] => machine.put_metrics(parse(body)?),
        ["mmds"] => machine.put_mmds(parse(body)?),
        ["mmds", "config"] => machine.put_mmds_config(parse(body)?),
        ["snapshot", "create"] => machine.create_snapshot(&parse::<SnapshotCreate>(body)?),
        ["snapshot", "load"] => machine.load_snapshot(&parse::<SnapshotLoad>(body)?),
        _ => Err(Fault::path("PUT", parts.join("/"))),
    }
}

fn patch(machine: &mut Machine, parts: &[&str], body: &[u8]) -> Result<(), Fault> {
    match parts {
        ["vm"] => machine.patch_vm(parse::<Vm>(body)?.state),
        ["machine-config"] => machine.patch_machine_config(parse(body)?),
        ["drives", id] => machine.patch_drive(of_path(id, parse(body)?, |change: &DriveChange| &change.drive_id)?),
        ["network-interfaces", id] => {
            machine.patch_network(of_path(id, parse(body)?, |change: &NetworkInterfaceChange| &change.iface_id)?)
        }
        ["pmem", id] => machine.patch_pmem(of_path(id, parse(body)?, |change: &PmemChange| &change.id)?),
        ["mmds"] => machine.patch_mmds(parse(body)?),
        ["balloon"] => parse::<BalloonChange>(body).and_then(|_| machine.patch_balloon()),
        ["balloon", "statistics"] => {
            machine.patch_balloon_statistics(parse::<BalloonStatisticsChange>(body)?.stats_polling_interval_s)
        }
        ["balloon", "hinting", "start"] => {
            if !body.is_empty() {
                parse::<BalloonHintingStart>(body)?;
            }
            machine.patch_balloon()
        }
        ["balloon", "hinting", "stop"] => machine.patch_balloon(),
        ["hotplug", "memory"] => parse::<MemoryHotplugChange>(body).and_then(|_| machine.patch_memory_hotplug()),
        _ => Err(Fault::path("PATCH", parts.join("/"))),
    }
}

fn delete(machine: &mut Machine, parts: &[&str]) -> Result<(), Fault> {
    match parts {
        ["drives", id] => machine.delete_drive(id),
        ["network-interfaces", id] => machine.delete_network(id),
        ["pmem", id] => machine.delete_pmem(id),
        _ => Err(Fault::path("DELETE", parts.join("/"))),
    }
}

fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, Fault> {
    serde_json::from_slice(body).map_err(Fault::json)
}

fn of_path<T>(id: &str, body: T, id_of: impl Fn(&T) -> &String) -> Result<T, Fault> {
    if !id.chars().all(|c| c == '_' || c.is_alphanumeric()) {
        return Err(Fault::new("API Resource IDs can only contain alphanumeric characters and underscores."));
    }
    if id_of(&body) != id {
        return Err(Fault::new("The id from the path does not match the id from the body!"));
    }
    Ok(body)
}

fn to_json(value: &impl Serialize) -> Value {
    serde_json::to_value(value).expect("configurations have string keys")
}
