//! The platform's own certificate authority: certificates for host agents, and the control plane's client certificate.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use api::host::{CONTROL_PLANE_NAME, host_name};
use chrono::{DateTime, Utc};
use model::ids::HostId;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, PublicKeyData as _, SanType,
};
use rustls_pki_types::PrivateKeyDer;
use serde::{Deserialize, Serialize};
use store::{Store, StoreError};

use crate::secrets::{Secret, sha256};

const NAME: &str = "ca";
/// Ten years: replacing the authority means registering every host again.
const AUTHORITY_LIFE: Duration = Duration::from_secs(3650 * 86_400);
/// As long as the host's token, and renewed with it.
const HOST_LIFE: Duration = Duration::from_secs(30 * 86_400);
/// A replica makes itself a new one at each start and once a day.
const CLIENT_LIFE: Duration = Duration::from_secs(7 * 86_400);
/// Clocks of hosts may be behind by so much.
const CLOCK_SKEW_MAX: Duration = Duration::from_secs(3600);

#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(
        "the platform's secret is not the one that this database was set up with: restore WRENN_DIR/secret, or WRENN_SECRET"
    )]
    OtherSecret,
    #[error("the certificate authority in the database is damaged")]
    Damaged,
    #[error("make a certificate")]
    Make(#[from] rcgen::Error),
    #[error("set up TLS")]
    Tls(#[from] rustls::Error),
}

#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    #[error("is not a PKCS#10 certificate request in PEM, signed by its own key")]
    Malformed,
}

#[derive(Serialize, Deserialize)]
struct Kept {
    certificate_pem: String,
    key_pem: String,
}

pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pub certificate_pem: String,
}

/// A host's request, whose signature has been checked.
pub struct HostRequest {
    params: CertificateSigningRequestParams,
}

impl Authority {
    /// The one that the database keeps; made at the first start.
    pub async fn load_or_make(store: &Store, secret: &Secret) -> Result<Self, AuthorityError> {
        let sealed = match store.keyring_get(NAME).await? {
            Some(sealed) => sealed,
            None => {
                let kept = serde_json::to_vec(&make()?).expect("two texts are JSON");
                store.keyring_keep(NAME, &secret.seal(&kept, NAME)).await?
            }
        };
        let kept = secret.open(&sealed, NAME).map_err(|_| AuthorityError::OtherSecret)?;
        let kept: Kept = serde_json::from_slice(&kept).map_err(|_| AuthorityError::Damaged)?;
        let key = KeyPair::from_pem(&kept.key_pem).map_err(|_| AuthorityError::Damaged)?;
        let issuer = Issuer::from_ca_cert_pem(&kept.certificate_pem, key).map_err(|_| AuthorityError::Damaged)?;
        Ok(Self { issuer, certificate_pem: kept.certificate_pem })
    }

    /// A server certificate for the host's key, with the host's name and at its address. Of the request nothing but the key is taken.
    pub fn sign_host(
        &self,
        request: HostRequest,
        host: HostId,
        address: &str,
        now: DateTime<Utc>,
    ) -> Result<String, AuthorityError> {
        let mut params = request.params;
        let mut fresh = lasting(HOST_LIFE, now);
        fresh.distinguished_name.push(DnType::CommonName, "wrenn-agent");
        let address = match address.parse::<IpAddr>() {
            Ok(ip) => SanType::IpAddress(ip),
            Err(_) => SanType::DnsName(address.try_into()?),
        };
        fresh.subject_alt_names = vec![SanType::DnsName(host_name(host).try_into()?), address];
        fresh.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        fresh.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.params = fresh;
        Ok(params.signed_by(&self.issuer)?.pem())
    }

    /// How the control plane calls agents: with a certificate of its own name, trusting this authority alone.
    pub fn client_config(&self, now: DateTime<Utc>) -> Result<Arc<rustls::ClientConfig>, AuthorityError> {
        let key = KeyPair::generate()?;
        let mut params = lasting(CLIENT_LIFE, now);
        params.distinguished_name.push(DnType::CommonName, CONTROL_PLANE_NAME);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        let certificate = params.signed_by(&key, &self.issuer)?;
        let mut roots = rustls::RootCertStore::empty();
        let (_, pem) =
            x509_parser::pem::parse_x509_pem(self.certificate_pem.as_bytes()).map_err(|_| AuthorityError::Damaged)?;
        roots.add(pem.contents.into())?;
        let key = PrivateKeyDer::try_from(key.serialize_der()).map_err(|_| AuthorityError::Damaged)?;
        // Both sides are ours: nothing older is spoken.
        let mut config = rustls::ClientConfig::builder_with_protocol_versions(&[&rustls::version::TLS13])
            .with_root_certificates(roots)
            .with_client_auth_cert(vec![certificate.der().clone()], key)?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(Arc::new(config))
    }
}

impl HostRequest {
    pub fn parse(pem: &str) -> Result<Self, RequestError> {
        let params = CertificateSigningRequestParams::from_pem(pem).map_err(|_| RequestError::Malformed)?;
        Ok(Self { params })
    }

    /// SHA-256 of the public key.
    pub fn key_hash(&self) -> [u8; 32] {
        sha256(self.params.public_key.der_bytes())
    }
}

fn make() -> Result<Kept, rcgen::Error> {
    let key = KeyPair::generate()?;
    let mut params = lasting(AUTHORITY_LIFE, Utc::now());
    params.distinguished_name.push(DnType::CommonName, "wrenn platform authority");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    Ok(Kept { certificate_pem: params.self_signed(&key)?.pem(), key_pem: key.serialize_pem() })
}

fn lasting(life: Duration, now: DateTime<Utc>) -> CertificateParams {
    let now = std::time::SystemTime::from(now);
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.not_before = (now - CLOCK_SKEW_MAX).into();
    params.not_after = (now + life).into();
    params
}
