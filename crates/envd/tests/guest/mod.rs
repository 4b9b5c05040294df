//! One envd outside a sandbox, and a client that can also say wrong things: bodies and headers go out exactly as given.
#![allow(dead_code, reason = "each test program uses a part of it")]

use std::io::{BufRead as _, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::{Buf as _, Bytes, BytesMut};
use http::{HeaderMap, Request, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// No wait of a test is longer.
pub const SOON: Duration = Duration::from_secs(20);

pub struct Envd {
    child: Child,
    pub port: u16,
}

impl Envd {
    pub fn start() -> Self {
        Self::start_with(&[])
    }

    pub fn start_with(more: &[&str]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_envd"));
        Self::start_by(command.args(["--standalone", "--port", "0"]).args(more))
    }

    pub fn start_by(command: &mut Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        Self { child, port: line.trim().parse().unwrap() }
    }

    pub fn address(&self) -> (&'static str, u16) {
        ("127.0.0.1", self.port)
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn resident_kib(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.split_whitespace().next().unwrap().parse().unwrap()
    }

    pub async fn connection(&self) -> http1::SendRequest<Full<Bytes>> {
        let stream = TcpStream::connect(self.address()).await.unwrap();
        stream.set_nodelay(true).unwrap();
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        sender
    }

    pub async fn ask(&self, request: Request<Full<Bytes>>) -> http::Response<Incoming> {
        let mut connection = self.connection().await;
        timeout(SOON, connection.send_request(request)).await.expect("an answer in time").unwrap()
    }

    /// Status, headers and whole body of the answer.
    pub async fn exchange(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: impl Into<Bytes>,
    ) -> (StatusCode, HeaderMap, Bytes) {
        let (head, body) = self.ask(request(method, path, headers, body)).await.into_parts();
        let body = timeout(SOON, body.collect()).await.expect("a whole body in time").unwrap();
        (head.status, head.headers, body.to_bytes())
    }

    /// A unary call in JSON: the answer, or its code.
    pub async fn call(&self, method: &str, message: Value) -> Result<Value, String> {
        let (status, _, body) = self.exchange("POST", method, &JSON, message.to_string()).await;
        let body: Value = serde_json::from_slice(&body).unwrap();
        if status == 200 { Ok(body) } else { Err(body["code"].as_str().unwrap().to_owned()) }
    }

    pub async fn stream(&self, method: &str, headers: &[(&str, &str)], message: Value) -> Stream {
        let mut all = STREAM.to_vec();
        all.extend_from_slice(headers);
        let answer = self.ask(request("POST", method, &all, envelope(0, message.to_string().as_bytes()))).await;
        Stream::of(answer)
    }

    pub async fn start_process(&self, cmd: &str, args: &[&str]) -> Stream {
        self.stream(START, &[], json!({"process": {"cmd": cmd, "args": args}, "stdin": false})).await
    }

    pub async fn sh(&self, script: &str) -> Outcome {
        self.start_process("/bin/sh", &["-c", script]).await.outcome().await
    }
}

impl Drop for Envd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub const START: &str = "/process.Process/Start";
pub const CONNECT: &str = "/process.Process/Connect";
pub const JSON: [(&str, &str); 2] = [("content-type", "application/json"), ("connect-protocol-version", "1")];
pub const STREAM: [(&str, &str); 2] = [("content-type", "application/connect+json"), ("connect-protocol-version", "1")];

pub fn request(method: &str, path: &str, headers: &[(&str, &str)], body: impl Into<Bytes>) -> Request<Full<Bytes>> {
    let mut request = Request::builder().method(method).uri(path).header("host", "envd");
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    request.body(Full::new(body.into())).unwrap()
}

pub fn envelope(flags: u8, message: &[u8]) -> Vec<u8> {
    let length = u32::try_from(message.len()).unwrap().to_be_bytes();
    [&[flags], length.as_slice(), message].concat()
}

pub fn basic(user: &str) -> String {
    format!("Basic {}", STANDARD.encode(format!("{user}:")))
}

/// The envelopes of a streaming answer.
pub struct Stream {
    pub headers: HeaderMap,
    body: Incoming,
    read: BytesMut,
}

#[derive(Debug, Default, PartialEq)]
pub struct Outcome {
    pub pid: u64,
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    pub pty: Vec<u8>,
    /// The `end` event.
    pub end: Value,
    /// The code of the closing frame's error.
    pub error: Option<String>,
}

impl Outcome {
    pub fn exit_code(&self) -> i64 {
        assert!(!self.end.is_null(), "no end event: {self:?}");
        self.end["exitCode"].as_i64().unwrap_or(0)
    }

    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.stdout).unwrap()
    }
}

impl Stream {
    pub fn of(answer: http::Response<Incoming>) -> Self {
        assert_eq!(answer.status(), 200);
        let (head, body) = answer.into_parts();
        Self { headers: head.headers, body, read: BytesMut::new() }
    }

    /// Flags and message; `None` when the answer is over.
    pub async fn next(&mut self) -> Option<(u8, Value)> {
        loop {
            if self.read.len() >= 5 {
                let length = u32::from_be_bytes(self.read[1..5].try_into().unwrap()) as usize;
                if self.read.len() >= 5 + length {
                    let flags = self.read[0];
                    self.read.advance(5);
                    let message = self.read.split_to(length);
                    return Some((flags, serde_json::from_slice(&message).unwrap()));
                }
            }
            match timeout(SOON, self.body.frame()).await.expect("the next frame in time") {
                Some(frame) => self.read.extend_from_slice(&frame.ok()?.into_data().unwrap()),
                None => return None,
            }
        }
    }

    pub async fn event(&mut self) -> Value {
        self.next().await.expect("one more event").1["event"].clone()
    }

    pub async fn pid(&mut self) -> u64 {
        self.event().await["start"]["pid"].as_u64().expect("start comes first")
    }

    pub async fn outcome(mut self) -> Outcome {
        self.rest().await
    }

    /// Up to the closing frame.
    pub async fn rest(&mut self) -> Outcome {
        let mut outcome = Outcome::default();
        while let Some((flags, message)) = self.next().await {
            if flags & 2 != 0 {
                outcome.error = message["error"]["code"].as_str().map(str::to_owned);
                return outcome;
            }
            let event = &message["event"];
            if let Some(pid) = event["start"]["pid"].as_u64() {
                outcome.pid = pid;
            }
            for (name, into) in
                [("stdout", &mut outcome.stdout), ("stderr", &mut outcome.stderr), ("pty", &mut outcome.pty)]
            {
                if let Some(data) = event["data"][name].as_str() {
                    into.extend(STANDARD.decode(data).unwrap());
                }
            }
            if !event["end"].is_null() {
                outcome.end = event["end"].clone();
            }
        }
        panic!("the stream has no closing frame: {outcome:?}");
    }
}

/// Waits for a condition.
pub async fn until(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let all = async {
        while !is_so().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(SOON, all).await.unwrap_or_else(|_| panic!("not in time: {what}"));
}
