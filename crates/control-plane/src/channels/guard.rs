//! The client for addresses that users give: it reaches what everybody could reach, and no machine of the operator's.
//!
//! A name is resolved once, what it resolves to is looked at, and that is what is connected to: a name that means something else a moment
//! later changes nothing. There are no redirects, no proxies, and of an answer nothing but its status is read.

use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use url::{Host, Url};

use crate::networks::Networks;

/// For one delivery, whole.
const CALL_TIME_MAX: Duration = Duration::from_secs(10);
const CONNECT_TIME_MAX: Duration = Duration::from_secs(5);

/// Of IPv4, what is not the public internet.
static NOT_PUBLIC: LazyLock<Networks> = LazyLock::new(|| {
    "0.0.0.0/8, 10.0.0.0/8, 100.64.0.0/10, 127.0.0.0/8, 169.254.0.0/16, 172.16.0.0/12, 192.0.0.0/24, 192.0.2.0/24, 192.88.99.0/24,
     192.168.0.0/16, 198.18.0.0/15, 198.51.100.0/24, 203.0.113.0/24, 224.0.0.0/3"
        .parse()
        .expect("the networks are constants")
});
/// Of IPv6, what is, and in it what leads elsewhere: to IPv4 by tunnels, or nowhere.
static PUBLIC_V6: LazyLock<Networks> = LazyLock::new(|| "2000::/3".parse().expect("a constant"));
static NOT_PUBLIC_V6: LazyLock<Networks> =
    LazyLock::new(|| "2001::/23, 2001:db8::/32, 2002::/16, 3fff::/20".parse().expect("constants"));

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("the address is not one that may be reached")]
pub struct Forbidden;

/// How a request went, for whoever looks at the channel. Nothing of the answer is told: it may be anybody's.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum CallError {
    #[error(transparent)]
    Forbidden(#[from] Forbidden),
    #[error("it answered {0}")]
    Status(u16),
    #[error("it did not answer in time")]
    Late,
    #[error("it could not be reached")]
    Unreachable,
}

pub struct Guarded {
    http: reqwest::Client,
    guard: Arc<Guard>,
}

struct Guard {
    /// That the operator allows beside the public internet.
    allowed: Option<Networks>,
}

impl Guarded {
    pub fn new(allowed: Option<Networks>) -> Self {
        let guard = Arc::new(Guard { allowed });
        let http = reqwest::Client::builder()
            .user_agent(concat!("wrenn/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(CONNECT_TIME_MAX)
            .timeout(CALL_TIME_MAX)
            .pool_max_idle_per_host(0)
            .redirect(reqwest::redirect::Policy::none())
            .no_proxy()
            .dns_resolver(guard.clone())
            .build()
            .expect("the settings are constant and fit each other");
        Self { http, guard }
    }

    pub async fn call(&self, request: reqwest::Request) -> Result<(), CallError> {
        self.guard.check(request.url())?;
        let answer = self.http.execute(request).await.map_err(|error| {
            if is_forbidden(&error) {
                CallError::Forbidden(Forbidden)
            } else if error.is_timeout() {
                CallError::Late
            } else {
                CallError::Unreachable
            }
        })?;
        if answer.status().is_success() { Ok(()) } else { Err(CallError::Status(answer.status().as_u16())) }
    }
}

impl Guard {
    fn has(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        if self.allowed.as_ref().is_some_and(|allowed| allowed.has(address)) {
            return true;
        }
        match address {
            IpAddr::V4(_) => !NOT_PUBLIC.has(address),
            IpAddr::V6(_) => PUBLIC_V6.has(address) && !NOT_PUBLIC_V6.has(address),
        }
    }

    /// An address that needs no resolving.
    fn check(&self, url: &Url) -> Result<(), Forbidden> {
        let address: IpAddr = match url.host() {
            Some(Host::Ipv4(address)) => address.into(),
            Some(Host::Ipv6(address)) => address.into(),
            Some(Host::Domain(_)) => return Ok(()),
            None => return Err(Forbidden),
        };
        if self.has(address) { Ok(()) } else { Err(Forbidden) }
    }

    /// One that leads to a forbidden address as well leads nowhere.
    fn checked(&self, found: Vec<SocketAddr>) -> Result<Vec<SocketAddr>, Forbidden> {
        if !found.is_empty() && found.iter().all(|address| self.has(address.ip())) { Ok(found) } else { Err(Forbidden) }
    }
}

/// What the client asks for addresses of names.
impl Resolve for Guard {
    fn resolve(&self, name: Name) -> Resolving {
        let guard = Self { allowed: self.allowed.clone() };
        Box::pin(async move {
            let found: Vec<SocketAddr> = tokio::net::lookup_host((name.as_str(), 0)).await?.collect();
            let found: Addrs = Box::new(guard.checked(found)?.into_iter());
            Ok(found)
        })
    }
}

fn is_forbidden(error: &reqwest::Error) -> bool {
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        if inner.is::<Forbidden>() {
            return true;
        }
        cause = inner.source();
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guard(allowed: Option<&str>) -> Guard {
        Guard { allowed: allowed.map(|networks| networks.parse().unwrap()) }
    }

    /// The spellings in which an address of the operator's can be written, as the parser of addresses reads them.
    #[test]
    fn addresses_that_are_not_public_are_forbidden_in_every_spelling() {
        let guard = guard(None);
        for host in [
            "127.0.0.1",
            "127.1",
            "0x7f.1",
            "2130706433",
            "0177.0.0.1",
            "0",
            "0.0.0.0",
            "10.0.0.1",
            "10.1",
            "172.16.0.1",
            "172.31.255.255",
            "192.168.1.1",
            "169.254.169.254",
            "0xa9fea9fe",
            "100.64.0.1",
            "198.18.0.1",
            "224.0.0.1",
            "255.255.255.255",
            "240.0.0.1",
            "[::]",
            "[::1]",
            "[::ffff:127.0.0.1]",
            "[::ffff:7f00:1]",
            "[::127.0.0.1]",
            "[64:ff9b::7f00:1]",
            "[fe80::1]",
            "[fc00::1]",
            "[fd12::1]",
            "[ff02::1]",
            "[2002:7f00:1::]",
            "[2001:db8::1]",
            "[2001::1]",
        ] {
            let url = Url::parse(&format!("http://{host}/")).unwrap();
            assert_eq!(guard.check(&url), Err(Forbidden), "{host}");
        }
        for host in ["1.1.1.1", "172.32.0.1", "100.128.0.1", "[2606:4700::1]", "example.org"] {
            let url = Url::parse(&format!("http://{host}/")).unwrap();
            assert_eq!(guard.check(&url), Ok(()), "{host}");
        }
    }

    #[test]
    fn what_the_operator_allows_is_reached_and_nothing_beside_it() {
        let guard = guard(Some("10.9.0.0/16"));
        let at = |text: &str| -> SocketAddr { format!("{text}:0").parse().unwrap() };
        assert!(guard.has("10.9.1.1".parse().unwrap()) && !guard.has("10.8.1.1".parse().unwrap()));
        assert_eq!(guard.checked(vec![at("10.9.1.1"), at("1.1.1.1")]), Ok(vec![at("10.9.1.1"), at("1.1.1.1")]));
        assert_eq!(guard.checked(vec![at("1.1.1.1"), at("10.8.1.1")]), Err(Forbidden));
        assert_eq!(guard.checked(Vec::new()), Err(Forbidden));
    }

    #[tokio::test]
    async fn a_name_that_leads_here_is_not_called() {
        let guarded = Guarded::new(None);
        let request = reqwest::Request::new(reqwest::Method::POST, Url::parse("http://localhost:9/").unwrap());
        assert_eq!(guarded.call(request).await, Err(CallError::Forbidden(Forbidden)));
    }
}
