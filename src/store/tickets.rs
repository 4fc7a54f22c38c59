//! Tickets that are open: a row for each user who has some, and for each partition a list of these by time, from which those
//! are purged that nobody used.

use bincode::{Decode, Encode};

use super::catalogue::{TICKET_TIMES, TICKETS};
use super::{Batch, Store, StoreError, keys};
use crate::protocol::tickets::TicketOwner;

/// A user's open tickets. One row, since it is looked up by its key alone: a row for each ticket would have to be counted,
/// past all those that were used and deleted.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct TicketsRow {
    pub tenant: String,
    pub user: String,
    /// In the order in which they were given.
    pub open: Vec<OpenTicket>,
    /// From which log time on the row can go, in milliseconds.
    pub purge_at: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct OpenTicket {
    pub hash: [u8; 32],
    /// Those of the token that it was asked for with.
    pub scopes: String,
    /// When that token was issued, if it says so; milliseconds.
    pub iat_ms: Option<u64>,
    /// When that token expires; seconds.
    pub exp: u64,
    /// When the ticket expires; milliseconds.
    pub expires_at: u64,
}

impl Store {
    pub fn tickets(&self, owner: &TicketOwner) -> Result<Option<TicketsRow>, StoreError> {
        self.get(TICKETS, &keys::tickets(self.partition_of_tickets(owner), owner))
    }

    /// Rows of `ticket_times` in `from..to`, in order.
    pub fn ticket_times(&self, from: &[u8], to: &[u8]) -> impl Iterator<Item = Result<Vec<u8>, StoreError>> {
        self.between(TICKET_TIMES, from, to.to_vec()).map(|row| Ok(row?.0.into_vec()))
    }
}

impl Batch<'_> {
    pub fn put_tickets(&mut self, owner: &TicketOwner, row: &TicketsRow) {
        self.put(TICKETS, &keys::tickets(self.store.partition_of_tickets(owner), owner), row);
    }

    pub fn delete_tickets(&mut self, owner: &TicketOwner) {
        self.delete(TICKETS, &keys::tickets(self.store.partition_of_tickets(owner), owner));
    }

    pub fn put_ticket_time(&mut self, time: &[u8]) {
        self.put_empty(TICKET_TIMES, time);
    }

    pub fn delete_ticket_time(&mut self, time: &[u8]) {
        self.delete(TICKET_TIMES, time);
    }
}
