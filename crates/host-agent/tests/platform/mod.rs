//! A control plane for one agent: an authority, the host routes, and clients of the agent's port.

#![allow(dead_code)] // Each test program uses its part.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use api::host::{CONTROL_PLANE_NAME, HostAgentServiceClient};
use api::v1::hosts::Heartbeat;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::Uri;
use axum::response::IntoResponse as _;
use chrono::{TimeDelta, Utc};
use connectrpc::client::{ClientConfig, HttpClient};
use rcgen::{BasicConstraints, CertificateParams, CertificateSigningRequestParams, DnType, IsCa, Issuer, KeyPair};
use rustls::pki_types::PrivateKeyDer;
use rustls::pki_types::pem::PemObject as _;

pub type Client = HostAgentServiceClient<HttpClient>;

pub type Certified = (rcgen::Certificate, KeyPair);

type Heartbeats = Arc<Mutex<Vec<Heartbeat>>>;

/// What a certificate with this name says, before it is signed.
pub fn named(name: &str) -> CertificateParams {
    let mut params = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
    params.distinguished_name.push(DnType::CommonName, name);
    params
}

pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pub pem: String,
}

impl Authority {
    pub fn new() -> Self {
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let pem = params.self_signed(&key).unwrap().pem();
        Self { issuer: Issuer::new(params, key), pem }
    }

    pub fn certificate(&self, name: &str) -> Certified {
        self.sign(named(name))
    }

    pub fn sign(&self, params: CertificateParams) -> Certified {
        let key = KeyPair::generate().unwrap();
        (params.signed_by(&key, &self.issuer).unwrap(), key)
    }

    /// A client that trusts this authority and shows a certificate.
    pub fn client(&self, shown: Option<Certified>, url: &str) -> Client {
        self.client_by(&[&rustls::version::TLS13], shown, url)
    }

    pub fn client_by(
        &self,
        versions: &[&'static rustls::SupportedProtocolVersion],
        shown: Option<Certified>,
        url: &str,
    ) -> Client {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(rustls::pki_types::CertificateDer::from_pem_slice(self.pem.as_bytes()).unwrap()).unwrap();
        let builder = rustls::ClientConfig::builder_with_protocol_versions(versions).with_root_certificates(roots);
        let mut tls = match shown {
            Some((certificate, key)) => {
                let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
                builder.with_client_auth_cert(vec![certificate.der().clone()], key).unwrap()
            }
            None => builder.with_no_client_auth(),
        };
        tls.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        let config = ClientConfig::new(url.parse().unwrap()).with_default_timeout(Duration::from_secs(60));
        HostAgentServiceClient::new(HttpClient::with_tls(Arc::new(tls)), config)
    }

    pub fn control_plane(&self, url: &str) -> Client {
        self.client(Some(self.certificate(CONTROL_PLANE_NAME)), url)
    }
}

/// The host routes of a control plane, on a port of their own.
pub struct Platform {
    pub authority: Arc<Authority>,
    pub url: String,
    pub heartbeats: Heartbeats,
}

impl Platform {
    pub async fn start() -> Self {
        let authority = Arc::new(Authority::new());
        let heartbeats = Heartbeats::default();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let app = axum::Router::new().fallback(answer).with_state((authority.clone(), heartbeats.clone()));
        tokio::spawn(async move { axum::serve(listener, app).await });
        Self { authority, url, heartbeats }
    }
}

async fn answer(
    State((authority, heartbeats)): State<(Arc<Authority>, Heartbeats)>,
    uri: Uri,
    body: Bytes,
) -> axum::response::Response {
    if uri.path().ends_with("/heartbeat") {
        heartbeats.lock().unwrap().push(serde_json::from_slice(&body).unwrap());
        return axum::Json(serde_json::json!({ "epoch": 1 })).into_response();
    }
    let body: serde_json::Value = serde_json::from_slice(&body).unwrap();
    let request = CertificateSigningRequestParams::from_pem(body["csr_pem"].as_str().unwrap()).unwrap();
    let certificate = request.signed_by(&authority.issuer).unwrap();
    axum::Json(serde_json::json!({
        "host": {
            "id": "host-1", "type": "regular", "status": "online", "created_by": "x",
            "created_at": Utc::now(), "updated_at": Utc::now(),
        },
        "token": "jwt",
        "token_expires_at": Utc::now() + TimeDelta::days(30),
        "cert_pem": certificate.pem(),
        "ca_cert_pem": authority.pem,
        "epoch": 1,
    }))
    .into_response()
}
