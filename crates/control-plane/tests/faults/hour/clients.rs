//! What the clients of the hour do, and what they were told.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rand::Rng as _;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;
use reqwest::Method;
use serde_json::json;
use tokio::sync::RwLock;
use tokio_util::sync::CancellationToken;

use super::super::client::{Answer, Client, NoAnswer};
use super::super::history::{Call, Event, Said, Wished};

/// Sandboxes that the clients quarrel about at one time; forks may make it a few more.
const SHARED: usize = 10;
/// A sandbox is killed when so much was done with it since the last rest: the search grows with the length of a history.
const EVENTS_MAX: usize = 60;
const SNAPSHOTS_MAX: usize = 6;
/// No single fault of the hour is longer than a third of this.
const SERVED_MAX: Duration = Duration::from_secs(120);
const AGAIN: Duration = Duration::from_millis(100);

pub struct History {
    /// What was wished when it began.
    pub first: Wished,
    pub events: Vec<Event>,
}

#[derive(Default)]
pub struct Ledger {
    /// Of sandboxes that are not known to be killed.
    pub histories: Mutex<BTreeMap<String, History>>,
    /// Those that were killed since the last rest.
    pub ended: Mutex<BTreeMap<String, History>>,
    /// What was answered to creates and forks, ever.
    pub made: Mutex<BTreeSet<String>>,
    /// What each key made, since the last rest.
    pub keys: Mutex<BTreeMap<String, BTreeSet<String>>>,
    /// Their microVMs were ended by the test.
    pub harmed: Mutex<BTreeSet<String>>,
    pub snapshots: Mutex<BTreeSet<String>>,
    /// Operations by verb and outcome.
    pub outcomes: Mutex<BTreeMap<(&'static str, String), u64>>,
    /// What must not be, and was seen by a client.
    pub wrong: Mutex<Vec<String>>,
    keys_used: AtomicU64,
}

impl Ledger {
    fn note(&self, verb: &'static str, answer: &Result<Answer, NoAnswer>) {
        let outcome = match answer {
            Err(NoAnswer) => "no answer".to_owned(),
            Ok(answer) if answer.code().is_empty() => answer.status.to_string(),
            Ok(answer) => format!("{} {}", answer.status, answer.code()),
        };
        // What no client of good will may ever be told.
        if let Ok(answer) = answer
            && matches!(answer.status, 400 | 401 | 403 | 405 | 422 | 500)
        {
            self.is_wrong(format!("{verb} was answered {} {}", answer.status, answer.body));
        }
        *self.outcomes.lock().unwrap().entry((verb, outcome)).or_default() += 1;
    }

    pub fn is_wrong(&self, what: String) {
        eprintln!("wrong: {what}");
        self.wrong.lock().unwrap().push(what);
    }

    fn is_harmed(&self, id: &str) -> bool {
        self.harmed.lock().unwrap().contains(id)
    }

    fn begins(&self, id: &str) {
        let history = History { first: Wished::Running, events: Vec::new() };
        self.histories.lock().unwrap().insert(id.to_owned(), history);
    }

    /// Nothing follows from what it is told from now on.
    pub fn forget(&self, id: &str) {
        self.histories.lock().unwrap().remove(id);
    }
}

pub struct Wisher {
    pub client: Client,
    pub ledger: Arc<Ledger>,
    pub dice: StdRng,
    /// Held by who judges; nothing is asked meanwhile.
    pub calm: Arc<RwLock<()>>,
    pub stop: CancellationToken,
    /// Between two operations, on average.
    pub every: Duration,
}

impl Wisher {
    pub async fn wish(mut self) {
        while !self.stop.is_cancelled() {
            let calm = self.calm.clone();
            let turn = calm.read().await;
            self.one().await;
            drop(turn);
            let pause = self.every.mul_f64(self.dice.random_range(0.2..1.8));
            self.stop.run_until_cancelled(tokio::time::sleep(pause)).await;
        }
    }

    async fn one(&mut self) {
        let present: Vec<String> = self.ledger.histories.lock().unwrap().keys().cloned().collect();
        let Some(id) = present.choose(&mut self.dice) else { return self.create().await };
        let is_full = present.len() >= SHARED;
        match self.dice.random_range(0..100) {
            0..15 if !is_full => self.create().await,
            15..20 if !is_full => self.fork(id).await,
            20..26 => self.snapshot(id).await,
            26..30 => self.remove_snapshot().await,
            _ => self.turn(id).await,
        }
    }

    fn key(&self, verb: &str) -> String {
        format!("{verb}-{}", self.ledger.keys_used.fetch_add(1, Ordering::Relaxed))
    }

    /// Asked until there is an answer; none when there is none for too long.
    async fn until_answered<F>(&self, verb: &'static str, call: impl Fn() -> F) -> Option<Answer>
    where
        F: Future<Output = Result<Answer, NoAnswer>>,
    {
        let began = Instant::now();
        while began.elapsed() < SERVED_MAX {
            let answer = call().await;
            self.ledger.note(verb, &answer);
            match answer {
                Ok(answer) if !answer.is_unavailable() => return Some(answer),
                _ => tokio::time::sleep(AGAIN).await,
            }
        }
        self.ledger.is_wrong(format!("{verb} was not answered within {SERVED_MAX:?}"));
        None
    }

    /// Some leave before they are answered, and ask again with the same key.
    async fn create(&mut self) {
        let key = self.key("create");
        let client = self.client.clone();
        if self.dice.random_bool(0.2) {
            let patience = Duration::from_millis(self.dice.random_range(0..60));
            if let Ok(Ok(first)) = tokio::time::timeout(patience, client.create_once(&key, 5)).await
                && first.body["id"].is_string()
            {
                self.ledger.keys.lock().unwrap().insert(key.clone(), [first.id()].into());
            }
        }
        let Some(made) = self.until_answered("create", || client.create_once(&key, 10)).await else { return };
        self.took(&key, &made, made.body["id"].as_str().map(ToOwned::to_owned).into_iter().collect()).await;
    }

    async fn fork(&mut self, id: &str) {
        let (key, count) = (self.key("fork"), self.dice.random_range(1..3));
        let call = || {
            let path = format!("/v1/sandboxes/{id}/fork?wait_sec=10");
            let request = self.client.request(Method::POST, &path).header("Idempotency-Key", &key);
            Client::send(request.json(&json!({ "count": count })))
        };
        let Some(made) = self.until_answered("fork", call).await else { return };
        let sandboxes = made.body["sandboxes"].as_array().cloned().unwrap_or_default();
        let ids: BTreeSet<String> =
            sandboxes.iter().filter_map(|sandbox| Some(sandbox["id"].as_str()?.to_owned())).collect();
        if matches!(made.status, 200..300) && ids.len() != count {
            self.ledger.is_wrong(format!("a fork into {count} was answered {}", made.body));
        }
        self.took(&key, &made, ids).await;
    }

    /// What a key made is the same as before, and comes to run.
    async fn took(&self, key: &str, answer: &Answer, ids: BTreeSet<String>) {
        if !matches!(answer.status, 200..300) {
            return;
        }
        let before = self.ledger.keys.lock().unwrap().insert(key.to_owned(), ids.clone());
        if before.is_some_and(|before| before != ids) {
            self.ledger.is_wrong(format!("{key} made two things"));
        }
        self.ledger.made.lock().unwrap().extend(ids.clone());
        for id in ids {
            self.runs(&id).await;
        }
    }

    /// What does not run yet can be neither paused nor resumed.
    async fn runs(&self, id: &str) {
        let began = Instant::now();
        while began.elapsed() < SERVED_MAX {
            let shown = self.client.verb_once(id, "get", 0).await;
            self.ledger.note("get", &shown);
            match shown.as_ref().ok().and_then(|shown| shown.body["status"].as_str()) {
                Some("running") => return self.ledger.begins(id),
                // Whether it was right to fail is judged by what was done to it.
                Some("error" | "stopping" | "stopped") => return,
                _ => tokio::time::sleep(AGAIN).await,
            }
        }
        self.ledger.is_wrong(format!("{id} did not come to run within {SERVED_MAX:?}"));
    }

    async fn turn(&mut self, id: &str) {
        let length = self.ledger.histories.lock().unwrap().get(id).map_or(0, |history| history.events.len());
        let (call, verb) = match self.dice.random_range(0..100) {
            _ if length > EVENTS_MAX => (Call::Kill, "kill"),
            0..30 => (Call::Get, "get"),
            30..60 => (Call::Pause, "pause"),
            60..93 => (Call::Resume, "resume"),
            _ => (Call::Kill, "kill"),
        };
        let wait_sec = self.dice.random_range(0..3);
        let patience = Duration::from_millis(if self.dice.random_bool(0.1) { 5 } else { 30_000 });
        let began = Instant::now();
        let answer = tokio::time::timeout(patience, self.client.verb_once(id, verb, wait_sec)).await;
        let answer = answer.unwrap_or(Err(NoAnswer));
        self.ledger.note(verb, &answer);
        let Some(said) = self.heard(id, call, answer) else { return };
        let event = Event { call, said, began, ended: Instant::now() };
        let (mut histories, mut ended) = (self.ledger.histories.lock().unwrap(), self.ledger.ended.lock().unwrap());
        if call == Call::Kill
            && said == Said::Yes
            && let Some(history) = histories.remove(id)
        {
            ended.insert(id.to_owned(), history);
        }
        // It may have ended meanwhile, by another one's kill that was answered before; then its history goes on.
        if let Some(history) = histories.get_mut(id).or_else(|| ended.get_mut(id)) {
            history.events.push(event);
        }
    }

    /// None: it says nothing of what was wished.
    fn heard(&self, id: &str, call: Call, answer: Result<Answer, NoAnswer>) -> Option<Said> {
        let Ok(answer) = answer else { return Some(Said::Unknown) };
        Some(match (call, answer.status) {
            _ if answer.is_unavailable() => Said::Unknown,
            (Call::Get, 200) => Said::Is(match answer.body["status"].as_str().unwrap_or_default() {
                "running" | "resuming" => Wished::Running,
                "pausing" | "paused" => Wished::Paused,
                "stopping" | "stopped" => Wished::Killed,
                "snapshotting" => return None,
                _ if self.ledger.is_harmed(id) => return None,
                other => {
                    self.ledger.is_wrong(format!("{id} is {other}: {}", answer.body));
                    return None;
                }
            }),
            (Call::Pause | Call::Resume, 200 | 202) | (Call::Kill, 202 | 204) => Said::Yes,
            // A snapshot of it is under way.
            (_, 409) if answer.code() == "conflict" => return None,
            (_, 409) if self.ledger.is_harmed(id) => return None,
            (Call::Pause | Call::Resume, 409) => Said::No,
            // Its host did not do it, or nobody knows.
            (_, 429 | 502..=504) => Said::Unknown,
            _ if self.ledger.is_harmed(id) => return None,
            (_, status) => {
                self.ledger.is_wrong(format!("{call:?} of {id}: {status} {}", answer.body));
                return None;
            }
        })
    }

    /// Its name is the key. Of what is being killed there is none.
    async fn snapshot(&mut self, id: &str) {
        if self.ledger.snapshots.lock().unwrap().len() >= SNAPSHOTS_MAX {
            return self.remove_snapshot().await;
        }
        let name = self.key("snapshot");
        let body = json!({ "sandbox_id": id, "name": name });
        let call = || {
            let request =
                self.client.request(Method::POST, "/v1/snapshots?wait_sec=5").header("Idempotency-Key", &name);
            Client::send(request.json(&body))
        };
        if let Some(answer) = self.until_answered("snapshot", call).await
            && matches!(answer.status, 200..300)
        {
            self.ledger.snapshots.lock().unwrap().insert(name);
        }
    }

    async fn remove_snapshot(&mut self) {
        let Some(name) = self.ledger.snapshots.lock().unwrap().pop_last() else { return };
        let path = format!("/v1/snapshots/{name}");
        self.until_answered("remove", || self.client.call(Method::DELETE, &path, None)).await;
    }
}
