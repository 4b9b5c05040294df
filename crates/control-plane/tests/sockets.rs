//! What clients do wrong with WebSockets, before and after the upgrade, and how each of these is closed. The host is away: what is refused
//! is refused before it is asked, and what is not ends as that.

mod replica;

use std::time::Duration;

use futures::{SinkExt as _, StreamExt as _};
use replica::Replica;
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;
use tokio_tungstenite::tungstenite::protocol::frame::Frame;
use tokio_tungstenite::tungstenite::protocol::frame::coding::{Data, OpCode};
use tokio_tungstenite::tungstenite::{Error, Message};

const SOON: Duration = Duration::from_secs(30);

/// Text frames that came, and the code of the close; or the status of the answer that is no upgrade.
async fn conversation(replica: &Replica, path: &str, said: Vec<Message>) -> Result<(Vec<Value>, Option<u16>), u16> {
    let mut request = format!("{}{path}", replica.url.replace("http", "ws")).into_client_request().unwrap();
    request.headers_mut().insert("x-api-key", replica.key.parse().unwrap());
    let mut socket = match tokio_tungstenite::connect_async(request).await {
        Ok((socket, _)) => socket,
        Err(Error::Http(answer)) => return Err(answer.status().as_u16()),
        Err(error) => panic!("{path}: {error}"),
    };
    for message in said {
        // It may be closed by then.
        let _ = socket.send(message).await;
    }
    let mut heard = Vec::new();
    loop {
        match tokio::time::timeout(SOON, socket.next()).await.expect("an end in time") {
            Some(Ok(Message::Text(text))) => heard.push(serde_json::from_str(&text).unwrap()),
            Some(Ok(Message::Close(frame))) => return Ok((heard, frame.map(|frame| frame.code.into()))),
            Some(Ok(_)) => {}
            Some(Err(_)) | None => return Ok((heard, None)),
        }
    }
}

fn text(frame: &Value) -> Message {
    Message::Text(frame.to_string().into())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_with_a_stream_is_told_and_closed_with_its_code() {
    let replica = Replica::start().await;
    let host = replica.host(4096).await;
    let sandbox = replica.sandbox(host).await;
    let path = |rest: &str| format!("/v1/sandboxes/{sandbox}{rest}");
    for (rest, status) in [
        ("/processes/1/stream?from=-1", 400),
        ("/processes/1/stream?from=x", 400),
        ("/processes/1/stream?encoding=utf-16", 400),
        (&format!("/processes/{}/stream", "x".repeat(300)), 400),
        ("/pty?frames=morse", 400),
    ] {
        assert_eq!(conversation(&replica, &path(rest), vec![]).await, Err(status), "{rest}");
    }
    for rest in ["/processes/1/stream", "/pty", "/exec/stream"] {
        let nobodys = format!("/v1/sandboxes/sb0000000000000000000000{rest}");
        assert_eq!(conversation(&replica, &nobodys, vec![]).await, Err(404), "{rest}");
    }
    let dance = || text(&json!({"type": "dance"}));
    for rest in ["/pty", "/exec/stream"] {
        let (heard, code) = conversation(&replica, &path(rest), (0..11).map(|_| dance()).collect()).await.unwrap();
        assert_eq!((heard.len(), code), (10, Some(1008)), "{rest}");
        assert!(heard.iter().all(|frame| frame["code"] == "invalid_request" && frame["fatal"] == false), "{heard:?}");
        let large = vec![Message::Text("x".repeat((1 << 20) + 1).into())];
        assert_eq!(conversation(&replica, &path(rest), large).await.unwrap().1, Some(1009), "{rest}");
        let no_text = Frame::message(vec![b'"', 0xff, b'"'], OpCode::Data(Data::Text), true);
        let (_, code) = conversation(&replica, &path(rest), vec![Message::Frame(no_text)]).await.unwrap();
        assert_eq!(code, Some(1007), "{rest}");
    }
    // A first frame that cannot be, and one before the first.
    for start in [
        json!({"type": "start", "cols": 1001}),
        json!({"type": "start", "rows": -1}),
        json!({"type": "start", "envs": {"a=b": ""}}),
        json!({"type": "start", "cmd": "x".repeat(70_000)}),
        json!({"type": "connect", "tag": ""}),
    ] {
        let (heard, code) = conversation(&replica, &path("/pty"), vec![text(&start)]).await.unwrap();
        assert_eq!((heard.len(), &heard[0]["code"], &heard[0]["fatal"]), (1, &json!("invalid_request"), &json!(true)));
        assert_eq!(code, Some(1000), "{start}");
    }
    for early in [text(&json!({"type": "kill"})), Message::Binary(b"ls".to_vec().into())] {
        let (heard, _) = conversation(&replica, &path("/pty"), vec![early, Message::Close(None)]).await.unwrap();
        assert_eq!((&heard[0]["code"], &heard[0]["fatal"]), (&json!("invalid_state"), &json!(false)));
    }
    // The host is away.
    for (rest, said) in [
        ("/processes/1/stream", vec![]),
        ("/processes/web/stream?from=7", vec![]),
        ("/pty", vec![text(&json!({"type": "start"}))]),
        ("/pty?frames=json", vec![text(&json!({"type": "connect", "tag": "pty-00000000"}))]),
        ("/exec/stream", vec![text(&json!({"type": "start", "cmd": "true"}))]),
    ] {
        let (heard, code) = conversation(&replica, &path(rest), said).await.unwrap();
        let last = heard.last().unwrap();
        assert_eq!((&last["code"], &last["fatal"], code), (&json!("host_unavailable"), &json!(true), Some(1013)));
    }
}
