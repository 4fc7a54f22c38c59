//! One WebSocket session: a task that owns its socket and waits for whatever comes first.
//!
//! Invariants:
//! - commands take effect in the order sent: one that reads waits until the publishes before it are answered;
//! - every publish that was accepted is answered, also while the server drains;
//! - what waits is bounded: publishes in flight and answers (beyond these bounds the socket is not read), events by the
//!   outbox, replayed frames by the subscriptions. A socket that takes nothing is closed after 30 s;
//! - answers, errors and `expiring` overtake events; the order of events is that of [`crate::delivery::feed`];
//! - whatever can be read or written is, without waiting for the timer ([`Turn`]).

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use tokio::time::{Instant, Sleep};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::error::Error as WsError;
use tokio_tungstenite::tungstenite::protocol::CloseFrame;

use super::Sockets;
use super::close::{self, End};
use super::heartbeat::Facts;
use super::socket::Socket;
use super::state::SessionState;
use super::turn::{Step, Turn, Written};
use crate::auth::Principal;
use crate::delivery::subscriptions::Presence;
use crate::memory::Refused;
use crate::protocol::frame::ServerFrame;
use crate::{clock, panics, telemetry};

/// Time to write the last frames and the close frame.
const CLOSE_WITHIN: Duration = Duration::from_secs(2);

/// What the session's wait brought.
enum Wake {
    Frame(Result<Message, WsError>),
    /// The outbox may have answers.
    Answers,
    Timer,
    End(End),
}

pub struct Session {
    state: SessionState,
    ws: WebSocketStream<Socket>,
    turn: Turn,
    timer: Pin<Box<Sleep>>,
}

impl Session {
    pub fn new(
        sockets: Arc<Sockets>,
        ws: WebSocketStream<Socket>,
        who: Option<Principal>,
        traceparent: Option<&str>,
    ) -> Session {
        let state = SessionState::new(sockets, who, traceparent);
        let timer = Box::pin(tokio::time::sleep_until(state.due()));
        Session { state, ws, turn: Turn::default(), timer }
    }

    /// Serves the session until either side ends it.
    pub async fn run(mut self: Box<Session>) {
        let end = end_of(self.begin_and_serve()).await;
        // Boxed, so that a session does not reserve room for its end while it lasts.
        Box::pin(self.finish(end)).await;
    }

    /// The client offered no version of the protocol that is supported.
    pub async fn refuse_version(self: Box<Session>) {
        let end = End::close(close::UNSUPPORTED_VERSION, "the subprotocol is weft.v1");
        Box::pin(self.finish(end)).await;
    }

    async fn begin_and_serve(&mut self) -> End {
        self.state.register();
        self.charge_user();
        match self.state.begin(None) {
            Ok(()) => {
                self.timer.as_mut().reset(self.state.due());
                self.serve().await
            }
            Err(end) => end,
        }
    }

    async fn serve(&mut self) -> End {
        loop {
            let wake = std::future::poll_fn(|cx| self.poll(cx)).await;
            let was_known = self.state.who.is_some();
            let done = match wake {
                Wake::Frame(Ok(message)) => self.on_message(message),
                Wake::Frame(Err(error)) => Err(End::of_websocket(&error)),
                Wake::Answers => self.state.on_answers(),
                Wake::Timer => self.on_timer(),
                Wake::End(end) => Err(end),
            };
            if let Err(end) = done {
                return end;
            }
            // Whatever told who it is: a frame, or the answer of whoever was asked.
            if !was_known {
                self.charge_user();
            }
        }
    }

    /// The memory of large messages is the user's, if the user is known.
    fn charge_user(&mut self) {
        if let Some(who) = &self.state.who {
            self.ws.get_mut().belongs_to(&who.key);
        }
    }

    /// Reads, collects and writes in the order that [`Turn`] says, until there is something to deal with.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Wake> {
        if self.turn.begin() && self.timer.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Wake::Timer);
        }
        loop {
            if let Some(end) = self.must_end() {
                return Poll::Ready(Wake::End(end));
            }
            let wants = self.state.wants();
            if !wants.frames {
                self.ws.get_mut().is_not_read();
            }
            match self.turn.next(wants) {
                Step::Read => match self.poll_read(cx) {
                    Poll::Ready(Some(frame)) => {
                        self.turn.read_one();
                        return Poll::Ready(Wake::Frame(frame));
                    }
                    Poll::Ready(None) => return Poll::Ready(Wake::End(End::Gone)),
                    Poll::Pending => self.turn.read_all(),
                },
                Step::Submit => {
                    self.state.add_what_is_due();
                    self.state.incoming.batch.send();
                    self.turn.submitted();
                }
                Step::Collect => {
                    if self.state.outgoing.feed.outbox.has_answers() {
                        return Poll::Ready(Wake::Answers);
                    }
                    self.turn.collected_all();
                }
                Step::Write => {
                    let SessionState { outgoing, heartbeat, who, .. } = &mut self.state;
                    outgoing.feed.subs.written = self.ws.get_ref().written();
                    let Ok(written) = outgoing.poll_write(cx, &mut self.ws, who.as_ref()) else {
                        return Poll::Ready(Wake::End(End::Gone));
                    };
                    match written {
                        Written::All => heartbeat.flowing(),
                        Written::Blocked => heartbeat.stalled(Instant::now(), self.ws.get_ref().progress().taken),
                    }
                    self.turn.wrote(written);
                }
                Step::Watch => {
                    if self.state.outgoing.poll_filled(cx, self.turn.written()).is_ready() {
                        return Poll::Ready(Wake::Answers);
                    }
                    self.turn.watched();
                }
                Step::NextTurn => return Poll::Ready(Wake::Answers),
                Step::Sleep => return self.sleep(cx),
            }
        }
    }

    /// The next message. Those before it were dealt with: few commands wait, else nothing would be read.
    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Message, WsError>>> {
        self.ws.get_mut().dealt_with();
        self.ws.poll_next_unpin(cx)
    }

    /// What was read or written may be the end.
    fn must_end(&self) -> Option<End> {
        if self.ws.get_ref().flooded() {
            return Some(End::close(close::RATE_LIMITED, "a flood of frames that carry nothing"));
        }
        match self.ws.get_ref().short_of_memory() {
            Some(Refused::Full) => {
                let why = "no memory is left for a frame of this size: send it again later";
                return Some(End::close(close::UNAVAILABLE, why));
            }
            Some(Refused::TooLarge) => {
                return Some(End::close(close::TOO_LARGE, "a frame before the user is known has at most 16 KiB"));
            }
            None => {}
        }
        if self.ws.get_ref().is_message_overdue() {
            return Some(End::close(close::NO_HEARTBEAT, "a frame of over 16 KiB did not end within 20 s"));
        }
        if self.state.outgoing.feed.overrun {
            return Some(End::close(close::SLOW_CONSUMER, "more threads were joined than can wait: resume"));
        }
        None
    }

    fn sleep(&mut self, cx: &mut Context<'_>) -> Poll<Wake> {
        // Writing may have begun subscriptions whose receipts are to be stored.
        self.state.add_what_is_due();
        self.state.incoming.batch.send();

        let due = self.state.due();
        if due < self.timer.deadline() {
            self.timer.as_mut().reset(due);
        }
        self.timer.as_mut().poll(cx).map(|()| Wake::Timer)
    }

    fn on_message(&mut self, message: Message) -> Result<(), End> {
        self.state.heartbeat.heard(Instant::now());
        match message {
            Message::Text(text) => self.state.on_text(&text),
            Message::Binary(_) => Err(End::close(close::NOT_TEXT, "frames are JSON text")),
            Message::Close(_) => Err(End::Gone),
            Message::Ping(_) => {
                self.state.outgoing.pong_waits();
                Ok(())
            }
            Message::Pong(_) | Message::Frame(_) => Ok(()),
        }
    }

    fn on_timer(&mut self) -> Result<(), End> {
        let now = Instant::now();
        let client = self.client();
        let state = &mut self.state;
        let facts =
            Facts { now, wall: clock::now_s(), reading: state.wants().frames, peer: self.ws.get_ref().progress() };
        let due = state.heartbeat.on_timer(&facts)?;
        if let Some(expires_at) = due.expiring {
            let expires_at = clock::rfc3339(expires_at.saturating_mul(1000));
            state.outgoing.answer(&ServerFrame::Expiring { expires_at: &expires_at });
        }
        if due.ping {
            state.outgoing.ping();
        }

        let subs = &mut state.outgoing.feed.subs;
        if let Some(who) = &state.who
            && subs.due().is_some_and(|due| due <= now)
        {
            subs.on_due(who, client);
        }
        state.add_what_is_due();
        state.incoming.batch.send();

        let due = state.due();
        self.timer.as_mut().reset(due);
        Ok(())
    }

    fn client(&self) -> Presence {
        Presence { heard: self.state.heartbeat.last_heard(), taken: self.ws.get_ref().progress().taken }
    }

    /// Passes on what was accepted, leaves no subscription behind, and closes.
    async fn finish(mut self: Box<Session>, end: End) {
        let client = self.client();
        let Session { state, ws, .. } = &mut *self;
        state.outgoing.feed.subs.leave(client, end.is_by_server());
        state.incoming.flush_deltas(|_| true);
        state.incoming.batch.send();
        telemetry::closed(end.code()).increment(1);

        // Frames that do not leave in time are lost: the client resumes.
        match end {
            End::Close(code, reason) => {
                let goodbye = async {
                    while let Some(frame) = state.outgoing.pop_answer() {
                        ws.feed(frame).await?;
                    }
                    ws.send(Message::Close(Some(CloseFrame { code: code.into(), reason: (*reason).into() }))).await
                };
                drop(tokio::time::timeout(CLOSE_WITHIN, goodbye).await);
                self.ws.into_inner().linger().await;
            }
            // Sends the answer to the client's close frame, if that is what ended the session.
            End::Gone => drop(tokio::time::timeout(CLOSE_WITHIN, ws.flush()).await),
        }
    }
}

/// How serving a session ends, also when it panics.
async fn end_of(serving: impl Future<Output = End>) -> End {
    panics::catch_task(serving).await.unwrap_or_else(|_| End::failed())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_session_that_panics_is_closed_1011_and_one_that_ends_as_it_said() {
        assert_eq!(end_of(async { panic!("a bug") }).await.code(), 1011);
        assert_eq!(end_of(async { End::Gone }).await, End::Gone);
    }
}
