//! Between the wire's messages and our types. Requests are checked here, once.

use std::collections::BTreeMap;

use api::host::{self, SandboxSpec};
use connectrpc::ConnectError;
use model::ids::SnapshotId;
use model::shape::Shape;

use crate::sandbox::state::{Fence, Spec};

/// The public API allows 32 KiB in 128 pairs; the host refuses what cannot have come from there.
const ENVS_MAX: usize = 256;
const ENV_BYTES_MAX: usize = 64 * 1024;
const NAME_BYTES_MAX: usize = 128;

pub fn fence(fence: Option<host::Fence>) -> Result<Fence, ConnectError> {
    let fence = fence.ok_or_else(|| ConnectError::invalid_argument("fence is missing"))?;
    if fence.operation_id.len() > NAME_BYTES_MAX {
        return Err(ConnectError::invalid_argument("operation_id is too long"));
    }
    Ok(Fence { epoch: fence.host_epoch, revision: fence.revision, operation: fence.operation_id })
}

pub fn snapshot_id(text: &str) -> Result<SnapshotId, ConnectError> {
    text.parse().map_err(|_| ConnectError::invalid_argument("snapshot_id is not a snapshot's id"))
}

pub fn spec(spec: Option<SandboxSpec>) -> Result<Spec, ConnectError> {
    let spec = spec.ok_or_else(|| ConnectError::invalid_argument("spec is missing"))?;
    let shape = Shape::new(i64::from(spec.vcpus), i64::from(spec.memory_mib), i64::from(spec.disk_mib))
        .map_err(|error| ConnectError::invalid_argument(error.to_string()))?;
    let template =
        spec.template.parse().map_err(|_| ConnectError::invalid_argument("template is not a template's name"))?;
    if spec.default_user.len() > NAME_BYTES_MAX || spec.team_id.len() > NAME_BYTES_MAX {
        return Err(ConnectError::invalid_argument("default_user or team_id is too long"));
    }
    let snapshot = match spec.snapshot_id.as_str() {
        "" => None,
        id => Some(snapshot_id(id)?),
    };
    let envs: BTreeMap<String, String> = spec.envs.into_iter().collect();
    let bytes: usize = envs.iter().map(|(name, value)| name.len() + value.len()).sum();
    let named = envs.keys().all(|name| !name.is_empty() && !name.contains(['=', '\0']));
    if envs.len() > ENVS_MAX || bytes > ENV_BYTES_MAX || !named || envs.values().any(|value| value.contains('\0')) {
        return Err(ConnectError::invalid_argument("envs are too many, too long or cannot be set"));
    }
    Ok(Spec {
        template,
        vcpus: shape.vcpus(),
        memory_mib: shape.memory().0,
        disk_mib: shape.disk().0,
        envs,
        default_user: spec.default_user,
        team: spec.team_id,
        snapshot,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_what_the_public_api_cannot_have_let_through() {
        let good = || SandboxSpec {
            template: "minimal".to_owned(),
            vcpus: 1,
            memory_mib: 256,
            disk_mib: 1024,
            ..Default::default()
        };
        assert!(spec(Some(good())).is_ok());
        assert!(spec(None).is_err());
        for bad in [
            SandboxSpec { vcpus: 0, ..good() },
            SandboxSpec { memory_mib: u32::MAX, ..good() },
            SandboxSpec { template: "../x".to_owned(), ..good() },
            SandboxSpec { default_user: "x".repeat(200), ..good() },
            SandboxSpec { snapshot_id: "snap-../x".to_owned(), ..good() },
            SandboxSpec { envs: [("A=B".to_owned(), String::new())].into_iter().collect(), ..good() },
            SandboxSpec { envs: [("A".to_owned(), "x".repeat(100_000))].into_iter().collect(), ..good() },
        ] {
            assert!(spec(Some(bad)).is_err());
        }
        assert!(fence(None).is_err());
    }
}
