//! What a build does in its sandbox: commands with the end of what they wrote, processes that go on, files.

use std::collections::BTreeMap;
use std::time::Duration;

use api::host::__buffa::oneof::exec_response::Event;
use api::host::ExecRequest;
use bytes::Bytes;
use connectrpc::client::CallOptions;
use futures::Stream;
use model::ids::SandboxId;

use super::log::Tail;
use crate::agents::{Agent, AgentError, said};
use crate::http::errors::ApiError;
use crate::uploads::{Target, relay};

/// The host ends a command at its time; this much later nobody waits for the host.
const GRACE: Duration = Duration::from_secs(10);
/// For a process to be started: in a sandbox under load that takes seconds.
const START_TIME_MAX: Duration = Duration::from_secs(60);

pub struct Guest {
    pub agent: Agent,
    pub sandbox: SandboxId,
}

pub struct Command<'a> {
    /// For `/bin/sh -c`.
    pub script: &'a str,
    /// The script's `$1` and so on.
    pub args: Vec<String>,
    pub user: &'a str,
    pub cwd: &'a str,
    pub envs: &'a BTreeMap<String, String>,
}

#[derive(Debug, Default)]
pub struct Ran {
    pub stdout: String,
    pub stderr: String,
    /// -1: it did not end by itself.
    pub exit: i32,
    /// It did not end in its time.
    pub is_late: bool,
}

impl Guest {
    pub async fn run(&self, command: Command<'_>, time: Duration) -> Result<Ran, AgentError> {
        let (mut stdout, mut stderr) = (Tail::default(), Tail::default());
        let request = self.request(command, Some(time));
        let ended = tokio::time::timeout(time + GRACE, self.hear(request, &mut stdout, &mut stderr)).await;
        let (exit, is_late) = match ended {
            Ok(Ok(exit)) => (exit, false),
            Ok(Err(AgentError::DeadlineExceeded)) | Err(_) => (-1, true),
            Ok(Err(error)) => return Err(error),
        };
        Ok(Ran { stdout: stdout.text(), stderr: stderr.text(), exit, is_late })
    }

    async fn hear(&self, request: ExecRequest, stdout: &mut Tail, stderr: &mut Tail) -> Result<i32, AgentError> {
        let mut events = self.agent.exec(request).await?;
        while let Some(message) = events.message().await? {
            match message.to_owned_message().event {
                Some(Event::Stdout(bytes)) => stdout.add(&bytes),
                Some(Event::Stderr(bytes)) => stderr.add(&bytes),
                Some(Event::End(end)) => return Ok(said::exit_code(&end)),
                Some(Event::Start(_) | Event::Pty(_) | Event::Keepalive(_)) | None => {}
            }
        }
        Err(AgentError::Misbehaved { message: "the stream of a command ended without its end".to_owned() })
    }

    /// It goes on when nobody hears it.
    pub async fn start(&self, command: Command<'_>, tag: String) -> Result<(), AgentError> {
        let request = ExecRequest { tag, ..self.request(command, None) };
        let options = CallOptions::default().with_timeout(START_TIME_MAX);
        self.agent.start_process_with_options(request, options).await?;
        Ok(())
    }

    pub async fn put(&self, path: &str, source: impl Stream<Item = Result<Bytes, ApiError>>) -> Result<(), ApiError> {
        let target = Target { sandbox: self.sandbox.clone(), path: path.to_owned(), user: "root".to_owned() };
        relay(&self.agent, target, source, u64::MAX).await
    }

    fn request(&self, command: Command<'_>, time: Option<Duration>) -> ExecRequest {
        let mut args = vec!["-c".to_owned(), command.script.to_owned(), "sh".to_owned()];
        args.extend(command.args);
        ExecRequest {
            sandbox_id: self.sandbox.to_string(),
            cmd: "/bin/sh".to_owned(),
            args,
            envs: command.envs.clone().into_iter().collect(),
            cwd: command.cwd.to_owned(),
            user: command.user.to_owned(),
            timeout_ms: time.map_or(0, |time| u32::try_from(time.as_millis()).unwrap_or(u32::MAX)),
            ..Default::default()
        }
    }
}
