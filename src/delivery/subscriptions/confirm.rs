//! Deliveries that must be acknowledged: which events are out, since when, and how often they were tried. Pure; time comes
//! in.
//!
//! Delivery goes in rounds. A round begins with the oldest event that is not acknowledged and goes on in order from there.
//! When that one is not acknowledged in time, the next round begins. Attempts are counted for the oldest event alone, since
//! it is the one that holds up the others: once it is acknowledged or given up, the count begins anew for the next one.
//!
//! An attempt counts if a client was there to take it. One that nobody took, since the network was gone, does not, nor does
//! one whose time the server itself has cut short.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

use crate::store::ReceiptRow;

/// Events that may be out and not acknowledged.
pub const WINDOW: usize = 256;
/// The longest pause before the second attempt; doubled before each one after it, four times.
const BACKOFF: Duration = Duration::from_millis(500);
const DOUBLINGS: u32 = 4;

/// The longest pause after so many attempts.
pub(super) fn longest_pause(attempts: u32) -> Duration {
    BACKOFF * 2u32.pow((attempts.max(1) - 1).min(DOUBLINGS))
}

/// How long a client has, and how often an event is sent to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConfirmPolicy {
    /// Time for the oldest event's acknowledgement, from when it was sent or became the oldest.
    pub ack_within: Duration,
    /// Attempts after which the oldest event is given up.
    pub attempts: u32,
}

impl Default for ConfirmPolicy {
    fn default() -> ConfirmPolicy {
        ConfirmPolicy { ack_within: Duration::from_secs(10), attempts: 5 }
    }
}

/// What a session knows of its client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Presence {
    /// When the last frame came from it.
    pub heard: Instant,
    /// Bytes that it has taken since the session began.
    pub taken: u64,
}

impl Presence {
    /// Whether the client was there after something was sent: it is heard since, or has taken bytes of it.
    pub(super) fn is_after(self, sent: Presence) -> bool {
        self.heard > sent.heard || self.taken > sent.taken
    }
}

#[derive(Debug, Default)]
pub struct Confirm {
    policy: ConfirmPolicy,
    /// The round begins after this seq.
    round_after: u64,
    /// Events of this round that are on their way or sent, and not acknowledged.
    window: VecDeque<u64>,
    /// The newest event that was sent in this round.
    sent_in_round: u64,
    /// The newest event that was sent in any round.
    sent: u64,
    /// How often the oldest event was sent.
    attempts: u32,
    /// When it was sent, as far as this session did it and a client was there.
    sent_at: Vec<Instant>,
    /// The newest of these attempts, until it is known whether the client was there: it was if it is heard after this, or
    /// takes more than these bytes.
    unproven: Option<Presence>,
    /// Events up to this seq are sent again in this round, with this attempt.
    repeated: (u64, u32),
    /// When the oldest event must have been acknowledged, if it was sent.
    deadline: Option<Instant>,
    /// The newest seq that this session's client has acknowledged.
    acked: u64,
}

impl Confirm {
    /// Goes on after `place`, from where an earlier session ended.
    pub fn resume(policy: ConfirmPolicy, receipt: &ReceiptRow, place: u64) -> Confirm {
        let mut confirm = Confirm { policy, sent: receipt.sent, ..Confirm::default() };
        if receipt.sent > place && receipt.place == place {
            confirm.attempts = receipt.attempts;
        }
        confirm.restart(place);
        confirm
    }

    /// How many more events may be on their way.
    pub fn room(&self) -> usize {
        WINDOW - self.window.len()
    }

    /// The event is on its way to the socket.
    pub fn add(&mut self, seq: u64) {
        self.window.push_back(seq);
    }

    /// The event goes to the socket, which was given `written` bytes before it; gives which attempt it is, if not the first.
    pub fn send(&mut self, seq: u64, now: Instant, written: u64) -> Option<u32> {
        self.sent_in_round = seq;
        self.sent = self.sent.max(seq);
        if self.oldest() == Some(seq) {
            self.attempts += 1;
            self.sent_at.push(now);
            self.unproven = Some(Presence { heard: now, taken: written });
            self.deadline = Some(now + self.policy.ack_within);
        }
        let (until, attempt) = self.repeated;
        (seq <= until).then_some(attempt)
    }

    /// All events up to `seq` are acknowledged, also those that are still to come.
    pub fn ack(&mut self, seq: u64, now: Instant) {
        self.acked = self.acked.max(seq);
        let before = self.window.len();
        while self.window.pop_front_if(|oldest| *oldest <= seq).is_some() {}

        if self.window.len() < before {
            // If the next one was sent already, that was its first attempt, and its time begins now.
            let was_sent = self.oldest().is_some_and(|oldest| oldest <= self.sent_in_round);
            self.attempts = u32::from(was_sent);
            self.sent_at.clear();
            self.sent_at.extend(was_sent.then_some(now));
            self.unproven = None;
            self.deadline = was_sent.then_some(now + self.policy.ack_within);
        } else if before == 0 && seq > self.round_after && seq == self.acked {
            // Between two rounds: the next event may have been sent along with this one, as when an event is given up.
            self.give_up(seq);
        }
    }

    /// Whether the client has acknowledged the event.
    pub fn is_acked(&self, seq: u64) -> bool {
        seq <= self.acked
    }

    /// When the oldest event must have been acknowledged, if it was sent.
    pub fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// Takes the newest attempt back if the client was not there to take it.
    pub fn prove(&mut self, client: Presence) {
        if let Some(sent) = self.unproven.take()
            && !client.is_after(sent)
        {
            self.attempts -= 1;
            self.sent_at.pop();
        }
    }

    /// The session ends. If the server ended it before the newest attempt's time was up, that does not count either.
    pub fn leave(&mut self, client: Presence, by_server: bool, now: Instant) {
        if by_server && self.deadline.is_some_and(|deadline| deadline > now) {
            self.unproven = None;
            self.attempts = self.attempts.saturating_sub(1);
        }
        self.prove(client);
    }

    /// Whether this event, the oldest, has had its last attempt.
    pub fn is_exhausted(&self, seq: u64) -> bool {
        self.attempts >= self.policy.attempts && seq <= self.sent
    }

    /// When the oldest event was sent, as far as this session knows: the attempts of an earlier one are only counted.
    pub fn sent_at(&self) -> &[Instant] {
        &self.sent_at
    }

    pub fn oldest(&self) -> Option<u64> {
        self.window.front().copied()
    }

    /// The next round begins after `seq`. Gives the longest pause before it.
    pub fn restart(&mut self, seq: u64) -> Duration {
        self.round_after = seq;
        self.window.clear();
        self.sent_in_round = 0;
        self.unproven = None;
        self.deadline = None;
        self.repeated = (self.sent, self.attempts.max(1) + 1);
        longest_pause(self.attempts)
    }

    /// The event is done with: the next one is the oldest now, and if it was sent along, that was its first attempt. It
    /// has its own time in any case, even if that takes one attempt more than the policy has.
    pub fn give_up(&mut self, seq: u64) {
        self.attempts = u32::from(self.sent > seq).min(self.policy.attempts - 1);
        self.sent_at.clear();
        self.restart(seq);
    }

    pub(super) fn policy(&self) -> ConfirmPolicy {
        self.policy
    }

    /// The newest seq sent, and how often the oldest event was, as a receipt records them.
    pub fn progress(&self) -> (u64, u32) {
        (self.sent, self.attempts)
    }

    /// Whether anything was sent in this round that is not acknowledged.
    pub fn is_open(&self) -> bool {
        self.deadline.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sent(confirm: &mut Confirm, seqs: std::ops::RangeInclusive<u64>, now: Instant) -> Vec<Option<u32>> {
        let one = |seq| {
            confirm.add(seq);
            confirm.send(seq, now, 0)
        };
        seqs.map(one).collect()
    }

    #[tokio::test]
    async fn a_round_begins_again_at_the_oldest_and_says_which_attempt_it_is() {
        let (mut confirm, now) = (Confirm::resume(ConfirmPolicy::default(), &ReceiptRow::default(), 0), Instant::now());
        assert_eq!(sent(&mut confirm, 1..=3, now), [None; 3]);
        confirm.ack(1, now);
        assert_eq!((confirm.oldest(), confirm.deadline()), (Some(2), Some(now + ConfirmPolicy::default().ack_within)));
        confirm.restart(1);
        assert_eq!(sent(&mut confirm, 2..=4, now), [Some(2), Some(2), None]);
        confirm.restart(1);
        assert_eq!(sent(&mut confirm, 2..=4, now), [Some(3), Some(3), Some(3)]);
    }

    #[tokio::test]
    async fn progress_begins_the_count_anew() {
        let (mut confirm, now) = (Confirm::resume(ConfirmPolicy::default(), &ReceiptRow::default(), 0), Instant::now());
        for _ in 0..4 {
            sent(&mut confirm, 1..=2, now);
            confirm.restart(0);
        }
        sent(&mut confirm, 1..=2, now);
        assert!(confirm.is_exhausted(1));
        confirm.ack(1, now);
        assert!(!confirm.is_exhausted(2));
        confirm.restart(1);
        assert_eq!(sent(&mut confirm, 2..=2, now), [Some(2)]);
    }

    #[tokio::test]
    async fn attempts_go_on_after_a_reconnect_and_are_not_counted_while_nobody_is_there() {
        let (mut confirm, now) = (Confirm::resume(ConfirmPolicy::default(), &ReceiptRow::default(), 0), Instant::now());
        sent(&mut confirm, 1..=3, now);
        let (sent_to, attempts) = confirm.progress();
        let receipt = ReceiptRow { sent: sent_to, attempts, ..ReceiptRow::default() };
        let mut again = Confirm::resume(ConfirmPolicy::default(), &receipt, 0);
        assert_eq!(again.progress(), (3, 1));
        assert_eq!(sent(&mut again, 1..=4, now), [Some(2), Some(2), Some(2), None]);
        assert_eq!(again.progress(), (4, 2));
    }

    /// Seen a moment after `now`: heard by then, or having taken so many bytes.
    fn seen(now: Instant, heard: bool, taken: u64) -> Presence {
        Presence { heard: if heard { now + Duration::from_millis(1) } else { now }, taken }
    }

    #[tokio::test]
    async fn an_attempt_that_nobody_was_there_to_take_does_not_count_and_is_made_again() {
        let policy = ConfirmPolicy { attempts: 2, ..ConfirmPolicy::default() };
        let (mut confirm, now) = (Confirm::resume(policy, &ReceiptRow::default(), 0), Instant::now());
        let send = |confirm: &mut Confirm| {
            confirm.add(1);
            confirm.send(1, now, 100)
        };
        for _ in 0..10 {
            send(&mut confirm);
            confirm.prove(seen(now, false, 100));
            assert!(!confirm.is_exhausted(1));
            confirm.restart(0);
        }
        assert_eq!(send(&mut confirm), Some(2), "it was sent before, for all that is known");
        // One byte taken, or one frame heard, and somebody was there.
        confirm.prove(seen(now, false, 101));
        assert_eq!(confirm.progress(), (1, 1));
        confirm.restart(0);
        assert_eq!(send(&mut confirm), Some(2));
        confirm.prove(seen(now, true, 100));
        assert!(confirm.is_exhausted(1));
        confirm.prove(seen(now, false, 0));
        assert_eq!(confirm.progress(), (1, 2), "each attempt is looked at once");
    }

    #[tokio::test]
    async fn an_attempt_that_the_server_cuts_short_does_not_count_and_one_that_the_client_does_counts() {
        let left = |by_server: bool, after: Duration| {
            let (mut confirm, now) =
                (Confirm::resume(ConfirmPolicy::default(), &ReceiptRow::default(), 0), Instant::now());
            sent(&mut confirm, 1..=2, now);
            confirm.leave(seen(now, true, 0), by_server, now + after);
            let (sent_to, attempts) = confirm.progress();
            let receipt = ReceiptRow { sent: sent_to, attempts, ..ReceiptRow::default() };
            let mut again = Confirm::resume(ConfirmPolicy::default(), &receipt, 0);
            (attempts, sent(&mut again, 1..=3, now), again.progress().1)
        };
        let (early, late) = (Duration::from_secs(9), Duration::from_secs(10));
        assert_eq!(left(true, early), (0, vec![Some(2), Some(2), None], 1));
        assert_eq!(left(true, late), (1, vec![Some(2), Some(2), None], 2));
        assert_eq!(left(false, early), (1, vec![Some(2), Some(2), None], 2));
    }

    #[tokio::test]
    async fn what_becomes_the_oldest_by_an_acknowledgement_was_taken() {
        let (mut confirm, now) = (Confirm::resume(ConfirmPolicy::default(), &ReceiptRow::default(), 0), Instant::now());
        sent(&mut confirm, 1..=2, now);
        confirm.ack(1, now);
        confirm.prove(seen(now, false, 0));
        assert_eq!(confirm.progress(), (2, 1));
    }

    #[tokio::test]
    async fn what_is_given_up_leaves_the_next_one_its_own_attempts() {
        let (mut confirm, now) = (Confirm::resume(ConfirmPolicy::default(), &ReceiptRow::default(), 0), Instant::now());
        for _ in 0..5 {
            confirm.restart(0);
            sent(&mut confirm, 1..=2, now);
        }
        assert!(confirm.is_exhausted(1));
        confirm.give_up(1);
        assert_eq!(sent(&mut confirm, 2..=3, now), [Some(2), None]);
        assert!(!confirm.is_exhausted(2));
        confirm.give_up(3);
        assert_eq!(confirm.progress().1, 0, "what was never sent had no attempt");
    }

    #[tokio::test]
    async fn an_ack_between_two_rounds_counts() {
        let (mut confirm, now) = (Confirm::resume(ConfirmPolicy::default(), &ReceiptRow::default(), 0), Instant::now());
        sent(&mut confirm, 1..=3, now);
        confirm.restart(0);
        confirm.ack(3, now);
        assert!(confirm.is_acked(3) && !confirm.is_acked(4));
        assert_eq!((confirm.progress().1, confirm.deadline()), (0, None));
    }

    #[tokio::test]
    async fn what_is_acknowledged_between_two_rounds_leaves_the_next_one_its_own_attempts() {
        let (mut confirm, now) = (Confirm::resume(ConfirmPolicy::default(), &ReceiptRow::default(), 0), Instant::now());
        for _ in 0..4 {
            sent(&mut confirm, 1..=3, now);
            confirm.restart(0);
        }
        confirm.ack(2, now);
        confirm.ack(1, now);
        assert_eq!(sent(&mut confirm, 3..=4, now), [Some(2), None]);
        assert!(!confirm.is_exhausted(3));
    }

    #[tokio::test]
    async fn the_window_is_bounded() {
        let (mut confirm, now) = (Confirm::resume(ConfirmPolicy::default(), &ReceiptRow::default(), 0), Instant::now());
        sent(&mut confirm, 1..=WINDOW as u64, now);
        assert_eq!(confirm.room(), 0);
        confirm.ack(WINDOW as u64, now);
        assert_eq!((confirm.room(), confirm.deadline()), (WINDOW, None));
    }

    #[tokio::test]
    async fn the_client_says_how_long_it_needs_and_how_often_an_event_is_sent() {
        let policy = ConfirmPolicy { ack_within: Duration::from_secs(3_600), attempts: 2 };
        let (mut confirm, now) = (Confirm::resume(policy, &ReceiptRow::default(), 0), Instant::now());
        sent(&mut confirm, 1..=1, now);
        assert_eq!((confirm.deadline(), confirm.is_exhausted(1)), (Some(now + policy.ack_within), false));
        confirm.restart(0);
        sent(&mut confirm, 1..=1, now);
        assert!(confirm.is_exhausted(1));
    }

    #[tokio::test]
    async fn with_a_single_attempt_what_was_sent_along_still_has_its_own_time() {
        let policy = ConfirmPolicy { attempts: 1, ..ConfirmPolicy::default() };
        let (mut confirm, now) = (Confirm::resume(policy, &ReceiptRow::default(), 0), Instant::now());
        sent(&mut confirm, 1..=2, now);
        assert!(confirm.is_exhausted(1));
        confirm.give_up(1);
        assert!(!confirm.is_exhausted(2));
        sent(&mut confirm, 2..=2, now);
        assert!(confirm.is_exhausted(2));
    }

    #[tokio::test]
    async fn pauses_double_four_times_and_no_further() {
        let policy = ConfirmPolicy { attempts: 20, ..ConfirmPolicy::default() };
        let (mut confirm, now) = (Confirm::resume(policy, &ReceiptRow::default(), 0), Instant::now());
        let mut pauses = Vec::new();
        for _ in 0..20 {
            sent(&mut confirm, 1..=1, now);
            pauses.push(confirm.restart(0).as_millis());
        }
        assert_eq!((&pauses[..5], pauses[19]), (&[500, 1_000, 2_000, 4_000, 8_000][..], 8_000));
    }
}
