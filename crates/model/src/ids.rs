//! Typed ids and their public text forms.
//!
//! A sandbox id is `sb` and 22 of `[a-z0-9]` without a dash, because it stands in host names that are split at the dash. The others
//! are a prefix, a dash and 128 bits as exactly 25 base-36 digits. Parsing accepts the canonical form and nothing else.

use std::fmt;
use std::str::FromStr;

use uuid::Uuid;

const DIGITS: &[u8; 36] = b"0123456789abcdefghijklmnopqrstuvwxyz";

/// The text is not an id of the expected kind.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a valid {kind} id")]
pub struct InvalidId {
    pub kind: &'static str,
}

/// One sandbox, for its whole life: it survives pauses and never comes back as another guest.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SandboxId(String);

impl SandboxId {
    /// `sb` + 22 digits of 36: 113 bits, of which the caller's 128 random bits keep all but a hair.
    pub fn from_random(random: u128) -> Self {
        Self(format!("sb{}", base36(random, 22)))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for SandboxId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for SandboxId {
    type Err = InvalidId;

    fn from_str(text: &str) -> Result<Self, InvalidId> {
        let digits = text.strip_prefix("sb").ok_or(InvalidId { kind: "sandbox" })?;
        if digits.len() == 22 && digits.bytes().all(|b| DIGITS.contains(&b)) {
            Ok(Self(text.to_owned()))
        } else {
            Err(InvalidId { kind: "sandbox" })
        }
    }
}

/// One run of a sandbox's microVM, from start or restore to stop. Nothing that outlived it is trusted again.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Incarnation(String);

impl Incarnation {
    pub fn from_random(random: u128) -> Self {
        Self(format!("{random:032x}"))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Incarnation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Incarnation {
    type Err = InvalidId;

    fn from_str(text: &str) -> Result<Self, InvalidId> {
        if text.len() == 32 && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b)) {
            Ok(Self(text.to_owned()))
        } else {
            Err(InvalidId { kind: "incarnation" })
        }
    }
}

macro_rules! uuid_id {
    ($(#[$doc:meta])* $name:ident, $prefix:literal, $kind:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(pub Uuid);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($prefix, "-{}"), base36(self.0.as_u128(), 25))
            }
        }

        impl FromStr for $name {
            type Err = InvalidId;

            fn from_str(text: &str) -> Result<Self, InvalidId> {
                text.strip_prefix(concat!($prefix, "-"))
                    .and_then(from_base36)
                    .map(|value| Self(Uuid::from_u128(value)))
                    .ok_or(InvalidId { kind: $kind })
            }
        }
    };
}

uuid_id!(
    /// A machine that runs sandboxes.
    HostId, "host", "host"
);
uuid_id!(
    /// Who owns sandboxes, templates and keys.
    TeamId, "team", "team"
);
uuid_id!(
    /// A person.
    UserId, "usr", "user"
);
uuid_id!(
    /// A machine's credential.
    ApiKeyId, "key", "API key"
);
uuid_id!(
    /// One login of a person, until it ends or is ended.
    SessionId, "ses", "session"
);
uuid_id!(
    /// An offer to join a team.
    InvitationId, "inv", "invitation"
);
uuid_id!(
    /// A saved state that sandboxes begin with.
    SnapshotId, "snap", "snapshot"
);
uuid_id!(
    /// One making of a template of the platform, from its recipe to what became of it.
    BuildId, "bld", "build"
);
uuid_id!(
    /// Where a team is told of what happens.
    ChannelId, "ch", "channel"
);
uuid_id!(
    /// One accepted state change, from the wish to its outcome.
    OperationId, "op", "operation"
);

/// The low digits of `value` in base 36, left padded to `width`.
fn base36(mut value: u128, width: usize) -> String {
    let mut digits = vec![b'0'; width];
    for digit in digits.iter_mut().rev() {
        *digit = DIGITS[usize::try_from(value % 36).expect("a remainder of 36 fits")];
        value /= 36;
    }
    String::from_utf8(digits).expect("the digits are ASCII")
}

/// Exactly 25 digits that fit into 128 bits.
fn from_base36(text: &str) -> Option<u128> {
    if text.len() != 25 {
        return None;
    }
    text.bytes().try_fold(0u128, |value, byte| {
        let digit = DIGITS.iter().position(|d| *d == byte)?;
        value.checked_mul(36)?.checked_add(u128::try_from(digit).ok()?)
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn uuid_ids_come_back_as_they_were(value: u128) {
            let id = HostId(Uuid::from_u128(value));
            prop_assert_eq!(id.to_string().parse::<HostId>(), Ok(id));
        }

        #[test]
        fn sandbox_ids_come_back_as_they_were(value: u128) {
            let id = SandboxId::from_random(value);
            prop_assert_eq!(id.as_str().len(), 24);
            prop_assert_eq!(id.as_str().parse::<SandboxId>(), Ok(id.clone()));
        }
    }

    #[test]
    fn refuses_every_other_spelling() {
        let good = SandboxId::from_random(7).to_string();
        for bad in [
            "",
            "sb",
            "..",
            "sb-",
            &good[1..],
            &good.to_uppercase(),
            &format!("{good}a"),
            &format!("{good}\n"),
            "usr00",
        ] {
            assert!(bad.parse::<SandboxId>().is_err(), "{bad:?}");
        }
        let host = HostId(Uuid::from_u128(u128::MAX)).to_string();
        assert!(host.parse::<HostId>().is_ok());
        // 25 digits of base 36 reach beyond 128 bits.
        for bad in [
            "host-zzzzzzzzzzzzzzzzzzzzzzzzz",
            "team-0000000000000000000000000",
            "host-000000000000000000000000",
            "host_0000000000000000000000000",
        ] {
            assert!(bad.parse::<HostId>().is_err(), "{bad:?}");
        }
        assert!("0123456789abcdef0123456789ABCDEF".parse::<Incarnation>().is_err());
    }
}
