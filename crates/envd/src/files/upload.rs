//! `POST /files`: one file as the body, or several as a form. Each is written beside its place ([`Target`]) and all are renamed when the last
//! one is whole: a reader sees the old file or the new one, never half of one, and a form that fails stores none.
//!
//! Beside what published clients ask for, the query `fsync=true` makes the answer wait until files and names are on the disk.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use api::guest::WrittenFile;
use bytes::Bytes;
use futures::stream::{self, Stream, StreamExt as _};
use http::header::{CONTENT_TYPE, EXPECT};
use http::{Request, StatusCode};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use tokio::io::AsyncWriteExt as _;
use tokio::time::timeout;

use super::form::{self, Event};
use super::target::Target;
use super::{Asked, asked, gzip, status_of};
use crate::filesystem::metadata::Attributes;
use crate::server::Guest;
use crate::server::routes::{Answer, fault, json};
use crate::users;

/// A client that sends nothing for so long holds open files for nobody. Long enough for one that computes what it sends.
const SILENCE_MAX: Duration = Duration::from_secs(300);

/// The rest of a refused body is read for so long before the answer: a client that writes into a closed connection sees that and not why.
/// As long as nginx lingers.
const REST_TIME_MAX: Duration = Duration::from_secs(30);

type Refused = (StatusCode, String);

pub async fn answer(guest: &Arc<Guest>, request: Request<Incoming>) -> Answer {
    let (head, body) = request.into_parts();
    let request = Request::from_parts(head, ());
    let mut body = without_silence(body.into_data_stream(), SILENCE_MAX);
    match receive(guest, &request, &mut body).await {
        Ok(files) => json(StatusCode::OK, &files),
        Err((status, message)) => {
            // Who waits to be told to go on has sent nothing yet.
            if !request.headers().contains_key(EXPECT) {
                let rest = async { while body.next().await.is_some_and(|piece| piece.is_ok()) {} };
                let _ = timeout(REST_TIME_MAX, rest).await;
            }
            fault(status, &message)
        }
    }
}

async fn receive(
    guest: &Arc<Guest>,
    request: &Request<()>,
    body: impl Stream<Item = io::Result<Bytes>> + Send + Unpin,
) -> Result<Vec<WrittenFile>, Refused> {
    let asked = asked(guest, request, "write")?;
    let headers = request.headers();
    let attributes = Attributes::of_upload(headers).map_err(|message| (StatusCode::BAD_REQUEST, message))?;
    let unsupported = |message: &str| (StatusCode::UNSUPPORTED_MEDIA_TYPE, message.to_owned());
    let body = gzip::of_upload(headers).map_err(unsupported)?.pieces(body);
    let kind = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let mut upload = Upload { asked, attributes, files: Vec::new() };
    match form::Parser::of_type(kind) {
        Some(Ok(parser)) => upload.receive_form(Form { parser, body }).await?,
        Some(Err(malformed)) => return Err((StatusCode::BAD_REQUEST, malformed.to_string())),
        None if kind.starts_with("application/octet-stream") => upload.receive_body(body).await?,
        None => return Err(unsupported("send multipart/form-data or application/octet-stream")),
    }
    upload.store().await
}

/// Files on their way. Dropped with their hidden names unless they are stored.
struct Upload {
    asked: Asked,
    attributes: Attributes,
    files: Vec<(PathBuf, Target)>,
}

impl Upload {
    async fn receive_body(&mut self, body: impl Body) -> Result<(), Refused> {
        if self.asked.path.is_empty() {
            return Err((StatusCode::BAD_REQUEST, "path is missing".to_owned()));
        }
        let path = self.asked.path.clone();
        self.receive_file(&path, body.map(|piece| piece.map_err(|e| broken(&e)))).await
    }

    async fn receive_form<B: Body>(&mut self, mut form: Form<B>) -> Result<(), Refused> {
        while let Some(event) = form.next().await? {
            let Event::Part(part) = event else { continue };
            if part.name != "file" {
                continue;
            }
            let named = part.file_name.unwrap_or_default();
            let path = if self.asked.path.is_empty() { named } else { self.asked.path.clone() };
            if path.is_empty() || path.contains('\0') {
                return Err((StatusCode::BAD_REQUEST, "a file has no name, and no path was given".to_owned()));
            }
            let content = stream::try_unfold(&mut form, |form| async move {
                Ok(match form.next().await? {
                    Some(Event::Content(piece)) => Some((piece, form)),
                    _ => None,
                })
            });
            self.receive_file(&path, std::pin::pin!(content)).await?;
        }
        if self.files.is_empty() {
            return Err((StatusCode::BAD_REQUEST, "the form has no part named 'file'".to_owned()));
        }
        Ok(())
    }

    async fn receive_file(
        &mut self,
        path: &str,
        mut body: impl Stream<Item = Result<Bytes, Refused>> + Unpin,
    ) -> Result<(), Refused> {
        let names_directory = path.ends_with('/');
        let path = self.asked.resolved(path);
        if self.files.iter().any(|(other, _)| *other == path) {
            return Err((StatusCode::BAD_REQUEST, format!("the form has two files for '{}'", path.display())));
        }
        let failed = |e: io::Error| refusal(&e, &path);
        if names_directory {
            return Err(failed(io::Error::from_raw_os_error(libc::EISDIR)));
        }
        let (account, attributes, place) = (self.asked.account.clone(), self.attributes.clone(), path.clone());
        let opened = users::acting_as(&self.asked.account, move || Target::open(&account, &place, &attributes)).await;
        let target = opened.map_err(failed)?;
        let mut file = tokio::fs::File::from_std(target.writer().map_err(failed)?);
        while let Some(piece) = body.next().await {
            file.write_all(&piece?).await.map_err(failed)?;
        }
        // The write-back of the last piece is still under way until this returns; ENOSPC may come only here.
        file.flush().await.map_err(failed)?;
        self.files.push((path, target));
        Ok(())
    }

    /// All of them by one thread, which goes on when the client has left.
    async fn store(self) -> Result<Vec<WrittenFile>, Refused> {
        let Self { asked: Asked { account, durably, .. }, attributes, files } = self;
        let stored = users::acting_as(&account, move || {
            let store = |(path, target): (PathBuf, Target)| match target.commit(durably) {
                Ok(()) => Ok(written(&path, &attributes)),
                Err(e) => Err(refusal(&e, &path)),
            };
            Ok(files.into_iter().map(store).collect::<Result<Vec<_>, _>>())
        });
        stored.await.map_err(|e| (status_of(&e), e.to_string()))?
    }
}

/// A body of pieces, unpacked already.
trait Body: Stream<Item = io::Result<Bytes>> + Unpin {}

impl<S: Stream<Item = io::Result<Bytes>> + Unpin> Body for S {}

struct Form<B> {
    parser: form::Parser,
    body: B,
}

impl<B: Body> Form<B> {
    /// `None` at the end of a whole form.
    async fn next(&mut self) -> Result<Option<Event>, Refused> {
        let malformed = |fault: form::Malformed| (StatusCode::BAD_REQUEST, format!("malformed form: {fault}"));
        loop {
            if let Some(event) = self.parser.next().map_err(malformed)? {
                return Ok(Some(event));
            }
            match self.body.next().await {
                Some(piece) => self.parser.push(piece.map_err(|e| broken(&e))?),
                None => return self.parser.finish().map(|()| None).map_err(malformed),
            }
        }
    }
}

/// Fails when the next piece does not come in time.
fn without_silence<E: std::error::Error + Send + Sync + 'static>(
    body: impl Stream<Item = Result<Bytes, E>> + Send + Unpin + 'static,
    patience: Duration,
) -> impl Stream<Item = Result<Bytes, io::Error>> + Send + Unpin + 'static {
    let pieces = stream::try_unfold(body, move |mut body| async move {
        match timeout(patience, body.next()).await {
            Ok(piece) => Ok(piece.transpose().map_err(io::Error::other)?.map(|piece| (piece, body))),
            Err(_) => Err(io::ErrorKind::TimedOut.into()),
        }
    });
    pieces.boxed()
}

/// The body, not the disk.
fn broken(error: &io::Error) -> Refused {
    let silent = error.get_ref().and_then(|inner| inner.downcast_ref::<io::Error>()).unwrap_or(error);
    if silent.kind() == io::ErrorKind::TimedOut {
        return (StatusCode::REQUEST_TIMEOUT, "the upload stopped".to_owned());
    }
    (StatusCode::BAD_REQUEST, "the upload was cut off".to_owned())
}

fn refusal(error: &io::Error, path: &Path) -> Refused {
    let shown = path.display();
    let message = match error.raw_os_error() {
        Some(libc::ENOSPC | libc::EDQUOT) => "not enough disk space".to_owned(),
        Some(libc::EISDIR) => format!("path '{shown}' is a directory"),
        Some(libc::EOPNOTSUPP) => format!("the file system of '{shown}' keeps no metadata"),
        _ => format!("{error}: {shown}"),
    };
    (status_of(error), message)
}

fn written(path: &Path, attributes: &Attributes) -> WrittenFile {
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    WrittenFile {
        path: path.to_string_lossy().into_owned(),
        name,
        kind: "file".to_owned(),
        metadata: attributes.0.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_silent_client_is_given_up() {
        let patience = Duration::from_millis(20);
        let piece = || Ok::<_, io::Error>(Bytes::from_static(b"x"));
        for body_of in [gzip::Upload::Plain, gzip::Upload::Gzip] {
            let silent = stream::iter([piece()]).chain(stream::pending());
            let mut pieces = body_of.pieces(without_silence(silent, patience));
            let mut last = pieces.next().await.unwrap();
            while last.is_ok() {
                last = pieces.next().await.unwrap();
            }
            assert_eq!(broken(&last.unwrap_err()).0, StatusCode::REQUEST_TIMEOUT, "{body_of:?}");
        }
        let cut: Vec<_> =
            without_silence(stream::iter([piece(), Err(io::Error::other("cut"))]), patience).collect().await;
        assert_eq!((cut.len(), broken(cut[1].as_ref().unwrap_err()).0), (2, StatusCode::BAD_REQUEST));
    }
}
