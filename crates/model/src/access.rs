//! What people and keys may do: roles in a team, which grow, and scopes of API keys, which do not.

use std::fmt;
use std::str::FromStr;

/// The text is not a word of the expected list.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("must be one of: {allowed}")]
pub struct Unknown {
    pub allowed: String,
}

/// Of a person in a team. Each may do what those before it may.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// Uses the team's sandboxes, snapshots and keys.
    Member,
    /// And decides who else does.
    Admin,
    /// And decides who the owners are, and whether there is a team.
    Owner,
}

/// What an API key opens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Scope {
    /// Looks at sandboxes: list, state, timeline, console.
    SandboxesRead,
    /// Creates, pauses, resumes, forks and kills sandboxes.
    SandboxesWrite,
    /// Runs commands in sandboxes, reads and writes their files.
    SandboxesUse,
    SnapshotsRead,
    SnapshotsWrite,
    /// Makes and removes API keys: with no more than its own scopes.
    ApiKeys,
    /// Decides where the team is told of what happens.
    Channels,
}

macro_rules! words {
    ($type:ident { $($variant:ident = $word:literal),+ $(,)? }) => {
        impl $type {
            pub const ALL: &[Self] = &[$(Self::$variant),+];

            pub fn as_str(self) -> &'static str {
                match self {
                    $(Self::$variant => $word),+
                }
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }

        impl FromStr for $type {
            type Err = Unknown;

            fn from_str(text: &str) -> Result<Self, Unknown> {
                Self::ALL.iter().copied().find(|known| known.as_str() == text).ok_or_else(|| Unknown {
                    allowed: [$($word),+].join(", "),
                })
            }
        }
    };
}

words!(Role { Member = "member", Admin = "admin", Owner = "owner" });
words!(Scope {
    SandboxesRead = "sandboxes:read",
    SandboxesWrite = "sandboxes:write",
    SandboxesUse = "sandboxes:use",
    SnapshotsRead = "snapshots:read",
    SnapshotsWrite = "snapshots:write",
    ApiKeys = "api-keys",
    Channels = "channels",
});

impl Scope {
    /// Of a key that was made without saying: all but the making of keys and channels, which would outlive it.
    pub fn ordinary() -> Vec<Self> {
        Self::ALL.iter().copied().filter(|scope| !matches!(scope, Self::ApiKeys | Self::Channels)).collect()
    }
}

impl Role {
    /// Whether somebody in this role may make `to` of who is `from`: an owner decides about owners, an admin about the others.
    pub fn decides(self, from: Self, to: Self) -> bool {
        match self {
            Self::Owner => true,
            Self::Admin => from < Self::Owner && to < Self::Owner,
            Self::Member => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roles_grow_and_words_come_back() {
        assert!(Role::Owner > Role::Admin && Role::Admin > Role::Member);
        for scope in Scope::ALL {
            assert_eq!(scope.as_str().parse(), Ok(*scope));
        }
        assert!("Owner".parse::<Role>().unwrap_err().to_string().contains("member, admin, owner"));
    }

    #[test]
    fn an_admin_does_not_decide_about_owners() {
        assert!(Role::Admin.decides(Role::Member, Role::Admin));
        assert!(!Role::Admin.decides(Role::Owner, Role::Member));
        assert!(!Role::Admin.decides(Role::Member, Role::Owner));
        assert!(!Role::Member.decides(Role::Member, Role::Member));
        assert!(Role::Owner.decides(Role::Owner, Role::Member));
    }
}
