//! Deliveries that were given up and requeued: which events a durable subscription is to be sent again. The list follows its
//! letters: what is requeued is in it, and what is settled, given up again or discarded is not.

use std::collections::HashMap;

use super::transaction::Transaction;
use crate::protocol::dead_letters::UNACKNOWLEDGED;
use crate::store::StoreError;
use crate::store::dead_letters::{DeadLetterRow, LetterState};
use crate::store::deliveries::RequeuedDelivery;

/// What one durable subscription may be sent again in one thread.
pub const MAX_REQUEUED: usize = 256;

/// The lists that this batch has changed.
#[derive(Default)]
pub(super) struct Deliveries {
    lists: HashMap<Vec<u8>, Vec<RequeuedDelivery>>,
}

/// The key of the list that a letter's delivery is in when it is requeued; None if it is no such letter.
fn key_of(tx: &Transaction<'_>, tenant: &str, row: &DeadLetterRow) -> Option<Vec<u8>> {
    let (thread, user, name) = (row.thread.as_ref()?, row.user.as_ref()?, row.name.as_ref()?);
    (row.reason == UNACKNOWLEDGED).then(|| tx.store.deliveries_key(tenant, thread, user, name))
}

impl Deliveries {
    fn list(&self, tx: &Transaction<'_>, key: &[u8]) -> Result<Vec<RequeuedDelivery>, StoreError> {
        match self.lists.get(key) {
            Some(list) => Ok(list.clone()),
            None => tx.store.deliveries_by_key(key),
        }
    }

    /// Whether one more may be requeued for the subscription that a letter is about.
    pub(super) fn has_room(&self, tx: &Transaction<'_>, tenant: &str, row: &DeadLetterRow) -> Result<bool, StoreError> {
        let Some(key) = key_of(tx, tenant, row) else { return Ok(false) };
        Ok(self.list(tx, &key)?.len() < MAX_REQUEUED)
    }

    /// How often a letter's event was sent since it was requeued.
    pub(super) fn attempts(
        &self,
        tx: &Transaction<'_>,
        tenant: &str,
        (id, row): (&[u8; 16], &DeadLetterRow),
    ) -> Result<u32, StoreError> {
        let Some(key) = key_of(tx, tenant, row) else { return Ok(0) };
        Ok(self.list(tx, &key)?.iter().find(|it| it.letter == *id).map_or(0, |it| it.attempts))
    }

    /// A letter has changed.
    pub(super) fn follow(
        &mut self,
        tx: &mut Transaction<'_>,
        tenant: &str,
        id: [u8; 16],
        (was, row): (Option<&DeadLetterRow>, &DeadLetterRow),
    ) -> Result<(), StoreError> {
        let is_requeued = |row: &DeadLetterRow| row.state == LetterState::Requeued;
        if !is_requeued(row) && !was.is_some_and(is_requeued) {
            return Ok(());
        }
        let (Some(key), Some(seq)) = (key_of(tx, tenant, row), row.seq) else { return Ok(()) };
        let mut list = self.list(tx, &key)?;
        let known = list.iter().position(|it| it.letter == id).map(|at| list.remove(at));
        if is_requeued(row) {
            let before = known.filter(|known| known.round == row.round).map_or(row.attempts, |known| known.before);
            let attempts = row.attempts.saturating_sub(before);
            let at = list.partition_point(|it| it.seq < seq);
            list.insert(at, RequeuedDelivery { seq, letter: id, round: row.round, before, attempts });
        }
        tx.rows.put_deliveries(&key, list.clone());
        self.lists.insert(key, list);
        Ok(())
    }
}
