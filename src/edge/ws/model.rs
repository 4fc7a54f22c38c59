//! A model of a session's loop: the real [`Turn`] and [`CommandQueue`] with a socket, an outbox and a log that are counters.
//!
//! Whatever the peer, the log and the hub do, and in whatever order: when the session sleeps, nothing is left that it could
//! read or write, and every command is answered in the end. No timer helps.

use std::collections::VecDeque;

use proptest::prelude::*;

use super::incoming::{CommandQueue, MAX_IN_FLIGHT, WaitsFor};
use super::outgoing::MAX_ANSWERS;
use super::turn::{READS_PER_TURN, Step, Turn, Wants, Written};

/// A command of the model: which kind decides whether it waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cmd {
    /// Goes to the log; answered once the log has answered.
    Publish,
    /// Waits for nothing; answered at once.
    Ping,
    /// Waits for commands that wait; answered at once.
    Signal,
    /// Waits for the publishes before it and then for the store, and everything but pings waits for it.
    Subscribe,
}

impl Cmd {
    fn waits_for(self) -> WaitsFor {
        match self {
            Cmd::Ping => WaitsFor::Nothing,
            Cmd::Publish | Cmd::Signal => WaitsFor::Commands,
            Cmd::Subscribe => WaitsFor::Answers,
        }
    }
}

const COMMAND_BYTES: usize = 100;

/// What happens outside of the session.
#[derive(Debug, Clone)]
enum Happens {
    /// The peer sends frames, each with these commands.
    Sends { frames: usize, commands: Vec<(Cmd, usize)> },
    /// The peer reads so many frames.
    Reads(usize),
    /// The log answers so many publishes, and the store a `subscribe`.
    Answers(usize),
    /// The hub has so many events.
    Events(usize),
}

fn happens() -> impl Strategy<Value = Happens> {
    let command = prop_oneof![Just(Cmd::Publish), Just(Cmd::Ping), Just(Cmd::Signal), Just(Cmd::Subscribe)];
    let run = (command, prop_oneof![1..5usize, 90..340usize]);
    let commands = proptest::collection::vec(run, 1..4);
    let frames = prop_oneof![4 => 1..6usize, 1 => 100..300usize];
    let some = || prop_oneof![1..10usize, 500..3_000usize, Just(20_000)];
    prop_oneof![
        (frames, commands).prop_map(|(frames, commands)| Happens::Sends { frames, commands }),
        some().prop_map(Happens::Reads),
        some().prop_map(Happens::Answers),
        some().prop_map(Happens::Events),
    ]
}

/// A session in a world of counters: its queue and its turns are the real ones; socket, log, outbox and wakers are not.
#[derive(Default)]
struct World {
    // The socket and who is woken by it.
    inbound: VecDeque<Vec<(Cmd, usize)>>,
    writable: usize,
    read_waker: bool,
    write_waker: bool,
    // The outbox and who is woken by it.
    outbox_answers: usize,
    outbox_subscribed: bool,
    events: usize,
    outbox_waker: bool,
    /// Publishes of which the log has not said anything.
    at_log: usize,
    /// A `subscribe` that the store has not answered.
    at_store: bool,
    /// Publishes not passed on to the log yet.
    batch: usize,
    // The session.
    turn: Turn,
    queue: CommandQueue<Cmd>,
    subscribing: bool,
    answers: usize,
    /// Written, and not taken by the socket.
    buffered: usize,
    // What the model counts.
    sent: usize,
    answered: usize,
    reads_since_timer: usize,
}

impl World {
    fn wants(&self) -> Wants {
        let room = self.answers < MAX_ANSWERS;
        Wants { frames: room && self.queue.may_read(), answers: room }
    }

    /// The outside goes on, and wakes the session if it is to be woken by that.
    fn happens(&mut self, what: &Happens) {
        let woken = match what {
            Happens::Sends { frames, commands } => {
                self.sent += frames * commands.iter().map(|(_, n)| n).sum::<usize>();
                self.inbound.extend(std::iter::repeat_n(commands.clone(), *frames));
                std::mem::take(&mut self.read_waker)
            }
            Happens::Reads(n) => {
                self.writable += n;
                std::mem::take(&mut self.write_waker)
            }
            Happens::Answers(n) => {
                let n = self.at_log.min(*n);
                self.at_log -= n;
                self.outbox_answers += n;
                let subscribed = std::mem::take(&mut self.at_store);
                self.outbox_subscribed |= subscribed;
                (n > 0 || subscribed) && std::mem::take(&mut self.outbox_waker)
            }
            Happens::Events(n) => {
                self.events += n;
                std::mem::take(&mut self.outbox_waker)
            }
        };
        if woken {
            while !self.poll() {}
        }
    }

    /// One poll of the session's loop; `true` if it sleeps.
    fn poll(&mut self) -> bool {
        if self.turn.begin() {
            self.reads_since_timer = 0;
        }
        loop {
            match self.turn.next(self.wants()) {
                Step::Read => match self.inbound.pop_front() {
                    Some(frame) => {
                        self.turn.read_one();
                        self.on_frame(&frame);
                        return false;
                    }
                    None => {
                        self.read_waker = true;
                        self.turn.read_all();
                    }
                },
                Step::Submit => {
                    self.at_log += std::mem::take(&mut self.batch);
                    self.turn.submitted();
                }
                Step::Collect if self.outbox_has_answers() => {
                    self.on_answers();
                    return false;
                }
                Step::Collect => self.turn.collected_all(),
                Step::Write => {
                    let written = self.write();
                    self.turn.wrote(written);
                }
                Step::NextTurn => return false,
                Step::Watch => {
                    let items = self.turn.written() == Some(Written::All) && self.events > 0;
                    if self.outbox_has_answers() || items {
                        return false;
                    }
                    self.outbox_waker = true;
                    self.turn.watched();
                }
                Step::Sleep => return true,
            }
        }
    }

    fn on_frame(&mut self, frame: &[(Cmd, usize)]) {
        self.reads_since_timer += 1;
        assert!(self.reads_since_timer <= READS_PER_TURN, "the timer is not looked at");
        for (command, n) in frame {
            for _ in 0..*n {
                if !self.queue.may_pass(command.waits_for()) || !self.execute(*command) {
                    self.queue.push(*command, COMMAND_BYTES);
                }
            }
        }
    }

    fn outbox_has_answers(&self) -> bool {
        self.outbox_answers > 0 || self.outbox_subscribed
    }

    fn execute(&mut self, command: Cmd) -> bool {
        let waits_for = command.waits_for();
        if waits_for != WaitsFor::Nothing && (self.subscribing || self.queue.holds(waits_for)) {
            return false;
        }
        match command {
            Cmd::Publish => {
                self.queue.publish_begins();
                self.batch += 1;
            }
            Cmd::Ping | Cmd::Signal => self.answers += 1,
            Cmd::Subscribe => (self.subscribing, self.at_store) = (true, true),
        }
        true
    }

    fn on_answers(&mut self) {
        while self.answers < MAX_ANSWERS && self.outbox_answers > 0 {
            self.outbox_answers -= 1;
            self.queue.publish_ends();
            self.answers += 1;
        }
        if self.answers < MAX_ANSWERS && std::mem::take(&mut self.outbox_subscribed) {
            self.subscribing = false;
            self.answers += 1;
        }
        while let Some((command, bytes)) = self.queue.pop() {
            if !self.execute(command) {
                self.queue.put_back(command, bytes);
                break;
            }
        }
    }

    fn write(&mut self) -> Written {
        loop {
            let taken = self.buffered.min(self.writable);
            self.buffered -= taken;
            self.writable -= taken;
            if self.buffered > 0 {
                self.write_waker = true;
                return Written::Blocked;
            }
            if self.answers > 0 {
                self.answers -= 1;
                self.answered += 1;
            } else if self.events > 0 {
                self.events -= 1;
            } else {
                return Written::All;
            }
            self.buffered += 1;
        }
    }

    /// The session sleeps: there must be nothing that it could do.
    fn check_asleep(&self) {
        let wants = self.wants();
        assert!(!wants.frames || self.inbound.is_empty(), "frames wait and are wanted");
        assert!(!wants.answers || !self.outbox_has_answers(), "answers wait in the outbox and there is room for them");
        let waits = self.buffered + self.answers + self.events;
        assert!(self.writable == 0 || waits == 0, "the socket takes more, and {waits} frames wait");
        assert_eq!(self.batch, 0, "publishes are not passed on to the log");
        match self.queue.front() {
            Some(Cmd::Publish | Cmd::Signal) => {
                assert!(self.subscribing || self.queue.in_flight() >= MAX_IN_FLIGHT, "a command waits for nothing");
            }
            Some(Cmd::Subscribe) => assert!(self.subscribing || self.queue.in_flight() > 0, "it waits for nothing"),
            Some(Cmd::Ping) => panic!("a ping waits"),
            None => {}
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whoever_sleeps_has_nothing_left_to_read_or_to_write(schedule in proptest::collection::vec(happens(), 1..40)) {
        let mut world = World::default();
        while !world.poll() {}
        for what in &schedule {
            world.happens(what);
            world.check_asleep();
        }
        // Once peer and log have done their part, every command is answered.
        for _ in 0..world.sent {
            if world.answered == world.sent {
                break;
            }
            world.happens(&Happens::Reads(1 << 20));
            world.happens(&Happens::Answers(1 << 20));
            world.check_asleep();
        }
        prop_assert_eq!((world.answered, world.inbound.len()), (world.sent, 0));
    }
}

#[test]
fn commands_are_read_again_once_writing_has_made_room() {
    let mut world = World { writable: 1 << 20, ..World::default() };
    while !world.poll() {}
    world.happens(&Happens::Sends { frames: 40, commands: vec![(Cmd::Ping, 100)] });
    world.check_asleep();
    assert_eq!(world.answered, 4_000);
    world.happens(&Happens::Sends { frames: 5, commands: vec![(Cmd::Ping, 1_000)] });
    assert_eq!(world.answered, 9_000);
}

#[test]
fn a_flood_of_frames_does_not_keep_the_session_from_writing() {
    let mut world = World { writable: 1 << 20, ..World::default() };
    world.inbound.extend(std::iter::repeat_n(vec![(Cmd::Ping, 1)], 1_000));
    let mut polls = 0;
    while world.answered == 0 {
        assert!(!world.poll());
        polls += 1;
    }
    assert_eq!(polls, READS_PER_TURN + 1);
}

#[test]
fn a_ping_is_answered_while_publishes_and_a_subscribe_wait_for_the_log() {
    let mut world = World { writable: 1 << 20, ..World::default() };
    while !world.poll() {}
    let send = |commands| Happens::Sends { frames: 1, commands };
    world.happens(&send(vec![
        (Cmd::Publish, 1),
        (Cmd::Signal, 1),
        (Cmd::Subscribe, 1),
        (Cmd::Signal, 1),
        (Cmd::Ping, 1),
    ]));
    assert_eq!(world.answered, 2, "the signal before the subscribe, and the ping");
    world.happens(&send(vec![(Cmd::Ping, 3)]));
    assert_eq!(world.answered, 5, "the socket is read on");
    world.happens(&Happens::Answers(1));
    assert_eq!((world.answered, world.queue.front()), (6, Some(&Cmd::Signal)), "the store has yet to answer");
    world.happens(&Happens::Answers(0));
    assert_eq!((world.answered, world.queue.front()), (8, None));
}
