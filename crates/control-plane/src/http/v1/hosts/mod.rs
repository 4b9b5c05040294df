//! `/v1/hosts`: machines that run sandboxes, and what their agents say.

mod create;
mod delete;
mod delete_preview;
mod drain;
mod get;
mod heartbeat;
mod inspect;
mod list;
mod register;
mod renew;
mod silence;
pub mod tags;
mod token;
mod unfence;

use std::net::IpAddr;

use api::v1::hosts::{Held, Host, HostFacts};
use model::ids::HostId;
use store::hosts::{Facts, HostState};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::agents;
use crate::app::App;
use crate::http::errors::ApiError;

/// A host of the platform.
const REGULAR: &str = "regular";
/// A host of a team's own.
const BYOC: &str = "byoc";
const ADDRESS_BYTES_MAX: usize = 255;
const WORD_BYTES_MAX: usize = 128;
const TEMPLATES_MAX: usize = 1000;

pub fn router() -> OpenApiRouter<App> {
    OpenApiRouter::new()
        .routes(routes!(create::create, list::list))
        .routes(routes!(register::register))
        .routes(routes!(get::get, delete::delete))
        .routes(routes!(delete_preview::delete_preview))
        .routes(routes!(drain::drain))
        .routes(routes!(drain::undrain))
        .routes(routes!(unfence::unfence))
        .routes(routes!(tags::list, tags::add))
        .routes(routes!(tags::remove))
        .routes(routes!(silence::silence))
        .routes(routes!(token::token))
        .routes(routes!(inspect::inspect))
        .routes(routes!(renew::renew))
        .routes(routes!(heartbeat::heartbeat))
}

pub fn status_word(state: HostState) -> &'static str {
    match state {
        HostState::Pending => "pending",
        HostState::Online => "online",
        HostState::Unreachable => "unreachable",
        HostState::Draining => "draining",
        HostState::Fenced => "fenced",
    }
}

fn shown(host: store::hosts::Host) -> Host {
    let facts = host.facts.as_ref();
    let (cpu_cores, memory_mb, disk_gb) =
        facts.map_or((None, None, None), |f| (Some(f.cpu_cores), Some(f.memory_mb), Some(f.disk_gb)));
    Host {
        id: host.id.to_string(),
        kind: if host.owner.is_some() { BYOC } else { REGULAR }.to_owned(),
        team_id: host.owner.as_ref().map(|owner| owner.team.to_string()),
        team_name: host.owner.map(|owner| owner.name),
        provider: host.provider,
        availability_zone: host.availability_zone,
        arch: facts.map(|f| f.arch.clone()),
        cpu_cores,
        memory_mb,
        disk_gb,
        address: host.address,
        status: status_word(host.state).to_owned(),
        is_draining: host.is_draining,
        tags: host.tags,
        held: Held {
            running: host.held.running,
            paused: host.held.paused,
            failed: host.held.failed,
            snapshots: host.held.snapshots,
            vcpus: host.held.vcpus,
            memory_mb: host.held.memory_mib,
            disk_free_mb: host.held.disk_free_mib,
        },
        isolation: facts.map(|f| f.isolation.clone()),
        agent_version: facts.map(|f| f.agent_version.clone()),
        last_heartbeat_at: host.last_heartbeat_at,
        copy_heard_at: host.copy_heard_at,
        created_by: host.created_by,
        created_at: host.created_at,
        updated_at: host.updated_at,
    }
}

async fn find(app: &App, id: HostId) -> Result<store::hosts::Host, ApiError> {
    app.store.host(id).await?.ok_or_else(|| ApiError::not_found("host"))
}

/// What an agent says of its machine, within bounds: it is shown to people and counted on by placement.
fn facts(facts: HostFacts) -> Result<Facts, ApiError> {
    let words = [("arch", &facts.arch), ("isolation", &facts.isolation), ("agent_version", &facts.agent_version)];
    for (field, word) in words {
        if word.len() > WORD_BYTES_MAX || word.chars().any(char::is_control) {
            return Err(ApiError::invalid(field, "must have at most 128 printable characters"));
        }
    }
    for (field, number) in [("cpu_cores", facts.cpu_cores), ("memory_mb", facts.memory_mb), ("disk_gb", facts.disk_gb)]
    {
        if !(0..=1 << 40).contains(&number) {
            return Err(ApiError::invalid(field, "must be from 0 to 2^40"));
        }
    }
    let is_name = |name: &String| name.parse::<model::shape::TemplateName>().is_ok();
    if facts.templates.len() > TEMPLATES_MAX || !facts.templates.iter().all(is_name) {
        return Err(ApiError::invalid("templates", "must be at most 1000 names of templates"));
    }
    Ok(Facts {
        arch: facts.arch,
        cpu_cores: facts.cpu_cores,
        memory_mb: facts.memory_mb,
        disk_gb: facts.disk_gb,
        isolation: facts.isolation,
        agent_version: facts.agent_version,
        templates: facts.templates,
    })
}

/// The host part of `host:port`, when it is an address at which a host may be. Names are looked up: each of their addresses must be.
async fn host_of(app: &App, address: &str) -> Result<String, ApiError> {
    let wrong = || {
        ApiError::invalid(
            "address",
            "must be HOST:PORT, with the name or IP by which the control plane reaches the agent",
        )
    };
    let (host, port) = address.rsplit_once(':').ok_or_else(wrong)?;
    let is_port = port.parse::<u16>().is_ok_and(|port| port > 0) && port.bytes().all(|b| b.is_ascii_digit());
    if address.len() > ADDRESS_BYTES_MAX || !is_port {
        return Err(wrong());
    }
    let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    if let Ok(ip) = bare.parse::<IpAddr>() {
        if ip.is_ipv6() && bare == host {
            return Err(wrong());
        }
        return if app.agents.networks().has(ip) { Ok(bare.to_owned()) } else { Err(outside()) };
    }
    // These name hosts to the control plane itself, and not where they are.
    if agents::connect::is_reserved(host) {
        return Err(wrong());
    }
    let is_name = host.split('.').all(|label| {
        !label.is_empty()
            && label.len() <= 63
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
            && !label.starts_with('-')
    });
    if !is_name {
        return Err(wrong());
    }
    let mut addresses = tokio::net::lookup_host(address)
        .await
        .map_err(|_| ApiError::invalid("address", "is a name that cannot be looked up"))?;
    if addresses.all(|address| app.agents.networks().has(address.ip())) { Ok(host.to_owned()) } else { Err(outside()) }
}

fn outside() -> ApiError {
    ApiError::invalid("address", "is not in the networks in which hosts may be (WRENN_HOST_NETWORKS)")
}
