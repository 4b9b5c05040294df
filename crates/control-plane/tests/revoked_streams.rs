//! A WebSocket that is open is closed with 4401 when the rights by which it was opened are lost. That of a command that runs is seen in the
//! whole machine's tests.

mod replica;

use std::time::{Duration, Instant};

use control_plane::account_settings::AccountSettings;
use futures::StreamExt as _;
use replica::Replica;
use reqwest::Method;
use serde_json::json;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;

/// The code with which the server closes.
async fn closed(replica: &Replica, path: &str, header: (&'static str, String)) -> u16 {
    let url = format!("{}{path}", replica.url.replace("http", "ws"));
    let mut request = url.into_client_request().unwrap();
    request.headers_mut().insert(header.0, header.1.parse().unwrap());
    let (mut socket, _) = tokio_tungstenite::connect_async(request).await.unwrap();
    loop {
        let message =
            tokio::time::timeout(Duration::from_secs(60), socket.next()).await.expect("an end within a minute");
        match message.expect("a frame that says why").unwrap() {
            Message::Close(Some(frame)) => return frame.code.into(),
            Message::Close(None) => panic!("closed without a code"),
            _ => {}
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_open_stream_ends_with_the_rights_by_which_it_was_opened() {
    let accounts = AccountSettings { rights_every_sec: Some(1), ..AccountSettings::default() };
    let replica = Replica::with_accounts(accounts).await;
    let host = replica.host(4096).await;
    let sandbox = replica.sandbox(host).await;
    let team = replica.team().await;
    replica.database.sql(&format!("update sandboxes set team_id = '{}'", team.id.0)).await;
    let key = replica.as_person(&team.owner, Method::POST, "/v1/api-keys", Some(json!({}))).await;
    let (key, id) = (key.body["key"].as_str().unwrap().to_owned(), key.body["id"].as_str().unwrap().to_owned());
    let path = format!("/v1/sandboxes/{sandbox}/exec/stream");
    let revoke_key = format!("/v1/api-keys/{id}");
    let remove_member = format!("/v1/teams/{}/members/{}", team.id, team.member.id);
    for (header, revoke) in
        [(("x-api-key", key), revoke_key), (("authorization", format!("Bearer {}", team.member.token)), remove_member)]
    {
        let began = Instant::now();
        let revoked = async {
            // It is open, and is looked at, before the rights go.
            tokio::time::sleep(Duration::from_millis(1500)).await;
            assert_eq!(replica.as_person(&team.owner, Method::DELETE, &revoke, None).await.status, 204);
        };
        let (code, ()) = tokio::join!(closed(&replica, &path, header), revoked);
        assert_eq!(code, 4401, "{revoke}");
        assert!(began.elapsed() > Duration::from_millis(1500), "not before the rights went");
    }
}
