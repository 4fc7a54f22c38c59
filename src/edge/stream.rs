//! A thread as Server-Sent Events (HTML Living Standard, section 9.2): the same road from the store to the live feed as a
//! WebSocket session's, for clients that only listen.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context as Task, Poll};
use std::time::Duration;

use std::future::Future;

use futures_util::Stream;
use tokio::time::{Instant, Sleep};
use warp::Reply as _;
use warp::reply::Response;
use warp::sse::{self, Event};

use super::Context;
use super::feed::{Feed, Out};
use super::http::Request;
use super::reply::{header_text, query};
use super::subscriptions::Wanted;
use super::threads::address;
use crate::access;
use crate::error::{Code, Error};
use crate::event::without_type;
use crate::identity::{Principal, jwt};
use crate::outbox::Answer;
use crate::sessions::{Entered, Transport};
use crate::wire::Problem;
use crate::{clock, telemetry};

/// A comment after so much silence, so that both sides notice when the other is gone.
const HEARTBEAT: Duration = Duration::from_secs(15);

/// `GET /v1/threads/{t}/stream`
pub fn open(it: &Request, thread: &str) -> Result<Response, Error> {
    let who = it.who()?;
    access::read(who.scopes)?;
    let query = query(&it.query, &["after"])?;
    let (called, thread) = address(&who, thread)?;
    let head = it.ctx.readable(&who, &thread)?;
    // What a client that comes back has seen is newer than what it first asked for.
    let (field, after) = match header_text(&it.headers, "Last-Event-ID")?.filter(|id| !id.is_empty()) {
        Some(id) => {
            let seq = id.parse().map_err(|_| Error::field("Last-Event-ID", "Last-Event-ID is the seq of an event"))?;
            ("Last-Event-ID", Some(seq))
        }
        None => ("after", query.number("after")?),
    };
    let cursor = after.unwrap_or(head);
    if cursor > head {
        let why = format!("{field} is behind the thread's head, {head}");
        return Err(Error::new(Code::CursorInvalid, why).at(field));
    }
    let feed = Feed::new(&it.ctx);
    let connection = clock::random_id().simple().to_string();
    let entered = it.ctx.sessions.enter(&feed.outbox, &connection, Transport::Sse);
    entered.identify(&who)?;
    it.ctx.check_revoked(&who)?;
    let mut stream = Thread {
        ctx: it.ctx.clone(),
        feed,
        timer: Box::pin(tokio::time::sleep(Duration::ZERO)),
        ended: false,
        who,
        entered,
    };
    let wanted = Wanted { called, cursor, named: true, kinds: None, receipt: None };
    stream.feed.subs.add(&stream.who, wanted)?;
    let mut reply = sse::reply(sse::keep_alive().interval(HEARTBEAT).stream(stream)).into_response();
    reply.headers_mut().insert("x-accel-buffering", warp::http::HeaderValue::from_static("no"));
    telemetry::http_requests("stream", 200).increment(1);
    Ok(reply)
}

/// The event in one line. Between JSON's tokens a carriage return is white space, to this format it ends a line.
fn line(frame: &str) -> String {
    without_type(frame).replace(['\r', '\n'], " ")
}

/// The events of one thread, until the right to read it ends, or the server.
struct Thread {
    ctx: Arc<Context>,
    feed: Feed,
    who: Principal,
    timer: Pin<Box<Sleep>>,
    ended: bool,
    #[expect(dead_code, reason = "held for as long as the stream lasts")]
    entered: Entered,
}

impl Stream for Thread {
    type Item = Result<Event, Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Task<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        loop {
            if this.ended {
                return Poll::Ready(None);
            }
            while let Some(answer) = this.feed.outbox.pop_answer() {
                if let Some(last) = this.on_answer(answer) {
                    return Poll::Ready(Some(Ok(last)));
                }
            }
            match this.feed.next(&this.who) {
                Some(Out::Event { seq, frame }) => {
                    let event = Event::default().data(line(&frame));
                    // Without an id of its own a client keeps the last one: it resumes behind that.
                    return Poll::Ready(Some(Ok(match seq {
                        Some(seq) => event.id(seq.to_string()),
                        None => event,
                    })));
                }
                // Where the replay ends and whether it fell behind makes no difference to who only listens.
                Some(Out::Notice(_)) => continue,
                Some(Out::Ended { error, .. }) => return Poll::Ready(Some(Ok(this.end(&error)))),
                None => {}
            }
            if this.feed.outbox.poll_filled(cx, this.feed.wanted()).is_ready() {
                continue;
            }
            let left = this.who.expires_at.saturating_add(jwt::LEEWAY).saturating_sub(clock::now_s());
            if left == 0 {
                return Poll::Ready(Some(Ok(this.end(&Error::new(Code::Unauthenticated, "the token has expired")))));
            }
            // Looked at again after at most a day.
            this.timer.as_mut().reset(Instant::now() + Duration::from_secs(left.min(86_400)));
            if this.timer.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
        }
    }
}

impl Thread {
    /// The last event, if the answer is the end.
    fn on_answer(&mut self, answer: Answer) -> Option<Event> {
        match answer {
            Answer::Chunk { sub, read } => {
                let (_, error) = self.feed.subs.chunk(&self.who, sub, read).err()?;
                Some(self.end(&error))
            }
            Answer::Drain { retry_after_ms } => {
                self.ended = true;
                Some(Event::default().retry(Duration::from_millis(retry_after_ms)).comment("the server is going down"))
            }
            Answer::Left { thread } => {
                let (_, error) = self.feed.left(&self.who, &thread).into_iter().next()?;
                Some(self.end(&error))
            }
            Answer::Revoked => {
                let refused = self.ctx.check_revoked(&self.who).err()?;
                Some(self.end(&refused))
            }
            _ => None,
        }
    }

    /// Says why, as an event named `error`.
    fn end(&mut self, error: &Error) -> Event {
        self.ended = true;
        // Strings and numbers always serialise.
        Event::default().event("error").data(serde_json::to_string(&Problem::of(error)).unwrap_or_default())
    }
}
