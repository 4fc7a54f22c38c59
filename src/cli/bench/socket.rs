//! A WebSocket client that costs next to nothing: the load shares its cores with the server that it measures.
//!
//! Frames to send are prepared once and patched, many go out in one write; what comes in is told apart by its first
//! bytes and never parsed whole. Whatever does not look as expected is parsed properly, so that speed costs no
//! correctness: an error frame, a close or nonsense fails the bench.

use std::io;
use std::mem::MaybeUninit;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};

use super::reply::Reply;
use crate::cli::common::Failure;

/// On the stack, and the same for all connections, so that it stays in the cache.
const READ_BYTES: usize = 64 * 1024;
const HANDSHAKE: Duration = Duration::from_secs(30);

const TEXT: u8 = 1;
const CLOSE: u8 = 8;
const PING: u8 = 9;
const PONG: u8 = 10;

/// One connection, welcomed.
pub struct Socket {
    pub reader: Reader,
    pub writer: OwnedWriteHalf,
    out: Vec<u8>,
    written: usize,
}

pub struct Reader {
    half: OwnedReadHalf,
    scanner: Scanner,
    /// Answers to pings, to be written by whoever owns the other half.
    pub pongs: Vec<u8>,
}

impl Socket {
    pub async fn connect(authority: &str, token: &str) -> Result<Socket, Failure> {
        tokio::time::timeout(HANDSHAKE, Socket::open(authority, token)).await?
    }

    async fn open(authority: &str, token: &str) -> Result<Socket, Failure> {
        let mut stream = TcpStream::connect(authority).await?;
        stream.set_nodelay(true)?;
        // The key is the RFC's example: it guards against confused proxies, and there is none between us and the server.
        let request = format!(
            "GET /v1/ws HTTP/1.1\r\nHost: {authority}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
             Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\nAuthorization: Bearer {token}\r\n\r\n"
        );
        stream.write_all(request.as_bytes()).await?;
        let rest = upgraded(&mut stream).await?;
        let (half, writer) = stream.into_split();
        let reader = Reader { half, scanner: Scanner { rest }, pongs: Vec::new() };
        let mut socket = Socket { reader, writer, out: Vec::new(), written: 0 };
        socket.wait_for(|reply| matches!(reply, Reply::Welcome).then_some(())).await?;
        Ok(socket)
    }

    /// Queues a whole frame; [`Socket::exchange`] sends it.
    pub fn queue(&mut self, frame: &[u8]) {
        self.out.extend_from_slice(frame);
    }

    pub fn queue_text(&mut self, text: &str) {
        self.out.extend_from_slice(&text_frame(text.as_bytes()));
    }

    /// Sends what is queued, as far as the socket takes it, until something came in; gives each frame that did to
    /// `each`. May be dropped while it waits.
    pub async fn exchange(&mut self, mut each: impl FnMut(Reply) -> Result<(), Failure>) -> Result<(), Failure> {
        std::future::poll_fn(|cx| {
            self.poll_write(cx)?;
            self.reader.poll(cx, &mut each)
        })
        .await?;
        self.out.append(&mut self.reader.pongs);
        Ok(())
    }

    /// Exchanges until `pick` takes a frame. What comes behind it in the same read is still shown to `pick`.
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

    fn poll_write(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        while self.written < self.out.len() {
            match Pin::new(&mut self.writer).poll_write(cx, &self.out[self.written..]) {
                Poll::Ready(count) => self.written += count?,
                Poll::Pending => return Ok(()),
            }
        }
        self.out.clear();
        self.written = 0;
        Ok(())
    }
}

impl Reader {
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
            TEXT => each(Reply::read(payload)?),
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
        let mut buffer = ReadBuf::uninit(&mut space);
        ready!(Pin::new(&mut self.half).poll_read(cx, &mut buffer))?;
        if buffer.filled().is_empty() {
            return Poll::Ready(Err("the server hung up without a close frame".into()));
        }
        self.scanner.feed(buffer.filled(), &mut frame)?;
        Poll::Ready(Ok(()))
    }
}

fn closed(payload: &[u8]) -> Failure {
    match payload.split_at_checked(2) {
        Some((code, reason)) => {
            let code = u16::from_be_bytes([code[0], code[1]]);
            format!("the server closed the connection: {code} {}", String::from_utf8_lossy(reason)).into()
        }
        None => "the server closed the connection without a code".into(),
    }
}

/// Reads the answer to the upgrade; gives what came behind it.
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

/// A client's text frame. The masking key is zero, which is a valid one and saves the masking; the server can't tell.
pub fn text_frame(payload: &[u8]) -> Vec<u8> {
    frame(TEXT, payload)
}

fn frame(opcode: u8, payload: &[u8]) -> Vec<u8> {
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
    /// Gives each frame that is complete with `chunk` to `each`, by opcode and payload; tells how many.
    fn feed(
        &mut self,
        chunk: &[u8],
        each: &mut impl FnMut(u8, &[u8]) -> Result<(), Failure>,
    ) -> Result<usize, Failure> {
        if self.rest.is_empty() {
            let (used, count) = scan(chunk, each)?;
            self.rest.extend_from_slice(&chunk[used..]);
            return Ok(count);
        }
        self.rest.extend_from_slice(chunk);
        let (used, count) = scan(&self.rest, each)?;
        self.rest.drain(..used);
        Ok(count)
    }
}

/// How many bytes the complete frames at the front of `bytes` take, and how many frames they are.
fn scan(bytes: &[u8], each: &mut impl FnMut(u8, &[u8]) -> Result<(), Failure>) -> Result<(usize, usize), Failure> {
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
        return Err(format!("a frame that begins with {first:#x}: in pieces, or with reserved bits").into());
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
    fn frames_are_found_wherever_the_reads_end() {
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
        }
    }

    #[test]
    fn what_no_server_may_send_is_refused() {
        for bytes in [[0x01, 0x00], [0xc1, 0x00], [0x81, 0x80]] {
            assert!(header(&bytes).is_err(), "{bytes:?}");
        }
    }
}
