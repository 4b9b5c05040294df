//! The content of a file in a sandbox, as a stream that goes on where it broke off: `GET .../files/content` with `Range`, and `If-Range`, so that
//! what is put together is of one and the same file.

use std::time::Duration;

use indicatif::ProgressBar;
use reqwest::{Method, Response, StatusCode, header};
use tokio::io::{AsyncWrite, AsyncWriteExt as _};

use super::remote::Remote;
use crate::client::SILENCE_MAX;
use crate::failure::{Doing as _, Failure};
use crate::place::InSandbox;

/// In a row, without a byte between them: with the pauses it is about half a minute.
const TRIES: u32 = 7;
const PAUSE_FIRST: Duration = Duration::from_millis(250);
const FLUSH_MAX: Duration = Duration::from_secs(60);

/// Which file it is: another one of the same name has another tag.
#[derive(Debug, Clone, PartialEq)]
pub struct Version {
    pub etag: Option<String>,
    pub size: Option<u64>,
}

impl Version {
    fn of(answer: &Response) -> Self {
        let text = |name| answer.headers().get(name).and_then(|value| value.to_str().ok());
        // Weak tags are of no use for ranges.
        let etag = text(header::ETAG).filter(|etag| etag.starts_with('"')).map(str::to_owned);
        Self { etag, size: text(header::CONTENT_LENGTH).and_then(|length| length.parse().ok()) }
    }
}

pub enum Stopped {
    /// It is not the file that it was.
    Changed,
    Failed(Failure),
}

pub struct Content<'a> {
    pub remote: &'a Remote<'a>,
    pub place: &'a InSandbox,
}

impl Content<'_> {
    pub async fn version(&self) -> Result<Version, Failure> {
        let client = self.remote.client;
        let request = client.request(Method::HEAD, self.remote.content(self.place));
        let answer = tokio::time::timeout(SILENCE_MAX, request.send()).await.map_err(|_| silent())?;
        let answer = answer.map_err(|error| client.broken(&error))?;
        if answer.status().is_success() {
            return Ok(Version::of(&answer));
        }
        // An answer to HEAD has no body: the reason is in that of a GET.
        let asked = client.request(Method::GET, self.remote.content(self.place)).header(header::RANGE, "bytes=0-0");
        let refused = tokio::time::timeout(SILENCE_MAX, asked.send()).await.map_err(|_| silent())?;
        let answer = client.checked(refused.map_err(|error| client.broken(&error))?).await?;
        Err(Failure::new(format!(
            "{} answered HEAD and GET of a file differently ({})",
            client.base(),
            answer.status()
        )))
    }

    /// Writes what there is from `at` on, over as many connections as it takes. `version`: of what was read before; none when nothing was.
    pub async fn read(
        &self,
        mut version: Option<Version>,
        mut at: u64,
        to: &mut (impl AsyncWrite + Unpin),
        bar: &ProgressBar,
    ) -> Result<u64, Stopped> {
        let mut tries = 0;
        loop {
            let before = at;
            match self.piece(&mut version, &mut at, to, bar).await {
                Ok(()) => break,
                Err(Broken::Stopped(stopped)) => return Err(stopped),
                Err(Broken::Connection(failure)) => {
                    tries = if at > before { 1 } else { tries + 1 };
                    if tries > TRIES {
                        return Err(Stopped::Failed(failure));
                    }
                    tokio::time::sleep(PAUSE_FIRST * (1 << (tries - 1))).await;
                }
            }
        }
        match tokio::time::timeout(FLUSH_MAX, to.flush()).await {
            Ok(flushed) => flushed.doing(|| "write what was read".to_owned()).map_err(Stopped::Failed)?,
            Err(_) => return Err(Stopped::Failed(Failure::new("whoever is to take the content takes nothing"))),
        }
        Ok(at)
    }

    /// One connection.
    async fn piece(
        &self,
        version: &mut Option<Version>,
        at: &mut u64,
        to: &mut (impl AsyncWrite + Unpin),
        bar: &ProgressBar,
    ) -> Result<(), Broken> {
        let client = self.remote.client;
        let mut request = client.request(Method::GET, self.remote.content(self.place));
        if *at > 0 {
            let etag = version.as_ref().and_then(|version| version.etag.clone()).ok_or(Stopped::Changed)?;
            request = request.header(header::RANGE, format!("bytes={at}-")).header(header::IF_RANGE, etag);
        }
        let answer = tokio::time::timeout(SILENCE_MAX, request.send()).await.map_err(|_| silent())?;
        let mut answer = answer.map_err(|error| client.broken(&error))?;
        match (answer.status(), *at) {
            (StatusCode::OK, 0) => {
                let found = Version::of(&answer);
                if version.get_or_insert_with(|| found.clone()).etag != found.etag {
                    return Err(Stopped::Changed.into());
                }
            }
            (StatusCode::PARTIAL_CONTENT, from) if from > 0 && begins_at(&answer, from) => {}
            // All of it was there already, and nothing is beyond it.
            (StatusCode::RANGE_NOT_SATISFIABLE, from) if size_of(version) == Some(from) => return Ok(()),
            (StatusCode::OK | StatusCode::PARTIAL_CONTENT | StatusCode::RANGE_NOT_SATISFIABLE, _) => {
                return Err(Stopped::Changed.into());
            }
            (status, _) => {
                let failure = match client.checked(answer).await {
                    Err(failure) => failure,
                    Ok(_) => Failure::new(format!("{} answered {status} to a question for a file", client.base())),
                };
                // The platform is not itself just now, or was asked too much.
                return Err(match status {
                    StatusCode::SERVICE_UNAVAILABLE | StatusCode::TOO_MANY_REQUESTS => Broken::Connection(failure),
                    _ => Stopped::Failed(failure).into(),
                });
            }
        }
        if let Some(size) = size_of(version) {
            bar.set_length(size);
        }
        bar.set_position(*at);
        loop {
            let chunk = tokio::time::timeout(SILENCE_MAX, answer.chunk()).await.map_err(|_| silent())?;
            let Some(chunk) = chunk.map_err(|error| client.broken(&error))? else { break };
            let written = to.write_all(&chunk).await;
            written.doing(|| "write what was read".to_owned()).map_err(Stopped::Failed)?;
            *at += chunk.len() as u64;
            bar.inc(chunk.len() as u64);
        }
        match size_of(version) {
            Some(size) if *at < size => Err(Broken::Connection(Failure::new(format!(
                "the connection to {} ended after {at} of {size} bytes",
                client.base()
            )))),
            _ => Ok(()),
        }
    }
}

enum Broken {
    /// It may be tried again.
    Connection(Failure),
    Stopped(Stopped),
}

impl From<Failure> for Broken {
    fn from(failure: Failure) -> Self {
        Self::Connection(failure)
    }
}

impl From<Stopped> for Broken {
    fn from(stopped: Stopped) -> Self {
        Self::Stopped(stopped)
    }
}

fn size_of(version: &Option<Version>) -> Option<u64> {
    version.as_ref().and_then(|version| version.size)
}

fn begins_at(answer: &Response, from: u64) -> bool {
    let range = answer.headers().get(header::CONTENT_RANGE).and_then(|range| range.to_str().ok());
    let first = range.and_then(|range| range.strip_prefix("bytes ")?.split('-').next()?.trim().parse().ok());
    first == Some(from)
}

fn silent() -> Failure {
    Failure::new(format!("not a byte has come for {} s", SILENCE_MAX.as_secs()))
}
