//! `GET /v1/sandboxes/{id}/pty` (WebSocket): a program at a terminal, or one that is at its terminal already.
//!
//! The first frame is `start`, answered by `started` with the tag under which the terminal is found again, or `connect` with such a tag. The
//! program goes on when the connection ends; whoever connects is sent what the sandbox still keeps of its output (256 KiB while it runs, 64
//! KiB for half a minute after its end), from a position on if they name one.
//!
//! ## Two generations of clients
//!
//! What is typed and shown goes in binary frames both ways. Clients of the first generation (SDK 0.1) take and send base64 in JSON instead,
//! and break on a binary frame; those of the second (SDK 0.3) do not see output in JSON. Their requests for the connection are the same byte
//! for byte: no header, no extension, nothing in the query tells them apart (looked at in 0.1.2 and 0.3.0, both on httpx). So:
//!
//! - `?frames=binary` or `?frames=json` says what the client takes, whatever it sends.
//! - Who sends `input` gets `output` from then on; who sends binary frames gets binary frames.
//! - A client that is on httpx, as both SDKs are, gets a `ping` at once. The second generation answers `pong` as soon as it reads, and gets
//!   binary frames. Output waits for that, or for something that is typed; after five seconds without either the client reads and does not
//!   answer, as the first generation does, and gets JSON. One of the second that does not read for so long, and has typed nothing, is sent
//!   what was said meanwhile once more, in binary, as soon as it answers.
//! - Everybody else gets binary frames.

use std::collections::BTreeMap;

use api::host::{ConnectProcessRequest, TerminalSize};
use api::v1::errors::ErrorBody;
use api::v1::exec::Exec;
use api::v1::pty::PtyClientFrame;
use axum::extract::State;
use axum::response::Response;
use http::{HeaderMap, header};
use model::ids::SandboxId;
use serde::Deserialize;
use utoipa::IntoParams;

use super::streams::{At, Place, Selected, TAG_BYTES_MAX, events, size};
use super::terminal::{Format, Frames, Greeting, Terminal};
use super::{exec, terminal};
use crate::agents::AgentError;
use crate::app::App;
use crate::http::access::Caller;
use crate::http::body::{Id, Query};
use crate::http::errors::ApiError;
use crate::http::rights::Grant;
use crate::http::socket::{self, Conversation, Over, Session, Turn, Upgrade};
use crate::measures::Counted;

const SHELL: &str = "/bin/bash";
const COLS_DEFAULT: i64 = 80;
const ROWS_DEFAULT: i64 = 24;
/// How the library says who it is on which both generations of the SDK are.
const EITHER_GENERATION: &str = "python-httpx/";

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct Wanted {
    /// In what the terminal's output comes: `binary` frames, or `json`, as base64 in `output`.
    frames: Option<String>,
}

#[utoipa::path(get, path = "/{id}/pty", tag = "sandboxes", params(("id" = String, Path), Wanted),
    responses((status = 101, description = "frames as PtyClientFrame and PtyServerFrame, and binary ones"),
        (status = 400, body = ErrorBody), (status = 404, body = ErrorBody), (status = 409, body = ErrorBody),
        (status = 503, body = ErrorBody)))]
pub async fn pty(
    State(app): State<App>,
    caller: Caller,
    grant: Grant,
    Id(id): Id<SandboxId>,
    Query(wanted): Query<Wanted>,
    headers: HeaderMap,
    upgrade: Upgrade,
) -> Result<Response, ApiError> {
    let upgrade = socket::upgrade(upgrade)?;
    let agent = headers.get(header::USER_AGENT).and_then(|agent| agent.to_str().ok()).unwrap_or_default();
    let frames = match wanted.frames.as_deref() {
        Some("binary") => Frames::Asked(Format::Binary),
        Some("json") => Frames::Asked(Format::Json),
        Some(_) => return Err(ApiError::invalid("frames", "must be binary or json")),
        None if agent.starts_with(EITHER_GENERATION) => Frames::Unknown,
        None => Frames::Assumed(Format::Binary),
    };
    let agent = super::awake(&app, &caller, &id).await?;
    let place = Place::new(&app, &caller, id, agent);
    let conversation = At { place: place.clone(), conversation: Pty { place, frames } };
    Ok(socket::open(app, grant, upgrade, Counted::terminal, conversation))
}

struct Pty {
    place: Place,
    frames: Frames,
}

/// What the first frame asks for.
enum First {
    Start { exec: Exec, size: TerminalSize },
    Connect { tag: String, from: u64, tells: bool },
}

impl Conversation for Pty {
    async fn hold(self, session: &mut Session) -> Result<(), Over> {
        let Place { id, agent, .. } = &self.place;
        let (events, greeting) = match session.first(first).await? {
            First::Start { exec, size } => {
                let tag = format!("pty-{:08x}", rand::random::<u32>());
                let mut request = exec::request(id, Exec { tag: Some(tag.clone()), ..exec }, 0)?;
                request.terminal = Some(size).into();
                (session.meanwhile(exec::events(agent, request)).await??, Greeting::Started { tag })
            }
            First::Connect { tag, from, tells } => {
                let request = ConnectProcessRequest {
                    sandbox_id: id.to_string(),
                    process: Some(Selected::Tag(tag).into()).into(),
                    output_from: from,
                    ..Default::default()
                };
                let stream = session.meanwhile(agent.connect_process(request)).await?.map_err(AgentError::from)?;
                (events(stream), Greeting::Connected { tells })
            }
        };
        Terminal::new(self.place, self.frames, greeting).relay(session, events).await
    }
}

fn first(session: &mut Session, turn: Turn) -> Result<Option<First>, Over> {
    let frame = match turn {
        Turn::Text(text) => session.parse(&text, terminal::FRAMES)?,
        Turn::Bytes(_) => {
            too_early(session)?;
            None
        }
        Turn::Event(_) | Turn::Quiet => None,
    };
    Ok(match frame {
        Some(PtyClientFrame::Start { cmd, args, cols, rows, envs, cwd, user }) => {
            let or = |asked: i64, default: i64| if asked == 0 { default } else { asked };
            let size = size(or(cols, COLS_DEFAULT), or(rows, ROWS_DEFAULT))?;
            Some(First::Start { exec: program(cmd, args, envs, cwd, user), size })
        }
        Some(PtyClientFrame::Connect { tag, from, position }) => {
            if tag.is_empty() || tag.len() > TAG_BYTES_MAX {
                return Err(ApiError::invalid("tag", "must be that of a terminal").into());
            }
            Some(First::Connect { tag, from: from.unwrap_or(0), tells: position })
        }
        Some(PtyClientFrame::Input { .. } | PtyClientFrame::Resize { .. } | PtyClientFrame::Kill) => {
            too_early(session)?;
            None
        }
        Some(PtyClientFrame::Pong) | None => None,
    })
}

fn too_early(session: &mut Session) -> Result<(), Over> {
    session.complain(&ApiError::wrong_state("there is no terminal yet: start or connect comes first", "not started"))
}

fn program(
    cmd: String,
    args: Vec<String>,
    envs: BTreeMap<String, String>,
    cwd: Option<String>,
    user: Option<String>,
) -> Exec {
    let cmd = if cmd.is_empty() { SHELL.to_owned() } else { cmd };
    Exec { cmd, args, envs, cwd, user, ..Exec::default() }
}
