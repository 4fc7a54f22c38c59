//! The hub without its tasks: each test takes commits in and hands out as much as it wants, so that it knows how far the
//! fan-out is.

use super::*;
use crate::clock;
use crate::delivery::registry::ConnectionLimits;
use crate::projector::{CommittedEvent, Published};
use proptest::prelude::*;
use proptest::test_runner::TestCaseError;

fn hub() -> Hub {
    Hub::new(Arc::new(Registry::new(ConnectionLimits { user: 10, agent: 10 })))
}

fn event(seq: u64, bytes: usize) -> Arc<CommittedEvent> {
    let frame = "x".repeat(bytes).into();
    Arc::new(CommittedEvent { seq, kind: "x.y".into(), priority: None, frame, closes: None, run: None })
}

fn update(key: &Arc<str>, event: &Arc<CommittedEvent>, change: Option<AccessChange>) -> ThreadUpdate {
    ThreadUpdate { key: key.clone(), update: Update::Event(event.clone(), change) }
}

fn commit(updates: Vec<ThreadUpdate>) -> Commit {
    Commit { events: updates, ..Commit::default() }
}

/// Some readers of a thread, each of them a user of its own.
fn readers(hub: &Hub, key: &Arc<str>, count: usize) -> Vec<Arc<Outbox>> {
    let outboxes: Vec<Arc<Outbox>> = (0..count).map(|_| Arc::default()).collect();
    for (number, outbox) in outboxes.iter().enumerate() {
        hub.attach(key, outbox, 0, &format!("user-{number}").into(), false, true);
    }
    outboxes
}

fn hand_out_all(hub: &Hub) {
    while hub.hand_out(Effort::new(EFFORT.0, EFFORT.1)) {}
}

/// The seqs that wait in an outbox, and whether its reader lags after them.
fn seqs(outbox: &Outbox) -> (Vec<u64>, bool) {
    let (mut seqs, mut lagged) = (Vec::new(), false);
    while let Some(item) = outbox.pop_item(true) {
        match item {
            Item::Event { event, .. } => seqs.push(event.seq),
            Item::Lagged { .. } => lagged = true,
            _ => {}
        }
    }
    (seqs, lagged)
}

fn have(outboxes: &[Arc<Outbox>]) -> usize {
    outboxes.iter().filter(|outbox| outbox.event_bytes() > 0).count()
}

#[test]
fn a_publish_is_answered_and_delivered_while_a_crowd_s_fan_out_is_under_way() {
    let (hub, pending) = (hub(), Pending::default());
    let (crowded, beside): (Arc<str>, Arc<str>) = ("acme/crowded".into(), "other/beside".into());
    let crowd = readers(&hub, &crowded, 10_000);
    let bystander = readers(&hub, &beside, 1);
    hub.take_in(commit((1..=50).map(|seq| update(&crowded, &event(seq, 300), None)).collect()), &pending);
    assert!(hub.hand_out(Effort::new(EFFORT.0, EFFORT.1)), "there is more to hand out");
    let reached = have(&crowd);
    assert!(0 < reached && reached <= EFFORT.0, "a turn is over after {reached} readers");

    let answered = Arc::new(AtomicBool::new(false));
    let (id, on_verdict) = (clock::random_id(), answered.clone());
    pending.insert(id, Box::new(move |_| on_verdict.store(true, Ordering::Relaxed)), true);
    let verdicts = vec![(id, Ok(Published { seq: 1, event: id, duplicate: false }))];
    hub.take_in(
        Commit { events: vec![update(&beside, &event(1, 300), None)], verdicts, ..Commit::default() },
        &pending,
    );
    assert!(answered.load(Ordering::Relaxed), "answered before the crowd has its events");
    assert_eq!(have(&crowd), reached);

    hub.hand_out(Effort::new(EFFORT.0, EFFORT.1));
    hub.hand_out(Effort::new(EFFORT.0, EFFORT.1));
    assert_eq!(seqs(&bystander[0]), (vec![1], false), "its turn came after one of the crowd's");
    assert!(have(&crowd) <= 3 * EFFORT.0);

    hand_out_all(&hub);
    let all: Vec<u64> = (1..=50).collect();
    assert!(crowd.iter().all(|outbox| seqs(outbox) == (all.clone(), false)));
    assert_eq!(hub.waiting.load(Ordering::Relaxed), 0);
}

/// Publishes commits of different sizes, as a thread of the projector does; gives the last seq.
fn project(key: &Arc<str>, pending: &Pending, publish: &PublishCommit, answers: &Arc<Mutex<Vec<u64>>>) -> u64 {
    // It takes in those of 1 itself; those of more go through the task.
    let sizes = [1, 1, SMALL_COMMIT + 1, 1, 2 * SMALL_COMMIT, 1, 1];
    let mut seq = 0;
    for round in 0..50 {
        for size in sizes {
            let (events, verdicts) = (0..size)
                .map(|_| {
                    seq += 1;
                    let (id, answered, number) = (clock::random_id(), answers.clone(), seq);
                    pending.insert(id, Box::new(move |_| lock(&answered).push(number)), true);
                    let verdict = (id, Ok(Published { seq, event: id, duplicate: false }));
                    (update(key, &event(seq, 10), None), verdict)
                })
                .unzip();
            assert!(publish(Commit { events, verdicts, ..Commit::default() }), "round {round}");
        }
    }
    seq
}

#[tokio::test(flavor = "multi_thread")]
async fn commits_of_every_thread_of_the_projector_reach_readers_and_publishers_in_its_order_small_or_large() {
    for threads in [1, 4] {
        let pending = Arc::new(Pending::default());
        let registry = Arc::new(Registry::new(ConnectionLimits { user: 10, agent: 10 }));
        let (hub, publish, task) = Hub::start(pending.clone(), registry);
        let publish = Arc::new(publish);
        let projecting = (0..threads).map(|number| {
            let key = Arc::<str>::from(format!("acme/t{number}"));
            let (reader, answers) = (readers(&hub, &key, 1).remove(0), Arc::<Mutex<Vec<u64>>>::default());
            let (pending, publish, answered) = (pending.clone(), publish.clone(), answers.clone());
            let thread = std::thread::spawn(move || project(&key, &pending, &publish, &answered));
            (thread, reader, answers)
        });
        let projecting: Vec<_> = projecting.collect();
        drop(publish);
        // It ends once nobody can publish any more, and all is handed out.
        task.await.unwrap();
        for (thread, reader, answers) in projecting {
            let last = thread.join().unwrap();
            assert_eq!(seqs(&reader), ((1..=last).collect(), false));
            assert_eq!(*lock(&answers), (1..=last).collect::<Vec<_>>());
        }
    }
}

#[test]
fn whoever_is_removed_gets_nothing_more_once_the_remover_is_answered() {
    let (hub, pending) = (hub(), Pending::default());
    let key: Arc<str> = "acme/t".into();
    let all = readers(&hub, &key, 3);
    let removal = update(&key, &event(2, 10), Some(AccessChange::Left("user-1".into())));
    hub.take_in(commit(vec![update(&key, &event(1, 10), None), removal, update(&key, &event(3, 10), None)]), &pending);
    // What is before the removal, and waits, need not reach a subscription that has ended.
    hand_out_all(&hub);
    assert_eq!(seqs(&all[1]), (vec![], false));
    assert_eq!((seqs(&all[0]), seqs(&all[2])), ((vec![1, 2, 3], false), (vec![1, 2, 3], false)));
    assert!(hub.shard(&key).lanes.contains_key(&key));
}

#[test]
fn a_thread_in_which_too_much_waits_is_cut_and_no_other_notices() {
    let (hub, pending) = (hub(), Pending::default());
    let (crowded, beside): (Arc<str>, Arc<str>) = ("acme/crowded".into(), "other/beside".into());
    let (crowd, bystander) = (readers(&hub, &crowded, 3), readers(&hub, &beside, 1));
    hub.take_in(commit(vec![update(&beside, &event(1, 100), None)]), &pending);
    for seq in 1..=1_000 {
        hub.take_in(commit(vec![update(&crowded, &event(seq, 60_000), None)]), &pending);
        assert!(hub.waiting.load(Ordering::Relaxed) < WAITING_BYTES, "there is always room for others");
    }
    hand_out_all(&hub);
    assert_eq!(seqs(&bystander[0]), (vec![1], false));
    assert!(crowd.iter().all(|outbox| seqs(outbox).1), "they read it from the store");
    assert_eq!(hub.waiting.load(Ordering::Relaxed), 0);
    assert!(!hub.shard(&crowded).lanes.contains_key(&crowded), "all were forgotten");
}

#[test]
fn a_signal_goes_to_all_but_its_sender_and_those_it_is_about() {
    let hub = hub();
    let key: Arc<str> = "acme/t".into();
    let all = readers(&hub, &key, 3);
    hub.signal(&key, &all[0], "{}".into());
    hand_out_all(&hub);
    assert_eq!(all.iter().map(|it| it.pop_item(true).is_some()).collect::<Vec<_>>(), [false, true, true]);
    hub.arrive(&key, &"user-1".into());
    hand_out_all(&hub);
    assert_eq!(all.iter().map(|it| it.pop_item(true).is_some()).collect::<Vec<_>>(), [true, false, true]);
}

#[test]
fn many_who_leave_leave_no_room_behind_and_all_others_keep_their_place() {
    let (hub, pending) = (hub(), Pending::default());
    let key: Arc<str> = "acme/t".into();
    let all = readers(&hub, &key, 1_000);
    hub.take_in(commit(vec![update(&key, &event(1, 10), None)]), &pending);
    hub.hand_out(Effort::new(500, 10_000));
    for (number, outbox) in all.iter().enumerate().filter(|(number, _)| number % 10 > 0) {
        hub.detach(&key, outbox, 0);
        assert!(number < 1_000);
    }
    hub.take_in(commit(vec![update(&key, &event(2, 10), None)]), &pending);
    hand_out_all(&hub);
    assert!(all.iter().step_by(10).all(|outbox| seqs(outbox) == (vec![1, 2], false)));
    for outbox in all.iter().step_by(10) {
        hub.detach(&key, outbox, 0);
    }
    assert!(!hub.shard(&key).lanes.contains_key(&key));
}

const THREADS: usize = 2;
const SESSIONS: usize = 5;

#[derive(Debug, Clone)]
enum Act {
    Commit { thread: usize, bytes: usize },
    Remove { thread: usize, session: usize },
    Attach { thread: usize, session: usize },
    Detach { thread: usize, session: usize },
    Read { session: usize },
    HandOut { readers: usize },
}

fn act() -> impl Strategy<Value = Act> {
    let (thread, session) = (0..THREADS, 0..SESSIONS);
    let both = (thread.clone(), session.clone());
    prop_oneof![
        6 => (thread, prop_oneof![9 => Just(100), 1 => Just(60_000), 1 => Just(200_000)])
            .prop_map(|(thread, bytes)| Act::Commit { thread, bytes }),
        1 => both.clone().prop_map(|(thread, session)| Act::Remove { thread, session }),
        4 => both.clone().prop_map(|(thread, session)| Act::Attach { thread, session }),
        2 => both.prop_map(|(thread, session)| Act::Detach { thread, session }),
        2 => session.prop_map(|session| Act::Read { session }),
        8 => (1..4usize).prop_map(|readers| Act::HandOut { readers }),
    ]
}

/// What a session knows of its subscription to one thread.
#[derive(Default, Clone)]
struct Known {
    attached: bool,
    /// Everything up to here it has, or it was in the store when it attached.
    cursor: u64,
    /// It was removed with this event, and did not attach since.
    removed_at: Option<u64>,
}

struct World {
    hub: Hub,
    pending: Pending,
    keys: [Arc<str>; THREADS],
    heads: [u64; THREADS],
    outboxes: [Arc<Outbox>; SESSIONS],
    known: [[Known; THREADS]; SESSIONS],
}

impl World {
    fn new() -> World {
        World {
            hub: hub(),
            pending: Pending::default(),
            keys: std::array::from_fn(|thread| format!("acme/{thread}").into()),
            heads: [0; THREADS],
            outboxes: Default::default(),
            known: Default::default(),
        }
    }

    fn commit(&mut self, thread: usize, bytes: usize, change: Option<AccessChange>) {
        self.heads[thread] += 1;
        let event = event(self.heads[thread], bytes);
        self.hub.take_in(commit(vec![update(&self.keys[thread], &event, change)]), &self.pending);
    }

    fn act(&mut self, act: &Act) -> Result<(), TestCaseError> {
        match *act {
            Act::Commit { thread, bytes } => self.commit(thread, bytes, None),
            Act::Remove { thread, session } => {
                self.commit(thread, 100, Some(AccessChange::Left(format!("user-{session}"))));
                self.known[session][thread].attached = false;
                self.known[session][thread].removed_at = Some(self.heads[thread]);
            }
            Act::Attach { thread, session } => {
                let known = &mut self.known[session][thread];
                if !known.attached {
                    let (outbox, user) = (&self.outboxes[session], format!("user-{session}").into());
                    self.hub.attach(&self.keys[thread], outbox, thread as SubId, &user, false, true);
                    *known = Known { attached: true, cursor: self.heads[thread], removed_at: None };
                }
            }
            Act::Detach { thread, session } => {
                self.hub.detach(&self.keys[thread], &self.outboxes[session], thread as SubId);
                self.known[session][thread].attached = false;
            }
            Act::Read { session } => self.read(session)?,
            Act::HandOut { readers } => drop(self.hub.hand_out(Effort::new(readers, 1_000))),
        }
        Ok(())
    }

    /// As a session reads its outbox: what it has is dropped by its seq, and after that nothing may be missing.
    fn read(&mut self, session: usize) -> Result<(), TestCaseError> {
        while let Some(item) = self.outboxes[session].pop_item(true) {
            match item {
                Item::Event { sub, event } => {
                    let known = &mut self.known[session][sub as usize];
                    prop_assert!(known.removed_at.is_none_or(|removed_at| event.seq < removed_at));
                    if known.attached && event.seq > known.cursor {
                        prop_assert_eq!(event.seq, known.cursor + 1);
                        known.cursor = event.seq;
                    }
                }
                Item::Lagged { sub } => {
                    let thread = sub as usize;
                    self.hub.detach(&self.keys[thread], &self.outboxes[session], sub);
                    self.known[session][thread].attached = false;
                }
                _ => {}
            }
        }
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    /// Every change is made under the lock of its thread, so that acts in a row, with the fan-out cut into the smallest
    /// pieces, are what threads of the machine can do to each other.
    #[test]
    fn whoever_comes_and_goes_gets_each_event_after_the_head_it_saw_in_order_and_without_a_hole(
        acts in prop::collection::vec(act(), 1..120),
    ) {
        let mut world = World::new();
        for act in &acts {
            world.act(act)?;
        }
        hand_out_all(&world.hub);
        for session in 0..SESSIONS {
            world.read(session)?;
            for thread in 0..THREADS {
                let known = &world.known[session][thread];
                prop_assert!(!known.attached || known.cursor == world.heads[thread]);
            }
        }
        prop_assert_eq!(world.hub.waiting.load(Ordering::Relaxed), 0);
    }
}
