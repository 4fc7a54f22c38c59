//! The TCP stream under a WebSocket: it counts what the peer has taken, guards against floods of idle frames, and ends a
//! connection without losing its last frames.
//!
//! The WebSocket library keeps a buffer to read into for each connection, also while nothing comes. So that one is small, and
//! the kernel is asked for more than it holds: what does not fit is kept here until the library takes it.

use std::cell::RefCell;
use std::io::{self, IoSlice};
use std::os::fd::AsRawFd;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::Bytes;

use super::flood::FloodGuard;
use super::message_memory::MessageMemory;
use crate::memory::Refused;
use crate::protocol::command::MAX_FRAME;

/// How long a peer gets to take the close frame and to close its side.
const LINGER: Duration = Duration::from_secs(2);
/// Bytes that a peer may still send meanwhile; they are discarded.
const LINGER_BYTES: usize = 1 << 20;

/// How far the peer has come with what was sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeerProgress {
    /// Bytes that the peer has acknowledged since the beginning.
    pub taken: u64,
    /// Bytes that the kernel still holds for it, sent or not.
    pub on_the_way: u64,
}

/// What the kernel is asked for at once.
const READ_AHEAD: usize = 16 << 10;

thread_local! {
    /// What a read brings lands here first: one for all connections of a thread.
    static SCRATCH: RefCell<Box<[u8]>> = RefCell::new(vec![0; READ_AHEAD].into());
}

pub struct Socket {
    stream: TcpStream,
    /// What was read and not taken.
    ahead: Bytes,
    /// Bytes that the kernel has accepted for the peer.
    written: Arc<AtomicU64>,
    /// Once this is a WebSocket.
    guard: Option<Guard>,
}

/// What is watched of the WebSocket frames that come in.
struct Guard {
    flood: FloodGuard,
    memory: MessageMemory,
    /// Why there is no memory for a message.
    short: Option<Refused>,
}

impl Socket {
    pub fn new(stream: TcpStream) -> Socket {
        Socket { stream, ahead: Bytes::new(), written: Arc::default(), guard: None }
    }

    /// What the peer has acknowledged, and what the kernel holds for it. What the kernel has accepted says little by
    /// itself: its buffer may hold what a slow peer takes minutes to read.
    pub fn progress(&self) -> PeerProgress {
        let on_the_way = self.send_queue();
        PeerProgress { taken: self.written().saturating_sub(on_the_way), on_the_way }
    }

    #[expect(unsafe_code, reason = "the standard library does not ask for the length of a send queue")]
    fn send_queue(&self) -> u64 {
        let mut bytes: libc::c_int = 0;
        // SAFETY: the descriptor is open as long as the stream is, and TIOCOUTQ writes one int.
        let asked = unsafe { libc::ioctl(self.stream.as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) };
        // Without an answer from the kernel everything it has accepted counts as taken.
        if asked == 0 { u64::try_from(bytes).unwrap_or(0) } else { 0 }
    }

    /// The bytes that the kernel has accepted for the peer.
    pub fn written(&self) -> u64 {
        self.written.load(Ordering::Relaxed)
    }

    /// The same, to be read from elsewhere.
    pub fn counter(&self) -> Arc<AtomicU64> {
        self.written.clone()
    }

    fn count(&self, written: &Poll<io::Result<usize>>) {
        if let Poll::Ready(Ok(bytes)) = written {
            self.written.fetch_add(*bytes as u64, Ordering::Relaxed);
        }
    }

    /// From here on the bytes are WebSocket frames, and those that carry nothing are counted. `read` is what was read of
    /// them already.
    pub fn guard_frames(&mut self, read: &[u8], memory: MessageMemory) {
        let mut flood = FloodGuard::new(Instant::now());
        flood.read(read);
        self.guard = Some(Guard { flood, memory, short: None });
    }

    /// The user whose messages these are from here on.
    pub fn belongs_to(&mut self, user: &Arc<str>) {
        if let Some(guard) = &mut self.guard {
            guard.memory.belongs_to(user);
        }
    }

    /// Everything that was read has been dealt with.
    pub fn dealt_with(&mut self) {
        if let Some(guard) = &mut self.guard
            && guard.flood.message_bytes() == 0
        {
            guard.memory.give_back();
        }
    }

    /// Nothing is read for now: a message that does not end is not its peer's fault.
    pub fn is_not_read(&mut self) {
        if let Some(guard) = &mut self.guard {
            guard.memory.stop_clock();
        }
    }

    /// Why a message is too large for the memory there is. Nothing more is read then.
    pub fn short_of_memory(&self) -> Option<Refused> {
        self.guard.as_ref().and_then(|guard| guard.short)
    }

    /// Whether a large message has begun and does not end.
    pub fn is_message_overdue(&self) -> bool {
        self.guard.as_ref().is_some_and(|guard| guard.memory.is_overdue(Instant::now))
    }

    /// Whether the peer has sent too many frames that carry nothing. Nothing more is read then.
    pub fn flooded(&self) -> bool {
        self.guard.as_ref().is_some_and(|guard| guard.flood.flooded())
    }

    /// Reads more than there is room for, and keeps the rest.
    fn poll_read_ahead(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.ahead.is_empty() {
            if buf.remaining() >= READ_AHEAD {
                return Pin::new(&mut self.stream).poll_read(cx, buf);
            }
            let (stream, room) = (Pin::new(&mut self.stream), buf.remaining());
            let read = SCRATCH.with_borrow_mut(|scratch| {
                let mut all = ReadBuf::new(scratch);
                ready!(stream.poll_read(cx, &mut all))?;
                let (now, later) = all.filled().split_at(room.min(all.filled().len()));
                buf.put_slice(now);
                Poll::Ready(io::Result::Ok(Bytes::copy_from_slice(later)))
            });
            self.ahead = ready!(read)?;
        } else {
            buf.put_slice(&self.ahead.split_to(buf.remaining().min(self.ahead.len())));
            if self.ahead.is_empty() {
                // What it was a part of goes with it.
                self.ahead = Bytes::new();
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Ends the connection without a reset, which would drop the last frames from the peer's buffer: closes this side and
    /// reads on until the peer closes its own.
    pub async fn linger(mut self) {
        let drain = async {
            self.stream.shutdown().await?;
            // On the heap: an array would enlarge every future around this one.
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
        let Some(guard) = &mut self.guard else { return Pin::new(&mut self.stream).poll_read(cx, buf) };
        if !guard.flood.flooded() && guard.short.is_none() {
            // What is larger than the limit is refused by its header.
            let message = usize::try_from(guard.flood.message_bytes()).unwrap_or(MAX_FRAME).min(MAX_FRAME);
            guard.short = ready!(guard.memory.poll_charged(cx, message)).err();
        }
        if guard.flood.flooded() || guard.short.is_some() {
            // Not an error, after which the WebSocket could send no close frame. The session is woken and asks why.
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let before = buf.filled().len();
        let read = self.poll_read_ahead(cx, buf);
        if let (Poll::Ready(Ok(())), Some(guard)) = (&read, &mut self.guard) {
            guard.flood.read(&buf.filled()[before..]);
        }
        read
    }
}

impl AsyncWrite for Socket {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.count(&written);
        written
    }

    /// Without this, hyper copies an answer before it is written, and the copy is charged to nobody.
    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.count(&written);
        written
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
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
    use crate::memory::Pool;

    const PING: [u8; 6] = [0x89, 0x80, 0, 0, 0, 0];
    const HELLO: [u8; 11] = [0x81, 0x85, 0, 0, 0, 0, b'h', b'e', b'l', b'l', b'o'];

    fn memory() -> MessageMemory {
        MessageMemory::new(Pool::new(1 << 20))
    }

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
        socket.guard_frames(&[], memory());
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

    #[tokio::test]
    async fn what_is_read_ahead_comes_in_order_to_whoever_has_room_for_little() {
        let (mut socket, mut peer) = pair().await;
        socket.guard_frames(&[], memory());
        let sent: Vec<u8> = HELLO.iter().copied().cycle().take(HELLO.len() * 9_000).collect();
        let sending = tokio::spawn({
            let sent = sent.clone();
            async move { peer.write_all(&sent).await.map(|()| drop(peer)) }
        });
        let (mut got, mut small) = (Vec::new(), [0; 700]);
        loop {
            match socket.read(&mut small).await.unwrap() {
                0 => break,
                read => got.extend_from_slice(&small[..read]),
            }
        }
        sending.await.unwrap().unwrap();
        assert!(got == sent, "{} of {} bytes", got.len(), sent.len());
    }

    #[derive(Default)]
    struct Wakes(AtomicU64);

    impl std::task::Wake for Wakes {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[tokio::test]
    async fn what_was_read_before_the_guard_counts_and_is_parsed_on_from_within_a_header() {
        let (mut socket, mut peer) = pair().await;
        // A message's header and half of its key came with the request: parsed from its first byte, the rest is no frame.
        let (before, after) = HELLO.split_at(4);
        socket.guard_frames(&[&PING.repeat(999), before].concat(), memory());
        assert!(!socket.flooded());
        peer.write_all(&[after, &PING].concat()).await.unwrap();
        let mut bytes = vec![0; after.len() + PING.len()];
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
        socket.guard_frames(&[], memory());
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
