//! One envd outside a sandbox, and a client that does little, so that what is measured is envd: plain sockets, HTTP/1.1 as far as envd
//! speaks it, Connect's envelopes in both codecs.

use std::io::{BufRead as _, BufReader, Read, Write as _};
use std::net::{Ipv4Addr, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};

/// Nothing here takes so long.
const ANSWER_MAX: Duration = Duration::from_secs(60);
/// As much as is read at once, here and by the floors.
pub const PIECE: usize = 64 * 1024;
/// Of an envelope's first byte: it ends the stream and carries the outcome of the call.
const LAST: u8 = 2;

pub struct Envd {
    child: Child,
    port: u16,
}

impl Envd {
    /// It is ready when it answers.
    pub fn start(program: &Path) -> Result<Self> {
        let mut command = Command::new(program);
        command.args(["--standalone", "--port", "0"]).stdin(Stdio::null()).stdout(Stdio::piped());
        let child =
            command.spawn().with_context(|| format!("start {}: `make build-envd` makes it", program.display()))?;
        let mut envd = Self { child, port: 0 };
        let mut line = String::new();
        let output = envd.child.stdout.take().expect("it is a pipe");
        BufReader::new(output).read_line(&mut line).context("read envd's port")?;
        envd.port = line.trim().parse().with_context(|| format!("envd says {line:?} for its port"))?;
        let mut client = envd.connect()?;
        let answer = client.ask("GET", "/health", "", &[])?;
        ensure!(answer.status == 204, "envd's health is {}", answer.status);
        Ok(envd)
    }

    pub fn connect(&self) -> Result<Client> {
        Client::of(TcpStream::connect((Ipv4Addr::LOCALHOST, self.port)).context("connect to envd")?, "")
    }

    pub fn resident_mib(&self) -> Result<f64> {
        let status =
            std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).context("read envd's size")?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("envd has no VmRSS")?;
        let kib: f64 = line.trim().trim_end_matches(" kB").parse().with_context(|| format!("read {line:?}"))?;
        Ok(kib / 1024.0)
    }
}

impl Drop for Envd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// One kept connection.
pub struct Client {
    stream: BufReader<TcpStream>,
    /// Sent with each request.
    headers: String,
}

/// The head of an answer; its body is read from it, to its end.
pub struct Answer<'a> {
    pub status: u16,
    stream: &'a mut BufReader<TcpStream>,
    is_chunked: bool,
    /// Of the body or of the present chunk.
    left: u64,
}

#[derive(Clone, Copy)]
pub enum Codec {
    Json,
    Proto,
}

impl Client {
    pub fn of(stream: TcpStream, headers: &str) -> Result<Self> {
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(ANSWER_MAX))?;
        stream.set_write_timeout(Some(ANSWER_MAX))?;
        Ok(Self { stream: BufReader::with_capacity(PIECE, stream), headers: headers.to_owned() })
    }

    pub fn ask(&mut self, method: &str, target: &str, headers: &str, body: &[u8]) -> Result<Answer<'_>> {
        let length = body.len() as u64;
        self.ask_with(method, target, headers, length, |stream| stream.write_all(body).context("send a body"))
    }

    /// The body goes out as the caller likes.
    pub fn ask_with(
        &mut self,
        method: &str,
        target: &str,
        headers: &str,
        length: u64,
        send: impl FnOnce(&mut TcpStream) -> Result<()>,
    ) -> Result<Answer<'_>> {
        let own = &self.headers;
        let head =
            format!("{method} {target} HTTP/1.1\r\nhost: envd\r\ncontent-length: {length}\r\n{own}{headers}\r\n");
        self.stream.get_mut().write_all(head.as_bytes()).context("send a request")?;
        send(self.stream.get_mut())?;
        let (mut is_chunked, mut left) = (false, 0);
        let status = self.line()?;
        while let Some((name, value)) = self.line()?.split_once(':') {
            match (name.to_ascii_lowercase().as_str(), value.trim()) {
                ("transfer-encoding", "chunked") => is_chunked = true,
                ("content-length", length) => left = length.parse().context("read the length of an answer")?,
                _ => {}
            }
        }
        let status = status.split(' ').nth(1).and_then(|code| code.parse().ok()).context("envd answers no HTTP")?;
        Ok(Answer { status, stream: &mut self.stream, is_chunked, left })
    }

    fn line(&mut self) -> Result<String> {
        line(&mut self.stream).context("read the head of an answer")
    }

    /// Begins a streaming call of the process service.
    pub fn call(&mut self, method: &str, codec: Codec, message: &[u8]) -> Result<Answer<'_>> {
        let name = match codec {
            Codec::Json => "json",
            Codec::Proto => "proto",
        };
        let headers = format!("content-type: application/connect+{name}\r\nconnect-protocol-version: 1\r\n");
        let length = u32::try_from(message.len()).context("a request is small")?.to_be_bytes();
        let body = [&[0], length.as_slice(), message].concat();
        let answer = self.ask("POST", &format!("/process.Process/{method}"), &headers, &body)?;
        ensure!(answer.status == 200, "envd answers {method} with {}", answer.status);
        Ok(answer)
    }

    /// Runs a command to its end and gives the number of bytes that it wrote to its output. `at_end` is called with the end event.
    pub fn run(&mut self, codec: Codec, command: &[&str], at_end: impl FnOnce()) -> Result<u64> {
        let mut answer = self.call("Start", codec, &start(codec, command))?;
        let (mut bytes, mut at_end, mut message) = (0, Some(at_end), Vec::new());
        loop {
            let flags = answer.message(&mut message)?;
            if flags & LAST != 0 {
                let outcome: Value = serde_json::from_slice(&message).context("read how the call ended")?;
                ensure!(outcome.get("error").is_none(), "envd says {outcome}");
                ensure!(at_end.is_none(), "envd did not tell of an end");
                // The end of the body, so that the connection can be used again.
                ensure!(answer.read(&mut [0])? == 0, "something follows the last message");
                return Ok(bytes);
            }
            match event(codec, &message)? {
                Event::Output(count) => bytes += count,
                Event::End => at_end.take().into_iter().for_each(|at_end| at_end()),
                Event::Other => {}
            }
        }
    }
}

impl Answer<'_> {
    /// Its flags.
    pub fn message(&mut self, message: &mut Vec<u8>) -> Result<u8> {
        let mut head = [0; 5];
        self.read_exact(&mut head).context("read an envelope")?;
        let [flags, length @ ..] = head;
        message.resize(u32::from_be_bytes(length) as usize, 0);
        self.read_exact(message).context("read a message")?;
        Ok(flags)
    }
}

impl Read for Answer<'_> {
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        if self.left == 0 && self.is_chunked {
            let length = line(self.stream)?;
            self.left = u64::from_str_radix(&length, 16).map_err(std::io::Error::other)?;
            if self.left == 0 {
                self.is_chunked = false;
                line(self.stream)?;
            }
        }
        let most = into.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        if most == 0 {
            // The reader below would wait for more.
            return Ok(0);
        }
        let count = self.stream.read(&mut into[..most])?;
        self.left -= count as u64;
        if self.left == 0 && self.is_chunked && count > 0 {
            line(self.stream)?;
        }
        Ok(count)
    }
}

fn line(stream: &mut BufReader<TcpStream>) -> std::io::Result<String> {
    let mut line = String::new();
    if stream.read_line(&mut line)? == 0 {
        return Err(std::io::ErrorKind::UnexpectedEof.into());
    }
    line.truncate(line.trim_end_matches(['\r', '\n']).len());
    Ok(line)
}

enum Event {
    Output(u64),
    /// With code 0.
    End,
    Other,
}

/// `process.StartRequest`, without input.
fn start(codec: Codec, command: &[&str]) -> Vec<u8> {
    match codec {
        Codec::Json => {
            json!({"process": {"cmd": command[0], "args": command[1..]}, "stdin": false}).to_string().into_bytes()
        }
        Codec::Proto => {
            let (first, more) = command.split_first().expect("a command has a program");
            let arguments = more.iter().flat_map(|argument| field(2, argument.as_bytes()));
            let process: Vec<u8> = field(1, first.as_bytes()).into_iter().chain(arguments).collect();
            // Field 4, a varint: false.
            [field(1, &process), vec![4 << 3, 0]].concat()
        }
    }
}

/// A field of bytes in the binary codec.
fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
    let length = u8::try_from(bytes.len()).ok().filter(|length| *length < 128).expect("a request is small");
    [&[number << 3 | 2, length], bytes].concat()
}

/// Output is counted, not decoded: that is the work of a client and not what is measured.
fn event(codec: Codec, message: &[u8]) -> Result<Event> {
    const JSON_STDOUT: &[u8] = br#"{"event":{"data":{"stdout":""#;
    match codec {
        Codec::Json => {
            if let Some(text) = message.strip_prefix(JSON_STDOUT) {
                let text = text.strip_suffix(br#""}}}"#).context("a message of output ends otherwise")?;
                let padding = text.iter().rev().take_while(|byte| **byte == b'=').count();
                return Ok(Event::Output((text.len() / 4 * 3 - padding) as u64));
            }
            let message: Value = serde_json::from_slice(message).context("read an event")?;
            match message["event"].get("end") {
                Some(end) if end["exited"] == true && end["exitCode"].as_i64().unwrap_or(0) == 0 => Ok(Event::End),
                Some(end) => bail!("the command ended with {end}"),
                None => Ok(Event::Other),
            }
        }
        Codec::Proto => {
            let event = find(message, 1).context("a message without its event")?;
            if let Some(data) = find(event, 2) {
                return Ok(Event::Output(find(data, 1).map_or(0, <[u8]>::len) as u64));
            }
            // Field 2 of an end, a varint: it exited by itself; with field 1, its code, it would begin otherwise.
            match find(event, 3) {
                Some([0x10, 1, ..]) => Ok(Event::End),
                Some(end) => bail!("the command ended with {end:?}"),
                None => Ok(Event::Other),
            }
        }
    }
}

/// The first field of bytes with that number, if the message begins with such fields.
fn find(mut message: &[u8], number: u8) -> Option<&[u8]> {
    loop {
        let (tag, rest) = message.split_first()?;
        if tag & 7 != 2 {
            return None;
        }
        let end = rest.iter().position(|byte| byte & 0x80 == 0)?;
        let length = rest[..=end].iter().rev().fold(0, |sum, byte| sum << 7 | usize::from(byte & 0x7f));
        let (bytes, after) = rest[end + 1..].split_at_checked(length)?;
        if tag >> 3 == number {
            return Some(bytes);
        }
        message = after;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_codecs_tell_the_same() {
        let output = |event| matches!(event, Ok(Event::Output(4)));
        assert!(output(event(Codec::Json, br#"{"event":{"data":{"stdout":"AAAAAA=="}}}"#)));
        let data = field(1, &field(2, &field(1, &[0; 4])));
        assert!(output(event(Codec::Proto, &data)));
        assert!(matches!(event(Codec::Json, br#"{"event":{"end":{"exited":true}}}"#), Ok(Event::End)));
        assert!(matches!(event(Codec::Proto, &field(1, &field(3, &[0x10, 1]))), Ok(Event::End)));
        assert!(event(Codec::Json, br#"{"event":{"end":{"exited":true,"exitCode":1}}}"#).is_err());
        assert!(event(Codec::Proto, &field(1, &field(3, &[8, 2, 0x10, 1]))).is_err());
    }
}
