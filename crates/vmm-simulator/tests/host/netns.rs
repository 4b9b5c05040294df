//! A network namespace with taps in it, gone with its value.

use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

static MADE: AtomicU32 = AtomicU32::new(0);

pub struct NetworkNamespace {
    pub name: String,
}

impl NetworkNamespace {
    /// `None`, and a sentence, without the rights to make one.
    pub fn new(taps: &[&str]) -> Option<Self> {
        if !super::is_root() {
            println!("SKIPPED: a network namespace needs root");
            return None;
        }
        let name = format!("vmmsim-{}-{}", std::process::id(), MADE.fetch_add(1, Ordering::Relaxed));
        if !ip(&["netns", "add", &name]) {
            println!("SKIPPED: `ip netns add` does not work here");
            return None;
        }
        let namespace = Self { name };
        for tap in taps {
            assert!(ip(&["-n", &namespace.name, "tuntap", "add", tap, "mode", "tap"]), "add {tap}");
        }
        Some(namespace)
    }
}

impl Drop for NetworkNamespace {
    fn drop(&mut self) {
        ip(&["netns", "del", &self.name]);
    }
}

fn ip(arguments: &[&str]) -> bool {
    Command::new("ip").args(arguments).status().is_ok_and(|status| status.success())
}
