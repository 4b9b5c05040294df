//! Output of a process on its way to the client of a WebSocket: bytes into JSON strings, and the frames of its beginning and end.

use api::host::__buffa::oneof::exec_response::Event;
use api::v1::exec::{ExecClientFrame, ExecServerFrame};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use super::streams::said;
use crate::agents::said::exit_code;
use crate::http::errors::ApiError;
use crate::http::socket::{Events, NORMAL, Over, Session, Turn};

/// Relays what is told of a process until its end, and what the client says of it meanwhile, which is `stop` alone.
pub async fn relay(session: &mut Session, mut events: Events, mut encoder: Encoder) -> Result<(), Over> {
    loop {
        let event = match session.turn(true, Some(&mut events)).await? {
            Turn::Event(event) => said(event)?,
            Turn::Text(text) => {
                match session.parse(&text, super::exec_stream::FRAMES)? {
                    Some(ExecClientFrame::Stop) => return Err(Over::Closed { code: NORMAL, reason: "stopped" }),
                    Some(ExecClientFrame::Start { .. }) => {
                        let message = "a process is heard on this connection already";
                        session.complain(&ApiError::wrong_state(message, "started"))?;
                    }
                    None => {}
                }
                continue;
            }
            Turn::Bytes(_) => {
                session.nonsense(super::exec_stream::FRAMES)?;
                continue;
            }
            Turn::Quiet => continue,
        };
        match event {
            Some(Event::Start(start)) => {
                let output_from = start.output_from.filter(|_| encoder.tells_position);
                session.say(&ExecServerFrame::Start { pid: start.pid, output_from })?;
            }
            // Who hears a terminal without being at it hears it as a program's output.
            Some(Event::Stdout(bytes) | Event::Pty(bytes)) => say_all(session, encoder.stdout(&bytes))?,
            Some(Event::Stderr(bytes)) => say_all(session, encoder.stderr(&bytes))?,
            Some(Event::End(end)) => {
                say_all(session, encoder.rest())?;
                return session.say(&ExecServerFrame::Exit { exit_code: exit_code(&end) });
            }
            Some(Event::Keepalive(_)) | None => {}
        }
    }
}

fn say_all(session: &mut Session, frames: Vec<ExecServerFrame>) -> Result<(), Over> {
    frames.iter().try_for_each(|frame| session.say(frame))
}

/// Bytes into JSON strings. Characters that are split between pieces are put together; what is not UTF-8 becomes U+FFFD, unless the
/// client asked for base64.
pub struct Encoder {
    is_base64: bool,
    /// The beginning says where in the output it is.
    tells_position: bool,
    stdout: Vec<u8>,
    stderr: Vec<u8>,
}

impl Encoder {
    /// Of a command that is started now.
    pub fn new(is_base64: bool) -> Self {
        Self { is_base64, tells_position: false, stdout: Vec::new(), stderr: Vec::new() }
    }

    /// Of a process that runs already.
    pub fn late(is_base64: bool) -> Self {
        Self { tells_position: true, ..Self::new(is_base64) }
    }

    fn stdout(&mut self, bytes: &[u8]) -> Vec<ExecServerFrame> {
        text(self.is_base64, &mut self.stdout, bytes).map(|data| ExecServerFrame::Stdout { data }).into_iter().collect()
    }

    fn stderr(&mut self, bytes: &[u8]) -> Vec<ExecServerFrame> {
        text(self.is_base64, &mut self.stderr, bytes).map(|data| ExecServerFrame::Stderr { data }).into_iter().collect()
    }

    /// Halves of characters that never came whole.
    fn rest(&mut self) -> Vec<ExecServerFrame> {
        let rest = |held: &mut Vec<u8>| {
            (!held.is_empty()).then(|| String::from_utf8_lossy(&std::mem::take(held)).into_owned())
        };
        let stdout = rest(&mut self.stdout).map(|data| ExecServerFrame::Stdout { data });
        let stderr = rest(&mut self.stderr).map(|data| ExecServerFrame::Stderr { data });
        stdout.into_iter().chain(stderr).collect()
    }
}

/// The text of what was held back and the new bytes; an unfinished character at the end is held back.
fn text(is_base64: bool, held: &mut Vec<u8>, bytes: &[u8]) -> Option<String> {
    if is_base64 {
        return Some(STANDARD.encode(bytes));
    }
    held.extend_from_slice(bytes);
    let whole = held.len() - unfinished(held);
    let rest = held.split_off(whole);
    let text = String::from_utf8_lossy(held).into_owned();
    *held = rest;
    (!text.is_empty()).then_some(text)
}

/// How many bytes at the end may be the beginning of a character.
fn unfinished(bytes: &[u8]) -> usize {
    let tail = &bytes[bytes.len().saturating_sub(3)..];
    for start in 0..tail.len() {
        if let Err(error) = std::str::from_utf8(&tail[start..])
            && error.error_len().is_none()
            && error.valid_up_to() == 0
        {
            return tail.len() - start;
        }
    }
    0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn characters_that_are_split_between_pieces_come_whole() {
        let mut encoder = Encoder::new(false);
        let bytes = "aé€😀".as_bytes();
        let mut said = String::new();
        for byte in bytes {
            for frame in encoder.stdout(&[*byte]) {
                if let ExecServerFrame::Stdout { data } = frame {
                    said.push_str(&data);
                }
            }
        }
        assert_eq!(said, "aé€😀");
        assert!(encoder.rest().is_empty());
    }

    #[test]
    fn what_is_not_text_is_marked_and_never_held_for_ever() {
        let mut encoder = Encoder::new(false);
        assert_eq!(encoder.stdout(b"a\xffb"), [ExecServerFrame::Stdout { data: "a\u{fffd}b".to_owned() }]);
        assert!(encoder.stdout(b"\xe2\x82").is_empty());
        assert_eq!(encoder.rest(), [ExecServerFrame::Stdout { data: "\u{fffd}".to_owned() }]);
        assert_eq!(Encoder::new(true).stderr(b"\xff"), [ExecServerFrame::Stderr { data: "/w==".to_owned() }]);
    }
}
