//! `GET /v1/sandboxes/{id}/processes/{selector}/stream` (WebSocket): the output of a process that runs already, by its pid or its tag.
//!
//! First comes what the sandbox still keeps of its output: up to 256 KiB while it runs, 64 KiB for half a minute after its end; from position
//! `?from=` on when that is given. Then what it says, then its end. `start` tells where the output begins, so that whoever comes back asks
//! for the rest, and sees when there is a gap. A process that is unknown, or forgotten, is told of after the upgrade, since published clients
//! take a refused upgrade for a fault of theirs.
//!
//! Listening wakes no paused sandbox: what only listens, and comes back when it is cut off, would never let one sleep.

use api::host::ConnectProcessRequest;
use api::v1::errors::ErrorBody;
use axum::extract::{RawPathParams, State};
use axum::response::Response;
use model::ids::SandboxId;
use serde::Deserialize;
use utoipa::IntoParams;

use super::output::{Encoder, relay};
use super::streams::{At, Place, Selected, events};
use crate::agents::AgentError;
use crate::app::App;
use crate::http::access::Caller;
use crate::http::body::{Id, Query};
use crate::http::errors::ApiError;
use crate::http::rights::Grant;
use crate::http::socket::{self, Conversation, Over, Session, Upgrade};
use crate::measures::Counted;

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct Wanted {
    /// Position in its output from which on it is sent, as far as it is kept; absent: all that is kept.
    from: Option<u64>,
    /// `base64`: every `data` is base64, so that binary output stays what it is.
    encoding: Option<String>,
}

#[utoipa::path(get, path = "/{id}/processes/{selector}/stream", tag = "sandboxes",
    params(("id" = String, Path), ("selector" = String, Path, description = "a pid, or a tag"), Wanted),
    responses((status = 101, description = "frames as ExecServerFrame; the client's are `stop` of ExecClientFrame"),
        (status = 400, body = ErrorBody), (status = 404, body = ErrorBody), (status = 409, body = ErrorBody),
        (status = 503, body = ErrorBody)))]
pub async fn process_stream(
    State(app): State<App>,
    caller: Caller,
    grant: Grant,
    Id(id): Id<SandboxId>,
    path: RawPathParams,
    Query(wanted): Query<Wanted>,
    upgrade: Upgrade,
) -> Result<Response, ApiError> {
    let upgrade = socket::upgrade(upgrade)?;
    let process = Selected::of(&path)?;
    let is_base64 = match wanted.encoding.as_deref() {
        None => false,
        Some("base64") => true,
        Some(_) => return Err(ApiError::invalid("encoding", "must be base64, or absent")),
    };
    let agent = super::running(&app, &caller, &id).await?;
    let place = Place::new(&app, &caller, id, agent);
    let listener = Listener { place: place.clone(), process, output_from: wanted.from.unwrap_or(0), is_base64 };
    let conversation = At { place, conversation: listener };
    Ok(socket::open(app, grant, upgrade, Counted::process_stream, conversation))
}

struct Listener {
    place: Place,
    process: Selected,
    output_from: u64,
    is_base64: bool,
}

impl Conversation for Listener {
    async fn hold(self, session: &mut Session) -> Result<(), Over> {
        let Place { id, agent, .. } = &self.place;
        let request = ConnectProcessRequest {
            sandbox_id: id.to_string(),
            process: Some(self.process.into()).into(),
            output_from: self.output_from,
            ..Default::default()
        };
        let stream = session.meanwhile(agent.connect_process(request)).await?.map_err(AgentError::from)?;
        relay(session, events(stream), Encoder::late(self.is_base64)).await
    }
}
