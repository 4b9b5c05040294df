//! `/v1/snapshots`: saved states of sandboxes under a name, for others to begin with; and the templates of the platform beside them.

pub(super) mod create;
pub(super) mod delete;
mod list;

use api::v1::snapshots::Template;
use store::snapshots::Snapshot;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::app::App;

pub fn router() -> OpenApiRouter<App> {
    OpenApiRouter::new().routes(routes!(create::create, list::list)).routes(routes!(delete::delete))
}

/// As clients see it.
pub(super) fn shown(snapshot: Snapshot) -> Template {
    Template {
        name: snapshot.name.unwrap_or_default(),
        kind: "snapshot".to_owned(),
        vcpus: Some(snapshot.shape.vcpus().into()),
        memory_mb: Some(snapshot.shape.memory().0.into()),
        disk_size_mb: Some(snapshot.shape.disk().0.into()),
        size_bytes: snapshot.size_bytes,
        created_at: Some(snapshot.created_at),
        platform: snapshot.is_published,
        sandbox_id: Some(snapshot.sandbox.to_string()),
        template: Some(snapshot.template),
    }
}
