//! Somebody who listens to a stream of events.

use std::time::Duration;

use futures::StreamExt as _;
use futures::stream::BoxStream;
use reqwest::header::HeaderMap;
use serde_json::Value;

/// Longer than anything that is waited for takes on a crowded machine.
const TIME_MAX: Duration = Duration::from_secs(30);

#[derive(Debug, Clone, PartialEq)]
pub struct Message {
    pub event: String,
    pub id: Option<String>,
    pub data: Value,
}

pub struct Listener {
    pub headers: HeaderMap,
    bytes: BoxStream<'static, reqwest::Result<Vec<u8>>>,
    text: String,
    pub comments: Vec<String>,
}

impl Listener {
    pub async fn open(http: &reqwest::Client, url: &str, key: &str, last: Option<&str>) -> Self {
        let mut request = http.get(url).header("X-API-Key", key).timeout(Duration::from_secs(600));
        if let Some(last) = last {
            request = request.header("Last-Event-ID", last);
        }
        let answer = request.send().await.unwrap();
        assert_eq!(answer.status(), 200, "{url}");
        let headers = answer.headers().clone();
        assert!(headers["content-type"].to_str().unwrap().starts_with("text/event-stream"));
        let bytes = answer.bytes_stream().map(|piece| piece.map(|piece| piece.to_vec())).boxed();
        Self { headers, bytes, text: String::new(), comments: Vec::new() }
    }

    /// None: the stream has ended.
    pub async fn next(&mut self) -> Option<Message> {
        loop {
            if let Some((message, rest)) = self.text.split_once("\n\n") {
                let (message, rest) = (message.to_owned(), rest.to_owned());
                self.text = rest;
                if let Some(comment) = message.strip_prefix(": ") {
                    self.comments.push(comment.to_owned());
                    continue;
                }
                let field = |name: &str| message.lines().find_map(|line| line.strip_prefix(name)).map(str::to_owned);
                return Some(Message {
                    event: field("event: ").expect("a message has a kind"),
                    id: field("id: "),
                    data: serde_json::from_str(&field("data: ").expect("a message has data")).unwrap(),
                });
            }
            let piece = tokio::time::timeout(TIME_MAX, self.bytes.next()).await.expect("a message in time")?;
            self.text.push_str(std::str::from_utf8(&piece.ok()?).unwrap());
        }
    }

    /// The next one of a kind, about a resource.
    pub async fn until(&mut self, kind: &str, resource: &str) -> Message {
        loop {
            let message = self.next().await.expect("the stream goes on");
            if message.event == kind && message.data["resource"]["id"] == resource {
                return message;
            }
        }
    }
}
