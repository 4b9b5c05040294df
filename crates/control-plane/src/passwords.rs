//! Passwords: argon2id, off the async workers, and few at a time, because each takes 19 MiB and tens of milliseconds.

use std::time::Duration;

use argon2::password_hash::phc::PasswordHash;
use argon2::{Argon2, PasswordHasher as _, PasswordVerifier as _};
use tokio::sync::Semaphore;

/// Hashes at once; who comes later waits, or is told that the platform is busy.
const AT_ONCE: usize = 2;
const WAIT_MAX: Duration = Duration::from_secs(5);
pub const PASSWORD_BYTES_MAX: usize = 1024;
pub const PASSWORD_CHARS_MIN: usize = 8;

static ROOM: Semaphore = Semaphore::const_new(AT_ONCE);

pub async fn hash(password: &str) -> String {
    let _permit = ROOM.acquire().await.expect("the semaphore is never closed");
    let password = password.to_owned();
    tokio::task::spawn_blocking(move || {
        Argon2::default().hash_password(password.as_bytes()).expect("the default parameters fit").to_string()
    })
    .await
    .expect("hashing does not panic")
}

/// For callers who must not wait for long. None: too many ask at once.
pub async fn hash_in_time(password: &str) -> Option<String> {
    tokio::time::timeout(WAIT_MAX, hash(password)).await.ok()
}

/// Takes the same time for an unknown user (no hash) as for a wrong password. None: too many ask at once.
pub async fn verify(password: &str, hash: Option<String>) -> Option<bool> {
    let permit = tokio::time::timeout(WAIT_MAX, ROOM.acquire()).await.ok()?;
    let _permit = permit.expect("the semaphore is never closed");
    let password = password.to_owned();
    let verified = tokio::task::spawn_blocking(move || match hash.as_deref().map(PasswordHash::new) {
        Some(Ok(hash)) => Argon2::default().verify_password(password.as_bytes(), &hash).is_ok(),
        _ => {
            let _ = Argon2::default().hash_password(password.as_bytes());
            false
        }
    })
    .await;
    Some(verified.expect("hashing does not panic"))
}

#[cfg(test)]
mod tests {
    #[tokio::test]
    async fn only_the_same_password_fits() {
        let hash = super::hash("secret").await;
        assert_eq!(super::verify("secret", Some(hash.clone())).await, Some(true));
        assert_eq!(super::verify("Secret", Some(hash)).await, Some(false));
        assert_eq!(super::verify("secret", None).await, Some(false));
    }
}
