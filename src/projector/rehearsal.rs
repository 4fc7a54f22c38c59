//! What a requeue would do: the projector's own judgement of letters, on what the store holds now, and nothing written.

use std::collections::HashMap;
use std::sync::Arc;

use uuid::Uuid;

use super::Verdict;
use super::judge::BatchState;
use super::letter_acts::{Turn, requeue_of, thread_key};
use super::thread::Thread;
use crate::clock;
use crate::log::RULES;
use crate::protocol::error::{Code, Error};
use crate::store::dead_letters::DeadLetterRow;
use crate::store::{Store, StoreError};

/// Letters that are requeued one after the other: each is judged as if those before it had been.
pub struct Rehearsal<'s> {
    store: &'s Store,
    state: BatchState<'s>,
    threads: HashMap<String, Thread>,
}

impl<'s> Rehearsal<'s> {
    pub fn new(store: &'s Arc<Store>) -> Rehearsal<'s> {
        Rehearsal { store, state: BatchState::new(store, None), threads: HashMap::new() }
    }

    /// What becomes of the letter's event.
    pub fn append(&mut self, tenant: &str, row: &DeadLetterRow) -> Result<Verdict, StoreError> {
        let (Some(key), Some(name)) = (thread_key(tenant, row), &row.thread) else {
            return Ok(Err(Error::new(Code::Conflict, "it has no thread").at("id")));
        };
        let at = clock::now_ms();
        if !self.threads.contains_key(&key) {
            let thread = Thread::new(&key, self.store.thread(tenant, name)?, at);
            self.threads.insert(key.clone(), thread);
        }
        let Some(thread) = self.threads.get_mut(&key) else {
            return Ok(Err(Error::new(Code::Internal, "it was just put there")));
        };
        let partition = self.store.partition(tenant, name).number();
        self.state.judge_again(row, Turn { partition, rules: RULES, at, key_time: at }, thread)
    }

    /// Whether the letter's event would be work of its group again.
    pub fn work(&mut self, tenant: &str, letter: Uuid, row: &DeadLetterRow) -> Result<Verdict, StoreError> {
        self.state.requeue_work(&requeue_of(tenant, letter, row), row.clone())
    }

    /// Whether the letter's event would be delivered again.
    pub fn deliver(&mut self, tenant: &str, letter: Uuid, row: &DeadLetterRow) -> Result<Verdict, StoreError> {
        self.state.act_on_delivery(&requeue_of(tenant, letter, row))
    }
}
