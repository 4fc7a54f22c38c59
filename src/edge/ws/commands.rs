//! What each command of a session does.

use serde_json::value::RawValue;

use tokio::time::Instant;

use super::session::{End, LIMITS, PING_AFTER, Session, close, text};
use crate::auth::Principal;
use crate::delivery::outbox::Answer;
use crate::ingest::admit::PublishRequest;
use crate::ingest::coalesce::Unsent;
use crate::ingest::submit::Draft;
use crate::log::Append;
use crate::protocol::command;
use crate::protocol::command::{Ack, BadCommand, Command, Publish, Signal};
use crate::protocol::delta::Delta;
use crate::protocol::error::{Code, Error};
use crate::protocol::frame::{ServerFrame, error_frame};
use crate::protocol::ids;
use crate::protocol::ids::log_key;
use crate::protocol::kinds::AGENT_TOKEN;
use crate::{clock, telemetry};

pub(super) use super::subscribe::Waiting;

/// A publish that was checked.
enum Prepared {
    Event(Append),
    Delta(Box<Unsent>),
}

impl Session {
    /// Carries out a command; `false` if it has to wait until those before it have taken effect.
    pub(super) fn on_command(&mut self, command: &RawValue) -> Result<bool, End> {
        let command = match command::parse(command.get()) {
            Ok(command) => command,
            Err(BadCommand { id, error }) => {
                self.refuse(id, &error);
                return Ok(true);
            }
        };
        if self.waiting.is_some() {
            return Ok(false);
        }
        if let Command::Publish(publish) = command {
            self.publish(&publish);
            return Ok(true);
        }
        if self.in_flight > 0 {
            self.flush_pieces(|_| true);
            return Ok(false);
        }
        let name = command.name();
        let (id, result) = match command {
            Command::Ack(ack) => (None, self.ack(&ack)),
            Command::Credit(credit) => (None, self.who().map(drop).map(|()| self.feed.allow(credit.events))),
            Command::Signal(signal) => (None, self.signal(&signal)),
            Command::Connect(connect) => return self.connect(connect.id, &connect.token).map(|()| true),
            Command::Refresh(refresh) => return self.refresh(refresh.id, &refresh.token).map(|()| true),
            Command::Subscribe(subscribe) => (Some(subscribe.id), self.subscribe(subscribe)),
            Command::Unsubscribe(unsubscribe) => {
                (Some(unsubscribe.id), self.unsubscribe(unsubscribe.id, &unsubscribe.thread))
            }
            Command::Ping(ping) => {
                self.answer(&ServerFrame::Pong { id: ping.id, at: &clock::rfc3339(clock::now_ms()) });
                (Some(ping.id), Ok(()))
            }
            Command::Publish(_) => return Ok(true), // handled above
        };
        telemetry::commands(name, result.as_ref().map_or_else(|error| error.code.as_str(), |()| "ok")).increment(1);
        if let Err(error) = result {
            self.answers.push_back(text(error_frame(id, None, &error)));
        }
        Ok(true)
    }

    pub(super) fn answer(&mut self, frame: &ServerFrame<'_>) {
        self.answers.push_back(text(frame.encode()));
    }

    pub(super) fn refuse(&mut self, id: Option<i64>, error: &Error) {
        telemetry::commands("invalid", error.code.as_str()).increment(1);
        self.answers.push_back(text(error_frame(id, None, error)));
    }

    pub(super) fn who(&self) -> Result<&Principal, Error> {
        self.who.as_ref().ok_or_else(|| Error::new(Code::Unauthenticated, "connect first"))
    }

    pub(super) fn welcome(&mut self, id: Option<i64>) {
        let Some(who) = &self.who else { return };
        let frame = ServerFrame::Welcome {
            id,
            connection: &self.connection,
            user: &who.user,
            tenant: &who.tenant,
            epoch: &self.ctx.epoch,
            heartbeat_ms: PING_AFTER.as_millis() as u64,
            expires_at: &clock::rfc3339(who.expires_at.saturating_mul(1000)),
            limits: LIMITS,
        };
        self.answers.push_back(text(frame.encode()));
        self.reset_timer();
    }

    fn connect(&mut self, id: i64, token: &str) -> Result<(), End> {
        if self.who.is_some() {
            self.refuse(Some(id), &Error::new(Code::Conflict, "the session is connected already; use refresh"));
            return Ok(());
        }
        self.who = Some(self.ctx.auth.verify(token).map_err(refused_token)?);
        telemetry::commands("connect", "ok").increment(1);
        self.begin(Some(id))
    }

    fn refresh(&mut self, id: i64, token: &str) -> Result<(), End> {
        let Some(old) = &self.who else {
            self.refuse(Some(id), &Error::new(Code::Unauthenticated, "connect first"));
            return Ok(());
        };
        let new = self.ctx.auth.verify(token).map_err(refused_token)?;
        if new.key != old.key {
            return Err(close(4500, "the token is another user's"));
        }
        let expires_at = clock::rfc3339(new.expires_at.saturating_mul(1000));
        // Rights are those of the new token, also for what is subscribed already.
        for (thread, error) in self.feed.subs.regrant(&new) {
            self.answers.push_back(text(error_frame(None, Some(&thread), &error)));
        }
        self.who = Some(new);
        self.told_expiring = false;
        self.reset_timer();
        telemetry::commands("refresh", "ok").increment(1);
        self.answer(&ServerFrame::Refreshed { id, expires_at: &expires_at });
        Ok(())
    }

    /// Checks a publish and puts it into the batch; whatever happens, it is answered.
    fn publish(&mut self, publish: &Publish<'_>) {
        match self.prepare(publish) {
            Ok(Prepared::Event(append)) => {
                self.in_flight += 1;
                // What was written before is in the log before.
                let run = publish.run.as_deref();
                self.flush_pieces(|piece| run.is_none_or(|run| *piece.run == *run));
                self.batch.push(append);
            }
            Ok(Prepared::Delta(piece)) => {
                self.in_flight += 1;
                let ready = self.pieces.take(*piece, Instant::now());
                self.send_pieces(ready);
            }
            Err(error) => {
                telemetry::commands("publish", error.code.as_str()).increment(1);
                self.answers.push_back(text(error_frame(Some(publish.id), None, &error)));
            }
        }
    }

    fn prepare(&self, publish: &Publish<'_>) -> Result<Prepared, Error> {
        let who = self.who()?;
        let named = ids::resolve(&who.user, &publish.thread);
        let draft = self.ctx.admission.admit(
            who,
            PublishRequest {
                thread: &named,
                kind: &publish.kind,
                data: publish.data,
                key: publish.key.as_deref(),
                run: publish.run.as_deref(),
                parent: publish.parent,
                priority: publish.priority,
                traceparent: self.traceparent.as_deref(),
            },
        )?;
        if draft.event.kind == AGENT_TOKEN {
            return Ok(Prepared::Delta(Unsent::new(&draft.event, draft.grant, publish.id, &publish.thread)?.into()));
        }
        let (outbox, id, thread) = (self.feed.outbox.clone(), publish.id, Box::from(&*publish.thread));
        let reply = Box::new(move |verdict| outbox.push_answer(Answer::Publish { id, thread, piece: None, verdict }));
        Ok(Prepared::Event(self.ctx.submit.prepare(&draft, reply)))
    }

    pub(super) fn send_pieces(&mut self, ready: Vec<Unsent>) {
        let Some(who) = &self.who else { return };
        for piece in ready {
            let prepare = |draft: &Draft<'_>, reply| self.ctx.submit.prepare(draft, reply);
            self.batch.push(piece.prepare(who, self.traceparent.clone(), &self.feed.outbox, prepare));
        }
    }

    /// Pieces that have gathered for long enough become records.
    pub(super) fn gather_pieces(&mut self) {
        let Some(due) = self.pieces.due() else { return };
        let now = Instant::now();
        if due <= now {
            let ready = self.pieces.on_due(now);
            self.send_pieces(ready);
        }
    }

    /// Pieces that gather gather no longer.
    pub(super) fn flush_pieces(&mut self, which: impl Fn(&Delta) -> bool) {
        if !self.pieces.is_empty() {
            let ready = self.pieces.flush(which);
            self.send_pieces(ready);
        }
    }

    fn unsubscribe(&mut self, id: i64, thread: &str) -> Result<(), Error> {
        let user = self.who()?.user.clone();
        let subs = &mut self.feed.subs;
        if thread == "*" && subs.follows() {
            subs.unfollow_all();
        } else if !subs.remove(&ids::resolve(&user, thread)) {
            return Err(Error::new(Code::NotFound, "the session is not subscribed to this thread").at("thread"));
        }
        self.answer(&ServerFrame::Unsubscribed { id });
        Ok(())
    }

    fn ack(&mut self, ack: &Ack<'_>) -> Result<(), Error> {
        let Some(who) = &self.who else { return self.who().map(drop) };
        self.feed.subs.ack(who, &ids::resolve(&who.user, &ack.thread), ack.seq, ack.name.as_deref())
    }

    /// Hands a signal to those who are live in the thread.
    fn signal(&mut self, signal: &Signal<'_>) -> Result<(), Error> {
        let who = self.who()?;
        let thread = ids::resolve(&who.user, &signal.thread);
        self.ctx.rights.may_signal(who, &thread)?;
        let frame =
            ServerFrame::Signal { thread: &thread, kind: &signal.kind, from: &who.user, data: signal.data }.encode();
        self.ctx.hub.signal(&log_key(&who.tenant, &thread), &self.feed.outbox, &frame.into());
        Ok(())
    }
}

fn refused_token(error: Error) -> End {
    match error.code {
        Code::Unavailable => close(4006, "the token cannot be checked now"),
        _ => close(4500, "the token is not valid"),
    }
}
