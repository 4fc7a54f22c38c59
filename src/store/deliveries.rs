//! Deliveries that were given up and requeued: for each durable subscription in each thread, what it is to be sent again.

use bincode::{Decode, Encode};

use super::catalogue::REQUEUED_DELIVERIES;
use super::{Batch, Store, StoreError, keys};

/// An event that a durable subscription is to be sent again.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct RequeuedDelivery {
    pub seq: u64,
    /// The dead letter's id.
    pub letter: [u8; 16],
    /// How often the letter was requeued.
    pub round: u32,
    /// How often the event was sent before it was requeued.
    pub before: u32,
    /// How often it was sent since, and not acknowledged in time.
    pub attempts: u32,
}

/// In the order of their seqs.
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode)]
struct DeliveriesRow {
    items: Vec<RequeuedDelivery>,
}

impl Store {
    /// They are where their thread is, as receipts are; the topic of dead letters alone writes them.
    pub fn deliveries_key(&self, tenant: &str, thread: &str, user: &str, name: &str) -> Vec<u8> {
        keys::joined(self.partition(tenant, thread), &[tenant, thread, user, name])
    }

    /// What the durable subscription is to be sent again, in the order of the thread.
    pub fn requeued_deliveries(
        &self,
        tenant: &str,
        thread: &str,
        user: &str,
        name: &str,
    ) -> Result<Vec<RequeuedDelivery>, StoreError> {
        self.deliveries_by_key(&self.deliveries_key(tenant, thread, user, name))
    }

    pub fn deliveries_by_key(&self, key: &[u8]) -> Result<Vec<RequeuedDelivery>, StoreError> {
        Ok(self.get::<DeliveriesRow>(REQUEUED_DELIVERIES, key)?.unwrap_or_default().items)
    }
}

impl Batch<'_> {
    /// Writes what a durable subscription is to be sent again; nothing, and there is no row.
    pub fn put_deliveries(&mut self, key: &[u8], items: Vec<RequeuedDelivery>) {
        if items.is_empty() {
            self.delete(REQUEUED_DELIVERIES, key);
        } else {
            self.put(REQUEUED_DELIVERIES, key, &DeliveriesRow { items });
        }
    }
}
