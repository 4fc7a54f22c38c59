//! One connection to a server: bytes out, and in as what its dialect makes of them.

use std::mem::MaybeUninit;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt, ReadBuf};
use tokio::net::TcpStream;

use super::frames::Dialect;
use super::got::Got;
use crate::socket::{Outgoing, text_frame};
use weft::cli::common::Failure;

const READ_BYTES: usize = 64 * 1024;

pub struct Link {
    stream: TcpStream,
    dialect: Dialect,
    /// Tells this connection's subjects from those of others, where a dialect needs that.
    pub inbox: String,
    /// What the server said when it let the client in.
    pub welcome: Vec<u8>,
    /// The beginning of a frame whose end has not come yet.
    rest: Vec<u8>,
    out: Outgoing,
}

impl Link {
    pub fn new(stream: TcpStream, dialect: Dialect, inbox: String, rest: Vec<u8>) -> Link {
        Link { stream, dialect, inbox, welcome: Vec::new(), rest, out: Outgoing::default() }
    }

    /// Queues bytes as they go over the wire.
    pub fn queue(&mut self, bytes: &[u8]) {
        self.out.queue(bytes);
    }

    /// Queues a message of the dialect.
    pub fn queue_text(&mut self, text: &str) {
        match self.dialect {
            Dialect::Nats => self.queue(text.as_bytes()),
            _ => self.queue(&text_frame(text.as_bytes())),
        }
    }

    /// Sends what is queued, as far as the socket accepts it, until something comes in; calls `each` with each of it.
    pub async fn exchange(&mut self, mut each: impl FnMut(Got) -> Result<(), Failure>) -> Result<(), Failure> {
        let mut replies = Vec::new();
        if !self.rest.is_empty() {
            let used = self.dialect.read(&self.rest, &mut replies, &mut each)?;
            self.rest.drain(..used);
            if used > 0 {
                self.queue(&replies);
                return Ok(());
            }
        }
        std::future::poll_fn(|cx| {
            self.out.poll_write(&mut self.stream, cx)?;
            self.poll_read(cx, &mut replies, &mut each)
        })
        .await?;
        self.queue(&replies);
        Ok(())
    }

    /// Exchanges until something comes that begins so; gives it whole.
    pub async fn wait_for(&mut self, begin: &str) -> Result<Vec<u8>, Failure> {
        let mut found = None;
        while found.is_none() {
            self.exchange(|got| {
                let (Got::Other(raw) | Got::Answer { raw, .. } | Got::Message { raw, .. }) = got;
                if raw.starts_with(begin.as_bytes()) {
                    found.get_or_insert_with(|| raw.to_vec());
                }
                Ok(())
            })
            .await?;
        }
        found.ok_or_else(|| "nothing came".into())
    }

    /// Ends the connection as a network does, and waits until the server has noticed.
    pub async fn hang_up(mut self) -> Result<(), Failure> {
        self.stream.shutdown().await?;
        let mut left = [0; 4096];
        // A server that resets the connection has noticed, too.
        while self.stream.read(&mut left).await.is_ok_and(|count| count > 0) {}
        Ok(())
    }

    fn poll_read(
        &mut self,
        cx: &mut Context<'_>,
        replies: &mut Vec<u8>,
        each: &mut impl FnMut(Got) -> Result<(), Failure>,
    ) -> Poll<Result<(), Failure>> {
        let mut space = [MaybeUninit::<u8>::uninit(); READ_BYTES];
        let mut buffer = ReadBuf::uninit(&mut space);
        ready!(Pin::new(&mut self.stream).poll_read(cx, &mut buffer))?;
        let bytes = buffer.filled();
        if bytes.is_empty() {
            return Poll::Ready(Err("the server hung up".into()));
        }
        if self.rest.is_empty() {
            let used = self.dialect.read(bytes, replies, each)?;
            self.rest.extend_from_slice(&bytes[used..]);
        } else {
            self.rest.extend_from_slice(bytes);
            let used = self.dialect.read(&self.rest, replies, each)?;
            self.rest.drain(..used);
        }
        Poll::Ready(Ok(()))
    }
}
