//! Many clients wish at random of the same sandboxes, through two replicas that die, over connections that break: what each was told fits
//! into one order of all.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rand::Rng as _;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;
use testkit::postgres::Stop;

use super::client::{Client, NoAnswer};
use super::cluster::Cluster;
use super::history::{Call, Event, Said, Wished, contradiction};
use super::host::Host;
use super::seed::{dice, seed};
use super::truth;

/// Sandboxes that the clients quarrel about at one time.
const SHARED: usize = 6;
/// A sandbox is killed when so much was done with it: the search grows with the length of a history.
const EVENTS_MAX: usize = 60;

#[derive(Default)]
struct Shared {
    /// What each sandbox was asked and said.
    histories: Mutex<BTreeMap<String, Vec<Event>>>,
    /// Those that are not known to be killed.
    present: Mutex<Vec<String>>,
    /// What each key made.
    keys: Mutex<BTreeMap<String, String>>,
}

struct Quarreller {
    client: Client,
    shared: Arc<Shared>,
    dice: StdRng,
    part: u64,
}

impl Quarreller {
    async fn quarrel(mut self, operations: u64) {
        for number in 0..operations {
            let present = self.shared.present.lock().unwrap().clone();
            match present.choose(&mut self.dice) {
                Some(id) if present.len() >= SHARED || self.dice.random_bool(0.8) => self.turn(id).await,
                _ => self.create(number).await,
            }
        }
    }

    /// With a key; some clients leave before they are answered, and ask again.
    async fn create(&mut self, number: u64) {
        let key = format!("client {} operation {number}", self.part);
        let client = self.client.clone();
        if self.dice.random_bool(0.3) {
            let patience = Duration::from_millis(self.dice.random_range(0..60));
            if let Ok(Ok(first)) = tokio::time::timeout(patience, client.create_once(&key, 5)).await
                && first.body["id"].is_string()
            {
                self.shared.keys.lock().unwrap().insert(key.clone(), first.id());
            }
        }
        let made = client.create(&key).await;
        if made.code() == "rate_limited" || made.code() == "no_hosts_available" {
            return;
        }
        let id = made.id();
        let before = self.shared.keys.lock().unwrap().insert(key.clone(), id.clone());
        assert!(before.is_none_or(|before| before == id), "{key} made two sandboxes");
        // What is not running yet can be neither paused nor resumed.
        client.wait_status(&id, "running", Duration::from_secs(60)).await;
        self.shared.histories.lock().unwrap().insert(id.clone(), Vec::new());
        self.shared.present.lock().unwrap().push(id);
    }

    async fn turn(&mut self, id: &str) {
        let length = self.shared.histories.lock().unwrap()[id].len();
        let (call, verb) = match self.dice.random_range(0..100) {
            _ if length > EVENTS_MAX => (Call::Kill, "kill"),
            0..35 => (Call::Get, "get"),
            35..63 => (Call::Pause, "pause"),
            63..94 => (Call::Resume, "resume"),
            _ => (Call::Kill, "kill"),
        };
        let wait_sec = self.dice.random_range(0..2);
        let patience = Duration::from_millis(if self.dice.random_bool(0.1) { 5 } else { 30_000 });
        let began = Instant::now();
        let answer = tokio::time::timeout(patience, self.client.verb_once(id, verb, wait_sec)).await;
        let said = match answer.unwrap_or(Err(NoAnswer)) {
            Err(NoAnswer) => Said::Unknown,
            Ok(answer) if answer.is_unavailable() => Said::Unknown,
            Ok(answer) => match (call, answer.status) {
                (Call::Get, 200) => Said::Is(match answer.body["status"].as_str().unwrap_or_default() {
                    "running" | "resuming" => Wished::Running,
                    "pausing" | "paused" => Wished::Paused,
                    "stopping" | "stopped" => Wished::Killed,
                    other => panic!("{id} is {other}: {}", answer.body),
                }),
                (Call::Pause | Call::Resume, 200 | 202) | (Call::Kill, 202 | 204) => Said::Yes,
                (Call::Pause | Call::Resume, 409) => Said::No,
                (_, status) => panic!("{verb} of {id}: {status} {}", answer.body),
            },
        };
        let event = Event { call, said, began, ended: Instant::now() };
        self.shared.histories.lock().unwrap().get_mut(id).unwrap().push(event);
        if call == Call::Kill && said == Said::Yes {
            self.shared.present.lock().unwrap().retain(|known| known != id);
        }
    }
}

async fn quarrel(clients: u64, operations: u64, database_fails: bool) {
    let seed = seed();
    let mut cluster = Cluster::start(2).await;
    let host = Host::join(&cluster).await;
    let shared = Arc::<Shared>::default();
    let began = Instant::now();
    let quarrellers: Vec<_> = (0..clients)
        .map(|part| Quarreller { client: cluster.team.clone(), shared: shared.clone(), dice: dice(seed, part), part })
        .map(|one| tokio::spawn(one.quarrel(operations)))
        .collect();
    let all = futures::future::join_all(quarrellers);
    tokio::pin!(all);
    let mut fate = dice(seed, 1000);
    let mut faults = 0;
    let ended = loop {
        // The first soon: what eight clients do is over in a second or two.
        let pause = Duration::from_millis(if faults == 0 { 100 } else { fate.random_range(300..2500) });
        tokio::select! {
            ended = &mut all => break ended,
            () = tokio::time::sleep(pause) => {}
        }
        faults += 1;
        match fate.random_range(0..if database_fails { 6 } else { 5 }) {
            0 => cluster.restart(fate.random_range(0..2)).await,
            1 => cluster.to_database.cut(),
            2 => cluster.to_database.lose_reply_to(b"COMMIT", fate.random_range(0..4)),
            3 => host.inbound.cut(),
            4 => host.outbound.cut(),
            _ => {
                cluster.database.stop_server_by(Stop::Kill).await;
                cluster.database.start_server().await;
            }
        }
    };
    for one in ended {
        one.unwrap();
    }
    let histories = shared.histories.lock().unwrap().clone();
    let events: usize = histories.values().map(Vec::len).sum();
    let unknown = histories.values().flatten().filter(|event| event.said == Said::Unknown).count();
    println!(
        "{events} events of {} sandboxes, {unknown} of unknown outcome, {faults} faults, in {:?}",
        histories.len(),
        began.elapsed()
    );
    assert!(faults > 0 && unknown * 2 < events, "what is not answered proves nothing");
    for (id, history) in &histories {
        if let Some(events) = contradiction(Wished::Running, history) {
            panic!("no order explains what was said of {id}: {events:#?}");
        }
    }
    truth::judge(&cluster, &[&host]).await;
    truth::judge_audit(&cluster).await;
    let made = shared.keys.lock().unwrap().len();
    assert_eq!(cluster.count("sandboxes").await, i64::try_from(made).unwrap(), "one sandbox for each key");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_clients_were_told_fits_into_one_order() {
    quarrel(8, 60, false).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "sixteen clients with ten thousand operations each: make check-long"]
async fn what_sixteen_clients_were_told_in_160_000_operations_fits_into_one_order() {
    quarrel(16, 10_000, true).await;
}
