//! WebSockets in a sandbox: what the commands, the processes and the terminals have in common.

use api::host::__buffa::oneof::exec_response::Event;
use api::host::__buffa::view::ExecResponseView;
use api::host::{ExecResponse, ProcessSelector, TerminalSize};
use axum::extract::RawPathParams;
use connectrpc::ConnectError;
use connectrpc::client::ServerStream;
use futures::{StreamExt as _, stream};
use hyper::body::Incoming;
use model::ids::{SandboxId, TeamId};
use model::sandbox::Status;

use crate::agents::{Agent, AgentError, Refusal};
use crate::app::App;
use crate::http::access::Caller;
use crate::http::errors::ApiError;
use crate::http::socket::{Conversation, Events, GONE, Over, Session, TRY_LATER, WRONG_STATE};

/// Of a tag; 64 characters are at most so many bytes.
pub const TAG_BYTES_MAX: usize = 256;
const TAG_CHARS_MAX: usize = 64;

/// A process by what a path says of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Selected {
    Pid(u32),
    Tag(String),
}

impl Selected {
    /// The path's parameter `selector`.
    pub fn of(path: &RawPathParams) -> Result<Self, ApiError> {
        let text = path.iter().find(|(name, _)| *name == "selector").map(|(_, value)| value).unwrap_or_default();
        match text.parse() {
            Ok(pid) => Ok(Self::Pid(pid)),
            Err(_) if text.is_empty() || text.len() > TAG_BYTES_MAX => {
                Err(ApiError::invalid("selector", "must be a pid or a tag"))
            }
            Err(_) => Ok(Self::Tag(text.to_owned())),
        }
    }
}

impl From<Selected> for ProcessSelector {
    fn from(selected: Selected) -> Self {
        use api::host::__buffa::oneof::process_selector::Selector;
        let selector = match selected {
            Selected::Pid(pid) => Selector::Pid(pid),
            Selected::Tag(tag) => Selector::Tag(tag),
        };
        Self { selector: Some(selector), ..Default::default() }
    }
}

/// A tag that can stand in a path, and is no pid.
pub fn tag(text: String) -> Result<String, ApiError> {
    let length = text.chars().count();
    let is_plain = !text.chars().any(|c| c.is_control() || c == '/') && text.trim() == text;
    let is_number = text.chars().all(|c| c.is_ascii_digit());
    if !(1..=TAG_CHARS_MAX).contains(&length) || !is_plain || is_number || text == "." || text == ".." {
        let rule = "must have 1 to 64 printable characters, without / and not all of them digits";
        return Err(ApiError::invalid("tag", rule));
    }
    Ok(text)
}

/// A side of a terminal, in characters.
pub fn side(field: &'static str, asked: i64) -> Result<u32, ApiError> {
    match u32::try_from(asked) {
        Ok(side @ 1..=1000) => Ok(side),
        _ => Err(ApiError::invalid(field, "must be from 1 to 1000")),
    }
}

pub fn size(cols: i64, rows: i64) -> Result<TerminalSize, ApiError> {
    Ok(TerminalSize { cols: side("cols", cols)?, rows: side("rows", rows)?, ..Default::default() })
}

/// What the host tells of a process, as it comes. Dropping it does not end the process.
pub fn events(stream: ServerStream<Incoming, ExecResponseView<'static>>) -> Events {
    let events = stream::try_unfold(stream, |mut stream| async move {
        Ok(stream.message().await?.map(|message| (message.to_owned_message(), stream)))
    });
    events.boxed()
}

/// What an event says; or why there is none.
pub fn said(event: Option<Result<ExecResponse, ConnectError>>) -> Result<Option<Event>, Over> {
    match event.map(|event| event.map_err(AgentError::from)) {
        Some(Ok(event)) => Ok(event.event),
        // What envd says of a listener for whom others had to wait.
        Some(Err(AgentError::Refused { refusal: Refusal::TooLarge, .. })) => {
            Err(Over::Failed { error: ApiError::too_slow(), code: TRY_LATER })
        }
        Some(Err(error)) => Err(error.into()),
        None => {
            let message = "the stream of a process ended without its end".to_owned();
            Err(AgentError::Misbehaved { message }.into())
        }
    }
}

/// Where a conversation takes place.
#[derive(Clone)]
pub struct Place {
    pub app: App,
    pub team: TeamId,
    pub id: SandboxId,
    pub agent: Agent,
}

impl Place {
    pub fn new(app: &App, caller: &Caller, id: SandboxId, agent: Agent) -> Self {
        Self { app: app.clone(), team: caller.team, id, agent }
    }

    /// What an answer of the host means, when the sandbox is looked at again.
    async fn judge(&self, error: AgentError) -> Over {
        match error {
            AgentError::NotRunning | AgentError::UnknownSandbox => {
                match self.app.store.sandbox(self.team, &self.id).await {
                    Ok(Some(sandbox)) => match sandbox.status() {
                        Status::Stopping | Status::Stopped => {
                            Over::Failed { error: ApiError::not_found("sandbox"), code: GONE }
                        }
                        // It may run again by now; what was here has ended.
                        Status::Running => {
                            let message = "the sandbox was paused and resumed";
                            Over::Failed { error: ApiError::wrong_state(message, Status::Running), code: WRONG_STATE }
                        }
                        other => Over::Failed { error: ApiError::invalid_state(other), code: WRONG_STATE },
                    },
                    Ok(None) => Over::Failed { error: ApiError::not_found("sandbox"), code: GONE },
                    Err(_) => {
                        Over::Failed { error: ApiError::invalid_state("not running on its host"), code: WRONG_STATE }
                    }
                }
            }
            AgentError::Unreachable | AgentError::NoAnswer | AgentError::NotReady | AgentError::TooManyStreams => {
                Over::Failed { error: error.into(), code: TRY_LATER }
            }
            other => ApiError::from(other).into(),
        }
    }
}

/// A conversation whose hosts' answers are explained.
pub struct At<C> {
    pub place: Place,
    pub conversation: C,
}

impl<C: Conversation> Conversation for At<C> {
    async fn hold(self, session: &mut Session) -> Result<(), Over> {
        match self.conversation.hold(session).await {
            Err(Over::Host(error)) => Err(self.place.judge(error).await),
            ended => ended,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tag_can_stand_in_a_path_and_is_no_pid() {
        for right in ["a", "proc-0123abcd", "web server", "ä", "1a", "1.5", &"x".repeat(64)] {
            assert!(tag(right.to_owned()).is_ok(), "{right}");
        }
        for wrong in ["", "123", "a/b", "a\nb", "a\0", " a", ".", "..", &"x".repeat(65), &"1".repeat(20)] {
            assert_eq!(tag(wrong.to_owned()).err().map(|error| error.code()), Some("invalid_request"), "{wrong}");
        }
    }

    #[test]
    fn terminals_have_sides() {
        for right in [1, 80, 1000] {
            assert_eq!(side("cols", right).ok().map(i64::from), Some(right));
        }
        for wrong in [0, -1, 1001, 65_536, i64::from(u32::MAX) + 81, i64::MAX, i64::MIN] {
            assert!(side("cols", wrong).is_err(), "{wrong}");
        }
    }
}
