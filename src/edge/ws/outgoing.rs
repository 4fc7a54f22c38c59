//! What is on its way out: answers first, then what the feed has, written until the socket takes no more.

use std::collections::VecDeque;
use std::pin::Pin;
use std::task::{Context, Poll};

use futures_util::Sink;
use tokio_tungstenite::tungstenite::error::Error as WsError;
use tokio_tungstenite::tungstenite::{Bytes, Message};

use super::turn::Written;
use crate::auth::Principal;
use crate::delivery::feed::{Feed, Out};
use crate::delivery::outbox::Demand;
use crate::protocol::error::Error;
use crate::protocol::frame::{ServerFrame, error_frame};

/// Answers that may wait for the socket; beyond that no commands are read and no answers collected.
pub const MAX_ANSWERS: usize = 1_024;

pub struct Outgoing {
    pub feed: Feed,
    writer: FrameWriter,
}

impl Outgoing {
    pub fn new(feed: Feed) -> Outgoing {
        Outgoing { feed, writer: FrameWriter::default() }
    }

    pub fn answer(&mut self, frame: &ServerFrame<'_>) {
        self.push(frame.encode());
    }

    /// The refusal of a command, by its id.
    pub fn refuse(&mut self, id: Option<i64>, error: &Error) {
        self.push(error_frame(id, None, error));
    }

    /// Says that the subscription to a thread has ended, or did not begin.
    pub fn ended(&mut self, thread: &str, error: &Error) {
        self.push(ended_frame(thread, error));
    }

    pub fn ping(&mut self) {
        self.writer.answers.push_back(Message::Ping(Bytes::new()));
    }

    /// The WebSocket library holds the answer to a ping: it is written with the next flush.
    pub fn pong_waits(&mut self) {
        self.writer.unflushed = true;
    }

    /// Whether there is room for more answers.
    pub fn has_room(&self) -> bool {
        self.writer.answers.len() < MAX_ANSWERS
    }

    pub fn pop_answer(&mut self) -> Option<Message> {
        self.writer.answers.pop_front()
    }

    /// Writes what there is; events go to the user.
    pub fn poll_write<S>(
        &mut self,
        cx: &mut Context<'_>,
        ws: &mut S,
        who: Option<&Principal>,
    ) -> Result<Written, WsError>
    where
        S: Sink<Message, Error = WsError> + Unpin,
    {
        let feed = &mut self.feed;
        self.writer.poll_write(cx, ws, || next_of_feed(feed, who?))
    }

    /// Ready if the outbox has something to collect or, unless the socket is blocked, to write.
    pub fn poll_filled(&self, cx: &mut Context<'_>, written: Option<Written>) -> Poll<()> {
        let demand = match written {
            Some(Written::All) => self.feed.wanted(),
            Some(Written::Blocked) | None => Demand::None,
        };
        self.feed.outbox.poll_filled(cx, demand)
    }

    fn push(&mut self, frame: String) {
        self.writer.answers.push_back(Message::Text(frame.into()));
    }
}

fn next_of_feed(feed: &mut Feed, who: &Principal) -> Option<Message> {
    Some(match feed.next(who)? {
        Out::Event { frame, .. } | Out::Notice(frame) => Message::Text(frame),
        Out::Ended { thread, error } => Message::Text(ended_frame(&thread, &error).into()),
    })
}

fn ended_frame(thread: &str, error: &Error) -> String {
    error_frame(None, Some(thread), error)
}

/// Writes frames in their order, and flushes once there are no more.
#[derive(Default)]
struct FrameWriter {
    /// What goes before everything else.
    answers: VecDeque<Message>,
    /// The library holds bytes that the socket has not been asked to take.
    unflushed: bool,
}

impl FrameWriter {
    fn poll_write<S>(
        &mut self,
        cx: &mut Context<'_>,
        ws: &mut S,
        mut next_event: impl FnMut() -> Option<Message>,
    ) -> Result<Written, WsError>
    where
        S: Sink<Message, Error = WsError> + Unpin,
    {
        let mut ws = Pin::new(ws);
        loop {
            // Asked before a frame is taken: what the socket does not take stays where it can be dropped or overtaken.
            match ws.as_mut().poll_ready(cx) {
                Poll::Ready(ready) => ready?,
                Poll::Pending => return Ok(Written::Blocked),
            }
            let Some(frame) = self.answers.pop_front().or_else(&mut next_event) else { break };
            ws.as_mut().start_send(frame)?;
            self.unflushed = true;
        }

        if self.unflushed {
            match ws.poll_flush(cx) {
                Poll::Ready(flushed) => flushed?,
                Poll::Pending => return Ok(Written::Blocked),
            }
            self.unflushed = false;
        }
        Ok(Written::All)
    }
}

#[cfg(test)]
mod tests {
    use std::task::Waker;

    use super::*;

    /// A socket that takes so many frames and then no more.
    #[derive(Default)]
    struct FakeSocket {
        room: usize,
        /// Frames sent and not flushed.
        buffered: Vec<String>,
        taken: Vec<String>,
        flushes: usize,
        broken: bool,
    }

    impl Sink<Message> for FakeSocket {
        type Error = WsError;

        fn poll_ready(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Result<(), WsError>> {
            match (self.broken, self.room > self.buffered.len()) {
                (true, _) => Poll::Ready(Err(WsError::ConnectionClosed)),
                (false, true) => Poll::Ready(Ok(())),
                (false, false) => Poll::Pending,
            }
        }

        fn start_send(mut self: Pin<&mut Self>, frame: Message) -> Result<(), WsError> {
            self.buffered.push(frame.to_string());
            Ok(())
        }

        fn poll_flush(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Result<(), WsError>> {
            if self.room < self.buffered.len() {
                return Poll::Pending;
            }
            self.flushes += 1;
            self.room -= self.buffered.len();
            let taken = std::mem::take(&mut self.buffered);
            self.taken.extend(taken);
            Poll::Ready(Ok(()))
        }

        fn poll_close(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Result<(), WsError>> {
            Poll::Ready(Ok(()))
        }
    }

    fn writer(answers: &[&str]) -> FrameWriter {
        FrameWriter { answers: answers.iter().map(|it| Message::text(*it)).collect(), unflushed: false }
    }

    fn write(writer: &mut FrameWriter, socket: &mut FakeSocket, events: &mut VecDeque<&'static str>) -> Written {
        let mut cx = Context::from_waker(Waker::noop());
        writer.poll_write(&mut cx, socket, || events.pop_front().map(Message::text)).expect("the socket is open")
    }

    #[test]
    fn answers_go_before_events_and_one_flush_sends_them_all() {
        let (mut writer, mut events) = (writer(&["a1", "a2"]), VecDeque::from(["e1", "e2"]));
        let mut socket = FakeSocket { room: 10, ..FakeSocket::default() };
        assert_eq!(write(&mut writer, &mut socket, &mut events), Written::All);
        assert_eq!((socket.taken.join(" "), socket.flushes), ("a1 a2 e1 e2".into(), 1));
        assert_eq!(write(&mut writer, &mut socket, &mut events), Written::All);
        assert_eq!(socket.flushes, 1, "nothing to flush");
    }

    #[test]
    fn a_socket_that_takes_no_more_leaves_frames_where_they_are_so_that_later_answers_overtake_events() {
        let (mut writer, mut events) = (writer(&["a1"]), VecDeque::from(["e1", "e2", "e3"]));
        let mut socket = FakeSocket { room: 2, ..FakeSocket::default() };
        assert_eq!(write(&mut writer, &mut socket, &mut events), Written::Blocked);
        assert_eq!((socket.buffered.join(" "), events.len()), ("a1 e1".into(), 2));
        writer.answers.push_back(Message::text("a2"));
        socket.room = 10;
        assert_eq!(write(&mut writer, &mut socket, &mut events), Written::All);
        assert_eq!(socket.taken, ["a1", "e1", "a2", "e2", "e3"]);
    }

    #[test]
    fn a_pong_that_the_library_holds_is_flushed_without_a_frame_of_ours() {
        let (mut writer, mut events) = (writer(&[]), VecDeque::new());
        let mut socket = FakeSocket { room: 1, buffered: vec!["pong".into()], ..FakeSocket::default() };
        socket.room = 2;
        assert_eq!(write(&mut writer, &mut socket, &mut events), Written::All);
        assert_eq!(socket.flushes, 0);
        writer.unflushed = true;
        assert_eq!(write(&mut writer, &mut socket, &mut events), Written::All);
        assert_eq!((socket.taken.join(" "), writer.unflushed), ("pong".into(), false));
    }

    #[test]
    fn a_flush_that_does_not_finish_is_tried_again() {
        let (mut writer, mut events) = (writer(&[]), VecDeque::new());
        let mut socket = FakeSocket { room: 3, buffered: vec!["half".into(); 2], ..FakeSocket::default() };
        writer.unflushed = true;
        socket.room = 3;
        writer.answers.push_back(Message::text("a1"));
        assert_eq!(write(&mut writer, &mut socket, &mut events), Written::Blocked, "full, asked for the next frame");
        assert!(writer.unflushed);
        socket.room = 4;
        assert_eq!(write(&mut writer, &mut socket, &mut events), Written::All);
        assert_eq!((socket.taken.len(), writer.unflushed), (3, false));
    }

    #[test]
    fn a_broken_socket_is_an_error() {
        let mut cx = Context::from_waker(Waker::noop());
        let mut socket = FakeSocket { broken: true, ..FakeSocket::default() };
        assert!(writer(&["a1"]).poll_write(&mut cx, &mut socket, || None).is_err());
    }
}
