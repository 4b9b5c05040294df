//! Who may call what: the user's token on every route but `/health`, the host's token on the control routes, a signature on `/files`.
//! Compared in constant time. Before the first `/init` nothing but `/health` and `/init` answers.

use std::net::IpAddr;

use api::guest::{ACCESS_TOKEN_HEADER, CONTROL_TOKEN_HEADER};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use http::HeaderMap;
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;

use crate::session::Session;

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Denied {
    #[error("missing or wrong access token")]
    Token,
    #[error("this route is the host's alone")]
    NotTheHost,
    #[error("invalid signature")]
    Signature,
    /// The text is what published SDKs look for.
    #[error("signature is already expired")]
    Expired,
}

/// A user's request.
pub fn user(session: &Session, headers: &HeaderMap) -> Result<(), Denied> {
    match session.identity() {
        None if session.standalone => Ok(()),
        None => Err(Denied::Token),
        // A sandbox without a token is one whose host asked for that: only tests do.
        Some(identity) if identity.access_token.is_empty() && session.standalone => Ok(()),
        Some(identity) => same(headers, ACCESS_TOKEN_HEADER, &identity.access_token).then_some(()).ok_or(Denied::Token),
    }
}

/// The host's request to a control route. Processes of the guest reach envd from its own addresses: they are not the host whatever
/// they show, and before the first `/init` the address is all that tells them apart.
pub fn host(session: &Session, peer: IpAddr, local: IpAddr, headers: &HeaderMap) -> Result<(), Denied> {
    if !session.standalone && (peer.is_loopback() || peer == local) {
        return Err(Denied::NotTheHost);
    }
    match session.identity() {
        None => Ok(()),
        // Only tests leave the host's token out; a sandbox's first `/init` must bring one.
        Some(identity) if identity.control_token.is_empty() && session.standalone => Ok(()),
        Some(identity) if same(headers, CONTROL_TOKEN_HEADER, &identity.control_token) => Ok(()),
        Some(_) => Err(Denied::NotTheHost),
    }
}

/// What a signed URL says.
pub struct Signed<'a> {
    pub path: &'a str,
    /// `read` or `write`
    pub operation: &'a str,
    pub user: &'a str,
    pub signature: &'a str,
    /// Unix seconds.
    pub expires: Option<&'a str>,
}

pub fn signature(session: &Session, signed: &Signed<'_>, now_unix: i64) -> Result<(), Denied> {
    let token = session
        .identity()
        .map(|identity| identity.access_token.clone())
        .filter(|token| !token.is_empty())
        .ok_or(Denied::Signature)?;
    let Signed { path, operation, user, .. } = signed;
    let mut text = format!("{path}:{operation}:{user}:{token}");
    if let Some(expires) = signed.expires {
        text = format!("{text}:{expires}");
    }
    let expected = format!("v1_{}", STANDARD_NO_PAD.encode(Sha256::digest(text.as_bytes())));
    if !bool::from(expected.as_bytes().ct_eq(signed.signature.as_bytes())) {
        return Err(Denied::Signature);
    }
    match signed.expires.map(str::parse::<i64>) {
        None => Ok(()),
        Some(Ok(expires)) if expires >= now_unix => Ok(()),
        Some(_) => Err(Denied::Expired),
    }
}

fn same(headers: &HeaderMap, name: &str, expected: &str) -> bool {
    let mut shown = headers.get_all(name).iter();
    let (first, second) = (shown.next(), shown.next());
    // Two tokens are ambiguous, and an empty one opens nothing.
    !expected.is_empty()
        && second.is_none()
        && first.is_some_and(|value| bool::from(value.as_bytes().ct_eq(expected.as_bytes())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::Identity;

    fn session() -> Session {
        let session = Session::new(false);
        session.assume(Identity { access_token: "user".into(), control_token: "host".into(), ..Identity::default() });
        session
    }

    fn shown(name: &'static str, value: &str) -> HeaderMap {
        HeaderMap::from_iter([(http::HeaderName::from_static(name), value.parse().unwrap())])
    }

    #[test]
    fn only_the_whole_token_opens() {
        let session = session();
        assert_eq!(user(&session, &shown(ACCESS_TOKEN_HEADER, "user")), Ok(()));
        for wrong in ["", "use", "user ", "User", "userr", "host"] {
            assert_eq!(user(&session, &shown(ACCESS_TOKEN_HEADER, wrong)), Err(Denied::Token), "{wrong:?}");
        }
        assert_eq!(user(&session, &HeaderMap::new()), Err(Denied::Token));
        let mut twice = shown(ACCESS_TOKEN_HEADER, "user");
        twice.append(ACCESS_TOKEN_HEADER, "user".parse().unwrap());
        assert_eq!(user(&session, &twice), Err(Denied::Token));
        assert_eq!(user(&Session::new(false), &shown(ACCESS_TOKEN_HEADER, "")), Err(Denied::Token));
    }

    #[test]
    fn the_guest_is_not_the_host() {
        let (gateway, guest) = ("169.254.0.22".parse().unwrap(), "169.254.0.21".parse().unwrap());
        let fresh = Session::new(false);
        assert_eq!(host(&fresh, gateway, guest, &HeaderMap::new()), Ok(()));
        assert_eq!(host(&fresh, guest, guest, &HeaderMap::new()), Err(Denied::NotTheHost));
        assert_eq!(host(&fresh, "127.0.0.1".parse().unwrap(), guest, &HeaderMap::new()), Err(Denied::NotTheHost));
        let session = session();
        assert_eq!(host(&session, gateway, guest, &HeaderMap::new()), Err(Denied::NotTheHost));
        assert_eq!(host(&session, gateway, guest, &shown(CONTROL_TOKEN_HEADER, "host")), Ok(()));
        assert_eq!(host(&session, gateway, guest, &shown(CONTROL_TOKEN_HEADER, "user")), Err(Denied::NotTheHost));
    }

    #[test]
    fn signatures_hold_for_one_path_one_operation_and_a_time() {
        let session = session();
        let sign = |text: &str| format!("v1_{}", STANDARD_NO_PAD.encode(Sha256::digest(text.as_bytes())));
        let good = sign("/a:read::user");
        let check =
            |path, operation, signature: &str, expires| signature_of(&session, path, operation, signature, expires);
        assert_eq!(check("/a", "read", &good, None), Ok(()));
        assert_eq!(check("/b", "read", &good, None), Err(Denied::Signature));
        assert_eq!(check("/a", "write", &good, None), Err(Denied::Signature));
        assert_eq!(check("/a", "read", &good, Some("200")), Err(Denied::Signature));
        assert_eq!(check("/a", "read", &sign("/a:read::user:200"), Some("200")), Ok(()));
        assert_eq!(check("/a", "read", &sign("/a:read::user:99"), Some("99")), Err(Denied::Expired));
        assert_eq!(check("/a", "read", &sign("/a:read::user:soon"), Some("soon")), Err(Denied::Expired));
    }

    fn signature_of(
        s: &Session,
        path: &str,
        operation: &str,
        signature: &str,
        expires: Option<&str>,
    ) -> Result<(), Denied> {
        super::signature(s, &Signed { path, operation, user: "", signature, expires }, 100)
    }
}
