//! What fuzzers call: each target reads bytes that an attacker chose the way envd reads them, and panics when a promise is broken.
//!
//! No I/O beyond reading the time of one file, no processes, no state that outlives a call. The targets of `fuzz/` and the replay of
//! their corpora (`tests/corpus.rs`) call the same functions, and nobody else does.

use std::path::{Component, Path};
use std::time::SystemTime;

use api::guest::{ACCESS_TOKEN_HEADER, filesystem, process};
use bytes::{Bytes, BytesMut};
use connectrpc::codec::{CodecFormat, decode_json, decode_proto};
use connectrpc::envelope::Envelope;
use futures::stream::{self, BoxStream};
use futures::{FutureExt as _, TryStreamExt as _};
use http::{HeaderMap, HeaderName, HeaderValue};

use crate::files::conditions::Validators;
use crate::files::download::{Range, byte_range};
use crate::files::form::{Event, Malformed, Parser, Part};
use crate::files::{self, Query, gzip};
use crate::filesystem::metadata::Attributes;
use crate::filesystem::path;
use crate::identity::{self, Hello};
use crate::ports::list;
use crate::server::routes::{MESSAGE_BYTES_MAX, check_protocol};
use crate::session::{Identity, Session};
use crate::users::{self, Account};

pub type Target = fn(&[u8]);

/// By the names of their folders in `fuzz/corpus`.
pub const TARGETS: [(&str, Target); 8] = [
    ("access", access),
    ("conditions", conditions),
    ("connect", connect),
    ("form", form),
    ("gzip", gzip),
    ("hello", hello),
    ("paths", paths),
    ("sockets", sockets),
];

/// The rest of a longer input is left: no bound that is looked for here lies higher.
const INPUT_BYTES_MAX: usize = 64 * 1024;
/// What the decoder gives at once is its buffer (32 KiB) and what it holds back, as the tests of `gzip` say.
const PIECE_BYTES_MAX: usize = 256 * 1024;
/// Nobody guesses it.
const TOKEN: &str = "b3f0c3a1f9d24e6f8a7b5c4d3e2f1a0b";
/// Inputs say when a signature ends; this is what the clock says then.
const NOW_UNIX: i64 = 1_800_000_000;

/// A query on the first line, then headers: who may call, and as whom.
pub fn access(input: &[u8]) {
    let (query, rest) = first_line(bounded(input));
    let (headers, _) = head(rest);
    let query = Query::of(&String::from_utf8_lossy(query));
    let session = Session::new(false);
    let identity = Identity { access_token: TOKEN.into(), control_token: TOKEN.into(), ..Identity::default() };
    session.assume(identity);
    for operation in ["read", "write"] {
        let rights = files::rights(&session, &query, &headers, operation, NOW_UNIX);
        let shows_token = headers.get(ACCESS_TOKEN_HEADER).is_some_and(|value| value == TOKEN);
        let is_signed = query.field("signature").is_some_and(|it| it.starts_with("v1_") && it.len() == 46);
        assert!(rights.is_err() || shows_token || is_signed, "somebody got in without a token");
    }
    if let Ok(Some(name)) = users::named(&headers) {
        assert!(!name.is_empty() && !name.contains(':'), "{name:?} names nobody");
    }
}

/// A size on the first line, then the headers of a download or an upload.
pub fn conditions(input: &[u8]) {
    let (size, rest) = first_line(bounded(input));
    let (headers, _) = head(rest);
    let size = std::str::from_utf8(size).ok().and_then(|size| size.trim().parse().ok()).unwrap_or(100);
    for value in headers.get_all(http::header::RANGE).iter().filter_map(|value| value.to_str().ok()) {
        if let Range::Part(from, to) = byte_range(value, size) {
            assert!(from <= to && to < size, "{value:?} of {size} bytes became {from} to {to}");
        }
    }
    // Any file does: only what is asked of it changes.
    if let Ok(metadata) = std::fs::metadata("/dev/null") {
        let validators = Validators::of(&metadata, "", SystemTime::UNIX_EPOCH);
        let _ = (validators.judge(&headers), validators.are_of_range(&headers));
    }
    let _ = (gzip::of_upload(&headers), gzip::of_download(&headers));
    if let Ok(attributes) = Attributes::of_upload(&headers) {
        assert!(attributes.0.iter().all(|(key, value)| !key.is_empty() && !value.contains('\0')));
    }
}

/// Headers, then a streaming body: what is checked before a call, and its messages in both codecs.
pub fn connect(input: &[u8]) {
    let (headers, body) = head(bounded(input));
    if check_protocol(&headers).is_ok() {
        let time = headers.get("connect-timeout-ms").and_then(|value| value.to_str().ok());
        assert!(time.is_none_or(|time| time.parse::<u64>().is_ok()), "{time:?} is no time");
    }
    let codec = headers.get(http::header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let _ = codec.map(CodecFormat::from_content_type);
    let mut left = BytesMut::from(body);
    while let Ok(Some(envelope)) = Envelope::decode_with_limit(&mut left, MESSAGE_BYTES_MAX) {
        message(&envelope.data);
    }
    // A call of one message has no envelope.
    message(body);
}

fn message(bytes: &[u8]) {
    macro_rules! read_as {
        ($($message:ty),+) => {$(
            let _ = decode_json::<$message>(bytes);
            let _ = decode_proto::<$message>(bytes);
        )+};
    }
    read_as!(
        process::StartRequest,
        process::ConnectRequest,
        process::UpdateRequest,
        process::SendInputRequest,
        process::StreamInputRequest,
        process::SendSignalRequest,
        filesystem::MoveRequest,
        filesystem::ListDirRequest,
        filesystem::WatchDirRequest
    );
}

/// A content type on the first line, then the body: however it is cut into pieces, it says the same.
pub fn form(input: &[u8]) {
    let (content_type, body) = first_line(bounded(input));
    let content_type = String::from_utf8_lossy(content_type);
    let body = Bytes::copy_from_slice(body);
    // The body's own bytes choose, so that an input always means the same.
    let length = 1 + body.iter().fold(0, |sum: usize, byte| sum.wrapping_mul(31).wrapping_add(usize::from(*byte))) % 97;
    let whole = spoken(&content_type, [body.clone()]);
    let cut = spoken(&content_type, body.chunks(length).map(Bytes::copy_from_slice));
    assert!(whole == cut, "in pieces of {length} bytes the form is another one");
}

/// The parts with their content, and how it ended.
type Spoken = (Vec<(Part, Vec<u8>)>, Result<(), Malformed>);

fn spoken(content_type: &str, pieces: impl IntoIterator<Item = Bytes>) -> Option<Spoken> {
    let mut parser = match Parser::of_type(content_type)? {
        Ok(parser) => parser,
        Err(malformed) => return Some((Vec::new(), Err(malformed))),
    };
    let mut parts: Vec<(Part, Vec<u8>)> = Vec::new();
    for piece in pieces {
        parser.push(piece);
        loop {
            match parser.next() {
                Ok(None) => break,
                Ok(Some(Event::Part(part))) => parts.push((part, Vec::new())),
                Ok(Some(Event::Content(bytes))) => {
                    assert!(!bytes.is_empty(), "content without bytes");
                    parts.last_mut().expect("content comes after its part").1.extend_from_slice(&bytes);
                }
                Ok(Some(Event::PartEnd)) => assert!(!parts.is_empty(), "an end without its part"),
                Err(malformed) => return Some((parts, Err(malformed))),
            }
        }
    }
    Some((parts, parser.finish()))
}

/// A compressed upload; and what is packed here unpacks to itself.
pub fn gzip(input: &[u8]) {
    let input = Bytes::copy_from_slice(bounded(input));
    let _ = unpacked([input.clone()]);
    let packed: BoxStream<'_, std::io::Result<Bytes>> = gzip::pack(stream::iter([Ok(input.clone())]));
    let packed: Vec<Bytes> = at_once(packed).expect("memory can be packed");
    assert!(unpacked(packed).is_ok_and(|same| same == input), "what was packed unpacks to something else");
}

fn unpacked(pieces: impl IntoIterator<Item = Bytes, IntoIter: Send>) -> std::io::Result<Vec<u8>> {
    let pieces = gzip::Upload::Gzip.pieces(stream::iter(pieces.into_iter().map(std::io::Result::Ok)));
    let mut whole = Vec::new();
    let told = pieces.try_for_each(|piece| {
        assert!((1..=PIECE_BYTES_MAX).contains(&piece.len()), "a piece of {} bytes", piece.len());
        whole.extend_from_slice(&piece);
        std::future::ready(Ok(()))
    });
    told.now_or_never().expect("it waits for nothing")?;
    Ok(whole)
}

fn at_once(stream: BoxStream<'_, std::io::Result<Bytes>>) -> std::io::Result<Vec<Bytes>> {
    stream.try_collect().now_or_never().expect("it waits for nothing")
}

/// The body of `/init`.
pub fn hello(input: &[u8]) {
    let Ok(hello) = Hello::parse(bounded(input)) else { return };
    let session = Session::new(true);
    assert!((1..=128).contains(&hello.incarnation().len()), "an incarnation without a name");
    assert!(identity::assume(&session, &hello), "a fresh guest takes any incarnation for a new one");
    assert!(!hello.is_outdated(&session, false), "the present incarnation is not over");
    for (name, value) in session.envs() {
        assert!(!name.is_empty() && !name.contains(['=', '\0']) && !value.contains('\0'), "{name:?} is no variable");
    }
}

/// A default directory on the first line, then a path.
pub fn paths(input: &[u8]) {
    let (workdir, asked) = first_line(bounded(input));
    let account = Account {
        name: "user".into(),
        uid: 1000,
        gid: 1000,
        groups: vec![1000],
        home: "/home/user".into(),
        shell: "/bin/sh".into(),
    };
    let resolved = path::resolve(&String::from_utf8_lossy(asked), &account, &String::from_utf8_lossy(workdir));
    let is_clean = |component| matches!(component, Component::RootDir | Component::Normal(_));
    assert!(resolved.is_absolute() && resolved.components().all(is_clean), "{} is not clean", resolved.display());
    let again = path::resolve(&resolved.to_string_lossy(), &account, "");
    assert!(again == resolved, "{} became {}", resolved.display(), again.display());
    assert!(Path::new("/").join(&resolved) == resolved);
}

/// One of the kernel's tables of sockets.
pub fn sockets(input: &[u8]) {
    let table = String::from_utf8_lossy(bounded(input));
    let listeners = list::parse(&table);
    assert!(listeners.len() <= table.lines().count(), "more listeners than lines");
}

fn bounded(input: &[u8]) -> &[u8] {
    &input[..input.len().min(INPUT_BYTES_MAX)]
}

fn first_line(input: &[u8]) -> (&[u8], &[u8]) {
    match input.iter().position(|byte| *byte == b'\n') {
        Some(end) => (&input[..end], &input[end + 1..]),
        None => (input, &[]),
    }
}

/// Headers up to an empty line, and the bytes after it. What HTTP lets nobody send is left out.
fn head(mut rest: &[u8]) -> (HeaderMap, &[u8]) {
    let mut headers = HeaderMap::new();
    while !rest.is_empty() {
        let (line, after) = first_line(rest);
        rest = after;
        if line.is_empty() {
            break;
        }
        let Some(colon) = line.iter().position(|byte| *byte == b':') else { continue };
        let (name, value) = (&line[..colon], line[colon + 1..].trim_ascii());
        // hyper takes no more of them either (`server::HEADERS_MAX`).
        if let (Ok(name), Ok(value), true) =
            (HeaderName::from_bytes(name), HeaderValue::from_bytes(value), headers.len() < 100)
        {
            headers.append(name, value);
        }
    }
    (headers, rest)
}
