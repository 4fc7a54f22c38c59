//! What every feed reads from and writes to.

use std::sync::Arc;

use super::hub::Hub;
use crate::auth::Rights;
use crate::ingest::submit::Submit;
use crate::memory::Pool;
use crate::store::Store;

pub struct Sources {
    pub store: Arc<Store>,
    pub rights: Rights,
    pub hub: Arc<Hub>,
    /// For receipts and dead letters.
    pub submit: Arc<Submit>,
    /// What is read from the store for readers is charged to it.
    pub memory: Pool,
}
