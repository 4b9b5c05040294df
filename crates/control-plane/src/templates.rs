//! What a sandbox begins with, by the name of a template: a snapshot of its team, a template of the platform, or an image of the hosts.

use store::StoreError;
use store::sandboxes::NewSandbox;

use crate::app::App;

pub const DEFAULT: &str = "minimal";
/// What newer clients call it when they name it; the default all the same, where nothing else has that name.
const DEFAULT_AS_NAMED: &str = "minimal-ubuntu";

/// Of a snapshot a sandbox has shape and user, and its environment as far as it is not given another.
pub async fn resolve(app: &App, new: &mut NewSandbox) -> Result<(), StoreError> {
    if let Some(snapshot) = app.store.snapshot_named(new.team, &new.template).await? {
        new.snapshot = Some(snapshot.id);
        new.shape = snapshot.shape;
        new.default_user = snapshot.default_user;
        for (name, value) in snapshot.envs {
            new.envs.entry(name).or_insert(value);
        }
    } else if new.template.as_str() == DEFAULT_AS_NAMED
        && !app.store.template_is_offered(new.team, DEFAULT_AS_NAMED).await?
    {
        new.template = DEFAULT.parse().expect("it is the name of a template");
    }
    Ok(())
}
