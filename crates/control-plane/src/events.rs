//! Brings events from the database to those who listen to this replica: one reader for all of them, whatever their number.
//!
//! ```text
//!   events_written -> (numbered here, or by another replica) -> events -> one look of this replica -> a queue per team -> listeners
//! ```
//!
//! The reader looks, many times a second while anybody listens. It is told of nothing: `NOTIFY` makes every transaction that does it wait
//! for the commit of the one before, and there is one for each change of a sandbox. A look at nothing costs a tenth of a millisecond.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use api::v1::events::{CONNECTED, Event, EventActor, EventResource, GAP, PUBLISHED};
use bytes::Bytes;
use chrono::{DateTime, Utc};
use model::ids::TeamId;
use store::StoreError;
use store::events::Event as Stored;
use tokio::sync::{broadcast, mpsc, oneshot};
use tokio::time::Instant;
use tracing::{error, warn};

use crate::app::App;
use crate::http::sandbox_shown;

/// Listeners hear of a change within a tenth of a second: this, a query, and the sending.
const LOOK_EVERY: Duration = Duration::from_millis(40);
/// While nobody listens here: what was written is numbered, for those who ask for pages and listen elsewhere.
const IDLE_LOOK_EVERY: Duration = Duration::from_secs(1);
/// After a look that failed.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// Of one query.
const EVENTS_MAX: i64 = 500;
/// Of one look; the rest is the next one's, so that those who come are let in meanwhile.
const ROUNDS_MAX: usize = 20;
/// How far a listener may fall behind before it is let go. It comes back and says where it was.
const BEHIND_MAX: usize = 1024;
/// On one replica; below the connections that it takes, so that calls get through as well.
const LISTENERS_MAX: usize = 4096;
/// Of them, of one team: who listens a thousand times, and takes nothing, keeps nobody else from listening.
const LISTENERS_OF_TEAM_MAX: usize = LISTENERS_MAX / 4;
/// Listeners that wait to be let in.
const ASKS_MAX: usize = 256;
const ASK_TIME_MAX: Duration = Duration::from_secs(5);

/// An event, written once for all who hear it.
pub struct Told {
    pub id: i64,
    pub kind: String,
    /// Sandboxes that it is of, or about.
    pub of: [Option<String>; 2],
    /// None: the published stream does not know the kind.
    pub published: Option<Bytes>,
    pub whole: Bytes,
}

impl Told {
    pub fn of(event: Stored) -> Self {
        let about = event.metadata.get("sandbox_id").cloned();
        let of = (event.resource_type == "capsule").then(|| event.resource_id.clone());
        let (id, kind) = (event.id, event.kind.clone());
        let whole = shown(event);
        let is_published = PUBLISHED.contains(&kind.as_str());
        Self {
            published: is_published.then(|| {
                let event = Event { id: None, details: serde_json::Map::new(), ..whole.clone() };
                message(Some(id), &event)
            }),
            whole: message(Some(id), &whole),
            of: [of, about],
            id,
            kind,
        }
    }
}

/// An event as clients see it, with all that there is to it.
pub fn shown(event: Stored) -> Event {
    let actor = event.actor.map(|behind| match behind.kind.as_str() {
        "user" | "api_key" => EventActor {
            kind: behind.kind,
            id: Some(behind.id),
            name: Some(behind.name).filter(|name| !name.is_empty()),
        },
        _ => EventActor { kind: "system".to_owned(), id: None, name: None },
    });
    let details = match event.details {
        serde_json::Value::Object(details) => details,
        _ => serde_json::Map::new(),
    };
    Event {
        id: Some(event.id.to_string()),
        event: event.kind,
        outcome: event.outcome,
        resource: Some(EventResource { id: event.resource_id, kind: event.resource_type }),
        actor,
        metadata: event.metadata,
        error: event.error,
        sandbox: event.sandbox.map(|sandbox| sandbox_shown(*sandbox)),
        timestamp: event.at,
        details,
    }
}

/// The first message of a stream, with where it begins.
pub fn connected(id: i64, at: DateTime<Utc>) -> Bytes {
    message(Some(id), &bare(CONNECTED, at))
}

/// Between what a listener has heard and `oldest` there is more, and it is not kept any more.
pub fn gap(oldest: i64, at: DateTime<Utc>) -> Bytes {
    let event =
        Event { details: [("oldest".to_owned(), oldest.to_string().into())].into_iter().collect(), ..bare(GAP, at) };
    message(None, &event)
}

/// What is no event: readers pass over it.
pub fn comment(text: &str) -> Bytes {
    Bytes::from(format!(": {text}\n\n"))
}

fn bare(kind: &str, at: DateTime<Utc>) -> Event {
    Event {
        id: None,
        event: kind.to_owned(),
        outcome: None,
        resource: None,
        actor: None,
        metadata: std::collections::BTreeMap::new(),
        error: None,
        sandbox: None,
        timestamp: at,
        details: serde_json::Map::new(),
    }
}

fn message(id: Option<i64>, event: &Event) -> Bytes {
    // Without line breaks, which JSON writes as \n.
    let data = serde_json::to_string(event).expect("an event is JSON");
    let id = id.map(|id| format!("id: {id}\n")).unwrap_or_default();
    Bytes::from(format!("event: {}\n{id}data: {data}\n\n", event.event))
}

/// What somebody hears from now on.
pub struct Listening {
    pub events: broadcast::Receiver<Arc<Told>>,
    /// The event after which it begins.
    pub position: i64,
    pub place: Place,
}

/// A listener's place, given back when it leaves.
pub struct Place(Arc<Feed>, TeamId);

impl Drop for Place {
    fn drop(&mut self) {
        let mut listeners = self.0.listeners.lock().unwrap_or_else(PoisonError::into_inner);
        let left = listeners.get(&self.1).map_or(0, |taken| taken - 1);
        if left == 0 {
            listeners.remove(&self.1);
        } else {
            listeners.insert(self.1, left);
        }
    }
}

#[derive(Debug, thiserror::Error)]
#[error("no listener can be taken now")]
pub struct NoPlace;

struct Ask {
    team: TeamId,
    answer: oneshot::Sender<(broadcast::Receiver<Arc<Told>>, i64)>,
}

pub struct Feed {
    asks: mpsc::Sender<Ask>,
    /// Until the reader takes it.
    asked: Mutex<Option<mpsc::Receiver<Ask>>>,
    /// How many each team has.
    listeners: Mutex<HashMap<TeamId, usize>>,
}

impl Feed {
    pub fn new() -> Arc<Self> {
        let (asks, asked) = mpsc::channel(ASKS_MAX);
        Arc::new(Self { asks, asked: Mutex::new(Some(asked)), listeners: Mutex::default() })
    }

    fn place(self: &Arc<Self>, team: TeamId) -> Option<Place> {
        let mut listeners = self.listeners.lock().unwrap_or_else(PoisonError::into_inner);
        let is_full = listeners.values().sum::<usize>() >= LISTENERS_MAX
            || listeners.get(&team).is_some_and(|taken| *taken >= LISTENERS_OF_TEAM_MAX);
        if is_full {
            return None;
        }
        *listeners.entry(team).or_default() += 1;
        Some(Place(self.clone(), team))
    }

    /// From here on nothing of the team is missed.
    pub async fn listen(self: &Arc<Self>, team: TeamId) -> Result<Listening, NoPlace> {
        let place = self.place(team).ok_or(NoPlace)?;
        let (answer, answered) = oneshot::channel();
        let let_in = async {
            self.asks.send(Ask { team, answer }).await.map_err(|_| NoPlace)?;
            answered.await.map_err(|_| NoPlace)
        };
        let (events, position) = tokio::time::timeout(ASK_TIME_MAX, let_in).await.map_err(|_| NoPlace)??;
        Ok(Listening { events, position, place })
    }
}

/// The one task that reads, until this replica ends.
pub async fn read(app: App) {
    let Some(mut asked) = app.feed.asked.lock().unwrap_or_else(PoisonError::into_inner).take() else { return };
    let mut reader = Reader { teams: HashMap::new(), position: None };
    let mut next = Instant::now();
    let mut is_down = false;
    loop {
        tokio::select! {
            () = app.stop.cancelled() => return,
            Some(ask) = asked.recv() => {
                if let Err(cause) = reader.let_in(&app, ask).await {
                    warn!("a listener is not let in: {cause}");
                }
            }
            () = tokio::time::sleep_until(next) => {
                let looked = reader.look(&app).await;
                let pause = if reader.teams.is_empty() { IDLE_LOOK_EVERY } else { LOOK_EVERY };
                next = Instant::now() + if looked.is_ok() { pause } else { LOOK_AGAIN };
                match looked {
                    Ok(()) => is_down = false,
                    // Said once.
                    Err(cause) if cause.is_unavailable() => {
                        if !std::mem::replace(&mut is_down, true) {
                            warn!("events wait for the database");
                        }
                    }
                    Err(cause) => error!(error = ?cause, "events are not read: {cause}"),
                }
            }
        }
        if !reader.teams.is_empty() {
            next = next.min(Instant::now() + LOOK_EVERY.max(if is_down { LOOK_AGAIN } else { LOOK_EVERY }));
        }
    }
}

struct Reader {
    teams: HashMap<TeamId, broadcast::Sender<Arc<Told>>>,
    /// What was read last; none while nobody listens.
    position: Option<i64>,
}

impl Reader {
    async fn let_in(&mut self, app: &App, ask: Ask) -> Result<(), StoreError> {
        let position = match self.position {
            Some(position) => position,
            None => app.store.events_kept().await?.0,
        };
        self.position = Some(position);
        let events = self.teams.entry(ask.team).or_insert_with(|| broadcast::Sender::new(BEHIND_MAX)).subscribe();
        // It may have left already.
        let _ = ask.answer.send((events, position));
        Ok(())
    }

    async fn look(&mut self, app: &App) -> Result<(), StoreError> {
        for _ in 0..ROUNDS_MAX {
            if app.store.number_events().await? == 0 {
                break;
            }
        }
        self.teams.retain(|_, listeners| listeners.receiver_count() > 0);
        if self.teams.is_empty() {
            self.position = None;
        }
        let Some(mut position) = self.position else { return Ok(()) };
        // Numbers are there in order: below the newest none comes any more.
        let newest = app.store.events_kept().await?.0;
        let teams: Vec<TeamId> = self.teams.keys().copied().collect();
        for _ in 0..ROUNDS_MAX {
            if newest <= position {
                break;
            }
            let events = app.store.events_of_teams(&teams, position, newest, EVENTS_MAX).await?;
            let is_all = events.len() < usize::try_from(EVENTS_MAX).unwrap_or(usize::MAX);
            position = if is_all { newest } else { events.last().map_or(newest, |event| event.id) };
            self.position = Some(position);
            for event in events {
                if let Some(listeners) = self.teams.get(&event.team) {
                    // All may have left in this moment.
                    let _ = listeners.send(Arc::new(Told::of(event)));
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_team_takes_a_part_of_the_places_and_gives_it_back() {
        let feed = Feed::new();
        let team = |number: u128| TeamId(uuid::Uuid::from_u128(number));
        let taken: Vec<Place> = (0..LISTENERS_OF_TEAM_MAX).map(|_| feed.place(team(1)).unwrap()).collect();
        assert!(feed.place(team(1)).is_none() && feed.place(team(2)).is_some());
        drop(taken);
        assert!(feed.listeners.lock().unwrap().is_empty());
        let all: Vec<Place> = (0..LISTENERS_MAX).map(|n| feed.place(team(n as u128 % 8)).unwrap()).collect();
        assert!(feed.place(team(9)).is_none());
        drop(all);
    }

    #[test]
    fn messages_have_the_published_form() {
        let at = DateTime::from_timestamp(1_800_000_000, 0).unwrap();
        let text = String::from_utf8(connected(7, at).to_vec()).unwrap();
        assert_eq!(
            text,
            "event: connected\nid: 7\ndata: {\"event\":\"connected\",\"sandbox\":null,\"timestamp\":\"2027-01-15T08:00:00Z\"}\n\n"
        );
        assert_eq!(&comment("keepalive")[..], b": keepalive\n\n");
    }
}
