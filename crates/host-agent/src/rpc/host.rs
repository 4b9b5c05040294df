//! What this host has and holds, for `wrenn doctor`, tests and people.

use std::sync::Arc;

use api::host::GetHostResponse;

use crate::agent::Agent;
use crate::heartbeat::Link;

pub async fn describe(agent: &Arc<Agent>) -> GetHostResponse {
    let facts = agent.facts().await;
    let room = (agent.sandboxes.context().room)().await;
    let objects = agent.objects().await;
    let mut notes = agent.notes();
    match &*agent.link.borrow() {
        Link::Attached => {}
        Link::Unknown => notes.push("The control plane has not answered a heartbeat yet.".to_owned()),
        Link::Unheard(reason) => {
            notes.push(format!("The control plane has not answered a heartbeat yet: {reason}. Sandboxes go on."));
        }
        Link::Fenced(reason) => notes.push(format!("Fenced: {reason}. Sandboxes go on, and nothing new is begun.")),
        Link::Detached(reason) => notes.push(format!("Detached from the control plane: {reason}. Sandboxes go on.")),
    }
    if facts.templates.is_empty() {
        notes.push("There is no template: put a root file system into images/<name>/rootfs.ext4.".to_owned());
    }
    let (vmm, vmm_version) = agent.vmm();
    let host_id = agent.credentials.borrow().host.host_id.clone();
    GetHostResponse {
        host_id,
        agent_version: facts.agent_version,
        isolation: facts.isolation,
        vmm,
        vmm_version,
        kernel_version: agent.kernel_version().await,
        cpu_cores: u32::try_from(facts.cpu_cores).unwrap_or_default(),
        memory_mib: u64::try_from(facts.memory_mb).unwrap_or_default(),
        disk_mib: u64::try_from(facts.disk_gb).unwrap_or_default() * 1024,
        disk_free_mib: room.disk_free_mib,
        templates: facts.templates,
        objects: objects.into_iter().collect(),
        agent_rss_bytes: own_rss_bytes(),
        notes,
        cgroup_driver: agent.cgroup_driver.clone(),
        ..Default::default()
    }
}

/// 0 when /proc does not tell.
fn own_rss_bytes() -> u64 {
    procfs::process::Process::myself()
        .and_then(|process| process.stat())
        .map(|stat| stat.rss * procfs::page_size())
        .unwrap_or_default()
}
