//! The making of bases, each in a task of its own: on a slow disk it takes minutes, and no create may be held by it beyond its time. All who
//! need the same base wait for the same task.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use model::shape::TemplateName;
use tokio::sync::{Semaphore, watch};

use super::{DiskError, Pool};

/// Bases are made one after the other: two at once take each other's disk and are no faster.
const AT_ONCE: usize = 1;

type Kind = (TemplateName, u32);
type Outcome = Result<(), Arc<DiskError>>;

pub struct Makings {
    pool: Arc<Pool>,
    turn: Arc<Semaphore>,
    under_way: Arc<Mutex<HashMap<Kind, watch::Receiver<Option<Outcome>>>>>,
}

impl Makings {
    pub fn new(pool: Arc<Pool>) -> Self {
        Self { pool, turn: Arc::new(Semaphore::new(AT_ONCE)), under_way: Arc::default() }
    }

    /// Cancel-safe: the making goes on.
    pub async fn ensure(&self, template: &TemplateName, mib: u32) -> Outcome {
        let kind = (template.clone(), mib);
        let mut outcome = lock(&self.under_way).entry(kind.clone()).or_insert_with(|| self.begin(kind)).clone();
        match outcome.wait_for(Option::is_some).await {
            Ok(made) => made.clone().expect("waited for that"),
            Err(_) => Err(Arc::new(interrupted(template.clone(), "the making of a base was given up"))),
        }
    }

    /// It is forgotten when it ends: whoever comes then looks anew, because a base may go with its edition.
    fn begin(&self, kind: Kind) -> watch::Receiver<Option<Outcome>> {
        let (sender, outcome) = watch::channel(None);
        let (pool, turn, under_way) = (self.pool.clone(), self.turn.clone(), self.under_way.clone());
        tokio::spawn(async move {
            let _turn = turn.acquire().await.expect("the semaphore is never closed");
            let (template, mib) = kind.clone();
            let made = tokio::task::spawn_blocking(move || pool.make_base(&template, mib)).await;
            let made = made.unwrap_or_else(|panic| Err(interrupted(kind.0.clone(), panic)));
            lock(&under_way).remove(&kind);
            sender.send_replace(Some(made.map_err(Arc::new)));
        });
        outcome
    }
}

fn interrupted(template: TemplateName, why: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> DiskError {
    DiskError::Base { template, cause: io::Error::other(why) }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
