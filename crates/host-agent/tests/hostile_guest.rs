//! A guest that says whatever it likes. It fails its own request, in bounded time and memory, and nothing else.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use api::guest::Init;
use connectrpc::ErrorCode;
use futures::future::BoxFuture;
use host_agent::guest::{Command, Dial, FileWanted, Guest, GuestError, Kill, Select};
use model::ids::Incarnation;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

struct To(SocketAddr);

impl Dial for To {
    fn dial(&self) -> BoxFuture<'static, io::Result<TcpStream>> {
        let address = self.0;
        Box::pin(async move { TcpStream::connect(address).await })
    }
}

/// A guest that answers each request with these bytes, then `after`.
async fn guest(answer: Vec<u8>, after: After) -> Arc<Guest> {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let answer = answer.clone();
            tokio::spawn(async move {
                let mut request = [0; 4096];
                let _ = stream.read(&mut request).await;
                let _ = stream.write_all(&answer).await;
                match after {
                    After::Close => {}
                    After::Stay => std::future::pending().await,
                    After::Repeat(piece) => while stream.write_all(piece).await.is_ok() {},
                }
            });
        }
    });
    Arc::new(Guest::new(Arc::new(To(address)), Incarnation::from_random(1), "aa"))
}

#[derive(Clone, Copy)]
enum After {
    Close,
    Stay,
    Repeat(&'static [u8]),
}

fn http(head: &str, body: &[u8]) -> Vec<u8> {
    [format!("HTTP/1.1 {head}\r\n\r\n").as_bytes(), body].concat()
}

/// Connect's frame: flags, length, message.
fn frame(flags: u8, length: u32, message: &[u8]) -> Vec<u8> {
    [&[flags][..], &length.to_be_bytes(), message].concat()
}

fn is_fault<T>(result: Result<T, GuestError>) -> Result<(), String> {
    match result {
        Err(GuestError::Fault(text)) if text.len() < 2000 && !text.contains('\u{1b}') => Ok(()),
        Err(other) => Err(format!("{other:?}")),
        Ok(_) => Err("it was believed".to_owned()),
    }
}

/// Reads a command's output to its end.
async fn exec(guest: &Arc<Guest>) -> Result<(), GuestError> {
    let mut stream = guest.start(Command { cmd: "true".to_owned(), ..Command::default() }).await?;
    while stream.next().await?.is_some() {}
    Ok(())
}

async fn read(guest: &Arc<Guest>) -> Result<usize, GuestError> {
    let mut stream = guest.read_file("/x", "", &FileWanted::default()).await?;
    let mut size = 0;
    while let Some(piece) = stream.next().await? {
        size += piece.len();
    }
    Ok(size)
}

#[tokio::test(flavor = "multi_thread")]
async fn nonsense_is_a_fault_of_the_guest() {
    let streaming = "200 OK\r\ncontent-type: application/connect+proto\r\nconnection: close";
    let unary = "200 OK\r\ncontent-type: application/proto\r\nconnection: close";
    let header_storm = format!("200 OK\r\n{}", "x: y\r\n".repeat(100_000));
    let long_header = format!("200 OK\r\nx: {}", "y".repeat(1_000_000));
    for (name, answer, after) in [
        ("nothing", Vec::new(), After::Close),
        ("noise", b"\0\xff\x16\x03\x01 what".to_vec(), After::Close),
        ("html", http("200 OK\r\ncontent-type: text/html", b"<html>"), After::Close),
        ("a redirect", http("302 Found\r\nlocation: http://169.254.169.254/", b""), After::Close),
        (
            "500 with escapes",
            http("500 No\r\ncontent-type: application/json", b"{\"code\":\"internal\",\"message\":\"\x1b[31m\"}"),
            After::Close,
        ),
        ("a storm of headers", http(&header_storm, b""), After::Close),
        ("a long header", http(&long_header, b""), After::Close),
        ("headers without end", b"HTTP/1.1 200 OK\r\n".to_vec(), After::Repeat(b"x: y\r\n")),
        ("a frame of 4 GiB", http(streaming, &frame(0, u32::MAX, b"abc")), After::Close),
        ("a frame without end", http(streaming, &frame(0, u32::MAX, b"")), After::Repeat(&[0; 65536])),
        ("an unknown flag", http(streaming, &frame(0x44, 2, b"{}")), After::Close),
        ("a compressed frame", http(streaming, &frame(1, 2, b"{}")), After::Close),
        ("half a frame", http(streaming, &frame(0, 100, b"abc")), After::Close),
        ("no protobuf", http(streaming, &frame(0, 5, b"\xff\xff\xff\xff\xff")), After::Close),
        ("no end event", http(streaming, &frame(2, 2, b"{}")), After::Close),
        ("a list without end", http(unary, b""), After::Repeat(&[0x0a; 65536])),
    ] {
        let guest = guest(answer, after).await;
        let begin = Instant::now();
        is_fault(exec(&guest).await).unwrap_or_else(|got| panic!("{name}: exec: {got}"));
        is_fault(guest.processes().await).unwrap_or_else(|got| panic!("{name}: list: {got}"));
        let signal = guest.signal(Select::Pid(1), Kill::Kill).await;
        is_fault(signal).unwrap_or_else(|got| panic!("{name}: signal: {got}"));
        assert!(begin.elapsed() < Duration::from_secs(20), "{name}: {:?}", begin.elapsed());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn files_that_lie_about_themselves() {
    let short = guest(http("200 OK\r\ncontent-length: 100", b"abc"), After::Close).await;
    is_fault(read(&short).await).unwrap();
    let refused =
        guest(http("404 Not Found\r\ncontent-length: 24", br#"{"message":"no such"}   "#), After::Close).await;
    assert!(
        matches!(read(&refused).await, Err(GuestError::Refused { code: ErrorCode::NotFound, message }) if message == "no such")
    );
    let endless_error = guest(http("500 No", b""), After::Repeat(&[b'x'; 65536])).await;
    is_fault(read(&endless_error).await).unwrap();
    let full = guest(http("507 Full\r\ncontent-length: 2", b"{}"), After::Close).await;
    let content = futures::stream::iter([Ok(bytes::Bytes::from_static(b"x"))]);
    let error = full.write_file("/x", "", content).await.unwrap_err();
    assert!(matches!(error, GuestError::Refused { code: ErrorCode::ResourceExhausted, .. }), "{error:?}");
}

/// What it says of its own work is read in bounded time and memory, or not at all.
#[tokio::test(flavor = "multi_thread")]
async fn activity_that_is_none() {
    let json = "200 OK\r\ncontent-type: application/json\r\nconnection: close";
    for (name, answer, after) in [
        ("nothing", Vec::new(), After::Close),
        ("noise", b"\0\xff".to_vec(), After::Close),
        ("an error", http("500 No", b"{}"), After::Close),
        ("a redirect", http("302 Found\r\nlocation: http://169.254.169.254/", b""), After::Close),
        ("no json", http(json, b"{\"cpuMs\":"), After::Close),
        ("another json", http(json, b"[]"), After::Close),
        (
            "negative sums",
            http(json, b"{\"cpuMs\":-1,\"networkBytes\":0,\"diskBytes\":0,\"inputBytes\":0,\"processes\":0}"),
            After::Close,
        ),
        ("a body without end", http(json, b""), After::Repeat(&[b' '; 65536])),
        ("headers without end", b"HTTP/1.1 200 OK\r\n".to_vec(), After::Repeat(b"x: y\r\n")),
    ] {
        let guest = guest(answer, after).await;
        let begin = Instant::now();
        is_fault(guest.activity().await).unwrap_or_else(|got| panic!("{name}: {got}"));
        assert!(begin.elapsed() < Duration::from_secs(6), "{name}: {:?}", begin.elapsed());
    }
    let most = b"{\"cpuMs\":18446744073709551615,\"networkBytes\":0,\"diskBytes\":0,\"inputBytes\":0,\"processes\":0}";
    let busy = guest(http(json, most), After::Close).await;
    assert_eq!(busy.activity().await.unwrap().cpu_ms, u64::MAX);
}

#[tokio::test(start_paused = true)]
async fn silence_has_an_end() {
    let quiet = guest(Vec::new(), After::Stay).await;
    is_fault(exec(&quiet).await).unwrap();
    is_fault(read(&quiet).await).unwrap();
    is_fault(quiet.health(Duration::from_secs(1)).await).unwrap();
    is_fault(quiet.init(&Init::default(), "").await).unwrap();
    is_fault(quiet.activity().await).unwrap();
    assert!(quiet.processes().await.is_err());
    // In the middle of an output, too.
    let start = http("200 OK\r\ncontent-type: application/connect+proto", &frame(0, 6, b"\x0a\x04\x0a\x02\x08\x07"));
    let stalls = guest(start, After::Stay).await;
    is_fault(exec(&stalls).await).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_under_way_ends_with_the_incarnation() {
    let quiet = guest(Vec::new(), After::Stay).await;
    let call = tokio::spawn({
        let quiet = quiet.clone();
        async move { exec(&quiet).await }
    });
    tokio::task::yield_now().await;
    quiet.close();
    let end = tokio::time::timeout(Duration::from_secs(5), call).await.expect("the call goes on").unwrap();
    assert!(matches!(end, Err(GuestError::Gone)), "{end:?}");
    assert!(matches!(quiet.processes().await, Err(GuestError::Gone)));
}
