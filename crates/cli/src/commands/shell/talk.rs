//! One connection to a shell, from its first frame to its end: keys go there, what is shown comes back, each by its own way, so that neither waits
//! for the other.

use std::io::IsTerminal as _;
use std::time::Duration;

use api::v1::pty::{PtyClientFrame, PtyServerFrame};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, Stdin, Stdout};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::Notify;
use tokio::time::Instant;

use super::keys::{HELP, Keys, Typed};
use crate::commands::exec_stream::refused;
use crate::failure::{Doing as _, Failure};
use crate::terminal::{self, Screen};
use crate::websocket::{Heard, Hearing, Lost, PING_EVERY, Saying, Socket};

/// What ends the input of a terminal.
const END_OF_INPUT: &[u8] = &[4];
/// A program that takes the terminal as it is sees no end in it, so it is typed again until the shell is over.
const END_AGAIN_EVERY: Duration = Duration::from_secs(1);

/// What ended it for good.
pub enum Ended {
    Exited(i32),
    Detached,
    /// The exit code that goes with it.
    Signal(u8),
}

pub enum Outcome {
    Ended(Ended),
    Lost(Lost),
}

/// What goes to the shell, and outlives connections.
pub struct Typing {
    pub stdin: Stdin,
    /// None: every byte is the shell's.
    pub keys: Option<Keys>,
    resized: Signal,
    is_terminal: bool,
    /// Standard input has ended.
    is_over: bool,
    /// The shell may have had another size until now.
    pub is_new_connection: bool,
    /// What was typed while there was no connection.
    unsent: Vec<u8>,
}

/// What comes from it, and outlives connections.
pub struct Showing {
    stdout: Stdout,
    is_raw: bool,
    pub tag: Option<String>,
    /// How many bytes the shell had shown where this one stands; none: not known yet.
    pub position: Option<u64>,
    pub screen: Screen,
}

impl Typing {
    pub fn new(is_raw: bool, no_keys: bool) -> Result<Self, Failure> {
        Ok(Self {
            stdin: tokio::io::stdin(),
            keys: (is_raw && !no_keys).then(Keys::default),
            resized: signal(SignalKind::window_change()).doing(|| "listen for signals".to_owned())?,
            is_terminal: std::io::stdin().is_terminal(),
            is_over: false,
            is_new_connection: true,
            unsent: Vec::new(),
        })
    }

    /// Keeps what is for the shell, up to a bound; true: detach.
    pub fn typed_while_away(&mut self, bytes: &[u8], limit: usize) -> bool {
        let Some(keys) = &mut self.keys else { return false };
        for typed in keys.read(bytes) {
            match typed {
                Typed::Detach => return true,
                Typed::Input(input) if self.unsent.len() + input.len() <= limit => self.unsent.extend(input),
                // Too much of it, or nothing that can be done from here.
                Typed::Input(_) | Typed::Kill | Typed::Help => {}
            }
        }
        false
    }

    /// Until the connection breaks or the person leaves.
    async fn run(&mut self, saying: &mut Saying, asked: &Notify, is_raw: bool) -> Result<Ended, Lost> {
        if std::mem::take(&mut self.is_new_connection) {
            saying.say(&resize()).await?;
        }
        if !self.unsent.is_empty() {
            saying.bytes(std::mem::take(&mut self.unsent)).await?;
        }
        let mut ping = tokio::time::interval_at(Instant::now() + PING_EVERY, PING_EVERY);
        let mut end_again = tokio::time::interval(END_AGAIN_EVERY);
        let mut buffer = [0; 16 << 10];
        loop {
            // Each of them may lose without harm: ticks, signals and notices stay, and a read that loses has taken nothing.
            tokio::select! {
                read = self.stdin.read(&mut buffer), if !self.is_over => match read.unwrap_or(0) {
                    // The terminal is gone.
                    0 if self.is_terminal => return Ok(Ended::Detached),
                    0 => self.is_over = true,
                    count => {
                        if self.send(&buffer[..count], saying, is_raw).await? {
                            return Ok(Ended::Detached);
                        }
                    }
                },
                _ = end_again.tick(), if self.is_over => saying.bytes(END_OF_INPUT.to_vec()).await?,
                _ = self.resized.recv() => saying.say(&resize()).await?,
                () = asked.notified() => saying.say(&PtyClientFrame::Pong).await?,
                _ = ping.tick() => saying.ping().await?,
            }
        }
    }

    /// True: detach.
    async fn send(&mut self, bytes: &[u8], saying: &mut Saying, is_raw: bool) -> Result<bool, Lost> {
        let Some(keys) = &mut self.keys else {
            saying.bytes(bytes.to_vec()).await?;
            return Ok(false);
        };
        for typed in keys.read(bytes) {
            match typed {
                Typed::Input(input) => saying.bytes(input).await?,
                Typed::Kill => saying.say(&PtyClientFrame::Kill).await?,
                Typed::Help => notice(is_raw, HELP),
                Typed::Detach => return Ok(true),
            }
        }
        Ok(false)
    }
}

impl Showing {
    pub fn new(tag: Option<String>, is_raw: bool) -> Self {
        Self { stdout: tokio::io::stdout(), is_raw, tag, position: None, screen: Screen::default() }
    }

    pub fn notice(&self, text: &str) {
        notice(self.is_raw, text);
    }

    async fn run(&mut self, hearing: &mut Hearing, asked: &Notify) -> Result<Outcome, Failure> {
        loop {
            let frame = match hearing.next().await {
                Ok(Heard::Binary(bytes)) => {
                    self.show(&bytes).await?;
                    // The terminal may have been stopped for long.
                    hearing.listen_again();
                    continue;
                }
                Ok(Heard::Text(text)) => serde_json::from_str(&text)
                    .map_err(|error| Failure::new(format!("a message of the server is not understood: {error}")))?,
                Err(lost) => return Ok(Outcome::Lost(lost)),
            };
            match frame {
                PtyServerFrame::Started { tag, .. } => {
                    self.tag = Some(tag);
                    self.position = Some(0);
                }
                PtyServerFrame::Connected { output_from, .. } => {
                    if let (Some(wanted), Some(found)) = (self.position, output_from)
                        && found > wanted
                    {
                        self.notice(&format!("{} bytes that were shown meanwhile are not kept", found - wanted));
                    }
                    self.position = output_from;
                }
                PtyServerFrame::Output { data } => {
                    let bytes = STANDARD
                        .decode(&data)
                        .map_err(|error| Failure::new(format!("output from the server is not base64: {error}")))?;
                    self.show(&bytes).await?;
                }
                PtyServerFrame::Exit { exit_code } => return Ok(Outcome::Ended(Ended::Exited(exit_code))),
                // The host, or the platform, is away for a while: that is not the shell's end.
                PtyServerFrame::Error { code, data, fatal: true }
                    if matches!(code.as_str(), "host_unavailable" | "unavailable") =>
                {
                    return Ok(Outcome::Lost(Lost::Broken(data)));
                }
                PtyServerFrame::Error { code, data, fatal: true } => return Err(refused(code, data)),
                PtyServerFrame::Error { code, data, .. } => self.notice(&refused(code, data).message()),
                PtyServerFrame::Ping => asked.notify_one(),
            }
        }
    }

    async fn show(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        // Counted first: what is being written is written, also when the connection ends meanwhile.
        if let Some(position) = &mut self.position {
            *position += bytes.len() as u64;
        }
        self.screen.shown(bytes);
        let written = async {
            self.stdout.write_all(bytes).await?;
            self.stdout.flush().await
        };
        written.await.doing(|| "write what the shell shows".to_owned())
    }
}

/// One connection, to its end. Cancelled, it is cut.
pub async fn talk(socket: Socket, typing: &mut Typing, showing: &mut Showing) -> Result<Outcome, Failure> {
    let Socket { mut saying, mut hearing, .. } = socket;
    let asked = Notify::new();
    let is_raw = showing.is_raw;
    let outcome = tokio::select! {
        outcome = showing.run(&mut hearing, &asked) => outcome,
        ended = typing.run(&mut saying, &asked, is_raw) => Ok(ended.map_or_else(Outcome::Lost, Outcome::Ended)),
    };
    if matches!(outcome, Ok(Outcome::Ended(_)) | Err(_)) {
        saying.close().await;
    }
    outcome
}

fn resize() -> PtyClientFrame {
    let (cols, rows) = terminal::size();
    PtyClientFrame::Resize { cols: cols.into(), rows: rows.into() }
}

/// To the person, beside what the shell shows.
fn notice(is_raw: bool, text: &str) {
    match is_raw {
        true => eprint!("\r\n[wrenn: {text}]\r\n"),
        false => eprintln!("wrenn: {text}"),
    }
}
