//! The TCP stream under a WebSocket, counting what the peer has taken, and the end of a connection.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::TcpStream;

/// How long a peer gets to take our close frame and to close its side.
const LINGER: Duration = Duration::from_secs(2);
/// What a peer may still send meanwhile; it is thrown away.
const LINGER_BYTES: usize = 1 << 20;

pub struct Socket {
    stream: TcpStream,
    /// Bytes the kernel has taken for the peer.
    written: Arc<AtomicU64>,
}

impl Socket {
    pub fn new(stream: TcpStream) -> Socket {
        Socket { stream, written: Arc::default() }
    }

    /// Bytes taken so far: a socket whose count stands still takes nothing.
    pub fn written(&self) -> u64 {
        self.written.load(Ordering::Relaxed)
    }

    /// The count, to be watched from elsewhere.
    pub fn counter(&self) -> Arc<AtomicU64> {
        self.written.clone()
    }

    /// Ends the connection without a reset, which would take our last frames out of the peer's buffer: closes our side and
    /// reads on until the peer closes its own.
    pub async fn linger(mut self) {
        let drain = async {
            self.stream.shutdown().await?;
            // Not an array, which every future around this one would have room for.
            let (mut buffer, mut rest) = (vec![0u8; 4096], LINGER_BYTES);
            while rest > 0 {
                match self.stream.read(&mut buffer).await? {
                    0 => break,
                    n => rest = rest.saturating_sub(n),
                }
            }
            io::Result::Ok(())
        };
        // Whatever goes wrong here, the connection is over.
        drop(tokio::time::timeout(LINGER, drain).await);
    }
}

impl AsyncRead for Socket {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Socket {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, buf);
        if let Poll::Ready(Ok(n)) = written {
            self.written.fetch_add(n as u64, Ordering::Relaxed);
        }
        written
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
