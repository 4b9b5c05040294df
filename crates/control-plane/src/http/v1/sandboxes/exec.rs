//! `POST /v1/sandboxes/{id}/exec`: runs a command to its end and answers with what it wrote; or, in the background, answers when it runs.

use std::time::{Duration, Instant};

use api::host::__buffa::oneof::exec_response::Event;
use api::host::ExecRequest;
use api::v1::errors::ErrorBody;
use api::v1::exec::{Exec, ExecOutcome, ExecStarted};
use axum::extract::State;
use axum::response::{IntoResponse as _, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use connectrpc::client::CallOptions;
use futures::TryStreamExt as _;
use http::StatusCode;
use model::ids::SandboxId;

use super::streams;
use crate::agents::{Agent, AgentError, said};
use crate::app::App;
use crate::http::access::Caller;
use crate::http::body::{Id, Json};
use crate::http::errors::ApiError;
use crate::http::socket::Events;

/// Of each stream; what comes after it is read and thrown away, so that the command does not block.
const OUTPUT_BYTES_MAX: usize = 10 * 1024 * 1024;
const TIMEOUT_DEFAULT_SEC: i64 = 30;
/// Of a command that somebody waits for.
const TIMEOUT_MAX_SEC: i64 = 3600;
/// Of one in the background: the host counts it in milliseconds of 32 bits.
const TIMEOUT_BACKGROUND_MAX_SEC: i64 = 30 * 24 * 3600;
/// For a process to be started: in a sandbox under load that takes seconds.
const START_TIME_MAX: Duration = Duration::from_secs(60);
/// The host ends the command at its time; this much later we stop waiting for the host.
const GRACE: Duration = Duration::from_secs(10);
const ARGS_MAX: usize = 1024;
const TEXT_BYTES_MAX: usize = 64 * 1024;

#[utoipa::path(post, path = "/{id}/exec", tag = "sandboxes", params(("id" = String, Path)), request_body = Exec,
    responses((status = 200, body = ExecOutcome), (status = 202, body = ExecStarted, description = "of a command in the background"),
        (status = 400, body = ErrorBody), (status = 404, body = ErrorBody),
        (status = 409, body = ErrorBody, description = "also: a process with that tag runs"), (status = 429, body = ErrorBody),
        (status = 502, body = ErrorBody), (status = 503, body = ErrorBody), (status = 504, body = ErrorBody)))]
pub async fn exec(
    State(app): State<App>,
    caller: Caller,
    Id(id): Id<SandboxId>,
    Json(body): Json<Exec>,
) -> Result<Response, ApiError> {
    let cmd = body.cmd.clone();
    if body.background {
        let tag = body.tag.clone().unwrap_or_else(|| format!("proc-{:08x}", rand::random::<u32>()));
        let pid = start(&app, &caller, &id, Exec { tag: Some(tag.clone()), ..body }).await?;
        let started = ExecStarted { sandbox_id: id.to_string(), cmd, pid, tag };
        return Ok((StatusCode::ACCEPTED, axum::Json(started)).into_response());
    }
    let timeout_sec = match body.timeout_sec.unwrap_or(0) {
        0 => TIMEOUT_DEFAULT_SEC,
        given => given,
    };
    let request = request(&id, body, timeout_sec)?;
    let limit = Duration::from_millis(request.timeout_ms.into()) + GRACE;
    let agent = super::awake(&app, &caller, &id).await?;
    let began = Instant::now();
    let collected = tokio::time::timeout(limit, collect(&agent, request)).await;
    let output = collected.map_err(|_| ApiError::deadline_exceeded("the command did not end in time"))??;
    let duration_ms = i64::try_from(began.elapsed().as_millis()).unwrap_or(i64::MAX);
    Ok(axum::Json(output.outcome(id.to_string(), cmd, duration_ms)).into_response())
}

/// Its pid. In a task of its own: a client that leaves is not to leave it open whether the process runs.
async fn start(app: &App, caller: &Caller, id: &SandboxId, body: Exec) -> Result<u32, ApiError> {
    let timeout_sec = body.timeout_sec.unwrap_or(0);
    let request = request(id, body, timeout_sec)?;
    let agent = super::awake(app, caller, id).await?;
    let options = CallOptions::default().with_timeout(START_TIME_MAX);
    let started = app.tracker.spawn(async move { agent.start_process_with_options(request, options).await });
    let started = started.await.map_err(|_| ApiError::internal())?;
    Ok(started.map_err(AgentError::from)?.into_owned().pid)
}

/// The call of the host; `timeout_sec` 0 is no limit.
pub fn request(id: &SandboxId, body: Exec, timeout_sec: i64) -> Result<ExecRequest, ApiError> {
    if body.cmd.is_empty() {
        return Err(ApiError::invalid("cmd", "is empty"));
    }
    let timeout_max_sec = if body.background { TIMEOUT_BACKGROUND_MAX_SEC } else { TIMEOUT_MAX_SEC };
    if !(0..=timeout_max_sec).contains(&timeout_sec) {
        return Err(ApiError::invalid("timeout_sec", format!("must be from 0 to {timeout_max_sec}")));
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
        tag: body.tag.map(streams::tag).transpose()?.unwrap_or_default(),
        ..Default::default()
    })
}

pub async fn events(agent: &Agent, request: ExecRequest) -> Result<Events, AgentError> {
    Ok(streams::events(agent.exec(request).await?))
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
                output.exit_code = said::exit_code(&end);
                return Ok(output);
            }
            // Only terminals have it.
            Some(Event::Pty(_)) => {}
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
