//! Which events are work, and for which groups: what the projector puts into the index of what waits.
//!
//! The index is a hint to whoever gives out work, and no verdict: groups are in another partition than events, so what is in it
//! depends on when this node came to know of a group. The events of before that are found by whoever needs them
//! (`dispatch/index.rs`).

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};

use crate::clock;
use crate::protocol::event::LogEvent;
use crate::store::{Batch, GroupRow, Store, StoreError, WaitingRow};

/// A tenant's groups, by name.
type Groups = Vec<(String, GroupRow)>;

/// The groups of each tenant that has any, as they are known when a batch begins, and what the batch changes of them. Cheap to
/// copy.
#[derive(Clone, Default)]
pub(super) struct Wanted {
    tenants: Arc<HashMap<String, Arc<Groups>>>,
    /// How often groups had changed by then.
    generation: u64,
    /// The batch has changed some.
    is_changed: bool,
}

/// What all projectors of a store know of groups.
///
/// A batch is committed only if nobody has come to know of a group since it began; else it is made anew. And while a change of a
/// group is committed, nothing else is. So whatever is in the store by then was committed before, and whatever comes later is
/// judged by those who know: who sees the change in the store can tell what may be missing in the index.
#[derive(Clone, Default)]
pub(super) struct SharedWanted {
    known: Arc<RwLock<Option<Wanted>>>,
}

impl SharedWanted {
    pub(super) fn get(&self, store: &Store) -> Result<Wanted, StoreError> {
        if let Some(known) = &*self.known.read().unwrap_or_else(PoisonError::into_inner) {
            return Ok(known.clone());
        }
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        Ok(match &*known {
            Some(known) => known.clone(),
            None => known.insert(Wanted::load(store)?).clone(),
        })
    }

    /// Commits rows that were made by what was known; `false` if more is known by now, and nothing was committed.
    pub(super) fn commit(&self, store: &Store, rows: Batch<'_>, by: Wanted) -> Result<bool, StoreError> {
        let is_by = |known: &Option<Wanted>| known.as_ref().is_some_and(|known| known.generation == by.generation);
        if !by.is_changed {
            let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
            if !is_by(&known) {
                return Ok(false);
            }
            store.commit(rows)?;
            return Ok(true);
        }
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        if !is_by(&known) {
            return Ok(false);
        }
        store.commit(rows)?;
        *known = Some(Wanted { generation: by.generation + 1, is_changed: false, ..by });
        Ok(true)
    }
}

impl Wanted {
    fn load(store: &Store) -> Result<Wanted, StoreError> {
        let mut tenants: HashMap<String, Arc<Groups>> = HashMap::new();
        for row in store.all_groups() {
            let (tenant, group, row) = row?;
            Arc::make_mut(tenants.entry(tenant).or_default()).push((group, row));
        }
        Ok(Wanted { tenants: Arc::new(tenants), ..Wanted::default() })
    }

    /// A group as it is from now on, if it still is.
    pub(super) fn set(&mut self, tenant: &str, group: &str, row: Option<&GroupRow>) {
        let tenants = Arc::make_mut(&mut self.tenants);
        let groups = Arc::make_mut(tenants.entry(tenant.to_owned()).or_default());
        groups.retain(|(name, _)| name != group);
        groups.extend(row.map(|row| (group.to_owned(), row.clone())));
        if groups.is_empty() {
            tenants.remove(tenant);
        }
        self.is_changed = true;
    }

    /// Whether there is a group of this name that was made after the one with this id. One that was made before says nothing: it
    /// may be that this node has not yet heard of the newer.
    pub(super) fn is_newer(&self, tenant: &str, group: &str, id: &[u8; 16]) -> bool {
        let groups = self.tenants.get(tenant).into_iter().flat_map(|groups| groups.iter());
        groups.filter(|(name, _)| name == group).any(|(_, row)| row.id > *id)
    }

    /// Puts an event where the groups look whose work it is. A tenant without groups costs one lookup.
    pub(super) fn index(&self, rows: &mut Batch<'_>, event: &LogEvent<'_>, seq: u64, class: u8) {
        let Some(groups) = self.tenants.get(&*event.tenant) else { return };
        // The event's own time, which its frame has as well.
        let Some(at) = clock::parse_rfc3339(&event.at) else { return };
        for (group, _) in groups.iter().filter(|(_, row)| row.wants(&event.kind, at)) {
            let row = WaitingRow { kind: event.kind.to_string(), user: event.from.to_string(), at, class };
            rows.put_waiting(&event.tenant, group, &event.thread, seq, &row);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_group_that_was_made_later_is_newer_than_another_of_its_name() {
        let mut wanted = Wanted::default();
        wanted.set("acme", "g", Some(&GroupRow { id: [2; 16], ..GroupRow::of_tests() }));
        let newer = [1, 2, 3].map(|id| wanted.is_newer("acme", "g", &[id; 16]));
        assert_eq!(newer, [true, false, false]);
        assert!(!wanted.is_newer("acme", "other", &[1; 16]) && !wanted.is_newer("other", "g", &[1; 16]));
    }

    #[test]
    fn what_was_made_before_a_group_was_known_is_made_anew_and_what_comes_after_knows_it() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let store = Store::open(folder.path()).expect("it opens");
        let shared = SharedWanted::default();
        let commit = |wanted: Wanted| shared.commit(&store, store.batch(), wanted).expect("the store takes it");
        let get = || shared.get(&store).expect("it is read");
        let (before, other, mut changes) = (get(), get(), get());
        assert!(commit(before), "nothing has changed");
        changes.set("acme", "g", Some(&GroupRow::of_tests()));
        assert!(commit(changes));
        assert!(!commit(other), "it did not know of the group");

        let known = get();
        assert_eq!(known.tenants.get("acme").map(|groups| groups.len()), Some(1));
        assert!(commit(known.clone()) && commit(known.clone()), "until it changes again");
        let mut gone = get();
        gone.set("acme", "g", None);
        assert!(commit(gone) && !commit(known));
        assert!(get().tenants.is_empty(), "a tenant without groups is not looked through");
    }
}
