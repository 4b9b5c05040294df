//! What a replica does of what a control plane does: `api` answers, `workers` carry out. Each needs the database alone, so they may run on
//! different machines, any number of each.

use std::str::FromStr;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Roles {
    /// Answers the public API.
    pub api: bool,
    /// Works on operations and runs reconcilers.
    pub workers: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WrongRoles {
    #[error("{0:?} is no role")]
    Unknown(String),
    #[error("edge is not there: this version serves no ports of sandboxes")]
    Edge,
    #[error("no role is named")]
    None,
}

impl Roles {
    pub const ALL: Self = Self { api: true, workers: true };
}

impl FromStr for Roles {
    type Err = WrongRoles;

    /// Words with commas between; `all`, and nothing, is everything.
    fn from_str(text: &str) -> Result<Self, WrongRoles> {
        if text.trim().is_empty() {
            return Ok(Self::ALL);
        }
        let mut roles = Self { api: false, workers: false };
        for word in text.split(',').map(str::trim).filter(|word| !word.is_empty()) {
            match word {
                "all" => roles = Self::ALL,
                "api" => roles.api = true,
                "workers" => roles.workers = true,
                // Whoever asks for it would take it for served.
                "edge" => return Err(WrongRoles::Edge),
                other => return Err(WrongRoles::Unknown(other.to_owned())),
            }
        }
        if roles.api || roles.workers { Ok(roles) } else { Err(WrongRoles::None) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_read_and_what_is_not_there_is_refused() {
        let of = |text: &str| text.parse::<Roles>();
        assert_eq!(of(""), Ok(Roles::ALL));
        assert_eq!(of("all"), Ok(Roles::ALL));
        assert_eq!(of("workers, api"), Ok(Roles::ALL));
        assert_eq!(of("api"), Ok(Roles { api: true, workers: false }));
        assert_eq!(of("workers"), Ok(Roles { api: false, workers: true }));
        assert_eq!(of("api,edge"), Err(WrongRoles::Edge));
        assert_eq!(of("API"), Err(WrongRoles::Unknown("API".to_owned())));
        assert_eq!(of(" , "), Err(WrongRoles::None));
    }
}
