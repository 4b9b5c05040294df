//! What the control plane takes in memory for terminals at which nobody types.

use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use futures::{SinkExt as _, StreamExt as _};
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;

use super::Bench;
use super::figures::{Figure, Judged, Limit};

const SANDBOXES: usize = 10;
/// In each; a sandbox may have 64 streams.
const TERMINALS: usize = 50;
const MIB_MAX: f64 = 50.0;
const START_MAX: Duration = Duration::from_secs(30);

pub async fn idle(bench: &Bench) -> Result<Judged> {
    let before = bench.memory("VmRSS")?;
    let mut open = Vec::new();
    for _ in 0..SANDBOXES {
        let sandbox = bench.sandbox().await?;
        for _ in 0..TERMINALS {
            let url = bench.path(&sandbox, "pty").replacen("http", "ws", 1);
            let mut request = url.into_client_request().context("make a request")?;
            request.headers_mut().insert("X-API-Key", bench.key.parse().context("a key is ASCII")?);
            let (mut socket, _) = tokio_tungstenite::connect_async(request).await.context("open a terminal")?;
            let start = json!({"type": "start", "cmd": "/bin/cat"});
            socket.send(Message::text(start.to_string())).await.context("start a terminal")?;
            let text = loop {
                let said = tokio::time::timeout(START_MAX, socket.next()).await.context("a terminal does not start")?;
                match said {
                    Some(Ok(Message::Text(text))) => break text,
                    Some(Ok(Message::Ping(_))) => {}
                    other => bail!("a terminal says {other:?}"),
                }
            };
            let frame: Value = serde_json::from_str(&text).context("read a frame")?;
            if frame["type"] != "started" {
                bail!("a terminal says {frame}");
            }
            open.push(socket);
        }
    }
    // What was needed to open them is given back.
    tokio::time::sleep(Duration::from_secs(2)).await;
    let growth = bench.memory("VmRSS")? - before;
    drop(open);
    Ok(Figure::of("rss_of_500_ptys", "MiB", vec![growth]).judged(Limit::Max(MIB_MAX)))
}
