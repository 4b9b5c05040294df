//! What the first start makes: an administrator, and on one machine the host record. All of it may be repeated.

use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use base64::Engine as _;
use model::ids::{HostId, TeamId, UserId};
use store::audit::Actor;
use store::hosts::{Created, HostState, NewHost};
use store::registration_tokens::NewToken;
use store::{Store, StoreError};
use uuid::Uuid;

use crate::passwords;
use crate::secrets::random_32;
use crate::tokens;

const EMAIL: &str = "admin@localhost";
const PASSWORD_BYTES: usize = 18;
const TOKEN_FILE: &str = "dev-registration-token";

/// The first administrator's password, when this call made the administrator. It is kept nowhere.
pub async fn administrator(store: &Store) -> Result<Option<(&'static str, String)>, StoreError> {
    if store.has_administrator().await? {
        return Ok(None);
    }
    let password = base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(&random_32()[..PASSWORD_BYTES]);
    let hash = passwords::hash(&password).await;
    let (user, team) = (UserId(Uuid::now_v7()), TeamId(Uuid::now_v7()));
    let made = store.make_first_administrator(user, team, EMAIL, &hash).await?;
    Ok(made.then_some((EMAIL, password)))
}

#[derive(Debug, thiserror::Error)]
pub enum DevHostError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("write WRENN_DIR/dev-registration-token")]
    File(#[source] std::io::Error),
}

/// The record of the one host of a development machine; its token lies in a file until the host has registered.
pub async fn dev_host(store: &Store, dir: &Path, address: &str) -> Result<(), DevHostError> {
    let place = dir.join(TOKEN_FILE);
    let made_for = format!("CP_HOST_AGENT_ADDR {address}");
    let actor = Actor::platform("CP_HOST_AGENT_ADDR");
    let (token, token_hash) = tokens::registration_token(&random_32());
    match store.host_created_by(&made_for).await? {
        None => {
            let new = NewHost {
                id: HostId(Uuid::now_v7()),
                team: None,
                provider: None,
                availability_zone: None,
                tags: Vec::new(),
                created_by: made_for,
                token_hash,
            };
            if let Created::Made(_) = store.create_host(&new, None, &actor).await? {
                write_private(&place, &token).map_err(DevHostError::File)?;
            }
        }
        Some(host) if host.state == HostState::Pending => {
            if let NewToken::Made(_) = store.new_registration_token(host.id, &token_hash, None, &actor).await? {
                write_private(&place, &token).map_err(DevHostError::File)?;
            }
        }
        Some(_) => {
            let _ = std::fs::remove_file(&place);
        }
    }
    Ok(())
}

/// Whole or not at all, and readable by the owner alone.
pub fn write_private(path: &Path, text: &str) -> std::io::Result<()> {
    let temporary = path.with_extension(format!("{}.tmp", std::process::id()));
    let mut file = std::fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    std::fs::rename(&temporary, path)
}
