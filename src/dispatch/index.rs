//! The index of what waits for a group: complete, or completed here.
//!
//! The projector puts every event into it that a group wants which it knows of (`projector/wanted.rs`). A group is in another
//! partition than the events that it wants, so what was projected before the group's record is missing, as is everything that
//! it did not want before its kinds were changed. Each such record gives the group another revision, and the index says up to
//! which revision it is complete: before anything is given out, a walk over the tenant's threads adds what is missing.
//!
//! Nothing falls between the two. An event is in a commit with or before the one that made the revision known, and then it is
//! in the store when the walk begins; or it comes later, and then the projector knows. A row too many does no harm: what is
//! up to a thread's cursor is passed over. The mark is written after the last row, and RocksDB flushes all families at one
//! point, so that after a crash it is never there without them.

use std::ops::ControlFlow;

use crate::clock;
use crate::protocol::event::StoredFrame;
use crate::store::{EventRange, GroupRow, Store, StoreError, WaitingRow};

/// Rows that are written together, and threads that are read at once.
const CHUNK: usize = 1_000;
/// Threads with nothing newer than so long before the group began are not read. Clocks of nodes may differ, but not so much.
const MARGIN_MS: u64 = 86_400_000;
/// Adds what is missing of this revision of the group; `false` if the group has another one by now or is gone, or if it was to
/// go on no more. It takes as long as the tenant has threads: off the runtime's workers.
pub fn complete(
    store: &Store,
    tenant: &str,
    group: &str,
    row: &GroupRow,
    goes_on: &dyn Fn() -> bool,
) -> Result<bool, StoreError> {
    if store.waiting_complete(tenant, group)? == Some(row.revision) {
        return Ok(true);
    }
    let mut after: Option<String> = None;
    loop {
        let threads = store.threads_after(tenant, after.as_deref(), CHUNK)?;
        let Some((last, _)) = threads.last() else { break };
        after = Some(last.clone());
        for (thread, it) in &threads {
            if it.last_at + MARGIN_MS >= row.from && !complete_thread(store, (tenant, group), thread, row)? {
                return Ok(false);
            }
        }
        if !goes_on() || !is_of(store, (tenant, group), row)? {
            return Ok(false);
        }
    }
    let mut batch = store.batch();
    batch.put_waiting_complete(tenant, group, row.revision);
    store.commit(batch)?;
    Ok(true)
}

/// Whether the group still has this revision.
fn is_of(store: &Store, (tenant, group): (&str, &str), row: &GroupRow) -> Result<bool, StoreError> {
    Ok(store.group(tenant, group)?.is_some_and(|now| now.revision == row.revision))
}

fn complete_thread(store: &Store, whose: (&str, &str), thread: &str, row: &GroupRow) -> Result<bool, StoreError> {
    let (tenant, group) = whose;
    let work = store.work_of(tenant, thread, group, &row.id)?;
    let mut from = work.cursor + 1;
    loop {
        let (mut batch, mut read) = (store.batch(), 0);
        let range = EventRange { from, limit: CHUNK, ..EventRange::all() };
        store.visit_events(tenant, thread, range, |seq, event| {
            (read, from) = (read + 1, seq + 1);
            if row.kinds.iter().any(|kind| kind == event.kind)
                && !work.is_past(seq)
                && let Some(waits) = waiting_row(event.frame, event.class).filter(|it| row.wants(&it.kind, it.at))
            {
                batch.put_found_waiting(tenant, group, thread, seq, &waits);
            }
            Ok::<_, StoreError>(ControlFlow::Continue(()))
        })?;
        store.commit(batch)?;
        if read < CHUNK {
            return Ok(true);
        }
        if !is_of(store, whose, row)? {
            return Ok(false);
        }
    }
}

/// What the index has of an event.
pub fn waiting_row(frame: &str, class: u8) -> Option<WaitingRow> {
    let frame = StoredFrame::parse(frame)?;
    let at = clock::parse_rfc3339(&frame.at)?;
    Some(WaitingRow { kind: frame.kind.into_owned(), user: frame.from.into_owned(), at, class })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::ThreadRow;

    #[test]
    fn an_index_is_completed_for_a_group_as_it_is_and_for_no_revision_before() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let store = Store::open(folder.path()).expect("it opens");
        let row = |revision| GroupRow { revision: [revision; 16], ..GroupRow::of_tests() };
        let mut rows = store.batch();
        rows.put_thread("acme", "t", &ThreadRow::default());
        rows.put_group("acme", "g", &row(2));
        store.commit(rows).expect("it commits");

        let complete = |revision| complete(&store, "acme", "g", &row(revision), &|| true).expect("the store answers");
        let marked = || store.waiting_complete("acme", "g").expect("the store answers");
        assert_eq!((complete(1), marked()), (false, None));
        assert_eq!((complete(2), marked(), complete(2)), (true, Some([2; 16]), true));
        let mut rows = store.batch();
        rows.delete_group("acme", "g");
        store.commit(rows).expect("it commits");
        assert!(!complete(3), "it is gone");
    }
}
