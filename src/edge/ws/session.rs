//! One WebSocket session: one task that owns its socket, reads commands, and writes what its outbox holds.
//!
//! Invariants:
//! - commands take effect in the order sent: one that reads waits until the publishes before it are answered;
//! - every publish that was accepted is answered, also while the server drains;
//! - what waits is bounded: publishes in flight by [`MAX_IN_FLIGHT`] (beyond it the socket is not read), events by the
//!   outbox, replayed frames by the subscriptions. A socket that takes nothing is closed after 30 s;
//! - control frames (answers, errors, `expiring`) overtake events; what goes out of these, [`crate::delivery::feed`] says.

use std::borrow::Cow;
use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context as Task, Poll};
use std::time::Duration;

use std::future::Future;

use futures_util::{Sink, SinkExt, StreamExt};
use metrics::Counter;
use serde_json::value::RawValue;
use tokio::time::{Instant, Sleep};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::error::{CapacityError, Error as WsError, ProtocolError};
use tokio_tungstenite::tungstenite::protocol::CloseFrame;
use tokio_tungstenite::tungstenite::{Bytes, Message};

use super::Sockets as Context;
use super::commands::Waiting;
use super::socket::Socket;
use crate::auth::{Principal, jwt};
use crate::delivery::feed::{Feed, Out};
use crate::delivery::outbox::{Answer, Demand, EVENT_BYTES};
use crate::delivery::registry::Registration;
use crate::delivery::subscriptions::{MAX_SUBSCRIPTIONS, WINDOW};
use crate::ingest::coalesce::Pieces;
use crate::log::Append;
use crate::projector::Verdict;
use crate::protocol::command;
use crate::protocol::error::Code;
use crate::protocol::frame::{Limits, ServerFrame, error_frame};
use crate::protocol::http::Transport;
use crate::{clock, telemetry};

/// Publishes that may wait for their answer; beyond that the socket is not read.
pub const MAX_IN_FLIGHT: usize = 8_192;
/// Answers that may wait for the socket; beyond that it is not read.
const MAX_ANSWERS: usize = 1_024;
/// Frames read before the writing side gets its turn.
const READS_PER_TURN: usize = 128;
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
/// Commands over the limit for so long, without a pause, end the session.
const LIMITED_FOR: Duration = Duration::from_secs(10);
/// What counts as a pause.
const LULL: Duration = Duration::from_secs(1);
/// Time to write the last frames and the close frame.
const CLOSE_WITHIN: Duration = Duration::from_secs(2);

/// The limits as `welcome` tells them.
pub const LIMITS: Limits = Limits {
    frame_bytes: command::MAX_FRAME,
    data_bytes: command::MAX_DATA,
    commands: command::MAX_COMMANDS,
    subscriptions: MAX_SUBSCRIPTIONS,
    publishes_in_flight: MAX_IN_FLIGHT,
    outbox_bytes: EVENT_BYTES,
    unacknowledged: WINDOW,
};

/// Why a session ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum End {
    /// We close, with this code and reason.
    Close(u16, Cow<'static, str>),
    /// The client closed or is gone.
    Gone,
}

/// What the session's wait brought.
enum Wake {
    Frame(Result<Message, WsError>),
    GoOn,
    Timer,
    Stop(End),
}

pub struct Session {
    pub(super) ctx: Arc<Context>,
    pub(super) ws: WebSocketStream<Socket>,
    pub(super) connection: String,
    pub(super) traceparent: Option<String>,
    pub(super) who: Option<Principal>,
    registration: Option<Registration>,
    pub(super) feed: Feed,
    /// Answers made by the session itself, and those of the outbox, encoded.
    pub(super) answers: VecDeque<Message>,
    /// Publishes read in this turn, not yet handed to the log.
    pub(super) batch: Vec<Append>,
    /// Pieces of messages that gather before they become records.
    pub(super) pieces: Pieces,
    pub(super) in_flight: usize,
    /// Commands that wait until those before them have taken effect.
    pub(super) backlog: VecDeque<Box<RawValue>>,
    /// The `subscribe` that waits for the list of threads, or for the places of a new durable subscription.
    pub(super) waiting: Option<Waiting>,
    /// How often places have been written, so that late answers are known as such.
    pub(super) placings: u32,
    pub(super) reads: usize,
    pub(super) dirty: bool,
    pub(super) draining: bool,
    pub(super) timer: Pin<Box<Sleep>>,
    pub(super) started: Instant,
    pub(super) heard: Instant,
    pub(super) pinged: Option<Instant>,
    /// How much the peer had taken when it was pinged, or last looked at.
    taken_at_ping: u64,
    pub(super) told_expiring: bool,
    /// When the client is to come back, in milliseconds.
    retry_after_ms: u64,
    /// Since when commands have been refused for their rate, and when the last one was.
    limited: Option<(Instant, Instant)>,
    /// Since when the socket has taken nothing, and how much it had taken by then.
    pub(super) stalled: Option<(Instant, u64)>,
    pub(super) published: Counter,
}

impl Session {
    pub fn new(
        ctx: Arc<Context>,
        ws: WebSocketStream<Socket>,
        who: Option<Principal>,
        traceparent: Option<String>,
    ) -> Session {
        let now = Instant::now();
        let deadline = if who.is_some() { PING_AFTER } else { CONNECT_WITHIN };
        Session {
            feed: ctx.delivery.feed(),
            ctx,
            ws,
            connection: clock::random_id().simple().to_string(),
            traceparent,
            who,
            registration: None,
            answers: VecDeque::new(),
            batch: Vec::new(),
            pieces: Pieces::default(),
            in_flight: 0,
            backlog: VecDeque::new(),
            waiting: None,
            placings: 0,
            reads: 0,
            dirty: false,
            draining: false,
            timer: Box::pin(tokio::time::sleep_until(now + deadline)),
            started: now,
            heard: now,
            pinged: None,
            taken_at_ping: 0,
            told_expiring: false,
            retry_after_ms: 0,
            limited: None,
            stalled: None,
            published: telemetry::commands("publish", "ok"),
        }
    }

    /// Serves the session until it ends, on either side.
    pub async fn run(mut self: Box<Session>) {
        self.registration = Some(self.ctx.registry.register(&self.feed.outbox, &self.connection, Transport::Websocket));
        let end = match self.begin(None) {
            Err(end) => end,
            Ok(()) => self.serve().await,
        };
        // Boxed, so that a session that goes on does not keep room for its end.
        Box::pin(self.finish(end)).await;
    }

    /// Goes on until the session ends, on either side.
    async fn serve(&mut self) -> End {
        loop {
            let wake = std::future::poll_fn(|cx| self.poll(cx)).await;
            let result = match wake {
                Wake::Frame(Ok(message)) => self.on_message(message),
                Wake::Frame(Err(error)) => Err(end_of(&error)),
                Wake::GoOn => self.on_answers(),
                Wake::Timer => self.on_timer(),
                Wake::Stop(end) => Err(end),
            };
            if let Err(end) = result {
                return end;
            }
        }
    }

    /// The user is known: the session counts as the user's from now on.
    pub(super) fn begin(&mut self, id: Option<i64>) -> Result<(), End> {
        let (Some(who), Some(registration)) = (&self.who, &self.registration) else { return Ok(()) };
        registration.identify(who).map_err(|error| End::Close(4503, error.message))?;
        // Looked up once more: a revocation from here on reaches the session itself.
        self.check_revoked()?;
        self.welcome(id);
        Ok(())
    }

    /// Ends the session if its token is from before its user's tokens were revoked.
    fn check_revoked(&self) -> Result<(), End> {
        let Some(who) = &self.who else { return Ok(()) };
        self.ctx.auth.check_revoked(who).map_err(|error| match error.code {
            Code::Unavailable => close(4006, "the token cannot be checked now"),
            _ => close(4504, "the user's sessions were revoked"),
        })
    }

    /// The client offered no version of the protocol that we speak.
    pub async fn refuse_version(self: Box<Session>) {
        Box::pin(self.finish(close(4502, "the subprotocol is weft.v1"))).await;
    }

    /// Reads while there is something to read, then writes what waits, then sleeps.
    fn poll(&mut self, cx: &mut Task<'_>) -> Poll<Wake> {
        // First, so that a flood of frames does not hold up what is due.
        if self.reads == 0 && self.timer.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Wake::Timer);
        }
        if self.ws.get_ref().flooded() {
            return Poll::Ready(Wake::Stop(close(4005, "a flood of frames that carry nothing")));
        }
        if self.feed.overrun {
            return Poll::Ready(Wake::Stop(close(4001, "more threads were joined than could be noted: resume")));
        }
        let reading = self.may_read();
        if reading && self.reads < READS_PER_TURN {
            match self.ws.poll_next_unpin(cx) {
                Poll::Ready(Some(frame)) => {
                    self.reads += 1;
                    return Poll::Ready(Wake::Frame(frame));
                }
                Poll::Ready(None) => return Poll::Ready(Wake::Stop(End::Gone)),
                Poll::Pending => self.reads = 0,
            }
        }
        let more_to_read = reading && self.reads > 0;
        self.reads = 0;
        self.gather_pieces();
        if let Some(who) = &self.who {
            self.batch.extend(self.feed.subs.changed_receipts(who));
        }
        if !self.batch.is_empty() {
            self.ctx.submit.send(std::mem::take(&mut self.batch));
        }
        // Answers that came in are taken before anything is written: they overtake events.
        if self.answers.len() < MAX_ANSWERS && self.feed.outbox.has_answers() {
            return Poll::Ready(Wake::GoOn);
        }
        let written = self.poll_write(cx);
        if let Poll::Ready(Err(_)) = written {
            return Poll::Ready(Wake::Stop(End::Gone));
        }
        // A socket that takes nothing does not want events, but answers change what there is to do.
        let more_to_write = match written.is_ready() {
            true => self.feed.outbox.poll_filled(cx, self.feed.wanted()).is_ready(),
            false => self.answers.len() < MAX_ANSWERS && self.feed.outbox.poll_filled(cx, Demand::None).is_ready(),
        };
        if more_to_read || more_to_write {
            return Poll::Ready(Wake::GoOn);
        }
        let due = [self.feed.subs.due(), self.pieces.due()].into_iter().flatten().min();
        if let Some(due) = due.filter(|due| *due < self.timer.deadline()) {
            self.timer.as_mut().reset(due);
        }
        self.timer.as_mut().poll(cx).map(|()| Wake::Timer)
    }

    /// Whether more commands are wanted now.
    fn may_read(&self) -> bool {
        !self.draining && self.in_flight < MAX_IN_FLIGHT && self.answers.len() < MAX_ANSWERS && self.backlog.is_empty()
    }

    /// Writes frames for as long as the socket takes them. Ready: all is written.
    fn poll_write(&mut self, cx: &mut Task<'_>) -> Poll<Result<(), WsError>> {
        loop {
            let ready = Pin::new(&mut self.ws).poll_ready(cx)?;
            if ready.is_pending() {
                self.note_stall();
                return Poll::Pending;
            }
            let Some(frame) = self.next_frame() else { break };
            Pin::new(&mut self.ws).start_send(frame)?;
            self.dirty = true;
        }
        if self.dirty {
            if Pin::new(&mut self.ws).poll_flush(cx)?.is_pending() {
                self.note_stall();
                return Poll::Pending;
            }
            self.dirty = false;
        }
        self.stalled = None;
        Poll::Ready(Ok(()))
    }

    /// Answers first, then events.
    fn next_frame(&mut self) -> Option<Message> {
        if let Some(frame) = self.answers.pop_front() {
            return Some(frame);
        }
        Some(match self.feed.next(self.who.as_ref()?)? {
            Out::Event { frame, .. } | Out::Notice(frame) => Message::Text(frame),
            Out::Ended { thread, error } => text(error_frame(None, Some(&thread), &error)),
        })
    }

    fn note_stall(&mut self) {
        let taken = self.ws.get_ref().taken();
        if self.stalled.is_none_or(|(_, then)| then != taken) {
            self.stalled = Some((Instant::now(), taken));
        }
    }

    /// Whether the peer has taken something since the ping, of what is on its way.
    fn still_takes(&mut self) -> bool {
        let socket = self.ws.get_ref();
        let (waits, taken) = (socket.on_the_way() > 0, socket.taken());
        let moved = taken > self.taken_at_ping;
        self.taken_at_ping = taken;
        waits && moved
    }

    fn on_message(&mut self, message: Message) -> Result<(), End> {
        self.heard = Instant::now();
        self.pinged = None;
        match message {
            Message::Text(text) => self.on_text(&text),
            Message::Binary(_) => Err(close(1003, "frames are JSON text")),
            Message::Close(_) => Err(End::Gone),
            // Pings are answered by the protocol layer with the next write.
            Message::Ping(_) => {
                self.dirty = true;
                Ok(())
            }
            Message::Pong(_) | Message::Frame(_) => Ok(()),
        }
    }

    fn on_text(&mut self, text: &str) -> Result<(), End> {
        // Some clients send empty frames to stay connected; too many of them are a flood.
        if text.is_empty() {
            return Ok(());
        }
        match command::split(text) {
            None => Err(close(4501, "the frame is neither a JSON object nor an array of them")),
            Some(Err(error)) => {
                self.refuse(None, &error);
                Ok(())
            }
            Some(Ok(commands)) => {
                for &command in commands.as_slice() {
                    if self.within_limits(command)? && !(self.backlog.is_empty() && self.on_command(command)?) {
                        self.backlog.push_back(command.to_owned());
                    }
                }
                Ok(())
            }
        }
    }

    /// Counts a command; one over the limit is refused, and a client that goes on like that is shown the door.
    fn within_limits(&mut self, command: &RawValue) -> Result<bool, End> {
        let Some(who) = &self.who else { return Ok(true) };
        let Err(error) = self.ctx.admission.count(who) else { return Ok(true) };
        let now = Instant::now();
        let since = self.limited.filter(|(_, last)| now < *last + LULL).map_or(now, |(since, _)| since);
        self.limited = Some((since, now));
        if now >= since + LIMITED_FOR {
            return Err(close(4005, "over the rate limit for too long"));
        }
        self.refuse(command::id_of(command.get()), &error);
        Ok(false)
    }

    /// Takes the answers that came in from elsewhere.
    fn on_answers(&mut self) -> Result<(), End> {
        while self.answers.len() < MAX_ANSWERS
            && let Some(answer) = self.feed.outbox.pop_answer()
        {
            match answer {
                Answer::Publish { id, thread, piece, verdict } => self.on_verdict(id, &thread, piece, verdict),
                Answer::Threads(threads) => self.on_threads(threads),
                Answer::PlacesStored { attempt, stored } => self.on_placed(attempt, stored),
                Answer::Left { thread } => {
                    let ended = self.who.as_ref().map(|who| self.feed.left(who, &thread));
                    for (thread, error) in ended.into_iter().flatten() {
                        self.answers.push_back(text(error_frame(None, Some(&thread), &error)));
                    }
                }
                Answer::Drain { retry_after_ms } => {
                    self.draining = true;
                    self.flush_pieces(|_| true);
                    self.retry_after_ms = retry_after_ms;
                }
                Answer::Revoked => self.check_revoked()?,
                Answer::ReceiptStored { thread, stored } => self.feed.subs.stored(&thread, stored),
                Answer::DeadLettered { thread, seq, dead_lettered } => {
                    if let Some(who) = &self.who {
                        self.feed.subs.dead_lettered(who, &thread, seq, dead_lettered);
                    }
                }
                Answer::Chunk { sub, read } => {
                    if let Some(who) = &self.who
                        && let Err((thread, error)) = self.feed.subs.chunk(who, sub, read)
                    {
                        self.answers.push_back(text(error_frame(None, Some(&thread), &error)));
                    }
                }
            }
        }
        if self.draining && self.in_flight == 0 && self.batch.is_empty() {
            let reason = format!(r#"{{"reason":"draining","retry_after_ms":{}}}"#, self.retry_after_ms);
            return Err(End::Close(1001, reason.into()));
        }
        while self.in_flight < MAX_IN_FLIGHT
            && let Some(command) = self.backlog.pop_front()
        {
            if !self.on_command(&command)? {
                self.backlog.push_front(command);
                break;
            }
        }
        Ok(())
    }

    fn on_verdict(&mut self, id: i64, thread: &str, piece: Option<(Box<str>, u64)>, verdict: Verdict) {
        self.in_flight -= 1;
        match verdict {
            Ok(it) => {
                self.published.increment(1);
                self.answer(&ServerFrame::Published {
                    id,
                    thread,
                    seq: piece.is_none().then_some(it.seq),
                    event: it.event,
                    duplicate: it.duplicate,
                    message: piece.as_ref().map(|(message, _)| &**message),
                    to_char: piece.as_ref().map(|(_, to_char)| *to_char),
                });
            }
            Err(error) => {
                telemetry::commands("publish", error.code.as_str()).increment(1);
                self.answers.push_back(text(error_frame(Some(id), None, &error)));
            }
        }
    }

    fn on_timer(&mut self) -> Result<(), End> {
        let now = Instant::now();
        match &self.who {
            None if now >= self.started + CONNECT_WITHIN => return Err(close(4004, "no connect in time")),
            None => {}
            Some(who) => {
                let wall = clock::now_s();
                if wall >= who.expires_at.saturating_add(jwt::LEEWAY) {
                    return Err(close(4003, "the token has expired"));
                }
                if wall + EXPIRING_BEFORE >= who.expires_at && !self.told_expiring {
                    self.told_expiring = true;
                    let expires_at = clock::rfc3339(who.expires_at * 1000);
                    self.answer(&ServerFrame::Expiring { expires_at: &expires_at });
                }
            }
        }
        if self.stalled.is_some() {
            self.note_stall();
        }
        if self.stalled.is_some_and(|(since, _)| now >= since + STALLED_AFTER) {
            return Err(close(4001, "the socket takes nothing"));
        }
        if !self.may_read() {
            // We do not listen now, so nothing can be heard.
            self.heard = now;
            self.pinged = None;
        }
        if let Some(who) = &self.who
            && self.feed.subs.due().is_some_and(|due| due <= now)
        {
            self.feed.subs.on_due(who);
        }
        self.gather_pieces();
        if self.pinged.is_some_and(|at| now >= at + PONG_WITHIN) && self.still_takes() {
            // The ping waits behind what the peer has not read yet.
            self.pinged = Some(now);
        }
        match self.pinged {
            Some(at) if now >= at + PONG_WITHIN => return Err(close(4002, "no heartbeat")),
            None if now >= self.heard + PING_AFTER => {
                self.pinged = Some(now);
                self.taken_at_ping = self.ws.get_ref().taken();
                self.answers.push_back(Message::Ping(Bytes::new()));
            }
            _ => {}
        }
        self.reset_timer();
        Ok(())
    }

    pub(super) fn reset_timer(&mut self) {
        let deadline = self.next_deadline();
        self.timer.as_mut().reset(deadline);
    }

    /// When something is due next. What happens earlier than that only moves deadlines away, so looking then is enough.
    fn next_deadline(&self) -> Instant {
        let Some(who) = &self.who else {
            return self.started + CONNECT_WITHIN;
        };
        let beat = self.pinged.map_or(self.heard + PING_AFTER, |at| at + PONG_WITHIN);
        let expiry = if self.told_expiring {
            who.expires_at.saturating_add(jwt::LEEWAY)
        } else {
            who.expires_at.saturating_sub(EXPIRING_BEFORE)
        };
        let expiry = Instant::now() + Duration::from_secs(expiry.saturating_sub(clock::now_s()).clamp(1, 86_400));
        let stall = self.stalled.map_or(beat, |(since, _)| since + STALLED_AFTER);
        let due = [self.feed.subs.due(), self.pieces.due()].into_iter().flatten();
        due.fold(beat.min(expiry).min(stall), Instant::min)
    }

    /// Says goodbye, and leaves nothing behind.
    async fn finish(mut self: Box<Session>, end: End) {
        self.feed.subs.close();
        self.flush_pieces(|_| true);
        if !self.batch.is_empty() {
            self.ctx.submit.send(std::mem::take(&mut self.batch));
        }
        let code = match &end {
            End::Close(code, _) => *code,
            End::Gone => 1005,
        };
        telemetry::closed(code).increment(1);
        if let End::Close(code, reason) = end {
            let goodbye = async {
                while let Some(frame) = self.answers.pop_front() {
                    self.ws.feed(frame).await?;
                }
                self.ws.send(Message::Close(Some(CloseFrame { code: code.into(), reason: (*reason).into() }))).await
            };
            // A socket that takes nothing does not get its close frame either.
            drop(tokio::time::timeout(CLOSE_WITHIN, goodbye).await);
            self.ws.into_inner().linger().await;
        } else {
            // Sends the answer to the client's close frame, if that is what ended the session.
            drop(tokio::time::timeout(CLOSE_WITHIN, self.ws.flush()).await);
        }
    }
}

pub(super) fn close(code: u16, reason: &'static str) -> End {
    End::Close(code, reason.into())
}

pub(super) fn text(frame: String) -> Message {
    Message::Text(frame.into())
}

/// The close code for what the protocol layer found (RFC 6455, section 7.4.1).
fn end_of(error: &WsError) -> End {
    match error {
        WsError::Capacity(CapacityError::MessageTooLong { .. }) => close(1009, "the frame is too large"),
        WsError::Utf8(_) => close(1007, "the frame is not UTF-8"),
        WsError::Protocol(ProtocolError::ResetWithoutClosingHandshake) => End::Gone,
        WsError::Protocol(_) => close(1002, "the frame is not WebSocket"),
        _ => End::Gone,
    }
}
