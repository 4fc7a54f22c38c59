//! Custom kinds that have a schema.

use bincode::{Decode, Encode};

use super::catalogue::{KIND_SCHEMAS, KINDS};
use super::{Batch, Store, StoreError, keys};

/// What is known of a kind without its schema.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct KindRow {
    /// The id of the record that set the schema.
    pub id: [u8; 16],
    /// The user who did.
    pub by: String,
    /// When; milliseconds.
    pub at: u64,
    /// The schema's length and its digest.
    pub bytes: u64,
    pub digest: [u8; 32],
}

/// The schema of a kind, in a row of its own: whether there is one is asked with each event of the kind, and the schema itself
/// is seldom read.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct KindSchemaRow {
    /// As in [`KindRow`].
    pub id: [u8; 16],
    pub schema: String,
}

impl Store {
    pub fn kind(&self, tenant: &str, kind: &str) -> Result<Option<KindRow>, StoreError> {
        self.get(KINDS, &keys::joined(self.partition_of_kinds(tenant), &[tenant, kind]))
    }

    pub fn kind_schema(&self, tenant: &str, kind: &str) -> Result<Option<KindSchemaRow>, StoreError> {
        self.get(KIND_SCHEMAS, &keys::joined(self.partition_of_kinds(tenant), &[tenant, kind]))
    }

    /// A tenant's kinds that have a schema by their names, in order; no more than a tenant may have.
    pub fn kinds(&self, tenant: &str) -> impl Iterator<Item = Result<(String, KindRow), StoreError>> {
        self.rows_under(KINDS, keys::prefix(self.partition_of_kinds(tenant), &[tenant]))
    }
}

impl Batch<'_> {
    pub fn put_kind(&mut self, tenant: &str, kind: &str, row: &KindRow, schema: String) {
        let key = keys::joined(self.store.partition_of_kinds(tenant), &[tenant, kind]);
        self.put(KINDS, &key, row);
        self.put(KIND_SCHEMAS, &key, &KindSchemaRow { id: row.id, schema });
    }

    pub fn delete_kind(&mut self, tenant: &str, kind: &str) {
        let key = keys::joined(self.store.partition_of_kinds(tenant), &[tenant, kind]);
        self.delete(KINDS, &key);
        self.delete(KIND_SCHEMAS, &key);
    }
}
