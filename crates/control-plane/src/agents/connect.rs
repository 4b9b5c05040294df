//! Connections to hosts: TCP to an address in the allowed networks, TLS by the platform's authority alone, and the host that was meant.
//!
//! An address says where a host was, not who is there: addresses are given to other machines, and translation puts several behind one. So
//! each connection is to a host *at* an address, and who answers shows the certificate of that host, or nothing is asked of it.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use api::host::{HOST_NAME_SUFFIX, host_name};
use http::Uri;
use http::uri::Authority;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder, MaybeHttpsStream};
use hyper_util::rt::TokioIo;
use model::ids::{HostId, TeamId};
use rustls::pki_types::{CertificateDer, ServerName};
use tokio::net::TcpStream;
use tower::Service;
use tracing::warn;
use x509_parser::extensions::GeneralName;

use crate::networks::Networks;

/// A host on the same continent answers a SYN within this time, or it will not at all.
const CONNECT_TIME_MAX: Duration = Duration::from_secs(3);

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Certificates of versions before had no name of a host; their agents take new ones as soon as they are this version. Teams had no hosts
/// then, and say themselves where theirs are: at the address of another host, for example.
const MAY_BE_NAMELESS: &str = "platform";
const IS_NAMED: &str = "team";

/// A host and where it is said to be. Connections are pooled by URI, so all is in it: `https://<id>.<address in hex>.<whose>:<port>`.
struct Target {
    /// What its certificate bears.
    name: String,
    may_be_nameless: bool,
    /// An IP address, without brackets, or a name.
    address: String,
    port: u16,
}

/// None when the address is none.
pub(super) fn uri(host: HostId, address: &str, owner: Option<TeamId>) -> Option<Uri> {
    let address: Authority = address.parse().ok()?;
    let of = address.host().trim_matches(['[', ']']);
    let whose = if owner.is_some() { IS_NAMED } else { MAY_BE_NAMELESS };
    format!("https://{host}.{}.{whose}:{}", hex::encode(of), address.port_u16()?).parse().ok()
}

/// Whether a name is, or could come to be taken for, one by which hosts are known: then it is no address.
pub fn is_reserved(name: &str) -> bool {
    let name = name.trim_end_matches('.').to_ascii_lowercase();
    format!(".{name}").ends_with(&format!(".{HOST_NAME_SUFFIX}")) || HOST_NAME_SUFFIX.ends_with(&format!(".{name}"))
}

impl Target {
    fn parse(uri: &Uri) -> io::Result<Self> {
        let parts: Vec<&str> = uri.host().unwrap_or_default().split('.').collect();
        let (Some(port), &[id, address, whose]) = (uri.port_u16(), parts.as_slice()) else {
            return Err(io::Error::other("the URI names no host"));
        };
        let address = hex::decode(address).ok().and_then(|address| String::from_utf8(address).ok());
        let address = address.ok_or_else(|| io::Error::other("the URI names no address"))?;
        Ok(Self { name: host_name(id), may_be_nameless: whose == MAY_BE_NAMELESS, address, port })
    }

    fn is(&self, shown: &CertificateDer<'_>) -> bool {
        let Ok((_, certificate)) = x509_parser::parse_x509_certificate(shown) else { return false };
        let Ok(extension) = certificate.subject_alternative_name() else { return false };
        let names: Vec<&str> = extension
            .iter()
            .flat_map(|names| &names.value.general_names)
            .filter_map(|name| match name {
                GeneralName::DNSName(name) if name.ends_with(HOST_NAME_SUFFIX) => Some(*name),
                _ => None,
            })
            .collect();
        if names.is_empty() { self.may_be_nameless } else { names == [self.name.as_str()] }
    }
}

/// TCP to an address in the allowed networks. Looked at each time, because a name may point elsewhere by then.
#[derive(Clone)]
struct Tcp {
    networks: Arc<Networks>,
}

impl Tcp {
    async fn connect(&self, target: &Target) -> io::Result<TcpStream> {
        let mut last = io::Error::new(io::ErrorKind::PermissionDenied, "the address is not in the networks of hosts");
        for address in tokio::net::lookup_host((target.address.as_str(), target.port)).await? {
            if !self.networks.has(address.ip()) {
                continue;
            }
            match TcpStream::connect(address).await {
                Ok(stream) => {
                    // Small calls must not wait for the acknowledgement of the one before.
                    stream.set_nodelay(true)?;
                    return Ok(stream);
                }
                Err(error) => last = error,
            }
        }
        Err(last)
    }
}

impl Service<Uri> for Tcp {
    type Response = TokioIo<TcpStream>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Self::Response>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let tcp = self.clone();
        Box::pin(async move {
            let target = Target::parse(&uri)?;
            let stream = tokio::time::timeout(CONNECT_TIME_MAX, tcp.connect(&target))
                .await
                .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
            Ok(TokioIo::new(stream))
        })
    }
}

/// TLS with who shows the certificate of the host that was meant, for its address.
#[derive(Clone)]
pub struct Connector {
    tls: HttpsConnector<Tcp>,
}

impl Connector {
    pub(super) fn new(tls: &rustls::ClientConfig, networks: Arc<Networks>) -> Self {
        let mut tls = tls.clone();
        // The builder sets it by itself and wants it empty.
        tls.alpn_protocols.clear();
        let tls = HttpsConnectorBuilder::new()
            .with_tls_config(tls)
            .https_only()
            .with_server_name_resolver(|uri: &Uri| {
                ServerName::try_from(Target::parse(uri)?.address).map_err(io::Error::other)
            })
            .enable_http2()
            .wrap_connector(Tcp { networks });
        Self { tls }
    }
}

impl Service<Uri> for Connector {
    type Response = MaybeHttpsStream<TokioIo<TcpStream>>;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, BoxError>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.tls.poll_ready(context)
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let connecting = self.tls.call(uri.clone());
        Box::pin(async move {
            let target = Target::parse(&uri)?;
            let stream = connecting.await?;
            let MaybeHttpsStream::Https(encrypted) = &stream else {
                return Err(io::Error::other("the connection is not encrypted").into());
            };
            let (_, session) = encrypted.inner().get_ref();
            if session.peer_certificates().and_then(<[_]>::first).is_some_and(|shown| target.is(shown)) {
                Ok(stream)
            } else {
                warn!("another host answers at {}:{} than {}", target.address, target.port, target.name);
                Err(io::Error::new(io::ErrorKind::PermissionDenied, "another host answers at the address").into())
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEAM: Option<TeamId> = Some(TeamId(uuid::Uuid::from_u128(9)));

    #[test]
    fn a_host_and_its_address_are_in_the_uri() {
        let host = HostId(uuid::Uuid::from_u128(7));
        for (address, of) in
            [("10.0.0.5:50051", "10.0.0.5"), ("[fd00::1]:50051", "fd00::1"), ("a-b.example:50051", "a-b.example")]
        {
            let target = Target::parse(&uri(host, address, None).unwrap()).unwrap();
            assert_eq!((target.name, target.address.as_str(), target.port), (host_name(host), of, 50051));
            assert_ne!(uri(host, address, None), uri(host, address, TEAM));
        }
        for none in ["", "10.0.0.5", "a b:1", "10.0.0.5:70000"] {
            assert_eq!(uri(host, none, None), None, "{none}");
        }
        assert!(Target::parse(&Uri::from_static("https://10.0.0.5:50051")).is_err());
    }

    #[test]
    fn a_certificate_is_of_the_host_whose_name_it_bears() {
        let made = |names: &[&str]| {
            let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
            rcgen::generate_simple_self_signed(names).unwrap().cert.der().clone()
        };
        let id = HostId(uuid::Uuid::from_u128(7));
        let (one, two) = (host_name(id), host_name("two"));
        for owner in [None, TEAM] {
            let target = Target::parse(&uri(id, "10.0.0.5:50051", owner).unwrap()).unwrap();
            assert!(target.is(&made(&["10.0.0.5", &one])));
            assert!(!target.is(&made(&["10.0.0.5", &two])));
            assert!(!target.is(&made(&["10.0.0.5", &one, &two])));
            let of_before = made(&["10.0.0.5", "agent.example"]);
            assert_eq!(target.is(&of_before), owner.is_none(), "as versions before made them");
            assert!(!target.is(&CertificateDer::from(vec![1, 2, 3])));
        }
        for name in [&one, "X.HOSTS.wrenn.internal.", HOST_NAME_SUFFIX, "wrenn.internal", "internal"] {
            assert!(is_reserved(name), "{name}");
        }
        assert!(
            !is_reserved("hosts.wrenn.example") && !is_reserved("10.0.0.5") && !is_reserved("myhosts.wrenn.internal")
        );
    }
}
