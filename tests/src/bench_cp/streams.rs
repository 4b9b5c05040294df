//! How large the control plane is while a thousand commands' streams are open.

use anyhow::{Context as _, Result};
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;
use whole_machine::figures::{Figure, Judged, Limit};

use super::control_plane::{ControlPlane, silent};

const STREAMS: usize = 1000;
const MIB_MAX: f64 = 200.0;
const SANDBOX: &str = "sb0000000000000000000000";

pub async fn measure() -> Result<Judged> {
    let control_plane = ControlPlane::start("").await?;
    let (address, held) = silent().await?;
    control_plane.hosts(1, &address)?;
    control_plane.sql(&format!(
        "insert into sandboxes (id, team_id, template, vcpus, memory_mib, disk_mib, desired, observed, host_id, host_epoch)
         select '{SANDBOX}', (select team_id from api_keys order by created_at limit 1), 'minimal', 1, 128, 1024, 'running', 'running', id, 1 from hosts"
    ))?;
    let base = control_plane.base.replacen("http", "ws", 1);
    let mut streams = Vec::with_capacity(STREAMS);
    for _ in 0..STREAMS {
        let path = format!("{base}/v1/sandboxes/{SANDBOX}/exec/stream");
        let mut request = path.into_client_request().context("make a request")?;
        request.headers_mut().insert("X-API-Key", control_plane.key.parse().context("a key is ASCII")?);
        let (mut stream, _) = tokio_tungstenite::connect_async(request).await.context("open a stream")?;
        // Its command is asked of a host that does not answer, so that the stream stays as it is.
        let start = serde_json::json!({"type": "start", "cmd": "sleep", "args": ["60"]});
        futures::SinkExt::send(&mut stream, Message::text(start.to_string())).await.context("start a command")?;
        streams.push(stream);
    }
    let mib = control_plane.resident_mib()?;
    held.abort();
    drop(streams);
    Ok(Figure::of("rss_with_1000_streams", "MiB", vec![mib]).judged(Limit::Max(MIB_MAX)))
}
