//! `up.json`: what a running `wrenn up` is and which ports it uses, for `down`, `doctor` and the next `up`.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::process::Identity;
use crate::credentials::write_private;
use crate::failure::Failure;

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct UpState {
    /// The supervisor; absent when it ended in order.
    #[serde(default)]
    pub up: Option<Identity>,
    /// `wrenn-cp` and `wrenn-agent`, by name.
    #[serde(default)]
    pub programs: BTreeMap<String, Identity>,
    /// Ports are kept, so that what was told to people and to the host agent stays true.
    #[serde(default)]
    pub api_port: Option<u16>,
    #[serde(default)]
    pub agent_port: Option<u16>,
    #[serde(default)]
    pub host_id: Option<String>,
    /// Milliseconds from the start of `up` to each of its stages, of the last start.
    #[serde(default)]
    pub stages_ms: BTreeMap<String, f64>,
}

impl UpState {
    /// What cannot be read is as good as absent: all of it is found again.
    pub fn read(dir: &Path) -> Self {
        std::fs::read(dir.join("up.json")).ok().and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default()
    }

    /// True when the directory has one that was written by us.
    pub fn is_there(dir: &Path) -> bool {
        std::fs::read(dir.join("up.json")).is_ok_and(|text| serde_json::from_slice::<Self>(&text).is_ok())
    }

    pub fn write(&self, dir: &Path) -> Result<(), Failure> {
        write_private(&dir.join("up.json"), &serde_json::to_vec_pretty(self).expect("plain values are JSON"))
    }

    pub fn running(&self) -> Option<&Identity> {
        self.up.as_ref().filter(|up| up.is_alive())
    }
}
