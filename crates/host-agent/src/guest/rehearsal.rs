//! Lets a guest do once what it will have to do quickly later: take an identity, and run a command. What it does for the first time takes
//! it many times as long, because it meets pages that nobody has touched and, under emulation, code that nobody has translated.

use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use model::ids::Incarnation;
use tracing::debug;

use super::{Command, Dial, ExecEvent, Guest, GuestError};

/// For one of them.
const TIME_MAX: Duration = Duration::from_secs(10);
/// Of a guest that is nobody's yet.
const HOST_NAME: &str = "standby";
/// What most sandboxes are asked first goes this way too.
const FIRST_COMMAND: &str = "true";

/// An identity that nobody will use, for a guest that knows its host by `known_by`; empty: it has none yet, and takes the first that
/// comes. From now on it knows its host by `secret`, 64 hex digits that nobody else knows. Held: the guest has users' processes, which go on
/// standing still, so that no command is run either.
pub async fn rehearse(dial: Arc<dyn Dial>, known_by: &str, secret: &str, is_held: bool) -> Result<(), GuestError> {
    let incarnation = Incarnation::from_random(rand::random());
    let init = api::guest::Init {
        incarnation: incarnation.to_string(),
        // No user of the guest ever sees it.
        access_token: secret.to_owned(),
        control_token: secret.to_owned(),
        timestamp: String::new(),
        entropy: base64::engine::general_purpose::STANDARD.encode(rand::random::<[u8; 32]>()),
        hostname: HOST_NAME.to_owned(),
        ..Default::default()
    };
    let guest = Arc::new(Guest::new(dial, incarnation, &init.access_token));
    let known_by = if known_by.is_empty() { secret } else { known_by };
    let rehearsed = tokio::time::timeout(TIME_MAX, async {
        if is_held {
            guest.init_held(&init, known_by).await?;
            return Ok(());
        }
        guest.introduce(&init, known_by).await?;
        if let Err(error) = first_command(&guest).await {
            debug!("the rehearsal of a command: {error}");
        }
        Ok(())
    });
    let rehearsed = rehearsed.await.unwrap_or_else(|_| Err(GuestError::Fault("no rehearsal in time".to_owned())));
    guest.close();
    rehearsed
}

async fn first_command(guest: &Arc<Guest>) -> Result<(), GuestError> {
    let command = Command {
        cmd: "/bin/sh".to_owned(),
        args: vec!["-c".to_owned(), FIRST_COMMAND.to_owned()],
        user: "root".to_owned(),
        timeout: TIME_MAX,
        ..Command::default()
    };
    let mut stream = guest.start(command).await?;
    while let Some(event) = stream.next().await? {
        if matches!(event, ExecEvent::End { .. }) {
            break;
        }
    }
    Ok(())
}
