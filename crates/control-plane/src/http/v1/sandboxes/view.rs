//! A sandbox as clients see it.

use api::v1::sandboxes::{Sandbox, Step};
use model::sandbox::{Observed, Status};

pub fn shown(sandbox: store::sandboxes::Sandbox) -> Sandbox {
    let status = sandbox.status();
    let is_silent = sandbox.host.as_ref().is_some_and(|placed| placed.is_silent);
    // The last state stays: silence is not news about a sandbox.
    let reason = match is_silent && sandbox.observed != Observed::Killed {
        true => Some("host_silent".to_owned()),
        false => sandbox.reason,
    };
    // What the host runs it with; the user's own names win.
    let mut metadata = sandbox.versions;
    metadata.extend(sandbox.metadata);
    Sandbox {
        id: sandbox.id.to_string(),
        status: status.as_str().to_owned(),
        reason,
        template: sandbox.template,
        vcpus: sandbox.shape.vcpus().into(),
        memory_mb: sandbox.shape.memory().0.into(),
        disk_size_mb: sandbox.shape.disk().0.into(),
        timeout_sec: sandbox.policy.timeout_sec,
        on_timeout: sandbox.policy.on_timeout.as_str().to_owned(),
        kept: matches!(status, Status::Pausing | Status::Paused | Status::Resuming)
            .then(|| sandbox.kept.as_str().to_owned()),
        idle_timeout_sec: sandbox.policy.idle_timeout_sec,
        auto_resume: sandbox.policy.auto_resume,
        idle_since: sandbox.idle_since.filter(|_| status == Status::Running),
        expires_at: sandbox.deadline.filter(|_| status == Status::Running),
        isolation: sandbox.isolation,
        tags: sandbox.asked.tags,
        host_id: sandbox.host.map(|placed| placed.host.to_string()),
        incarnation: sandbox.incarnation,
        created_at: sandbox.created_at,
        started_at: sandbox.started_at,
        last_active_at: sandbox.last_active_at,
        last_updated: sandbox.updated_at,
        metadata,
        steps: sandbox.steps.into_iter().map(|(name, ms)| Step { name, ms }).collect(),
    }
}
