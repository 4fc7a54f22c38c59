//! What is on its way out: answers first, then what the feed has, written until the socket takes no more.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures_util::Sink;
use tokio_tungstenite::tungstenite::error::Error as WsError;
use tokio_tungstenite::tungstenite::protocol::frame::Frame;
use tokio_tungstenite::tungstenite::protocol::frame::coding::{Data, OpCode};
use tokio_tungstenite::tungstenite::{Bytes, Message, Utf8Bytes};

use super::taken::Taken;
use super::turn::Written;
use crate::auth::Principal;
use crate::delivery::feed::{Feed, Out};
use crate::delivery::outbox::Demand;
use crate::delivery::subscriptions::OutEvent;
use crate::protocol::error::Error;
use crate::protocol::frame::{ServerFrame, error_frame};
use crate::store::Store;

/// Answers that may wait for the socket; beyond that no commands are read and no answers collected.
pub const MAX_ANSWERS: usize = 1_024;

pub struct Outgoing {
    pub feed: Feed,
    /// Made with the first `consume`: most sessions take no work, and there are many of them.
    work: Option<Box<Taken>>,
    store: Arc<Store>,
    writer: FrameWriter,
}

impl Outgoing {
    pub fn new(feed: Feed, store: Arc<Store>) -> Outgoing {
        Outgoing { feed, work: None, store, writer: FrameWriter::default() }
    }

    /// The work that the session takes.
    pub fn work(&mut self) -> &mut Taken {
        self.work.get_or_insert_default()
    }

    pub fn answer(&mut self, frame: &ServerFrame<'_>) {
        self.push(frame.encode());
    }

    /// A signal that overtakes events, as answers do.
    pub fn signal(&mut self, frame: Utf8Bytes) {
        self.writer.answers.push_back(Message::Text(frame));
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

    /// The next answer, after what is left of a message that was begun.
    pub fn pop_answer(&mut self) -> Option<Message> {
        self.writer.pop()
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
        let Outgoing { feed, work, store, writer } = self;
        let next = || {
            let who = who?;
            let work = work.as_mut().and_then(|work| work.next(store, who));
            work.map(|frame| Message::Text(frame.into())).or_else(|| next_of_feed(feed, who))
        };
        writer.poll_write(cx, ws, next)
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
        Out::Event(OutEvent { frame, .. }) | Out::Notice(frame) => Message::Text(frame),
        Out::Ended { thread, error } => Message::Text(ended_frame(&thread, &error).into()),
    })
}

fn ended_frame(thread: &str, error: &Error) -> String {
    error_frame(None, Some(thread), error)
}

/// Text that is longer goes out as a message of several parts: the library copies what it writes, and keeps the room for
/// that.
const LONG: usize = 72 << 10;
/// The parts of a long message.
const PART: usize = 64 << 10;

/// Writes frames in their order, and flushes once there are no more.
#[derive(Default)]
struct FrameWriter {
    /// What goes before everything else, but for the rest of a message that was begun.
    answers: VecDeque<Message>,
    /// What is left of a long message; empty if there is none.
    rest: Bytes,
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
            let Some(frame) = self.pop().or_else(&mut next_event) else { break };
            let frame = self.first_part(frame);
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

impl FrameWriter {
    /// A message, or the first part of a long one.
    fn first_part(&mut self, message: Message) -> Message {
        match message {
            Message::Text(text) if text.len() > LONG => {
                self.rest = text.into();
                let part = self.rest.split_to(PART);
                Message::Frame(Frame::message(part, OpCode::Data(Data::Text), false))
            }
            message => message,
        }
    }

    /// What is left of a message that was begun, then answers.
    fn pop(&mut self) -> Option<Message> {
        self.next_part().or_else(|| self.answers.pop_front())
    }

    fn next_part(&mut self) -> Option<Message> {
        if self.rest.is_empty() {
            return None;
        }
        let part = self.rest.split_to(PART.min(self.rest.len()));
        Some(Message::Frame(Frame::message(part, OpCode::Data(Data::Continue), self.rest.is_empty())))
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
        FrameWriter { answers: answers.iter().map(|it| Message::text(*it)).collect(), ..FrameWriter::default() }
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

    /// Takes frames, and joins the parts of messages.
    #[derive(Default)]
    struct JoiningSocket {
        room: usize,
        parts: Vec<usize>,
        message: Vec<u8>,
        messages: Vec<usize>,
    }

    impl Sink<Message> for JoiningSocket {
        type Error = WsError;

        fn poll_ready(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Result<(), WsError>> {
            if self.room > 0 { Poll::Ready(Ok(())) } else { Poll::Pending }
        }

        fn start_send(mut self: Pin<&mut Self>, frame: Message) -> Result<(), WsError> {
            self.room -= 1;
            let frame = match frame {
                Message::Frame(frame) => frame,
                message => Frame::message(message.into_data(), OpCode::Data(Data::Text), true),
            };
            let continues = frame.header().opcode == OpCode::Data(Data::Continue);
            assert_eq!(continues, !self.message.is_empty(), "nothing between the parts of a message");
            self.parts.push(frame.payload().len());
            self.message.extend_from_slice(frame.payload());
            if frame.header().is_final {
                let message = std::mem::take(&mut self.message);
                self.messages.push(message.len());
            }
            Ok(())
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Result<(), WsError>> {
            Poll::Ready(Ok(()))
        }

        fn poll_close(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Result<(), WsError>> {
            Poll::Ready(Ok(()))
        }
    }

    #[test]
    fn a_long_message_goes_out_in_parts_that_nothing_interrupts() {
        let (mut cx, mut writer) = (Context::from_waker(Waker::noop()), writer(&[]));
        let lengths = [LONG, LONG + 1, 3 * PART, 10];
        let mut events: VecDeque<Message> = lengths.iter().map(|length| Message::text("x".repeat(*length))).collect();
        let mut socket = JoiningSocket { room: 2, ..JoiningSocket::default() };
        let mut write = |writer: &mut FrameWriter, socket: &mut JoiningSocket| {
            writer.poll_write(&mut cx, socket, || events.pop_front()).expect("the socket is open")
        };
        assert_eq!(write(&mut writer, &mut socket), Written::Blocked);
        // An answer that comes between two parts waits for the last one.
        writer.answers.push_back(Message::text("answer"));
        socket.room = 100;
        assert_eq!(write(&mut writer, &mut socket), Written::All);
        assert_eq!(socket.messages, [LONG, LONG + 1, 6, 3 * PART, 10]);
        assert!(socket.parts.iter().all(|part| *part <= LONG), "{:?}", socket.parts);
    }

    #[test]
    fn a_session_that_closes_finishes_the_message_that_it_has_begun() {
        let mut writer = writer(&["answer"]);
        let first = writer.first_part(Message::text("x".repeat(2 * LONG)));
        assert!(matches!(first, Message::Frame(_)));
        let mut rest: Vec<Message> = std::iter::from_fn(|| writer.pop()).collect();
        assert_eq!(rest.pop(), Some(Message::text("answer")));
        assert_eq!(rest.iter().map(|part| part.clone().into_data().len()).sum::<usize>() + PART, 2 * LONG);
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
