//! What has served its time, on a real PostgreSQL: all of it goes in one run, however much it is, and nothing else.

use model::ids::{TeamId, UserId};
use store::Store;
use testkit::postgres::Database;
use uuid::Uuid;

/// More than one statement takes.
const MANY: u32 = 2500;

#[tokio::test]
async fn what_has_served_its_time_goes_at_once_and_nothing_else() {
    let database = Database::new().await;
    let store = Store::new(&database.url).unwrap();
    store.migrate().await.unwrap();
    let team = TeamId(Uuid::now_v7());
    assert!(store.make_first_administrator(UserId(Uuid::now_v7()), team, "a@b", "hash").await.unwrap());
    let sandboxes = |prefix: &str, observed: &str, killed_at: &str, count: u32| {
        format!(
            "insert into sandboxes (id, team_id, template, vcpus, memory_mib, disk_mib, desired, observed, killed_at)
             select '{prefix}' || n, '{}', 'minimal', 1, 512, 5120, 'killed', '{observed}', {killed_at}
             from generate_series(1, {count}) n;",
            team.0
        )
    };
    let operations = |of: &str, phase: &str, finished_at: &str, count: u32| {
        format!(
            "insert into operations (id, sandbox_id, kind, revision, phase, finished_at)
             select gen_random_uuid(), '{of}', 'kill', n, '{phase}', {finished_at} from generate_series(1, {count}) n;"
        )
    };
    let audit = |action: &str, at: &str, count: u32| {
        format!(
            "insert into audit (at, actor_kind, actor_id, action, subject)
             select {at}, 'platform', 'test', '{action}', 'x' from generate_series(1, {count});"
        )
    };
    let key = |prefix: &str, expires_at: &str, count: u32| {
        format!(
            "insert into idempotency (scope, key, args_hash, subject, expires_at)
             select 's', '{prefix}' || n, '', 'x', {expires_at} from generate_series(1, {count}) n;"
        )
    };
    let setting = [
        sandboxes("old", "killed", "now() - interval '31 days'", MANY),
        sandboxes("new", "killed", "now() - interval '29 days'", 3),
        sandboxes("being-cleaned", "killed", "now() - interval '31 days'", 1),
        sandboxes("being-killed", "killing", "null", 2),
        operations("old1", "done", "now() - interval '31 days'", 2),
        operations("new1", "done", "now() - interval '8 days'", MANY),
        operations("new1", "done", "now() - interval '6 days'", 4),
        operations("being-cleaned1", "open", "null", 1),
        audit("old", "now() - interval '366 days'", MANY),
        audit("new", "now() - interval '364 days'", 5),
        key("old", "now() - interval '1 s'", MANY),
        key("new", "now() + interval '1 h'", 6),
    ];
    database.sql(&setting.concat()).await;
    store.remove_old_rows(365).await.unwrap();
    for (what, left) in [
        ("sandboxes where observed = 'killed'", 4),
        ("sandboxes where observed = 'killing'", 2),
        ("operations", 5),
        ("audit where action = 'old'", 0),
        ("audit where action = 'new'", 5),
        ("idempotency", 6),
    ] {
        let count = database.sql(&format!("select count(*) from {what}")).await;
        assert_eq!(count.trim(), left.to_string(), "{what}");
    }
    // What is kept for ever is not counted in days.
    database.sql(&audit("old", "now() - interval '9999 days'", 1)).await;
    store.remove_old_rows(0).await.unwrap();
    assert_eq!(database.sql("select count(*) from audit where action = 'old'").await.trim(), "1");
}
