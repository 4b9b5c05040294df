//! What every handler and reconciler of one replica shares.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use store::Store;
use store::operations::Lease;
use store::presence::Replica;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use url::Url;

use crate::agents::Agents;
use crate::authority::Authority;
use crate::channels::guard::Guarded;
use crate::events::Feed;
use crate::hints::Hint;
use crate::http::limits::Limits;
use crate::mail::Mail;
use crate::measures::Runs;
use crate::oauth::Providers;
use crate::outcomes::Outcomes;
use crate::reconcile::driver::Driver;
use crate::reconcile::silent_hosts::Watch;
use crate::roles::Roles;
use crate::secrets::Secret;
use crate::tokens::Tokens;

#[derive(Clone)]
pub struct App(pub Arc<Shared>);

pub struct Shared {
    pub store: Store,
    pub secret: Secret,
    pub tokens: Tokens,
    pub authority: Authority,
    pub agents: Arc<Agents>,
    pub outcomes: Arc<Outcomes>,
    pub feed: Arc<Feed>,
    pub limits: Limits,
    pub driver: Arc<Driver>,
    pub replica: Replica,
    pub runs: Runs,
    pub dir: PathBuf,
    /// The shortest idle time after which a sandbox ends.
    pub idle_timeout_min_sec: i64,
    /// 0: for ever.
    pub audit_kept_days: u32,
    /// Since when this replica hears hosts.
    pub watch: Watch,
    /// For how long it must have, for their silence to say something.
    pub silence_grace: Duration,
    pub accounts: Accounts,
    pub outbox: Hint,
    /// Of channels.
    pub notifications: Hint,
    /// Of templates that are to be made.
    pub builds: Hint,
    /// For addresses that users give.
    pub guarded: Guarded,
    /// State changes run here, never on a request's lifetime.
    pub tracker: TaskTracker,
    pub stop: CancellationToken,
    /// Before `stop`: it should get no more requests, and takes those that come all the same.
    pub drain: CancellationToken,
    /// After `stop`: the last request is answered.
    pub end: CancellationToken,
    pub roles: Roles,
}

/// How people come in.
pub struct Accounts {
    pub is_signup_open: bool,
    pub public_url: Url,
    /// Between looks at the rights of what is open.
    pub rights_every: Duration,
    pub mail: Mail,
    pub providers: Providers,
}

impl std::ops::Deref for App {
    type Target = Shared;

    fn deref(&self) -> &Shared {
        &self.0
    }
}

impl Shared {
    pub fn lease(&self) -> Lease {
        Lease { replica: self.replica }
    }
}
