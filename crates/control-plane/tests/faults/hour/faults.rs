//! What is broken, by the seed's choice.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use host_agent::sandbox::points::CRASHPOINTS;
use rand::Rng as _;
use rand::rngs::StdRng;
use rand::seq::{IndexedRandom as _, SliceRandom as _};
use testkit::cut_proxy::{FAIR, Way, Weather};
use testkit::postgres::Stop;

use super::super::cluster::Cluster;
use super::super::crashes::EXPECTED;
use super::cables::{Cables, Lost};
use super::clients::Ledger;
use super::machine::Machine;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    ReplicaKilled,
    BothReplicasKilled,
    /// Counted when it dies there.
    ReplicaAtAPoint,
    AgentKilled,
    /// Counted when it dies there.
    AgentAtAPoint,
    MicrovmKilled,
    CablePulled,
    NothingReachesTheHost,
    NothingOfTheHostArrives,
    NetworkSlow,
    AnswersCut,
    ConnectionsOfAHostCut,
    HeartbeatsAged,
    DatabaseKilled,
    DatabaseRestarted,
    DatabaseConnectionsCut,
    ReplyToCommitLost,
}

pub const ALL: [Fault; 17] = [
    Fault::ReplicaKilled,
    Fault::BothReplicasKilled,
    Fault::ReplicaAtAPoint,
    Fault::AgentKilled,
    Fault::AgentAtAPoint,
    Fault::MicrovmKilled,
    Fault::CablePulled,
    Fault::NothingReachesTheHost,
    Fault::NothingOfTheHostArrives,
    Fault::NetworkSlow,
    Fault::AnswersCut,
    Fault::ConnectionsOfAHostCut,
    Fault::HeartbeatsAged,
    Fault::DatabaseKilled,
    Fault::DatabaseRestarted,
    Fault::DatabaseConnectionsCut,
    Fault::ReplyToCommitLost,
];
/// Points that are armed at once: whichever is passed first.
const ARMED: usize = 6;

/// How hard it is.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    /// Between two faults, at most.
    pub gap_max: Duration,
    /// What lasts, lasts no longer.
    pub lasts_max: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lasting {
    Cable,
    Slow { is_netem: bool },
    Answers,
}

pub struct Fate {
    pub dice: StdRng,
    pub pace: Pace,
    pub happened: BTreeMap<Fault, u64>,
    deck: Vec<Fault>,
    lasting: Vec<(Instant, usize, Lasting)>,
}

/// What faults are done to.
pub struct Stand<'a> {
    pub cluster: &'a mut Cluster,
    pub cables: &'a Cables,
    pub machines: &'a mut [Machine],
    pub ledger: &'a Ledger,
}

impl Fate {
    pub fn new(dice: StdRng, pace: Pace) -> Self {
        Self { dice, pace, happened: BTreeMap::new(), deck: Vec::new(), lasting: Vec::new() }
    }

    /// Waits a while, and breaks something. Each kind comes as often as the others.
    pub async fn strike(&mut self, stand: &mut Stand<'_>) {
        let gap = self.pace.gap_max.mul_f64(self.dice.random_range(0.1..1.0));
        tokio::time::sleep(gap).await;
        self.look_after(stand, Instant::now()).await;
        if self.deck.is_empty() {
            self.deck = ALL.to_vec();
            self.deck.shuffle(&mut self.dice);
        }
        let fault = self.deck.pop().expect("it has just been filled");
        if self.do_it(fault, stand).await {
            *self.happened.entry(fault).or_default() += 1;
        }
    }

    /// What is over is mended, and what died at a point starts again.
    async fn look_after(&mut self, stand: &mut Stand<'_>, now: Instant) {
        let (over, left) = std::mem::take(&mut self.lasting).into_iter().partition(|(until, ..)| *until <= now);
        self.lasting = left;
        for (_, host, lasting) in over {
            self.mend(stand, host, lasting);
        }
        for number in 0..stand.cluster.replicas.len() {
            if stand.cluster.replicas[number].has_ended() {
                *self.happened.entry(Fault::ReplicaAtAPoint).or_default() += 1;
                stand.cluster.restart(number).await;
            }
        }
        for machine in stand.machines.iter_mut() {
            if machine.has_ended() {
                *self.happened.entry(Fault::AgentAtAPoint).or_default() += 1;
                machine.kill();
                machine.start();
            }
        }
    }

    /// All is well from now on.
    pub async fn end(&mut self, stand: &mut Stand<'_>) {
        stand.cluster.to_database.spare_replies();
        stand.cluster.replicas.iter().for_each(super::super::cluster::Replica::disarm);
        stand.machines.iter().for_each(Machine::disarm);
        let last = self.lasting.iter().map(|(until, ..)| *until).max();
        self.look_after(stand, last.unwrap_or_else(Instant::now)).await;
    }

    fn mend(&self, stand: &mut Stand<'_>, host: usize, lasting: Lasting) {
        // Another of the same kind may go on.
        if self.lasting.iter().any(|(_, of, other)| *of == host && *other == lasting) {
            return;
        }
        match lasting {
            Lasting::Cable => stand.cables.mend(host),
            Lasting::Slow { is_netem: true } => stand.cables.hurry(host),
            Lasting::Slow { is_netem: false } | Lasting::Answers => {
                stand.machines[host].inbound.set(FAIR);
                stand.machines[host].outbound.set(FAIR);
            }
        }
    }

    fn lasts(&mut self, host: usize, lasting: Lasting) {
        let time = self.pace.lasts_max.mul_f64(self.dice.random_range(0.05..1.0));
        self.lasting.push((Instant::now() + time, host, lasting));
    }

    /// Whether it happened.
    async fn do_it(&mut self, fault: Fault, stand: &mut Stand<'_>) -> bool {
        let host = self.dice.random_range(0..stand.machines.len());
        let replica = self.dice.random_range(0..stand.cluster.replicas.len());
        let while_away = Duration::from_millis(self.dice.random_range(0..1500));
        println!("{fault:?} of host {host} or replica {replica}");
        match fault {
            Fault::ReplicaKilled => {
                stand.cluster.replicas[replica].kill();
                tokio::time::sleep(while_away).await;
                stand.cluster.restart(replica).await;
            }
            Fault::BothReplicasKilled => {
                stand.cluster.replicas.iter_mut().for_each(super::super::cluster::Replica::kill);
                tokio::time::sleep(while_away).await;
                for number in 0..stand.cluster.replicas.len() {
                    stand.cluster.restart(number).await;
                }
            }
            Fault::ReplicaAtAPoint => {
                let points: Vec<&str> = EXPECTED.choose_multiple(&mut self.dice, ARMED).copied().collect();
                stand.cluster.replicas[replica].arm_any(&points);
                return false;
            }
            Fault::AgentKilled => {
                stand.machines[host].kill();
                tokio::time::sleep(while_away).await;
                stand.machines[host].start();
            }
            Fault::AgentAtAPoint => {
                let points: Vec<&str> = CRASHPOINTS.choose_multiple(&mut self.dice, ARMED).copied().collect();
                stand.machines[host].arm_any(&points);
                return false;
            }
            Fault::MicrovmKilled => return self.end_a_microvm(stand, host),
            Fault::CablePulled => self.lose(stand, host, Lost::Both),
            Fault::NothingReachesTheHost => self.lose(stand, host, Lost::Sent),
            Fault::NothingOfTheHostArrives => self.lose(stand, host, Lost::Answered),
            Fault::NetworkSlow => {
                let ms = self.dice.random_range(20..400);
                let is_netem = stand.cables.delay(host, ms);
                if !is_netem {
                    let slow = Way::Delayed(Duration::from_millis(ms));
                    let weather = Weather { there: slow, back: slow, ..FAIR };
                    stand.machines[host].inbound.set(weather);
                    stand.machines[host].outbound.set(weather);
                }
                self.lasts(host, Lasting::Slow { is_netem });
            }
            Fault::AnswersCut => {
                let bytes = self.dice.random_range(0..4000);
                stand.machines[host].inbound.set(Weather { back: Way::CutAfter(bytes), ..FAIR });
                stand.machines[host].inbound.cut();
                self.lasts(host, Lasting::Answers);
            }
            Fault::ConnectionsOfAHostCut => {
                stand.machines[host].inbound.cut();
                stand.machines[host].outbound.cut();
            }
            Fault::HeartbeatsAged => stand.cluster.age_heartbeats(self.dice.random_range(30..200)).await,
            Fault::DatabaseKilled | Fault::DatabaseRestarted => {
                let way = if fault == Fault::DatabaseKilled { Stop::Kill } else { Stop::Fast };
                stand.cluster.database.stop_server_by(way).await;
                tokio::time::sleep(while_away).await;
                stand.cluster.database.start_server().await;
            }
            Fault::DatabaseConnectionsCut => stand.cluster.to_database.cut(),
            Fault::ReplyToCommitLost => {
                let before = stand.cluster.to_database.replies_lost();
                stand.cluster.to_database.lose_reply_to(b"COMMIT", self.dice.random_range(0..4));
                for _ in 0..50 {
                    if stand.cluster.to_database.replies_lost() > before {
                        return true;
                    }
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                return false;
            }
        }
        true
    }

    fn lose(&mut self, stand: &mut Stand<'_>, host: usize, lost: Lost) {
        stand.cables.lose(host, lost);
        self.lasts(host, Lasting::Cable);
    }

    fn end_a_microvm(&mut self, stand: &mut Stand<'_>, host: usize) -> bool {
        let alive: Vec<_> = stand.machines[host].place.alive().into_iter().collect();
        let Some((id, pids)) = alive.choose(&mut self.dice) else { return false };
        // First the word, so that nobody takes what follows for a fault of the platform.
        stand.ledger.harmed.lock().unwrap().insert(id.clone());
        stand.ledger.forget(id);
        for pid in pids {
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(*pid), nix::sys::signal::Signal::SIGKILL);
        }
        true
    }
}
