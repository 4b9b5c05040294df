//! The envd of a running sandbox, asked directly: from where the agent's own connections come from, with what it wrote down.

use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};
use nix::sched::{CloneFlags, setns};
use serde_json::Value;
use testkit::envd::Client;
use tokio::net::TcpStream;

const PORT: u16 = 49983;
const CONNECT_MAX: Duration = Duration::from_secs(10);

pub struct Guest {
    pub way: Way,
    /// It shows the sandbox's token and its present incarnation.
    pub client: Client,
    pub access_token: String,
    /// The host's own.
    pub control_token: String,
    pub incarnation: String,
}

/// `dir` is that of the platform, `tag` its agent's.
pub fn of(dir: &Path, tag: &str, sandbox: &str) -> Result<Guest> {
    let file = dir.join("pool/sandboxes").join(sandbox).join("state.json");
    let text = std::fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))?;
    let state: Value = serde_json::from_str(&text).context("read the sandbox's state")?;
    let run = &state["record"]["phase"]["run"];
    let text = |field: &str| {
        run[field].as_str().map(str::to_owned).with_context(|| format!("no {field} in the sandbox's state"))
    };
    let slot = run["slot"].as_u64().and_then(|slot| u16::try_from(slot).ok()).context("no slot in its state")?;
    let way = Way { namespace: format!("/run/netns/wrn-{tag}"), slot };
    let (access_token, incarnation) = (text("access_token")?, text("incarnation")?);
    let connect = {
        let way = way.clone();
        move || {
            let way = way.clone();
            let connecting = tokio::task::spawn_blocking(move || way.connect());
            let stream = async {
                let stream = connecting.await.map_err(std::io::Error::other)??;
                stream.set_nonblocking(true)?;
                TcpStream::from_std(stream)
            };
            Box::pin(stream) as _
        }
    };
    let client = Client::new(connect, &[("x-access-token", &access_token), ("x-incarnation", &incarnation)]);
    Ok(Guest { way, client, access_token, control_token: text("control_token")?, incarnation })
}

/// How to reach a guest.
#[derive(Clone)]
pub struct Way {
    namespace: String,
    slot: u16,
}

impl Way {
    /// The connection belongs to the namespace that its socket was made in; the thread that went there must do nothing else.
    pub fn connect(&self) -> std::io::Result<std::net::TcpStream> {
        let [high, low] = self.slot.to_be_bytes();
        let guest = SocketAddr::from((Ipv4Addr::new(10, 11, high, low), PORT));
        let connect = || {
            setns(File::open(&self.namespace)?, CloneFlags::CLONE_NEWNET)?;
            std::net::TcpStream::connect_timeout(&guest, CONNECT_MAX)
        };
        std::thread::scope(|scope| scope.spawn(connect).join()).expect("connecting does not panic")
    }
}
