//! `wrenn files put LOCAL SANDBOX:PATH`: one file, standard input, or a directory.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use futures::TryStreamExt as _;
use indicatif::ProgressBar;
use reqwest::{Body, Method, header};
use serde_json::json;
use tokio::fs::File;
use tokio::io::AsyncRead;
use tokio_util::io::ReaderStream;

use super::As;
use super::remote::{Remote, is_directory};
use crate::client::Client;
use crate::credentials::Options;
use crate::failure::{Doing as _, Failure};
use crate::output::{Format, bytes_bar, show};
use crate::place::{InSandbox, Place};
use crate::transfer::{CHUNK, while_moving};

/// Of a file that can be read again; the sandbox has it whole, or as it was.
const TRIES: u32 = 4;
const PAUSE_FIRST: Duration = Duration::from_millis(500);

#[derive(clap::Args)]
pub struct Arguments {
    /// A file, a directory (with -r), or `-` for standard input.
    from: String,
    /// SANDBOX:PATH; into it when it is a directory or ends with `/`. SANDBOX: is the home in it.
    to: String,
    /// A directory with all that is in it; symbolic links and devices are left out.
    #[arg(long, short)]
    recursive: bool,
    #[command(flatten)]
    who: As,
}

pub async fn run(arguments: &Arguments, options: &Options, format: Format) -> Result<ExitCode, Failure> {
    tokio::select! {
        done = sent(arguments, options, format) => done,
        _ = tokio::signal::ctrl_c() => Err(Failure::new("interrupted").exiting(130)),
    }
}

async fn sent(arguments: &Arguments, options: &Options, format: Format) -> Result<ExitCode, Failure> {
    let client = Client::of_user(options)?;
    let remote = Remote { client: &client, user: arguments.who.user.as_deref() };
    let to = InSandbox::or_home(&arguments.to)?;
    // Asked first: a server that refuses in the middle of a body can often not be heard.
    let found = remote.find(&to).await?;
    let is_into = to.path.ends_with('/') || found.as_ref().is_some_and(is_directory);
    let mut sending = Sending { remote: &remote, bar: bytes_bar(format, None), files: 0, skipped: 0 };
    match Place::parse(&arguments.from)? {
        Place::Standard if is_into => {
            return Err(Failure::usage("standard input has no name: give the file's whole path"));
        }
        Place::Standard => sending.stream(tokio::io::stdin(), None, &to).await?,
        Place::Local(from) => {
            let to = if is_into { to.join(name_of(&from)?) } else { to };
            let metadata = std::fs::metadata(&from).doing(|| format!("read {}", from.display()))?;
            match (metadata.is_dir(), arguments.recursive) {
                (true, false) => {
                    return Err(Failure::usage(format!("{} is a directory: put it with -r", from.display())));
                }
                (true, true) => sending.directory(&from, &to).await?,
                (false, _) => {
                    // Pipes and devices have no length.
                    let length = metadata.is_file().then_some(metadata.len());
                    sending.file(&from, length, &to).await?;
                }
            }
        }
        Place::Sandbox(_) => {
            return Err(Failure::usage(
                "from one sandbox into another: `wrenn files get` there, `wrenn files put` here",
            ));
        }
    }
    let bytes = sending.bar.position();
    sending.bar.finish_and_clear();
    let told = json!({
        "from": arguments.from, "to": arguments.to, "bytes": bytes, "files": sending.files, "skipped": sending.skipped,
    });
    show(format, &told, |_| String::new())?;
    Ok(ExitCode::SUCCESS)
}

fn name_of(from: &Path) -> Result<&str, Failure> {
    let name = from.file_name().and_then(|name| name.to_str());
    name.ok_or_else(|| Failure::usage(format!("{} has no name that the API can carry (UTF-8)", from.display())))
}

struct Sending<'a> {
    remote: &'a Remote<'a>,
    bar: ProgressBar,
    files: u64,
    skipped: u64,
}

impl Sending<'_> {
    async fn directory(&mut self, from: &Path, to: &InSandbox) -> Result<(), Failure> {
        let mut waiting: Vec<(PathBuf, InSandbox)> = vec![(from.to_owned(), to.clone())];
        while let Some((from, to)) = waiting.pop() {
            match self.remote.mkdir(&to).await {
                Err(failure) if failure.code() != Some("conflict") => return Err(failure),
                _ => {}
            }
            let doing = || format!("read {}", from.display());
            let mut entries: Vec<_> = std::fs::read_dir(&from).doing(doing)?.collect::<Result<_, _>>().doing(doing)?;
            entries.sort_by_key(|entry| entry.file_name());
            for entry in entries {
                let path = entry.path();
                let (place, kind) = (to.join(name_of(&path)?), entry.file_type().doing(doing)?);
                if kind.is_dir() {
                    waiting.push((path, place));
                } else if kind.is_file() {
                    let length = entry.metadata().doing(doing)?.len();
                    self.file(&path, Some(length), &place).await?;
                } else {
                    self.skipped += 1;
                    self.bar.suspend(|| eprintln!("wrenn: left out: {} (no file and no directory)", path.display()));
                }
            }
        }
        Ok(())
    }

    async fn file(&mut self, from: &Path, length: Option<u64>, to: &InSandbox) -> Result<(), Failure> {
        let began_at = self.bar.position();
        let mut pause = PAUSE_FIRST;
        for attempt in 1.. {
            let file = File::open(from).await.doing(|| format!("open {}", from.display()))?;
            match self.stream(file, length, to).await {
                Ok(()) => return Ok(()),
                // What the server refused it will refuse again, and what is no file cannot be read twice.
                Err(failure) if failure.code().is_some_and(|code| code != "unavailable") => return Err(failure),
                Err(failure) if attempt >= TRIES || length.is_none() => return Err(failure),
                Err(_) => {}
            }
            self.bar.set_position(began_at);
            tokio::time::sleep(pause).await;
            pause *= 2;
        }
        unreachable!("the loop ends by its return")
    }

    async fn stream(
        &mut self,
        from: impl AsyncRead + Send + Sync + 'static,
        length: Option<u64>,
        to: &InSandbox,
    ) -> Result<(), Failure> {
        let client = self.remote.client;
        let counter = self.bar.clone();
        let chunks = ReaderStream::with_capacity(from, CHUNK).inspect_ok(move |chunk| counter.inc(chunk.len() as u64));
        let mut request = client
            .upload(Method::PUT, self.remote.content(to))?
            .header(header::CONTENT_TYPE, "application/octet-stream")
            .body(Body::wrap_stream(chunks));
        if let Some(length) = length {
            request = request.header(header::CONTENT_LENGTH, length);
        }
        let answer = while_moving(&self.bar, length, request.send()).await?.map_err(|error| client.broken(&error))?;
        client.checked(answer).await?;
        self.files += 1;
        Ok(())
    }
}
