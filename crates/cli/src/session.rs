//! The session that `wrenn login` leaves: `wrenn/session.json` in the user's configuration directory, 0600.

use std::path::PathBuf;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use crate::credentials::write_private;
use crate::failure::{Doing as _, Failure};

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Session {
    pub api_url: String,
    pub token: String,
    pub email: String,
    pub team_id: String,
    pub expires_at: DateTime<Utc>,
}

impl Session {
    /// None where the user has no home.
    fn place() -> Option<PathBuf> {
        let given = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let base = given("XDG_CONFIG_HOME").or_else(|| Some(given("HOME")?.join(".config")))?;
        Some(base.join("wrenn").join("session.json"))
    }

    /// The one that is kept, unless its time is over.
    pub fn kept() -> Result<Option<Self>, Failure> {
        let Some(place) = Self::place() else { return Ok(None) };
        let text = match std::fs::read(&place) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).doing(|| format!("read {}", place.display())),
        };
        let session: Self = serde_json::from_slice(&text)
            .doing(|| format!("read {} (remove it: `wrenn login` writes it anew)", place.display()))?;
        Ok((session.expires_at > Utc::now()).then_some(session))
    }

    /// Where it was put.
    pub fn keep(&self) -> Result<PathBuf, Failure> {
        let place = Self::place().ok_or_else(|| Failure::new("no place for the session: HOME is not set"))?;
        let folder = place.parent().expect("a file lies in a folder");
        std::fs::create_dir_all(folder).doing(|| format!("make {}", folder.display()))?;
        write_private(&place, &serde_json::to_vec_pretty(self).expect("strings are JSON"))?;
        Ok(place)
    }

    pub fn forget() -> Result<(), Failure> {
        let Some(place) = Self::place() else { return Ok(()) };
        match std::fs::remove_file(&place) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(error).doing(|| format!("remove {}", place.display()))
            }
            _ => Ok(()),
        }
    }
}
