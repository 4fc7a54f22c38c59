//! The tenants that have threads, for what works for each of them: kept from when somebody asks for them on.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::Notify;

use super::activity::ThreadActivity;
use super::catalogue::THREADS;
use super::{Partition, Store, StoreError};

#[derive(Default)]
pub struct Tenants {
    known: Mutex<HashSet<Arc<str>>>,
    changed: Notify,
}

impl Tenants {
    /// Threads of a commit, which is visible.
    pub(super) fn note(&self, threads: &[ThreadActivity]) {
        for thread in threads {
            if let Some(tenant) = thread.key.split(|byte| *byte == 0).next().and_then(|it| std::str::from_utf8(it).ok())
            {
                self.add(tenant);
            }
        }
    }

    fn add(&self, tenant: &str) {
        // A panic elsewhere leaves it whole: every change is one step.
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if !known.contains(tenant) {
            known.insert(tenant.into());
            self.changed.notify_one();
        }
    }

    /// Those that are known by now.
    pub fn all(&self) -> Vec<Arc<str>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect()
    }

    /// Returns once there are more than when it was called last. For one caller.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }
}

impl Store {
    /// From now on it is kept which tenants there are. Reads one row of each tenant in each partition.
    pub fn tenants(&self) -> Result<Arc<Tenants>, StoreError> {
        // Before the rows are read: a tenant whose first thread is committed meanwhile is not missed.
        let tenants = self.tenants.get_or_init(Arc::default);
        let mut rows = self.db.raw_iterator_cf(&self.family(THREADS));
        for partition in 0..self.partitioning.each() {
            let partition = Partition::new(partition).bytes();
            rows.seek(partition);
            while let Some(tenant) = rows.key().and_then(|key| key.strip_prefix(&partition)) {
                let Some(end) = tenant.iter().position(|byte| *byte == 0) else { break };
                let tenant = &tenant[..end];
                if let Ok(tenant) = std::str::from_utf8(tenant) {
                    tenants.add(tenant);
                }
                // After the last thread of this tenant: what follows its name is a NUL.
                let next = [&partition, tenant, &[1]].concat();
                rows.seek(next);
            }
        }
        rows.status().map_err(|error| self.note(error.into()))?;
        Ok(tenants.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::super::ThreadRow;
    use super::*;
    use crate::partitioning::{KeyHash, Partitioning};

    #[test]
    fn each_tenant_is_known_that_has_a_thread_and_those_that_get_their_first_are_told_of() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let mut store = Store::open(folder.path()).expect("it opens");
        store.begin("e", Partitioning::new(KeyHash::Murmur2, 4), &[], &[0; 12]).expect("it begins");
        let put = |names: &[(&str, &str)]| {
            let mut batch = store.batch();
            names.iter().for_each(|(tenant, thread)| batch.put_thread(tenant, thread, &ThreadRow::default()));
            store.commit(batch).expect("it commits");
        };
        let all = |tenants: &Tenants| {
            let mut all = tenants.all();
            all.sort();
            all.iter().map(|tenant| tenant.to_string()).collect::<Vec<_>>()
        };
        // One whose name begins with another's, and one with threads in every partition.
        let threads: Vec<String> = (0..50).map(|n| format!("t{n}")).collect();
        put(&threads.iter().map(|thread| ("acme", &**thread)).collect::<Vec<_>>());
        put(&[("acme2", "t"), ("a", "t"), ("~", "t")]);

        let tenants = store.tenants().expect("they are read");
        assert_eq!(all(&tenants), ["a", "acme", "acme2", "~"]);
        put(&[("acme", "new"), ("zeta", "t")]);
        assert_eq!(all(&tenants), ["a", "acme", "acme2", "zeta", "~"]);
    }
}
