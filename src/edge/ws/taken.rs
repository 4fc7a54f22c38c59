//! The groups that a session takes work of, and the work that waits for its socket.
//!
//! What comes waits here by name, and its event is read when the socket takes it: so what a slow socket holds is small.

use std::collections::{HashMap, VecDeque};

use serde_json::value::RawValue;

use crate::auth::Principal;
use crate::dispatch::{Consumer, MAX_CREDIT, Wants};
use crate::protocol::error::{Code, Error};
use crate::protocol::event::without_type;
use crate::protocol::frame::ServerFrame;
use crate::protocol::work::Work;
use crate::store::Store;

/// How many groups a session may take work of.
const MAX_CONSUMED: usize = 100;

/// What a session takes and what waits for its socket.
#[derive(Default)]
pub struct Taken {
    /// Each with its credit.
    pub consumed: HashMap<String, (u32, Consumer)>,
    /// By the id of its `consume`, while it is seen to that the group is there.
    pub asked: HashMap<i64, (String, Wants)>,
    pub waiting: VecDeque<Work>,
}

impl Taken {
    /// Refuses what is more than a session may take of all groups together.
    pub fn check(&self, group: &str, credit: u32) -> Result<(), Error> {
        let others = self.consumed.iter().filter(|(name, _)| *name != group).map(|(_, (credit, _))| *credit);
        let asked = self.asked.values().filter(|(name, _)| name != group).map(|(_, wants)| wants.credit);
        let all: u32 = others.chain(asked).sum::<u32>().saturating_add(credit);
        if all > MAX_CREDIT {
            let why = format!("a session has credit {MAX_CREDIT} at most, over all its groups");
            return Err(Error::new(Code::TooLarge, why).at("credit"));
        }
        if !self.consumed.contains_key(group) && self.consumed.len() + self.asked.len() >= MAX_CONSUMED {
            let why = format!("a session takes work of {MAX_CONSUMED} groups at most");
            return Err(Error::new(Code::TooLarge, why).at("group"));
        }
        Ok(())
    }

    /// The next work that waits, as a frame.
    pub fn next(&mut self, store: &Store, who: &Principal) -> Option<String> {
        while let Some(work) = self.waiting.pop_front() {
            match store.event(&who.tenant, &work.thread, work.seq) {
                Ok(Some(event)) => return frame(&work, &event.frame),
                // Its lease runs out, and another worker gets it.
                Ok(None) => tracing::warn!(thread = &*work.thread, seq = work.seq, "there is no such event to work on"),
                Err(error) => tracing::warn!(%error, "an event to work on could not be read"),
            }
        }
        None
    }
}

fn frame(work: &Work, event: &str) -> Option<String> {
    let event = without_type(event);
    // A frame that this server made.
    let event: &RawValue = serde_json::from_str(&event).ok()?;
    let frame = ServerFrame::Work {
        delivery: &work.delivery,
        group: &work.group,
        attempt: work.attempt,
        lease_ms: work.lease_ms,
        waited_ms: work.waited_ms,
        wait: work.wait,
        event,
    };
    Some(frame.encode())
}
