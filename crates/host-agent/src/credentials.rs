//! Who this host is to the control plane: its key, which never leaves the host, its certificate, its JWT.
//!
//! `host-token` is written last: where it is, the rest is too. Nothing here removes a credential; a refused one is kept for the
//! operator.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use api::host::host_name;
use api::v1::hosts::HostCredentials;
use chrono::{DateTime, Utc};
use rcgen::{CertificateParams, DnType, KeyPair, SanType};
use serde::{Deserialize, Serialize};
use url::Url;
use x509_parser::extensions::GeneralName;

use crate::durable;

const FILE_BYTES_MAX: u64 = 256 * 1024;

/// The content of `host-token`.
#[derive(Clone, Serialize, Deserialize)]
pub struct HostToken {
    pub format: u32,
    pub host_id: String,
    pub token: String,
    pub token_issued_at: DateTime<Utc>,
    pub token_expires_at: DateTime<Utc>,
    /// The highest epoch of this host that the agent has seen.
    pub epoch: u64,
    pub cp_url: Url,
    pub address: String,
    /// BLAKE3 of the registration token, so that a start with the same `--register` is known to be a repetition.
    #[serde(default)]
    pub registered_with: String,
}

impl std::fmt::Debug for HostToken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HostToken").field("host_id", &self.host_id).field("epoch", &self.epoch).finish_non_exhaustive()
    }
}

#[derive(Debug, Clone)]
pub struct Credentials {
    pub host: HostToken,
    pub cert_pem: String,
    pub ca_pem: String,
    pub key_pem: KeyPem,
}

/// A private key; its Debug says nothing.
#[derive(Clone)]
pub struct KeyPem(pub String);

impl std::fmt::Debug for KeyPem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("KeyPem(..)")
    }
}

#[derive(Debug, thiserror::Error)]
pub enum CredentialsError {
    #[error("read {path}")]
    Read {
        path: PathBuf,
        #[source]
        cause: io::Error,
    },
    #[error("write {path}")]
    Write {
        path: PathBuf,
        #[source]
        cause: io::Error,
    },
    #[error(
        "{path} is damaged; restore it, or register this host anew: `wrenn host token ID` gives a token for wrenn-agent --register"
    )]
    Damaged { path: PathBuf },
    #[error("make a key and a certificate request for {address}")]
    Request {
        address: String,
        #[source]
        cause: rcgen::Error,
    },
}

/// The credential files of one WRENN_DIR.
#[derive(Debug, Clone)]
pub struct Files {
    dir: PathBuf,
    /// Held by who writes: two at once would write into one temporary file.
    turn: Arc<Mutex<()>>,
}

impl Files {
    pub fn new(dir: &Path) -> Self {
        Self { dir: dir.to_owned(), turn: Arc::default() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// None when this host was never registered.
    pub fn load(&self) -> Result<Option<Credentials>, CredentialsError> {
        let path = self.path("host-token");
        let bytes = match durable::read(&path, FILE_BYTES_MAX) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(cause) => return Err(CredentialsError::Read { path, cause }),
        };
        let host: HostToken = serde_json::from_slice(&bytes).map_err(|_| CredentialsError::Damaged { path })?;
        Ok(Some(Credentials {
            host,
            cert_pem: self.text("host-cert.pem")?,
            ca_pem: self.text("ca.pem")?,
            key_pem: KeyPem(self.text("host-key.pem")?),
        }))
    }

    fn text(&self, name: &str) -> Result<String, CredentialsError> {
        let path = self.path(name);
        let bytes = durable::read(&path, FILE_BYTES_MAX)
            .map_err(|cause| CredentialsError::Read { path: path.clone(), cause })?;
        String::from_utf8(bytes).map_err(|_| CredentialsError::Damaged { path })
    }

    /// The host's key; made once and kept before it is first used, so that a registration whose answer was lost can be repeated with it.
    pub fn key(&self) -> Result<KeyPair, CredentialsError> {
        let path = self.path("host-key.pem");
        if path.exists() {
            return KeyPair::from_pem(&self.text("host-key.pem")?).map_err(|_| CredentialsError::Damaged { path });
        }
        let key = KeyPair::generate().map_err(|cause| CredentialsError::Request { address: String::new(), cause })?;
        self.write("host-key.pem", key.serialize_pem().as_bytes(), 0o600)?;
        Ok(key)
    }

    pub fn save(&self, credentials: &Credentials) -> Result<(), CredentialsError> {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        self.write("ca.pem", credentials.ca_pem.as_bytes(), 0o644)?;
        self.write("host-cert.pem", credentials.cert_pem.as_bytes(), 0o644)?;
        self.write_token(&credentials.host)
    }

    /// Raises the epoch in what is there: credentials that were renewed meanwhile stay.
    pub fn note_epoch(&self, epoch: u64) -> Result<(), CredentialsError> {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        match self.load()? {
            Some(Credentials { host, .. }) if host.epoch < epoch => self.write_token(&HostToken { epoch, ..host }),
            _ => Ok(()),
        }
    }

    fn write_token(&self, host: &HostToken) -> Result<(), CredentialsError> {
        let token = serde_json::to_vec_pretty(host).expect("a token has only text and numbers");
        self.write("host-token", &token, 0o600)
    }

    fn write(&self, name: &str, bytes: &[u8], mode: u32) -> Result<(), CredentialsError> {
        let path = self.path(name);
        durable::write(&path, bytes, mode).map_err(|cause| CredentialsError::Write { path, cause })
    }
}

impl Credentials {
    pub fn from_answer(
        answer: HostCredentials,
        key: &KeyPair,
        cp_url: &Url,
        address: &str,
        registered_with: &str,
    ) -> Self {
        Self {
            host: HostToken {
                format: 1,
                host_id: answer.host.id,
                token: answer.token,
                token_issued_at: SystemTime::now().into(),
                token_expires_at: answer.token_expires_at,
                epoch: answer.epoch,
                cp_url: cp_url.clone(),
                address: address.to_owned(),
                registered_with: registered_with.to_owned(),
            },
            cert_pem: answer.cert_pem,
            ca_pem: answer.ca_cert_pem,
            key_pem: KeyPem(key.serialize_pem()),
        }
    }

    /// Whether the certificate says which host this is.
    pub fn bear_the_name(&self) -> bool {
        bears_name(&self.cert_pem, &host_name(&self.host.host_id))
    }

    /// A third of the life of the JWT or of the certificate, or less, is left; or the address is another one.
    pub fn wants_renewal(&self, now: DateTime<Utc>, address: &str) -> bool {
        let last_third = |from: DateTime<Utc>, until: DateTime<Utc>| now >= until - (until - from) / 3;
        self.host.address != address
            || last_third(self.host.token_issued_at, self.host.token_expires_at)
            // A certificate that cannot be read is as good as expired.
            || certificate_life(&self.cert_pem).is_none_or(|(from, until)| last_third(from, until))
    }
}

/// Whether the certificate bears the host's name, by which the control plane knows who answers. Those of versions before do not.
fn bears_name(pem: &str, name: &str) -> bool {
    let Ok((_, pem)) = x509_parser::pem::parse_x509_pem(pem.as_bytes()) else { return false };
    let Ok(certificate) = pem.parse_x509() else { return false };
    let names = certificate.subject_alternative_name().ok().flatten();
    names.is_some_and(|names| names.value.general_names.contains(&GeneralName::DNSName(name)))
}

/// A request for a server certificate for `address`.
pub fn certificate_request(key: &KeyPair, address: &str) -> Result<String, CredentialsError> {
    let failed = |cause| CredentialsError::Request { address: address.to_owned(), cause };
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host).trim_matches(['[', ']']);
    let name = match host.parse() {
        Ok(ip) => SanType::IpAddress(ip),
        Err(_) => SanType::DnsName(host.to_owned().try_into().map_err(failed)?),
    };
    let mut params = CertificateParams::default();
    params.subject_alt_names = vec![name];
    params.distinguished_name.push(DnType::CommonName, "wrenn-agent");
    params.serialize_request(key).and_then(|request| request.pem()).map_err(failed)
}

pub fn fingerprint(token: &str) -> String {
    blake3::hash(token.as_bytes()).to_hex().to_string()
}

fn certificate_life(pem: &str) -> Option<(DateTime<Utc>, DateTime<Utc>)> {
    let (_, pem) = x509_parser::pem::parse_x509_pem(pem.as_bytes()).ok()?;
    let certificate = pem.parse_x509().ok()?;
    let validity = certificate.validity();
    let instant = |at: x509_parser::time::ASN1Time| DateTime::from_timestamp(at.timestamp(), 0);
    Some((instant(validity.not_before)?, instant(validity.not_after)?))
}

#[cfg(test)]
mod tests {
    use chrono::TimeDelta;

    use super::*;

    pub fn credentials(files: &Files, life: TimeDelta) -> Credentials {
        let key = files.key().unwrap();
        let mut params = CertificateParams::new(vec!["10.0.0.5".to_owned()]).unwrap();
        params.not_before = std::time::SystemTime::from(Utc::now()).into();
        params.not_after = std::time::SystemTime::from(Utc::now() + life).into();
        let pem = params.self_signed(&key).unwrap().pem();
        Credentials {
            host: HostToken {
                format: 1,
                host_id: "host-1".to_owned(),
                token: "jwt".to_owned(),
                token_issued_at: Utc::now(),
                token_expires_at: Utc::now() + life,
                epoch: 1,
                cp_url: "http://127.0.0.1:1".parse().unwrap(),
                address: "10.0.0.5:50051".to_owned(),
                registered_with: String::new(),
            },
            cert_pem: pem.clone(),
            ca_pem: pem,
            key_pem: KeyPem(key.serialize_pem()),
        }
    }

    #[test]
    fn renews_in_the_last_third_and_for_another_address() {
        let dir = tempfile::tempdir().unwrap();
        let credentials = credentials(&Files::new(dir.path()), TimeDelta::days(30));
        let address = "10.0.0.5:50051";
        let now = Utc::now();
        assert!(!credentials.wants_renewal(now + TimeDelta::days(19), address));
        assert!(credentials.wants_renewal(now + TimeDelta::days(21), address));
        assert!(credentials.wants_renewal(now, "10.0.0.6:50051"));
        let broken = Credentials { cert_pem: "x".to_owned(), ..credentials };
        assert!(broken.wants_renewal(now, address));
    }

    #[test]
    fn comes_back_as_saved_and_only_for_its_owner() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().unwrap();
        let files = Files::new(dir.path());
        assert!(files.load().unwrap().is_none());
        let saved = credentials(&files, TimeDelta::days(30));
        files.save(&saved).unwrap();
        let loaded = files.load().unwrap().unwrap();
        assert_eq!(loaded.host.token, "jwt");
        assert_eq!(loaded.key_pem.0, saved.key_pem.0);
        for name in ["host-token", "host-key.pem"] {
            let mode = std::fs::metadata(dir.path().join(name)).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600, "{name}");
        }
        std::fs::write(dir.path().join("host-token"), "{").unwrap();
        assert!(matches!(files.load(), Err(CredentialsError::Damaged { .. })));
    }

    #[test]
    fn an_epoch_and_a_renewal_do_not_take_each_other_back() {
        let dir = tempfile::tempdir().unwrap();
        let files = Files::new(dir.path());
        let old = credentials(&files, TimeDelta::days(30));
        files.save(&old).unwrap();
        std::thread::scope(|scope| {
            for epoch in 2..20 {
                let files = files.clone();
                scope.spawn(move || files.note_epoch(epoch).unwrap());
            }
        });
        let fresh = Credentials { host: HostToken { token: "fresh".to_owned(), epoch: 19, ..old.host }, ..old };
        files.save(&fresh).unwrap();
        files.note_epoch(7).unwrap();
        files.note_epoch(21).unwrap();
        let loaded = files.load().unwrap().unwrap().host;
        assert_eq!((loaded.epoch, loaded.token.as_str()), (21, "fresh"));
    }

    #[test]
    fn the_key_is_made_once() {
        let dir = tempfile::tempdir().unwrap();
        let files = Files::new(dir.path());
        assert_eq!(files.key().unwrap().serialize_pem(), files.key().unwrap().serialize_pem());
        for address in ["10.0.0.5:50051", "[2001:db8::5]:50051", "host.example:50051"] {
            assert!(certificate_request(&files.key().unwrap(), address).unwrap().contains("CERTIFICATE REQUEST"));
        }
    }
}
