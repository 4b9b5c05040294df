//! The services that channels are of: what each must be given, and what it is told.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::str::FromStr;

use api::v1::channels::News;
use aws_lc_rs::hmac;
use chrono::{SecondsFormat, Utc};
use reqwest::{Method, Request};
use serde_json::{Value, json};
use url::{Host, Url};
use uuid::Uuid;

const VALUE_BYTES_MAX: usize = 2048;
/// Mail would take words of HTTP for its own.
const PORT_OF_MAIL: u16 = 25;
const TELEGRAM: &str = "https://api.telegram.org";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Provider {
    Webhook,
    Discord,
    Slack,
    Teams,
    GoogleChat,
    Telegram,
    Matrix,
}

/// What is wrong with a configuration, and where.
#[derive(Debug, PartialEq, Eq)]
pub struct Wrong {
    pub field: String,
    pub reason: String,
}

/// As it is sealed.
pub type Config = BTreeMap<String, String>;

impl Provider {
    pub const ALL: [(Self, &str); 7] = [
        (Self::Webhook, "webhook"),
        (Self::Discord, "discord"),
        (Self::Slack, "slack"),
        (Self::Teams, "teams"),
        (Self::GoogleChat, "googlechat"),
        (Self::Telegram, "telegram"),
        (Self::Matrix, "matrix"),
    ];

    pub fn as_str(self) -> &'static str {
        Self::ALL.iter().find(|(known, _)| *known == self).map_or("", |(_, word)| word)
    }

    /// Names of what it must be given, and of what it may be.
    fn fields(self) -> (&'static [&'static str], &'static [&'static str]) {
        match self {
            Self::Webhook => (&["url"], &["secret"]),
            Self::Discord | Self::Slack | Self::Teams | Self::GoogleChat => (&["webhook_url"], &[]),
            // A server of the bot API may be one's own.
            Self::Telegram => (&["bot_token", "chat_id"], &["api_url"]),
            Self::Matrix => (&["homeserver_url", "access_token", "room_id"], &[]),
        }
    }

    pub fn check(self, config: &Config) -> Result<(), Wrong> {
        let wrong = |field: &str, reason: &str| Wrong { field: format!("config.{field}"), reason: reason.to_owned() };
        let (needed, possible) = self.fields();
        if let Some(field) = needed.iter().find(|field| config.get(**field).is_none_or(String::is_empty)) {
            return Err(wrong(field, "is missing"));
        }
        for (field, value) in config {
            if !needed.contains(&field.as_str()) && !possible.contains(&field.as_str()) {
                let known = [needed, possible].concat().join(", ");
                let reason = format!("may hold {known} for {}", self.as_str());
                return Err(Wrong { field: "config".to_owned(), reason });
            }
            if value.len() > VALUE_BYTES_MAX || value.chars().any(char::is_control) {
                return Err(wrong(field, "must have at most 2048 bytes and no control characters"));
            }
            if field.ends_with("url") {
                url(value, self == Self::Webhook).map_err(|reason| wrong(field, reason))?;
            }
        }
        let is_token = |c: char| c.is_ascii_alphanumeric() || ":_-".contains(c);
        match self {
            // It becomes a part of a path.
            Self::Telegram if !config["bot_token"].chars().all(is_token) => {
                Err(wrong("bot_token", "must be letters, digits, : _ and -"))
            }
            Self::Matrix if !config["access_token"].chars().all(|c| c.is_ascii_graphic()) => {
                Err(wrong("access_token", "must be printable ASCII"))
            }
            _ => Ok(()),
        }
    }

    /// What tells the service. `config` was checked, and may be an older program's all the same. None: it cannot be told by this.
    pub fn request(self, config: &Config, id: Uuid, news: &News) -> Option<Request> {
        let value = |field: &str| config.get(field).map(String::as_str);
        let to = |field: &str| value(field).and_then(|text| Url::parse(text).ok());
        match self {
            Self::Webhook => webhook(to("url")?, value("secret")?, id, news),
            Self::Discord => {
                // Names of people must not call others.
                posted(to("webhook_url")?, &json!({"content": text(news), "allowed_mentions": {"parse": []}}))
            }
            Self::Slack => {
                let escaped = text(news).replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
                posted(to("webhook_url")?, &json!({ "text": escaped }))
            }
            Self::Teams | Self::GoogleChat => posted(to("webhook_url")?, &json!({ "text": text(news) })),
            Self::Telegram => {
                let mut url = Url::parse(value("api_url").unwrap_or(TELEGRAM)).ok()?;
                let bot = format!("bot{}", value("bot_token")?);
                url.path_segments_mut().ok()?.pop_if_empty().extend([bot.as_str(), "sendMessage"]);
                posted(url, &json!({"chat_id": value("chat_id")?, "text": text(news)}))
            }
            Self::Matrix => {
                let mut url = to("homeserver_url")?;
                let (room, id) = (value("room_id")?, id.to_string());
                url.path_segments_mut().ok()?.pop_if_empty().extend([
                    "_matrix",
                    "client",
                    "v3",
                    "rooms",
                    room,
                    "send",
                    "m.room.message",
                    &id,
                ]);
                let mut request = posted(url, &json!({"msgtype": "m.notice", "body": text(news)}))?;
                *request.method_mut() = Method::PUT;
                let bearer = format!("Bearer {}", value("access_token")?);
                request.headers_mut().insert(http::header::AUTHORIZATION, bearer.parse().ok()?);
                Some(request)
            }
        }
    }
}

impl FromStr for Provider {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL.iter().find(|(_, word)| *word == text).map(|(known, _)| *known).ok_or_else(|| {
            let words: Vec<&str> = Self::ALL.iter().map(|(_, word)| *word).collect();
            format!("must be one of: {}", words.join(", "))
        })
    }
}

fn url(text: &str, may_be_plain: bool) -> Result<(), &'static str> {
    let url = Url::parse(text).map_err(|_| "is not an address such as https://example.org/hook")?;
    // Where no certificate can be had.
    let is_number = matches!(url.host(), Some(Host::Ipv4(_) | Host::Ipv6(_)));
    match url.scheme() {
        "https" => {}
        "http" if may_be_plain || is_number => {}
        _ => return Err("must begin with https://"),
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err("must hold no user and no password");
    }
    match url.port_or_known_default() {
        None | Some(0 | PORT_OF_MAIL) => Err("has a port that cannot be told anything"),
        Some(_) => Ok(()),
    }
}

fn posted(url: Url, body: &Value) -> Option<Request> {
    let mut request = Request::new(Method::POST, url);
    request.headers_mut().insert(http::header::CONTENT_TYPE, http::HeaderValue::from_static("application/json"));
    *request.body_mut() = Some(body.to_string().into());
    Some(request)
}

fn webhook(url: Url, secret: &str, id: Uuid, news: &News) -> Option<Request> {
    let body = serde_json::to_string(news).ok()?;
    let time = Utc::now().to_rfc3339_opts(SecondsFormat::Secs, true);
    let mut request = Request::new(Method::POST, url);
    let headers = request.headers_mut();
    headers.insert(http::header::CONTENT_TYPE, http::HeaderValue::from_static("application/json"));
    headers.insert("x-wrenn-signature", signature(secret, &time, &body).parse().ok()?);
    headers.insert("x-wrenn-delivery", id.to_string().parse().ok()?);
    headers.insert("x-wrenn-timestamp", time.parse().ok()?);
    *request.body_mut() = Some(body.into());
    Some(request)
}

/// `sha256=` and HMAC-SHA256 of time, dot and body, in hex.
fn signature(secret: &str, time: &str, body: &str) -> String {
    let key = hmac::Key::new(hmac::HMAC_SHA256, secret.as_bytes());
    format!("sha256={}", hex::encode(hmac::sign(&key, format!("{time}.{body}").as_bytes())))
}

fn text(news: &News) -> String {
    let (what, resource, actor) = (summary(&news.event), &news.resource, &news.actor);
    let mut text = format!("Wrenn: {what}\nEvent: {}\nResource: {} {}", news.event, resource.kind, resource.id);
    let who = actor.name.as_deref().or(actor.id.as_deref()).unwrap_or("-");
    let time = news.timestamp.to_rfc3339_opts(SecondsFormat::Secs, true);
    let _ = write!(text, "\nActor: {} {who}\nTeam: {}\nTime: {time}", actor.kind, news.team_id);
    text
}

fn summary(event: &str) -> &'static str {
    match event {
        "capsule.created" => "a sandbox was created",
        "capsule.running" => "a sandbox was resumed",
        "capsule.paused" => "a sandbox was paused",
        "capsule.destroyed" => "a sandbox was destroyed",
        "template.snapshot.created" => "a snapshot was created",
        "template.snapshot.deleted" => "a snapshot was deleted",
        "host.up" => "a host is back",
        "host.down" => "a host is silent",
        "channel.test" => "this channel works",
        _ => "something happened",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(pairs: &[(&str, &str)]) -> Config {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    fn news() -> News {
        serde_json::from_value(
            json!({"event": "capsule.paused", "timestamp": "2026-01-02T03:04:05Z", "team_id": "team-1",
            "actor": {"type": "user", "name": "<@everyone> & Ada"}, "resource": {"id": "sb1", "type": "sandbox"}}),
        )
        .unwrap()
    }

    fn body(request: &Request) -> Value {
        serde_json::from_slice(request.body().unwrap().as_bytes().unwrap()).unwrap()
    }

    #[test]
    fn configurations_are_checked() {
        let good = [
            (Provider::Webhook, config(&[("url", "http://example.org/x"), ("secret", "s")])),
            (Provider::Slack, config(&[("webhook_url", "https://example.org/x")])),
            (Provider::Telegram, config(&[("bot_token", "12:ab_C-d"), ("chat_id", "-5")])),
        ];
        for (provider, config) in good {
            assert_eq!(provider.check(&config), Ok(()), "{provider:?}");
        }
        for wrong in [
            "",
            "x",
            "file:///etc/passwd",
            "gopher://a/",
            "http://",
            "https://u:p@a/",
            "https://u@a/",
            "http://a:0/",
            "https://a:25/",
            "http://a:65536/",
            "https://a\n/",
            "javascript:1",
        ] {
            assert!(Provider::Webhook.check(&config(&[("url", wrong)])).is_err(), "{wrong:?}");
        }
        let plain = config(&[("webhook_url", "http://example.org/x")]);
        assert_eq!(Provider::Discord.check(&plain).unwrap_err().field, "config.webhook_url");
        let foreign = config(&[("url", "https://a/"), ("chat_id", "1")]);
        assert_eq!(Provider::Webhook.check(&foreign).unwrap_err().field, "config");
        let path = config(&[("bot_token", "a/../b"), ("chat_id", "1")]);
        assert!(Provider::Telegram.check(&path).is_err());
        assert!("irc".parse::<Provider>().unwrap_err().contains("webhook, discord"));
    }

    #[test]
    fn webhooks_are_signed() {
        let config = config(&[("url", "https://example.org/hook"), ("secret", "s3cret")]);
        let id = Uuid::from_u128(5);
        let request = Provider::Webhook.request(&config, id, &news()).unwrap();
        let header = |name: &str| request.headers()[name].to_str().unwrap();
        assert_eq!(header("x-wrenn-delivery"), id.to_string());
        let sent = std::str::from_utf8(request.body().unwrap().as_bytes().unwrap()).unwrap();
        assert_eq!(header("x-wrenn-signature"), signature("s3cret", header("x-wrenn-timestamp"), sent));
        // As another program computes it: `printf 't.b' | openssl dgst -sha256 -hmac k`
        assert_eq!(signature("k", "t", "b"), "sha256=36c5e7977e20c19bdaed6949257a79ef3c4cee069c2b493ce4b2c45067f4ea45");
    }

    #[test]
    fn each_service_is_told_in_its_own_way() {
        let id = Uuid::from_u128(5);
        let hook = config(&[("webhook_url", "https://example.org/x?key=1")]);
        let told = |provider: Provider| body(&provider.request(&hook, id, &news()).unwrap());
        assert!(
            told(Provider::Discord)["content"]
                .as_str()
                .unwrap()
                .starts_with("Wrenn: a sandbox was paused\nEvent: capsule.paused")
        );
        assert_eq!(told(Provider::Discord)["allowed_mentions"]["parse"], json!([]));
        assert!(told(Provider::Slack)["text"].as_str().unwrap().contains("user &lt;@everyone&gt; &amp; Ada"));
        assert!(told(Provider::Teams)["text"].is_string() && told(Provider::GoogleChat)["text"].is_string());

        let telegram = config(&[("bot_token", "12:ab"), ("chat_id", "-5")]);
        let request = Provider::Telegram.request(&telegram, id, &news()).unwrap();
        assert_eq!(request.url().as_str(), "https://api.telegram.org/bot12:ab/sendMessage");
        assert_eq!(body(&request)["chat_id"], "-5");

        let matrix =
            config(&[("homeserver_url", "https://m.example.org"), ("access_token", "t"), ("room_id", "!a/b:c")]);
        let request = Provider::Matrix.request(&matrix, id, &news()).unwrap();
        assert_eq!(request.url().path(), format!("/_matrix/client/v3/rooms/!a%2Fb:c/send/m.room.message/{id}"));
        assert_eq!(
            (request.method(), &request.headers()["authorization"]),
            (&Method::PUT, &"Bearer t".parse().unwrap())
        );
    }
}
