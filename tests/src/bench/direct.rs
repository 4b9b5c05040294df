//! The floor of a command: envd asked directly, over one kept connection from where the agent's own connections come from, by the
//! protocol that published clients speak (Connect, streaming, JSON).

use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use bytes::{BufMut as _, Bytes, BytesMut};
use http_body_util::{BodyExt as _, Full};
use hyper::Request;
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use nix::sched::{CloneFlags, setns};
use serde_json::{Value, json};

/// What is run by both ways: the cheapest process there is.
pub const COMMAND: &str = "/bin/true";
const PORT: u16 = 49983;
const CONNECT_MAX: Duration = Duration::from_secs(10);
const COMMAND_MAX: Duration = Duration::from_secs(30);
/// Of an envelope's first byte: it ends the stream and carries the outcome of the call.
const LAST: u8 = 2;

pub struct Envd {
    sender: SendRequest<Full<Bytes>>,
    access_token: String,
    incarnation: String,
}

impl Envd {
    /// The guest of a running sandbox, by what the agent wrote down of it.
    pub async fn connect(dir: &Path, tag: &str, sandbox: &str) -> Result<Self> {
        let file = dir.join("pool/sandboxes").join(sandbox).join("state.json");
        let text = std::fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))?;
        let state: Value = serde_json::from_str(&text).context("read the sandbox's state")?;
        let run = &state["phase"]["run"];
        let text =
            |field: &str| run[field].as_str().map(str::to_owned).with_context(|| format!("no {field} in its state"));
        let slot = run["slot"].as_u64().and_then(|slot| u16::try_from(slot).ok()).context("no slot in its state")?;
        let [high, low] = slot.to_be_bytes();
        let guest = SocketAddr::from((Ipv4Addr::new(10, 11, high, low), PORT));
        let stream = connect_inside(format!("/run/netns/wrn-{tag}"), guest)?;
        let stream = tokio::net::TcpStream::from_std(stream).context("hand the connection over")?;
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await.context("speak HTTP with envd")?;
        // It ends with the sender.
        tokio::spawn(connection);
        Ok(Self { sender, access_token: text("access_token")?, incarnation: text("incarnation")? })
    }

    /// One command, to its exit code, which must be 0.
    pub async fn run(&mut self) -> Result<()> {
        tokio::time::timeout(COMMAND_MAX, self.start()).await.context("envd does not end the command")?
    }

    async fn start(&mut self) -> Result<()> {
        let message = json!({"process": {"cmd": COMMAND}, "stdin": false}).to_string();
        let request = Request::post("/process.Process/Start")
            .header("host", "guest")
            .header("content-type", "application/connect+json")
            .header("connect-protocol-version", "1")
            .header("x-access-token", &self.access_token)
            .header("x-incarnation", &self.incarnation)
            .body(Full::new(envelope(message.as_bytes())))
            .context("make a request")?;
        self.sender.ready().await.context("envd closed the connection")?;
        let answer = self.sender.send_request(request).await.context("ask envd for a process")?;
        let status = answer.status();
        let body = answer.into_body().collect().await.context("read envd's answer")?.to_bytes();
        ensure!(status == 200, "envd answers {status}: {}", String::from_utf8_lossy(&body));
        ended_well(&body)
    }
}

/// The connection belongs to the namespace that its socket was made in; the thread that went there must do nothing else.
fn connect_inside(namespace: String, guest: SocketAddr) -> Result<std::net::TcpStream> {
    let connect = move || {
        let there = File::open(&namespace).with_context(|| format!("open {namespace}"))?;
        setns(&there, CloneFlags::CLONE_NEWNET).with_context(|| format!("enter {namespace}"))?;
        let stream = std::net::TcpStream::connect_timeout(&guest, CONNECT_MAX).context("connect to envd")?;
        stream.set_nodelay(true)?;
        stream.set_nonblocking(true)?;
        Ok(stream)
    };
    std::thread::spawn(connect).join().expect("connecting does not panic")
}

fn envelope(message: &[u8]) -> Bytes {
    let mut framed = BytesMut::with_capacity(message.len() + 5);
    framed.put_u8(0);
    framed.put_u32(u32::try_from(message.len()).expect("a request is small"));
    framed.put_slice(message);
    framed.freeze()
}

fn ended_well(mut body: &[u8]) -> Result<()> {
    let mut exit = None;
    while let Some((head, rest)) = body.split_first_chunk::<5>() {
        let [flags, length @ ..] = *head;
        let length = u32::from_be_bytes(length) as usize;
        ensure!(length <= rest.len(), "envd's answer ends in the middle");
        let (message, after) = rest.split_at(length);
        let message: Value = serde_json::from_slice(message).context("read a message of envd")?;
        if flags & LAST != 0 {
            ensure!(message.get("error").is_none(), "envd says {message}");
        } else if let Some(end) = message["event"].get("end") {
            exit = Some(end.clone());
        }
        body = after;
    }
    match exit {
        // Zero is left out.
        Some(end) if end["exited"] == true && end["exitCode"].as_i64().unwrap_or(0) == 0 => Ok(()),
        Some(end) => bail!("{COMMAND} ended with {end}"),
        None => bail!("envd did not tell of an end"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_clean_end_counts() {
        let frame = |flags: u8, message: &Value| {
            let mut framed = envelope(message.to_string().as_bytes()).to_vec();
            framed[0] = flags;
            framed
        };
        let end = |code: i64| frame(0, &json!({"event": {"end": {"exited": true, "exitCode": code}}}));
        let last = frame(LAST, &json!({}));
        assert!(ended_well(&[end(0), last.clone()].concat()).is_ok());
        assert!(ended_well(&[end(1), last.clone()].concat()).is_err());
        assert!(ended_well(&last).is_err());
        assert!(ended_well(&[end(0), frame(LAST, &json!({"error": {"code": "internal"}}))].concat()).is_err());
        assert!(ended_well(&end(0)[..10]).is_err());
    }
}
