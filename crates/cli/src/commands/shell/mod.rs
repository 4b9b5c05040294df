//! `wrenn shell SANDBOX`: a terminal in a sandbox.
//!
//! ```text
//!   start ──> talking ──> exited          the exit code is the shell's
//!               │ ^  └──> detached        the shell goes on; `--attach TAG` comes back to it
//!            lost │ found again, with what was missed
//!               v │
//!              away ──> given up
//! ```
//!
//! Keys go as they are, in binary frames; what the shell shows comes the same way and is counted, so that after a connection that broke it goes on
//! at the byte where it stopped. Keys that were under way in that moment may be lost, and are never sent twice.

mod keys;
mod talk;

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::Duration;

use api::v1::pty::PtyClientFrame;
use tokio::io::AsyncReadExt as _;
use tokio::time::Instant;

use self::talk::{Ended, Showing, Typing};
use crate::client::Client;
use crate::commands::run::{exit_code, pair};
use crate::credentials::Options;
use crate::failure::{EXIT_OURS, Failure};
use crate::output::Format;
use crate::signals::Signals;
use crate::terminal::{self, Raw};
use crate::websocket::{Lost, NotOpened, Socket};

/// A control plane that is upgraded is back within seconds, and a network after a while.
const AWAY_MAX: Duration = Duration::from_secs(300);
const PAUSE_FIRST: Duration = Duration::from_millis(200);
const PAUSE_MAX: Duration = Duration::from_secs(5);
/// What a person types into a connection that is not there.
const UNSENT_MAX: usize = 64 << 10;

#[derive(clap::Args)]
#[command(after_long_help = LONG)]
pub struct Arguments {
    /// The sandbox.
    id: String,
    /// The program [default: /bin/bash]; with no arguments and a blank in it, it is a shell's.
    #[arg(long, value_name = "PROGRAM")]
    cmd: Option<String>,
    /// [default: the sandbox's default user]
    #[arg(long)]
    user: Option<String>,
    /// Working directory [default: the user's home].
    #[arg(long, value_name = "PATH")]
    cwd: Option<String>,
    #[arg(long = "env", value_name = "NAME=VALUE", value_parser = pair)]
    envs: Vec<(String, String)>,
    /// Come back to a shell that runs, with what is kept of what it showed.
    #[arg(long, value_name = "TAG", conflicts_with_all = ["cmd", "user", "cwd", "envs", "arguments"])]
    attach: Option<String>,
    /// Every key is the shell's, Ctrl-] too.
    #[arg(long)]
    no_keys: bool,
    /// Arguments of the program.
    #[arg(last = true, value_name = "ARG")]
    arguments: Vec<String>,
}

const LONG: &str = "\
Keys: Ctrl-] and then d detaches (the shell goes on, and --attach comes back to it), k kills the shell, Ctrl-] sends one Ctrl-], ? says this.

A connection that breaks is opened again for five minutes, and the shell goes on where it was. The exit code is the shell's; 0 after a \
detach; 125 when the command line itself failed.

Where standard input is no terminal, what comes from it is typed into the shell, and its end is typed as Ctrl-D. For scripts \
`wrenn sandbox exec` is the better choice: it has no terminal in between.";

pub async fn run(arguments: Arguments, options: &Options, format: Format) -> Result<ExitCode, Failure> {
    if format == Format::Json {
        return Err(Failure::usage("a terminal has no document: use `wrenn sandbox exec --json`"));
    }
    let client = Client::of_user(options)?;
    Shell::new(&client, arguments)?.run().await.map_err(|failure| failure.exiting(EXIT_OURS))
}

struct Shell<'a> {
    client: &'a Client,
    id: String,
    start: PtyClientFrame,
    typing: Typing,
    showing: Showing,
    signals: Signals,
    /// The last, so that it is dropped whatever happens to the others.
    raw: Option<Raw>,
}

/// How it went on while nobody answered.
enum Away {
    Found(Box<Socket>),
    Over(Ended),
}

impl<'a> Shell<'a> {
    fn new(client: &'a Client, arguments: Arguments) -> Result<Self, Failure> {
        let (cols, rows) = terminal::size();
        let signals = Signals::new()?;
        let raw = Raw::enter()?;
        let start = PtyClientFrame::Start {
            cmd: arguments.cmd.unwrap_or_default(),
            args: arguments.arguments,
            cols: cols.into(),
            rows: rows.into(),
            envs: environment(arguments.envs),
            cwd: arguments.cwd,
            user: arguments.user,
        };
        Ok(Self {
            client,
            id: arguments.id,
            start,
            typing: Typing::new(raw.is_some(), arguments.no_keys)?,
            showing: Showing::new(arguments.attach, raw.is_some()),
            signals,
            raw,
        })
    }

    async fn run(mut self) -> Result<ExitCode, Failure> {
        let ended = self.until_its_end().await;
        if let (Some(raw), Ok(Ended::Detached | Ended::Signal(_)) | Err(_)) = (&self.raw, &ended) {
            raw.make_plain(&self.showing.screen);
        }
        // The terminal is itself again before anything is said.
        drop(self.raw.take());
        Ok(match ended.map_err(|failure| self.with_way_back(failure))? {
            Ended::Exited(code) => exit_code(code),
            Ended::Detached => {
                eprintln!("{}", self.how_to_attach("wrenn: detached"));
                ExitCode::SUCCESS
            }
            Ended::Signal(code) => {
                eprintln!("{}", self.how_to_attach("wrenn: ended by a signal"));
                ExitCode::from(code)
            }
        })
    }

    async fn until_its_end(&mut self) -> Result<Ended, Failure> {
        let opened = open(self.client, &self.id, &self.first_frame()).await;
        let mut socket = Box::new(opened.map_err(NotOpened::failure)?);
        loop {
            let lost = tokio::select! {
                ended = talk::talk(*socket, &mut self.typing, &mut self.showing) => match ended? {
                    talk::Outcome::Ended(ended) => return Ok(ended),
                    talk::Outcome::Lost(lost) => lost,
                },
                code = self.signals.next() => return Ok(Ended::Signal(code)),
            };
            if let Some(failure) = self.final_reason(&lost) {
                return Err(failure);
            }
            self.showing.notice(&format!("the connection is lost ({lost}), trying again; Ctrl-] d gives up"));
            match self.found_again().await? {
                Away::Found(found) => socket = found,
                Away::Over(ended) => return Ok(ended),
            }
            self.showing.notice("connected again");
            self.typing.is_new_connection = true;
        }
    }

    /// What is wanted of a connection: a new shell, or the one that there is.
    fn first_frame(&self) -> PtyClientFrame {
        match &self.showing.tag {
            None => self.start.clone(),
            Some(tag) => PtyClientFrame::Connect { tag: tag.clone(), from: self.showing.position, position: true },
        }
    }

    /// Why it is of no use to try again.
    fn final_reason(&self, lost: &Lost) -> Option<Failure> {
        let id = &self.id;
        if self.showing.tag.is_none() {
            return Some(Failure::new(format!(
                "the connection was lost before the shell was named ({lost}); whether it runs is shown by `wrenn sandbox ps {id}`"
            )));
        }
        let Lost::Closed { code, reason } = lost else { return None };
        match code {
            4409 => Some(Failure::new(format!(
                "sandbox {id} does not run any more ({reason}); resumed, it goes on where it stood"
            ))),
            // Protocol, messages, limits; rights; gone.
            1002 | 1003 | 1007..=1010 | 4400..=4499 => {
                Some(Failure::new(format!("the connection was closed: {code} {reason}")))
            }
            _ => None,
        }
    }

    /// Tries until somebody answers, the person gives up, or it has taken too long.
    async fn found_again(&mut self) -> Result<Away, Failure> {
        let deadline = Instant::now() + AWAY_MAX;
        let mut pause = PAUSE_FIRST;
        let first_frame = self.first_frame();
        let Self { client, id, typing, signals, .. } = self;
        loop {
            let failure = {
                let attempt = async {
                    tokio::time::sleep(pause).await;
                    open(client, id, &first_frame).await
                };
                let mut attempt = std::pin::pin!(attempt);
                loop {
                    let mut buffer = [0; 4096];
                    tokio::select! {
                        opened = &mut attempt => match opened {
                            Ok(socket) => return Ok(Away::Found(Box::new(socket))),
                            Err(NotOpened::Refused(failure)) => return Err(failure),
                            Err(NotOpened::Away(failure)) => break failure,
                        },
                        code = signals.next() => return Ok(Away::Over(Ended::Signal(code))),
                        read = typing.stdin.read(&mut buffer), if typing.keys.is_some() => {
                            let count = read.unwrap_or(0);
                            if count == 0 || typing.typed_while_away(&buffer[..count], UNSENT_MAX) {
                                return Ok(Away::Over(Ended::Detached));
                            }
                        }
                    }
                }
            };
            if Instant::now() > deadline {
                return Err(Failure::new(format!("no connection for {} s: {}", AWAY_MAX.as_secs(), failure.message())));
            }
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }

    /// A shell that was there is there, unless it is said that it is not.
    fn with_way_back(&self, failure: Failure) -> Failure {
        if self.showing.tag.is_none() || failure.code() == Some("not_found") {
            return failure;
        }
        Failure::new(self.how_to_attach(&failure.message()))
    }

    fn how_to_attach(&self, said: &str) -> String {
        match &self.showing.tag {
            Some(tag) => format!("{said}; come back with `wrenn shell {} --attach {tag}`", self.id),
            None => said.to_owned(),
        }
    }
}

async fn open(client: &Client, id: &str, first_frame: &PtyClientFrame) -> Result<Socket, NotOpened> {
    let mut url = client.url(&["v1", "sandboxes", id, "pty"]);
    url.set_query(Some("frames=binary"));
    let mut socket = Socket::open(client, url).await?;
    let said = socket.saying.say(first_frame).await;
    said.map_err(|lost| NotOpened::Away(Failure::new(format!("the stream broke at its beginning: {lost}"))))?;
    Ok(socket)
}

/// What programs look at to know the terminal, beside what was asked for.
fn environment(given: Vec<(String, String)>) -> BTreeMap<String, String> {
    let mut envs = BTreeMap::new();
    if let Some(term) = std::env::var("TERM").ok().filter(|term| !term.is_empty()) {
        envs.insert("TERM".to_owned(), term);
    }
    if let Ok(colours) = std::env::var("COLORTERM") {
        envs.insert("COLORTERM".to_owned(), colours);
    }
    envs.extend(given);
    envs
}
