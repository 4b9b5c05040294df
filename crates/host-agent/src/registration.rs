//! Gets this host into the fleet by a one-time token, and keeps its credentials fresh.
//!
//! A registration may be repeated with the same token and the same key, because its answer may have been lost. What the control plane
//! itself refuses is not repeated. A renewal that fails is tried again for ever: losing the credential's trust is no reason to touch a
//! sandbox.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use api::v1::hosts::{HostCredentials, HostFacts, RegisterHost, RenewHost};
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use url::Url;

use crate::control_plane::{BackOff, CallError, ControlPlane, NoClient};
use crate::credentials::{Credentials, CredentialsError, Files, certificate_request, fingerprint};
use crate::ticket::Ticket;

/// A registration token lives one hour.
const REGISTER_TIME_MAX: Duration = Duration::from_secs(3600);
const BACK_OFF_FIRST: Duration = Duration::from_millis(500);
const REGISTER_BACK_OFF_MAX: Duration = Duration::from_secs(30);
const RENEW_BACK_OFF_MAX: Duration = Duration::from_secs(60);
const NAME_EVERY: Duration = Duration::from_secs(86_400);
/// How often the lives of JWT and certificate are looked at: they last days.
const RENEW_CHECK_EVERY: Duration = Duration::from_secs(60);

#[derive(Debug, thiserror::Error)]
pub enum RegisterError {
    #[error(
        "the control plane refused the registration token ({code}): {message}; make a new one with `wrenn host token ID`, it works once and for one hour"
    )]
    TokenRefused { code: String, message: String },
    #[error("the control plane refused the registration ({status} {code}): {message}")]
    Refused { status: u16, code: String, message: String },
    #[error("no registration within the hour that the token lives; the last attempt ended with: {last}")]
    TimedOut { last: String },
    #[error("the registration was stopped")]
    Stopped,
    #[error(transparent)]
    Credentials(#[from] CredentialsError),
    #[error(transparent)]
    NoClient(#[from] NoClient),
}

/// What a registration is made of.
pub struct Registration<'a> {
    pub files: &'a Files,
    pub cp_url: &'a Url,
    pub address: &'a str,
    pub token: &'a str,
    pub facts: HostFacts,
}

/// Registers, repeating until the control plane has answered or the token's hour is over.
pub async fn register(registration: Registration<'_>, stop: &CancellationToken) -> Result<Credentials, RegisterError> {
    let Registration { files, cp_url, address, token, facts } = registration;
    let control_plane = ControlPlane::new(cp_url.clone())?;
    let key = files.key()?;
    let request = RegisterHost {
        token: token.to_owned(),
        address: address.to_owned(),
        csr_pem: certificate_request(&key, address)?,
        facts,
    };
    let end = Instant::now() + REGISTER_TIME_MAX;
    let mut back_off = BackOff::new(BACK_OFF_FIRST, REGISTER_BACK_OFF_MAX);
    loop {
        let error = match control_plane.post::<HostCredentials>("/v1/hosts/register", None, &request).await {
            Ok(answer) => {
                let credentials = Credentials::from_answer(answer, &key, cp_url, address, &fingerprint(token));
                files.save(&credentials)?;
                info!(host.id = %credentials.host.host_id, "registered as {}", credentials.host.host_id);
                return Ok(credentials);
            }
            Err(error) => error,
        };
        match &error {
            CallError::Refused { status: 401, code, message, .. } => {
                return Err(RegisterError::TokenRefused { code: code.clone(), message: message.clone() });
            }
            CallError::Refused { status, code, message, .. } if error.is_final() => {
                return Err(RegisterError::Refused { status: *status, code: code.clone(), message: message.clone() });
            }
            _ => {}
        }
        let wait = error.retry_after().unwrap_or_default().max(back_off.next(rand::random()));
        if Instant::now() + wait >= end {
            return Err(RegisterError::TimedOut { last: error.to_string() });
        }
        warn!(wait_ms = wait.as_millis(), cause = source_text(&error), "registration will be repeated: {error}");
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            () = stop.cancelled() => return Err(RegisterError::Stopped),
        }
    }
}

/// Renews JWT and certificate in time, for as long as the agent runs. New credentials go to `current`, whose readers swap them in.
pub async fn keep_fresh(
    files: Files,
    address: String,
    current: Arc<watch::Sender<Credentials>>,
    ticket: Arc<Ticket>,
    stop: CancellationToken,
) -> Result<(), NoClient> {
    let mut back_off = BackOff::new(BACK_OFF_FIRST, RENEW_BACK_OFF_MAX);
    let control_plane = ControlPlane::new(current.borrow().host.cp_url.clone())?;
    // Asked for once a day: a control plane of a version before makes none that does.
    let mut ask_for_name_at = Instant::now();
    loop {
        let is_nameless = !current.borrow().bear_the_name() && Instant::now() >= ask_for_name_at;
        let wait = if is_nameless || current.borrow().wants_renewal(SystemTime::now().into(), &address) {
            match renew(&files, &control_plane, &address, &current, &ticket).await {
                Ok(()) => {
                    ask_for_name_at = Instant::now() + NAME_EVERY;
                    back_off.reset();
                    RENEW_CHECK_EVERY
                }
                Err(error) => {
                    let wait = back_off.next(rand::random());
                    warn!(
                        wait_ms = wait.as_millis(),
                        "the host's credentials are kept and their renewal repeated: {error}"
                    );
                    wait
                }
            }
        } else {
            RENEW_CHECK_EVERY
        };
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            () = stop.cancelled() => return Ok(()),
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum RenewError {
    #[error(transparent)]
    Credentials(#[from] CredentialsError),
    #[error(transparent)]
    Call(#[from] CallError),
    #[error("the control plane answered with the credentials of another host")]
    OtherHost,
}

async fn renew(
    files: &Files,
    control_plane: &ControlPlane,
    address: &str,
    current: &watch::Sender<Credentials>,
    ticket: &Ticket,
) -> Result<(), RenewError> {
    let key = files.key()?;
    let body = RenewHost {
        csr_pem: certificate_request(&key, address)?,
        address: address.to_owned(),
        ticket: Some(ticket.shown()),
    };
    let old = current.borrow().host.clone();
    let answer: HostCredentials =
        control_plane.post(&format!("/v1/hosts/{}/renew", old.host_id), Some(&old.token), &body).await?;
    if answer.host.id != old.host_id {
        return Err(RenewError::OtherHost);
    }
    let mut fresh = Credentials::from_answer(answer, &key, &old.cp_url, address, &old.registered_with);
    // An answer that was long under way must not take back an epoch that was seen meanwhile.
    fresh.host.epoch = fresh.host.epoch.max(current.borrow().host.epoch);
    files.save(&fresh)?;
    info!(host.id = %old.host_id, "renewed the host's credentials");
    current.send_replace(fresh);
    Ok(())
}

/// The innermost cause of an error, for a log line.
fn source_text(error: &dyn std::error::Error) -> String {
    let mut innermost = error;
    while let Some(source) = innermost.source() {
        innermost = source;
    }
    innermost.to_string()
}
