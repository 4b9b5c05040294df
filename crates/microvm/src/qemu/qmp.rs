//! QEMU's machine protocol: one line of JSON per message over a unix socket.
//!
//! Written by hand because two things are needed that the typed crate does not offer: descriptors sent along with a command, and lines
//! bounded before they are parsed. Deadlines are the caller's.

use std::io;
use std::io::IoSlice;
use std::os::fd::{AsRawFd as _, RawFd};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::UnixStream;

use crate::{Error, socket};

/// The control socket's name in a run directory.
pub const SOCKET: &str = "qmp.sock";
/// No answer that we ask for is near this; what is longer is no QEMU.
const LINE_MAX: u64 = 1024 * 1024;
/// Events may come between a command and its answer; more than this is a storm.
const EVENTS_MAX: usize = 10_000;
/// Begins what QEMU says to who asks for commands and may have them already.
const NEGOTIATED: &str = "Capabilities negotiation is already complete";
/// Of a VMM's text in our errors.
const REASON_MAX: usize = 512;

pub struct Qmp {
    stream: BufReader<UnixStream>,
    /// Of the last command. No two connections have the same ones: QEMU answers to the one that is there what the one before has asked.
    id: u64,
}

impl Qmp {
    pub async fn connect(dir: &Path) -> io::Result<Self> {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self::connect_counting_from(dir, u64::try_from(since.as_nanos()).unwrap_or(0)).await
    }

    async fn connect_counting_from(dir: &Path, id: u64) -> io::Result<Self> {
        let stream = socket::connect(dir, SOCKET).await?;
        let mut qmp = Self { stream: BufReader::new(stream), id };
        qmp.greeted().await?;
        match qmp.call("qmp_capabilities", json!({})).await {
            // What the connection before this one has asked was done on this one.
            Err(Error::Refused { reason, .. }) if reason.starts_with(NEGOTIATED) => Ok(qmp),
            asked => asked.map(|_| qmp).map_err(io::Error::other),
        }
    }

    /// What the connection before this one was owed may come first: an event, or the answer to a call that was given up.
    async fn greeted(&mut self) -> io::Result<()> {
        for _ in 0..EVENTS_MAX {
            let message = self.read().await?;
            if message.get("QMP").is_some() {
                return Ok(());
            }
            if !["event", "return", "error"].iter().any(|word| message.get(word).is_some()) {
                break;
            }
        }
        Err(io::Error::new(io::ErrorKind::InvalidData, "no QMP greeting"))
    }

    /// Not cancel-safe: a connection on which a call was given up is of no use.
    pub async fn call(&mut self, command: &'static str, arguments: Value) -> Result<Value, Error> {
        let line = self.line(command, &arguments);
        self.stream.write_all(line.as_bytes()).await.map_err(|cause| Error::Control { command, cause })?;
        self.answer(command).await
    }

    /// Hands an open file to QEMU and gives the number of the set that holds it: `/dev/fdset/<n>` names it from then on.
    pub async fn add_descriptor(&mut self, file: &std::fs::File) -> Result<u64, Error> {
        let command = "add-fd";
        let failed = |cause| Error::Control { command, cause };
        let line = self.line(command, &json!({}));
        let stream = self.stream.get_ref();
        loop {
            stream.writable().await.map_err(failed)?;
            let descriptors: [RawFd; 1] = [file.as_raw_fd()];
            let sent = stream.try_io(tokio::io::Interest::WRITABLE, || {
                let control = [ControlMessage::ScmRights(&descriptors)];
                sendmsg::<()>(
                    stream.as_raw_fd(),
                    &[IoSlice::new(line.as_bytes())],
                    &control,
                    MsgFlags::MSG_NOSIGNAL,
                    None,
                )
                .map_err(io::Error::from)
            });
            match sent {
                Ok(count) if count == line.len() => break,
                Ok(_) => return Err(failed(io::ErrorKind::WriteZero.into())),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) => return Err(failed(e)),
            }
        }
        let answer = self.answer(command).await?;
        answer["fdset-id"]
            .as_u64()
            .ok_or_else(|| Error::Refused { command, reason: "no fdset-id in the answer".to_owned() })
    }

    fn line(&mut self, command: &str, arguments: &Value) -> String {
        self.id += 1;
        format!("{}\n", json!({"execute": command, "arguments": arguments, "id": self.id}))
    }

    async fn answer(&mut self, command: &'static str) -> Result<Value, Error> {
        let broken = |cause| Error::Control { command, cause };
        for _ in 0..EVENTS_MAX {
            let mut message = self.read().await.map_err(broken)?;
            if message.get("event").is_some() {
                continue;
            }
            let id = message["id"].as_u64();
            if id.is_some_and(|id| id != self.id) {
                // Of a call that was given up, maybe on the connection before this one, and after this one's greeting.
                continue;
            }
            if let Some(error) = message.get("error") {
                // A line that QEMU could not even parse is refused without an id.
                let text = error["desc"].as_str().unwrap_or("no reason given");
                let reason = text.chars().take(REASON_MAX).flat_map(char::escape_default).collect();
                return Err(Error::Refused { command, reason });
            }
            match message.get_mut("return") {
                Some(answer) if id.is_some() => return Ok(answer.take()),
                _ => return Err(broken(io::Error::new(io::ErrorKind::InvalidData, "an answer to nothing asked"))),
            }
        }
        Err(broken(io::Error::new(io::ErrorKind::InvalidData, "a storm of events and no answer")))
    }

    async fn read(&mut self) -> io::Result<Value> {
        let mut line = Vec::new();
        let count = (&mut self.stream).take(LINE_MAX).read_until(b'\n', &mut line).await?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if line.last() != Some(&b'\n') {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a line is too long or was cut off"));
        }
        serde_json::from_slice(&line).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    const GREETED: &str = "{\"QMP\":{}}\n{\"return\":{},\"id\":1}\n";

    /// A peer that says these lines, whatever it is asked.
    async fn against(lines: &'static [&'static str]) -> Result<Value, String> {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join(SOCKET)).unwrap();
        std::thread::spawn(move || {
            use std::io::Write as _;
            let (mut peer, _) = listener.accept().unwrap();
            for line in lines {
                let _ = peer.write_all(line.as_bytes());
            }
            // What was asked is read, or closing would throw away what was said.
            peer.shutdown(std::net::Shutdown::Write).unwrap();
            let _ = std::io::copy(&mut peer, &mut std::io::sink());
        });
        let mut qmp = Qmp::connect_counting_from(dir.path(), 0).await.map_err(|e| e.to_string())?;
        qmp.call("query-status", json!({})).await.map_err(|e| format!("{e:?}"))
    }

    #[tokio::test]
    async fn answers_come_through_between_events() {
        let got = against(&[
            "{\"return\":{},\"id\":2}\n",
            "{\"event\":\"RESUME\"}\n",
            "{\"QMP\":{}}\n",
            "{\"return\":{},\"id\":77}\n",
            "{\"error\":{\"desc\":\"of a call before\"},\"id\":78}\n",
            "{\"return\":{},\"id\":1}\n",
            "{\"event\":\"STOP\"}\n",
            "{\"return\":{\"status\":\"running\"},\"id\":2}\n",
        ])
        .await;
        assert_eq!(got.unwrap()["status"], "running");
    }

    #[tokio::test]
    async fn what_the_connection_before_asked_for_may_be_there_already() {
        let got = against(&[
            "{\"QMP\":{}}\n",
            "{\"return\":{},\"id\":77}\n",
            "{\"error\":{\"class\":\"CommandNotFound\",\"desc\":\"Capabilities negotiation is already complete, command ignored\"},\"id\":1}\n",
            "{\"return\":{\"status\":\"running\"},\"id\":2}\n",
        ])
        .await;
        assert_eq!(got.unwrap()["status"], "running");
    }

    #[tokio::test]
    async fn a_peer_that_is_no_qemu_gives_an_error_and_no_panic() {
        for lines in [
            &[][..],
            &["\n"],
            &["garbage\n"],
            &["{\"return\":{},\"id\":1}\n"],
            &["{\"QMP\":{}}\n", "{\"return\":{},\"id\":1}\n", "{\"return\":{},\"id\":1}\n"],
            &["{\"QMP\":{}}\n", "{\"return\":{},\"id\":1}\n", "{\"return\":{}}\n"],
            &["{\"QMP\":{}}\n"],
            &["{\"QMP\":{}}\n", "{\"return\":{},\"id\":1}\n", "{\"retu"],
            &["{\"QMP\":{}}\n", "{\"return\":{},\"id\":1}\n", "[]\n"],
            &["{\"QMP\":{}}\n", "{\"return\":{},\"id\":1}\n", "{\"error\":{\"desc\":\"no\\u001b[31m\"}}\n"],
        ] {
            let error = against(lines).await.unwrap_err();
            assert!(!error.contains('\u{1b}'), "{lines:?}: {error}");
        }
    }

    #[tokio::test]
    async fn a_line_without_end_and_a_storm_of_events_are_refused() {
        for more in ["x".repeat(usize::try_from(LINE_MAX).unwrap() + 1), "{\"event\":\"E\"}\n".repeat(EVENTS_MAX + 1)] {
            let lines = [GREETED.to_owned(), more].concat();
            let error = against(Box::leak(Box::new([&*lines.leak()]))).await.unwrap_err();
            assert!(error.contains("too long") || error.contains("storm"), "{error}");
        }
    }
}
