//! A thread as Server-Sent Events (HTML Living Standard, section 9.2): the same road from the store to the live feed as a
//! WebSocket session's, for clients that only listen.

pub mod agui;

use std::collections::VecDeque;
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
use super::http::reply::{Query, header_text, query};
use super::http::threads::address;
use super::routes::Request;
use crate::auth::scopes;
use crate::auth::{Principal, jwt};
use crate::delivery::feed::{Feed, Out};
use crate::delivery::outbox::Answer;
use crate::delivery::registry::Registration;
use crate::delivery::subscriptions::NewSubscription;
use crate::protocol::error::{Code, Error};
use crate::protocol::event::without_type;
use crate::protocol::http::{Problem, Transport};
use crate::protocol::ids;
use crate::{clock, telemetry};

/// A comment after so much silence, so that both sides notice when the other is gone.
const HEARTBEAT: Duration = Duration::from_secs(15);

/// What the events of a thread become on their way out.
pub trait Form: Send + Sync + Unpin + 'static {
    /// Puts what an event frame becomes behind what waits in `out`.
    fn event(&mut self, seq: Option<u64>, frame: &str, out: &mut VecDeque<Event>) -> After;
    /// What is said when an error ends the stream.
    fn error(&mut self, error: &Error) -> Event;
}

/// How a stream goes on behind an event.
pub enum After {
    On,
    /// The texts of messages that are being written are wanted once more.
    Again,
    End,
}

/// `GET /v1/threads/{t}/stream`
pub fn open(it: &Request, thread: &str) -> Result<Response, Error> {
    let who = it.who()?;
    scopes::read(who.scopes)?;
    let query = query(&it.query, &["after"])?;
    let (called, thread) = address(&who, thread)?;
    let head = it.ctx.rights.readable(&who, &thread)?;
    let Begin { after, .. } = Begin::of(it, &query, head)?;
    start(it, "stream", who, called, after.unwrap_or(head), Plain)
}

/// Where a client wants a stream to begin.
pub struct Begin {
    /// The seq behind which.
    pub after: Option<u64>,
    /// It comes back, and has seen all up to there.
    pub resumes: bool,
}

impl Begin {
    pub fn of(it: &Request, query: &Query<'_>, head: u64) -> Result<Begin, Error> {
        // What a client that comes back has seen is newer than what it first asked for.
        let last = header_text(&it.headers, "Last-Event-ID")?.filter(|id| !id.is_empty());
        let (field, after) = match last {
            Some(id) => {
                let seq =
                    id.parse().map_err(|_| Error::field("Last-Event-ID", "Last-Event-ID is the seq of an event"))?;
                ("Last-Event-ID", Some(seq))
            }
            None => ("after", query.number("after")?),
        };
        if after.is_some_and(|after| after > head) {
            let why = format!("{field} is behind the thread's head, {head}");
            return Err(Error::new(Code::CursorInvalid, why).at(field));
        }
        Ok(Begin { after, resumes: last.is_some() })
    }
}

/// Answers with the events of a thread behind `cursor`.
pub fn start(
    it: &Request,
    route: &'static str,
    who: Principal,
    called: String,
    cursor: u64,
    form: impl Form,
) -> Result<Response, Error> {
    let feed = it.ctx.delivery.feed();
    let connection = clock::random_id().simple().to_string();
    let registration = it.ctx.registry.register(&feed.outbox, &connection, Transport::Sse);
    registration.identify(&who)?;
    it.ctx.auth.check_revoked(&who)?;
    let mut stream = Thread {
        ctx: it.ctx.clone(),
        feed,
        timer: Box::pin(tokio::time::sleep(Duration::ZERO)),
        ended: false,
        thread: ids::resolve(&who.user, &called).into_owned(),
        who,
        form,
        ready: VecDeque::new(),
        registration,
    };
    let wanted = NewSubscription { called, cursor, named: true, kinds: None, receipt: None };
    stream.feed.subs.add(&stream.who, wanted)?;
    let mut reply = sse::reply(sse::keep_alive().interval(HEARTBEAT).stream(stream)).into_response();
    reply.headers_mut().insert("x-accel-buffering", warp::http::HeaderValue::from_static("no"));
    telemetry::http_requests(route, 200).increment(1);
    Ok(reply)
}

/// JSON in one line. Between its tokens a carriage return is white space, to this format it ends a line.
pub fn line(json: &str) -> String {
    json.replace(['\r', '\n'], " ")
}

/// The events as they are.
struct Plain;

impl Form for Plain {
    fn event(&mut self, seq: Option<u64>, frame: &str, out: &mut VecDeque<Event>) -> After {
        let event = Event::default().data(line(&without_type(frame)));
        // Without an id of its own a client keeps the last one: it resumes behind that.
        out.push_back(match seq {
            Some(seq) => event.id(seq.to_string()),
            None => event,
        });
        After::On
    }

    /// An event named `error`.
    fn error(&mut self, error: &Error) -> Event {
        // Strings and numbers always serialise.
        Event::default().event("error").data(serde_json::to_string(&Problem::of(error)).unwrap_or_default())
    }
}

/// The events of one thread, until the right to read it ends, or the server.
struct Thread<F> {
    ctx: Arc<Context>,
    feed: Feed,
    who: Principal,
    thread: String,
    form: F,
    /// What the newest event became, as far as it was not sent.
    ready: VecDeque<Event>,
    timer: Pin<Box<Sleep>>,
    ended: bool,
    #[expect(dead_code, reason = "held for as long as the stream lasts")]
    registration: Registration,
}

impl<F: Form> Stream for Thread<F> {
    type Item = Result<Event, Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Task<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        loop {
            if let Some(event) = this.ready.pop_front() {
                return Poll::Ready(Some(Ok(event)));
            }
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
                    if let Err(error) = this.on_event(seq, &frame) {
                        let last = this.end(&error);
                        this.ready.push_back(last);
                    }
                    continue;
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

impl<F: Form> Thread<F> {
    fn on_event(&mut self, seq: Option<u64>, frame: &str) -> Result<(), Error> {
        match self.form.event(seq, frame, &mut self.ready) {
            After::On => {}
            // Behind this event, and not behind what was read together with it.
            After::Again => self.feed.subs.restart(&self.who, &self.thread, seq.unwrap_or(0))?,
            After::End => self.ended = true,
        }
        Ok(())
    }

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
                let refused = self.ctx.auth.check_revoked(&self.who).err()?;
                Some(self.end(&refused))
            }
            _ => None,
        }
    }

    /// Says why.
    fn end(&mut self, error: &Error) -> Event {
        self.ended = true;
        self.form.error(error)
    }
}
