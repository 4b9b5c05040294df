//! The proxy breaks what it is told to break, and nothing else.

use std::time::Duration;

use testkit::cut_proxy::{CutProxy, FAIR, REFUSED, SILENT, Target, Way, Weather};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

/// What says each byte again.
async fn echo() -> Target {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut from, mut to) = stream.split();
                let _ = tokio::io::copy(&mut from, &mut to).await;
            });
        }
    });
    Target::Tcp(address)
}

async fn say(stream: &mut TcpStream, text: &str) -> std::io::Result<String> {
    stream.write_all(text.as_bytes()).await?;
    let mut heard = vec![0; text.len()];
    let heard_all = tokio::time::timeout(Duration::from_millis(300), stream.read_exact(&mut heard));
    heard_all.await.map_err(|_| std::io::ErrorKind::TimedOut)??;
    Ok(String::from_utf8(heard).unwrap())
}

#[tokio::test]
async fn weather_holds_cuts_and_refuses() {
    let proxy = CutProxy::start(&[echo().await]).await.unwrap();
    let connect = || async { TcpStream::connect(proxy.address()).await.unwrap() };
    let mut open = connect().await;
    assert_eq!(say(&mut open, "one").await.unwrap(), "one");
    proxy.set(SILENT);
    assert_eq!(say(&mut open, "two").await.unwrap_err().kind(), std::io::ErrorKind::TimedOut);
    proxy.set(FAIR);
    let mut late = [0; 3];
    open.read_exact(&mut late).await.unwrap();
    assert_eq!(&late, b"two", "what was held comes when it may");
    proxy.set(Weather { back: Way::Delayed(Duration::from_millis(100)), ..FAIR });
    let began = tokio::time::Instant::now();
    assert_eq!(say(&mut open, "three").await.unwrap(), "three");
    assert!(began.elapsed() >= Duration::from_millis(100));
    proxy.set(FAIR);
    proxy.cut();
    assert!(say(&mut open, "four").await.is_err(), "it is cut");
    proxy.set(REFUSED);
    assert!(say(&mut connect().await, "five").await.is_err(), "none comes about");
    proxy.set(Weather { back: Way::CutAfter(3), ..FAIR });
    let mut short = connect().await;
    assert_eq!(say(&mut short, "six").await.unwrap(), "six");
    assert!(say(&mut short, "seven").await.is_err(), "its three bytes are over");
}

#[tokio::test]
async fn one_reply_is_lost_and_its_request_is_not() {
    let proxy = CutProxy::start(&[echo().await]).await.unwrap();
    proxy.lose_reply_to(b"commit", 1);
    let mut first = TcpStream::connect(proxy.address()).await.unwrap();
    assert_eq!(say(&mut first, "begin").await.unwrap(), "begin");
    assert_eq!(say(&mut first, "commit").await.unwrap(), "commit", "the first is spared");
    assert!(say(&mut first, "commit").await.is_err());
    assert_eq!((proxy.replies_lost(), proxy.spare_replies()), (1, false));
    let mut second = TcpStream::connect(proxy.address()).await.unwrap();
    assert_eq!(say(&mut second, "commit").await.unwrap(), "commit", "once");
}

#[tokio::test]
async fn it_spreads_over_targets_and_past_those_that_are_gone() {
    let gone = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let proxy = CutProxy::start(&[Target::Tcp(gone), echo().await]).await.unwrap();
    for _ in 0..4 {
        let mut stream = TcpStream::connect(proxy.address()).await.unwrap();
        assert_eq!(say(&mut stream, "there").await.unwrap(), "there");
    }
    proxy.lead_to(&[Target::Tcp(gone)]);
    let mut stream = TcpStream::connect(proxy.address()).await.unwrap();
    assert!(say(&mut stream, "there").await.is_err());
}
