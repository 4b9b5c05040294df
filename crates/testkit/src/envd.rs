//! A client of envd that can also say wrong things: bodies and headers go out exactly as given.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::{Buf as _, Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue, Request, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// No wait of a test is longer.
pub const SOON: Duration = Duration::from_secs(20);

type Connecting = Pin<Box<dyn Future<Output = io::Result<TcpStream>> + Send>>;

/// Each call has a connection of its own.
pub struct Client {
    connect: Box<dyn Fn() -> Connecting + Send + Sync>,
    /// Of every request that does not bring them itself.
    headers: HeaderMap,
}

impl Client {
    /// `connect` goes wherever the guest is reached; `headers` are shown with every request.
    pub fn new(connect: impl Fn() -> Connecting + Send + Sync + 'static, headers: &[(&'static str, &str)]) -> Self {
        let header = |(name, value): &(&'static str, &str)| {
            let value = HeaderValue::from_str(value).expect("a header of a test is text");
            (HeaderName::from_static(name), value)
        };
        Self { connect: Box::new(connect), headers: headers.iter().map(header).collect() }
    }

    pub fn at(address: SocketAddr) -> Self {
        Self::new(move || Box::pin(TcpStream::connect(address)), &[])
    }

    pub async fn connection(&self) -> http1::SendRequest<Full<Bytes>> {
        let stream = (self.connect)().await.unwrap();
        stream.set_nodelay(true).unwrap();
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        sender
    }

    pub async fn ask(&self, request: Request<Full<Bytes>>) -> http::Response<Incoming> {
        let mut connection = self.connection().await;
        self.ask_on(&mut connection, request).await
    }

    /// On a connection that is kept.
    pub async fn ask_on(
        &self,
        connection: &mut http1::SendRequest<Full<Bytes>>,
        mut request: Request<Full<Bytes>>,
    ) -> http::Response<Incoming> {
        for (name, value) in &self.headers {
            request.headers_mut().entry(name).or_insert_with(|| value.clone());
        }
        connection.ready().await.unwrap();
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
