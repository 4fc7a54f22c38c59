//! The deadlines of a session: `connect`, silence, a socket that takes nothing, and the end of the token.
//!
//! Pure: times and facts come in, what is to be done goes out. [`Heartbeat::due`] says when to look next. A frame that comes
//! only moves deadlines away, so it leaves that time as it is: the look at the earlier time finds nothing due and sets the
//! next one.
//!
//! - Without a user, `connect` must come within 5 s (4004).
//! - After 25 s without a frame the server pings, and any frame must come within 10 s (4002). While the server itself does
//!   not read the socket, nothing can be heard, so silence does not count. A peer that still takes what was sent before
//!   the ping has not seen the ping yet: it gets another 10 s for as long as that goes on.
//! - A socket to which something is to be written and that takes no byte for 30 s is a slow consumer (4001).
//! - A token's end is announced 60 s ahead, and 30 s after it the session ends (4003).

use tokio::time::{Duration, Instant};

use super::close::{self, End};
use super::socket::PeerProgress;
use crate::auth::LEEWAY;

/// Time for a `connect` frame.
const CONNECT_WITHIN: Duration = Duration::from_secs(5);
/// Silence after which the server pings.
pub const PING_AFTER: Duration = Duration::from_secs(25);
/// Time for any frame after that ping.
const PONG_WITHIN: Duration = Duration::from_secs(10);
/// A socket that takes no byte for so long is a slow consumer.
const STALLED_AFTER: Duration = Duration::from_secs(30);
/// How long before a token's end `expiring` is sent, in seconds.
const EXPIRING_BEFORE: u64 = 60;

/// What the session sees when it looks.
#[derive(Debug, Clone, Copy)]
pub struct Facts {
    pub now: Instant,
    /// Seconds since the Unix epoch.
    pub wall: u64,
    /// The session reads its socket now.
    pub reading: bool,
    pub peer: PeerProgress,
}

/// What is to be sent now.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct DueNow {
    /// `expiring`, with the token's end in seconds since the Unix epoch.
    pub expiring: Option<u64>,
    pub ping: bool,
}

#[derive(Debug)]
pub struct Heartbeat {
    opened: Instant,
    /// When the last frame came.
    heard: Instant,
    /// The ping that nothing has come after.
    ping: Option<Ping>,
    /// Once the user is known.
    token: Option<TokenEnd>,
    stall: Option<Stall>,
    due: Instant,
}

#[derive(Debug)]
struct Ping {
    /// When it was sent, or when the peer was last seen to take what was sent before it.
    at: Instant,
    /// What the peer had taken by then.
    taken: u64,
}

#[derive(Debug)]
struct TokenEnd {
    /// Seconds since the Unix epoch.
    expires_at: u64,
    announced: bool,
}

/// The socket takes nothing.
#[derive(Debug)]
struct Stall {
    since: Instant,
    /// What the peer had taken by then.
    taken: u64,
}

impl Heartbeat {
    pub fn new(now: Instant) -> Heartbeat {
        Heartbeat { opened: now, heard: now, ping: None, token: None, stall: None, due: now + CONNECT_WITHIN }
    }

    /// The user is known, or has a new token.
    pub fn token(&mut self, expires_at: u64, now: Instant, wall: u64) {
        self.token = Some(TokenEnd { expires_at, announced: false });
        self.due = self.next_due(now, wall);
    }

    /// A frame came.
    pub fn heard(&mut self, now: Instant) {
        self.heard = now;
        self.ping = None;
    }

    /// When the last frame came.
    pub fn last_heard(&self) -> Instant {
        self.heard
    }

    /// Something is to be written and the socket does not take it.
    pub fn stalled(&mut self, now: Instant, taken: u64) {
        if self.stall.as_ref().is_none_or(|stall| stall.taken != taken) {
            self.stall = Some(Stall { since: now, taken });
        }
    }

    /// The socket has taken everything.
    pub fn flowing(&mut self) {
        self.stall = None;
    }

    /// When [`Heartbeat::on_timer`] is to be called next.
    pub fn due(&self) -> Instant {
        self.due
    }

    /// Looks at all deadlines.
    pub fn on_timer(&mut self, facts: &Facts) -> Result<DueNow, End> {
        let expiring = self.check_token(facts)?;
        self.check_stall(facts)?;
        let ping = self.check_silence(facts)?;
        self.due = self.next_due(facts.now, facts.wall);
        Ok(DueNow { expiring, ping })
    }

    fn check_token(&mut self, facts: &Facts) -> Result<Option<u64>, End> {
        let Some(token) = &mut self.token else {
            if facts.now >= self.opened + CONNECT_WITHIN {
                return Err(End::close(close::NO_CONNECT, "no connect in time"));
            }
            return Ok(None);
        };
        if facts.wall >= token.expires_at.saturating_add(LEEWAY) {
            return Err(End::close(close::TOKEN_EXPIRED, "the token has expired"));
        }
        if token.announced || facts.wall + EXPIRING_BEFORE < token.expires_at {
            return Ok(None);
        }
        token.announced = true;
        Ok(Some(token.expires_at))
    }

    fn check_stall(&mut self, facts: &Facts) -> Result<(), End> {
        if self.stall.is_some() {
            self.stalled(facts.now, facts.peer.taken);
        }
        match &self.stall {
            Some(stall) if facts.now >= stall.since + STALLED_AFTER => {
                Err(End::close(close::SLOW_CONSUMER, "the socket takes nothing"))
            }
            _ => Ok(()),
        }
    }

    /// Whether a ping is due.
    fn check_silence(&mut self, facts: &Facts) -> Result<bool, End> {
        let Facts { now, peer, .. } = *facts;
        if !facts.reading {
            self.heard(now);
            return Ok(false);
        }
        let Some(ping) = &mut self.ping else {
            let silent = now >= self.heard + PING_AFTER;
            if silent {
                self.ping = Some(Ping { at: now, taken: peer.taken });
            }
            return Ok(silent);
        };
        if now < ping.at + PONG_WITHIN {
            return Ok(false);
        }
        // The ping waits in the kernel after what the peer has not taken yet.
        let still_takes = peer.on_the_way > 0 && peer.taken > ping.taken;
        if !still_takes {
            return Err(End::close(close::NO_HEARTBEAT, "no heartbeat"));
        }
        *ping = Ping { at: now, taken: peer.taken };
        Ok(false)
    }

    fn next_due(&self, now: Instant, wall: u64) -> Instant {
        let Some(token) = &self.token else { return self.opened + CONNECT_WITHIN };
        let frame = match &self.ping {
            Some(ping) => ping.at + PONG_WITHIN,
            None => self.heard + PING_AFTER,
        };
        let expiry = match token.announced {
            true => token.expires_at.saturating_add(LEEWAY),
            false => token.expires_at.saturating_sub(EXPIRING_BEFORE),
        };
        // At most a day ahead: the clock may be set, and a token may end in the far future.
        let expiry = now + Duration::from_secs(expiry.saturating_sub(wall).clamp(1, 86_400));
        let stall = self.stall.as_ref().map_or(frame, |stall| stall.since + STALLED_AFTER);
        frame.min(expiry).min(stall)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WALL: u64 = 1_800_000_000;
    const S: Duration = Duration::from_secs(1);
    const MS: Duration = Duration::from_millis(1);

    /// A session in steps of time: the wall clock goes along.
    struct Session {
        beat: Heartbeat,
        begin: Instant,
        now: Instant,
        reading: bool,
        peer: PeerProgress,
    }

    impl Session {
        /// Not connected yet.
        fn open() -> Session {
            let begin = Instant::now();
            let peer = PeerProgress { taken: 0, on_the_way: 0 };
            Session { beat: Heartbeat::new(begin), begin, now: begin, reading: true, peer }
        }

        /// Connected, with a token that ends so many seconds from now.
        fn connected(seconds: u64) -> Session {
            let mut session = Session::open();
            session.token(seconds);
            session
        }

        fn token(&mut self, seconds: u64) {
            self.beat.token(self.wall() + seconds, self.now, self.wall());
        }

        fn wall(&self) -> u64 {
            WALL + (self.now - self.begin).as_secs()
        }

        /// Looks after some time.
        fn after(&mut self, pause: Duration) -> Result<DueNow, u16> {
            self.now += pause;
            let facts = Facts { now: self.now, wall: self.wall(), reading: self.reading, peer: self.peer };
            self.beat.on_timer(&facts).map_err(|end| end.code())
        }

        /// Looks when it is due, and gives how long that took.
        fn when_due(&mut self) -> (Duration, Result<DueNow, u16>) {
            let pause = self.beat.due() - self.now;
            (pause, self.after(pause))
        }
    }

    fn nothing() -> Result<DueNow, u16> {
        Ok(DueNow::default())
    }

    fn ping() -> Result<DueNow, u16> {
        Ok(DueNow { ping: true, ..DueNow::default() })
    }

    fn expiring(seconds: u64) -> Result<DueNow, u16> {
        Ok(DueNow { expiring: Some(WALL + seconds), ..DueNow::default() })
    }

    #[test]
    fn without_connect_the_session_ends_after_5_s_with_4004() {
        let mut session = Session::open();
        assert_eq!(session.after(5 * S - MS), nothing());
        assert_eq!(session.when_due(), (MS, Err(4004)));
    }

    #[test]
    fn after_connect_in_the_last_moment_the_deadlines_are_those_of_a_session() {
        let mut session = Session::open();
        assert_eq!(session.after(5 * S - MS), nothing());
        session.token(3_600);
        session.beat.heard(session.now);
        assert_eq!(session.after(MS), nothing());
        assert_eq!(session.when_due(), (25 * S - MS, ping()));
    }

    #[test]
    fn silence_brings_a_ping_after_25_s_and_4002_after_10_more() {
        let mut session = Session::connected(3_600);
        assert_eq!(session.after(25 * S - MS), nothing());
        assert_eq!(session.when_due(), (MS, ping()));
        assert_eq!(session.after(10 * S - MS), nothing(), "one ping and no more");
        assert_eq!(session.when_due(), (MS, Err(4002)));
    }

    #[test]
    fn any_frame_in_time_ends_the_silence() {
        let mut session = Session::connected(3_600);
        assert_eq!(session.after(25 * S), ping());
        session.now += 10 * S - MS;
        session.beat.heard(session.now);
        assert_eq!(session.after(MS), nothing());
        assert_eq!(session.when_due(), (25 * S - MS, ping()), "25 s from that frame on");
    }

    #[test]
    fn a_look_before_something_is_due_changes_nothing() {
        let mut session = Session::connected(3_600);
        for _ in 0..24 {
            assert_eq!(session.after(S), nothing());
        }
        assert_eq!(session.when_due(), (S, ping()));
    }

    #[test]
    fn while_the_peer_still_takes_what_was_sent_before_the_ping_it_gets_more_time() {
        let mut session = Session::connected(3_600);
        session.peer = PeerProgress { taken: 100, on_the_way: 5_000 };
        assert_eq!(session.after(25 * S), ping());
        for _ in 0..5 {
            session.peer.taken += 1;
            assert_eq!(session.when_due(), (10 * S, nothing()));
        }
        assert_eq!(session.when_due(), (10 * S, Err(4002)), "nothing taken in the last 10 s");

        let mut session = Session::connected(3_600);
        session.peer = PeerProgress { taken: 100, on_the_way: 5_000 };
        assert_eq!(session.after(25 * S), ping());
        session.peer = PeerProgress { taken: 5_100, on_the_way: 0 };
        assert_eq!(session.when_due(), (10 * S, Err(4002)), "it has the ping");
    }

    #[test]
    fn while_the_server_does_not_read_silence_does_not_count() {
        let mut session = Session::connected(3_600);
        session.reading = false;
        for _ in 0..10 {
            assert_eq!(session.when_due(), (25 * S, nothing()));
        }
        session.reading = true;
        assert_eq!(session.when_due(), (25 * S, ping()));
        session.reading = false;
        assert_eq!(session.after(10 * S), nothing(), "the pong may wait unread");
        session.reading = true;
        assert_eq!(session.after(24 * S), nothing());
        assert_eq!(session.when_due(), (S, ping()));
    }

    #[test]
    fn a_socket_that_takes_nothing_for_30_s_is_closed_4001() {
        let mut session = Session::connected(3_600);
        session.reading = false;
        session.peer = PeerProgress { taken: 7, on_the_way: 100_000 };
        session.beat.stalled(session.now, 7);
        // Later attempts to write do not begin the time anew.
        session.beat.stalled(session.now + 20 * S, 7);
        assert_eq!(session.after(30 * S - MS), nothing());
        assert_eq!(session.when_due(), (MS, Err(4001)));
    }

    #[test]
    fn one_byte_taken_begins_the_30_s_anew_and_a_socket_that_took_everything_is_not_stalled() {
        let mut session = Session::connected(3_600);
        session.reading = false;
        session.beat.stalled(session.now, 7);
        session.peer.taken = 8;
        assert_eq!(session.after(29 * S), nothing());
        assert_eq!(session.after(29 * S), nothing(), "one was taken before the look at 29 s");
        assert_eq!(session.after(S), Err(4001));

        let mut session = Session::connected(3_600);
        session.reading = false;
        session.beat.stalled(session.now, 0);
        session.now += 10 * S;
        session.beat.flowing();
        assert_eq!(session.after(3_000 * S), nothing());
    }

    #[test]
    fn a_stall_is_seen_although_no_look_was_due_for_it_when_it_began() {
        let mut session = Session::connected(3_600);
        session.reading = false;
        session.now += S;
        session.beat.stalled(session.now, 0);
        let (mut waited, mut end) = (Duration::ZERO, nothing());
        while end.is_ok() {
            let (pause, seen) = session.when_due();
            waited += pause;
            end = seen;
        }
        assert_eq!((waited, end), (30 * S, Err(4001)));
    }

    #[test]
    fn a_token_s_end_is_announced_once_60_s_ahead_and_30_s_after_it_comes_4003() {
        let mut session = Session::connected(70);
        assert_eq!(session.when_due(), (10 * S, expiring(70)));
        session.reading = false;
        let mut waited = Duration::ZERO;
        let end = loop {
            let (pause, seen) = session.when_due();
            waited += pause;
            match seen {
                Ok(due) => assert_eq!(due, DueNow::default(), "announced once"),
                Err(code) => break code,
            }
        };
        assert_eq!((waited, end), (90 * S, 4003));
    }

    #[test]
    fn a_refresh_moves_the_end_and_announces_it_anew() {
        let mut session = Session::connected(30);
        assert_eq!(session.when_due(), (S, expiring(30)), "it is late already");
        session.now += 50 * S;
        session.beat.heard(session.now);
        session.token(65);
        assert_eq!(session.when_due(), (5 * S, expiring(51 + 65)));
    }

    #[test]
    fn a_token_without_an_end_in_sight_is_looked_at_daily_and_never_overflows() {
        let mut session = Session::open();
        session.beat.token(u64::MAX, session.now, WALL);
        assert!(session.beat.due() <= session.now + 25 * S);
        assert_eq!(session.after(25 * S), ping());
    }
}
