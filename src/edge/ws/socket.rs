//! The TCP stream under a WebSocket, counting what the peer has taken and what it floods us with, and the end of a
//! connection.

use std::io;
use std::os::fd::AsRawFd;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::TcpStream;

use super::flood::Watch;

/// How long a peer gets to take our close frame and to close its side.
const LINGER: Duration = Duration::from_secs(2);
/// What a peer may still send meanwhile; it is thrown away.
const LINGER_BYTES: usize = 1 << 20;

pub struct Socket {
    stream: TcpStream,
    /// Bytes the kernel has taken for the peer.
    written: Arc<AtomicU64>,
    /// Follows the frames, once this is a WebSocket.
    watch: Option<Watch>,
}

impl Socket {
    pub fn new(stream: TcpStream) -> Socket {
        Socket { stream, written: Arc::default(), watch: None }
    }

    /// Bytes that the peer has acknowledged so far: one whose count stands still takes nothing. What the kernel has taken
    /// says little, since its buffer may hold what a slow peer takes minutes to read.
    pub fn taken(&self) -> u64 {
        self.written.load(Ordering::Relaxed).saturating_sub(self.on_the_way())
    }

    /// Bytes that the kernel holds for the peer, sent or not.
    #[expect(unsafe_code, reason = "the standard library does not ask for the length of a send queue")]
    pub fn on_the_way(&self) -> u64 {
        let mut bytes: libc::c_int = 0;
        // SAFETY: the descriptor is open as long as the stream is, and TIOCOUTQ writes one int.
        let asked = unsafe { libc::ioctl(self.stream.as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) };
        // A kernel that does not say leaves us with what it has taken.
        if asked == 0 { u64::try_from(bytes).unwrap_or(0) } else { 0 }
    }

    /// The count, to be watched from elsewhere.
    pub fn counter(&self) -> Arc<AtomicU64> {
        self.written.clone()
    }

    /// From here on the bytes are WebSocket frames: counts those that carry nothing. `read` is what was read of them
    /// already.
    pub fn watch_frames(&mut self, read: &[u8]) {
        let mut watch = Watch::new(Instant::now());
        watch.read(read);
        self.watch = Some(watch);
    }

    /// Whether the peer has sent too many frames that carry nothing. Nothing more is read then.
    pub fn flooded(&self) -> bool {
        self.watch.as_ref().is_some_and(Watch::flooded)
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
        if self.flooded() {
            // No error, with which the WebSocket would be over before its close frame. Woken, its owner sees why.
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let before = buf.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(cx, buf);
        if let (Poll::Ready(Ok(())), Some(watch)) = (&read, &mut self.watch) {
            watch.read(&buf.filled()[before..]);
        }
        read
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

#[cfg(test)]
mod tests {
    use futures_util::StreamExt;
    use tokio::net::TcpListener;
    use tokio_tungstenite::WebSocketStream;
    use tokio_tungstenite::tungstenite::Message;
    use tokio_tungstenite::tungstenite::protocol::Role;

    use super::*;

    const PING: [u8; 6] = [0x89, 0x80, 0, 0, 0, 0];
    const HELLO: [u8; 11] = [0x81, 0x85, 0, 0, 0, 0, b'h', b'e', b'l', b'l', b'o'];

    /// Our end and the peer's.
    async fn pair() -> (Socket, TcpStream) {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let (peer, ours) = tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
        (Socket::new(ours.unwrap().0), peer.unwrap())
    }

    #[tokio::test]
    async fn before_the_upgrade_bytes_are_only_bytes() {
        let (mut socket, mut peer) = pair().await;
        peer.write_all(&PING.repeat(5_000)).await.unwrap();
        let mut bytes = vec![0; PING.len() * 5_000];
        socket.read_exact(&mut bytes).await.unwrap();
        assert!(!socket.flooded());
    }

    #[tokio::test]
    async fn once_flooded_it_brings_no_more_and_wakes_its_owner_each_time_it_is_asked() {
        let (mut socket, mut peer) = pair().await;
        socket.watch_frames(&[]);
        // Twice what may come at once, so that the time between the reads does not matter.
        peer.write_all(&PING.repeat(2_000)).await.unwrap();
        peer.write_all(&HELLO).await.unwrap();
        let mut bytes = [0; 4096];
        while !socket.flooded() {
            assert!(socket.read(&mut bytes).await.unwrap() > 0);
        }
        for _ in 0..2 {
            let wakes = Arc::new(Wakes::default());
            let waker = wakes.clone().into();
            let mut buf = ReadBuf::new(&mut bytes);
            assert!(Pin::new(&mut socket).poll_read(&mut Context::from_waker(&waker), &mut buf).is_pending());
            assert_eq!((buf.filled().len(), wakes.0.load(Ordering::Relaxed)), (0, 1));
        }
    }

    #[derive(Default)]
    struct Wakes(AtomicU64);

    impl std::task::Wake for Wakes {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[tokio::test]
    async fn what_was_read_before_the_watch_counts_and_is_followed_from_within_a_header() {
        let (mut socket, mut peer) = pair().await;
        // A message's header and half of its key came with the request; taken from its start, the rest is no frame.
        let (before, behind) = HELLO.split_at(4);
        socket.watch_frames(&[&PING.repeat(999), before].concat());
        assert!(!socket.flooded());
        peer.write_all(&[behind, &PING].concat()).await.unwrap();
        let mut bytes = vec![0; behind.len() + PING.len()];
        socket.read_exact(&mut bytes).await.unwrap();
        assert!(!socket.flooded(), "these were a thousand");
        peer.write_all(&PING.repeat(1_000)).await.unwrap();
        while !socket.flooded() {
            assert!(socket.read(&mut bytes).await.unwrap() > 0);
        }
    }

    #[tokio::test]
    async fn a_flooded_websocket_can_still_say_goodbye() {
        let (mut socket, mut peer) = pair().await;
        socket.watch_frames(&[]);
        let mut ws = WebSocketStream::from_raw_socket(socket, Role::Server, None).await;
        peer.write_all(&[&HELLO[..], &PING.repeat(2_000)].concat()).await.unwrap();
        assert_eq!(ws.next().await.unwrap().unwrap(), Message::text("hello"));
        let end = std::future::poll_fn(|cx| match ws.get_ref().flooded() {
            true => Poll::Ready(None),
            false => ws.poll_next_unpin(cx).map(Some),
        });
        tokio::pin!(end);
        while let Some(message) = end.as_mut().await {
            assert!(matches!(message.unwrap().unwrap(), Message::Ping(_)));
        }
        ws.close(None).await.unwrap();
        let (mut answer, mut close) = (vec![0; 4096], false);
        while !close {
            let read = peer.read(&mut answer).await.unwrap();
            assert!(read > 0, "the close frame came before the end");
            close = answer[..read].contains(&0x88);
        }
    }
}
