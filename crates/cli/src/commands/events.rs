//! `wrenn events`: what happened to the team's things, and, with `-f`, what happens. A stream that breaks goes on after the event that was heard
//! last, so that nothing is missed.

use std::collections::VecDeque;
use std::process::ExitCode;
use std::time::Duration;

use api::v1::events::{CONNECTED, Event, EventPage, GAP};
use reqwest::{Method, StatusCode, header};
use url::Url;

use crate::client::{Client, SILENCE_MAX};
use crate::credentials::Options;
use crate::failure::Failure;
use crate::output::{Format, print_line, show, table};
use crate::printable::escaped;
use crate::sse::{Message, Parser};

/// Of one call of the API.
const PAGE: usize = 1000;
const PAUSE_FIRST: Duration = Duration::from_millis(250);
const PAUSE_MAX: Duration = Duration::from_secs(10);

#[derive(clap::Args)]
#[command(after_long_help = "\
  wrenn events --sandbox SANDBOX                     what happened to it, as far as it is kept (seven days)
  wrenn events -f --kind capsule.create,capsule.destroy
  wrenn events -f --since 4711                       what came after that event, and then what comes

A stream that is cut off is opened again after the last event that was heard. With -f and --json each event is a document of its own, on a line.")]
pub struct Arguments {
    /// Go on with what happens, until Ctrl-C.
    #[arg(long, short)]
    follow: bool,
    /// Only what came after this event [default: all that is kept; with -f, from now on].
    #[arg(long, value_name = "ID")]
    since: Option<String>,
    /// Only of these: capsule.create, capsule.pause, capsule.state.changed, sandbox.forked, host.up, ... With commas.
    #[arg(long, value_name = "KINDS", value_delimiter = ',')]
    kind: Vec<String>,
    /// Only of this sandbox.
    #[arg(long, value_name = "ID")]
    sandbox: Option<String>,
    /// At most so many, the newest of them.
    #[arg(long, value_name = "N", default_value_t = 100, conflicts_with = "follow", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    limit: u32,
}

pub async fn run(arguments: &Arguments, options: &Options, format: Format) -> Result<ExitCode, Failure> {
    let client = Client::of_user(options)?;
    if arguments.follow {
        return tokio::select! {
            over = followed(arguments, &client, format) => over.map(|never| match never {}),
            _ = tokio::signal::ctrl_c() => Ok(ExitCode::from(130)),
        };
    }
    let events = kept(arguments, &client).await?;
    show(format, &events, |events| {
        table(
            &["ID", "AT", "EVENT", "OUTCOME", "OF", "BY", "MORE"],
            events.iter().map(|event| row(event).to_vec()).collect(),
        )
    })?;
    Ok(ExitCode::SUCCESS)
}

/// Oldest first; of more than the limit the newest.
async fn kept(arguments: &Arguments, client: &Client) -> Result<VecDeque<Event>, Failure> {
    let limit = arguments.limit as usize;
    let mut events = VecDeque::new();
    let mut after = arguments.since.clone();
    loop {
        let mut url = arguments.url(client, &["v1", "events"]);
        url.query_pairs_mut().append_pair("limit", &PAGE.to_string());
        if let Some(after) = &after {
            url.query_pairs_mut().append_pair("after", after);
        }
        let page: EventPage = client.get(url).await?;
        let is_last = page.events.len() < PAGE;
        events.extend(page.events);
        events.drain(..events.len().saturating_sub(limit));
        if is_last {
            return Ok(events);
        }
        after = Some(page.next_after);
    }
}

/// Until the server says that there is no right to it.
async fn followed(arguments: &Arguments, client: &Client, format: Format) -> Result<std::convert::Infallible, Failure> {
    let mut last = arguments.since.clone();
    let mut pause = PAUSE_FIRST;
    loop {
        let before = last.clone();
        match listened(arguments, client, format, &mut last).await {
            Ended::Refused(failure) => return Err(failure),
            Ended::Broke if last != before => pause = PAUSE_FIRST,
            Ended::Broke => pause = (pause * 2).min(PAUSE_MAX),
        }
        tokio::time::sleep(pause).await;
    }
}

enum Ended {
    Refused(Failure),
    /// To be asked for again, after the last that was heard.
    Broke,
}

async fn listened(arguments: &Arguments, client: &Client, format: Format, last: &mut Option<String>) -> Ended {
    let mut request = client
        .request(Method::GET, arguments.url(client, &["v1", "events", "all", "stream"]))
        .header(header::ACCEPT, "text/event-stream");
    if let Some(last) = last.as_ref() {
        request = request.header("Last-Event-ID", last);
    }
    let Ok(Ok(answer)) = tokio::time::timeout(SILENCE_MAX, request.send()).await else { return Ended::Broke };
    let is_away = answer.status().is_server_error() || answer.status() == StatusCode::TOO_MANY_REQUESTS;
    let mut answer = match client.checked(answer).await {
        Ok(answer) => answer,
        Err(_) if is_away => return Ended::Broke,
        Err(failure) => return Ended::Refused(failure),
    };
    let mut parser = Parser::default();
    loop {
        // A word comes every half minute.
        let Ok(Ok(Some(chunk))) = tokio::time::timeout(SILENCE_MAX, answer.chunk()).await else { return Ended::Broke };
        let Ok(messages) = parser.feed(&chunk) else {
            return Ended::Refused(Failure::new("the server sends events that have no end"));
        };
        for message in messages {
            if let Err(failure) = told(&message, format) {
                return Ended::Refused(failure);
            }
            if message.id.is_some() {
                *last = message.id;
            }
        }
    }
}

fn told(message: &Message, format: Format) -> Result<(), Failure> {
    let mut event: Event = serde_json::from_str(&message.data)
        .map_err(|error| Failure::new(format!("an event of the server is not understood: {error}")))?;
    event.id = event.id.or_else(|| message.id.clone());
    match (event.event.as_str(), format) {
        (CONNECTED, _) => Ok(()),
        (GAP, Format::Human) => {
            eprintln!("wrenn: events that came before these are not kept any more");
            Ok(())
        }
        (_, Format::Json) => print_line(&serde_json::to_string(&event).expect("an event is JSON")),
        (_, Format::Human) => {
            let [id, at, kind, outcome, of, by, more] = row(&event);
            // Wide enough for what is usual: nobody knows how wide the lines to come are.
            print_line(format!("{id:>5}  {at}  {kind:24}  {outcome:7}  {of:24}  {by}  {more}").trim_end())
        }
    }
}

impl Arguments {
    fn url(&self, client: &Client, segments: &[&str]) -> Url {
        let mut url = client.url(segments);
        if let Some(sandbox) = &self.sandbox {
            url.query_pairs_mut().append_pair("sandbox_id", sandbox);
        }
        if !self.kind.is_empty() {
            url.query_pairs_mut().append_pair("kinds", &self.kind.join(","));
        }
        url
    }
}

fn row(event: &Event) -> [String; 7] {
    let by = event.actor.as_ref().map(|actor| {
        let name = actor.name.as_deref().filter(|name| !name.is_empty());
        name.or(actor.id.as_deref().filter(|id| !id.is_empty())).unwrap_or(&actor.kind)
    });
    let mut more: Vec<String> = match (event.metadata.get("from"), event.metadata.get("to")) {
        (Some(from), Some(to)) => vec![format!("{from} -> {to}")],
        (None, Some(to)) => vec![to.clone()],
        _ => Vec::new(),
    };
    let rest = event.metadata.iter().filter(|(name, _)| !matches!(name.as_str(), "from" | "to"));
    more.extend(rest.map(|(name, value)| format!("{name}={value}")));
    more.extend(event.error.clone());
    [
        event.id.clone().unwrap_or_default(),
        event.timestamp.format("%Y-%m-%d %H:%M:%S").to_string(),
        event.event.clone(),
        event.outcome.clone().unwrap_or_default(),
        event.resource.as_ref().map(|resource| escaped(&resource.id)).unwrap_or_default(),
        escaped(by.unwrap_or_default()),
        escaped(&more.join(" ")),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_a_line() {
        let event: Event = serde_json::from_str(
            r#"{"id": "7", "event": "capsule.state.changed", "resource": {"id": "sb1", "type": "capsule"},
                "actor": {"type": "system"}, "metadata": {"from": "running", "reason": "idle", "to": "pausing"},
                "sandbox": null, "timestamp": "2026-01-01T00:00:00Z"}"#,
        )
        .unwrap();
        let line = row(&event).join("|");
        assert_eq!(line, "7|2026-01-01 00:00:00|capsule.state.changed||sb1|system|running -> pausing reason=idle");
    }
}
