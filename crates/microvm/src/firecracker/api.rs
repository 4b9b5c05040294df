//! Firecracker's API, typed: JSON over HTTP/1.1 on a unix socket in the jail, one request at a time. All bodies are strict: a field that a
//! release does not know is refused. Answers are a stranger's: bounded before they are read.

use std::io;
use std::os::fd::AsFd as _;
use std::path::Path;
use std::time::Duration;

use http::{Method, Request, StatusCode};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use serde::{Deserialize, Serialize};
use tokio::net::UnixStream;

use crate::{Error, socket};

/// The control socket's name in the jail's root.
pub const SOCKET: &str = "api.sock";
/// No answer that we ask for is near this.
const ANSWER_MAX: usize = 256 * 1024;
/// Of a VMM's text in our errors.
const REASON_MAX: usize = 512;

#[derive(Serialize)]
pub struct MachineConfig {
    pub vcpu_count: u8,
    pub mem_size_mib: u32,
    pub smt: bool,
    pub track_dirty_pages: bool,
    pub huge_pages: HugePages,
}

/// What guest memory is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub enum HugePages {
    #[default]
    None,
    /// As the kernel finds them. Under dirty tracking, which a save needs, most of them fall apart.
    Transparent,
}

#[derive(Serialize)]
pub struct BootSource<'a> {
    pub kernel_image_path: &'a str,
    pub boot_args: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub initrd_path: Option<&'a str>,
}

#[derive(Serialize)]
pub struct Drive<'a> {
    pub drive_id: &'a str,
    pub path_on_host: &'a str,
    pub is_root_device: bool,
    pub is_read_only: bool,
    /// `Writeback`: what the guest flushes is flushed.
    pub cache_type: &'a str,
    pub io_engine: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<RateLimiter>,
}

#[derive(Serialize)]
pub struct NetworkInterface<'a> {
    pub iface_id: &'a str,
    pub guest_mac: &'a str,
    pub host_dev_name: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rx_rate_limiter: Option<RateLimiter>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tx_rate_limiter: Option<RateLimiter>,
}

#[derive(Debug, Clone, Copy, Serialize)]
pub struct RateLimiter {
    pub bandwidth: TokenBucket,
}

/// `size` bytes in each `refill_time` (milliseconds).
#[derive(Debug, Clone, Copy, Serialize)]
pub struct TokenBucket {
    pub size: u64,
    pub refill_time: u64,
}

impl TokenBucket {
    pub const NONE: Self = Self { size: 0, refill_time: 0 };

    pub fn per_second(bytes: u64) -> Self {
        Self { size: bytes, refill_time: 1000 }
    }
}

#[derive(Serialize)]
pub struct Balloon {
    pub amount_mib: u32,
    pub deflate_on_oom: bool,
    pub stats_polling_interval_s: u16,
    pub free_page_reporting: bool,
}

#[derive(Serialize)]
pub struct MmdsConfig<'a> {
    pub version: &'a str,
    pub network_interfaces: &'a [&'a str],
}

#[derive(Serialize)]
pub struct Serial<'a> {
    pub serial_out_path: &'a str,
    /// What is more is dropped.
    pub rate_limiter: TokenBucket,
}

#[derive(Serialize)]
pub struct Metrics<'a> {
    pub metrics_path: &'a str,
}

#[derive(Serialize)]
pub struct Action<'a> {
    pub action_type: &'a str,
}

#[derive(Serialize)]
pub struct VmState<'a> {
    pub state: &'a str,
}

#[derive(Serialize)]
pub struct SnapshotCreate<'a> {
    pub snapshot_type: &'a str,
    pub snapshot_path: &'a str,
    pub mem_file_path: &'a str,
}

#[derive(Serialize)]
pub struct SnapshotLoad<'a> {
    pub snapshot_path: &'a str,
    pub mem_backend: MemoryBackend<'a>,
    /// Is not in the saved state: it must be asked for again.
    pub track_dirty_pages: bool,
    pub resume_vm: bool,
    /// Said, although it is the default: envd tells the guest the time.
    pub clock_realtime: bool,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub network_overrides: Vec<NetworkOverride<'a>>,
}

#[derive(Serialize)]
pub struct MemoryBackend<'a> {
    pub backend_type: &'a str,
    pub backend_path: &'a str,
}

#[derive(Serialize)]
pub struct NetworkOverride<'a> {
    pub iface_id: &'a str,
    pub host_dev_name: &'a str,
}

/// `GET /`
#[derive(Debug, Deserialize)]
pub struct Instance {
    /// `Not started`, `Running`, `Paused`
    pub state: String,
    pub vmm_version: String,
}

#[derive(Deserialize)]
struct Fault {
    fault_message: String,
}

/// What to ask for and for how long.
#[derive(Debug, Clone, Copy)]
pub struct Call {
    /// Also its name in errors.
    pub path: &'static str,
    pub limit: Duration,
}

impl Call {
    fn silent(self) -> Error {
        Error::Silent { command: self.path, limit: self.limit }
    }
}

pub async fn put(root: &Path, pid: i32, call: Call, body: &impl Serialize) -> Result<(), Error> {
    ask(root, pid, Method::PUT, call, body).await
}

pub async fn patch(root: &Path, pid: i32, call: Call, body: &impl Serialize) -> Result<(), Error> {
    ask(root, pid, Method::PATCH, call, body).await
}

/// A connection for each call: a call that was given up leaves nothing behind on the next one.
async fn ask(root: &Path, pid: i32, method: Method, call: Call, body: &impl Serialize) -> Result<(), Error> {
    let asked = async { Line::open(root, pid, call).await?.ask(method, call, Some(body)).await };
    tokio::time::timeout(call.limit, asked).await.map_err(|_| call.silent())?.map(|_| ())
}

/// A connection for calls that follow each other at once. Whoever gives one of them up gives up all of it.
pub struct Line {
    sender: http1::SendRequest<Full<Bytes>>,
    /// Driven while a call is under way and at no other time; none any more once it has ended.
    connection: Option<http1::Connection<TokioIo<UnixStream>, Full<Bytes>>>,
}

impl Line {
    /// `call`: for what it is opened.
    pub async fn open(root: &Path, pid: i32, call: Call) -> Result<Self, Error> {
        let broken = |cause| Error::Control { command: call.path, cause };
        let open = async {
            let stream = socket::connect(root, SOCKET).await.map_err(broken)?;
            // In the jail's root the VMM may put what it likes: only the VMM itself is asked.
            let peer = rustix::net::sockopt::socket_peercred(stream.as_fd()).map_err(|e| broken(e.into()))?;
            if peer.pid.as_raw_nonzero().get() != pid {
                return Err(broken(io::Error::new(io::ErrorKind::PermissionDenied, "another process listens there")));
            }
            let shaken = http1::handshake(TokioIo::new(stream)).await;
            let (sender, connection) = shaken.map_err(|e| broken(io::Error::other(e)))?;
            Ok(Self { sender, connection: Some(connection) })
        };
        tokio::time::timeout(call.limit, open).await.map_err(|_| call.silent())?
    }

    pub async fn get<T: for<'a> Deserialize<'a>>(&mut self, call: Call) -> Result<T, Error> {
        let answer = self.within(Method::GET, call, None::<&()>).await?;
        serde_json::from_slice(&answer)
            .map_err(|e| Error::Refused { command: call.path, reason: format!("an answer that is none: {e}") })
    }

    pub async fn put(&mut self, call: Call, body: &impl Serialize) -> Result<(), Error> {
        self.within(Method::PUT, call, Some(body)).await.map(|_| ())
    }

    pub async fn patch(&mut self, call: Call, body: &impl Serialize) -> Result<(), Error> {
        self.within(Method::PATCH, call, Some(body)).await.map(|_| ())
    }

    async fn within(&mut self, method: Method, call: Call, body: Option<&impl Serialize>) -> Result<Bytes, Error> {
        tokio::time::timeout(call.limit, self.ask(method, call, body)).await.map_err(|_| call.silent())?
    }

    async fn ask(&mut self, method: Method, call: Call, body: Option<&impl Serialize>) -> Result<Bytes, Error> {
        let broken = |cause| Error::Control { command: call.path, cause };
        let body = body.map(|body| serde_json::to_vec(body).expect("requests are plain data")).unwrap_or_default();
        let request = Request::builder()
            .method(method)
            .uri(call.path)
            .header(http::header::HOST, "localhost")
            .header(http::header::ACCEPT, "application/json")
            .header(http::header::CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::from(body)))
            .expect("paths are ours");
        let Some(connection) = &mut self.connection else {
            return Err(broken(io::ErrorKind::NotConnected.into()));
        };
        let sender = &mut self.sender;
        let exchange = async {
            let answer = sender.send_request(request).await.map_err(|e| broken(io::Error::other(e)))?;
            let status = answer.status();
            let body = Limited::new(answer.into_body(), ANSWER_MAX).collect().await;
            Ok((status, body.map_err(|e| broken(io::Error::other(e)))?.to_bytes()))
        };
        tokio::pin!(exchange);
        // The connection is driven here and nowhere else, so that nothing of it is left when this ends.
        let (status, answer) = tokio::select! {
            biased;
            answer = &mut exchange => answer,
            ended = connection => {
                self.connection = None;
                match ended {
                    Ok(()) => exchange.await,
                    Err(e) => Err(broken(io::Error::other(e))),
                }
            }
        }?;
        match status {
            StatusCode::OK | StatusCode::NO_CONTENT => Ok(answer),
            status => Err(Error::Refused { command: call.path, reason: reason(status, &answer) }),
        }
    }
}

fn reason(status: StatusCode, answer: &[u8]) -> String {
    let said = serde_json::from_slice(answer)
        .map_or_else(|_| String::from_utf8_lossy(answer).into_owned(), |fault: Fault| fault.fault_message);
    let said: String = said.chars().map(|c| if c.is_control() { ' ' } else { c }).take(REASON_MAX).collect();
    if said.trim().is_empty() { status.to_string() } else { said.trim().to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_are_cut_and_without_control_characters() {
        let say = |text: &str| reason(StatusCode::BAD_REQUEST, text.as_bytes());
        assert_eq!(say(r#"{"fault_message":"no\nway\u001b[31m"}"#), "no way [31m");
        assert_eq!(say("{\"fault"), "{\"fault");
        assert_eq!(say(""), "400 Bad Request");
        assert_eq!(say(&format!(r#"{{"fault_message":"{}"}}"#, "x".repeat(9000))).len(), REASON_MAX);
    }

    #[test]
    fn what_is_not_wanted_is_not_said() {
        let drive = Drive {
            drive_id: "disk",
            path_on_host: "/disk",
            is_root_device: false,
            is_read_only: false,
            cache_type: "Writeback",
            io_engine: "Sync",
            rate_limiter: None,
        };
        assert!(!serde_json::to_string(&drive).unwrap().contains("rate_limiter"));
        let limited = Drive { rate_limiter: Some(RateLimiter { bandwidth: TokenBucket::per_second(7) }), ..drive };
        let text = serde_json::to_string(&limited).unwrap();
        assert!(text.contains(r#""rate_limiter":{"bandwidth":{"size":7,"refill_time":1000}}"#), "{text}");
    }
}
