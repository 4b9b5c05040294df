//! `wrenn logs SANDBOX [PROCESS]`: what a process has said, or what a sandbox's console shows; with `-f` also what comes.

use std::process::ExitCode;
use std::time::Duration;

use api::v1::exec::ExecServerFrame;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::json;
use tokio::io::AsyncWriteExt as _;
use tokio::time::Instant;

use super::exec_stream::{frame, refused, write};
use super::run::exit_code;
use crate::client::Client;
use crate::credentials::Options;
use crate::failure::Failure;
use crate::output::{Format, print_line, show};
use crate::printable;
use crate::websocket::{Lost, NotOpened, Socket};

const LOOK_EVERY: Duration = Duration::from_secs(1);
/// What is kept comes at once; when nothing has come for so long, it was all.
const QUIET: Duration = Duration::from_millis(700);
/// What is kept comes at once, and the stream does not say where it ends.
const SHOWN_MAX: Duration = Duration::from_secs(2);
/// A replica that ends is replaced within seconds.
const TRIES: u32 = 8;
const PAUSE_FIRST: Duration = Duration::from_millis(250);
/// So much of the end of what was shown is looked for in what is shown next.
const KNOWN: usize = 512;

#[derive(clap::Args)]
#[command(after_long_help = "\
Of a process that runs a sandbox keeps the last 256 KiB of output, of one that has ended 64 KiB for half a minute. With -f the exit code is that of \
the process. Without a process, and with -f, the console is looked at every second.")]
pub struct Arguments {
    /// The sandbox.
    id: String,
    /// A process, by its pid or its tag: its output. Without one: the console of the sandbox, with its kernel's and its init's messages.
    process: Option<String>,
    /// Go on with what comes, until the process ends, or the sandbox.
    #[arg(long, short)]
    follow: bool,
}

pub async fn run(arguments: &Arguments, options: &Options, format: Format) -> Result<ExitCode, Failure> {
    let client = Client::of_user(options)?;
    match &arguments.process {
        Some(process) => Output::new(&client, &arguments.id, process, format).shown(arguments.follow).await,
        None if arguments.follow => followed_console(&client, &arguments.id, format).await,
        None => {
            let text = console(&client, &arguments.id).await?;
            show(format, &json!({ "console": text }), |_| printable::lines(text.trim_end()))?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

async fn console(client: &Client, id: &str) -> Result<String, Failure> {
    client.get_text(client.url(&["v1", "sandboxes", id, "console"])).await
}

/// The API has the last part of it, so what is new is found by what was shown before.
async fn followed_console(client: &Client, id: &str, format: Format) -> Result<ExitCode, Failure> {
    let mut shown = String::new();
    loop {
        let text = match console(client, id).await {
            Ok(text) => text,
            // It has ended, or is paused: there is nothing more to come.
            Err(failure) if !shown.is_empty() && failure.code().is_some() => {
                eprintln!("wrenn: {}", failure.message());
                return Ok(ExitCode::SUCCESS);
            }
            Err(failure) => return Err(failure),
        };
        let new = new_part(&shown, &text);
        if !new.is_empty() {
            match format {
                Format::Json => print_line(&json!({ "console": new }).to_string())?,
                Format::Human => {
                    let mut stdout = tokio::io::stdout();
                    let text = printable::lines(new);
                    let written = async { stdout.write_all(text.as_bytes()).await.and(stdout.flush().await) };
                    if written.await.is_err() {
                        return Ok(ExitCode::SUCCESS);
                    }
                }
            }
            shown = text;
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// What of `now` was not in `before`. When the end of `before` is not in it any more, all of it is new.
fn new_part<'a>(before: &str, now: &'a str) -> &'a str {
    if let Some(rest) = now.strip_prefix(before) {
        return rest;
    }
    let from = before.len().saturating_sub(KNOWN);
    let from = (from..=before.len()).find(|at| before.is_char_boundary(*at)).unwrap_or(before.len());
    let known = &before[from..];
    match now.rfind(known) {
        Some(at) => &now[at + known.len()..],
        None => now,
    }
}

/// The output of a process, over as many connections as it takes.
struct Output<'a> {
    client: &'a Client,
    id: &'a str,
    process: &'a str,
    format: Format,
    /// Where in its output the next byte stands.
    position: Option<u64>,
    /// For one document.
    streams: [Vec<u8>; 2],
}

enum End {
    Exited(i32),
    /// What is kept was shown, and it runs on.
    Shown,
}

impl<'a> Output<'a> {
    fn new(client: &'a Client, id: &'a str, process: &'a str, format: Format) -> Self {
        Self { client, id, process, format, position: None, streams: Default::default() }
    }

    async fn shown(mut self, is_followed: bool) -> Result<ExitCode, Failure> {
        let end = tokio::select! {
            end = self.until_its_end(is_followed) => end?,
            _ = tokio::signal::ctrl_c() => return Ok(ExitCode::from(130)),
        };
        if self.format == Format::Json && !is_followed {
            let [stdout, stderr] = self.streams.map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
            let code = match end {
                End::Exited(code) => Some(code),
                End::Shown => None,
            };
            let told = json!({ "process": self.process, "stdout": stdout, "stderr": stderr, "exit_code": code });
            print_line(&told.to_string())?;
        }
        Ok(match end {
            // Whoever follows a process wants to know how it ended.
            End::Exited(code) if is_followed => exit_code(code),
            _ => ExitCode::SUCCESS,
        })
    }

    async fn until_its_end(&mut self, is_followed: bool) -> Result<End, Failure> {
        let mut tries = 0;
        loop {
            let before = self.position;
            let failure = match self.connection(is_followed).await? {
                Ok(end) => return Ok(end),
                Err(failure) => failure,
            };
            tries = if self.position > before { 1 } else { tries + 1 };
            if tries > TRIES {
                return Err(failure);
            }
            tokio::time::sleep(PAUSE_FIRST * (1 << (tries - 1))).await;
        }
    }

    /// The inner failure is one of the connection.
    async fn connection(&mut self, is_followed: bool) -> Result<Result<End, Failure>, Failure> {
        let mut url = self.client.url(&["v1", "sandboxes", self.id, "processes", self.process, "stream"]);
        url.query_pairs_mut().append_pair("encoding", "base64");
        if let Some(position) = self.position {
            url.query_pairs_mut().append_pair("from", &position.to_string());
        }
        let mut socket = match Socket::open(self.client, url).await {
            Ok(socket) => socket,
            Err(NotOpened::Refused(failure)) => return Err(failure),
            Err(NotOpened::Away(failure)) => return Ok(Err(failure)),
        };
        let mut has_begun = false;
        // A process that is never quiet must not be followed by who did not ask for it.
        let mut shown_by = Instant::now() + SHOWN_MAX;
        loop {
            let heard = if is_followed || !has_begun {
                socket.next().await
            } else {
                match tokio::time::timeout_at(shown_by.min(Instant::now() + QUIET), socket.next()).await {
                    Ok(heard) => heard,
                    Err(_) => {
                        socket.close().await;
                        return Ok(Ok(End::Shown));
                    }
                }
            };
            let heard = match heard {
                Ok(heard) => heard,
                Err(Lost::Closed { code: code @ (1008 | 4400..=4499), reason }) => {
                    return Err(Failure::new(format!("the stream was closed: {code} {reason}")));
                }
                Err(lost) => return Ok(Err(Failure::new(format!("the stream broke: {lost}")))),
            };
            match frame(heard)? {
                ExecServerFrame::Start { output_from, .. } => {
                    if let (Some(wanted), Some(found)) = (self.position, output_from)
                        && found > wanted
                    {
                        eprintln!("wrenn: {} bytes of its output are not kept any more", found - wanted);
                    }
                    self.position = output_from;
                    has_begun = true;
                    shown_by = Instant::now() + SHOWN_MAX;
                }
                ExecServerFrame::Stdout { data } => self.take(0, &data, is_followed).await?,
                ExecServerFrame::Stderr { data } => self.take(1, &data, is_followed).await?,
                ExecServerFrame::Exit { exit_code } => {
                    socket.close().await;
                    if self.format == Format::Json && is_followed {
                        print_line(&json!({ "exit_code": exit_code }).to_string())?;
                    }
                    return Ok(Ok(End::Exited(exit_code)));
                }
                ExecServerFrame::Error { code, data, fatal: true } => {
                    let is_away = matches!(code.as_str(), "host_unavailable" | "unavailable");
                    let failure = refused(code, data);
                    return if is_away { Ok(Err(failure)) } else { Err(failure) };
                }
                ExecServerFrame::Error { code, data, .. } => eprintln!("wrenn: {}", refused(code, data).message()),
            }
        }
    }

    async fn take(&mut self, stream: usize, data: &str, is_followed: bool) -> Result<(), Failure> {
        let bytes = STANDARD
            .decode(data)
            .map_err(|error| Failure::new(format!("output from the server is not base64: {error}")))?;
        if let Some(position) = &mut self.position {
            *position += bytes.len() as u64;
        }
        match (self.format, is_followed) {
            (Format::Human, _) if stream == 0 => write(&mut tokio::io::stdout(), data).await,
            (Format::Human, _) => write(&mut tokio::io::stderr(), data).await,
            (Format::Json, true) => {
                let name = ["stdout", "stderr"][stream];
                print_line(&json!({ name: String::from_utf8_lossy(&bytes) }).to_string())
            }
            // Bounded by what a sandbox keeps of a process.
            (Format::Json, false) => {
                self.streams[stream].extend(bytes);
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_new_is_shown() {
        assert_eq!(new_part("", "abc"), "abc");
        assert_eq!(new_part("abc", "abc"), "");
        assert_eq!(new_part("abc", "abcd"), "d");
        // The first part is not kept any more.
        assert_eq!(new_part("abcdef", "defgh"), "defgh");
        let long = format!("x{}", "ü".repeat(KNOWN));
        let now = format!("{}new", &long[101..]);
        assert_eq!(new_part(&long, &now), "new");
        assert_eq!(new_part(&long, "all new"), "all new");
    }
}
