//! What the session's loop does next: the order of reading, collecting and writing, and when it may sleep.
//!
//! A pure state machine. The session asks [`Turn::next`], does what it says and reports what came of it, until something
//! is there to be dealt with or the answer is [`Step::Sleep`].
//!
//! Invariants:
//! - it sleeps only when each source that the session wants something from was asked since the last change and had
//!   nothing, so that the source will wake the session. What is wanted is decided anew at each step, since each step may
//!   change it: writing makes room for answers, and with room commands are read again;
//! - at most [`READS_PER_TURN`] frames are read before something is written and the timer is looked at;
//! - commands are read before answers are collected, and answers are collected before anything is written: they overtake
//!   events.

/// Frames read before the writing side gets its turn.
const READS_PER_TURN: usize = 128;

/// What the session can use now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wants {
    /// Frames of the socket.
    pub frames: bool,
    /// Answers of the outbox.
    pub answers: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Read a frame of the socket.
    Read,
    /// Pass what was read on to the log.
    Submit,
    /// Look for answers in the outbox.
    Collect,
    /// Write until everything is written or the socket takes no more.
    Write,
    /// The turn is over: look at the timer and begin the next one.
    NextTurn,
    /// Have the outbox wake the session, unless there is something in it.
    Watch,
    /// Nothing can be read or written now.
    Sleep,
}

/// What came of writing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Written {
    /// The socket took everything.
    All,
    /// The socket takes no more now, and wakes the session when it does.
    Blocked,
}

#[derive(Debug, Default)]
pub struct Turn {
    /// Frames read since the last write.
    reads: usize,
    /// The socket has no frame, and wakes the session when one comes.
    read_all: bool,
    submitted: bool,
    /// The outbox has no answers.
    collected_all: bool,
    written: Option<Written>,
    /// The outbox wakes the session when something comes.
    watched: bool,
}

impl Turn {
    /// The session was woken, or has dealt with what was there: every source may have something again. `true` if the
    /// timer is to be looked at first, so that a flood of frames does not hold up what is due.
    pub fn begin(&mut self) -> bool {
        *self = Turn { reads: self.reads, ..Turn::default() };
        self.reads == 0
    }

    pub fn next(&mut self, wants: Wants) -> Step {
        let may_read = wants.frames && !self.read_all;
        if may_read && self.written.is_none() && self.reads < READS_PER_TURN {
            return Step::Read;
        }
        if !self.submitted {
            return Step::Submit;
        }
        if wants.answers && !self.collected_all {
            return Step::Collect;
        }
        if self.written.is_none() {
            return Step::Write;
        }

        // Everything is written that can be; by that, frames may be wanted that were not before.
        if may_read && self.reads > 0 {
            self.reads = 0;
            return Step::NextTurn;
        }
        if may_read {
            return Step::Read;
        }
        self.reads = 0;
        if wants.answers && !self.watched {
            return Step::Watch;
        }
        Step::Sleep
    }

    /// A frame was read, and is dealt with now.
    pub fn read_one(&mut self) {
        self.reads += 1;
    }

    /// There was no frame.
    pub fn read_all(&mut self) {
        self.read_all = true;
        self.reads = 0;
    }

    /// What was read is on its way to the log.
    pub fn submitted(&mut self) {
        self.submitted = true;
    }

    /// There were no answers.
    pub fn collected_all(&mut self) {
        self.collected_all = true;
    }

    pub fn wrote(&mut self, written: Written) {
        self.written = Some(written);
    }

    /// What came of the last write, in this turn.
    pub fn written(&self) -> Option<Written> {
        self.written
    }

    /// The outbox was empty.
    pub fn watched(&mut self) {
        self.watched = true;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;
    use crate::edge::ws::incoming::{CommandQueue, MAX_IN_FLIGHT};
    use crate::edge::ws::outgoing::MAX_ANSWERS;

    /// A command of the model: which kind decides whether it waits.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    enum Cmd {
        /// Goes to the log; answered once the log has answered.
        Publish,
        /// Waits for the publishes before it; answered at once.
        Ping,
    }

    /// What happens outside of the session.
    #[derive(Debug, Clone)]
    enum Happens {
        /// The peer sends frames, each with these commands.
        Sends { frames: usize, commands: Vec<(Cmd, usize)> },
        /// The peer reads so many frames.
        Reads(usize),
        /// The log answers so many publishes.
        Answers(usize),
        /// The hub has so many events.
        Events(usize),
    }

    fn happens() -> impl Strategy<Value = Happens> {
        let run = (prop_oneof![Just(Cmd::Publish), Just(Cmd::Ping)], prop_oneof![1..5usize, 90..340usize]);
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
        events: usize,
        outbox_waker: bool,
        /// Publishes of which the log has not said anything.
        at_log: usize,
        /// Publishes not passed on to the log yet.
        batch: usize,
        // The session.
        turn: Turn,
        queue: CommandQueue<Cmd>,
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
                    n > 0 && std::mem::take(&mut self.outbox_waker)
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
                    Step::Collect if self.outbox_answers > 0 => {
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
                        if self.outbox_answers > 0 || items {
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
                    if self.queue.is_clear() && self.execute(*command) {
                        continue;
                    }
                    self.queue.push(*command);
                }
            }
        }

        fn execute(&mut self, command: Cmd) -> bool {
            match command {
                Cmd::Publish => {
                    self.queue.publish_begins();
                    self.batch += 1;
                }
                Cmd::Ping if self.queue.in_flight() > 0 => return false,
                Cmd::Ping => self.answers += 1,
            }
            true
        }

        fn on_answers(&mut self) {
            while self.answers < MAX_ANSWERS && self.outbox_answers > 0 {
                self.outbox_answers -= 1;
                self.queue.publish_ends();
                self.answers += 1;
            }
            while let Some(command) = self.queue.pop() {
                if !self.execute(command) {
                    self.queue.put_back(command);
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
            assert!(
                !wants.answers || self.outbox_answers == 0,
                "answers wait in the outbox and there is room for them"
            );
            let waits = self.buffered + self.answers + self.events;
            assert!(self.writable == 0 || waits == 0, "the socket takes more, and {waits} frames wait");
            assert_eq!(self.batch, 0, "publishes are not passed on to the log");
            match self.queue.front() {
                Some(Cmd::Publish) => assert!(self.queue.in_flight() >= MAX_IN_FLIGHT, "a publish waits for nothing"),
                Some(Cmd::Ping) => assert!(self.queue.in_flight() > 0, "a command waits for nothing"),
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
}
