//! Receipts: how far users and their durable subscriptions have come.
//!
//! A receipt is judged from its record alone, and only moves forward: an old one that arrives late, or is the only one that
//! compaction left, takes back nothing that was confirmed.

use std::collections::{BTreeMap, HashMap};

use super::transaction::Transaction;
use super::{Published, RecordError, dead_letters};
use crate::clock;
use crate::log::{Foreign, Record};
use crate::protocol::ids;
use crate::protocol::records::ReceiptRecord;
use crate::store::{MAX_PARTS, ReceiptRow};

/// The receipts of this batch.
#[derive(Default)]
pub(super) struct Receipts {
    rows: HashMap<Vec<u8>, ReceiptRow>,
}

impl Receipts {
    /// Applies a receipt, and returns its time.
    pub(super) fn apply(&mut self, tx: &mut Transaction<'_>, record: &Record) -> Result<u64, RecordError> {
        let (receipt, at) = read(record).map_err(|why| Foreign::new(why, record))?;
        let ReceiptRecord { id, tenant, thread, user, name, .. } = &receipt;

        let key = tx.store.receipt_key(tenant, thread, user, name);
        let old = match self.rows.get(&key) {
            Some(row) => Some(row.clone()),
            None => tx.store.receipt(tenant, thread, user, name)?,
        };
        if old.is_none() && !name.is_empty() {
            tx.rows.put_subscription_name(tenant, user, name);
        }
        if let (Some(part), Some(begins)) = (receipt.part_of_all(), &receipt.begins) {
            tx.rows.put_begins(tenant, user, name, part, begins);
        }
        let row = forward(&old.unwrap_or_default(), &receipt, at);
        tx.rows.put_receipt(tenant, thread, user, name, &row);
        self.rows.insert(key, row);

        // Who wrote it waits only for its commit.
        tx.commit.verdicts.push((*id, Ok(Published { seq: 0, event: *id, duplicate: false })));
        Ok(at)
    }
}

/// The row after a receipt.
fn forward(old: &ReceiptRow, receipt: &ReceiptRecord, at: u64) -> ReceiptRow {
    let late = receipt.place < old.place;
    let (sent, attempts) = if late { (old.sent, old.attempts) } else { (receipt.sent, receipt.attempts) };
    ReceiptRow { place: receipt.place.max(old.place), acked: receipt.acked.max(old.acked), sent, attempts, at }
}

/// The receipt in a record, and its time in milliseconds; or why the record is foreign.
fn read(record: &Record) -> Result<(ReceiptRecord, u64), String> {
    let receipt: ReceiptRecord = dead_letters::read_value(record)?;
    let thread = receipt.part_of_all().is_none().then_some(&*receipt.thread);
    dead_letters::check_names(&receipt.tenant, thread, &receipt.user)?;
    if receipt.part_of_all().is_some_and(|part| part >= MAX_PARTS) {
        return Err(format!("thread {} is beyond the {MAX_PARTS} parts that a subscription has", receipt.thread));
    }
    for thread in receipt.begins.iter().flat_map(BTreeMap::keys) {
        ids::check_thread(thread).map_err(|error| error.to_string())?;
    }
    let at = clock::parse_rfc3339(&receipt.at).ok_or("at is not RFC 3339")?;
    Ok((receipt, at))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::event_id;

    fn receipt(place: u64, acked: u64, sent: u64, attempts: u32) -> ReceiptRecord {
        let text = |text: &str| text.to_owned();
        let (tenant, thread, user, name, at) = (text("acme"), text("t"), text("ada"), text(""), text(""));
        ReceiptRecord { id: event_id(), tenant, thread, user, name, place, acked, sent, attempts, at, begins: None }
    }

    #[test]
    fn a_late_receipt_takes_nothing_back() {
        let first = forward(&ReceiptRow::default(), &receipt(5, 5, 9, 2), 100);
        assert_eq!(first, ReceiptRow { place: 5, acked: 5, sent: 9, attempts: 2, at: 100 });
        let late = forward(&first, &receipt(3, 3, 4, 7), 90);
        assert_eq!(late, ReceiptRow { at: 90, ..first.clone() });
        let next = forward(&late, &receipt(6, 4, 9, 0), 110);
        assert_eq!(next, ReceiptRow { place: 6, acked: 5, sent: 9, attempts: 0, at: 110 });
    }
}
