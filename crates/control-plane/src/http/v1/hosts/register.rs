//! `POST /v1/hosts/register`: a machine becomes a host, by a token that works once.

use api::v1::errors::ErrorBody;
use api::v1::hosts::{HostCredentials, RegisterHost};
use axum::extract::State;
use chrono::Utc;
use http::StatusCode;
use store::registration_tokens::Registered;
use tracing::{error, info};

use crate::app::App;
use crate::authority::HostRequest;
use crate::http::body::Json;
use crate::http::errors::ApiError;
use crate::tokens;

/// A request for one key and one name.
const CSR_BYTES_MAX: usize = 16 * 1024;

#[utoipa::path(post, path = "/register", tag = "hosts", request_body = RegisterHost, security(()),
    responses((status = 201, body = HostCredentials), (status = 400, body = ErrorBody), (status = 401, body = ErrorBody)))]
pub async fn register(
    State(app): State<App>,
    Json(body): Json<RegisterHost>,
) -> Result<(StatusCode, axum::Json<HostCredentials>), ApiError> {
    // The token first: who has none learns nothing about what else is wrong.
    let token_hash = tokens::registration_token_hash(&body.token).ok_or_else(ApiError::unauthorized)?;
    let request = request(&body.csr_pem)?;
    let facts = super::facts(body.facts)?;
    let name = super::host_of(&app, &body.address).await?;
    let (key_hash, address, store) = (request.key_hash(), body.address.clone(), app.store.clone());
    let registered =
        super::super::detached(
            &app,
            async move { store.register_host(&token_hash, &key_hash, &address, &facts).await },
        );
    let host = match registered.await? {
        Registered::Done(host) => *host,
        Registered::Refused => return Err(ApiError::unauthorized()),
    };
    info!(host.id = %host.id, "host {} registered", host.id);
    Ok((StatusCode::CREATED, axum::Json(credentials(&app, host, request, &name)?)))
}

pub(super) fn request(pem: &str) -> Result<HostRequest, ApiError> {
    if pem.len() > CSR_BYTES_MAX {
        return Err(ApiError::invalid("csr_pem", "is too long"));
    }
    HostRequest::parse(pem).map_err(|error| ApiError::invalid("csr_pem", error))
}

pub(super) fn credentials(
    app: &App,
    host: store::hosts::Host,
    request: HostRequest,
    address: &str,
) -> Result<HostCredentials, ApiError> {
    let now = Utc::now();
    let cert_pem = app.authority.sign_host(request, host.id, address, now).map_err(|cause| {
        error!(host.id = %host.id, "sign the certificate of host {}: {cause}", host.id);
        ApiError::internal()
    })?;
    let (token, token_expires_at) = app.tokens.for_host(host.id, now);
    Ok(HostCredentials {
        epoch: host.epoch,
        host: super::shown(host),
        token,
        token_expires_at,
        cert_pem,
        ca_cert_pem: app.authority.certificate_pem.clone(),
    })
}
