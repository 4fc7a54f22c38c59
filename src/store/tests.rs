//! What readers of the store pass over: as much as they are after, however much there is beside it. Counted, not timed. And
//! what who listens to commits hears.

use std::ops::ControlFlow;
use std::sync::{Arc, Mutex};

use rocksdb::perf::{PerfContext, PerfMetric, PerfStatsLevel, set_perf_stats};

use super::dead_letters::{DeadLetterFilter, DeadLetterRow, Order};
use super::messages::{ClosedRow, MessageKey, MessageRow, TextPosition, WrittenText};
use super::runs::{Ending, EventRef, RunKey, RunRow};
use super::{MemberRow, Store, StoreError, ThreadRow, WorkRow};

/// What `work` reads: rows looked up, rows that iterators come to, and what they pass over of deleted ones.
fn reads<T>(work: impl FnOnce() -> T) -> (u64, T) {
    set_perf_stats(PerfStatsLevel::EnableCount);
    let mut counts = PerfContext::default();
    counts.reset();
    let done = work();
    let counted = [
        PerfMetric::GetFromMemtableCount,
        PerfMetric::SeekOnMemtableCount,
        PerfMetric::NextOnMemtableCount,
        PerfMetric::PrevOnMemtableCount,
    ];
    let sum = counted.into_iter().map(|metric| counts.metric(metric)).sum();
    set_perf_stats(PerfStatsLevel::Disable);
    (sum, done)
}

fn store() -> (tempfile::TempDir, Store) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let store = Store::open(folder.path()).expect("it opens");
    (folder, store)
}

fn active_at(last_at: u64) -> ThreadRow {
    ThreadRow { head: 1, last_at, ..ThreadRow::default() }
}

fn key(run: &str) -> RunKey {
    RunKey::new("acme", "t", run)
}

fn run(seq: u64) -> RunRow {
    let mark = EventRef { seq, at: seq };
    RunRow { started: mark, last: mark, ..RunRow::new("scout".into(), "bot".into()) }
}

fn message(number: u64) -> (MessageKey, MessageRow) {
    // Their names are in another order than they were begun.
    let key = MessageKey { run: key("r"), message: format!("m{:04}", 9_999 - number) };
    let row = MessageRow {
        from: "bot".into(),
        event: [0; 16],
        number,
        begun: number,
        restarts: 0,
        chars: 1,
        bytes: 1,
        begun_at: number,
        last_at: number,
        closed: None,
    };
    (key, row)
}

/// Begins so many messages, in one run.
fn write_messages(store: &Store, count: u64) {
    let mut rows = store.batch();
    for n in 0..count {
        let (key, row) = message(n);
        rows.put_delta(&key, &row, TextPosition::default(), "a");
        rows.open_message(&key, &row);
    }
    store.commit(rows).expect("it commits");
}

#[test]
fn a_page_of_a_user_s_threads_reads_no_rows_to_find_the_newest_among_thousands() {
    let (_folder, store) = store();
    let mut rows = store.batch();
    for n in 0..2_000 {
        let thread = format!("t{n:04}");
        rows.put_member("acme", &thread, "ada", &MemberRow { since: 1 });
        rows.put_thread("acme", &thread, &active_at(1 + n));
    }
    store.commit(rows).expect("it commits");
    let newest = || {
        let threads = store.active_threads("acme", "ada").expect("it is read").expect("nobody reads a long list");
        let newest = threads.iter().max_by_key(|cell| cell.last_at()).expect("there are some");
        (threads.len(), newest.thread().to_owned())
    };
    let (first, found) = reads(newest);
    assert!(first >= 4_000, "{first}: a membership and a row for each of them, once");
    assert_eq!(found, (2_000, "t1999".to_owned()));
    assert_eq!(reads(newest), (0, (2_000, "t1999".to_owned())));

    let mut rows = store.batch();
    rows.put_thread("acme", "t0007", &active_at(5_000));
    rows.delete_member("acme", "t1999", "ada");
    rows.put_member("acme", "another", "ada", &MemberRow { since: 1 });
    rows.put_thread("acme", "another", &active_at(6_000));
    store.commit(rows).expect("it commits");
    assert_eq!(reads(newest), (0, (2_000, "another".to_owned())));
    let mut rows = store.batch();
    rows.put_thread("acme", "t0007", &active_at(7_000));
    rows.put_thread("other", "t0008", &active_at(8_000));
    store.commit(rows).expect("it commits");
    assert_eq!(reads(newest), (0, (2_000, "t0007".to_owned())));
}

#[test]
fn a_page_of_runs_reads_those_that_it_shows() {
    let (_folder, store) = store();
    let mut rows = store.batch();
    for n in 1..=2_000 {
        rows.put_new_run(&key(&format!("r{n}")), &run(n));
    }
    store.commit(rows).expect("it commits");
    let page = || store.runs_of("acme", "t", 1_500).take(10).map(|run| run.expect("it is read").0).collect::<Vec<_>>();
    let (count, seqs) = reads(page);
    assert_eq!(seqs, (1_490..1_500).rev().collect::<Vec<u64>>());
    assert!(count <= 25, "{count}");
}

#[test]
fn a_page_of_dead_letters_reads_those_that_it_shows_however_many_there_are() {
    let (_folder, store) = store();
    let put = |ids: std::ops::Range<u32>| {
        let mut rows = store.batch();
        for n in ids {
            let id = *uuid::Uuid::from_u128(u128::from(n)).as_bytes();
            let row = DeadLetterRow::open("rejected", Some("x.job"), u64::from(n), 1, "it is broken".to_owned());
            rows.put_dead_letter("acme", id, None, &row);
        }
        store.commit(rows).expect("it commits");
    };
    let page = |reason: Option<&str>| {
        let filter = DeadLetterFilter { reason: reason.map(str::to_owned), ..DeadLetterFilter::default() };
        let mut found = Vec::new();
        let visit = |_, row: DeadLetterRow, _| {
            found.push(row.at);
            Ok::<_, StoreError>(if found.len() == 10 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
        };
        store.dead_letters(["acme", ""], &filter, Order::NewestFirst, None, visit).expect("it is read");
        found
    };
    put(1..20);
    let (few, _) = reads(|| (page(None), page(Some("rejected"))));
    put(20..20_000);
    let (many, (all, rejected)) = reads(|| (page(None), page(Some("rejected"))));
    assert_eq!((&all, &rejected), (&(19_990..20_000).rev().collect(), &all));
    assert!(few >= 40 && many <= few, "{many} rows of 20,000, and {few} of 20");
}

#[test]
fn the_page_of_a_run_reads_the_messages_that_it_shows_in_the_order_in_which_they_were_begun() {
    let (_folder, store) = store();
    write_messages(&store, 2_000);
    let page = || {
        let run = key("r");
        let messages = store.messages_of(&run).take(10);
        messages.map(|message| message.expect("it is read").1.number).collect::<Vec<_>>()
    };
    let (count, numbers) = reads(page);
    assert_eq!(numbers, (0..10).collect::<Vec<u64>>());
    assert!(count <= 35, "{count}: an entry of the list and a row for each, and one to begin with");
}

#[test]
fn who_joins_a_thread_passes_over_no_message_that_was_closed() {
    let (_folder, store) = store();
    write_messages(&store, 2_000);
    let mut rows = store.batch();
    for n in 0..1_990 {
        let (key, row) = message(n);
        let closed = ClosedRow { mark: EventRef { seq: n, at: n }, event: [0; 16], content: [0; 32] };
        let text = WrittenText { in_store: Some(0), in_batch: Vec::new() };
        rows.close_message(&key, &MessageRow { closed: Some(closed), ..row }, &text).expect("it is read");
    }
    rows.put_thread("acme", "t", &ThreadRow { writing: 10, messages: 2_000, oldest_open: 1_990, ..active_at(1) });
    store.commit(rows).expect("it commits");

    let open = || {
        let open = store.open_messages("acme", "t", 0).expect("it is read");
        open.map(|message| message.expect("it is read").0).collect::<Vec<_>>()
    };
    let (count, numbers) = reads(open);
    assert_eq!(numbers, (1_990..2_000).collect::<Vec<u64>>());
    assert!(count <= 20, "{count}");
    let from = store.open_messages("acme", "t", 1_995).expect("it is read");
    assert_eq!(from.map(|message| message.expect("it is read").0).next(), Some(1_995));
}

#[test]
fn who_begins_to_listen_hears_of_a_run_whose_commit_was_prepared_before() {
    let (_folder, store) = store();
    let mut rows = store.batch();
    rows.put_run_row(&key("r"), &run(1));
    let heard = Arc::new(Mutex::new(Vec::new()));
    let hears = heard.clone();
    store.listen_to_runs(move |changes| {
        hears.lock().expect("nobody panics with it").extend(changes.into_iter().map(|(key, _)| key));
    });
    store.commit(rows).expect("the store takes it");
    assert_eq!(*heard.lock().expect("nobody panics with it"), [key("r")]);
}

#[test]
fn whether_an_agent_works_in_a_thread_is_one_lookup_however_many_of_its_runs_have_ended() {
    let (_folder, store) = store();
    for n in 1..=1_000 {
        let mut rows = store.batch();
        let (key, row) = (key(&format!("r{n}")), run(n));
        rows.put_new_run(&key, &row);
        rows.put_open_runs_by(&key, "bot", 1);
        store.commit(rows).expect("it commits");
        let mut rows = store.batch();
        rows.put_run(&key, &row, &RunRow { ended: Some((row.last, Ending::Completed)), ..row.clone() });
        rows.put_open_runs_by(&key, "bot", 0);
        store.commit(rows).expect("it commits");
    }
    let works = || store.has_open_run("acme", "t", "bot").expect("it is read");
    assert_eq!(reads(works), (1, false));
    let mut rows = store.batch();
    rows.put_open_runs_by(&key("r"), "bot", 2);
    store.commit(rows).expect("it commits");
    assert_eq!(reads(works), (1, true));
    assert_eq!(store.open_runs_by(&key("r"), "bot").expect("it is read"), 2);
}

#[test]
fn whether_a_user_has_a_lease_costs_what_the_user_has_however_many_groups_and_others_worked_there() {
    let (_folder, store) = store();
    let lease = |group: usize, user: &str, until| {
        let mut rows = store.batch();
        let group = format!("g{group}");
        let row = WorkRow { cursor: 1, ..WorkRow::default() };
        rows.put_work(("acme", "t", &group), &WorkRow::default(), &row, 1);
        rows.put_worker(("acme", "t", &group), user, until);
        store.commit(rows).expect("it commits");
    };
    for group in 0..1_000 {
        lease(group, &format!("w{group}"), Some(100));
    }
    let has = |user, now| reads(|| store.has_lease("acme", "t", user, now).expect("it is read"));
    assert_eq!((has("wim", 99), has("w1", 99).1, has("w1", 100).1), ((1, false), true, false));
    lease(1_000, "wim", Some(50));
    lease(1_001, "wim", Some(100));
    assert_eq!((has("wim", 49).1, has("wim", 99).1, has("wim", 100).1), (true, true, false));
    lease(1_001, "wim", None);
    assert!(!has("wim", 99).1);
    assert!(has("wim", 49).0 <= 4, "{:?}", has("wim", 49));
}
