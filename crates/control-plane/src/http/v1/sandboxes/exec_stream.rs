//! `GET /v1/sandboxes/{id}/exec/stream` (WebSocket): runs a command and sends its output as it comes.
//!
//! The command's output waits for the client, and the command goes on when the client leaves. How such connections are bounded and closed:
//! `http/socket.rs`.

use api::v1::errors::ErrorBody;
use api::v1::exec::{Exec, ExecClientFrame};
use axum::extract::State;
use axum::response::Response;
use model::ids::SandboxId;

use super::exec::{events, request};
use super::output::{Encoder, relay};
use super::streams::{At, Place};
use crate::app::App;
use crate::http::access::Caller;
use crate::http::body::Id;
use crate::http::errors::ApiError;
use crate::http::rights::Grant;
use crate::http::socket::{self, Conversation, NORMAL, Over, Session, Turn, Upgrade};
use crate::measures::Counted;

pub const FRAMES: &str = "start, stop";

#[utoipa::path(get, path = "/{id}/exec/stream", tag = "sandboxes", params(("id" = String, Path)),
    responses((status = 101, description = "frames as ExecClientFrame and ExecServerFrame"), (status = 404, body = ErrorBody),
        (status = 409, body = ErrorBody)))]
pub async fn exec_stream(
    State(app): State<App>,
    caller: Caller,
    grant: Grant,
    Id(id): Id<SandboxId>,
    upgrade: Upgrade,
) -> Result<Response, ApiError> {
    let upgrade = socket::upgrade(upgrade)?;
    let agent = super::awake(&app, &caller, &id).await?;
    let place = Place::new(&app, &caller, id, agent);
    let conversation = At { place: place.clone(), conversation: Command(place) };
    Ok(socket::open(app, grant, upgrade, Counted::exec_stream, conversation))
}

struct Command(Place);

/// The start frame's contents.
struct Start {
    exec: Exec,
    is_base64: bool,
}

impl Conversation for Command {
    async fn hold(self, session: &mut Session) -> Result<(), Over> {
        let Place { id, agent, .. } = &self.0;
        let start = session.first(start).await?;
        let timeout_sec = start.exec.timeout_sec.unwrap_or(0);
        let request = request(id, start.exec, timeout_sec)?;
        let events = session.meanwhile(events(agent, request)).await??;
        relay(session, events, Encoder::new(start.is_base64)).await
    }
}

fn start(session: &mut Session, turn: Turn) -> Result<Option<Start>, Over> {
    let frame = match turn {
        Turn::Text(text) => session.parse(&text, FRAMES)?,
        Turn::Bytes(_) => session.nonsense(FRAMES).map(|()| None)?,
        Turn::Event(_) | Turn::Quiet => None,
    };
    match frame {
        Some(ExecClientFrame::Start { cmd, args, envs, cwd, user, timeout_sec, encoding }) => {
            let is_base64 = encoding.as_deref() == Some("base64");
            let exec = Exec { cmd, args, timeout_sec, envs, cwd, user, background: false, tag: None };
            Ok(Some(Start { exec, is_base64 }))
        }
        Some(ExecClientFrame::Stop) => Err(Over::Closed { code: NORMAL, reason: "stopped" }),
        None => Ok(None),
    }
}
