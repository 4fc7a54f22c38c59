//! A delta of a message that an agent is writing: what live readers get of the message before it is an event.
//!
//! Deltas have no seq. Each names its message and the characters (Unicode scalar values) of it that it holds. So two of them
//! that follow each other can be joined, and a reader that has a part of one can be sent the rest.
//!
//! A message may begin anew, and counts its characters from 0 again then. So each delta carries how often its message was
//! begun anew before it: only deltas with the same count are of the same text.

use std::sync::Arc;

use tokio_tungstenite::tungstenite::Utf8Bytes;
use uuid::Uuid;

use super::event::{EventFrame, Priority};
use super::json;
use super::kinds::{AGENT_TOKEN, DeltaData};

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Delta {
    /// What tells the message from all others of its thread.
    pub name: Arc<str>,
    pub thread: Box<str>,
    pub run: Box<str>,
    pub message: Box<str>,
    /// The record it came with; of several, the first one's.
    pub event: Uuid,
    pub from: Box<str>,
    /// RFC 3339.
    pub at: Box<str>,
    pub priority: Option<Priority>,
    /// The thread's newest seq when it came.
    pub head: u64,
    /// How often the message was begun anew before this text.
    pub restarts: u32,
    pub from_char: u64,
    /// The characters of the message up to its end.
    pub to_char: u64,
    pub text: String,
}

impl Delta {
    /// A message's name among all of its thread.
    pub fn name(run: &str, message: &str) -> Arc<str> {
        format!("{}:{run}{message}", run.len()).into()
    }

    /// One of the run `r` on the thread `t`; its text is ASCII.
    #[cfg(test)]
    pub fn of_test(message: &str, restarts: u32, from_char: u64, text: &str) -> Delta {
        Delta {
            name: Delta::name("r", message),
            thread: "t".into(),
            run: "r".into(),
            message: message.into(),
            event: Uuid::nil(),
            from: "bot".into(),
            at: "".into(),
            priority: None,
            head: 0,
            restarts,
            from_char,
            to_char: from_char + text.len() as u64,
            text: text.into(),
        }
    }

    /// The `event` frame, without a seq; with `restart`, its reader drops what it has of the message.
    pub fn frame(&self, restart: bool) -> Utf8Bytes {
        let data = DeltaData {
            message: (&*self.message).into(),
            from_char: self.from_char,
            text: (&*self.text).into(),
            restart,
        };
        let data = json::encode_raw(&data);
        let frame = EventFrame {
            r#type: "event",
            thread: &self.thread,
            seq: None,
            kind: AGENT_TOKEN,
            event: self.event,
            from: &self.from,
            at: &self.at,
            data: &data,
            key: None,
            run: Some(&self.run),
            parent: None,
            priority: self.priority,
            attempt: None,
            replay: None,
        };
        json::encode(&frame).into()
    }

    /// Whether `next` goes on where this one ends.
    pub fn is_before(&self, next: &Delta) -> bool {
        self.to_char == next.from_char && self.restarts == next.restarts && self.name == next.name
    }

    /// Adds the next one to it.
    pub fn join(&mut self, next: &Delta) {
        self.text.push_str(&next.text);
        self.to_char = next.to_char;
    }

    /// What is left of it after the first characters of the message.
    pub fn rest(&self, from_char: u64) -> Delta {
        let passed = from_char.saturating_sub(self.from_char);
        Delta { from_char, text: self.text.chars().skip(passed as usize).collect(), ..self.clone() }
    }
}
