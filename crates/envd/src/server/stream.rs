//! A connection's stream, with the time that a request's head may take.
//!
//! Counted from the head's first byte: a connection on which nothing is asked may stay open much longer, because the host's pool of
//! connections must never meet one that envd is just closing.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Sleep, sleep};

use super::registry::Connection;

pub struct Stream {
    stream: TcpStream,
    connection: Arc<Connection>,
    head_time_max: Duration,
    head: Head,
    /// Requests that had begun when the head did: one more, and it is over.
    asked: u64,
}

enum Head {
    None,
    Begun,
    Awaited(Pin<Box<Sleep>>),
}

impl Stream {
    pub fn new(stream: TcpStream, connection: Arc<Connection>, head_time_max: Duration) -> Self {
        Self { stream, connection, head_time_max, head: Head::None, asked: 0 }
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        // While a request is answered its head is over; what is read then is its body, whose time is its handler's business.
        // A short answer may be over before anything is read again.
        let is_busy = this.connection.is_busy();
        if is_busy || this.connection.asked() != this.asked {
            this.asked = this.connection.asked();
            this.head = Head::None;
        }
        let read = Pin::new(&mut this.stream).poll_read(context, buffer);
        match (&mut this.head, &read) {
            (Head::None, Poll::Ready(Ok(()))) if !buffer.filled().is_empty() && !is_busy => {
                this.head = Head::Begun;
            }
            // Nearly always a head comes in one piece, and no timer is made.
            (Head::Begun, Poll::Pending) => {
                let mut late = Box::pin(sleep(this.head_time_max));
                let over = late.as_mut().poll(context).is_ready();
                this.head = Head::Awaited(late);
                if over {
                    return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
                }
            }
            (Head::Awaited(late), Poll::Pending) => {
                ready!(late.as_mut().poll(context));
                return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
            }
            _ => {}
        }
        read
    }
}

impl AsyncWrite for Stream {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, pieces)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;
    use tokio::time::timeout;

    use super::super::registry::Registry;
    use super::*;

    const HEAD_TIME: Duration = Duration::from_millis(50);

    #[tokio::test]
    async fn a_head_has_its_time_and_silence_and_answers_have_more() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut peer = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (stream, address) = listener.accept().await.unwrap();
        let connection = Registry::default().enter(address, false).unwrap();
        let mut stream = Stream::new(stream, connection.clone(), HEAD_TIME);
        let silence = timeout(4 * HEAD_TIME, stream.read_u8()).await;
        assert!(silence.is_err(), "nothing has begun");
        peer.write_all(b"GE").await.unwrap();
        assert_eq!(stream.read_u16().await.unwrap(), u16::from_be_bytes(*b"GE"));
        let answering = connection.begin();
        assert!(timeout(4 * HEAD_TIME, stream.read_u8()).await.is_err(), "its head has come");
        drop(answering);
        peer.write_all(b"GE").await.unwrap();
        assert_eq!(stream.read_u16().await.unwrap(), u16::from_be_bytes(*b"GE"));
        drop(connection.begin());
        assert!(timeout(4 * HEAD_TIME, stream.read_u8()).await.is_err(), "it was answered at once");
        peer.write_all(b"GE").await.unwrap();
        assert_eq!(stream.read_u16().await.unwrap(), u16::from_be_bytes(*b"GE"));
        let late = timeout(100 * HEAD_TIME, stream.read_u8()).await.expect("an end in time");
        assert_eq!(late.unwrap_err().kind(), io::ErrorKind::TimedOut);
    }
}
