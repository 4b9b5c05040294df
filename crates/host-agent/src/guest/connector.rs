//! Connections to one guest: whatever the URI says, there is one address.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::future::BoxFuture;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

/// A guest that is up answers a SYN in less than a millisecond; an emulated one that is busy may take longer.
const CONNECT_TIME_MAX: Duration = Duration::from_secs(5);

/// The way to one port of one incarnation's guest. Tests point it at a program on this machine.
pub trait Dial: Send + Sync + 'static {
    fn dial(&self) -> BoxFuture<'static, io::Result<TcpStream>>;
}

#[derive(Clone)]
pub struct Connector {
    dial: Arc<dyn Dial>,
}

impl Connector {
    pub fn new(dial: Arc<dyn Dial>) -> Self {
        Self { dial }
    }

    /// One attempt.
    pub async fn connect(&self, at_most: Duration) -> io::Result<TcpStream> {
        let stream = tokio::time::timeout(at_most, self.dial.dial()).await.map_err(|_| io::ErrorKind::TimedOut)??;
        // Small requests must not wait for the acknowledgement of the one before.
        stream.set_nodelay(true)?;
        Ok(stream)
    }
}

impl tower::Service<http::Uri> for Connector {
    type Response = TokioIo<TcpStream>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Self::Response>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: http::Uri) -> Self::Future {
        let connector = self.clone();
        Box::pin(async move { connector.connect(CONNECT_TIME_MAX).await.map(TokioIo::new) })
    }
}
