//! Migrations: what a death in the middle leaves, two programs at once, every earlier schema, tables that are in use, and the queries of
//! the versions before. What was released is never edited.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use serde_json::Value;
use sqlx::migrate::{Migration, Migrator};
use sqlx::{
    AssertSqlSafe, Column as _, Connection as _, Executor as _, PgConnection, Row as _, SqlSafeStr as _,
    Statement as _, TypeInfo as _,
};
use store::Store;
use testkit::postgres::Database;

const SUMS: &str = include_str!("released/migrations.sha256");

fn all() -> Vec<Migration> {
    sqlx::migrate!().iter().cloned().collect()
}

fn first(count: usize) -> Migrator {
    Migrator::with_migrations(all().into_iter().take(count).collect())
}

async fn connect(database: &Database) -> PgConnection {
    PgConnection::connect(&database.url).await.unwrap()
}

/// Every column, index and constraint.
async fn schema(connection: &mut PgConnection) -> BTreeSet<String> {
    let rows = sqlx::query(
        "select format('column %s.%s %s %s %s', table_name, column_name, udt_name, is_nullable, coalesce(column_default, '-'))
         from information_schema.columns where table_schema = 'public'
         union all select format('index %s', indexdef) from pg_indexes where schemaname = 'public'
         union all select format('constraint %s %s %s', conrelid::regclass, conname, pg_get_constraintdef(oid))
         from pg_constraint where connamespace = 'public'::regnamespace
         union all select format('trigger %s %s', tgrelid::regclass, tgname) from pg_trigger where not tgisinternal",
    )
    .fetch_all(connection)
    .await
    .unwrap();
    rows.iter().map(|row| row.get::<String, _>(0)).collect()
}

/// What a new platform gets.
async fn fresh() -> BTreeSet<String> {
    let database = Database::new().await;
    Store::new(&database.url).unwrap().migrate().await.unwrap();
    schema(&mut connect(&database).await).await
}

/// Comments and empty lines taken out; no migration has a semicolon within a statement, but in the body of a function.
fn statements(sql: &str) -> Vec<String> {
    let lines: Vec<&str> = sql.lines().map(|line| line.split("--").next().unwrap_or_default()).collect();
    let mut statements = vec![String::new()];
    for (number, part) in lines.join("\n").split("$$").enumerate() {
        let last = statements.len() - 1;
        if number % 2 == 1 {
            statements[last].push_str(&format!("$${part}$$"));
            continue;
        }
        let mut pieces = part.split(';');
        statements[last].push_str(pieces.next().unwrap_or_default());
        statements.extend(pieces.map(str::to_owned));
    }
    statements.iter().map(|text| text.trim().to_owned()).filter(|text| !text.is_empty()).collect()
}

/// Rows of the first schema that a platform would have.
const ROWS: &str = "
    insert into teams (id, name, is_platform) values ('00000000-0000-0000-0000-000000000001', 't', true);
    insert into users (id, email, name, is_admin) values ('00000000-0000-0000-0000-000000000002', 'a@b', 'n', true);
    insert into team_members (team_id, user_id, role)
        values ('00000000-0000-0000-0000-000000000001', '00000000-0000-0000-0000-000000000002', 'owner');
    insert into api_keys (id, team_id, name, key_hash, key_prefix)
        values ('00000000-0000-0000-0000-000000000003', '00000000-0000-0000-0000-000000000001', 'k', '\\x00', 'wrn_x');
    insert into hosts (id, kind, state, created_by) values ('00000000-0000-0000-0000-000000000004', 'regular', 'active', 'x');
    insert into sandboxes (id, team_id, template, vcpus, memory_mib, disk_mib, desired, observed, host_id)
        values ('sb0', '00000000-0000-0000-0000-000000000001', 'minimal', 1, 256, 1024, 'running', 'running',
            '00000000-0000-0000-0000-000000000004');
    insert into operations (id, sandbox_id, kind, revision)
        values ('00000000-0000-0000-0000-000000000005', 'sb0', 'run', 1);";

#[tokio::test(flavor = "multi_thread")]
async fn a_death_at_each_statement_leaves_the_schema_before_and_the_next_start_goes_on() {
    let database = Database::new().await;
    let migrations = all();
    for (count, migration) in migrations.iter().enumerate() {
        first(count).run(&mut connect(&database).await).await.unwrap();
        if count == 1 {
            connect(&database).await.execute(ROWS).await.unwrap();
        }
        let before = schema(&mut connect(&database).await).await;
        let statements = statements(migration.sql.as_str());
        assert!(!statements.is_empty(), "{}", migration.description);
        for done in 1..=statements.len() {
            let mut dying = connect(&database).await;
            // As the migrator has it: the lock of the connection, one transaction, and then the death.
            dying.execute("select pg_advisory_lock(1); begin").await.unwrap();
            for statement in &statements[..done] {
                dying
                    .execute(AssertSqlSafe(statement.clone()))
                    .await
                    .unwrap_or_else(|error| panic!("{statement}: {error}"));
            }
            let pid: i32 = sqlx::query_scalar("select pg_backend_pid()").fetch_one(&mut dying).await.unwrap();
            let mut other = connect(&database).await;
            sqlx::query("select pg_terminate_backend($1, 5000)").bind(pid).execute(&mut other).await.unwrap();
            assert_eq!(schema(&mut other).await, before, "{} after {done} statements", migration.description);
        }
    }
    let store = Store::new(&database.url).unwrap();
    store.migrate().await.unwrap();
    assert_eq!(schema(&mut connect(&database).await).await, fresh().await);
    let version = store.schema_version().await.unwrap();
    assert_eq!((version.database, version.program), (migrations.last().unwrap().version, version.database));
}

#[tokio::test(flavor = "multi_thread")]
async fn every_earlier_schema_becomes_the_one_of_now_and_keeps_its_rows() {
    let fresh = fresh().await;
    for count in 1..=all().len() {
        let database = Database::new().await;
        first(1).run(&mut connect(&database).await).await.unwrap();
        connect(&database).await.execute(ROWS).await.unwrap();
        first(count).run(&mut connect(&database).await).await.unwrap();
        let store = Store::new(&database.url).unwrap();
        store.migrate().await.unwrap();
        let mut connection = connect(&database).await;
        assert_eq!(schema(&mut connection).await, fresh, "from the schema after {count} migrations");
        for table in ["teams", "users", "team_members", "api_keys", "hosts", "sandboxes", "operations"] {
            let rows: i64 = sqlx::query_scalar(AssertSqlSafe(format!("select count(*) from {table}")))
                .fetch_one(&mut connection)
                .await
                .unwrap();
            assert_eq!(rows, 1, "{table} from the schema after {count} migrations");
        }
        // And nothing is done twice.
        store.migrate().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn programs_that_start_at_once_migrate_once() {
    let database = Database::new().await;
    let starts = (0..8).map(|_| {
        let url = database.url.clone();
        async move { Store::new(&url).unwrap().migrate().await }
    });
    for ended in futures::future::join_all(starts).await {
        ended.unwrap();
    }
    assert_eq!(schema(&mut connect(&database).await).await, fresh().await);
    let count = database.sql("select count(*) from _sqlx_migrations").await;
    assert_eq!(count.trim().parse::<usize>().unwrap(), all().len());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_in_use_holds_a_migration_up_and_not_the_other_way_round() {
    let database = Database::new().await;
    let count = all().iter().position(|migration| migration.version == 7).expect("it alters teams and users");
    first(count).run(&mut connect(&database).await).await.unwrap();
    // A program that serves, with a transaction that goes on for long.
    let mut serving = connect(&database).await;
    serving.execute("begin; select * from users").await.unwrap();
    let url = database.url.clone();
    let migrating = tokio::spawn(async move { Store::new(&url).unwrap().migrate().await });
    // Another one's queries of the same table meanwhile: each waits no longer than the migration waits for its lock.
    let mut other = connect(&database).await;
    let began = Instant::now();
    let mut slowest = Duration::ZERO;
    while began.elapsed() < Duration::from_secs(4) {
        let asked = Instant::now();
        other.execute("select count(*) from users").await.unwrap();
        slowest = slowest.max(asked.elapsed());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(!migrating.is_finished(), "nothing held it up");
    assert!(slowest > Duration::from_millis(200), "nothing waited: {slowest:?}");
    assert!(slowest < Duration::from_millis(2500), "a query waited for {slowest:?}");
    serving.execute("commit").await.unwrap();
    migrating.await.unwrap().unwrap();
    assert_eq!(schema(&mut connect(&database).await).await, fresh().await);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_older_program_starts_on_a_newer_schema() {
    let database = Database::new().await;
    let store = Store::new(&database.url).unwrap();
    store.migrate().await.unwrap();
    database
        .sql(
            "insert into _sqlx_migrations (version, description, success, checksum, execution_time)
             values (9999, 'of tomorrow', true, '\\x00', 1)",
        )
        .await;
    store.migrate().await.unwrap();
    let version = store.schema_version().await.unwrap();
    assert_eq!((version.database, version.program), (9999, all().last().unwrap().version));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_queries_of_released_versions_go_on() {
    let database = Database::new().await;
    Store::new(&database.url).unwrap().migrate().await.unwrap();
    let mut connection = connect(&database).await;
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/released");
    let mut checked = 0;
    for entry in std::fs::read_dir(folder).unwrap().flatten() {
        if entry.path().extension().is_none_or(|extension| extension != "json") {
            continue;
        }
        let kept: Vec<Value> = serde_json::from_slice(&std::fs::read(entry.path()).unwrap()).unwrap();
        for known in &kept {
            let query = known["query"].as_str().unwrap();
            let name = entry.file_name();
            let prepared = (&mut connection).prepare(AssertSqlSafe(query.to_owned()).into_sql_str()).await;
            let prepared = prepared.unwrap_or_else(|error| panic!("{}: {query}: {error}", name.display()));
            let columns = prepared.columns();
            let names: Vec<&str> = columns.iter().map(|column| column.name()).collect();
            let types: Vec<String> = columns.iter().map(|column| column.type_info().name().to_lowercase()).collect();
            let was: Vec<String> = known["types"].as_array().unwrap().iter().map(word).collect();
            assert_eq!(serde_json::json!(names), known["names"], "{}: {query}", name.display());
            assert_eq!(types, was, "{}: {query}", name.display());
            checked += 1;
        }
    }
    assert!(checked > 200, "{checked} queries");
}

/// As PostgreSQL's names of types are written.
fn word(kind: &Value) -> String {
    let name = kind.as_str().unwrap_or_else(|| panic!("{kind} is no simple type")).to_lowercase();
    match name.strip_suffix("array") {
        Some(element) => format!("{element}[]"),
        None => name,
    }
}

#[test]
fn what_was_released_is_never_edited() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/migrations");
    let released: BTreeMap<&str, &str> =
        SUMS.lines().map(|line| line.split_once("  ").unwrap()).map(|(sum, name)| (name, sum)).collect();
    assert!(released.len() >= 8, "{released:?}");
    for (name, sum) in &released {
        let text = std::fs::read(format!("{folder}/{name}")).unwrap_or_else(|error| panic!("{name} is gone: {error}"));
        assert_eq!(digest(&text), **sum, "{name} was released: write another migration");
    }
    let newest = released.keys().max().unwrap();
    for entry in std::fs::read_dir(folder).unwrap().flatten() {
        let name = entry.file_name().into_string().unwrap();
        let is_new = name.as_str() > *newest;
        assert!(is_new || released.contains_key(name.as_str()), "{name} stands before {newest}, which was released");
    }
}

fn digest(bytes: &[u8]) -> String {
    use sha2::Digest as _;
    sha2::Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}
