//! `POST /v1/sandboxes/{id}/exec`: runs a command to its end and answers with what it wrote.

use std::time::{Duration, Instant};

use api::host::__buffa::oneof::exec_response::Event;
use api::host::{ExecRequest, ExecResponse};
use api::v1::errors::ErrorBody;
use api::v1::exec::{Exec, ExecOutcome};
use axum::extract::State;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use connectrpc::ConnectError;
use futures::stream::BoxStream;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use model::ids::SandboxId;

use crate::agents::{Agent, AgentError};
use crate::app::App;
use crate::http::access::Caller;
use crate::http::body::{Id, Json};
use crate::http::errors::ApiError;

/// Of each stream; what comes after it is read and thrown away, so that the command does not block.
const OUTPUT_BYTES_MAX: usize = 10 * 1024 * 1024;
const TIMEOUT_DEFAULT_SEC: i64 = 30;
const TIMEOUT_MAX_SEC: i64 = 3600;
/// The host ends the command at its time; this much later we stop waiting for the host.
const GRACE: Duration = Duration::from_secs(10);
const ARGS_MAX: usize = 1024;
const TEXT_BYTES_MAX: usize = 64 * 1024;

pub type Events = BoxStream<'static, Result<ExecResponse, ConnectError>>;

#[utoipa::path(post, path = "/{id}/exec", tag = "sandboxes", params(("id" = String, Path)), request_body = Exec,
    responses((status = 200, body = ExecOutcome), (status = 404, body = ErrorBody), (status = 409, body = ErrorBody),
        (status = 504, body = ErrorBody)))]
pub async fn exec(
    State(app): State<App>,
    caller: Caller,
    Id(id): Id<SandboxId>,
    Json(body): Json<Exec>,
) -> Result<axum::Json<ExecOutcome>, ApiError> {
    let timeout_sec = match body.timeout_sec.unwrap_or(0) {
        0 => TIMEOUT_DEFAULT_SEC,
        given => given,
    };
    let cmd = body.cmd.clone();
    let request = request(&id, body, timeout_sec)?;
    let limit = Duration::from_millis(request.timeout_ms.into()) + GRACE;
    let agent = super::awake(&app, &caller, &id).await?;
    let began = Instant::now();
    let collected = tokio::time::timeout(limit, collect(&agent, request)).await;
    let output = collected.map_err(|_| ApiError::deadline_exceeded("the command did not end in time"))??;
    let duration_ms = i64::try_from(began.elapsed().as_millis()).unwrap_or(i64::MAX);
    Ok(axum::Json(output.outcome(id.to_string(), cmd, duration_ms)))
}

/// The call of the host; `timeout_sec` 0 is no limit.
pub fn request(id: &SandboxId, body: Exec, timeout_sec: i64) -> Result<ExecRequest, ApiError> {
    if body.cmd.is_empty() {
        return Err(ApiError::invalid("cmd", "is empty"));
    }
    if !(0..=TIMEOUT_MAX_SEC).contains(&timeout_sec) {
        return Err(ApiError::invalid("timeout_sec", format!("must be from 0 to {TIMEOUT_MAX_SEC}")));
    }
    let bytes = body.cmd.len() + body.args.iter().map(String::len).sum::<usize>();
    if body.args.len() > ARGS_MAX || bytes > TEXT_BYTES_MAX {
        return Err(ApiError::invalid("args", "must be at most 1024, with cmd 64 KiB in all"));
    }
    // One line as people type it, where no program has a blank in its name.
    let (cmd, args) = if body.args.is_empty() && body.cmd.contains(char::is_whitespace) {
        ("/bin/sh".to_owned(), vec!["-c".to_owned(), body.cmd])
    } else {
        (body.cmd, body.args)
    };
    Ok(ExecRequest {
        sandbox_id: id.to_string(),
        cmd,
        args,
        envs: super::create::envs(body.envs)?.into_iter().collect(),
        cwd: body.cwd.unwrap_or_default(),
        user: body.user.unwrap_or_default(),
        timeout_ms: u32::try_from(timeout_sec * 1000).expect("the range fits"),
        ..Default::default()
    })
}

/// What the host tells of a command. Dropping it does not end the command.
pub async fn events(agent: &Agent, request: ExecRequest) -> Result<Events, AgentError> {
    let stream = agent.exec(request).await?;
    let events = stream::try_unfold(stream, |mut stream| async move {
        Ok(stream.message().await?.map(|message| (message.to_owned_message(), stream)))
    });
    Ok(events.boxed())
}

#[derive(Default)]
struct Output {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    truncated: bool,
    exit_code: i32,
}

async fn collect(agent: &Agent, request: ExecRequest) -> Result<Output, ApiError> {
    let mut events = events(agent, request).await?.map_err(AgentError::from);
    let mut output = Output::default();
    while let Some(event) = events.try_next().await? {
        match event.event {
            Some(Event::Stdout(bytes)) => output.truncated |= keep(&mut output.stdout, &bytes),
            Some(Event::Stderr(bytes)) => output.truncated |= keep(&mut output.stderr, &bytes),
            Some(Event::End(end)) => {
                output.exit_code = if end.exited { end.exit_code } else { -1 };
                return Ok(output);
            }
            Some(Event::Start(_) | Event::Keepalive(_)) | None => {}
        }
    }
    Err(AgentError::Misbehaved { message: "the stream of a command ended without its end".to_owned() }.into())
}

/// True when something had to be left out.
fn keep(kept: &mut Vec<u8>, bytes: &[u8]) -> bool {
    let room = OUTPUT_BYTES_MAX - kept.len();
    kept.extend_from_slice(&bytes[..bytes.len().min(room)]);
    bytes.len() > room
}

impl Output {
    fn outcome(mut self, sandbox_id: String, cmd: String, duration_ms: i64) -> ExecOutcome {
        if self.truncated {
            // The cut may lie within a character, which must not turn text into base64.
            cut_at_character(&mut self.stdout);
            cut_at_character(&mut self.stderr);
        }
        let (stdout, stderr, encoding) = match (String::from_utf8(self.stdout), String::from_utf8(self.stderr)) {
            (Ok(stdout), Ok(stderr)) => (stdout, stderr, "utf-8"),
            (stdout, stderr) => {
                let base64 = |text: Result<String, std::string::FromUtf8Error>| match text {
                    Ok(text) => STANDARD.encode(text),
                    Err(error) => STANDARD.encode(error.as_bytes()),
                };
                (base64(stdout), base64(stderr), "base64")
            }
        };
        ExecOutcome {
            sandbox_id,
            cmd,
            stdout,
            stderr,
            exit_code: self.exit_code,
            duration_ms,
            encoding: encoding.to_owned(),
            truncated: self.truncated,
        }
    }
}

fn cut_at_character(bytes: &mut Vec<u8>) {
    if let Err(error) = std::str::from_utf8(bytes)
        && error.error_len().is_none()
    {
        bytes.truncate(error.valid_up_to());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn binary_output_makes_both_streams_base64() {
        let output = Output { stdout: vec![0xff], stderr: b"a".to_vec(), ..Default::default() };
        let outcome = output.outcome(String::new(), String::new(), 0);
        assert_eq!(
            (outcome.encoding.as_str(), outcome.stdout.as_str(), outcome.stderr.as_str()),
            ("base64", "/w==", "YQ==")
        );
    }

    #[test]
    fn a_cut_within_a_character_keeps_text_text() {
        let output = Output { stdout: "aé".as_bytes()[..2].to_vec(), truncated: true, ..Default::default() };
        let outcome = output.outcome(String::new(), String::new(), 0);
        assert_eq!((outcome.encoding.as_str(), outcome.stdout.as_str(), outcome.truncated), ("utf-8", "a", true));
    }

    #[test]
    fn output_beyond_the_limit_is_cut() {
        let mut kept = vec![0; OUTPUT_BYTES_MAX - 1];
        assert!(!keep(&mut kept, b"1"));
        assert!(keep(&mut kept, b"2"));
        assert_eq!(kept.len(), OUTPUT_BYTES_MAX);
    }
}
