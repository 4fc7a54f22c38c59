//! How far the client has come with one subscription, and what of it the log does not have yet.

use super::confirm::{Confirm, ConfirmPolicy};
use super::redelivery::Requeued;
use crate::auth::Principal;
use crate::clock;
use crate::protocol::records::ReceiptRecord;
use crate::store::{ReceiptRow, Store};

/// A receipt is changed by acknowledgements and by events that are given up. One record at a time is on its way to the log:
/// so many changes become few records.
pub struct Receipt {
    /// The durable subscription; empty if it is none.
    pub(super) name: Box<str>,
    /// The subscription goes on after this seq, whoever resumes it.
    pub(super) place: u64,
    /// The newest seq acknowledged, 0 for none.
    pub(super) acked: u64,
    pub(super) confirm: Option<Confirm>,
    /// The log does not have the newest change.
    pub(super) is_changed: bool,
    /// A record is on its way to the log.
    pub(super) is_being_stored: bool,
    /// The event whose dead letter is on its way to the log.
    pub(super) dead_lettering: Option<u64>,
    /// What is delivered again because somebody requeued it.
    pub(super) requeued: Option<Box<Requeued>>,
}

impl Receipt {
    /// What a subscription after `cursor` needs: with a name it is durable, and goes on from its row or begins; without one
    /// it needs a receipt only for confirmation.
    pub fn wanted(
        name: Option<&str>,
        row: Option<ReceiptRow>,
        cursor: u64,
        confirm: Option<ConfirmPolicy>,
    ) -> Option<Receipt> {
        match name {
            Some(name) => Some(Receipt::new(name, row, cursor, confirm)),
            None if confirm.is_some() => Some(Receipt::unnamed(cursor, confirm)),
            None => None,
        }
    }

    /// Without a row it begins at the cursor.
    fn new(name: &str, row: Option<ReceiptRow>, cursor: u64, confirm: Option<ConfirmPolicy>) -> Receipt {
        let row = row.unwrap_or(ReceiptRow { place: cursor, ..ReceiptRow::default() });
        Receipt {
            name: name.into(),
            place: row.place,
            acked: row.acked,
            confirm: confirm.map(|policy| Confirm::resume(policy, &row, cursor)),
            is_changed: false,
            is_being_stored: false,
            dead_lettering: None,
            requeued: None,
        }
    }

    /// Of a subscription without a name: what is acknowledged counts as read, and a new session begins where it likes.
    pub(super) fn unnamed(cursor: u64, confirm: Option<ConfirmPolicy>) -> Receipt {
        Receipt::new("", Some(ReceiptRow::default()), cursor, confirm)
    }

    /// The same, if it is a durable one whose beginning the log does not have yet.
    pub(super) fn unwritten(self) -> Receipt {
        Receipt { is_changed: self.is_durable(), ..self }
    }

    pub(super) fn is_durable(&self) -> bool {
        !self.name.is_empty()
    }

    /// Whether a record can go to the log now.
    pub(super) fn must_be_stored(&self) -> bool {
        self.is_changed && !self.is_being_stored
    }

    /// Whether something was sent that a later session under the same name must know of.
    pub(super) fn has_open_deliveries(&self) -> bool {
        self.is_durable() && self.confirm.as_ref().is_some_and(Confirm::is_open)
    }

    /// Another session under the same name may have come further.
    pub(super) fn merge(&mut self, row: &ReceiptRow) {
        self.place = self.place.max(row.place);
        self.acked = self.acked.max(row.acked);
    }

    /// The record to write, merged with what the log has: the last record written is all that compaction leaves.
    pub(super) fn merged_record(&mut self, store: &Store, (tenant, user): (&str, &str), thread: &str) -> ReceiptRecord {
        if let Ok(Some(row)) = store.receipt(tenant, thread, user, &self.name) {
            self.merge(&row);
        }
        self.record((tenant, user), thread)
    }

    fn record(&self, (tenant, user): (&str, &str), thread: &str) -> ReceiptRecord {
        // What was sent without a name cannot be resumed.
        let (sent, attempts) = match &self.confirm {
            Some(confirm) if self.is_durable() => confirm.progress(),
            _ => (0, 0),
        };
        ReceiptRecord {
            id: clock::event_id(),
            tenant: tenant.to_owned(),
            thread: thread.to_owned(),
            user: user.to_owned(),
            name: self.name.to_string(),
            place: self.place,
            acked: self.acked,
            sent,
            attempts,
            begins: None,
            at: clock::rfc3339(clock::now_ms()),
        }
    }
}

/// The record that a durable subscription begins with in a thread.
pub fn first_receipt(who: &Principal, thread: &str, name: &str, place: u64) -> ReceiptRecord {
    Receipt::new(name, None, place, None).record((&who.tenant, &who.user), thread)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_receipt_is_needed_for_a_name_or_for_confirmation() {
        assert!(Receipt::wanted(None, None, 3, None).is_none());
        let durable = Receipt::wanted(Some("mail"), None, 3, None).expect("it has a name");
        assert_eq!((durable.place, durable.confirm.is_some(), durable.is_durable()), (3, false, true));
        let confirmed =
            Receipt::wanted(None, None, 3, Some(ConfirmPolicy::default())).expect("it has deliveries to confirm");
        assert_eq!((confirmed.place, confirmed.confirm.is_some(), confirmed.is_durable()), (0, true, false));
    }

    #[test]
    fn merging_with_another_session_never_goes_back() {
        let row = |place, acked| ReceiptRow { place, acked, ..ReceiptRow::default() };
        let mut receipt = Receipt::wanted(Some("mail"), Some(row(5, 4)), 5, None).expect("it has a name");
        receipt.merge(&row(3, 7));
        assert_eq!((receipt.place, receipt.acked), (5, 7));
    }

    #[test]
    fn only_a_durable_subscription_has_a_beginning_to_be_stored() {
        let unwritten = |name| {
            Receipt::wanted(name, None, 0, Some(ConfirmPolicy::default())).map(Receipt::unwritten).expect("it confirms")
        };
        assert!(unwritten(Some("mail")).must_be_stored());
        assert!(!unwritten(None).must_be_stored());
    }
}
