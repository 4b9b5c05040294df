//! Asks hosts about sandboxes that they no longer name.
//!
//! A report that was composed before a create ended does not have it either, so the report alone says nothing: the host is asked about
//! this one sandbox, now. A host that does not answer says nothing at all. While most hosts are silent nobody is asked.

use std::time::Duration;

use api::host::GetSandboxRequest;
use connectrpc::client::CallOptions;
use model::sandbox::Observed;
use store::StoreError;
use store::sandboxes::Sandbox;
use tracing::warn;

use crate::agents::AgentError;
use crate::app::App;

/// An agent knows it from memory; one that takes longer is asked again.
const LOOK_TIME_MAX: Duration = Duration::from_secs(10);

pub async fn run(app: App) -> Result<(), StoreError> {
    if app.store.is_braked().await? {
        return Ok(());
    }
    let absent = app.store.absent_sandboxes().await?;
    // Side by side: a host that hangs keeps nobody from being asked about the others.
    let answers = futures::future::join_all(absent.iter().map(|sandbox| look(&app, sandbox))).await;
    for (sandbox, answer) in absent.iter().zip(answers) {
        match answer {
            Some(Observed::Running | Observed::Paused) => app.store.sandbox_is_present(&sandbox.id).await?,
            None => {}
            Some(_) => {
                warn!(sandbox.id = %sandbox.id, "the host no longer has sandbox {}", sandbox.id);
                app.store.sandbox_is_gone(&sandbox.id, sandbox.revision, "the host no longer has it").await?;
            }
        }
    }
    Ok(())
}

/// What the host says of it; none when it says nothing.
async fn look(app: &App, sandbox: &Sandbox) -> Option<Observed> {
    let placed = sandbox.host.as_ref()?;
    let request = GetSandboxRequest { sandbox_id: sandbox.id.to_string(), ..Default::default() };
    let answer = match app.agents.of(placed) {
        Ok(agent) => {
            let options = CallOptions::default().with_timeout(LOOK_TIME_MAX);
            agent.get_sandbox_with_options(request, options).await.map_err(AgentError::from)
        }
        Err(error) => Err(error),
    };
    match answer {
        Ok(answer) => answer.into_owned().state.observed.parse().ok(),
        Err(AgentError::UnknownSandbox) => Some(Observed::Killed),
        Err(_) => None,
    }
}
