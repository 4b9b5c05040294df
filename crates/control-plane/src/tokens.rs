//! What people and machines show: JWTs of users and of hosts, API keys, registration tokens.

use chrono::{DateTime, TimeDelta, Utc};
use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation};
use model::ids::{HostId, UserId};
use serde::{Deserialize, Serialize};

use crate::secrets::{Purpose, Secret, sha256};

/// A person logs in again once a day until sessions come.
const USER_LIFE: TimeDelta = TimeDelta::hours(24);
const HOST_LIFE: TimeDelta = TimeDelta::days(30);
/// No token of ours is longer; more is not looked at.
pub const TOKEN_BYTES_MAX: usize = 4096;

/// Signs and checks. Each kind has a key of its own, so that a host's token is no user's.
pub struct Tokens {
    user: Keys,
    host: Keys,
}

struct Keys {
    sign: EncodingKey,
    check: DecodingKey,
}

#[derive(Serialize, Deserialize)]
struct Claims {
    sub: String,
    typ: String,
    iat: i64,
    exp: i64,
}

impl Tokens {
    pub fn new(secret: &Secret) -> Self {
        let keys = |purpose| {
            let key = secret.key(purpose);
            Keys { sign: EncodingKey::from_secret(&key), check: DecodingKey::from_secret(&key) }
        };
        Self { user: keys(Purpose::UserTokens), host: keys(Purpose::HostTokens) }
    }

    pub fn for_user(&self, user: UserId, now: DateTime<Utc>) -> String {
        issue(&self.user, &user.to_string(), "user", now, USER_LIFE).0
    }

    pub fn for_host(&self, host: HostId, now: DateTime<Utc>) -> (String, DateTime<Utc>) {
        issue(&self.host, &host.to_string(), "host", now, HOST_LIFE)
    }

    pub fn user(&self, token: &str) -> Option<UserId> {
        subject(&self.user, token, "user")?.parse().ok()
    }

    pub fn host(&self, token: &str) -> Option<HostId> {
        subject(&self.host, token, "host")?.parse().ok()
    }
}

fn issue(keys: &Keys, sub: &str, typ: &str, now: DateTime<Utc>, life: TimeDelta) -> (String, DateTime<Utc>) {
    let until = now + life;
    let claims = Claims { sub: sub.to_owned(), typ: typ.to_owned(), iat: now.timestamp(), exp: until.timestamp() };
    let token = jsonwebtoken::encode(&Header::new(Algorithm::HS256), &claims, &keys.sign)
        .expect("texts and numbers are signed by HMAC without a failure");
    (token, until)
}

fn subject(keys: &Keys, token: &str, typ: &str) -> Option<String> {
    if token.len() > TOKEN_BYTES_MAX {
        return None;
    }
    let mut validation = Validation::new(Algorithm::HS256);
    validation.leeway = 5;
    let claims = jsonwebtoken::decode::<Claims>(token, &keys.check, &validation).ok()?.claims;
    (claims.typ == typ).then_some(claims.sub)
}

/// `wrn_` or `e2b_` and 64 lower-case hex digits; both spellings open the same.
pub fn api_key_hash(key: &str) -> Option<[u8; 32]> {
    let digits = key.strip_prefix("wrn_").or_else(|| key.strip_prefix("e2b_"))?;
    let is_hex = digits.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
    (is_hex && digits.len() == 64).then(|| hex::decode(digits).ok()).flatten().map(|bytes| sha256(&bytes))
}

/// The key of these random bytes, its hash and the part that is shown.
pub fn api_key(bytes: &[u8; 32]) -> (String, [u8; 32], String) {
    let key = format!("wrn_{}", hex::encode(bytes));
    let prefix = key[..10].to_owned();
    (key, sha256(bytes), prefix)
}

/// The registration token of these random bytes and its hash.
pub fn registration_token(bytes: &[u8; 32]) -> (String, [u8; 32]) {
    (format!("wrnreg_{}", hex::encode(bytes)), sha256(bytes))
}

pub fn registration_token_hash(token: &str) -> Option<[u8; 32]> {
    let digits = token.strip_prefix("wrnreg_").filter(|digits| digits.len() == 64)?;
    hex::decode(digits).ok().map(|bytes| sha256(&bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_opens_for_its_kind_and_until_its_end() {
        let secret = Secret::parse(&"ab".repeat(32), "here").unwrap();
        let tokens = Tokens::new(&secret);
        let user = UserId(uuid::Uuid::new_v4());
        let host = HostId(uuid::Uuid::new_v4());
        assert_eq!(tokens.user(&tokens.for_user(user, Utc::now())), Some(user));
        assert_eq!(tokens.host(&tokens.for_host(host, Utc::now()).0), Some(host));
        assert_eq!(tokens.user(&tokens.for_host(host, Utc::now()).0), None);
        assert_eq!(tokens.host(&tokens.for_user(user, Utc::now())), None);
        assert_eq!(tokens.user(&tokens.for_user(user, Utc::now() - TimeDelta::hours(25))), None);
        let others = Tokens::new(&Secret::parse(&"cd".repeat(32), "here").unwrap());
        assert_eq!(others.user(&tokens.for_user(user, Utc::now())), None);
        // The header's word for the algorithm is not believed.
        let unsigned =
            "eyJhbGciOiJub25lIiwidHlwIjoiSldUIn0.eyJzdWIiOiJ4IiwidHlwIjoidXNlciIsImlhdCI6MCwiZXhwIjo5OTk5OTk5OTk5fQ.";
        assert_eq!(tokens.user(unsigned), None);
    }

    #[test]
    fn both_spellings_of_a_key_are_one() {
        let (key, hash, prefix) = api_key(&[0xab; 32]);
        assert_eq!(api_key_hash(&key), Some(hash));
        assert_eq!(api_key_hash(&key.replace("wrn_", "e2b_")), Some(hash));
        assert_eq!(prefix, "wrn_ababab");
        for wrong in ["", "wrn_", "wrn_ab", &key.to_uppercase(), &format!("{key}0"), &key[4..]] {
            assert_eq!(api_key_hash(wrong), None, "{wrong:?}");
        }
    }
}
