//! The databases of tests: apart from each other, able to go away and come back, and gone with the process that made them.

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use testkit::postgres::{Database, Server};

const HOLD: &str = "WRENN_TEST_HOLD";

#[tokio::test]
async fn databases_are_empty_and_apart() {
    let (one, other) = tokio::join!(Database::new(), Database::new());
    assert_eq!(one.sql("create table x as select 7 as n; select n from x").await, "7");
    assert_eq!(other.sql("select count(*) from pg_tables where schemaname = 'public'").await, "0");
    assert_eq!(other.sql("select rolsuper from pg_roles where rolname = current_user").await, "f");
    assert_ne!(one.url, other.url);
}

#[tokio::test]
async fn a_server_goes_away_and_comes_back_with_its_data() {
    let database = Database::on_own_server().await;
    let url = database.url.clone();
    database.sql("create table kept as select 'yes' as answer").await;
    database.stop_server().await;
    database.stop_server().await;
    assert!(!Path::new(socket_dir(&url)).join(".s.PGSQL.5432").exists());
    database.start_server().await;
    assert_eq!((database.sql("select answer from kept").await.as_str(), &url), ("yes", &database.url));
    let dir = socket_dir(&url).to_owned();
    drop(database);
    assert!(!Path::new(&dir).exists(), "{dir} is left");
}

#[tokio::test]
#[should_panic(expected = "on_own_server")]
async fn the_shared_server_is_not_stopped() {
    Database::new().await.stop_server().await;
}

/// What the next test kills. It does nothing when the runner calls it.
#[test]
fn hold() {
    if std::env::var_os(HOLD).is_none() {
        return;
    }
    let server = Server::start().unwrap();
    println!("\nheld {}", server.create_database("held").unwrap());
    std::thread::sleep(Duration::from_secs(60));
}

#[test]
fn a_server_ends_with_its_process_however_that_ends() {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "hold", "--nocapture"]).env(HOLD, "1").stdin(Stdio::null()).stdout(Stdio::piped());
    let mut process = command.spawn().unwrap();
    let mut lines = BufReader::new(process.stdout.take().unwrap()).lines().map_while(Result::ok);
    let url =
        lines.find_map(|line| line.strip_prefix("held ").map(str::to_owned)).expect("it says where the server is");
    let dir = socket_dir(&url).to_owned();
    let pid = std::fs::read_to_string(format!("{dir}/data/postmaster.pid")).unwrap();
    let pid = pid.lines().next().unwrap().to_owned();
    assert_eq!(process_name(&pid).as_deref(), Some("postgres\n"));

    process.kill().unwrap();
    process.wait().unwrap();

    let began = Instant::now();
    while process_name(&pid).is_some() {
        assert!(began.elapsed() < Duration::from_secs(20), "the server {pid} is still there");
        std::thread::sleep(Duration::from_millis(20));
    }
    drop(Server::start().unwrap());
    assert!(!Path::new(&dir).exists(), "the next start removes what a killed process left");
}

fn socket_dir(url: &str) -> &str {
    url.split_once("?host=").expect("the url names the directory of the socket").1
}

fn process_name(pid: &str) -> Option<String> {
    std::fs::read_to_string(format!("/proc/{pid}/comm")).ok()
}
