//! One WebSocket session: one task that owns its socket, reads commands, and writes what its outbox holds.
//!
//! Invariants:
//! - commands take effect in the order sent: one that reads waits until the publishes before it are answered;
//! - every publish that was accepted is answered, also while the server drains;
//! - what waits is bounded: publishes in flight by [`MAX_IN_FLIGHT`] (beyond it the socket is not read), events by the
//!   outbox, replayed frames by the subscriptions. A socket that takes nothing is closed after 30 s.

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

use super::Context;
use super::commands::All;
use super::socket::Socket;
use super::subscriptions::{MAX_SUBSCRIPTIONS, Subscriptions};
use crate::command::{self};
use crate::error::{Code, Error};
use crate::identity::{Principal, jwt};
use crate::log::Append;
use crate::outbox::{Answer, EVENT_BYTES, Item, Outbox};
use crate::submit::Verdict;
use crate::wire::{Limits, ServerFrame, error_frame};
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
};

/// Why a session ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum End {
    /// We close, with this code and reason.
    Close(u16, &'static str),
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
    pub(super) outbox: Arc<Outbox>,
    pub(super) subs: Subscriptions,
    /// Answers made by the session itself, and those of the outbox, encoded.
    pub(super) answers: VecDeque<Message>,
    /// Publishes read in this turn, not yet handed to the log.
    pub(super) batch: Vec<Append>,
    pub(super) in_flight: usize,
    /// Commands that wait until those before them have taken effect.
    pub(super) backlog: VecDeque<Box<RawValue>>,
    /// The `subscribe` to `"*"` that waits for the list of threads.
    pub(super) listing: Option<All>,
    pub(super) reads: usize,
    pub(super) replay_turn: bool,
    pub(super) dirty: bool,
    pub(super) draining: bool,
    pub(super) timer: Pin<Box<Sleep>>,
    pub(super) started: Instant,
    pub(super) heard: Instant,
    pub(super) pinged: Option<Instant>,
    pub(super) told_expiring: bool,
    /// More threads were joined than could be noted: only a resume can tell which.
    overrun: bool,
    /// Since when the socket has taken nothing, and how much it had taken by then.
    pub(super) stalled: Option<(Instant, u64)>,
    pub(super) published: Counter,
    pub(super) deliveries: Counter,
}

impl Session {
    pub fn new(
        ctx: Arc<Context>,
        ws: WebSocketStream<Socket>,
        who: Option<Principal>,
        traceparent: Option<String>,
    ) -> Session {
        let outbox = Arc::new(Outbox::default());
        let now = Instant::now();
        let deadline = if who.is_some() { PING_AFTER } else { CONNECT_WITHIN };
        Session {
            subs: Subscriptions::new(ctx.clone(), outbox.clone()),
            ctx,
            ws,
            connection: clock::random_id().simple().to_string(),
            traceparent,
            who,
            outbox,
            answers: VecDeque::new(),
            batch: Vec::new(),
            in_flight: 0,
            backlog: VecDeque::new(),
            listing: None,
            reads: 0,
            replay_turn: false,
            dirty: false,
            draining: false,
            timer: Box::pin(tokio::time::sleep_until(now + deadline)),
            started: now,
            heard: now,
            pinged: None,
            told_expiring: false,
            overrun: false,
            stalled: None,
            published: telemetry::commands("publish", "ok"),
            deliveries: telemetry::deliveries(),
        }
    }

    /// Serves the session until it ends, on either side.
    pub async fn run(mut self: Box<Session>) {
        let _open = self.ctx.enter(&self.outbox);
        if self.who.is_some() {
            self.welcome(None);
        }
        let end = loop {
            let wake = std::future::poll_fn(|cx| self.poll(cx)).await;
            let result = match wake {
                Wake::Frame(Ok(message)) => self.on_message(message),
                Wake::Frame(Err(error)) => Err(end_of(&error)),
                Wake::GoOn => self.on_answers(),
                Wake::Timer => self.on_timer(),
                Wake::Stop(end) => Err(end),
            };
            if let Err(end) = result {
                break end;
            }
        };
        // Boxed, so that a session that goes on does not keep room for its end.
        Box::pin(self.finish(end)).await;
    }

    /// The client offered no version of the protocol that we speak.
    pub async fn refuse_version(self: Box<Session>) {
        Box::pin(self.finish(End::Close(4502, "the subprotocol is weft.v1"))).await;
    }

    /// Reads while there is something to read, then writes what waits, then sleeps.
    fn poll(&mut self, cx: &mut Task<'_>) -> Poll<Wake> {
        // First, so that a flood of frames does not hold up what is due.
        if self.reads == 0 && self.timer.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Wake::Timer);
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
        if !self.batch.is_empty() {
            self.ctx.submit.send(std::mem::take(&mut self.batch));
        }
        // Answers that came in are taken before anything is written: they overtake events.
        if self.answers.len() < MAX_ANSWERS && self.outbox.has_answers() {
            return Poll::Ready(Wake::GoOn);
        }
        let written = self.poll_write(cx);
        if let Poll::Ready(Err(_)) = written {
            return Poll::Ready(Wake::Stop(End::Gone));
        }
        // A socket that takes nothing does not want events, but answers change what there is to do.
        let more_to_write = match written.is_ready() {
            true => self.outbox.poll_filled(cx, self.gate_open()).is_ready(),
            false => self.answers.len() < MAX_ANSWERS && self.outbox.poll_filled(cx, false).is_ready(),
        };
        if more_to_read || more_to_write {
            return Poll::Ready(Wake::GoOn);
        }
        self.timer.as_mut().poll(cx).map(|()| Wake::Timer)
    }

    /// Whether live events may be sent: not while a subscription is in its seam or a list of threads is read.
    fn gate_open(&self) -> bool {
        self.subs.gate_open() && self.listing.is_none()
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

    /// Answers first; then replayed and live events in turn, so that neither starves the other.
    fn next_frame(&mut self) -> Option<Message> {
        if let Some(frame) = self.answers.pop_front() {
            return Some(frame);
        }
        let who = self.who.as_ref()?;
        self.replay_turn = !self.replay_turn;
        if self.replay_turn
            && let Some(frame) = self.subs.next_replayed(who)
        {
            self.deliveries.increment(1);
            return Some(Message::Text(frame));
        }
        while self.gate_open() {
            match self.outbox.pop_item() {
                Some(Item::Event { sub, seq, frame }) => {
                    if self.subs.pass(who, sub, seq) {
                        self.deliveries.increment(1);
                        return Some(Message::Text(frame));
                    }
                }
                Some(Item::Lagged { sub }) => self.subs.lagged(who, sub),
                Some(Item::Removed { sub }) => {
                    if let Some(thread) = self.subs.drop_sub(sub) {
                        let error = Error::new(
                            Code::NotFound,
                            "you are no longer a member of this thread: its subscription has ended",
                        );
                        return Some(text(error_frame(None, Some(&thread), &error)));
                    }
                }
                Some(Item::Overrun) => self.overrun = true,
                Some(Item::Joined { thread, before }) if self.subs.follows() => {
                    // A failure here is one of the store; the thread is there again when the client resumes.
                    if !self.subs.contains(&thread)
                        && let Err(error) = self.subs.add(who, &thread, before, false)
                    {
                        return Some(text(error_frame(None, Some(&thread), &error)));
                    }
                }
                Some(Item::Joined { .. }) => {}
                None => break,
            }
        }
        self.subs.next_replayed(who).map(Message::Text).inspect(|_| self.deliveries.increment(1))
    }

    fn note_stall(&mut self) {
        let written = self.ws.get_ref().written();
        if self.stalled.is_none_or(|(_, then)| then != written) {
            self.stalled = Some((Instant::now(), written));
        }
    }

    fn on_message(&mut self, message: Message) -> Result<(), End> {
        self.heard = Instant::now();
        self.pinged = None;
        match message {
            Message::Text(text) => self.on_text(&text),
            Message::Binary(_) => Err(End::Close(1003, "frames are JSON text")),
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
        match command::split(text) {
            None => Err(End::Close(4501, "the frame is neither a JSON object nor an array of them")),
            Some(Err(error)) => {
                self.refuse(None, &error);
                Ok(())
            }
            Some(Ok(commands)) => {
                let commands = commands.as_slice();
                for (i, command) in commands.iter().enumerate() {
                    if !self.on_command(command)? {
                        self.backlog.extend(commands[i..].iter().map(|&command| command.to_owned()));
                        break;
                    }
                }
                Ok(())
            }
        }
    }

    /// Takes the answers that came in from elsewhere.
    fn on_answers(&mut self) -> Result<(), End> {
        while self.answers.len() < MAX_ANSWERS
            && let Some(answer) = self.outbox.pop_answer()
        {
            match answer {
                Answer::Publish { id, thread, verdict } => self.on_verdict(id, &thread, verdict),
                Answer::Threads(threads) => self.subscribe_all(threads),
                Answer::Drain => self.draining = true,
                Answer::Chunk { sub, events } => {
                    if let Some(who) = &self.who
                        && let Err((thread, error)) = self.subs.chunk(who, sub, events)
                    {
                        self.answers.push_back(text(error_frame(None, Some(&thread), &error)));
                    }
                }
            }
        }
        if self.overrun {
            return Err(End::Close(4001, "more threads were joined than could be noted: resume"));
        }
        if self.draining && self.in_flight == 0 && self.batch.is_empty() {
            return Err(End::Close(1001, "the server is going down: reconnect and resume"));
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

    fn on_verdict(&mut self, id: i64, thread: &str, verdict: Verdict) {
        self.in_flight -= 1;
        match verdict {
            Ok(it) => {
                self.published.increment(1);
                self.answer(&ServerFrame::Published {
                    id,
                    thread,
                    seq: it.seq,
                    event: it.event,
                    duplicate: it.duplicate,
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
            None if now >= self.started + CONNECT_WITHIN => return Err(End::Close(4004, "no connect in time")),
            None => {}
            Some(who) => {
                let wall = clock::now_s();
                if wall >= who.expires_at.saturating_add(jwt::LEEWAY) {
                    return Err(End::Close(4003, "the token has expired"));
                }
                if wall + EXPIRING_BEFORE >= who.expires_at && !self.told_expiring {
                    self.told_expiring = true;
                    let expires_at = clock::rfc3339(who.expires_at * 1000);
                    self.answer(&ServerFrame::Expiring { expires_at: &expires_at });
                }
            }
        }
        if self.stalled.is_some_and(|(since, _)| now >= since + STALLED_AFTER) {
            return Err(End::Close(4001, "the socket takes nothing"));
        }
        if !self.may_read() {
            // We do not listen now, so nothing can be heard.
            self.heard = now;
            self.pinged = None;
        }
        match self.pinged {
            Some(at) if now >= at + PONG_WITHIN => return Err(End::Close(4002, "no heartbeat")),
            None if now >= self.heard + PING_AFTER => {
                self.pinged = Some(now);
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
        beat.min(expiry).min(stall)
    }

    /// Says goodbye, and leaves nothing behind.
    async fn finish(mut self: Box<Session>, end: End) {
        self.subs.close();
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
                self.ws.send(Message::Close(Some(CloseFrame { code: code.into(), reason: reason.into() }))).await
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

pub(super) fn text(frame: String) -> Message {
    Message::Text(frame.into())
}

/// The close code for what the protocol layer found (RFC 6455, section 7.4.1).
fn end_of(error: &WsError) -> End {
    match error {
        WsError::Capacity(CapacityError::MessageTooLong { .. }) => End::Close(1009, "the frame is too large"),
        WsError::Utf8(_) => End::Close(1007, "the frame is not UTF-8"),
        WsError::Protocol(ProtocolError::ResetWithoutClosingHandshake) => End::Gone,
        WsError::Protocol(_) => End::Close(1002, "the frame is not WebSocket"),
        _ => End::Gone,
    }
}
