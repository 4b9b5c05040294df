//! Commands and files: how much longer they take through the API, and how many bytes go through in a second.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use futures::StreamExt as _;
use serde_json::json;

use super::figures::{Figure, Judged, Limit};
use super::{Bench, envd};

const CALLS: usize = 300;
/// Not measured: what connects, and fills caches.
const WARM_UP: usize = 20;
/// Of a small file.
const FILE_BYTES: usize = 1024;
const STREAM_BYTES: u64 = 1 << 30;
const PIECE: usize = 256 * 1024;
const ROUNDS: usize = 3;
/// Added to what envd itself takes.
const ADDED_MS_MAX: f64 = 2.0;
const MB_PER_S_MIN: f64 = 200.0;
const GROWTH_MIB_MAX: f64 = 16.0;

/// envd alone, asked by the same client.
struct Alone {
    child: Child,
    url: String,
}

impl Alone {
    fn start() -> Result<Self> {
        let mut command = Command::new(envd()?);
        command.args(["--standalone", "--port", "0"]).stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = command.spawn().context("start envd")?;
        let mut line = String::new();
        let output = child.stdout.take().context("it is a pipe")?;
        std::io::BufRead::read_line(&mut std::io::BufReader::new(output), &mut line).context("read envd's port")?;
        let url = format!("http://127.0.0.1:{}", line.trim());
        Ok(Self { child, url })
    }
}

impl Drop for Alone {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub async fn commands(bench: &Bench) -> Result<Vec<Judged>> {
    let sandbox = bench.sandbox().await?;
    let alone = Alone::start()?;
    let by_api = || async {
        let body = json!({"cmd": "/bin/true", "args": [""]});
        let answer = bench.http.post(bench.path(&sandbox, "exec")).json(&body).send().await?;
        let status = answer.status();
        let text = answer.text().await?;
        ensure!(status == 200 && text.contains("\"exit_code\":0"), "exec is answered with {status}: {text}");
        Ok(())
    };
    let message = br#"{"process":{"cmd":"/bin/true","args":[""]},"stdin":false}"#;
    let length = u32::try_from(message.len())?.to_be_bytes();
    let start: Vec<u8> = [&[0], length.as_slice(), message].concat();
    let by_envd = || async {
        let request = bench.http.post(format!("{}/process.Process/Start", alone.url));
        let request =
            request.header("content-type", "application/connect+json").header("connect-protocol-version", "1");
        let answer = request.body(start.clone()).send().await?;
        ensure!(answer.status() == 200, "envd answers {}", answer.status());
        let body = answer.bytes().await?;
        ensure!(body.windows(5).any(|part| part == b"\"end\""), "the command did not end");
        Ok(())
    };
    added("exec", "exec_added", by_api, by_envd).await
}

pub async fn files(bench: &Bench) -> Result<Vec<Judged>> {
    let sandbox = bench.sandbox().await?;
    let alone = Alone::start()?;
    let dir = readable()?;
    let path = dir.path().join("small");
    std::fs::write(&path, vec![b'x'; FILE_BYTES])?;
    let whole = |answer: reqwest::Response| async {
        ensure!(answer.status() == 200, "a file is answered with {}", answer.status());
        ensure!(answer.bytes().await?.len() == FILE_BYTES, "the file is not whole");
        Ok(())
    };
    let name = path.to_string_lossy().into_owned();
    let by_api = || async {
        whole(bench.http.post(bench.path(&sandbox, "files/read")).json(&json!({ "path": name })).send().await?).await
    };
    let by_envd = || async {
        let request = bench.http.get(format!("{}/files", alone.url)).query(&[("path", &name)]);
        whole(request.send().await?).await
    };
    added("file", "file_added", by_api, by_envd).await
}

/// In turns, so that both meet the same machine.
async fn added<A: Future<Output = Result<()>>, B: Future<Output = Result<()>>>(
    name: &'static str,
    name_added: &'static str,
    by_api: impl Fn() -> A,
    by_envd: impl Fn() -> B,
) -> Result<Vec<Judged>> {
    let (mut through, mut floor) = (Vec::new(), Vec::new());
    for round in 0..WARM_UP + CALLS {
        let began = Instant::now();
        by_api().await?;
        let took = milliseconds(began);
        let began = Instant::now();
        by_envd().await?;
        if round >= WARM_UP {
            through.push(took);
            floor.push(milliseconds(began));
        }
    }
    let added = through.iter().zip(&floor).map(|(through, floor)| through - floor).collect();
    Ok(vec![
        Figure::of(name, "ms", through).beside(floor).judged(Limit::None),
        Figure::of(name_added, "ms", added).judged(Limit::P50(ADDED_MS_MAX)),
    ])
}

/// One large file out and in, beside a plain copy of it; and how much memory the control plane takes for it.
pub async fn streams(bench: &Bench) -> Result<Vec<Judged>> {
    let sandbox = bench.sandbox().await?;
    let dir = readable()?;
    let large = dir.path().join("large");
    make(&large)?;
    let rate = |began: Instant| STREAM_BYTES as f64 / 1e6 / began.elapsed().as_secs_f64();
    let (mut out, mut into, mut copied) = (Vec::new(), Vec::new(), Vec::new());
    let before = bench.memory("VmRSS")?;
    bench.forget_peak()?;
    for round in 0..ROUNDS {
        let began = Instant::now();
        let request = bench.http.get(bench.path(&sandbox, "files/content")).query(&[("path", large.to_string_lossy())]);
        let answer = request.send().await?;
        ensure!(answer.status() == 200, "a download is answered with {}", answer.status());
        let (mut pieces, mut bytes) = (answer.bytes_stream(), 0);
        while let Some(piece) = pieces.next().await {
            bytes += piece?.len() as u64;
        }
        ensure!(bytes == STREAM_BYTES, "{bytes} bytes came");
        out.push(rate(began));

        let target = dir.path().join(format!("up-{round}"));
        let began = Instant::now();
        let piece = Bytes::from(vec![b'y'; PIECE]);
        let count = usize::try_from(STREAM_BYTES)? / PIECE;
        let body = futures::stream::iter((0..count).map(move |_| Ok::<Bytes, std::io::Error>(piece.clone())));
        let request =
            bench.http.put(bench.path(&sandbox, "files/content")).query(&[("path", target.to_string_lossy())]);
        let answer = request.body(reqwest::Body::wrap_stream(body)).send().await?;
        ensure!(answer.status() == 204, "an upload is answered with {}: {}", answer.status(), answer.text().await?);
        into.push(rate(began));
        ensure!(std::fs::metadata(&target)?.len() == STREAM_BYTES, "the upload is not whole");

        let began = Instant::now();
        std::fs::copy(&large, dir.path().join("copy"))?;
        copied.push(rate(began));
        std::fs::remove_file(&target)?;
    }
    let growth = bench.memory("VmHWM")? - before;
    Ok(vec![
        Figure::of("download", "MB/s", out).beside(copied.clone()).judged(Limit::P50AtLeast(MB_PER_S_MIN)),
        Figure::of("upload", "MB/s", into).beside(copied).judged(Limit::P50AtLeast(MB_PER_S_MIN)),
        Figure::of("rss_growth_by_streams", "MiB", vec![growth]).judged(Limit::Max(GROWTH_MIB_MAX)),
    ])
}

/// A directory in which everybody may write: sandboxes have users of their own.
fn readable() -> Result<tempfile::TempDir> {
    let dir = tempfile::Builder::new().prefix("bench-api-").tempdir_in("/var/tmp").context("make a directory")?;
    std::fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o777))?;
    Ok(dir)
}

fn make(path: &Path) -> Result<()> {
    let mut file = std::fs::File::create(path)?;
    let piece = vec![b'x'; PIECE];
    for _ in 0..STREAM_BYTES / PIECE as u64 {
        std::io::Write::write_all(&mut file, &piece)?;
    }
    Ok(file.sync_all()?)
}

fn milliseconds(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1000.0
}
