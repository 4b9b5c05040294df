//! What listens in the guest, and how the world reaches it.
//!
//! A server that listens on 127.0.0.1 alone would not be reachable through the sandbox's host name: the host's packets come to the guest's
//! own address. The scanner looks once a second for such listeners and the forwarder stands in for each at the own address. Around a
//! snapshot it takes nobody new, and a restore ends what it carried: those peers are gone. It forwards to loopback and nowhere else.
//!
//! `GET /ports` lists who listens, `GET /activity` says whether anything happens here.

pub mod activity;
mod forward;
pub mod list;
mod reset;

use std::net::{IpAddr, Ipv4Addr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval};

use crate::server::Guest;
use forward::Forwarder;

pub use reset::end_lost_connections;

/// A new server is reachable after a second at most.
const SCAN_INTERVAL: Duration = Duration::from_secs(1);

/// Where the guest is reached from outside, and what ends with an incarnation.
#[derive(Debug)]
pub struct Ports {
    own: watch::Sender<Option<IpAddr>>,
    /// Grows with each restore.
    restores: watch::Sender<u64>,
    forwarded: Mutex<Vec<u16>>,
}

impl Ports {
    /// `own` is known from the start in tests; a sandbox's is the one that its host speaks to.
    pub fn new(own: Option<IpAddr>) -> Self {
        Self { own: watch::Sender::new(own), restores: watch::Sender::new(0), forwarded: Mutex::default() }
    }

    /// The host has reached the guest at this address.
    pub fn reached_at(&self, address: IpAddr) {
        if !address.is_loopback() {
            self.own.send_if_modified(|own| own.replace(address) != Some(address));
        }
    }

    /// What was carried for peers of an earlier incarnation ends.
    pub fn restored(&self) {
        self.restores.send_modify(|restores| *restores += 1);
    }

    /// Ports that are reachable because they are forwarded.
    pub fn forwarded(&self) -> Vec<u16> {
        self.forwarded.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Runs as long as envd does; a scan that panicked would be the end of forwarding alone.
pub async fn forward(guest: Arc<Guest>) {
    let mut own = guest.ports.own.subscribe();
    let Ok(mut address) = own.wait_for(Option::is_some).await.map(|own| own.unwrap_or(Ipv4Addr::UNSPECIFIED.into()))
    else {
        return;
    };
    let mut forwarder = Forwarder::new(guest.clone(), address);
    let mut ticks = interval(SCAN_INTERVAL);
    // After a restore one scan, not one for each second that was missed.
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        guest.quiet.over().await;
        let present = own.borrow_and_update().unwrap_or(address);
        if present != address {
            address = present;
            forwarder = Forwarder::new(guest.clone(), address);
        }
        forwarder.follow(&list::listeners());
        *guest.ports.forwarded.lock().unwrap_or_else(PoisonError::into_inner) = forwarder.ports();
    }
}
