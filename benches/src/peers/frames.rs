//! How each server says that a publish is done and that a message is there.

use super::got::{Got, leading_number, message_or_other, said};
use super::nats;
use crate::publisher::number_of;
use crate::socket::{CLOSE, PING, PONG, TEXT, closed, frame, scan};
use weft::cli::common::Failure;

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Dialect {
    Weft,
    /// NATS JetStream in its own protocol over TCP. Readers are plain subscriptions, one that comes back is a consumer.
    Nats,
    /// Socket.IO 4: `benches/peers/socketio.mjs`.
    SocketIo,
    /// Redis streams behind a relay: `benches/peers/relay.mjs`.
    Relay,
    /// Centrifugo's JSON protocol.
    Centrifugo,
}

impl Dialect {
    /// Cuts what came in into frames and calls `each` for what is in them; gives how many bytes are dealt with. What has to be
    /// answered at once is put to `replies`.
    pub fn read(
        self,
        bytes: &[u8],
        replies: &mut Vec<u8>,
        each: &mut impl FnMut(Got) -> Result<(), Failure>,
    ) -> Result<usize, Failure> {
        if self == Dialect::Nats {
            return nats::read(bytes, replies, each);
        }
        let mut one = |opcode: u8, payload: &[u8]| match opcode {
            TEXT => self.read_text(payload, replies, each),
            PING => {
                replies.extend_from_slice(&frame(PONG, payload));
                Ok(())
            }
            CLOSE => Err(closed(payload)),
            _ => Ok(()),
        };
        Ok(scan(bytes, &mut one)?.0)
    }

    fn read_text(
        self,
        text: &[u8],
        replies: &mut Vec<u8>,
        each: &mut impl FnMut(Got) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        match self {
            Dialect::Weft => {
                if let Some(rest) = text.strip_prefix(br#"{"type":"published","id":"#) {
                    return each(Got::Answer { id: leading_number(rest), raw: text });
                }
                if text.starts_with(br#"{"type":"error""#) {
                    return Err(said(text));
                }
                message_or_other(text, each)
            }
            Dialect::SocketIo => match text {
                b"2" => {
                    replies.extend_from_slice(&frame(TEXT, b"3"));
                    Ok(())
                }
                [b'4', b'3', rest @ ..] => match leading_number(rest) {
                    // Not a publish.
                    1 => each(Got::Other(text)),
                    id => each(Got::Answer { id, raw: text }),
                },
                [b'4', b'4', ..] => Err(said(text)),
                _ => message_or_other(text, each),
            },
            Dialect::Relay => match text.strip_prefix(br#"{"id":"#) {
                Some(rest) if text.ends_with(br#""ok":true}"#) => {
                    each(Got::Answer { id: leading_number(rest), raw: text })
                }
                Some(_) => Err(said(text)),
                None => message_or_other(text, each),
            },
            Dialect::Centrifugo => {
                text.split(|byte| *byte == b'\n').try_for_each(|line| centrifugo(line, replies, each))
            }
            Dialect::Nats => Err("NATS sends no WebSocket frames here".into()),
        }
    }
}

/// One reply or push of Centrifugo.
fn centrifugo(
    line: &[u8],
    replies: &mut Vec<u8>,
    each: &mut impl FnMut(Got) -> Result<(), Failure>,
) -> Result<(), Failure> {
    if line == b"{}" {
        replies.extend_from_slice(&frame(TEXT, b"{}"));
        return Ok(());
    }
    let Some(rest) = line.strip_prefix(br#"{"id":"#) else { return message_or_other(line, each) };
    let after = &rest[rest.iter().take_while(|byte| byte.is_ascii_digit()).count()..];
    if after.starts_with(br#","error""#) {
        return Err(said(line));
    }
    if after.starts_with(br#","publish""#) {
        return each(Got::Answer { id: leading_number(rest), raw: line });
    }
    each(Got::Other(line))?;
    // The messages that a client has missed come in the answer to its `subscribe`.
    if after.starts_with(br#","subscribe""#) {
        let answer: serde_json::Value = serde_json::from_slice(line)?;
        for missed in answer["subscribe"]["publications"].as_array().into_iter().flatten() {
            let number = missed["data"]["n"].as_u64().unwrap_or_default();
            each(Got::Message { number: number_of(number)?, raw: &[] })?;
        }
    }
    Ok(())
}
