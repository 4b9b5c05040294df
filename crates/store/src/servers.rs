//! Which PostgreSQL the connections lead to, and which of those that are open are still of use.
//!
//! A url may name several servers (`postgres://user@one:5432,two:5432/wrenn`): one takes writes, the others follow it, and after a
//! fail-over another one does. Connections to a server that refuses writes are not kept: what it answers may be old.

use std::str::FromStr as _;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use sqlx::postgres::{PgConnectOptions, PgConnection, PgPoolOptions};
use sqlx::{Connection as _, PgPool};

use crate::StoreError;

/// A replica's share of the server's connections (100 by default): handlers wait for one, and for no longer than [`ACQUIRE_MAX`].
const CONNECTIONS_MAX: u32 = 16;
/// A handler that gets no connection in this time answers 503 while its client still listens.
pub(crate) const ACQUIRE_MAX: Duration = Duration::from_secs(3);
/// A server that has not said by then whether it takes writes is passed over.
const LOOK_TIME_MAX: Duration = Duration::from_secs(2);
/// No query of ours takes longer on a healthy server; what a vanished client left must not hold locks.
const SESSION: [(&str, &str); 4] = [
    ("statement_timeout", "10s"),
    ("lock_timeout", "5s"),
    ("idle_in_transaction_session_timeout", "15s"),
    ("timezone", "UTC"),
];

/// Of all servers of the url.
#[derive(Clone)]
pub(crate) struct Servers {
    all: Arc<[PgConnectOptions]>,
    /// Of them, where new connections lead.
    present: Arc<AtomicUsize>,
}

impl std::fmt::Debug for Servers {
    /// Without passwords.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} servers", self.all.len())
    }
}

impl Servers {
    pub(crate) fn parse(url: &str) -> Result<Self, StoreError> {
        let options = |url: &String| -> Result<_, StoreError> {
            Ok(PgConnectOptions::from_str(url)?.application_name("wrenn-cp").options(SESSION))
        };
        let all: Vec<_> = one_by_one(url).iter().map(options).collect::<Result<_, _>>()?;
        Ok(Self { all: all.into(), present: Arc::default() })
    }

    /// Does not connect yet.
    pub(crate) fn pool(&self) -> PgPool {
        PgPoolOptions::new()
            .max_connections(CONNECTIONS_MAX)
            .acquire_timeout(ACQUIRE_MAX)
            // Asking each time costs a round trip; what else went down together with the one that failed is known without.
            .test_before_acquire(false)
            .before_acquire(|_, connection| {
                let is_good = last_break().is_none_or(|since| connection.age < since);
                Box::pin(async move { Ok(is_good) })
            })
            .after_connect(|connection, _| {
                Box::pin(async move {
                    if refuses_writes(connection).await? {
                        return Err(sqlx::Error::Protocol("the server takes no writes".to_owned()));
                    }
                    Ok(())
                })
            })
            .connect_lazy_with(self.all[0].clone())
    }

    /// Leads new connections to the server that takes writes. When there is none, they go where they went.
    pub(crate) async fn follow_primary(&self, pool: &PgPool) {
        if self.all.len() < 2 {
            return;
        }
        let present = self.present.load(Ordering::Relaxed);
        for (number, server) in self.all.iter().enumerate().cycle().skip(present).take(self.all.len()) {
            let look = async {
                let mut connection = PgConnection::connect_with(server).await?;
                let refuses = refuses_writes(&mut connection).await;
                let _ = connection.close().await;
                refuses
            };
            if !matches!(tokio::time::timeout(LOOK_TIME_MAX, look).await, Ok(Ok(false))) {
                continue;
            }
            if number != present {
                self.present.store(number, Ordering::Relaxed);
                pool.set_connect_options(server.clone());
                note_break();
            }
            return;
        }
    }
}

async fn refuses_writes(connection: &mut PgConnection) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar!(
        r#"select pg_is_in_recovery() or current_setting('transaction_read_only') = 'on' as "refuses!""#
    )
    .fetch_one(connection)
    .await
}

/// The url with each of its servers alone.
fn one_by_one(url: &str) -> Vec<String> {
    let Some((scheme, rest)) = url.split_once("://") else { return vec![url.to_owned()] };
    let (authority, path) = rest.split_at(rest.find(['/', '?']).unwrap_or(rest.len()));
    let (user, hosts) = authority.split_at(authority.rfind('@').map_or(0, |at| at + 1));
    hosts.split(',').map(|host| format!("{scheme}://{user}{host}{path}")).collect()
}

/// When a connection last turned out to be of no use, in milliseconds of [`began`], and one; 0: never. A server takes all connections
/// with it when it ends, and when it becomes read-only.
static LAST_BREAK: AtomicU64 = AtomicU64::new(0);

fn began() -> Instant {
    static BEGAN: OnceLock<Instant> = OnceLock::new();
    *BEGAN.get_or_init(Instant::now)
}

/// All connections that are open now are closed before they are used again.
pub(crate) fn note_break() {
    let now = u64::try_from(began().elapsed().as_millis()).unwrap_or(u64::MAX - 1);
    LAST_BREAK.store(now + 1, Ordering::Relaxed);
}

fn last_break() -> Option<Duration> {
    let at = LAST_BREAK.load(Ordering::Relaxed).checked_sub(1)?;
    Some(began().elapsed().saturating_sub(Duration::from_millis(at)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_may_name_several_servers() {
        let parted = |url: &str| one_by_one(url);
        assert_eq!(parted("postgres://u:p@a:1/db?x=y,z"), ["postgres://u:p@a:1/db?x=y,z"]);
        assert_eq!(
            parted("postgres://u:p,q@a:1,[::1]:2,c/db?host=/x"),
            ["postgres://u:p,q@a:1/db?host=/x", "postgres://u:p,q@[::1]:2/db?host=/x", "postgres://u:p,q@c/db?host=/x"]
        );
        assert_eq!(parted("postgres://a,b"), ["postgres://a", "postgres://b"]);
        assert!(Servers::parse("postgres://u@a:1,b:2/db").is_ok());
        assert!(Servers::parse("postgres://u@a:1,b:x/db").is_err());
    }
}
