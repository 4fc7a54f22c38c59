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
pub const READS_PER_TURN: usize = 128;

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
