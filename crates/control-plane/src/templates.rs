//! What a sandbox begins with, by the name of a template: a snapshot of its team, a template of the platform, or an image of the hosts.

use store::StoreError;
use store::audit::Actor;
use store::idempotency::Key;
use store::sandboxes::{Created, NewSandbox};

use crate::app::App;

pub const DEFAULT: &str = "minimal";
/// What newer clients call it when they name it; the default all the same, where nothing else has that name.
const DEFAULT_AS_NAMED: &str = "minimal-ubuntu";

/// Makes a sandbox of what `asked` names; with what of it was made. A template that gives way to another one of its name between the look
/// and the making is looked for once more.
pub async fn create(
    app: &App,
    asked: &NewSandbox,
    key: Option<&Key>,
    actor: &Actor,
) -> Result<(NewSandbox, Created), StoreError> {
    let mut is_again = false;
    loop {
        let mut new = asked.clone();
        resolve(app, &mut new).await?;
        let created = app.store.create_sandbox(&new, &app.lease(), key, actor).await?;
        if is_again || !matches!(created, Created::NoSnapshot) {
            return Ok((new, created));
        }
        is_again = true;
    }
}

/// Of a snapshot a sandbox has shape and user, and its environment as far as it is not given another.
async fn resolve(app: &App, new: &mut NewSandbox) -> Result<(), StoreError> {
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

/// What no host offers. Without a host nobody knows which templates there are.
pub async fn is_unknown(app: &App, new: &NewSandbox) -> Result<bool, StoreError> {
    Ok(new.snapshot.is_none()
        && !app.store.template_is_offered(new.team, new.template.as_str()).await?
        && app.store.any_host_online(new.team).await?)
}
