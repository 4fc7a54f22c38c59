//! Receipts: how far users and their durable subscriptions have come in threads.

use bincode::{Decode, Encode};

use super::catalogue::RECEIPTS;
use super::{Batch, Store, StoreError, keys};

/// How far a user has come in a thread, under the name of a durable subscription.
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode)]
pub struct ReceiptRow {
    /// The subscription goes on after this seq: it was acknowledged, given up as a dead letter, or where it began.
    pub place: u64,
    /// The newest seq acknowledged, 0 for none.
    pub acked: u64,
    /// The newest seq that was sent and not acknowledged.
    pub sent: u64,
    /// How often the first event after `place` was sent.
    pub attempts: u32,
    /// Milliseconds.
    pub at: u64,
}

impl Store {
    pub fn receipt(
        &self,
        tenant: &str,
        thread: &str,
        user: &str,
        name: &str,
    ) -> Result<Option<ReceiptRow>, StoreError> {
        self.get(RECEIPTS, &keys::joined(&[tenant, thread, user, name]))
    }

    /// The newest seq that the user has acknowledged in the thread, under any name.
    pub fn acked(&self, tenant: &str, thread: &str, user: &str) -> Result<u64, StoreError> {
        let mut newest = 0;
        for row in self.rows_under::<ReceiptRow>(RECEIPTS, keys::prefix(&[tenant, thread, user])) {
            newest = newest.max(row?.1.acked);
        }
        Ok(newest)
    }

    /// All receipts of a thread: user, name and row.
    pub fn receipts(&self, tenant: &str, thread: &str) -> Result<Vec<(String, String, ReceiptRow)>, StoreError> {
        let mut found = Vec::new();
        for row in self.rows_under(RECEIPTS, keys::prefix(&[tenant, thread])) {
            let (rest, row) = row?;
            let (user, name) = rest.split_once('\0').unwrap_or((&rest, ""));
            found.push((user.to_owned(), name.to_owned(), row));
        }
        Ok(found)
    }
}

impl Batch<'_> {
    pub fn put_receipt(&mut self, tenant: &str, thread: &str, user: &str, name: &str, row: &ReceiptRow) {
        self.put(RECEIPTS, &keys::joined(&[tenant, thread, user, name]), row);
    }
}
