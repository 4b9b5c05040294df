//! One envd outside a sandbox, and the client for it.
#![allow(dead_code, unused_imports, reason = "each test program uses a part of it")]

use std::io::{BufRead as _, BufReader};
use std::net::{Ipv4Addr, SocketAddr};
use std::ops::Deref;
use std::process::{Child, Command, Stdio};

pub use testkit::envd::*;

pub struct Envd {
    child: Child,
    client: Client,
    pub port: u16,
}

impl Envd {
    pub fn start() -> Self {
        Self::start_with(&[])
    }

    pub fn start_with(more: &[&str]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_envd"));
        Self::start_by(command.args(["--standalone", "--port", "0"]).args(more))
    }

    pub fn start_by(command: &mut Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let port = line.trim().parse().unwrap();
        Self { child, client: Client::at((Ipv4Addr::LOCALHOST, port).into()), port }
    }

    pub fn address(&self) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, self.port).into()
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn resident_kib(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.split_whitespace().next().unwrap().parse().unwrap()
    }
}

impl Deref for Envd {
    type Target = Client;

    fn deref(&self) -> &Client {
        &self.client
    }
}

impl Drop for Envd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
