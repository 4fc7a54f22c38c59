//! A WebSocket client that costs very little, since the load shares its cores with the server that it measures.
//!
//! Frames to send are prepared once and patched, and many go out in one write. Frames that come in are recognised by their
//! first bytes; only one that does not look as expected is parsed, so that an error frame, a close or anything else
//! unexpected fails the bench.

use std::io;
use std::mem::MaybeUninit;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpSocket, TcpStream};

use crate::reply::Reply;
use weft::cli::common::Failure;

/// On the stack, and the same for all connections, so that it stays in the cache.
const READ_BYTES: usize = 64 * 1024;
const HANDSHAKE: Duration = Duration::from_secs(30);
const NARROW_BUFFER: u32 = 4_096;
/// The size of a segment on the internet.
const NARROW_SEGMENT: u32 = 1_460;

pub const TEXT: u8 = 1;
pub const CLOSE: u8 = 8;
pub const PING: u8 = 9;
pub const PONG: u8 = 10;

/// One connection, past its `welcome`.
pub struct Socket {
    pub reader: Reader,
    pub writer: OwnedWriteHalf,
    out: Outgoing,
}

/// What is queued for a connection.
#[derive(Default)]
pub struct Outgoing {
    bytes: Vec<u8>,
    written: usize,
}

pub struct Reader {
    half: OwnedReadHalf,
    scanner: Scanner,
    /// Bytes of one read.
    at_most: usize,
    /// Answers to pings, to be written by whoever owns the other half.
    pub pongs: Vec<u8>,
}

impl Socket {
    pub async fn connect(authority: &str, token: &str) -> Result<Socket, Failure> {
        let open = async { Socket::open(TcpStream::connect(authority).await?, authority, token).await };
        tokio::time::timeout(HANDSHAKE, open).await?
    }

    /// The same, over a connection on which the kernels of both sides buffer very little: what its owner does not read, the
    /// server cannot write.
    pub async fn connect_narrow(authority: &str, token: &str) -> Result<Socket, Failure> {
        let open = async { Socket::open(narrow(authority).await?, authority, token).await };
        tokio::time::timeout(HANDSHAKE, open).await?
    }

    async fn open(mut stream: TcpStream, authority: &str, token: &str) -> Result<Socket, Failure> {
        stream.set_nodelay(true)?;
        let rest = upgrade(&mut stream, authority, "/v1/ws", &format!("Authorization: Bearer {token}\r\n")).await?;
        let (half, writer) = stream.into_split();
        let reader = Reader { half, scanner: Scanner { rest }, at_most: READ_BYTES, pongs: Vec::new() };
        let mut socket = Socket { reader, writer, out: Outgoing::default() };
        socket.wait_for(|reply| matches!(reply, Reply::Welcome).then_some(())).await?;
        Ok(socket)
    }

    /// Queues a whole frame; [`Socket::exchange`] sends it.
    pub fn queue(&mut self, frame: &[u8]) {
        self.out.queue(frame);
    }

    pub fn queue_text(&mut self, text: &str) {
        self.out.queue(&text_frame(text.as_bytes()));
    }

    /// A pong without a ping, which shows that the client is alive.
    pub fn queue_pong(&mut self) {
        self.out.queue(&frame(PONG, &[]));
    }

    /// Sends what is queued, as far as the socket accepts it, until frames come in; calls `each` with each of them.
    /// Cancel-safe.
    pub async fn exchange(&mut self, mut each: impl FnMut(Reply) -> Result<(), Failure>) -> Result<(), Failure> {
        std::future::poll_fn(|cx| {
            self.out.poll_write(&mut self.writer, cx)?;
            self.reader.poll(cx, &mut each)
        })
        .await?;
        self.out.queue(&self.reader.pongs);
        self.reader.pongs.clear();
        Ok(())
    }

    /// Exchanges until `pick` gives a value. The frames after that in the same read are shown to `pick` as well.
    pub async fn wait_for<T>(&mut self, mut pick: impl FnMut(Reply) -> Option<T>) -> Result<T, Failure> {
        let mut picked = None;
        while picked.is_none() {
            self.exchange(|reply| {
                if let Some(value) = pick(reply) {
                    picked.get_or_insert(value);
                }
                Ok(())
            })
            .await?;
        }
        picked.ok_or_else(|| "nothing came".into())
    }

    /// Subscribes to new events; gives the seq after which they begin.
    pub async fn subscribed(mut self, thread: &str) -> Result<(Socket, u64), Failure> {
        self.queue_text(&format!(r#"{{"type":"subscribe","id":1,"thread":"{thread}"}}"#));
        let caught_up = |reply: Reply| if let Reply::CaughtUp { seq } = reply { Some(seq) } else { None };
        let after = self.wait_for(caught_up).await?;
        Ok((self, after))
    }
}

impl Outgoing {
    pub fn queue(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// Writes as much as the other side accepts now.
    pub fn poll_write(&mut self, to: &mut (impl AsyncWrite + Unpin), cx: &mut Context<'_>) -> io::Result<()> {
        while self.written < self.bytes.len() {
            match Pin::new(&mut *to).poll_write(cx, &self.bytes[self.written..]) {
                Poll::Ready(count) => self.written += count?,
                Poll::Pending => return Ok(()),
            }
        }
        self.bytes.clear();
        self.written = 0;
        Ok(())
    }
}

impl Reader {
    /// From now on reads so many bytes at once; without a number as many as there are.
    pub fn read_at_most(&mut self, bytes: Option<usize>) {
        self.at_most = bytes.unwrap_or(READ_BYTES).clamp(1, READ_BYTES);
    }

    pub async fn read(&mut self, mut each: impl FnMut(Reply) -> Result<(), Failure>) -> Result<(), Failure> {
        std::future::poll_fn(|cx| self.poll(cx, &mut each)).await
    }

    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        each: &mut impl FnMut(Reply) -> Result<(), Failure>,
    ) -> Poll<Result<(), Failure>> {
        let pongs = &mut self.pongs;
        let mut frame = |opcode: u8, payload: &[u8]| match opcode {
            TEXT => match Reply::read(payload)? {
                // No bench looks at presence.
                Reply::Presence => Ok(()),
                reply => each(reply),
            },
            PING => {
                pongs.extend_from_slice(&frame(PONG, payload));
                Ok(())
            }
            PONG => Ok(()),
            CLOSE => Err(closed(payload)),
            other => Err(format!("a frame with opcode {other}, which no Weft server sends").into()),
        };
        if self.scanner.feed(&[], &mut frame)? > 0 {
            return Poll::Ready(Ok(()));
        }
        let mut space = [MaybeUninit::<u8>::uninit(); READ_BYTES];
        let mut buffer = ReadBuf::uninit(&mut space[..self.at_most]);
        ready!(Pin::new(&mut self.half).poll_read(cx, &mut buffer))?;
        if buffer.filled().is_empty() {
            return Poll::Ready(Err("the server hung up without a close frame".into()));
        }
        self.scanner.feed(buffer.filled(), &mut frame)?;
        Poll::Ready(Ok(()))
    }
}

pub fn closed(payload: &[u8]) -> Failure {
    match payload.split_at_checked(2) {
        Some((code, reason)) => {
            let code = u16::from_be_bytes([code[0], code[1]]);
            format!("the server closed the connection: {code} {}", String::from_utf8_lossy(reason)).into()
        }
        None => "the server closed the connection without a code".into(),
    }
}

/// Connects with a small receive buffer and small segments. The server's send buffer grows with the size of segments, which
/// on a loopback is 64 KB: 2.6 MB would wait there for a reader who does not read.
async fn narrow(authority: &str) -> Result<TcpStream, Failure> {
    let address = tokio::net::lookup_host(authority).await?.next().ok_or("the server has no address")?;
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    socket.set_recv_buffer_size(NARROW_BUFFER)?;
    SockRef::from(&socket).set_tcp_mss(NARROW_SEGMENT)?;
    Ok(socket.connect(address).await?)
}

/// Makes a connection a WebSocket; gives the bytes after the answer. `headers` end with a line break.
pub async fn upgrade(stream: &mut TcpStream, authority: &str, path: &str, headers: &str) -> Result<Vec<u8>, Failure> {
    // The key is the example of the RFC: it guards against proxies, and there is none between a bench and its server.
    let request = format!(
        "GET {path} HTTP/1.1\r\nHost: {authority}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
         Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n{headers}\r\n"
    );
    stream.write_all(request.as_bytes()).await?;
    upgraded(stream).await
}

/// Reads the answer to the upgrade; gives the bytes after it.
async fn upgraded(stream: &mut TcpStream) -> Result<Vec<u8>, Failure> {
    let mut head = Vec::with_capacity(2048);
    loop {
        if stream.read_buf(&mut head).await? == 0 {
            return Err("the server hung up during the handshake".into());
        }
        if let Some(end) = head.windows(4).position(|w| w == b"\r\n\r\n") {
            if !head.starts_with(b"HTTP/1.1 101") {
                return Err(format!("the server refused: {}", String::from_utf8_lossy(&head)).into());
            }
            return Ok(head.split_off(end + 4));
        }
    }
}

/// A client's text frame. The masking key is zero, which is valid and saves the masking.
pub fn text_frame(payload: &[u8]) -> Vec<u8> {
    frame(TEXT, payload)
}

pub fn frame(opcode: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = Vec::with_capacity(payload.len() + 14);
    frame.push(0x80 | opcode);
    match payload.len() {
        length @ 0..=125 => frame.push(0x80 | length as u8),
        length @ 126..=0xffff => {
            frame.push(0x80 | 126);
            frame.extend_from_slice(&(length as u16).to_be_bytes());
        }
        length => {
            frame.push(0x80 | 127);
            frame.extend_from_slice(&(length as u64).to_be_bytes());
        }
    }
    frame.extend_from_slice(&[0; 4]);
    frame.extend_from_slice(payload);
    frame
}

/// Cuts a stream of bytes into a server's frames, wherever the reads happen to end.
struct Scanner {
    /// The beginning of a frame whose end has not come yet.
    rest: Vec<u8>,
}

impl Scanner {
    /// Calls `each` with the opcode and the payload of each frame that `chunk` completes; gives how many there were.
    fn feed(
        &mut self,
        chunk: &[u8],
        each: &mut impl FnMut(u8, &[u8]) -> Result<(), Failure>,
    ) -> Result<usize, Failure> {
        let (mut chunk, mut count) = (chunk, 0);
        // Only what completes the frame is copied, so that thousands of connections keep no more than a frame each.
        while !self.rest.is_empty() {
            let (first, rest) = chunk.split_at(self.missing()?.min(chunk.len()));
            self.rest.extend_from_slice(first);
            chunk = rest;
            let (used, frames) = scan(&self.rest, each)?;
            self.rest.drain(..used);
            count += frames;
            if frames == 0 && chunk.is_empty() {
                return Ok(count);
            }
        }
        let (used, frames) = scan(chunk, each)?;
        self.rest.extend_from_slice(&chunk[used..]);
        Ok(count + frames)
    }

    /// Bytes that the incomplete frame still needs, as far as is known: before its header is complete, one.
    fn missing(&self) -> Result<usize, Failure> {
        Ok(match header(&self.rest)? {
            Some((_, header, length)) => (header + length).saturating_sub(self.rest.len()),
            None => 1,
        })
    }
}

/// How many bytes the complete frames at the front of `bytes` have, and how many frames they are.
pub fn scan(bytes: &[u8], each: &mut impl FnMut(u8, &[u8]) -> Result<(), Failure>) -> Result<(usize, usize), Failure> {
    let (mut at, mut count) = (0, 0);
    while let Some((opcode, header, length)) = header(&bytes[at..])? {
        let Some(payload) = bytes[at..].get(header..header + length) else {
            break;
        };
        each(opcode, payload)?;
        at += header + length;
        count += 1;
    }
    Ok((at, count))
}

/// Opcode, bytes of the header and bytes of the payload, when the header is all there.
fn header(bytes: &[u8]) -> Result<Option<(u8, usize, usize)>, Failure> {
    let [first, second, ..] = *bytes else {
        return Ok(None);
    };
    if first & 0xf0 != 0x80 {
        return Err(format!("a frame that begins with {first:#x}: a fragment, or with reserved bits").into());
    }
    let length = match second {
        0..=125 => Some((2, usize::from(second))),
        126 => bytes.get(2..4).map(|b| (4, usize::from(u16::from_be_bytes([b[0], b[1]])))),
        127 => bytes.get(2..10).and_then(|b| {
            let length = b.iter().fold(0u64, |sum, byte| sum << 8 | u64::from(*byte));
            usize::try_from(length).ok().map(|length| (10, length))
        }),
        _ => return Err("a masked frame from a server".into()),
    };
    Ok(length.map(|(header, length)| (first & 0x0f, header, length)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server_frame(opcode: u8, payload: &[u8]) -> Vec<u8> {
        let masked = frame(opcode, payload);
        let header = masked.len() - payload.len() - 4;
        let mut plain = masked[..header].to_vec();
        plain[1] &= 0x7f;
        plain.extend_from_slice(payload);
        plain
    }

    #[test]
    fn frames_are_found_wherever_reads_end() {
        let payloads = [vec![], vec![b'a'; 125], vec![b'b'; 126], vec![b'c'; 300], vec![b'd'; 70_000], vec![b'e']];
        let stream: Vec<u8> = payloads.iter().flat_map(|payload| server_frame(TEXT, payload)).collect();
        for step in [1, 2, 3, 7, 127, 1000, 65_536, stream.len()] {
            let mut scanner = Scanner { rest: Vec::new() };
            let mut found = Vec::new();
            for chunk in stream.chunks(step) {
                let mut each = |opcode: u8, payload: &[u8]| {
                    assert_eq!(opcode, TEXT);
                    found.push(payload.to_vec());
                    Ok(())
                };
                scanner.feed(chunk, &mut each).unwrap();
            }
            assert_eq!(found, payloads, "in steps of {step}");
            assert!(scanner.rest.is_empty());
            // With the first bytes as those that came with the handshake.
            let mut scanner = Scanner { rest: stream[..step].to_vec() };
            let mut count = 0;
            for chunk in [&[], &stream[step..]] {
                count += scanner.feed(chunk, &mut |_, _| Ok(())).unwrap();
            }
            assert_eq!((count, scanner.rest.len()), (payloads.len(), 0), "{step} bytes at first");
        }
    }

    #[test]
    fn frames_that_no_server_may_send_are_refused() {
        for bytes in [[0x01, 0x00], [0xc1, 0x00], [0x81, 0x80]] {
            assert!(header(&bytes).is_err(), "{bytes:?}");
        }
    }
}
