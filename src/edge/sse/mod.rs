//! A thread as Server-Sent Events (HTML Living Standard, section 9.2), for clients that only listen. Events come the same
//! way from the store to the live feed as those of a WebSocket session.

pub mod agui;

use std::collections::VecDeque;
use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context as Task, Poll};
use std::time::Duration;

use futures_util::Stream;
use tokio::time::{Instant, Sleep};
use warp::Reply as _;
use warp::reply::Response;
use warp::sse::{self, Event};

use super::cursor::{beyond_head, first_cursor, name_epoch, recovers};
use super::http::request::{Query, Request};
use crate::auth::{Authenticator, Principal, Rights};
use crate::delivery::Delivery;
use crate::delivery::feed::{Feed, Out};
use crate::delivery::outbox::{Answer, Demand};
use crate::delivery::registry::{Registration, Registry};
use crate::delivery::subscriptions::{Choice, NewSubscription, OutEvent};
use crate::memory::{Charge, LARGEST, Pool, Refused};
use crate::protocol::error::{Code, Error};
use crate::protocol::event::without_type;
use crate::protocol::http::{Problem, StreamStart, Transport};
use crate::protocol::ids::ThreadAddress;
use crate::protocol::json;
use crate::store::Store;
use crate::{clock, panics};

/// A comment after so much silence, so that both sides notice when the other is gone.
const HEARTBEAT: Duration = Duration::from_secs(15);
/// The longest wait before the token's end is looked at again.
const MAX_WAIT_S: u64 = 86_400;

/// How often an event is in memory while it is sent: as a line, as a part of the body, and while one becomes the other.
const COPIES: usize = 3;
/// What takes no more is not charged.
const FREE: usize = 64 << 10;
/// When to come back if there was none.
const RETRY_MS: u64 = 5_000;
/// How long an event waits for memory.
const MEMORY_WITHIN: Duration = Duration::from_secs(30);

/// What streams work with.
pub struct Streams {
    pub auth: Arc<Authenticator>,
    pub rights: Rights,
    pub delivery: Arc<Delivery>,
    pub registry: Arc<Registry>,
    pub store: Arc<Store>,
    /// The log's, which seqs are of.
    pub epoch: String,
    /// What streams hold is charged to it.
    pub memory: Pool,
}

/// What the events of a thread become on their way out.
pub trait EventFormat: Send + Sync + Unpin + 'static {
    /// Appends what an event becomes to `out`.
    fn event(&mut self, event: &OutEvent, out: &mut VecDeque<Event>) -> AfterEvent;
    /// About how many bytes an event frame takes while what it becomes is sent.
    fn memory(&self, frame: &str) -> usize;
    /// The last event of a stream that an error ends.
    fn error(&mut self, error: &Error) -> Event;
}

/// How a stream goes on after an event.
pub enum AfterEvent {
    Continue,
    /// The texts of messages that are being written are needed once more.
    Rejoin,
    End,
}

/// `GET /v1/threads/{thread}/stream`
pub async fn stream(streams: Arc<Streams>, it: Request) -> Result<Response, Error> {
    let query = it.query(&["after", "epoch", "ticket"])?;
    let address = it.address()?;
    let (cursor, begin) = streams.rights.read(&it.who, &address.name, |head| {
        let start = RequestedStart::read(&it, &query, head, &streams.epoch)?;
        let cursor = first_cursor(head, start.after, None, start.recovered)?;
        let begin = query.text("epoch").map(|_| {
            let (thread, epoch) = (&*address.called, &*streams.epoch);
            let begin = StreamStart { thread, epoch, head, after: cursor, recovered: start.recovered };
            Event::default().event("subscribed").data(json::encode(&begin))
        });
        Ok((cursor, begin))
    })?;
    drop(query);
    streams.start(it.who, address, cursor, begin, PlainFormat)
}

/// Where a client wants a stream to begin.
pub struct RequestedStart {
    /// After this seq.
    pub after: Option<u64>,
    /// The client comes back, and has seen all up to there.
    pub resumes: bool,
    /// That is a seq of this log, as far as the client says.
    pub recovered: bool,
}

impl RequestedStart {
    /// `epoch` is the log's. Where the client's is another one, what it has seen is not looked at.
    pub fn read(it: &Request, query: &Query<'_>, head: u64, epoch: &str) -> Result<RequestedStart, Error> {
        let recovered = recovers(query.text("epoch"), epoch);
        // What a client that comes back has seen is newer than what it first asked for.
        let last = it.header("Last-Event-ID")?.filter(|id| !id.is_empty());
        let (field, after) = match last {
            Some(id) => ("Last-Event-ID", Some(last_event_id(id)?)),
            None => ("after", query.number("after")?),
        };
        match after {
            Some(after) if recovered && after > head => Err(beyond_head(field, after, head)),
            _ => Ok(RequestedStart { after, resumes: last.is_some(), recovered }),
        }
    }
}

fn last_event_id(id: &str) -> Result<u64, Error> {
    let refuse = |_| Error::field("Last-Event-ID", format!("Last-Event-ID must be the seq of an event, not {id:.60}"));
    id.parse().map_err(refuse)
}

impl Streams {
    /// Answers with the events of a thread after `cursor`, and `begin` before them.
    fn start(
        &self,
        who: Principal,
        address: ThreadAddress,
        cursor: u64,
        begin: Option<Event>,
        format: impl EventFormat,
    ) -> Result<Response, Error> {
        let feed = self.delivery.feed();
        let connection = clock::random_id().simple().to_string();
        let registration = self.registry.register(&feed.outbox, &connection, Transport::Sse);
        registration.identify(&who)?;
        // Looked up again: from here on a revocation ends the stream, one just before it would not have.
        self.auth.check_revoked(&who)?;

        let mut stream = ThreadStream {
            auth: self.auth.clone(),
            feed,
            timer: Box::pin(tokio::time::sleep(Duration::ZERO)),
            ended: false,
            thread: address.name.clone(),
            who,
            format,
            ready: begin.into_iter().collect(),
            memory: self.memory.clone(),
            charge: None,
            large: None,
            registration,
        };
        let wanted =
            NewSubscription { address, cursor, named: true, choice: Choice::default(), receipt: None, pace: None };
        stream.feed.subs.add(&stream.who, wanted)?;

        let mut reply = sse::reply(sse::keep_alive().interval(HEARTBEAT).stream(stream)).into_response();
        reply.headers_mut().insert("x-accel-buffering", warp::http::HeaderValue::from_static("no"));
        name_epoch(reply.headers_mut(), &self.epoch);
        Ok(reply)
    }
}

/// JSON in one line. Between its tokens a carriage return is white space, to this format it ends a line.
pub fn line(json: &str) -> String {
    json.replace(['\r', '\n'], " ")
}

/// The events as they are.
struct PlainFormat;

impl EventFormat for PlainFormat {
    fn event(&mut self, event: &OutEvent, out: &mut VecDeque<Event>) -> AfterEvent {
        let line = Event::default().data(line(&without_type(&event.frame)));
        // Without an id of its own a client keeps the last one, and resumes after that.
        out.push_back(match event.seq {
            Some(seq) => line.id(seq.to_string()),
            None => line,
        });
        AfterEvent::Continue
    }

    fn memory(&self, frame: &str) -> usize {
        frame.len() * COPIES
    }

    /// An event named `error`.
    fn error(&mut self, error: &Error) -> Event {
        Event::default().event("error").data(json::encode(&Problem::of(error)))
    }
}

/// An event that takes much memory, and waits for that.
struct Large {
    event: OutEvent,
    charged: Pin<Box<dyn Future<Output = Result<Charge, Refused>> + Send + Sync>>,
}

/// The events of one thread, until the right to read it ends, or the server.
struct ThreadStream<F> {
    auth: Arc<Authenticator>,
    feed: Feed,
    who: Principal,
    thread: String,
    format: F,
    /// What the newest event became, as far as it was not sent.
    ready: VecDeque<Event>,
    memory: Pool,
    /// What is charged for `ready`, and for the last event that was taken from there.
    charge: Option<Charge>,
    /// The next event, which waits for memory.
    large: Option<Large>,
    timer: Pin<Box<Sleep>>,
    ended: bool,
    #[expect(dead_code, reason = "held for as long as the stream lasts")]
    registration: Registration,
}

impl<F: EventFormat> Stream for ThreadStream<F> {
    type Item = Result<Event, Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Task<'_>) -> Poll<Option<Self::Item>> {
        let fail = |this: &mut Self, error: &Error| {
            this.ready.clear();
            this.end(error);
            this.ready.pop_front()
        };
        poll_or_fail(&mut *self, |this| this.poll_event(cx), fail).map(|event| event.map(Ok))
    }
}

/// A stream that panics ends with an error; where not even that can be said, it just ends.
fn poll_or_fail<S, E>(
    stream: &mut S,
    poll: impl FnOnce(&mut S) -> Poll<Option<E>>,
    fail: impl FnOnce(&mut S, &Error) -> Option<E>,
) -> Poll<Option<E>> {
    panics::catch(|| poll(stream))
        .or_else(|error| panics::catch(|| Poll::Ready(fail(stream, &error))))
        .unwrap_or(Poll::Ready(None))
}

impl<F: EventFormat> ThreadStream<F> {
    fn poll_event(&mut self, cx: &mut Task<'_>) -> Poll<Option<Event>> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Poll::Ready(Some(event));
            }
            self.charge = None;
            if self.ended {
                return Poll::Ready(None);
            }
            if self.poll_large(cx) || self.advance() {
                continue;
            }
            let wanted = if self.large.is_some() { Demand::None } else { self.feed.wanted() };
            if self.feed.outbox.poll_filled(cx, wanted).is_ready() {
                continue;
            }

            let left = self.who.ends_at().saturating_sub(clock::now_s());
            if left == 0 {
                self.end(&Error::new(Code::Unauthenticated, "the token has expired"));
                continue;
            }
            self.timer.as_mut().reset(Instant::now() + Duration::from_secs(left.min(MAX_WAIT_S)));
            if self.timer.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
        }
    }

    /// Sends the event that waits for memory, if that is there now; `false` if not.
    fn poll_large(&mut self, cx: &mut Task<'_>) -> bool {
        let Some(large) = &mut self.large else { return false };
        let Poll::Ready(charged) = large.charged.as_mut().poll(cx) else { return false };
        let Some(Large { event, .. }) = self.large.take() else { return false };
        match charged {
            Ok(charge) => {
                self.charge = Some(charge);
                self.send(&event);
            }
            Err(_) => {
                let why = "the server has had no memory left for this stream: come back later";
                self.end(&Error::new(Code::Unavailable, why).retry_after(RETRY_MS));
            }
        }
        true
    }

    /// Does what is next without waiting; `false` if there is nothing.
    fn advance(&mut self) -> bool {
        while let Some(answer) = self.feed.outbox.pop_answer() {
            self.on_answer(answer);
            if self.ended {
                return true;
            }
        }
        if self.large.is_some() {
            return false;
        }
        match self.feed.next(&self.who) {
            Some(Out::Event(event)) => self.on_event(event),
            // A client that only listens does not need to know where the replay ends or that it lagged.
            Some(Out::Notice(_)) => {}
            Some(Out::Ended { error, .. }) => self.end(&error),
            None => return false,
        }
        true
    }

    /// An event is sent, once there is memory for what it becomes.
    fn on_event(&mut self, event: OutEvent) {
        let bytes = self.format.memory(&event.frame).min(LARGEST);
        if bytes <= FREE {
            return self.send(&event);
        }
        let (memory, user) = (self.memory.clone(), self.who.key.clone());
        let charged = Box::pin(async move { memory.charge(&user, bytes, MEMORY_WITHIN).await });
        self.large = Some(Large { event, charged });
    }

    fn send(&mut self, event: &OutEvent) {
        let done = match self.format.event(event, &mut self.ready) {
            AfterEvent::Continue => Ok(()),
            // After this event, and not after what was read together with it.
            AfterEvent::Rejoin => self.feed.subs.restart(&self.who, &self.thread, event.seq.unwrap_or(0)),
            AfterEvent::End => {
                self.ended = true;
                Ok(())
            }
        };
        if let Err(error) = done {
            self.end(&error);
        }
    }

    fn on_answer(&mut self, answer: Answer) {
        match answer {
            Answer::Chunk { sub, read } => {
                if let Err((_, error)) = self.feed.subs.chunk(&self.who, sub, read) {
                    self.end(&error);
                }
            }
            Answer::Drain { retry_after_ms } => {
                let retry = Event::default().retry(Duration::from_millis(retry_after_ms));
                self.ready.push_back(retry.comment("the server is going down"));
                self.ended = true;
            }
            Answer::Left { thread } => {
                if let Some((_, error)) = self.feed.left(&self.who, &thread).into_iter().next() {
                    self.end(&error);
                }
            }
            Answer::Revoked => {
                if let Err(error) = self.auth.check_revoked(&self.who) {
                    self.end(&error);
                }
            }
            _ => {}
        }
    }

    /// Ends the stream with an event that says why.
    fn end(&mut self, error: &Error) {
        self.ended = true;
        self.ready.push_back(self.format.error(error));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_that_panics_ends_with_an_error_or_just_ends() {
        let bug = |_: &mut ()| -> Poll<Option<Code>> { panic!("a bug") };
        let code = |_: &mut (), error: &Error| Some(error.code);
        assert_eq!(poll_or_fail(&mut (), bug, code), Poll::Ready(Some(Code::Internal)));
        assert_eq!(poll_or_fail(&mut (), bug, |_, _| panic!("another bug")), Poll::Ready(None));
        assert_eq!(poll_or_fail(&mut (), |_| Poll::Pending, code), Poll::Pending);
    }
}
