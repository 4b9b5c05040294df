//! What becomes of the host's connections to a guest: long transfers live, silence ends, and what is idle is let go before a guest is saved.
//! The guest's half, which ends connections whose other end was lost with a snapshot, is tested with envd.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use host_agent::guest::{Dial, FileWanted, Guest};
use model::ids::Incarnation;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, sleep, timeout};

struct To(SocketAddr);

impl Dial for To {
    fn dial(&self) -> BoxFuture<'static, io::Result<TcpStream>> {
        let address = self.0;
        Box::pin(async move { TcpStream::connect(address).await })
    }
}

/// A guest on this machine, and where its connections come in.
async fn guest() -> (Arc<Guest>, TcpListener) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let dial = Arc::new(To(listener.local_addr().unwrap()));
    (Arc::new(Guest::new(dial, Incarnation::from_random(1), "aa")), listener)
}

/// To the end of its head.
async fn request(stream: &mut TcpStream) -> String {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.unwrap());
    }
    String::from_utf8(head).unwrap()
}

#[tokio::test(start_paused = true)]
async fn a_transfer_of_150_seconds_is_not_cut() {
    const PIECES: u32 = 15;
    let (guest, listener) = guest().await;
    let serving = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        request(&mut stream).await;
        let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {PIECES}\r\n\r\n");
        stream.write_all(head.as_bytes()).await.unwrap();
        for _ in 0..PIECES {
            sleep(Duration::from_secs(10)).await;
            stream.write_all(b"x").await.unwrap();
        }
    });
    let began = Instant::now();
    let mut file = guest.read_file("/x", "", &FileWanted::default()).await.unwrap();
    let mut size = 0;
    while let Some(piece) = file.next().await.unwrap() {
        size += piece.len();
    }
    assert!(size == PIECES as usize && began.elapsed() >= Duration::from_secs(150), "{size} in {:?}", began.elapsed());
    serving.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_silent_unary_call_is_cut_after_120_seconds() {
    let (guest, listener) = guest().await;
    let silent = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        request(&mut stream).await;
        // Kept open, and nothing is said.
        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest).await;
    });
    let began = Instant::now();
    assert!(guest.processes().await.is_err());
    let took = began.elapsed().as_secs();
    assert!((119..=121).contains(&took), "{took} s");
    // The guest is not left with it.
    timeout(Duration::from_secs(10), silent).await.expect("the connection ends").unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn idle_connections_have_ended_in_the_guest_before_it_is_asked_to_get_ready() {
    let (guest, listener) = guest().await;
    let call = tokio::spawn({
        let guest = guest.clone();
        async move { guest.processes().await.map(|processes| processes.len()) }
    });
    let (mut kept, _) = listener.accept().await.unwrap();
    request(&mut kept).await;
    kept.write_all(b"HTTP/1.1 200 OK\r\ncontent-type: application/proto\r\ncontent-length: 0\r\n\r\n").await.unwrap();
    assert_eq!(call.await.unwrap().unwrap(), 0);
    // Idle, and kept for the next call.
    assert!(timeout(Duration::from_millis(200), kept.read_u8()).await.is_err(), "it is not kept");

    guest.close_idle();
    let preparing = tokio::spawn(async move { guest.prepare("control").await });
    let (mut asks, _) = listener.accept().await.unwrap();
    let end = timeout(Duration::from_secs(5), kept.read(&mut [0])).await;
    assert_eq!(end.expect("its end comes before the guest stands still").unwrap(), 0);
    assert!(request(&mut asks).await.starts_with("POST /snapshot/prepare "));
    asks.write_all(b"HTTP/1.1 204 No Content\r\nx-disk-flushed: yes\r\n\r\n").await.unwrap();
    assert!(preparing.await.unwrap().unwrap());
}
