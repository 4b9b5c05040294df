//! Events on a real PostgreSQL: whoever remembers how far they have read misses none, in whatever order transactions end; each change is
//! told once, with who wished it.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use model::ids::{HostId, SandboxId, TeamId, UserId};
use model::sandbox::{Desired, Kept, Observed, Status};
use model::shape::Shape;
use sqlx::{AssertSqlSafe, Connection as _, Executor as _, PgConnection, Row as _};
use store::Store;
use store::audit::{Actor, ActorKind};
use store::events::{Asked, Event};
use store::hosts::NewHost;
use store::operations::Lease;
use store::placement::Asked as AskedOfHost;
use store::policy::Policy;
use store::presence::Replica;
use store::sandboxes::{Created, NewSandbox, Report};
use store::wishes::{KillWish, ResumeOf, Turned};
use testkit::postgres::Database;
use uuid::Uuid;

async fn platform() -> (Database, Store, TeamId) {
    let database = Database::new().await;
    let store = Store::new(&database.url).unwrap();
    store.migrate().await.unwrap();
    let team = TeamId(Uuid::now_v7());
    assert!(store.make_first_administrator(UserId(Uuid::now_v7()), team, "a@b", "hash").await.unwrap());
    (database, store, team)
}

async fn all_of(store: &Store, team: TeamId, after: i64) -> Vec<Event> {
    store.events(team, &Asked { after, limit: 1000, ..Asked::default() }).await.unwrap()
}

fn writing(team: TeamId, name: &str) -> AssertSqlSafe<String> {
    AssertSqlSafe(format!(
        "insert into events_written (team_id, kind, resource_type, resource_id) values ('{}', 'host.up', 'host', '{name}')",
        team.0
    ))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_that_ends_late_is_not_passed_over() {
    let (database, store, team) = platform().await;
    let mut early = PgConnection::connect(&database.url).await.unwrap();
    let mut late = PgConnection::connect(&database.url).await.unwrap();
    // It writes first and ends last.
    late.execute("begin").await.unwrap();
    late.execute(writing(team, "late")).await.unwrap();
    early.execute(writing(team, "early")).await.unwrap();
    assert_eq!(store.number_events().await.unwrap(), 1);
    let first = all_of(&store, team, 0).await;
    assert_eq!(first.iter().map(|event| event.resource_id.as_str()).collect::<Vec<_>>(), ["early"]);
    // While somebody else is at it, nothing is done, and nobody waits.
    let mut numbering = PgConnection::connect(&database.url).await.unwrap();
    let mut other = numbering.begin().await.unwrap();
    sqlx::query("select pg_advisory_xact_lock($1)").bind(0x7772_6576_i64).execute(&mut *other).await.unwrap();
    late.execute("commit").await.unwrap();
    assert_eq!(store.number_events().await.unwrap(), 0);
    other.rollback().await.unwrap();
    assert_eq!(store.number_events().await.unwrap(), 1);
    let rest = all_of(&store, team, first[0].id).await;
    assert_eq!(rest.iter().map(|event| event.resource_id.as_str()).collect::<Vec<_>>(), ["late"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn readers_beside_many_writers_see_each_event_once_and_in_order() {
    const WRITERS: u64 = 12;
    const EACH: u64 = 40;
    let (database, store, team) = platform().await;
    let writers = (0..WRITERS).map(|writer| {
        let url = database.url.clone();
        tokio::spawn(async move {
            let mut connection = PgConnection::connect(&url).await.unwrap();
            for number in 0..EACH {
                connection.execute("begin").await.unwrap();
                connection.execute(writing(team, &format!("{writer}-{number}"))).await.unwrap();
                // In another order than they were written in.
                tokio::time::sleep(Duration::from_millis((writer * 7 + number * 13) % 17)).await;
                let end = if (writer + number) % 10 == 9 { "rollback" } else { "commit" };
                connection.execute(end).await.unwrap();
            }
        })
    });
    let writers: Vec<_> = writers.collect();
    let kept = (0..WRITERS).flat_map(|writer| (0..EACH).map(move |number| (writer, number)));
    let kept: BTreeSet<String> = kept.filter(|(w, n)| (w + n) % 10 != 9).map(|(w, n)| format!("{w}-{n}")).collect();
    let readers = (0..3).map(|reader| {
        let (store, expected) = (store.clone(), kept.len());
        tokio::spawn(async move {
            let (mut after, mut seen) = (0, Vec::new());
            while seen.len() < expected {
                store.number_events().await.unwrap();
                let page = store.events(team, &Asked { after, limit: 7, ..Asked::default() }).await.unwrap();
                for event in page {
                    assert!(event.id > after, "reader {reader}");
                    after = event.id;
                    seen.push(event.resource_id);
                }
            }
            seen
        })
    });
    let readers: Vec<_> = readers.collect();
    for writer in writers {
        writer.await.unwrap();
    }
    for reader in readers {
        let seen = tokio::time::timeout(Duration::from_secs(60), reader).await.expect("all are seen").unwrap();
        assert_eq!(seen.len(), kept.len());
        assert_eq!(seen.into_iter().collect::<BTreeSet<_>>(), kept);
    }
}

/// The database tells of states in the words of the model.
#[tokio::test]
async fn the_database_knows_the_states_that_are_shown() {
    let (database, _, _) = platform().await;
    let mut connection = PgConnection::connect(&database.url).await.unwrap();
    for desired in [Desired::Running, Desired::Paused, Desired::Killed] {
        for observed in [
            Observed::Starting,
            Observed::Running,
            Observed::Pausing,
            Observed::Paused,
            Observed::Resuming,
            Observed::Killing,
            Observed::Killed,
            Observed::Failed,
            Observed::Lost,
        ] {
            let said = sqlx::query("select sandbox_status($1, $2)").bind(desired.as_str()).bind(observed.as_str());
            let said: String = said.fetch_one(&mut connection).await.unwrap().get(0);
            assert_eq!(said, Status::of(desired, observed).as_str(), "{desired} {observed}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_becomes_of_a_sandbox_is_told_with_who_wished_it() {
    let (database, store, team) = platform().await;
    let host = HostId(Uuid::now_v7());
    let new = NewHost {
        id: host,
        team: None,
        provider: None,
        availability_zone: None,
        created_by: "test".to_owned(),
        tags: Vec::new(),
        token_hash: [7; 32],
    };
    store.create_host(&new, None, &Actor::platform("test")).await.unwrap();
    let state = "state = 'active', address = 'h:1', cpu_cores = 4, memory_mb = 4096, templates = '{minimal}', last_heartbeat_at = now()";
    database.sql(&format!("update hosts set {state} where id = '{}'", host.0)).await;
    let actor = Actor { kind: ActorKind::User, id: "usr-x".to_owned(), team: Some(team), request_id: String::new() };
    let lease = Lease { replica: Replica::from_random(7) };
    let id = SandboxId::from_random(7);
    let new = NewSandbox {
        id: id.clone(),
        team,
        template: "minimal".parse().unwrap(),
        snapshot: None,
        shape: Shape::new(1, 256, 1024).unwrap(),
        envs: BTreeMap::new(),
        metadata: BTreeMap::new(),
        default_user: String::new(),
        policy: Policy::default(),
        asked: AskedOfHost::default(),
    };
    let Created::Made(_, run) = store.create_sandbox(&new, &lease, None, &actor).await.unwrap() else { panic!() };
    let report = |observed| Report {
        observed,
        reason: String::new(),
        incarnation: "i".to_owned(),
        isolation: "fake".to_owned(),
        versions: BTreeMap::new(),
        steps: vec![("boot".to_owned(), 1.5)],
        kept: Kept::Memory,
    };
    store.finish_run(&run, &report(Observed::Running)).await.unwrap();
    let pause = store.wish_paused(team, &id, Kept::Memory, &lease, &actor).await.unwrap();
    let Turned::Opened(pause) = pause else { panic!() };
    store.take_back(&pause, Observed::Running, "agent_error", "no disk", &[]).await.unwrap();
    let pause = store.wish_paused(team, &id, Kept::Memory, &lease, &actor).await.unwrap();
    let Turned::Opened(pause) = pause else { panic!() };
    store.finish_pause(&pause, &report(Observed::Paused)).await.unwrap();
    let resume = store.wish_resumed(team, &id, ResumeOf::Wish, &lease, &actor).await.unwrap();
    let Turned::Opened(resume) = resume else { panic!() };
    store.finish_run(&resume, &report(Observed::Running)).await.unwrap();
    database
        .sql(&format!("update sandboxes set timeout_sec = 1, deadline = now() - interval '1 s' where id = '{id}'"))
        .await;
    assert_eq!(store.expire_sandboxes().await.unwrap(), 1);
    let KillWish::UnderWay(kill) = store.wish_killed(team, &id, &lease, &actor).await.unwrap() else { panic!() };
    let kill = store.operation(kill).await.unwrap().unwrap();
    store.finish_kill(&kill, &[]).await.unwrap();
    // Late, and so it changes nothing and is told by nobody.
    store.finish_kill(&kill, &[]).await.unwrap();
    store.number_events().await.unwrap();
    let events = all_of(&store, team, 0).await;
    let said: Vec<String> = events
        .iter()
        .map(|event| {
            let metadata = |name: &str| event.metadata.get(name).map(String::as_str).unwrap_or("-");
            match event.kind.as_str() {
                "capsule.state.changed" => format!("{} -> {}", metadata("from"), metadata("to")),
                kind => format!(
                    "{kind} {} {} {}",
                    event.outcome.as_deref().unwrap_or("-"),
                    event.actor.as_ref().map_or("-", |actor| actor.kind.as_str()),
                    metadata("reason")
                ),
            }
        })
        .collect();
    assert_eq!(
        said,
        [
            "- -> starting",
            "starting -> running",
            "capsule.create success user -",
            "running -> pausing",
            "pausing -> running",
            "capsule.pause error user -",
            "running -> pausing",
            "pausing -> paused",
            "capsule.pause success user -",
            "paused -> resuming",
            "resuming -> running",
            "capsule.resume success user -",
            "running -> stopping",
            "stopping -> stopped",
            "capsule.destroy success platform ttl_expired",
        ]
    );
    assert_eq!(events[5].error.as_deref(), Some("no disk"));
    assert_eq!(events[2].details["steps"], serde_json::json!([["boot", 1.5]]));
    assert!(events.iter().all(|event| event.sandbox.as_ref().is_some_and(|sandbox| sandbox.id == id)));
    let some = Asked { kinds: vec!["capsule.pause".to_owned()], limit: 10, ..Asked::default() };
    assert_eq!(store.events(team, &some).await.unwrap().len(), 2);
    // Nothing is kept for ever.
    database.sql("update events set at = now() - interval '8 days' where kind = 'capsule.pause'").await;
    database
        .sql(
            "insert into events_written (at, team_id, kind, resource_type, resource_id)
        values (now() - interval '8 days', gen_random_uuid(), 'host.up', 'host', 'x')",
        )
        .await;
    store.remove_old_rows(0).await.unwrap();
    assert_eq!(store.events(team, &some).await.unwrap().len(), 0);
    assert_eq!(all_of(&store, team, 0).await.len(), events.len() - 2);
    assert_eq!(database.sql("select count(*) from events_written").await.trim(), "0");
}
