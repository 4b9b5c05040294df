//! Public addresses that guests must not reach beside the ranges that no guest ever may: the host's own and the control plane's. What is
//! sent to the host itself is dropped whatever its address.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use tracing::warn;
use url::Url;

use crate::config::Config;
use crate::credentials::Files;
use crate::sandbox::steps::blocking;

/// Finding the control plane's addresses must not hold up a start: guests reach it by no private address anyway.
const RESOLVE_LIMIT: Duration = Duration::from_secs(2);

pub struct Denied {
    files: Files,
    cp_url: Option<Url>,
    /// What each name stood for when it was found last.
    found: BTreeMap<String, BTreeSet<Ipv4Addr>>,
}

impl Denied {
    pub fn new(config: &Config) -> Self {
        Self { files: Files::new(&config.dir), cp_url: config.cp_url.clone(), found: BTreeMap::new() }
    }

    /// As they are now. A name that is not found keeps its addresses: a resolver that fails must open nothing.
    pub async fn look(&mut self) -> Vec<String> {
        let files = self.files.clone();
        let kept = blocking(move || files.load()).await.ok().flatten().map(|known| known.host.cp_url);
        let urls = self.cp_url.iter().chain(&kept);
        let hosts: BTreeSet<String> = urls.filter_map(|url| url.host_str().map(str::to_owned)).collect();
        for host in hosts {
            match resolve(&host).await {
                Some(addresses) => {
                    self.found.insert(host, addresses);
                }
                None if self.found.contains_key(&host) => {}
                None => warn!("{host} was not found; guests are not kept from its public addresses"),
            }
        }
        let own = nix::ifaddrs::getifaddrs().into_iter().flatten();
        let own = own.filter_map(|one| Some(one.address?.as_sockaddr_in()?.ip()));
        let addresses: BTreeSet<Ipv4Addr> = own.chain(self.found.values().flatten().copied()).collect();
        addresses.into_iter().filter(|address| !address.is_unspecified()).map(|address| address.to_string()).collect()
    }
}

async fn resolve(host: &str) -> Option<BTreeSet<Ipv4Addr>> {
    let found = tokio::time::timeout(RESOLVE_LIMIT, tokio::net::lookup_host((host.to_owned(), 0))).await;
    let v4 = |address: std::net::SocketAddr| match address.ip() {
        IpAddr::V4(address) => Some(address),
        IpAddr::V6(_) => None,
    };
    Some(found.ok()?.ok()?.filter_map(v4).collect())
}
