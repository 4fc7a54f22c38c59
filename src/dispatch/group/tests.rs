//! A group that has room for few, and what is looked at, left out and found.

use super::*;
use crate::store::{FailedRow, LeaseRow, PassedRow, WaitingRow, WorkRow};

const NOW: u64 = 1_800_000_000_000;
const ID: [u8; 16] = [1; 16];

fn group_row() -> GroupRow {
    GroupRow { created_at: NOW, ..GroupRow::of_tests() }
}

fn arrive(store: &Store, user: &str, thread: &str, kind: &str) {
    let mut rows = store.batch();
    let row = WaitingRow { kind: kind.to_owned(), user: user.to_owned(), at: NOW, class: 1 };
    rows.put_waiting("acme", "g", thread, 1, &row);
    store.commit(rows).expect("the store takes it");
}

/// Takes what comes next and settles it, as often as there is something; whose it was, in order.
fn work_off(group: &mut Group, store: &Store) -> Vec<String> {
    let (mut done, mut looks) = (Vec::new(), 0);
    loop {
        while group.is_looking(NOW) {
            looks += 1;
            assert!(looks < 1_000, "it looks again and again");
            group.look_further(store, NOW).expect("the store answers");
            assert!(group.bytes() <= group.max_bytes, "{} are held", group.heads.len());
        }
        let Some((user, _, thread)) = group.ready.next(1).next() else { return done };
        group.choose(&thread, Uuid::from_bytes([7; 16]), NOW);
        let mut rows = store.batch();
        let row = WorkRow { group_id: ID, cursor: 1, ..WorkRow::default() };
        rows.put_work(("acme", &thread, "g"), &WorkRow::default(), &row, 1);
        rows.delete_waiting("acme", "g", &thread, 1);
        store.commit(rows).expect("the store takes it");
        group.look_at(store, &thread, Why::Moved, NOW).expect("the store answers");
        done.push(user.to_string());
    }
}

/// There is room for so many threads.
fn group_of(store: &Store, heads: usize) -> Group {
    let mut rows = store.batch();
    rows.put_group("acme", "g", &group_row());
    store.commit(rows).expect("the store takes it");
    let max_bytes = heads * (HEAD_BYTES + USER_BYTES + 8);
    let mut group = Group { max_bytes, ..Group::new("acme".into(), "g".into()) };
    group.reload(store).expect("the store answers");
    group.index = Index::Complete;
    group.find_all();
    group
}

#[test]
fn what_there_is_no_room_for_is_found_later_and_everybodys_first_is_held() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let store = Store::open(folder.path()).expect("it opens");
    for n in 0..40 {
        arrive(&store, "ada", &format!("a{n:02}"), "x.job");
    }
    for n in 0..3 {
        arrive(&store, "ben", &format!("b{n}"), "x.job");
    }
    arrive(&store, "cid", "c", "x.job");
    arrive(&store, "dan", "d", "x.none-of-its-kinds");

    let done = work_off(&mut group_of(&store, 4), &store);
    let of = |user: &str| done.iter().filter(|it| *it == user).count();
    assert_eq!((done.len(), of("ada"), of("ben"), of("cid")), (44, 40, 3, 1));
    let first = |user: &str| done.iter().position(|it| it == user);
    assert!(first("ben") < Some(4) && first("cid") < Some(4), "{done:?}");
}

#[test]
fn what_comes_while_there_is_no_room_is_found_as_well() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let store = Store::open(folder.path()).expect("it opens");
    let mut group = group_of(&store, 2);
    while group.is_looking(NOW) {
        group.look_further(&store, NOW).expect("the store answers");
    }
    for n in 0..10 {
        let thread = format!("t{}", (n * 7) % 10);
        arrive(&store, ["ada", "ben"][n % 2], &thread, "x.job");
        group.look_at(&store, &thread.as_str().into(), Why::Came, NOW).expect("the store answers");
        assert!(group.heads.len() <= 2);
    }
    assert_eq!(work_off(&mut group, &store).len(), 10);
    assert!(!group.is_looking(NOW), "and then there is nothing more to look for");
}
#[test]
fn what_is_to_be_tried_later_keeps_out_nothing_that_can_be_done_now_and_is_found_when_it_is_time() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let store = Store::open(folder.path()).expect("it opens");
    let mut group = group_of(&store, 4);
    for n in 0..8 {
        let (thread, failed) = (format!("f{n}"), NOW + 10_000 + n);
        arrive(&store, "ada", &thread, "x.job");
        let mut rows = store.batch();
        let failed = vec![FailedRow { seq: 1, after: 0, attempts: 1, not_before: failed, tries: Vec::new() }];
        let row = WorkRow { group_id: ID, failed, ..WorkRow::default() };
        rows.put_work(("acme", &thread, "g"), &WorkRow::default(), &row, 0);
        store.commit(rows).expect("the store takes it");
        group.look_at(&store, &thread.as_str().into(), Why::Moved, NOW).expect("the store answers");
    }
    assert!(group.heads.len() < 8 && group.later == group.heads.len() && group.ready.len() == 0);
    for n in 0..3 {
        let thread = format!("t{n}");
        arrive(&store, "ada", &thread, "x.job");
        group.look_at(&store, &thread.as_str().into(), Why::Came, NOW).expect("the store answers");
        assert!(group.bytes() <= group.max_bytes);
    }
    assert!(group.ready.len() >= 2, "{} of 3 can be done", group.ready.len());

    let mut done = BTreeSet::new();
    let mut now = NOW;
    while done.len() < 11 {
        while group.is_looking(now) {
            group.look_further(&store, now).expect("the store answers");
        }
        group.due(now, || now);
        let Some((_, _, thread)) = group.ready.next(1).next() else {
            now = group.next_due(now).expect("there is more").max(now);
            continue;
        };
        group.choose(&thread, Uuid::from_bytes([7; 16]), now);
        let mut rows = store.batch();
        let row = WorkRow { group_id: ID, cursor: 1, ..WorkRow::default() };
        rows.put_work(("acme", &thread, "g"), &WorkRow::default(), &row, 1);
        rows.delete_waiting("acme", "g", &thread, 1);
        store.commit(rows).expect("the store takes it");
        group.look_at(&store, &thread, Why::Moved, now).expect("the store answers");
        done.insert(thread);
    }
    assert!((NOW + 10_007..NOW + 20_000).contains(&now), "{}", now - NOW);
}

#[test]
fn where_all_that_is_held_is_to_be_tried_later_what_waits_outside_is_found_before() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let store = Store::open(folder.path()).expect("it opens");
    for n in 0..20 {
        arrive(&store, "ada", &format!("t{n:02}"), "x.job");
    }
    let put = |thread: &str, row: WorkRow| {
        let mut rows = store.batch();
        rows.put_work(("acme", thread, "g"), &WorkRow::default(), &WorkRow { group_id: ID, ..row }, 0);
        store.commit(rows).expect("the store takes it");
    };
    // Another node's.
    let (id, kind, holder, until) = ([8; 16], "x.job".into(), "wim".into(), NOW + 5_000);
    let lease = LeaseRow { id, seq: 1, after: 0, kind, attempt: 1, attempts: 5, holder, at: NOW, until };
    put("t19", WorkRow { leases: vec![lease], ..WorkRow::default() });
    let mut group = group_of(&store, 4);
    group.look_further(&store, NOW).expect("the store answers");
    let held: Vec<_> = group.heads.keys().cloned().collect();
    assert!(held.len() < 10 && group.ready.len() == held.len(), "{held:?}");

    for thread in &held {
        let failed = FailedRow { seq: 1, after: 0, attempts: 1, not_before: NOW + 10_000, tries: Vec::new() };
        put(thread, WorkRow { failed: vec![failed], ..WorkRow::default() });
        group.look_at(&store, thread, Why::Moved, NOW).expect("the store answers");
    }
    assert!(group.later == held.len() && group.ready.len() == 0);
    assert_eq!(work_off(&mut group, &store).len(), 20 - 1 - held.len());
    assert_eq!(group.next_due(NOW), Some(until), "the lease may be over and not settled then");
}

#[test]
fn a_walk_for_what_is_to_be_tried_now_takes_half_of_the_time_at_most() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let store = Store::open(folder.path()).expect("it opens");
    for n in 0..CHUNK + 1 {
        arrive(&store, "ada", &format!("t{n}"), "x.job");
    }
    let mut group = group_of(&store, 4);
    group.scan = None;
    group.due = Some(NOW);
    for now in [NOW, NOW + 7_000] {
        assert!(group.is_looking(now));
        group.look_further(&store, now).expect("the store answers");
    }
    assert!(group.scan.is_none() && group.due_not_before == NOW + 14_000, "{}", group.due_not_before - NOW);
}

#[test]
fn threads_that_are_paused_keep_out_nothing_that_can_be_done_and_wait_until_they_are_resumed() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let store = Store::open(folder.path()).expect("it opens");
    let mut group = group_of(&store, 4);
    let pause = |thread: &str, paused_at| {
        let mut rows = store.batch();
        let row = WorkRow { group_id: ID, paused_at, ..WorkRow::default() };
        rows.put_work(("acme", thread, "g"), &WorkRow::default(), &row, 0);
        store.commit(rows).expect("the store takes it");
    };
    let threads: Vec<Arc<str>> = (0..8).map(|n| format!("p{n}").into()).collect();
    for thread in &threads {
        arrive(&store, "ada", thread, "x.job");
        pause(thread, Some(NOW));
        group.look_at(&store, thread, Why::Came, NOW).expect("the store answers");
    }
    assert!(group.heads.len() < 8 && group.later == group.heads.len(), "there is no room for all");
    for n in 0..3 {
        arrive(&store, "ada", &format!("t{n}"), "x.job");
        group.look_at(&store, &format!("t{n}").into(), Why::Came, NOW).expect("the store answers");
    }
    assert!(group.ready.len() >= 2, "{} of 3 can be done", group.ready.len());
    assert_eq!(work_off(&mut group, &store).len(), 3);
    assert!(group.next_due(NOW).is_none() && !group.is_looking(NOW), "nothing is looked for in vain");

    for thread in &threads {
        pause(thread, None);
        group.look_at(&store, thread, Why::Moved, NOW).expect("the store answers");
    }
    assert_eq!(work_off(&mut group, &store).len(), 8);
    assert_eq!((group.heads.len(), group.bytes, group.later), (0, 0, 0));
}

#[test]
fn of_a_group_without_order_each_event_is_charged_for_and_those_left_out_are_found() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let store = Store::open(folder.path()).expect("it opens");
    let mut group = group_of(&store, 4);
    let mut rows = store.batch();
    rows.put_group("acme", "g", &GroupRow { order: WorkOrder::None, ..group_row() });
    for seq in 1..=20 {
        let row = WaitingRow { kind: "x.job".to_owned(), user: "ada".to_owned(), at: NOW, class: 1 };
        rows.put_waiting("acme", "g", "t", seq, &row);
    }
    store.commit(rows).expect("the store takes it");
    group.reload(&store).expect("the store answers");

    let mut done = Vec::new();
    while done.len() < 20 {
        while group.is_looking(NOW) {
            group.look_further(&store, NOW).expect("the store answers");
        }
        assert!(group.bytes() <= group.max_bytes && group.heads.len() <= 4, "{} are held", group.heads.len());
        let (_, _, key) = group.ready.next(1).next().expect("there is more");
        let seq = group.heads[&key].seq;
        group.choose(&key, Uuid::from_bytes([7; 16]), NOW);
        done.push(seq);
        let mut rows = store.batch();
        let passed = done.iter().map(|seq| PassedRow { after: seq - 1, to: *seq }).collect();
        let row = WorkRow { group_id: ID, passed, ..WorkRow::default() };
        rows.put_work(("acme", "t", "g"), &WorkRow::default(), &row, 1);
        rows.delete_waiting("acme", "g", "t", seq);
        store.commit(rows).expect("the store takes it");
        group.look_at(&store, &"t".into(), Why::Moved, NOW).expect("the store answers");
    }
    done.sort_unstable();
    assert_eq!(done, (1..=20).collect::<Vec<_>>());
    assert_eq!((group.heads.len(), group.bytes, group.seqs.len()), (0, 0, 0));
}

#[test]
fn of_a_group_without_order_what_was_left_out_of_a_thread_is_found_though_some_of_it_is_held() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let store = Store::open(folder.path()).expect("it opens");
    let mut group = group_of(&store, 4);
    let mut rows = store.batch();
    rows.put_group("acme", "g", &GroupRow { order: WorkOrder::None, ..group_row() });
    let failed = FailedRow { seq: 1, after: 0, attempts: 1, not_before: NOW + 10_000, tries: Vec::new() };
    let row = WorkRow { group_id: ID, failed: vec![failed], ..WorkRow::default() };
    rows.put_work(("acme", "t", "g"), &WorkRow::default(), &row, 0);
    store.commit(rows).expect("the store takes it");
    group.reload(&store).expect("the store answers");
    let mut arrive = |user: &str, thread: &str, seq| {
        let mut rows = store.batch();
        let row = WaitingRow { kind: "x.job".to_owned(), user: user.to_owned(), at: NOW, class: 1 };
        rows.put_waiting("acme", "g", thread, seq, &row);
        store.commit(rows).expect("the store takes it");
        group.look_at(&store, &thread.into(), Why::Came, NOW).expect("the store answers");
    };
    arrive("ada", "t", 1);
    for n in 0..20 {
        arrive(&format!("u{n}"), &format!("u{n}"), 1);
    }
    arrive("ada", "t", 2);
    let held = |group: &Group| group.seqs.get("t").is_some_and(|seqs| seqs.contains(&2));
    assert!(group.later == 1 && group.missed && !held(&group), "there is no room for it");

    for thread in group.heads.keys().filter(|key| !key.starts_with("t\0")).cloned().collect::<Vec<_>>() {
        group.remove(&thread);
    }
    while group.is_looking(NOW) && !held(&group) {
        group.look_further(&store, NOW).expect("the store answers");
    }
    assert!(held(&group), "and now there is");
}

#[test]
fn a_worker_has_its_credit_back_for_what_it_settles_after_the_group_has_changed_or_is_gone() {
    for changed in [Some(GroupRow { revision: [2; 16], ..group_row() }), None] {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let store = Store::open(folder.path()).expect("it opens");
        arrive(&store, "ada", "t", "x.job");
        let mut group = group_of(&store, 4);
        let wants = crate::dispatch::Wants { credit: 1, ..Default::default() };
        group.workers.join(1, "wim".into(), wants, Box::new(|_| true));
        group.look_further(&store, NOW).expect("the store answers");

        let (thread, lease) = (Arc::from("t"), Uuid::from_bytes([7; 16]));
        group.choose(&thread, lease, NOW);
        group.workers.send(1).expect("it is there");
        group.given.insert(lease, Given { worker: 1, key: thread.clone(), lease_ms: 1_000, arrived: false });
        let (id, kind, holder, until) = (lease.into_bytes(), "x.job".into(), "wim".into(), NOW + 1_000);
        let leased = LeaseRow { id, seq: 1, after: 0, kind, attempt: 1, attempts: 5, holder, at: NOW, until };
        let put = |cursor, leases| {
            let mut rows = store.batch();
            let row = WorkRow { group_id: ID, cursor, leases, ..WorkRow::default() };
            rows.put_work(("acme", "t", "g"), &WorkRow::default(), &row, 0);
            store.commit(rows).expect("the store takes it");
        };
        put(0, vec![leased]);
        let arrived = group.look_at(&store, &thread, Why::Moved, NOW).expect("the store answers");
        assert!(arrived.len() == 1 && !group.workers.any_free());

        let mut rows = store.batch();
        match &changed {
            Some(changed) => rows.put_group("acme", "g", changed),
            None => rows.delete_group("acme", "g"),
        }
        store.commit(rows).expect("the store takes it");
        group.reload(&store).expect("the store answers");
        put(1, Vec::new());
        group.look_at(&store, &thread, Why::Moved, NOW).expect("the store answers");
        assert!(group.workers.any_free() && group.given.is_empty(), "{changed:?}");
        assert_eq!((group.heads.len(), group.bytes, group.next_due(NOW)), (0, 0, None));
    }
}

#[test]
fn what_a_commit_says_of_a_thread_is_held_as_if_the_store_had_been_asked() {
    for seed in 1..=50_u64 {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let store = Store::open(folder.path()).expect("it opens");
        let (mut told, mut asks, thread) = (group_of(&store, 4), group_of(&store, 4), Arc::<str>::from("t"));
        let (mut row, mut last, mut random) = (WorkRow { group_id: ID, ..WorkRow::default() }, 0, seed);
        // xorshift64
        let mut one_of = |many: u64| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random % many
        };
        for step in 1..=200 {
            let (mut rows, before) = (store.batch(), row.clone());
            let held = told.heads.get(&thread).map(|head| (head.seq, head.after, head.attempt));
            match (row.leases.pop(), held) {
                (Some(lease), _) if one_of(4) > 0 => {
                    (row.cursor, row.failed) = (lease.seq, Vec::new());
                    rows.delete_waiting("acme", "g", "t", lease.seq);
                }
                (Some(LeaseRow { seq, after, attempt: attempts, .. }), _) => {
                    row.failed = vec![FailedRow { seq, after, attempts, not_before: NOW, tries: Vec::new() }];
                }
                (None, Some((seq, after, attempt))) if one_of(3) > 0 => {
                    let id = Uuid::from_u128(step);
                    // Or it is another node's.
                    if one_of(4) > 0 {
                        told.choose(&thread, id, NOW);
                        asks.choose(&thread, id, NOW);
                    }
                    let (id, kind, holder) = (id.into_bytes(), "x.job".into(), "wim".into());
                    let until = NOW + one_of(1_000);
                    row.leases = vec![LeaseRow { id, seq, after, kind, attempt, attempts: 9, holder, at: NOW, until }];
                }
                (None, _) => {
                    last += 1;
                    let waits = WaitingRow { kind: "x.job".to_owned(), user: "ada".to_owned(), at: NOW, class: 1 };
                    rows.put_waiting("acme", "g", "t", last, &waits);
                }
            }
            let moved = row != before;
            if moved {
                rows.put_work(("acme", "t", "g"), &before, &row, 0);
            }
            store.commit(rows).expect("the store takes it");
            if moved {
                told.moved(&store, &thread, (&ID, row.simple()), NOW).expect("the store answers");
            } else if !told.is_full("t") {
                told.look_at(&store, &thread, Why::Came, NOW).expect("the store answers");
            }
            asks.look_at(&store, &thread, Why::Moved, NOW).expect("the store answers");
            let holds = |group: &Group| {
                let head = group.heads.get(&thread).map(|it| (it.seq, it.after, it.attempt, it.state, it.timer));
                (head, group.ready.len(), group.timers.clone())
            };
            assert_eq!(holds(&told), holds(&asks), "seed {seed}, step {step}");
        }
        assert!(row.cursor > 20, "seed {seed}");
        assert!(told.bytes() <= told.max_bytes);
    }
}
