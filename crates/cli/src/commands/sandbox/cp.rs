//! `wrenn sandbox cp`: one file in or out, of any size, streamed.
//!
//! A download is written beside its place and renamed when it is whole, so that a broken connection leaves no half file under the
//! wanted name. Whole directories are for `tar` and a pipe; the error says how.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use api::v1::sandboxes::Sandbox;
use futures::TryStreamExt as _;
use indicatif::ProgressBar;
use reqwest::multipart::{Form, Part};
use reqwest::{Body, Method};
use serde_json::json;
use tokio::fs::File;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _};
use tokio_util::io::ReaderStream;

use crate::client::{Client, SILENCE_MAX};
use crate::credentials::Options;
use crate::failure::{Doing as _, Failure};
use crate::output::{Format, bytes_bar, show};
use crate::place::{InSandbox, Place};
use crate::transfer::{CHUNK, while_moving};

#[derive(clap::Args)]
pub struct Arguments {
    /// A local path, ID:PATH, or `-`.
    from: String,
    /// A local path, ID:PATH, or `-`.
    to: String,
}

pub async fn run(arguments: &Arguments, options: &Options, format: Format) -> Result<ExitCode, Failure> {
    // Ctrl-C drops the transfer, and with it what is half written.
    tokio::select! {
        copied = copied(arguments, options, format) => copied,
        _ = tokio::signal::ctrl_c() => Err(Failure::new("interrupted").exiting(130)),
    }
}

async fn copied(arguments: &Arguments, options: &Options, format: Format) -> Result<ExitCode, Failure> {
    let client = Client::of_user(options)?;
    match (Place::parse(&arguments.from)?, Place::parse(&arguments.to)?) {
        (Place::Sandbox(InSandbox { id, path }), Place::Local(to)) => {
            let bytes = download(&client, &id, &path, &to, format).await?;
            show(format, &json!({ "from": arguments.from, "to": to, "bytes": bytes }), |_| String::new())?;
        }
        // Standard output is the file's: there is no room for a document.
        (Place::Sandbox(InSandbox { id, path }), Place::Standard) => {
            let bar = bytes_bar(format, None);
            receive(&client, &id, &path, &mut tokio::io::stdout(), &bar).await?;
        }
        (Place::Local(from), Place::Sandbox(InSandbox { id, path })) => {
            let bytes = upload(&client, &from, &id, &path, format).await?;
            show(format, &json!({ "from": from, "to": arguments.to, "bytes": bytes }), |_| String::new())?;
        }
        (Place::Standard, Place::Sandbox(InSandbox { id, path })) => {
            let name = file_name(&path)?;
            let path = if path.ends_with('/') {
                return Err(Failure::usage("standard input has no name: give the file's whole path"));
            } else {
                path
            };
            let bar = bytes_bar(format, None);
            send(&client, &id, &path, &name, tokio::io::stdin(), None, &bar).await?;
            bar.finish_and_clear();
            show(format, &json!({ "from": "-", "to": arguments.to, "bytes": bar.position() }), |_| String::new())?;
        }
        _ => return Err(Failure::usage("one side must be ID:PATH in a sandbox, the other a local path or -")),
    }
    Ok(ExitCode::SUCCESS)
}

fn file_name(path: &str) -> Result<String, Failure> {
    let name = Path::new(path).file_name().and_then(|name| name.to_str());
    name.map(str::to_owned).ok_or_else(|| Failure::usage(format!("{path:?} names no file")))
}

async fn upload(client: &Client, from: &Path, id: &str, path: &str, format: Format) -> Result<u64, Failure> {
    let file = File::open(from).await.doing(|| format!("open {}", from.display()))?;
    let metadata = file.metadata().await.doing(|| format!("read {}", from.display()))?;
    if metadata.is_dir() {
        return Err(Failure::usage(format!(
            "{} is a directory: send it as one stream with `tar c {0} | wrenn sandbox cp - {id}:/tmp/dir.tar`, then \
             `wrenn sandbox exec {id} -- tar x -f /tmp/dir.tar`",
            from.display()
        )));
    }
    let name = file_name(&from.to_string_lossy())?;
    let path = if path.ends_with('/') { format!("{path}{name}") } else { path.to_owned() };
    // Pipes and devices have no length.
    let length = metadata.is_file().then_some(metadata.len());
    let bar = bytes_bar(format, length);
    send(client, id, &path, &name, file, length, &bar).await?;
    let sent = bar.position();
    bar.finish_and_clear();
    Ok(sent)
}

async fn send(
    client: &Client,
    id: &str,
    path: &str,
    name: &str,
    from: impl AsyncRead + Send + Sync + 'static,
    length: Option<u64>,
    bar: &ProgressBar,
) -> Result<(), Failure> {
    let counter = bar.clone();
    let chunks = ReaderStream::with_capacity(from, CHUNK).inspect_ok(move |chunk| counter.inc(chunk.len() as u64));
    let body = Body::wrap_stream(chunks);
    let part = match length {
        Some(length) => Part::stream_with_length(body, length),
        None => Part::stream(body),
    };
    // Asked first: a server that refuses in the middle of a body can often not be heard.
    let sandbox: Sandbox = client.get(client.url(&["v1", "sandboxes", id])).await?;
    if sandbox.status != "running" {
        return Err(Failure::new(format!("sandbox {id} is {}, not running (invalid_state)", sandbox.status)));
    }
    // The path comes first: the server opens the file before it reads the content.
    let form = Form::new().text("path", path.to_owned()).part("file", part.file_name(name.to_owned()));
    let url = client.url(&["v1", "sandboxes", id, "files", "stream", "write"]);
    let request = client.upload(Method::POST, url)?.multipart(form);
    let answer = while_moving(bar, length, request.send()).await?.map_err(|error| client.broken(&error))?;
    client.checked(answer).await?;
    Ok(())
}

async fn download(client: &Client, id: &str, path: &str, to: &Path, format: Format) -> Result<u64, Failure> {
    let to = if to.is_dir() { to.join(file_name(path)?) } else { to.to_owned() };
    let bar = bytes_bar(format, None);
    // What is no plain file (a device, a pipe) is written straight into: it cannot be replaced.
    if std::fs::metadata(&to).is_ok_and(|metadata| !metadata.is_file()) {
        let mut file = File::options().write(true).open(&to).await.doing(|| format!("open {}", to.display()))?;
        return receive(client, id, path, &mut file, &bar).await;
    }
    let mut name = to.file_name().ok_or_else(|| Failure::usage(format!("{} names no file", to.display())))?.to_owned();
    name.push(format!(".part-{}", std::process::id()));
    let unfinished = Unfinished(to.with_file_name(name));
    let mut file = File::create(&unfinished.0).await.doing(|| format!("make {}", unfinished.0.display()))?;
    let bytes = receive(client, id, path, &mut file, &bar).await?;
    file.sync_all().await.doing(|| format!("write {}", to.display()))?;
    std::fs::rename(&unfinished.0, &to).doing(|| format!("write {}", to.display()))?;
    unfinished.disarm();
    bar.finish_and_clear();
    Ok(bytes)
}

/// Removed on drop, unless it got its name.
struct Unfinished(PathBuf);

impl Unfinished {
    /// It has its name now: there is nothing left to remove.
    fn disarm(mut self) {
        self.0.clear();
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if !self.0.as_os_str().is_empty() {
            let _ = std::fs::remove_file(&self.0);
        }
    }
}

async fn receive(
    client: &Client,
    id: &str,
    path: &str,
    to: &mut (impl AsyncWrite + Unpin),
    bar: &ProgressBar,
) -> Result<u64, Failure> {
    let request = client
        .request(Method::POST, client.url(&["v1", "sandboxes", id, "files", "stream", "read"]))
        .json(&api::v1::files::ReadFile { path: path.to_owned(), user: None });
    let answer = tokio::time::timeout(SILENCE_MAX, request.send())
        .await
        .map_err(|_| Failure::new(format!("no answer within {} s", SILENCE_MAX.as_secs())))?
        .map_err(|error| client.broken(&error))?;
    let mut answer = client.checked(answer).await?;
    if let Some(total) = answer.content_length() {
        bar.set_length(total);
    }
    let mut bytes = 0;
    loop {
        let chunk = tokio::time::timeout(SILENCE_MAX, answer.chunk())
            .await
            .map_err(|_| Failure::new(format!("not a byte has come for {} s", SILENCE_MAX.as_secs())))?
            .map_err(|error| client.broken(&error))?;
        let Some(chunk) = chunk else { break };
        to.write_all(&chunk).await.doing(|| "write what was read".to_owned())?;
        bytes += chunk.len() as u64;
        bar.inc(chunk.len() as u64);
    }
    tokio::time::timeout(Duration::from_secs(60), to.flush())
        .await
        .map_err(|_| Failure::new("the reader of standard output takes nothing"))?
        .doing(|| "write what was read".to_owned())?;
    Ok(bytes)
}
