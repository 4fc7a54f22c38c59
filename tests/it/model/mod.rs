//! Random sessions against one server, checked frame by frame against a model that knows the contract and nothing else.
//!
//! Steps are done one after the other, each with its answer: so the model knows every event and its seq, who is a member,
//! and what each session has asked for. What reaches the sessions meanwhile is read whenever one of them is looked at, and
//! checked then: whether it may come at all, and whether it is what comes next. In the end every session must have all that
//! it is to get.

mod acts;
mod world;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use proptest::prelude::*;
use proptest::test_runner::{Config, RngSeed, TestRunner};
use serde_json::json;

use self::world::World;
use crate::support::{LogKind, Server};

const USERS: [&str; 4] = ["ada", "ben", "cid", "dan"];
/// The threads' members at first.
const THREADS: [(&str, &[&str]); 3] = [("t0", &USERS), ("t1", &["ada", "ben"]), ("t2", &["ada", "cid"])];
/// What a client may call a thread.
const CALLED: [&str; 6] = ["t0", "t1", "t2", "@me", "@user:ben", "*"];
/// Sessions that may be open: the first users have two each.
const DEVICES: usize = 6;
const KINDS: [&str; 3] = ["x.a", "x.b", "x.c"];
/// The kind of the last event of each thread, which everybody wants.
const END: &str = "x.end";
const PRIORITIES: [Option<&str>; 4] = [None, Some("high"), Some("normal"), Some("low")];
/// Ten of these are more than an outbox holds.
const LARGE: usize = 30_000;
/// What only a hang exceeds. Less than the others' patience, since a failure is tried again and again to make it smaller.
const SOON: Duration = Duration::from_secs(25);

#[derive(Debug, Clone)]
enum Step {
    Publish {
        device: usize,
        to: usize,
        kind: usize,
        priority: usize,
        key: Option<u8>,
    },
    Burst {
        device: usize,
        to: usize,
        priority: usize,
        count: usize,
        large: bool,
    },
    Subscribe {
        device: usize,
        to: usize,
        begin: Begin,
        kinds: Option<usize>,
        name: Option<u8>,
        confirm: bool,
    },
    Ack {
        device: usize,
        which: usize,
        percent: u64,
    },
    Unsubscribe {
        device: usize,
        to: usize,
    },
    Drop {
        device: usize,
    },
    Resume {
        device: usize,
    },
    Member {
        user: usize,
        thread: usize,
        add: bool,
    },
    Credit {
        device: usize,
        events: u64,
    },
    /// Reads nothing for so many steps.
    Sleep {
        device: usize,
        steps: usize,
    },
    Signal {
        device: usize,
        to: usize,
    },
    /// Waits for the `position` of what its kinds leave out.
    Await {
        device: usize,
    },
}

#[derive(Debug, Clone)]
enum Begin {
    Default,
    /// After this percentage of the thread; more than 100 is beyond its head.
    After(u64),
    Last(u64),
}

fn step() -> impl Strategy<Value = Step> {
    let device = || 0..DEVICES;
    let begin = prop_oneof![
        3 => Just(Begin::Default),
        3 => (0..=105u64).prop_map(Begin::After),
        1 => (0..8u64).prop_map(Begin::Last),
    ];
    let optional = |share: f64, below: u8| proptest::option::weighted(share, 0..below);
    let kinds = proptest::option::weighted(0.4, 0..KINDS.len());
    let share = proptest::bool::weighted;
    prop_oneof![
        12 => (device(), 0..5usize, 0..3usize, 0..4usize, optional(0.2, 3))
            .prop_map(|(device, to, kind, priority, key)| Step::Publish { device, to, kind, priority, key }),
        8 => (device(), 0..5usize, 0..4usize, 2..12usize, share(0.4))
            .prop_map(|(device, to, priority, count, large)| Step::Burst { device, to, priority, count, large }),
        14 => (device(), 0..CALLED.len(), begin, kinds, optional(0.4, 2), share(0.4)).prop_map(
            |(device, to, begin, kinds, name, confirm)| Step::Subscribe { device, to, begin, kinds, name, confirm }
        ),
        6 => (device(), 0..4usize, 1..=100u64).prop_map(|(device, which, percent)| Step::Ack { device, which, percent }),
        2 => (device(), 0..CALLED.len()).prop_map(|(device, to)| Step::Unsubscribe { device, to }),
        4 => device().prop_map(|device| Step::Drop { device }),
        9 => device().prop_map(|device| Step::Resume { device }),
        6 => (0..USERS.len(), 0..THREADS.len(), share(0.65))
            .prop_map(|(user, thread, add)| Step::Member { user, thread, add }),
        5 => (device(), 1..12u64).prop_map(|(device, events)| Step::Credit { device, events }),
        2 => (device(), 5..25usize).prop_map(|(device, steps)| Step::Sleep { device, steps }),
        3 => (device(), 0..5usize).prop_map(|(device, to)| Step::Signal { device, to }),
        2 => device().prop_map(|device| Step::Await { device }),
    ]
}

/// A tenant of its own for each run, with its threads and everybody connected.
async fn run(server: &Server, tenant: String, steps: &[Step]) {
    let mut world = World::new(server, tenant);
    let root = world.token("root", "admin");
    for (thread, members) in THREADS {
        let (path, body) = (format!("/v1/threads/{thread}"), json!({"members": members}));
        assert_eq!(server.http_with("PUT", &path, &root, Some(body.clone()), &[]).await.0, 201);
        let created =
            world.append(thread, "thread_created", json!({"kind": "thread_created", "from": "root", "data": body}));
        for user in members {
            world.set_member(user, thread, true, created);
        }
    }
    for device in 0..DEVICES {
        world.resume(device).await;
        // A beginning, so that from the first step on somebody listens.
        let (to, begin) = (if device % 2 == 0 { CALLED.len() - 1 } else { 0 }, Begin::Default);
        world.step(&Step::Subscribe { device, to, begin, kinds: None, name: None, confirm: false }).await;
    }
    for step in steps {
        world.step(step).await;
    }
    world.end().await;
}

mod random_sessions_get_what_the_model_says_and_nothing_else {
    use super::*;

    #[test]
    fn embedded() {
        check(LogKind::embedded(), 24);
    }

    /// Fewer, since each answer of Kafka takes longer.
    #[test]
    fn kafka() {
        check(LogKind::kafka(), 6);
    }
}

/// Runs so many random cases, or as many as `PROPTEST_CASES` says, against one server.
fn check(log: LogKind, cases: u32) {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let server = Server::start_unlimited(log);
    let defaults = Config::default();
    let seed = match defaults.rng_seed {
        RngSeed::Fixed(seed) => seed,
        RngSeed::Random => weft::clock::now_ms(),
    };
    let config = Config {
        cases: if std::env::var_os("PROPTEST_CASES").is_some() { defaults.cases } else { cases },
        rng_seed: RngSeed::Fixed(seed),
        failure_persistence: None,
        max_shrink_time: 180_000,
        ..defaults
    };
    let runs = AtomicUsize::new(0);
    let steps = proptest::collection::vec(step(), 60..=120);
    let result = TestRunner::new(config).run(&steps, |steps| {
        let tenant = format!("run-{}", runs.fetch_add(1, Ordering::Relaxed));
        runtime.block_on(run(&server, tenant, &steps));
        Ok(())
    });
    if let Err(failure) = result {
        panic!("PROPTEST_RNG_SEED={seed} does it again\n{failure}");
    }
}
