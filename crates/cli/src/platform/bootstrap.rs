//! From a control plane that answers to a platform that one can use: the first API key, the host record, the host online.
//!
//! Every step can be repeated: a start that was killed in the middle is finished by the next one.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use api::v1::hosts::{CreateHost, Host, HostWithToken};
use api::v1::keys::{ApiKey, CreateApiKey};
use reqwest::{Method, StatusCode};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use url::Url;

use crate::client::{Client, Credential};
use crate::commands::admin;
use crate::credentials::{Kept, write_private};
use crate::failure::{Doing as _, Failure};

const LOOK_EVERY: Duration = Duration::from_millis(50);
const HEALTH_MAX: Duration = Duration::from_secs(30);
const ASK_MAX: Duration = Duration::from_secs(5);
/// The only template that every host has.
const TEMPLATE: &str = "minimal";

/// Until `/health` says that the database is there too.
pub async fn until_healthy(url: &Url) -> Result<(), Failure> {
    let client = Client::new(url.clone(), Credential::None)?;
    let began = Instant::now();
    loop {
        let answer = client.request(Method::GET, client.url(&["health"])).timeout(ASK_MAX).send().await;
        match answer {
            Ok(answer) if answer.status().is_success() => return Ok(()),
            Ok(answer) if began.elapsed() > HEALTH_MAX => {
                let status = answer.status();
                let text = answer.text().await.unwrap_or_default();
                return Err(Failure::new(format!("the control plane is not well: {status} {text}")));
            }
            Err(error) if began.elapsed() > HEALTH_MAX => return Err(client.broken(&error)),
            _ => tokio::time::sleep(LOOK_EVERY).await,
        }
    }
}

/// The key in `cli.json` when it still opens the API, else a new one, which is written there.
pub async fn api_key(dir: &Path, url: &Url, administrator: &Client) -> Result<String, Failure> {
    let api_url = url.as_str().trim_end_matches('/').to_owned();
    if let Ok(Some(kept)) = Kept::read(dir) {
        let client = Client::new(url.clone(), Credential::ApiKey(kept.api_key.clone()))?;
        let answer = client.request(Method::GET, client.url(&["v1", "sandboxes"])).timeout(ASK_MAX).send().await;
        let status = answer.map_err(|error| client.broken(&error))?.status();
        if status.is_success() {
            if kept.api_url != api_url {
                Kept { api_url, ..kept.clone() }.write(dir)?;
            }
            return Ok(kept.api_key);
        }
        if status != StatusCode::UNAUTHORIZED {
            return Err(Failure::new(format!("the control plane answered {status} to the API key in cli.json")));
        }
    }
    let wanted = CreateApiKey { name: Some("wrenn up".to_owned()), ..CreateApiKey::default() };
    let made: ApiKey = administrator.post(administrator.url(&["v1", "api-keys"]), &wanted).await?;
    let api_key = made.key.ok_or_else(|| Failure::new("the control plane made an API key and did not tell it"))?;
    Kept { api_url, api_key: api_key.clone() }.write(dir)?;
    Ok(api_key)
}

pub async fn administrator(dir: &Path, url: &Url) -> Result<Client, Failure> {
    Client::new(url.clone(), Credential::Bearer(admin::token_of(dir).await?))
}

/// Who this machine is as a host; with the token that registers it, when it is not registered yet.
pub struct HostIdentity {
    pub id: String,
    pub registration_token: Option<String>,
}

/// Kept from the making of the host record until the host is online, so that a start that is killed in between uses it again.
#[derive(Serialize, Deserialize)]
struct Pending {
    host_id: String,
}

fn pending_place(dir: &Path) -> PathBuf {
    dir.join("host-pending.json")
}

pub async fn host(dir: &Path, administrator: &Client) -> Result<HostIdentity, Failure> {
    if let Some(id) = registered(dir) {
        if find(administrator, &id).await?.is_some() {
            return Ok(HostIdentity { id, registration_token: None });
        }
        // The record is gone (the host was removed, or the database is another one): its credentials open nothing any more.
        eprintln!("wrenn: host {id} is unknown to the control plane; this machine is registered anew");
        for name in ["host-token", "host-cert.pem"] {
            let place = dir.join(name);
            if place.exists() {
                std::fs::remove_file(&place).doing(|| format!("remove {}", place.display()))?;
            }
        }
    }
    let made = match pending(dir) {
        Some(pending) if find(administrator, &pending.host_id).await?.is_some_and(|host| host.status == "pending") => {
            administrator
                .post(administrator.url(&["v1", "hosts", &pending.host_id, "token"]), &serde_json::json!({}))
                .await?
        }
        _ => {
            let wanted = CreateHost {
                kind: "regular".to_owned(),
                team_id: None,
                provider: Some("wrenn up".to_owned()),
                availability_zone: None,
                tags: None,
            };
            let made: HostWithToken = administrator.post(administrator.url(&["v1", "hosts"]), &wanted).await?;
            let pending = Pending { host_id: made.host.id.clone() };
            write_private(&pending_place(dir), &serde_json::to_vec(&pending).expect("one text is JSON"))?;
            made
        }
    };
    Ok(HostIdentity { id: made.host.id, registration_token: Some(made.registration_token) })
}

fn registered(dir: &Path) -> Option<String> {
    let text = std::fs::read(dir.join("host-token")).ok()?;
    let token: Value = serde_json::from_slice(&text).ok()?;
    token["host_id"].as_str().map(str::to_owned)
}

fn pending(dir: &Path) -> Option<Pending> {
    serde_json::from_slice(&std::fs::read(pending_place(dir)).ok()?).ok()
}

async fn find(administrator: &Client, id: &str) -> Result<Option<Host>, Failure> {
    match administrator.get(administrator.url(&["v1", "hosts", id])).await {
        Ok(host) => Ok(Some(host)),
        Err(failure) if matches!(failure.code(), Some("not_found" | "invalid_request")) => Ok(None),
        Err(failure) => Err(failure),
    }
}

/// True once the host is online and its agent offers the minimal template.
pub async fn is_usable(dir: &Path, administrator: &Client, id: &str) -> Result<bool, Failure> {
    if find(administrator, id).await?.is_none_or(|host| host.status != "online") {
        return Ok(false);
    }
    let url = administrator.url(&["v1", "hosts", id, "inspect"]);
    let answer = administrator.request(Method::GET, url).timeout(ASK_MAX).send().await;
    let Ok(answer) = answer else { return Ok(false) };
    // The agent may just be starting: then the control plane cannot reach it yet.
    if !answer.status().is_success() {
        return Ok(false);
    }
    let said: Value = answer.json().await.unwrap_or_default();
    let usable = said["templates"].as_array().is_some_and(|names| names.iter().any(|name| name == TEMPLATE));
    if usable {
        let _ = std::fs::remove_file(pending_place(dir));
    }
    Ok(usable)
}
