//! Statistics and usage on a real PostgreSQL: stretches follow the states of sandboxes, and what they come to is exact, before and after it
//! was summed up.

use chrono::{DateTime, TimeDelta, Utc};
use model::ids::{TeamId, UserId};
use store::Store;
use store::usage::{Load, QUARTER, Used};
use testkit::postgres::Database;
use uuid::Uuid;

struct Bench {
    database: Database,
    store: Store,
    team: TeamId,
}

impl Bench {
    async fn new() -> Self {
        let database = Database::new().await;
        let store = Store::new(&database.url).unwrap();
        store.migrate().await.unwrap();
        let team = TeamId(Uuid::now_v7());
        assert!(store.make_first_administrator(UserId(Uuid::now_v7()), team, "a@b", "hash").await.unwrap());
        Self { database, store, team }
    }

    async fn sql(&self, statements: &str) -> String {
        self.database.sql(statements).await.trim().to_owned()
    }

    /// A time in which a sandbox of the team ran.
    async fn stretch(&self, team: TeamId, vcpus: i32, memory: i32, began: DateTime<Utc>, ended: Option<DateTime<Utc>>) {
        let ended = ended.map_or("infinity".to_owned(), |ended| ended.to_rfc3339());
        self.sql(&format!(
            "insert into stretches values (gen_random_uuid()::text, '{}', {vcpus}, {memory}, '{}', '{ended}')",
            team.0,
            began.to_rfc3339()
        ))
        .await;
    }

    async fn summed_until(&self, until: DateTime<Utc>) {
        self.sql(&format!("update usage_summed set until = '{}'", until.to_rfc3339())).await;
    }
}

fn load(running: i64, vcpus: i64, memory_mib: i64) -> Load {
    Load { running, vcpus, memory_mib }
}

fn at(text: &str) -> DateTime<Utc> {
    text.parse().unwrap()
}

#[tokio::test]
async fn a_stretch_is_as_long_as_a_sandbox_runs() {
    let bench = Bench::new().await;
    bench
        .sql(&format!(
            "insert into sandboxes (id, team_id, template, vcpus, memory_mib, disk_mib, desired, observed)
             values ('sb1', '{}', 'minimal', 2, 512, 5120, 'running', 'starting')",
            bench.team.0
        ))
        .await;
    let steps = [
        ("starting", (0, 0)),
        ("running", (1, 1)),
        ("running", (1, 1)),
        ("pausing", (1, 1)),
        // The pause did not come about.
        ("running", (1, 1)),
        ("pausing", (1, 1)),
        ("paused", (0, 1)),
        ("resuming", (0, 1)),
        ("running", (1, 2)),
        ("lost", (0, 2)),
        ("running", (1, 3)),
        ("killing", (0, 3)),
        ("killed", (0, 3)),
    ];
    for (observed, (open, all)) in steps {
        bench.sql(&format!("update sandboxes set observed = '{observed}' where id = 'sb1'")).await;
        let counted =
            bench.sql("select count(*) filter (where ended_at = 'infinity') || ' ' || count(*) from stretches").await;
        assert_eq!(counted, format!("{open} {all}"), "{observed}");
        let now = bench.store.load_now(bench.team).await.unwrap();
        assert_eq!(now, load(open, 2 * open, 512 * open), "{observed}");
    }
    assert_eq!(bench.sql("select count(*) from stretches where ended_at < began_at").await, "0");
    assert_eq!(bench.store.load_now(TeamId(Uuid::now_v7())).await.unwrap(), Load::default());
}

#[tokio::test]
async fn a_bucket_has_the_most_that_ran_in_it() {
    let bench = Bench::new().await;
    let from = at("2026-03-01T12:00:00Z");
    let second = |n: i64| from + TimeDelta::seconds(n);
    // Before and through, one that goes on, two that meet within the third bucket, one after the other in the fourth, and an instant.
    bench.stretch(bench.team, 1, 100, second(-100), Some(second(5))).await;
    bench.stretch(bench.team, 1, 100, second(31), None).await;
    bench.stretch(bench.team, 2, 200, second(21), Some(second(25))).await;
    bench.stretch(bench.team, 4, 400, second(24), Some(second(26))).await;
    bench.stretch(bench.team, 8, 800, second(32), Some(second(33))).await;
    bench.stretch(bench.team, 16, 1600, second(33), Some(second(34))).await;
    bench.stretch(TeamId(Uuid::now_v7()), 64, 64, second(-9), None).await;
    // Over at the very beginning, and begun at the very end.
    bench.stretch(bench.team, 32, 32, second(-9), Some(second(0))).await;
    bench.stretch(bench.team, 32, 32, second(50), None).await;
    let series = bench.store.load_series(bench.team, from, TimeDelta::seconds(10), 5).await.unwrap();
    assert_eq!(series, [load(1, 1, 100), load(0, 0, 0), load(2, 6, 600), load(2, 17, 1700), load(1, 1, 100)]);
    assert!(bench.store.load_series(bench.team, from, TimeDelta::seconds(10), 0).await.unwrap().is_empty());
}

#[tokio::test]
async fn days_and_quarters_are_the_same_before_and_after_they_are_summed_up() {
    let bench = Bench::new().await;
    // Not so long ago that it is not kept.
    let first = Utc::now().date_naive() - TimeDelta::days(9);
    let start = first.and_time(chrono::NaiveTime::MIN).and_utc();
    let day = |n: i64| first + TimeDelta::days(n - 1);
    bench.summed_until(start).await;
    let hours = |n: i64| start + TimeDelta::hours(n);
    // From the first day into the second, within the second, and on and on from the third.
    bench.stretch(bench.team, 2, 1000, hours(23), Some(hours(26))).await;
    bench.stretch(bench.team, 1, 500, hours(25), Some(hours(25) + TimeDelta::minutes(30))).await;
    bench.stretch(bench.team, 4, 100, hours(60), None).await;
    for n in 0..50 {
        bench.stretch(TeamId(Uuid::from_u128(n)), 1, 1, hours(1), Some(hours(2))).await;
    }
    let now = hours(66) + TimeDelta::minutes(1);
    let used = |vcpu_hours: f64, memory_hours: f64| Used {
        vcpu_seconds: vcpu_hours * 3600.0,
        memory_mib_seconds: memory_hours * 3600.0,
    };
    let expected = [
        (day(1), used(2.0, 1000.0)),
        (day(2), used(4.5, 2250.0)),
        (day(3), used(4.0 * (6.0 + 1.0 / 60.0), 100.0 * (6.0 + 1.0 / 60.0))),
    ];
    let mut quarters = [Load::default(); 12];
    quarters[3] = load(1, 2, 1000);
    quarters[4] = load(2, 3, 1500);
    quarters[10] = load(1, 4, 100);
    quarters[11] = load(1, 4, 100);
    let check = async |when: &str| {
        let days = bench.store.usage(bench.team, day(1), day(9), now).await.unwrap();
        assert_eq!(days.len(), 3, "{when}: {days:?}");
        for (day, used) in expected {
            let is = days[&day];
            let close = |a: f64, b: f64| (a - b).abs() < 0.01;
            assert!(close(is.vcpu_seconds, used.vcpu_seconds), "{when} {day}: {is:?}");
            assert!(close(is.memory_mib_seconds, used.memory_mib_seconds), "{when} {day}: {is:?}");
        }
        assert_eq!(bench.store.quarters(bench.team, start, 12).await.unwrap(), quarters, "{when}");
        let only = bench.store.usage(bench.team, day(2), day(2), now).await.unwrap();
        assert_eq!(only.into_keys().collect::<Vec<_>>(), [day(2)], "{when}");
    };
    check("before").await;
    bench.store.sum_stretches(hours(30)).await.unwrap();
    let summed = async || bench.sql("select extract(epoch from until)::bigint from usage_summed").await;
    assert_eq!(
        summed().await,
        hours(24).timestamp().to_string(),
        "the quarter that has just ended may still get something"
    );
    check("in the middle").await;
    // Twice at once, and once more.
    let twice = tokio::join!(bench.store.sum_stretches(now), bench.store.sum_stretches(now));
    assert!(twice.0.is_ok() && twice.1.is_ok());
    bench.store.sum_stretches(now).await.unwrap();
    assert_eq!(summed().await, hours(60).timestamp().to_string());
    check("after").await;
    assert_eq!(
        bench
            .sql(
                "select count(*) from usage_quarters where team_id <> '{}'"
                    .replace("{}", &bench.team.0.to_string())
                    .as_str()
            )
            .await,
        "50"
    );
    // Those that are summed up and have ended go, and nothing is missed.
    bench.store.remove_old_rows(0).await.unwrap();
    assert_eq!(bench.sql("select count(*) from stretches").await, "1");
    check("without the stretches").await;
    assert_eq!(QUARTER, TimeDelta::hours(6));
}

#[tokio::test]
async fn what_is_not_summed_up_yet_stays() {
    let bench = Bench::new().await;
    let long_ago = Utc::now() - TimeDelta::days(9);
    bench.summed_until(long_ago).await;
    bench.stretch(bench.team, 1, 1, long_ago - TimeDelta::hours(3), Some(long_ago - TimeDelta::hours(2))).await;
    bench.stretch(bench.team, 1, 1, long_ago, Some(long_ago + TimeDelta::hours(1))).await;
    bench.sql(&format!(
        "insert into usage_quarters values ('{0}', now() - interval '101 days', 1, 1, 1, 1, 1), ('{0}', now() - interval '99 days', 1, 1, 1, 1, 1)",
        bench.team.0
    ))
    .await;
    bench.store.remove_old_rows(0).await.unwrap();
    assert_eq!(bench.sql("select count(*) from stretches").await, "1");
    assert_eq!(bench.sql("select count(*) from usage_quarters").await, "1");
}
