//! Servers on loopback are reachable at the guest's own address, and everybody who listens is listed.

mod guest;

use std::net::{Ipv4Addr, SocketAddr};

use guest::{Envd, SOON, until};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

const CONTROL: (&str, &str) = ("x-control-token", "host");

/// An address that no other test forwards at.
fn own() -> Ipv4Addr {
    let [.., high, low] = std::process::id().to_be_bytes();
    Ipv4Addr::new(127, 77, high, low)
}

async fn echo(listener: TcpListener) {
    while let Ok((mut stream, _)) = listener.accept().await {
        tokio::spawn(async move {
            let (mut reader, mut writer) = stream.split();
            let _ = tokio::io::copy(&mut reader, &mut writer).await;
        });
    }
}

#[tokio::test]
async fn a_server_on_loopback_is_reachable_until_it_ends() {
    let envd = Envd::start_with(&["--forward-at", &own().to_string()]);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let server = tokio::spawn(echo(listener));
    let at = SocketAddr::from((own(), port));
    until("it is reachable", async || TcpStream::connect(at).await.is_ok()).await;

    let (_, _, body) = envd.exchange("GET", "/ports", &[], "").await;
    let ports: Vec<Value> = serde_json::from_slice(&body).unwrap();
    let listed: Vec<_> = ports.iter().filter(|it| it["port"] == port).collect();
    let own_pid = std::process::id();
    let name = std::fs::read_to_string("/proc/self/comm").unwrap();
    let expected =
        json!({"port": port, "address": "127.0.0.1", "pid": own_pid, "process": name.trim(), "isForwarded": true});
    assert_eq!(listed, [&expected]);
    assert!(ports.iter().all(|it| it["port"] != envd.port), "envd's own is none of the guest's");

    // Both ways, more than any buffer holds, and the end of each.
    let sent: Vec<u8> = (0..3_000_000u32).map(|n| (n % 251) as u8).collect();
    let (mut reader, mut writer) = TcpStream::connect(at).await.unwrap().into_split();
    let writing = async {
        writer.write_all(&sent).await.unwrap();
        writer.shutdown().await.unwrap();
    };
    let mut received = Vec::new();
    let ((), read) = tokio::join!(writing, timeout(SOON, reader.read_to_end(&mut received)));
    read.unwrap().unwrap();
    assert!(received == sent);

    // Prepare leaves what is under way alone; a restore ends it, and whoever came meanwhile.
    let mut carried = TcpStream::connect(at).await.unwrap();
    carried.write_all(b"x").await.unwrap();
    assert_eq!(carried.read_u8().await.unwrap(), b'x');
    assert_eq!(envd.exchange("POST", "/snapshot/prepare", &[CONTROL], "").await.0, 204);
    carried.write_all(b"y").await.unwrap();
    assert_eq!(carried.read_u8().await.unwrap(), b'y');
    let mut waiting = TcpStream::connect(at).await.unwrap();
    let init = json!({"incarnation": "two", "controlToken": "host"}).to_string();
    assert_eq!(envd.exchange("POST", "/init", &[CONTROL], init).await.0, 204);
    assert!(timeout(SOON, carried.read_u8()).await.unwrap().is_err());
    assert!(timeout(SOON, waiting.read_u8()).await.unwrap().is_err());
    let mut fresh = TcpStream::connect(at).await.unwrap();
    fresh.write_all(b"z").await.unwrap();
    assert_eq!(timeout(SOON, fresh.read_u8()).await.unwrap().unwrap(), b'z');

    server.abort();
    until("nobody stands in for nobody", async || TcpStream::connect(at).await.is_err()).await;
}

#[tokio::test]
async fn activity_only_grows() {
    let envd = Envd::start();
    let activity = async || {
        let (_, _, body) = envd.exchange("GET", "/activity", &[], "").await;
        serde_json::from_slice::<Value>(&body).unwrap()
    };
    let before = activity().await;
    let mut stream = envd.stream(guest::START, &[], json!({"process": {"cmd": "cat"}, "stdin": true})).await;
    let pid = stream.pid().await;
    let input = json!({"process": {"pid": pid}, "input": {"stdin": "eHl6"}});
    envd.call("/process.Process/SendInput", input).await.unwrap();
    let after = activity().await;
    assert_eq!((before["inputBytes"].as_u64(), after["inputBytes"].as_u64()), (Some(0), Some(3)));
    assert_eq!((before["processes"].as_u64(), after["processes"].as_u64()), (Some(0), Some(1)));
    for sum in ["cpuMs", "networkBytes", "diskBytes"] {
        assert!(after[sum].as_u64() >= before[sum].as_u64() && before[sum].is_u64(), "{sum}");
    }
    envd.call("/process.Process/CloseStdin", json!({"process": {"pid": pid}})).await.unwrap();
    assert_eq!(stream.outcome().await.text(), "xyz");
}
