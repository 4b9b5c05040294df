//! The least of an HTTP client: a request as text, an answer as text.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde_json::Value;

/// A call may load a kernel on a busy machine; longer than this it has hung.
const CALL_LIMIT: Duration = Duration::from_secs(60);

#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub body: Value,
}

impl Answer {
    #[track_caller]
    pub fn accepted(self) {
        assert_eq!((self.status, &self.body), (204, &Value::Null), "refused");
    }

    #[track_caller]
    pub fn refused(self, words: &str) {
        assert_eq!(self.status, 400, "{self:?}");
        let message = self.body["fault_message"].as_str().unwrap_or_default();
        assert!(message.contains(words), "`{words}` is not in: {message}");
    }

    #[track_caller]
    pub fn found(self) -> Value {
        assert_eq!(self.status, 200, "{self:?}");
        self.body
    }
}

pub fn connect(socket: &Path) -> std::io::Result<UnixStream> {
    let stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(CALL_LIMIT))?;
    Ok(stream)
}

pub fn call(socket: &Path, method: &str, path: &str, body: &str) -> std::io::Result<Answer> {
    let mut stream = connect(socket)?;
    send(&mut stream, method, path, body)?;
    receive(&mut stream)
}

pub fn send(stream: &mut UnixStream, method: &str, path: &str, body: &str) -> std::io::Result<()> {
    let length = if body.is_empty() { String::new() } else { format!("Content-Length: {}\r\n", body.len()) };
    let head = format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n{length}\r\n");
    stream.write_all(head.as_bytes())?;
    stream.write_all(body.as_bytes())
}

/// Reads one answer and leaves the connection as it is.
pub fn receive(stream: &mut UnixStream) -> std::io::Result<Answer> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        head.push(byte[0]);
    }
    let head = String::from_utf8_lossy(&head).to_lowercase();
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
    let length = head.lines().find_map(|line| line.strip_prefix("content-length:"));
    let mut body = vec![0; length.and_then(|length| length.trim().parse().ok()).unwrap_or(0)];
    stream.read_exact(&mut body)?;
    Ok(Answer { status, body: serde_json::from_slice(&body).unwrap_or(Value::Null) })
}
