//! `/v1/admin/builds`: templates of the platform in the making.

mod archive;
mod cancel;
mod create;
mod get;
mod list;

use api::v1::builds::{Build, BuildStep};
use store::builds::Step;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::app::App;

pub fn router() -> OpenApiRouter<App> {
    OpenApiRouter::new()
        .routes(routes!(create::create, list::list))
        .routes(routes!(get::get))
        .routes(routes!(cancel::cancel))
}

fn shown(build: store::builds::Build, steps: Vec<Step>) -> Build {
    Build {
        id: build.id.to_string(),
        name: build.name.to_string(),
        base_template: build.base.to_string(),
        recipe: build.recipe,
        healthcheck: build.healthcheck,
        vcpus: build.shape.vcpus().into(),
        memory_mb: build.shape.memory().0.into(),
        disk_size_mb: build.shape.disk().0.into(),
        status: build.state.as_str().to_owned(),
        current_step: build.step,
        total_steps: build.total_steps.into(),
        logs: steps.into_iter().map(step).collect(),
        error: build.error,
        sandbox_id: build.sandbox.map(|id| id.to_string()),
        host_id: build.host.map(|id| id.to_string()),
        default_user: build.default_user,
        default_env: build.default_env,
        created_at: build.created_at,
        started_at: build.started_at,
        completed_at: build.completed_at,
    }
}

fn step(step: Step) -> BuildStep {
    BuildStep {
        step: step.step.into(),
        phase: step.phase,
        cmd: step.cmd,
        stdout: step.stdout,
        stderr: step.stderr,
        exit: step.exit,
        ok: step.exit == 0,
        elapsed_ms: step.elapsed_ms,
    }
}
