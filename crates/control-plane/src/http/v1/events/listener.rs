//! Somebody who listens: what they have missed out of the database, and then what the reader brings.
//!
//! ```text
//!   connected -> (gap) -> what came after Last-Event-ID, page by page -> live, until the client leaves, falls behind, loses its rights,
//!                                                                         or this replica ends
//! ```

use std::collections::VecDeque;
use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use axum::body::Body;
use axum::response::Response;
use bytes::Bytes;
use chrono::Utc;
use futures::stream;
use http::{HeaderMap, HeaderName, HeaderValue, header};
use model::ids::{SandboxId, TeamId};
use store::events::Asked;
use tokio::sync::broadcast::error::RecvError;
use tokio::time::{Instant, sleep_until};

use crate::app::App;
use crate::events::{self, Listening, Told};
use crate::http::errors::ApiError;
use crate::http::rights::{self, Grant};
use crate::measures::Counted;

/// As published: proxies cut what is silent for a minute.
const KEEPALIVE_EVERY: Duration = Duration::from_secs(30);
/// Of what was missed, read at once.
const PAGE: i64 = 500;

/// What of it is told to this listener.
pub struct Filter {
    /// In the published form.
    pub is_published: bool,
    /// None of them: all.
    pub kinds: Vec<String>,
    pub sandbox: Option<SandboxId>,
}

impl Filter {
    fn pick(&self, told: &Told) -> Option<Bytes> {
        let is_of = |id: &SandboxId| told.of.iter().flatten().any(|of| of == id.as_str());
        if !self.kinds.is_empty() && !self.kinds.contains(&told.kind) || !self.sandbox.as_ref().is_none_or(is_of) {
            return None;
        }
        if self.is_published { told.published.clone() } else { Some(told.whole.clone()) }
    }
}

/// The event after which a stream is to begin; the header goes before the parameter, which a browser sends again as it was.
pub fn begin(headers: &HeaderMap, parameter: Option<&str>) -> Result<Option<i64>, ApiError> {
    let header = headers.get("last-event-id").filter(|value| !value.is_empty());
    match (header, parameter) {
        (Some(value), _) => super::place("Last-Event-ID", value.to_str().unwrap_or_default()).map(Some),
        (None, Some(text)) => super::place("last_event_id", text).map(Some),
        (None, None) => Ok(None),
    }
}

pub struct Listener {
    app: App,
    team: TeamId,
    filter: Filter,
    listening: Listening,
    /// After which event the next page of what was missed begins.
    missed: Option<i64>,
    /// Nothing up to this one is told again.
    told: i64,
    ready: VecDeque<Bytes>,
    keepalive: Instant,
    rights_lost: Pin<Box<dyn Future<Output = ()> + Send>>,
    is_over: bool,
    _counted: Counted,
}

impl Listener {
    pub async fn open(
        app: App,
        team: TeamId,
        grant: Grant,
        filter: Filter,
        after: Option<i64>,
    ) -> Result<Self, ApiError> {
        let listening = app.feed.listen(team).await.map_err(|_| ApiError::unavailable())?;
        let (now, position) = (Utc::now(), listening.position);
        let mut ready = VecDeque::new();
        let (mut missed, mut told) = (None, position);
        if let Some(after) = after {
            let (newest, oldest) = app.store.events_kept().await?;
            // One that is still to come: of another database, or of this one before it was restored.
            let is_unknown = after > newest;
            let is_gap = is_unknown || after + 1 < oldest;
            let from = if is_unknown {
                position
            } else if is_gap {
                oldest - 1
            } else {
                after
            };
            // A client that leaves in the middle of what it has missed comes back to there.
            ready.push_back(events::connected(from, now));
            if is_gap {
                ready.push_back(match filter.is_published {
                    true => events::comment(&format!("events before {oldest} are not kept any more")),
                    false => events::gap(oldest, now),
                });
            }
            (missed, told) = (Some(from), from);
        } else {
            ready.push_back(events::connected(position, now));
        }
        let (asked, of) = (app.clone(), grant);
        Ok(Self {
            rights_lost: Box::pin(async move { rights::lost(&asked, &of).await }),
            keepalive: Instant::now() + KEEPALIVE_EVERY,
            app,
            team,
            filter,
            listening,
            missed,
            told,
            ready,
            is_over: false,
            _counted: Counted::event_stream(),
        })
    }

    pub fn response(self) -> Response {
        let messages = stream::unfold(self, |mut listener| async move {
            let message = listener.next().await?;
            Some((Ok::<_, Infallible>(message), listener))
        });
        let mut response = Response::new(Body::from_stream(messages));
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        // Proxies that gather answers would keep events back.
        headers.insert(HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no"));
        response
    }

    async fn next(&mut self) -> Option<Bytes> {
        loop {
            if let Some(message) = self.ready.pop_front() {
                self.keepalive = Instant::now() + KEEPALIVE_EVERY;
                return Some(message);
            }
            if self.is_over {
                return None;
            }
            if let Some(after) = self.missed {
                self.read_missed(after).await;
                continue;
            }
            let (stop, keepalive) = (self.app.stop.clone(), self.keepalive);
            tokio::select! {
                biased;
                () = stop.cancelled() => self.end("this replica ends; come back with Last-Event-ID"),
                () = self.rights_lost.as_mut() => self.end("the right to listen was lost"),
                told = self.listening.events.recv() => match told {
                    Ok(told) if told.id > self.told => self.ready.extend(self.filter.pick(&told)),
                    // It was among what was missed.
                    Ok(_) => {}
                    Err(RecvError::Lagged(_)) => self.end("too slow; come back with Last-Event-ID"),
                    Err(RecvError::Closed) => self.end("come back with Last-Event-ID"),
                },
                () = sleep_until(keepalive) => self.ready.push_back(events::comment("keepalive")),
            }
        }
    }

    fn end(&mut self, why: &str) {
        self.ready.push_back(events::comment(why));
        self.is_over = true;
    }

    async fn read_missed(&mut self, after: i64) {
        let asked =
            Asked { after, limit: PAGE, kinds: self.filter.kinds.clone(), sandbox: self.filter.sandbox.clone() };
        let Ok(page) = self.app.store.events(self.team, &asked).await else {
            return self.end("the database is away; come back with Last-Event-ID");
        };
        let is_last = page.len() < usize::try_from(PAGE).unwrap_or(usize::MAX);
        for event in page {
            self.told = event.id;
            self.ready.extend(self.filter.pick(&Told::of(event)));
        }
        self.missed = (!is_last).then_some(self.told);
    }
}
