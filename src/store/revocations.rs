//! Revocations: up to when users' tokens are refused.

use bincode::{Decode, Encode};

use super::catalogue::REVOCATIONS;
use super::{Batch, Store, StoreError, keys};

/// Since when a user's tokens are good.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct RevocationRow {
    /// Tokens issued up to then are refused; milliseconds.
    pub until: u64,
}

impl Store {
    pub fn revocation(&self, tenant: &str, user: &str) -> Result<Option<RevocationRow>, StoreError> {
        self.get(REVOCATIONS, &keys::joined(self.partition_of_user(tenant, user), &[tenant, user]))
    }
}

impl Batch<'_> {
    pub fn put_revocation(&mut self, tenant: &str, user: &str, row: &RevocationRow) {
        self.put(REVOCATIONS, &keys::joined(self.store.partition_of_user(tenant, user), &[tenant, user]), row);
    }
}
