//! What people and machines show: JWTs of users and of hosts, API keys, registration tokens.

use aws_lc_rs::hmac;
use chrono::{DateTime, TimeDelta, Utc};
use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation};
use model::ids::{HostId, SessionId, TeamId, UserId};
use serde::{Deserialize, Serialize};

use crate::secrets::{Purpose, Secret, sha256};

/// A working day. Its session can be ended at any moment before.
pub const USER_LIFE: TimeDelta = TimeDelta::hours(12);
const HOST_LIFE: TimeDelta = TimeDelta::days(30);
/// Whom users' tokens are for.
const AUDIENCE: &str = "wrenn-api";
/// No token of ours is longer; more is not looked at.
pub const TOKEN_BYTES_MAX: usize = 4096;

/// Signs and checks. Each kind has a key of its own, so that a host's token is no user's.
pub struct Tokens {
    user: Keys,
    host: Keys,
    tickets: hmac::Key,
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

#[derive(Serialize, Deserialize)]
struct UserClaims {
    sub: String,
    typ: String,
    aud: String,
    sid: String,
    team_id: String,
    iat: i64,
    exp: i64,
}

/// Whom a user's token names. Whether it still holds is in the session's row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Named {
    pub user: UserId,
    pub session: SessionId,
    /// In whose name it acts.
    pub team: TeamId,
}

impl Tokens {
    pub fn new(secret: &Secret) -> Self {
        let keys = |purpose| {
            let key = secret.key(purpose);
            Keys { sign: EncodingKey::from_secret(&key), check: DecodingKey::from_secret(&key) }
        };
        Self {
            user: keys(Purpose::UserTokens),
            host: keys(Purpose::HostTokens),
            tickets: hmac::Key::new(hmac::HMAC_SHA256, &secret.key(Purpose::HostTickets)),
        }
    }

    /// Not longer than its session.
    pub fn for_user(&self, named: Named, now: DateTime<Utc>, session_ends: DateTime<Utc>) -> String {
        let claims = UserClaims {
            sub: named.user.to_string(),
            typ: "user".to_owned(),
            aud: AUDIENCE.to_owned(),
            sid: named.session.to_string(),
            team_id: named.team.to_string(),
            iat: now.timestamp(),
            exp: session_ends.min(now + USER_LIFE).timestamp(),
        };
        sign(&self.user, &claims)
    }

    pub fn for_host(&self, host: HostId, now: DateTime<Utc>) -> (String, DateTime<Utc>) {
        let until = now + HOST_LIFE;
        let claims =
            Claims { sub: host.to_string(), typ: "host".to_owned(), iat: now.timestamp(), exp: until.timestamp() };
        (sign(&self.host, &claims), until)
    }

    pub fn user(&self, token: &str) -> Option<Named> {
        let mut validation = validation();
        validation.set_audience(&[AUDIENCE]);
        validation.set_required_spec_claims(&["exp", "aud", "sub"]);
        let claims: UserClaims = checked(&self.user, token, &validation).filter(|c: &UserClaims| c.typ == "user")?;
        Some(Named {
            user: claims.sub.parse().ok()?,
            session: claims.sid.parse().ok()?,
            team: claims.team_id.parse().ok()?,
        })
    }

    pub fn host(&self, token: &str) -> Option<HostId> {
        let claims: Claims = checked(&self.host, token, &validation())?;
        if claims.typ == "host" { claims.sub.parse().ok() } else { None }
    }

    /// The ticket of an answer to a heartbeat: its number, and what nobody else can make of it. So a number that is newer than the database
    /// is believed: an older database was put back.
    pub fn ticket(&self, host: HostId, number: i64) -> String {
        format!("{number}.{}", hex::encode(hmac::sign(&self.tickets, &ticket_bytes(host, number))))
    }

    /// The number of a ticket; 0 of what is none of this host's, which is as old as can be.
    pub fn ticket_number(&self, host: HostId, ticket: &str) -> i64 {
        let number = || -> Option<i64> {
            let (number, seal) = ticket.split_once('.')?;
            let (number, seal) = (number.parse().ok()?, hex::decode(seal).ok()?);
            hmac::verify(&self.tickets, &ticket_bytes(host, number), &seal).ok()?;
            Some(number)
        };
        number().unwrap_or_default()
    }
}

fn ticket_bytes(host: HostId, number: i64) -> Vec<u8> {
    [host.0.as_bytes().as_slice(), &number.to_be_bytes()].concat()
}

fn sign(keys: &Keys, claims: &impl Serialize) -> String {
    jsonwebtoken::encode(&Header::new(Algorithm::HS256), claims, &keys.sign)
        .expect("texts and numbers are signed by HMAC without a failure")
}

fn validation() -> Validation {
    let mut validation = Validation::new(Algorithm::HS256);
    validation.leeway = 5;
    validation
}

fn checked<T: serde::de::DeserializeOwned>(keys: &Keys, token: &str, validation: &Validation) -> Option<T> {
    if token.len() > TOKEN_BYTES_MAX {
        return None;
    }
    Some(jsonwebtoken::decode(token, &keys.check, validation).ok()?.claims)
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

/// What a browser keeps, and what a mail holds: 64 hex digits of these random bytes, and the hash by which they are known.
pub fn opaque(bytes: &[u8; 32]) -> (String, [u8; 32]) {
    (hex::encode(bytes), sha256(bytes))
}

pub fn opaque_hash(token: &str) -> Option<[u8; 32]> {
    let is_hex = token.len() == 64 && token.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
    is_hex.then(|| hex::decode(token).ok()).flatten().map(|bytes| sha256(&bytes))
}

/// What a page must show beside its cookie: other sites' pages send the cookie and cannot read this.
pub fn csrf_token(cookie: &str) -> String {
    hex::encode(sha256(format!("wrenn csrf {cookie}").as_bytes()))
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

    fn named() -> Named {
        let id = uuid::Uuid::new_v4();
        Named { user: UserId(id), session: SessionId(id), team: TeamId(id) }
    }

    #[test]
    fn a_token_opens_for_its_kind_and_until_its_end() {
        let secret = Secret::parse(&"ab".repeat(32), "here").unwrap();
        let tokens = Tokens::new(&secret);
        let (now, hour) = (Utc::now(), TimeDelta::hours(1));
        let (user, host) = (named(), HostId(uuid::Uuid::new_v4()));
        let good = tokens.for_user(user, now, now + hour);
        assert_eq!(tokens.user(&good), Some(user));
        assert_eq!(tokens.host(&tokens.for_host(host, now).0), Some(host));
        assert_eq!(tokens.user(&tokens.for_host(host, now).0), None);
        assert_eq!(tokens.host(&good), None);
        assert_eq!(tokens.user(&tokens.for_user(user, now - hour * 13, now + hour)), None, "a working day is over");
        assert_eq!(tokens.user(&tokens.for_user(user, now - hour, now - hour / 2)), None, "its session is over");
        let others = Tokens::new(&Secret::parse(&"cd".repeat(32), "here").unwrap());
        assert_eq!(others.user(&good), None);
    }

    /// What is signed by the right key and says something else than it must.
    #[test]
    fn a_token_must_say_all_of_it() {
        let tokens = Tokens::new(&Secret::parse(&"ab".repeat(32), "here").unwrap());
        let right = serde_json::json!({
            "sub": named().user.to_string(), "typ": "user", "aud": AUDIENCE, "sid": named().session.to_string(),
            "team_id": named().team.to_string(), "iat": 0, "exp": 9_999_999_999_i64,
        });
        assert!(tokens.user(&sign(&tokens.user, &right)).is_some());
        for (claim, wrong) in [
            ("aud", serde_json::json!("wrenn-host")),
            ("aud", serde_json::Value::Null),
            ("typ", serde_json::json!("host")),
            ("sid", serde_json::json!("")),
            ("sid", right["sub"].clone()),
            ("sub", serde_json::json!("host-0000000000000000000000000")),
            ("exp", serde_json::json!(1)),
            ("exp", serde_json::json!("never")),
            ("exp", serde_json::Value::Null),
            ("team_id", serde_json::json!("../x")),
        ] {
            let mut claims = right.clone();
            if wrong.is_null() {
                claims.as_object_mut().unwrap().remove(claim);
            } else {
                claims[claim] = wrong.clone();
            }
            assert_eq!(tokens.user(&sign(&tokens.user, &claims)), None, "{claim} = {wrong}");
        }
    }

    /// The header's word for the algorithm, and for where a key lies, is not believed.
    #[test]
    fn the_algorithm_is_ours() {
        use base64::Engine as _;
        let tokens = Tokens::new(&Secret::parse(&"ab".repeat(32), "here").unwrap());
        let now = Utc::now();
        let good = tokens.for_user(named(), now, now + TimeDelta::hours(1));
        let parts: Vec<&str> = good.split('.').collect();
        let encode = |text: &str| base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(text);
        for header in [
            r#"{"alg":"none","typ":"JWT"}"#,
            r#"{"alg":"None"}"#,
            r#"{"alg":"HS384","typ":"JWT"}"#,
            r#"{"alg":"RS256","typ":"JWT"}"#,
            r#"{"alg":"ES256","typ":"JWT"}"#,
            r#"{"alg":"HS256","kid":"../../dev/null","jku":"http://127.0.0.1/keys"}"#,
            r#"{"alg":["HS256"]}"#,
            "{}",
        ] {
            for signature in [parts[2], ""] {
                let token = format!("{}.{}.{signature}", encode(header), parts[1]);
                assert_eq!(tokens.user(&token), None, "{header}");
            }
        }
        let body = format!("{}.{}", parts[0], parts[1]);
        for token in [
            body.clone(),
            format!("{body}."),
            format!("{good}.{}", parts[2]),
            format!("{good} "),
            good.replace('.', ".."),
            "x".repeat(10 * 1024 * 1024),
            String::new(),
        ] {
            assert_eq!(tokens.user(&token), None, "{}", &token[..token.len().min(200)]);
        }
    }

    #[test]
    fn what_is_opaque_is_known_by_its_hash() {
        let (token, hash) = opaque(&[0xab; 32]);
        assert_eq!(opaque_hash(&token), Some(hash));
        for wrong in ["", "ab", &token.to_uppercase(), &format!("{token}0"), &token.replace('a', "g")] {
            assert_eq!(opaque_hash(wrong), None, "{wrong:?}");
        }
        assert_ne!(csrf_token(&token), token);
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
