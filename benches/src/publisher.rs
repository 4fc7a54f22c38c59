//! A client that publishes to one thread and keeps a window of unanswered publishes.

use std::time::Instant;

use crate::socket::{Socket, text_frame};
use crate::target::Target;
use weft::cli::common::Failure;

/// Numbers have ten digits in every frame, so that a frame can be patched in place.
const BASE: u64 = 1_000_000_000;
const PLACEHOLDER: &[u8; 10] = b"1000000000";

/// A publish as bytes on the wire, made once. Only its number changes: in `id`, in `data.n` and in the key.
pub struct Frame {
    bytes: Vec<u8>,
    numbers: Vec<usize>,
}

impl Frame {
    /// `data` has `payload` bytes, and the number as `n`.
    pub fn publish(thread: &str, payload: usize, key: bool) -> Frame {
        let key = if key { r#""key":"k-1000000000","# } else { "" };
        let data = Frame::data(payload);
        Frame::text(&format!(
            r#"{{"type":"publish","id":1000000000,"thread":"{thread}","kind":"user_message",{key}"data":{data}}}"#
        ))
    }

    /// An object of `payload` bytes, with the number as `n`.
    pub fn data(payload: usize) -> String {
        let head = r#"{"n":1000000000,"content":""#;
        let filling = "x".repeat(payload.saturating_sub(head.len() + 2));
        format!(r#"{head}{filling}"}}"#)
    }

    /// A text of a WebSocket.
    pub fn text(text: &str) -> Frame {
        Frame::of(text_frame(text.as_bytes()))
    }

    pub fn of(bytes: Vec<u8>) -> Frame {
        let numbers = (0..bytes.len()).filter(|at| bytes[*at..].starts_with(PLACEHOLDER)).collect();
        Frame { bytes, numbers }
    }

    pub fn numbered(&mut self, number: u64) -> &[u8] {
        let mut digits = *PLACEHOLDER;
        let mut left = BASE + number;
        for digit in digits.iter_mut().rev() {
            *digit = b'0' + (left % 10) as u8;
            left /= 10;
        }
        for at in &self.numbers {
            self.bytes[*at..*at + digits.len()].copy_from_slice(&digits);
        }
        &self.bytes
    }
}

/// The number of the publish that `id` answers.
pub fn number_of(id: u64) -> Result<u64, Failure> {
    id.checked_sub(BASE).ok_or_else(|| format!("an answer to id {id}, which was not sent").into())
}

/// The number that an event carries in its data.
pub fn number_in(event: &[u8]) -> Option<u64> {
    const MARK: &[u8] = br#"{"n":"#;
    let at = event.windows(MARK.len()).position(|window| window == MARK)? + MARK.len();
    let digits = event.get(at..at + PLACEHOLDER.len())?;
    std::str::from_utf8(digits).ok()?.parse::<u64>().ok()?.checked_sub(BASE)
}

pub struct Publisher {
    socket: Socket,
    frame: Frame,
    /// The unanswered publishes and when each was sent, at their number modulo the window.
    open: Vec<Option<(u64, Instant)>>,
    next: u64,
    answered: u64,
    /// The seq of publish 0: those of all the others must follow without a gap.
    first_seq: Option<u64>,
}

impl Publisher {
    pub async fn open(target: &Target, user: &str, frame: Frame, window: usize) -> Result<Publisher, Failure> {
        let socket = target.socket(user).await?;
        Ok(Publisher { socket, frame, open: vec![None; window.max(1)], next: 0, answered: 0, first_seq: None })
    }

    /// Publishes while `more` of the number sent so far is true; then waits for the last answers. `each` gets when a
    /// publish was sent and when it was answered.
    pub async fn run(
        &mut self,
        mut more: impl FnMut(u64) -> bool,
        mut each: impl FnMut(Instant, Instant),
    ) -> Result<(), Failure> {
        let mut sending = true;
        loop {
            while sending && self.room() {
                sending = more(self.next);
                if sending {
                    self.send();
                }
            }
            if self.answered == self.next {
                return Ok(());
            }
            let Publisher { socket, open, answered, first_seq, .. } = self;
            socket
                .exchange(|reply| {
                    let (id, seq) = reply.published()?;
                    let number = number_of(id)?;
                    let first = *first_seq.get_or_insert(seq - number.min(seq));
                    if seq != first + number {
                        return Err(format!("publish {number} got seq {seq}, not {}", first + number).into());
                    }
                    each(close(open, number)?, Instant::now());
                    *answered += 1;
                    Ok(())
                })
                .await?;
        }
    }

    /// The seq of the last publish.
    pub fn last_seq(&self) -> Result<u64, Failure> {
        let first = self.first_seq.ok_or("nothing was published")?;
        Ok(first + self.next - 1)
    }

    fn room(&self) -> bool {
        self.open[slot(&self.open, self.next)].is_none()
    }

    fn send(&mut self) {
        let at = slot(&self.open, self.next);
        self.open[at] = Some((self.next, Instant::now()));
        self.socket.queue(self.frame.numbered(self.next));
        self.next += 1;
    }
}

fn slot(open: &[Option<(u64, Instant)>], number: u64) -> usize {
    (number % open.len() as u64) as usize
}

fn close(open: &mut [Option<(u64, Instant)>], number: u64) -> Result<Instant, Failure> {
    let at = slot(open, number);
    match open[at].take() {
        Some((asked, sent)) if asked == number => Ok(sent),
        _ => Err(format!("publish {number} was answered twice, or never sent").into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_carries_its_number_everywhere_and_keeps_its_size() {
        let mut frame = Frame::publish("t-1", 256, true);
        let length = frame.bytes.len();
        let text = String::from_utf8(frame.numbered(42)[8..].to_vec()).unwrap();
        let command: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(command["id"], 1_000_000_042);
        assert_eq!(command["key"], "k-1000000042");
        assert_eq!(command["data"]["n"], 1_000_000_042);
        assert_eq!(number_in(text.as_bytes()), Some(42));
        let data = text.find(r#"{"n""#).unwrap();
        assert_eq!(text[data..].len() - 1, 256);
        assert_eq!(frame.numbered(43).len(), length);
    }
}
