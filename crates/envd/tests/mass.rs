//! Much of everything: thousands of commands over few connections, and more output than any buffer could hide a loss in.

mod guest;

use api::guest::process as wire;
use buffa::Message as _;
use bytes::{Buf as _, BytesMut};
use guest::{Envd, SOON, START, STREAM, Stream, envelope, request};
use http_body_util::BodyExt as _;
use serde_json::json;
use tokio::time::timeout;
use wire::__buffa::oneof::process_event::Event;
use wire::__buffa::oneof::process_event::data_event::Output;

/// Each asks for one command after the other. More than there are cores on any machine that runs the tests often.
const CONNECTIONS: usize = 6;

#[tokio::test]
async fn ten_thousand_commands_over_few_connections() {
    const TOTAL: usize = 10_000;
    let envd = Envd::start();
    let workers = (0..CONNECTIONS).map(|worker| {
        let envd = &envd;
        async move {
            // A connection that envd closes fails the next request: nothing opens another.
            let mut connection = envd.connection().await;
            for n in (worker..TOTAL).step_by(CONNECTIONS) {
                let (process, stdout, stderr, code) = match n % 3 {
                    0 => (json!({"cmd": "true"}), String::new(), String::new(), 0),
                    1 => {
                        (json!({"cmd": "printf", "args": ["%s\n", n.to_string()]}), format!("{n}\n"), String::new(), 0)
                    }
                    _ => {
                        let script = format!("echo {n}; echo {n} >&2; exit {}", n % 256);
                        (json!({"cmd": "sh", "args": ["-c", script]}), format!("{n}\n"), format!("{n}\n"), n % 256)
                    }
                };
                let message = json!({"process": process, "stdin": false}).to_string();
                let asked = request("POST", START, &STREAM, envelope(0, message.as_bytes()));
                timeout(SOON, connection.ready()).await.expect("an answer ends in time").unwrap();
                let answer = timeout(SOON, connection.send_request(asked)).await.expect("an answer in time").unwrap();
                let mut stream = Stream::of(answer);
                let ran = stream.rest().await;
                assert_eq!(
                    (ran.text(), ran.stderr.as_slice(), &ran.error),
                    (&*stdout, stderr.as_bytes(), &None),
                    "{n}"
                );
                assert_eq!((ran.exit_code(), &ran.end["exited"]), (i64::try_from(code).unwrap(), &json!(true)), "{n}");
                // To its end, so that the connection can be asked again.
                assert!(stream.next().await.is_none(), "{n}");
            }
        }
    });
    futures::future::join_all(workers).await;
    assert_eq!(envd.call("/process.Process/List", json!({})).await.unwrap(), json!({}));
    assert!(envd.resident_kib() < 32 * 1024, "{} KiB", envd.resident_kib());
}

#[tokio::test]
async fn a_gibibyte_arrives_byte_for_byte() {
    const SIZE: usize = 1 << 30;
    /// Each begins with its number: a lost, doubled or moved piece shows.
    const PIECE: usize = 1 << 20;
    let envd = Envd::start();
    let filler: Vec<u8> = (0..PIECE as u64 - 8).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("filler");
    std::fs::write(&file, &filler).unwrap();
    let script = format!(
        "import sys,struct\nw=sys.stdout.buffer\nf=open({file:?},'rb').read()\nfor n in range({}):\n w.write(struct.pack('<Q',n)+f)\nw.flush()\nsys.exit(9)",
        SIZE / PIECE
    );
    let config =
        wire::ProcessConfig { cmd: "python3".to_owned(), args: vec!["-c".to_owned(), script], ..Default::default() };
    let asked = wire::StartRequest { process: config.into(), stdin: Some(false), ..Default::default() };
    let headers = [("content-type", "application/connect+proto"), STREAM[1]];
    let answer = envd.ask(request("POST", START, &headers, envelope(0, &asked.encode_to_vec()))).await;
    assert_eq!(answer.status(), 200);
    let mut body = answer.into_body();
    let (mut read, mut at, mut code, mut is_closed) = (BytesMut::new(), 0, None, false);
    while let Some(frame) = timeout(SOON, body.frame()).await.expect("the next frame in time") {
        read.extend_from_slice(&frame.unwrap().into_data().unwrap());
        while let Some(length) = read.get(1..5).map(|it| u32::from_be_bytes(it.try_into().unwrap()) as usize) {
            if read.len() < 5 + length {
                break;
            }
            let flags = read[0];
            read.advance(5);
            let message = read.split_to(length);
            if flags & 2 != 0 {
                assert_eq!(&message[..], b"{}");
                is_closed = true;
                continue;
            }
            match wire::StartResponse::decode_from_slice(&message).unwrap().event.event.clone() {
                Some(Event::Data(data)) => match &data.output {
                    Some(Output::Stdout(bytes)) => at = check(&filler, at, bytes),
                    other => panic!("{other:?} at {at}"),
                },
                Some(Event::End(end)) => code = Some(end.exit_code),
                _ => {}
            }
        }
    }
    assert_eq!((at, code, is_closed, read.len()), (SIZE, Some(9), true, 0));
    assert!(envd.resident_kib() < 24 * 1024, "{} KiB", envd.resident_kib());
}

/// Whether these bytes belong at this place of the output; where the next ones belong.
fn check(filler: &[u8], mut at: usize, mut bytes: &[u8]) -> usize {
    let piece = filler.len() + 8;
    while !bytes.is_empty() {
        let (number, within) = (at / piece, at % piece);
        let head = (number as u64).to_le_bytes();
        let expected = if within < 8 { &head[within..] } else { &filler[within - 8..] };
        let length = expected.len().min(bytes.len());
        assert!(expected[..length] == bytes[..length], "wrong bytes from {at} on");
        bytes = &bytes[length..];
        at += length;
    }
    at
}
