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
use model::ids::HostId;
use rustls::pki_types::{CertificateDer, ServerName};
use tokio::net::TcpStream;
use tower::Service;
use tracing::warn;
use x509_parser::extensions::GeneralName;

use crate::networks::Networks;

/// A host on the same continent answers a SYN within this time, or it will not at all.
const CONNECT_TIME_MAX: Duration = Duration::from_secs(3);

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// A host and where it is said to be. Connections are pooled by URI, so both are in it: `https://<id>.<address in hex>:<port>`.
struct Target {
    /// What its certificate bears.
    name: String,
    /// An IP address, without brackets, or a name.
    address: String,
    port: u16,
}

/// None when the address is none.
pub(super) fn uri(host: HostId, address: &str) -> Option<Uri> {
    let address: Authority = address.parse().ok()?;
    let of = address.host().trim_matches(['[', ']']);
    format!("https://{host}.{}:{}", hex::encode(of), address.port_u16()?).parse().ok()
}

impl Target {
    fn parse(uri: &Uri) -> io::Result<Self> {
        let parts = uri.host().and_then(|host| host.split_once('.')).zip(uri.port_u16());
        let address = parts.and_then(|((_, address), _)| String::from_utf8(hex::decode(address).ok()?).ok());
        match (parts, address) {
            (Some(((id, _), port)), Some(address)) => Ok(Self { name: host_name(id), address, port }),
            _ => Err(io::Error::other("the URI names no host")),
        }
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
            if session.peer_certificates().and_then(<[_]>::first).is_some_and(|shown| is_of(shown, &target.name)) {
                Ok(stream)
            } else {
                warn!("another host answers at {}:{} than {}", target.address, target.port, target.name);
                Err(io::Error::new(io::ErrorKind::PermissionDenied, "another host answers at the address").into())
            }
        })
    }
}

/// Certificates of versions before had no name of a host; their agents take new ones as soon as they are this version.
fn is_of(certificate: &CertificateDer<'_>, wanted: &str) -> bool {
    let Ok((_, certificate)) = x509_parser::parse_x509_certificate(certificate) else { return false };
    let Ok(extension) = certificate.subject_alternative_name() else { return false };
    let names = extension.iter().flat_map(|names| &names.value.general_names).filter_map(|name| match name {
        GeneralName::DNSName(name) if name.ends_with(HOST_NAME_SUFFIX) => Some(*name),
        _ => None,
    });
    names.into_iter().all(|name| name == wanted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_and_its_address_are_in_the_uri() {
        let host = HostId(uuid::Uuid::from_u128(7));
        for (address, of) in
            [("10.0.0.5:50051", "10.0.0.5"), ("[fd00::1]:50051", "fd00::1"), ("a-b.example:50051", "a-b.example")]
        {
            let target = Target::parse(&uri(host, address).unwrap()).unwrap();
            assert_eq!((target.name, target.address.as_str(), target.port), (host_name(host), of, 50051));
        }
        for none in ["", "10.0.0.5", "a b:1", "10.0.0.5:70000"] {
            assert_eq!(uri(host, none), None, "{none}");
        }
        assert!(Target::parse(&Uri::from_static("https://10.0.0.5:50051")).is_err());
    }

    #[test]
    fn a_certificate_is_of_the_host_whose_name_it_bears() {
        let made = |names: &[&str]| {
            let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
            rcgen::generate_simple_self_signed(names).unwrap().cert.der().clone()
        };
        let (one, two) = (host_name("one"), host_name("two"));
        assert!(is_of(&made(&["10.0.0.5", &one]), &one));
        assert!(!is_of(&made(&["10.0.0.5", &two]), &one));
        assert!(!is_of(&made(&["10.0.0.5", &one, &two]), &one));
        assert!(is_of(&made(&["10.0.0.5", "agent.example"]), &one), "as versions before made them");
        assert!(!is_of(&CertificateDer::from(vec![1, 2, 3]), &one));
    }
}
