//! What this guest knows of itself in its present incarnation: tokens, environment, default user.
//!
//! Written by `/init` alone; read by every request.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};

use chrono::{DateTime, Utc};

#[derive(Clone, Default)]
pub struct Identity {
    pub incarnation: String,
    /// Those before it, the latest first, as far as they are remembered.
    pub earlier: Vec<String>,
    /// The host's time when it told.
    pub told_at: Option<DateTime<Utc>>,
    pub access_token: String,
    pub control_token: String,
    pub envs: BTreeMap<String, String>,
    pub default_user: String,
    pub default_workdir: String,
}

/// The identity and how this envd was started.
pub struct Session {
    /// Outside a sandbox, for tests: no clock, no host name, and open until `/init` sets a token.
    pub standalone: bool,
    identity: RwLock<Option<Arc<Identity>>>,
}

impl Session {
    pub fn new(standalone: bool) -> Self {
        Self { standalone, identity: RwLock::default() }
    }

    /// `None` before the first `/init`. Shared: an environment may be a megabyte, and every request looks here.
    pub fn identity(&self) -> Option<Arc<Identity>> {
        self.identity.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub fn assume(&self, identity: Identity) {
        *self.identity.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(identity));
    }

    pub fn envs(&self) -> BTreeMap<String, String> {
        self.identity().map(|identity| identity.envs.clone()).unwrap_or_default()
    }

    pub fn default_user(&self) -> String {
        self.identity()
            .map(|identity| identity.default_user.clone())
            .filter(|name| !name.is_empty())
            .unwrap_or_else(|| "root".to_owned())
    }

    /// Empty: the user's home.
    pub fn default_workdir(&self) -> String {
        self.identity().map(|identity| identity.default_workdir.clone()).unwrap_or_default()
    }
}
