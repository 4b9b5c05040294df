//! The platform's secret and what is derived from it: a key of its own for each purpose, so that none can be used for another.

use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use aws_lc_rs::aead::{AES_256_GCM, Aad, NONCE_LEN, Nonce, RandomizedNonceKey};
use aws_lc_rs::{hkdf, hmac};
use rand::RngCore as _;
use sha2::{Digest as _, Sha256};

/// 32 bytes.
#[derive(Clone)]
pub struct Secret([u8; 32]);

#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    #[error("{place}: is not 64 hex digits; restore it: without it nothing that the platform has sealed can be opened")]
    Malformed { place: String },
    #[error("{path}: cannot be read or made; WRENN_DIR must be a directory that this program may write to")]
    File {
        path: PathBuf,
        #[source]
        cause: std::io::Error,
    },
}

#[derive(Debug, thiserror::Error)]
#[error("sealed by another secret, or damaged")]
pub struct CannotOpen;

#[derive(Debug, Clone, Copy)]
pub enum Purpose {
    UserTokens,
    HostTokens,
    HostTickets,
    Keyring,
    /// Secrets that a repeated call must be given again.
    Repeatable,
    /// Where pages of lists begin.
    Cursors,
}

impl Purpose {
    fn label(self) -> &'static str {
        match self {
            Self::UserTokens => "wrenn user tokens",
            Self::HostTokens => "wrenn host tokens",
            Self::HostTickets => "wrenn host tickets",
            Self::Keyring => "wrenn keyring",
            Self::Repeatable => "wrenn repeatable secrets",
            Self::Cursors => "wrenn cursors",
        }
    }
}

impl Secret {
    pub fn parse(text: &str, place: &str) -> Result<Self, SecretError> {
        let bytes = hex::decode(text.trim()).ok().and_then(|bytes| bytes.try_into().ok());
        bytes.map(Self).ok_or_else(|| SecretError::Malformed { place: place.to_owned() })
    }

    /// The file `secret` of a directory.
    pub fn load(dir: &Path) -> Result<Option<Self>, SecretError> {
        let path = dir.join("secret");
        match std::fs::read_to_string(&path) {
            Ok(text) => Self::parse(&text, &path.display().to_string()).map(Some),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(cause) => Err(SecretError::File { path, cause }),
        }
    }

    /// Made at the first start: whole or not at all, and never over one that is there.
    pub fn load_or_make(dir: &Path) -> Result<Self, SecretError> {
        if let Some(secret) = Self::load(dir)? {
            return Ok(secret);
        }
        let path = dir.join("secret");
        make(dir, &path).map_err(|cause| SecretError::File { path: path.clone(), cause })?;
        Self::load(dir)?.ok_or_else(|| SecretError::File { path, cause: std::io::ErrorKind::NotFound.into() })
    }

    pub fn key(&self, purpose: Purpose) -> [u8; 32] {
        let salt = hkdf::Salt::new(hkdf::HKDF_SHA256, b"wrenn");
        let mut key = [0; 32];
        salt.extract(&self.0)
            .expand(&[purpose.label().as_bytes()], hkdf::HKDF_SHA256)
            .and_then(|material| material.fill(&mut key))
            .expect("32 bytes are one block of HKDF-SHA256");
        key
    }

    /// Nonce in front.
    pub fn seal(&self, plain: &[u8], name: &str) -> Vec<u8> {
        let mut sealed = plain.to_vec();
        let nonce = self
            .sealing_key()
            .seal_in_place_append_tag(Aad::from(name.as_bytes()), &mut sealed)
            .expect("sealing fails only for gigabytes");
        let mut whole = nonce.as_ref().to_vec();
        whole.append(&mut sealed);
        whole
    }

    pub fn open(&self, sealed: &[u8], name: &str) -> Result<Vec<u8>, CannotOpen> {
        let (nonce, sealed) = sealed.split_at_checked(NONCE_LEN).ok_or(CannotOpen)?;
        let nonce = Nonce::try_assume_unique_for_key(nonce).map_err(|_| CannotOpen)?;
        let mut sealed = sealed.to_vec();
        let plain =
            self.sealing_key().open_in_place(nonce, Aad::from(name.as_bytes()), &mut sealed).map_err(|_| CannotOpen)?;
        Ok(plain.to_vec())
    }

    fn sealing_key(&self) -> RandomizedNonceKey {
        RandomizedNonceKey::new(&AES_256_GCM, &self.key(Purpose::Keyring)).expect("the key has 32 bytes")
    }

    /// 32 bytes that are the same for the same call, and that nobody without the secret can tell.
    pub fn repeatable(&self, parts: &[&[u8]]) -> [u8; 32] {
        self.mac(Purpose::Repeatable, parts)
    }

    /// What only who has the secret can make of these parts, for this purpose.
    pub fn mac(&self, purpose: Purpose, parts: &[&[u8]]) -> [u8; 32] {
        let mut context = hmac::Context::with_key(&hmac::Key::new(hmac::HMAC_SHA256, &self.key(purpose)));
        for part in parts {
            context.update(&part.len().to_be_bytes());
            context.update(part);
        }
        context.sign().as_ref().try_into().expect("HMAC-SHA256 has 32 bytes")
    }
}

fn make(dir: &Path, path: &Path) -> std::io::Result<()> {
    std::fs::create_dir_all(dir)?;
    let temporary = dir.join(format!(".secret.{}", std::process::id()));
    let mut file = std::fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
    file.write_all(hex::encode(random_32()).as_bytes())?;
    file.sync_all()?;
    // A link, not a rename: of two first starts one wins, and both read the winner's.
    let linked = std::fs::hard_link(&temporary, path);
    std::fs::remove_file(&temporary)?;
    match linked {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => Err(error),
        _ => std::fs::File::open(dir)?.sync_all(),
    }
}

pub fn random_32() -> [u8; 32] {
    let mut bytes = [0; 32];
    rand::rng().fill_bytes(&mut bytes);
    bytes
}

pub fn sha256(bytes: &[u8]) -> [u8; 32] {
    Sha256::digest(bytes).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_purpose_has_a_key_of_its_own() {
        let secret = Secret([7; 32]);
        assert_ne!(secret.key(Purpose::UserTokens), secret.key(Purpose::HostTokens));
        assert_ne!(secret.repeatable(&[b"ab", b"c"]), secret.repeatable(&[b"a", b"bc"]));
    }

    #[test]
    fn what_is_sealed_opens_only_with_the_same_secret_and_name() {
        let secret = Secret([7; 32]);
        let sealed = secret.seal(b"key", "ca");
        assert_eq!(secret.open(&sealed, "ca").unwrap(), b"key");
        assert!(secret.open(&sealed, "cb").is_err());
        assert!(Secret([8; 32]).open(&sealed, "ca").is_err());
        assert!(secret.open(&sealed[..5], "ca").is_err());
        assert_ne!(secret.seal(b"key", "ca"), sealed);
    }

    #[test]
    fn the_file_is_made_once() {
        let dir = tempfile::tempdir().unwrap();
        assert!(Secret::load(dir.path()).unwrap().is_none());
        let first = Secret::load_or_make(dir.path()).unwrap();
        assert_eq!(Secret::load_or_make(dir.path()).unwrap().0, first.0);
        std::fs::write(dir.path().join("secret"), "abc").unwrap();
        assert!(matches!(Secret::load_or_make(dir.path()), Err(SecretError::Malformed { .. })));
    }
}
