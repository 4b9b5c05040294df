//! The control plane as a service of this machine: its settings, where it answers, and as whom it is asked. `wrenn up` has one of its own.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use nix::unistd::User;
use tokio::process::Command;
use url::Url;

use super::service::{Service, Settings};
use crate::failure::{Doing as _, Failure};

pub const SERVICE: Service = Service {
    program: "wrenn-cp",
    title: "control plane",
    unit: include_str!("../../../../deploy/systemd/wrenn-cp.service"),
    // It waits a minute for its database, and migrations of a grown one take their time.
    start_max: Duration::from_secs(180),
};
pub const SETTINGS: &str = "etc/wrenn/control-plane.env";
/// What the unit says.
pub const USER: &str = "wrenn";
pub const DIR: &str = "/var/lib/wrenn-cp";
pub const DATABASE: &str = "DATABASE_URL";
pub const LISTEN: &str = "WRENN_CP_LISTEN_ADDR";
pub const LISTEN_DEFAULT: &str = ":8000";

/// None where none is installed, and for who may not read its settings: that is for root.
pub fn installed() -> Option<Settings> {
    Settings::read(&Path::new("/").join(SETTINGS)).ok().filter(|settings| settings.get(DATABASE).is_some())
}

/// Where it answers on this machine.
pub fn url(settings: &Settings) -> Result<Url, Failure> {
    Ok(url_of(listen_address(settings.get(LISTEN).unwrap_or(LISTEN_DEFAULT))?))
}

/// `ADDR:PORT`; without an address it is all of them.
pub fn listen_address(text: &str) -> Result<SocketAddr, Failure> {
    let full = if text.starts_with(':') { format!("0.0.0.0{text}") } else { text.replace("localhost:", "127.0.0.1:") };
    full.parse()
        .map_err(|_| Failure::usage(format!("--listen is {text:?}: give ADDR:PORT, for example 127.0.0.1:8000")))
}

/// How a program on this machine reaches who listens there.
pub fn url_of(listen: SocketAddr) -> Url {
    let host = match listen.ip() {
        ip if ip.is_unspecified() => "127.0.0.1".to_owned(),
        std::net::IpAddr::V6(ip) => format!("[{ip}]"),
        std::net::IpAddr::V4(ip) => ip.to_string(),
    };
    Url::parse(&format!("http://{host}:{}", listen.port())).expect("an address and a port are a URL")
}

pub fn cannot_listen(address: SocketAddr, error: &std::io::Error) -> Failure {
    Failure::new(format!("cannot listen on {address}: {error}; give another --listen ADDR:PORT"))
}

/// The installed program with these settings and nothing else of this one's, as the service's user: PostgreSQL may know it by that.
pub fn command(program: &Path, settings: &Settings) -> Result<Command, Failure> {
    let mut command = Command::new(program);
    command
        .env_clear()
        .env("WRENN_DIR", DIR)
        .envs(settings.iter())
        .current_dir("/")
        .stdin(Stdio::null())
        .kill_on_drop(true);
    if nix::unistd::geteuid().is_root() {
        let user = User::from_name(USER).doing(|| format!("look for the user {USER}"))?;
        let user =
            user.ok_or_else(|| Failure::new(format!("there is no user {USER}: run `wrenn control-plane install`")))?;
        command.uid(user.uid.as_raw()).gid(user.gid.as_raw());
    }
    Ok(command)
}

/// The program that the service runs.
pub fn program() -> Result<PathBuf, Failure> {
    SERVICE.installed().ok_or_else(|| Failure::new("wrenn-cp is not installed: run `wrenn control-plane install`"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listen_takes_the_documented_forms() {
        assert_eq!(listen_address(":8000").unwrap(), "0.0.0.0:8000".parse().unwrap());
        assert_eq!(listen_address("localhost:0").unwrap(), "127.0.0.1:0".parse().unwrap());
        assert_eq!(listen_address("[::1]:80").unwrap(), "[::1]:80".parse().unwrap());
        assert!(listen_address("8000").is_err() && listen_address("http://x:1").is_err());
    }

    #[test]
    fn who_listens_is_reached_by_a_url() {
        for (listen, url) in [
            (":8000", "http://127.0.0.1:8000/"),
            ("[::1]:80", "http://[::1]/"),
            ("10.0.0.1:8000", "http://10.0.0.1:8000/"),
        ] {
            assert_eq!(url_of(listen_address(listen).unwrap()).as_str(), url);
        }
    }
}
