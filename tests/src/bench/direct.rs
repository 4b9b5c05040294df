//! The floor of a command: envd asked directly, over one kept connection, by the protocol that published clients speak (Connect,
//! streaming, JSON).

use anyhow::{Result, ensure};
use bytes::Bytes;
use http_body_util::Full;
use hyper::client::conn::http1::SendRequest;
use serde_json::json;
use testkit::envd::{Client, START, STREAM, Stream, envelope, request};
use whole_machine::guest;
use whole_machine::platform::Platform;

/// What is run by both ways: the cheapest process there is.
pub const COMMAND: &str = "/bin/true";

pub struct Envd {
    client: Client,
    connection: SendRequest<Full<Bytes>>,
}

impl Envd {
    pub async fn connect(platform: &Platform, sandbox: &str) -> Result<Self> {
        let client = guest::of(&platform.dir, &platform.tag(), sandbox)?.client;
        let connection = client.connection().await;
        Ok(Self { client, connection })
    }

    /// One command, to its exit code, which must be 0.
    pub async fn run(&mut self) -> Result<()> {
        let message = json!({"process": {"cmd": COMMAND}, "stdin": false}).to_string();
        let request = request("POST", START, &STREAM, envelope(0, message.as_bytes()));
        let answer = self.client.ask_on(&mut self.connection, request).await;
        let outcome = Stream::of(answer).outcome().await;
        ensure!(outcome.error.is_none() && outcome.exit_code() == 0, "{COMMAND} ended with {outcome:?}");
        Ok(())
    }
}
