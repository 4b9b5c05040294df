//! PostgreSQL restarts, dies, answers and is not heard, is full, and takes no writes: clients hear 503 and nothing else that is not so.

use std::collections::BTreeMap;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rand::Rng as _;
use testkit::cut_proxy::{FAIR, SILENT};
use testkit::postgres::Stop;

use super::client::{Answer, Client, NoAnswer};
use super::cluster::{Cluster, wait};
use super::host::Host;
use super::seed::{dice, seed};
use super::truth;

/// After PostgreSQL is back, everybody is served again within this time.
const BACK_MAX: Duration = Duration::from_secs(30);
const CLIENTS: u64 = 6;

/// What the clients heard.
#[derive(Default)]
struct Heard {
    unavailable: AtomicU64,
    fine: AtomicU64,
}

impl Heard {
    /// Repeats a call until it is answered. Every answer is one of `right`, or says that the platform cannot just now.
    async fn until_right<F>(&self, what: &str, right: &[u16], call: impl Fn() -> F) -> Answer
    where
        F: Future<Output = Result<Answer, NoAnswer>>,
    {
        let began = Instant::now();
        loop {
            match call().await {
                Ok(answer) if answer.is_unavailable() => {
                    self.unavailable.fetch_add(1, Ordering::Relaxed);
                }
                Ok(answer) => {
                    let is_right = right.contains(&answer.status);
                    assert!(is_right, "{what} was answered {} {}", answer.status, answer.body);
                    self.fine.fetch_add(1, Ordering::Relaxed);
                    return answer;
                }
                // A control plane lives all the time; it may end a connection in no other way than by an answer.
                Err(NoAnswer) => panic!("{what} was not answered at all"),
            }
            assert!(began.elapsed() < BACK_MAX + Duration::from_secs(30), "{what}: no answer");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

/// One client's sandboxes from create to kill, with what it was told; the last one stays. By key.
async fn live(
    client: Client,
    heard: Arc<Heard>,
    part: u64,
    seed: u64,
    stop: Arc<AtomicBool>,
) -> BTreeMap<String, String> {
    let mut dice = dice(seed, part);
    let mut made = BTreeMap::new();
    for round in 0.. {
        let key = format!("client-{part}-{round}");
        let first = heard.until_right("create", &[201, 202], || client.create_once(&key, 10)).await;
        let id = first.id();
        made.insert(key.clone(), id.clone());
        heard.until_right("get", &[200], || client.verb_once(&id, "get", 0)).await;
        client.wait_status(&id, "running", Duration::from_secs(60)).await;
        if dice.random_bool(0.5) {
            heard.until_right("pause", &[200, 202], || client.verb_once(&id, "pause", 10)).await;
            client.wait_status(&id, "paused", Duration::from_secs(60)).await;
            heard.until_right("resume", &[200, 202], || client.verb_once(&id, "resume", 10)).await;
            client.wait_status(&id, "running", Duration::from_secs(60)).await;
        }
        let again = heard.until_right("repeated create", &[201, 202], || client.create_once(&key, 10)).await;
        assert_eq!(again.id(), id, "one key, one sandbox");
        if stop.load(Ordering::Relaxed) {
            break;
        }
        heard.until_right("kill", &[202, 204], || client.verb_once(&id, "kill", 10)).await;
    }
    made
}

async fn restarts(count: u64, every: Duration) {
    let seed = seed();
    let cluster = Cluster::start(2).await;
    let host = Host::join(&cluster).await;
    let quiet = cluster.team.running("untouched").await;
    let pids = host.alive()[&quiet].clone();
    let (heard, stop) = (Arc::<Heard>::default(), Arc::<AtomicBool>::default());
    let clients: Vec<_> = (0..CLIENTS)
        .map(|part| tokio::spawn(live(cluster.team.clone(), heard.clone(), part, seed, stop.clone())))
        .collect();
    let mut dice = dice(seed, 99);
    for number in 0..count {
        tokio::time::sleep(every.mul_f64(dice.random_range(0.5..1.0))).await;
        let way = [Stop::Fast, Stop::Immediate, Stop::Kill][usize::try_from(number % 3).unwrap()];
        cluster.database.stop_server_by(way).await;
        let is_asked = || async { cluster.team.verb_once(&quiet, "get", 0).await.unwrap() };
        assert!(is_asked().await.is_unavailable(), "without a database nobody knows");
        tokio::time::sleep(Duration::from_millis(dice.random_range(0..1500))).await;
        cluster.database.start_server().await;
        let back = wait("service after a restart", BACK_MAX, || async { is_asked().await.status == 200 }).await;
        println!("{way:?}: served again after {back:?}");
    }
    stop.store(true, Ordering::Relaxed);
    let mut made = BTreeMap::new();
    for client in clients {
        made.extend(client.await.unwrap());
    }
    println!(
        "{} answers, {} times unavailable",
        heard.fine.load(Ordering::Relaxed),
        heard.unavailable.load(Ordering::Relaxed)
    );
    truth::judge(&cluster, &[&host]).await;
    truth::judge_audit(&cluster).await;
    let there = cluster.rows("select id from sandboxes").await;
    for (key, id) in &made {
        assert!(there.iter().any(|row| row[0] == *id), "{key} was told {id}, which is in no row");
        assert_eq!(host.launches_of(id).min(1), 1, "{key}");
    }
    assert_eq!(there.len(), made.len() + 1, "one sandbox for each key");
    assert_eq!(host.alive()[&quiet], pids, "what runs does not hear of it");
}

#[tokio::test(flavor = "multi_thread")]
async fn restarts_under_load_lose_and_invent_nothing() {
    restarts(3, Duration::from_secs(2)).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "ten minutes: make check-long"]
async fn restarts_under_load_for_ten_minutes_lose_and_invent_nothing() {
    restarts(30, Duration::from_secs(27)).await;
}

/// Whatever is committed when its reply is lost, is done once: each of the first commits of each verb.
#[tokio::test(flavor = "multi_thread")]
async fn a_commit_whose_reply_is_lost_has_happened_once() {
    let cluster = Cluster::start(1).await;
    let host = Host::join(&cluster).await;
    let mut rounds = 0;
    for spared in 0..3 {
        let mut id = String::new();
        for (verb, wanted) in [("create", "running"), ("pause", "paused"), ("resume", "running"), ("kill", "stopped")] {
            cluster.to_database.lose_reply_to(b"COMMIT", spared);
            let began = Instant::now();
            let answer = match verb {
                "create" => cluster.team.create(&format!("{spared} are spared")).await,
                verb => cluster.team.verb(&id, verb).await,
            };
            assert!(matches!(answer.status, 200..=204), "{verb}: {} {}", answer.status, answer.body);
            id = if verb == "create" { answer.id() } else { id };
            cluster.team.wait_status(&id, wanted, Duration::from_secs(20)).await;
            assert!(began.elapsed() < Duration::from_secs(20), "{verb} took {:?}", began.elapsed());
            cluster.to_database.spare_replies();
            rounds += 1;
        }
    }
    let lost = cluster.to_database.replies_lost();
    println!("{lost} replies lost in {rounds} rounds");
    assert!(lost >= rounds / 3, "only {lost} replies were lost: this tests nothing");
    truth::judge(&cluster, &[&host]).await;
    truth::judge_audit(&cluster).await;
}

/// A server that says nothing any more costs an answer its time, and no more than that.
#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_is_silent_is_unavailable_and_not_waited_for() {
    let cluster = Cluster::start(1).await;
    let host = Host::join(&cluster).await;
    let id = cluster.team.running("one").await;
    cluster.to_database.set(SILENT);
    let began = Instant::now();
    let answer = cluster.team.verb_once(&id, "get", 0).await.expect("an answer");
    assert!(answer.is_unavailable(), "{} {}", answer.status, answer.body);
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
    let answer = cluster.team.create_once("two", 4).await.expect("an answer");
    assert!(answer.is_unavailable(), "{} {}", answer.status, answer.body);
    cluster.to_database.set(FAIR);
    let served = || async { cluster.team.verb_once(&id, "get", 0).await.is_ok_and(|answer| answer.status == 200) };
    wait("service after the silence", BACK_MAX, served).await;
    let second = cluster.team.create("two").await.id();
    cluster.team.wait_status(&second, "running", Duration::from_secs(60)).await;
    truth::judge(&cluster, &[&host]).await;
    truth::judge_audit(&cluster).await;
}

/// A file system of the test's own, which goes with it.
struct Small(tempfile::TempDir);

impl Small {
    fn mount(mib: u32) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let options = format!("size={mib}m,mode=0777");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(dir.path()).status();
        assert!(mounted.unwrap().success(), "a tmpfs cannot be mounted; tests run as root");
        let owner = nix::unistd::User::from_name("postgres").unwrap().expect("PostgreSQL is installed");
        std::os::unix::fs::chown(dir.path(), Some(owner.uid.as_raw()), Some(owner.gid.as_raw())).unwrap();
        Self(dir)
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        // The server may still hold files of it.
        let _ = Command::new("umount").arg("--lazy").arg(self.0.path()).status();
    }
}

/// Its disk is full: what cannot be written is not begun, and what runs goes on.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_is_unavailable_and_leaves_nothing_half() {
    let small = Small::mount(40);
    let mut cluster = Cluster::start(2).await;
    for replica in &mut cluster.replicas {
        replica.kill();
    }
    let (server, name) = (cluster.database.server().clone(), cluster.database.name().to_owned());
    server.administer(&format!("create tablespace small location '{}'", small.0.path().display())).unwrap();
    server.administer(&format!("alter database {name} set tablespace small")).unwrap();
    for number in 0..2 {
        cluster.restart(number).await;
    }
    let host = Host::join(&cluster).await;
    let quiet = cluster.team.running("untouched").await;
    let alive = host.alive();
    let filled = |rows: u32| {
        format!(
            "do $$ begin loop begin insert into filler select repeat('x', 7000) from generate_series(1, {rows});
                exception when disk_full then exit; end; end loop; end $$"
        )
    };
    cluster.database.sql("create table filler (text text); alter table filler alter text set storage plain").await;
    for rows in [100, 1] {
        cluster.database.sql(&filled(rows)).await;
    }
    let mut made = vec!["untouched".to_owned()];
    let mut refused = 0;
    for number in 0..200 {
        let key = format!("full {number}");
        let answer = cluster.team.create_once(&key, 0).await.unwrap();
        if answer.is_unavailable() {
            refused += 1;
        } else {
            assert!(matches!(answer.status, 201 | 202), "{} {}", answer.status, answer.body);
            made.push(key);
        }
        if refused > 5 {
            break;
        }
    }
    assert!(refused > 5, "the disk is not full: this tests nothing");
    assert_eq!(cluster.team.verb(&quiet, "get").await.status, 200, "what is there can be read");
    assert!(alive.iter().all(|(id, pids)| host.alive().get(id) == Some(pids)), "hosts are not touched");
    cluster.database.sql("drop table filler").await;
    let after = cluster.team.create("after").await;
    assert!(matches!(after.status, 201 | 202), "{} {}", after.status, after.body);
    made.push("after".to_owned());
    truth::judge(&cluster, &[&host]).await;
    truth::judge_audit(&cluster).await;
    assert_eq!(cluster.count("sandboxes").await, i64::try_from(made.len()).unwrap(), "no half ones");
}
