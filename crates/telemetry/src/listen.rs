//! Where the numbers are read: nowhere, where the program chose, or where somebody wished it.

use std::io;
use std::net::SocketAddr;

use tokio::net::TcpListener;
use tracing::warn;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Listen {
    Off,
    /// Nobody has said anything: where it is taken, the program serves without.
    Default(SocketAddr),
    /// Where it is taken, the program does not start.
    Wished(SocketAddr),
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is neither an address and a port nor off")]
pub struct BadListen(pub String);

impl Listen {
    /// `:9470` is all addresses.
    pub fn parse(text: Option<&str>, default: SocketAddr) -> Result<Self, BadListen> {
        let Some(text) = text.map(str::trim).filter(|text| !text.is_empty()) else { return Ok(Self::Default(default)) };
        if text == "off" {
            return Ok(Self::Off);
        }
        let full = if text.starts_with(':') { format!("0.0.0.0{text}") } else { text.to_owned() };
        full.parse().map(Self::Wished).map_err(|_| BadListen(text.to_owned()))
    }

    pub async fn bind(self) -> io::Result<Option<TcpListener>> {
        match self {
            Self::Off => Ok(None),
            Self::Wished(address) => TcpListener::bind(address).await.map(Some),
            Self::Default(address) => match TcpListener::bind(address).await {
                Ok(listener) => Ok(Some(listener)),
                Err(error) => {
                    warn!("metrics are not served: {address} cannot be listened on: {error}");
                    Ok(None)
                }
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_port_that_is_taken_stops_only_whoever_wished_it() {
        let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = taken.local_addr().unwrap();
        assert!(Listen::Default(address).bind().await.unwrap().is_none());
        assert!(Listen::Wished(address).bind().await.is_err());
        assert!(Listen::Off.bind().await.unwrap().is_none());
    }

    #[test]
    fn reads_what_is_written_of_it() {
        let default: SocketAddr = "127.0.0.1:1".parse().unwrap();
        let said = |text| Listen::parse(text, default);
        assert_eq!(said(None), Ok(Listen::Default(default)));
        assert_eq!(said(Some(" ")), Ok(Listen::Default(default)));
        assert_eq!(said(Some("off")), Ok(Listen::Off));
        assert_eq!(said(Some(":9")), Ok(Listen::Wished("0.0.0.0:9".parse().unwrap())));
        assert_eq!(said(Some("[::1]:9")), Ok(Listen::Wished("[::1]:9".parse().unwrap())));
        assert_eq!(said(Some("9")), Err(BadListen("9".to_owned())));
    }
}
