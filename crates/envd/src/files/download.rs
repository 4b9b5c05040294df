//! `GET /files`: one regular file, whole or a range of it, with its length told before the first byte.
//!
//! The kernel's own files (procfs, sysfs) say a length that is not theirs: they are read first, up to a bound, and have no ranges.

use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use bytes::Bytes;
use futures::StreamExt as _;
use futures::stream::BoxStream;
use http::header::{
    ACCEPT_RANGES, CONTENT_DISPOSITION, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, RANGE, VARY,
    X_CONTENT_TYPE_OPTIONS,
};
use http::{HeaderValue, Method, Request, Response, StatusCode};
use http_body::Frame;
use http_body_util::StreamBody;
use http_body_util::combinators::UnsyncBoxBody;
use rustix::fs::OFlags;
use tokio::task::JoinHandle;

use super::conditions::{Validators, Verdict};
use super::{asked, gzip, status_of};
use crate::filesystem::open;
use crate::server::Guest;
use crate::server::routes::{Answer, AnswerBody, empty, fault, whole};
use crate::users;

const PIECE: usize = 256 * 1024;
/// The most of a kernel's file that is read: all that tell something are far shorter, and some never end.
const KERNEL_FILE_BYTES_MAX: u64 = 1024 * 1024;

/// `f_type` of file systems whose files the kernel writes as they are read (statfs(2)).
const OF_KERNEL: [u32; 6] = [
    0x9FA0,      // proc
    0x6265_6572, // sysfs
    0x6367_7270, // cgroup2
    0x0027_E0EB, // cgroup
    0x6462_6720, // debugfs
    0x7472_6163, // tracefs
];

/// What is to be sent.
struct Opened {
    file: File,
    metadata: std::fs::Metadata,
    /// Of a file of the kernel.
    content: Option<Vec<u8>>,
}

impl Opened {
    /// Looked at only after it is open: what was checked is what is read.
    fn open(path: &Path) -> io::Result<Self> {
        let file = open::open_file(path, OFlags::RDONLY)?;
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(io::Error::from_raw_os_error(libc::EISDIR));
        }
        let file_system = rustix::fs::fstatfs(&file)?.f_type;
        if !OF_KERNEL.iter().any(|kind| i64::from(*kind) == file_system) {
            return Ok(Self { file, metadata, content: None });
        }
        let mut content = Vec::new();
        (&file).take(KERNEL_FILE_BYTES_MAX + 1).read_to_end(&mut content)?;
        if content.len() as u64 > KERNEL_FILE_BYTES_MAX {
            return Err(io::Error::from_raw_os_error(libc::EFBIG));
        }
        Ok(Self { file, metadata, content: Some(content) })
    }
}

pub async fn answer<B>(guest: &Arc<Guest>, request: Request<B>) -> Answer {
    let asked = match asked(guest, &request, "read") {
        Ok(asked) => asked,
        Err((status, message)) => return fault(status, &message),
    };
    if asked.path.is_empty() {
        return fault(StatusCode::BAD_REQUEST, "path is missing");
    }
    let path = asked.resolved(&asked.path);
    let at = path.clone();
    let opened = users::acting_as(&asked.account, move || Opened::open(&at)).await;
    let Opened { mut file, metadata, content } = match opened {
        Ok(opened) => opened,
        Err(e) => {
            let message = match e.raw_os_error() {
                Some(libc::EISDIR) => format!("path '{}' is a directory or no regular file", path.display()),
                Some(libc::ENOENT) => format!("path '{}' does not exist", path.display()),
                Some(libc::EFBIG) => format!("path '{}' is an endless file of the kernel", path.display()),
                _ => format!("{e}: {}", path.display()),
            };
            return fault(status_of(&e), &message);
        }
    };
    let size = content.as_ref().map_or(metadata.len(), |content| content.len() as u64);
    let encoding = gzip::of_download(request.headers());
    // An empty file stays empty: clients take the length for that.
    let packs = encoding == gzip::Download::Gzip && size > 0;
    let validators = content.is_none().then(|| {
        let plain = Validators::of(&metadata, "", SystemTime::now());
        let packed = packs && wanted_range(&request, &plain).is_none();
        if packed { Validators::of(&metadata, "-gzip", SystemTime::now()) } else { plain }
    });
    match validators.as_ref().map_or(Verdict::Send, |validators| validators.judge(request.headers())) {
        Verdict::Send => {}
        Verdict::Failed => return fault(StatusCode::PRECONDITION_FAILED, "the file is another one by now"),
        Verdict::Unmodified => {
            let mut answer = empty(StatusCode::NOT_MODIFIED);
            if let Some(validators) = &validators {
                validators.add_to(answer.headers_mut());
            }
            answer.headers_mut().insert(VARY, HeaderValue::from_static("Accept-Encoding"));
            return answer;
        }
    }
    let wanted = validators.as_ref().and_then(|validators| wanted_range(&request, validators));
    let range = match wanted.map(|wanted| byte_range(wanted, size)) {
        None | Some(Range::Whole) => None,
        Some(Range::Part(from, to)) => Some((from, to)),
        Some(Range::Outside) => {
            let mut answer = fault(StatusCode::RANGE_NOT_SATISFIABLE, "the range lies outside the file");
            answer.headers_mut().insert(CONTENT_RANGE, text(&format!("bytes */{size}")));
            return answer;
        }
    };
    if range.is_none() && encoding == gzip::Download::Neither {
        return fault(StatusCode::NOT_ACCEPTABLE, "a file can be had as identity or gzip");
    }
    let (from, length) = range.map_or((0, size), |(from, to)| (from, to - from + 1));
    if content.is_none()
        && let Err(e) = file.seek(SeekFrom::Start(from))
    {
        return fault(StatusCode::INTERNAL_SERVER_ERROR, &e.to_string());
    }
    let packed = packs && range.is_none();
    let is_head = *request.method() == Method::HEAD;
    let pieces = match content {
        Some(content) => futures::stream::iter([Ok(Bytes::from(content))]).boxed(),
        None => pieces(file, length),
    };
    let mut answer = Response::new(match (is_head, packed) {
        (true, _) => whole(Bytes::new()),
        (false, true) => body(gzip::pack(pieces)),
        (false, false) => body(pieces),
    });
    let headers = answer.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    headers.insert(VARY, HeaderValue::from_static("Accept-Encoding"));
    if packed {
        headers.insert(CONTENT_ENCODING, HeaderValue::from_static("gzip"));
    } else {
        headers.insert(CONTENT_LENGTH, length.into());
    }
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(CONTENT_DISPOSITION, disposition(&path));
    if let Some(validators) = &validators {
        validators.add_to(headers);
        headers.insert(ACCEPT_RANGES, HeaderValue::from_static("bytes"));
    }
    if let Some((from, to)) = range {
        headers.insert(CONTENT_RANGE, text(&format!("bytes {from}-{to}/{size}")));
        *answer.status_mut() = StatusCode::PARTIAL_CONTENT;
    }
    answer
}

/// A range that may be taken from the file; only GET has any (RFC 9110, 14.2).
fn wanted_range<'a, B>(request: &'a Request<B>, validators: &Validators) -> Option<&'a str> {
    let range = request.headers().get(RANGE).filter(|_| *request.method() == Method::GET)?;
    range.to_str().ok().filter(|_| validators.are_of_range(request.headers()))
}

/// The name as ASCII for those who know no better, and as it is (RFC 6266, RFC 8187).
fn disposition(path: &Path) -> HeaderValue {
    let name = path.file_name().map(|name| name.to_string_lossy()).unwrap_or_default();
    let is_plain = |char: char| matches!(char, ' '..='~') && !matches!(char, '"' | '\\' | '%');
    let ascii: String = name.chars().map(|char| if is_plain(char) { char } else { '_' }).collect();
    if ascii == name {
        return text(&format!("inline; filename=\"{ascii}\""));
    }
    let is_attr = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$&+-.^_`|~".contains(&byte);
    let escape = |byte: u8| if is_attr(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") };
    let escaped: String = name.bytes().map(escape).collect();
    text(&format!("inline; filename=\"{ascii}\"; filename*=UTF-8''{escaped}"))
}

fn text(value: &str) -> HeaderValue {
    HeaderValue::from_str(value).unwrap_or_else(|_| HeaderValue::from_static("inline"))
}

/// Exactly `length` bytes; a file that shrinks meanwhile cuts the connection, so that nobody takes a part for the whole. One piece is read
/// while the one before it is sent.
fn pieces(file: File, length: u64) -> BoxStream<'static, Piece> {
    let first = (length > 0).then(|| next_piece(file, length));
    futures::stream::try_unfold((first, length), |(next, left)| async move {
        let Some(next) = next else { return Ok(None) };
        let (file, piece) = next.await??;
        if piece.is_empty() {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the file became shorter").into());
        }
        let left = left - piece.len() as u64;
        Ok(Some((Bytes::from(piece), ((left > 0).then(|| next_piece(file, left)), left))))
    })
    .boxed()
}

fn next_piece(mut file: File, left: u64) -> JoinHandle<io::Result<(File, Vec<u8>)>> {
    tokio::task::spawn_blocking(move || {
        let size = PIECE.min(usize::try_from(left).unwrap_or(PIECE));
        let mut piece = Vec::with_capacity(size);
        file.by_ref().take(size as u64).read_to_end(&mut piece)?;
        Ok((file, piece))
    })
}

type Piece = Result<Bytes, Box<dyn std::error::Error + Send + Sync>>;

fn body(pieces: BoxStream<'static, Piece>) -> AnswerBody {
    UnsyncBoxBody::new(StreamBody::new(pieces.map(|piece| piece.map(Frame::data))))
}

#[derive(Debug, PartialEq)]
pub(crate) enum Range {
    /// None that we understand: the whole file is a right answer to every range (RFC 9110, 14.2).
    Whole,
    /// First and last byte.
    Part(u64, u64),
    Outside,
}

pub(crate) fn byte_range(header: &str, size: u64) -> Range {
    let Some((unit, range)) = header.split_once('=') else { return Range::Whole };
    let Some((from, to)) = range.split_once('-').filter(|_| unit.trim().eq_ignore_ascii_case("bytes")) else {
        return Range::Whole;
    };
    match (position(from), position(to)) {
        (Some(Some(from)), Some(Some(to))) if to < from => Range::Whole,
        (Some(Some(from)), Some(_)) if from >= size => Range::Outside,
        (Some(Some(from)), Some(to)) => Range::Part(from, to.unwrap_or(u64::MAX).min(size - 1)),
        (Some(None), Some(Some(0))) => Range::Outside,
        // The last bytes of an empty file are the whole file.
        (Some(None), Some(Some(_))) if size == 0 => Range::Whole,
        (Some(None), Some(Some(last))) => Range::Part(size.saturating_sub(last), size - 1),
        _ => Range::Whole,
    }
}

/// `None` is no number, `Some(None)` none at all. One that does not fit lies behind the end of every file.
fn position(text: &str) -> Option<Option<u64>> {
    let text = text.trim();
    if text.is_empty() {
        return Some(None);
    }
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| Some(text.parse().unwrap_or(u64::MAX)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges() {
        for (header, expected) in [
            ("bytes=0-9", Range::Part(0, 9)),
            ("bytes=5-", Range::Part(5, 99)),
            ("bytes=-10", Range::Part(90, 99)),
            ("bytes=-1000", Range::Part(0, 99)),
            ("bytes=90-1000", Range::Part(90, 99)),
            ("bytes=100-", Range::Outside),
            ("bytes=9-3", Range::Whole),
            ("bytes=0-1,5-6", Range::Whole),
            ("lines=1-2", Range::Whole),
            ("bytes=x-y", Range::Whole),
            ("Bytes=0-0", Range::Part(0, 0)),
            ("bytes=-", Range::Whole),
            ("bytes=-0", Range::Outside),
            ("bytes=+1-2", Range::Whole),
            ("bytes=1-99999999999999999999", Range::Part(1, 99)),
            ("bytes=99999999999999999999-", Range::Outside),
            ("bytes", Range::Whole),
        ] {
            assert_eq!(byte_range(header, 100), expected, "{header}");
        }
        assert_eq!(byte_range("bytes=-5", 0), Range::Whole);
        assert_eq!(byte_range("bytes=0-", 0), Range::Outside);
    }

    #[test]
    fn names_cannot_break_out_of_their_header() {
        for (name, expected) in [
            ("plain.txt", "inline; filename=\"plain.txt\""),
            ("a \"b\".txt", "inline; filename=\"a _b_.txt\"; filename*=UTF-8''a%20%22b%22.txt"),
            ("x\r\nset-cookie: y", "inline; filename=\"x__set-cookie: y\"; filename*=UTF-8''x%0D%0Aset-cookie%3A%20y"),
            ("näme", "inline; filename=\"n_me\"; filename*=UTF-8''n%C3%A4me"),
            ("50%", "inline; filename=\"50_\"; filename*=UTF-8''50%25"),
        ] {
            assert_eq!(disposition(&Path::new("/dir").join(name)), expected, "{name}");
        }
    }
}
