//! What each command of a session does.

use std::collections::BTreeMap;

use serde_json::value::RawValue;

use super::Asked;
use super::session::{End, LIMITS, PING_AFTER, Session, text};
use super::subscriptions::may_read;
use crate::access;
use crate::command::{self, After, BadCommand, Command, Publish, Subscribe};
use crate::error::{Code, Error};
use crate::identity::Principal;
use crate::log::Append;
use crate::outbox::Answer;
use crate::submit::Draft;
use crate::wire::{Seqs, ServerFrame, error_frame};
use crate::{clock, telemetry};

/// Threads that an `after` object may name although the user is no member of them (any more).
const MAX_UNKNOWN: usize = 100;

/// A `subscribe` to all threads, while its list is read.
pub(super) struct All {
    id: i64,
    after: Option<BTreeMap<String, u64>>,
    last: Option<u64>,
    recovered: bool,
}

/// Where each thread's subscription begins: its head, and the seq behind which.
type Begun = BTreeMap<String, (u64, u64)>;

impl All {
    fn begin(&self, threads: Vec<(String, u64)>) -> Result<Begun, Error> {
        let mut begun = Begun::new();
        for (thread, head) in threads {
            // With a list of cursors, a thread that is not in it is one the client has nothing of.
            let after = self.after.as_ref().map(|after| after.get(&thread).copied().unwrap_or(0));
            let cursor =
                begin(head, after, self.last, self.recovered).map_err(|error| error.at(format!("after.{thread}")))?;
            begun.insert(thread, (head, cursor));
        }
        if self.unknown(&begun).count() > MAX_UNKNOWN {
            let why = format!("after names more than {MAX_UNKNOWN} threads that you are not a member of");
            return Err(Error::new(Code::TooLarge, why).at("after"));
        }
        Ok(begun)
    }

    /// The threads that `after` names and the user does not have.
    fn unknown<'a>(&'a self, begun: &'a Begun) -> impl Iterator<Item = &'a String> {
        self.after.iter().flat_map(BTreeMap::keys).filter(|thread| !begun.contains_key(*thread))
    }
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
        if self.listing.is_some() {
            return Ok(false);
        }
        if let Command::Publish(publish) = command {
            self.publish(&publish);
            return Ok(true);
        }
        if self.in_flight > 0 {
            return Ok(false);
        }
        let name = command.name();
        let (id, result) = match command {
            Command::Connect(connect) => return self.connect(connect.id, &connect.token).map(|()| true),
            Command::Refresh(refresh) => return self.refresh(refresh.id, &refresh.token).map(|()| true),
            Command::Subscribe(subscribe) => (subscribe.id, self.subscribe(subscribe)),
            Command::Unsubscribe(unsubscribe) => {
                (unsubscribe.id, self.unsubscribe(unsubscribe.id, &unsubscribe.thread))
            }
            Command::Ping(ping) => {
                self.answer(&ServerFrame::Pong { id: ping.id, at: &clock::rfc3339(clock::now_ms()) });
                (ping.id, Ok(()))
            }
            Command::Publish(_) => return Ok(true), // handled above
        };
        telemetry::commands(name, result.as_ref().map_or_else(|error| error.code.as_str(), |()| "ok")).increment(1);
        if let Err(error) = result {
            self.answers.push_back(text(error_frame(Some(id), None, &error)));
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

    fn who(&self) -> Result<&Principal, Error> {
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
        self.who = Some(self.ctx.verifier.verify(token).map_err(|_| End::Close(4500, "the token is not valid"))?);
        telemetry::commands("connect", "ok").increment(1);
        self.welcome(Some(id));
        Ok(())
    }

    fn refresh(&mut self, id: i64, token: &str) -> Result<(), End> {
        let Some(old) = &self.who else {
            self.refuse(Some(id), &Error::new(Code::Unauthenticated, "connect first"));
            return Ok(());
        };
        let new = self.ctx.verifier.verify(token).map_err(|_| End::Close(4500, "the token is not valid"))?;
        if new.key != old.key {
            return Err(End::Close(4500, "the token is another user's"));
        }
        let expires_at = clock::rfc3339(new.expires_at.saturating_mul(1000));
        // Rights are those of the new token, also for what is subscribed already.
        for (thread, error) in self.subs.regrant(&new) {
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
            Ok(append) => {
                self.in_flight += 1;
                self.batch.push(append);
            }
            Err(error) => {
                telemetry::commands("publish", error.code.as_str()).increment(1);
                self.answers.push_back(text(error_frame(Some(publish.id), None, &error)));
            }
        }
    }

    fn prepare(&self, publish: &Publish<'_>) -> Result<Append, Error> {
        let who = self.who()?;
        let (event, grant) = self.ctx.admit(
            who,
            Asked {
                thread: &publish.thread,
                kind: &publish.kind,
                data: publish.data,
                key: publish.key.as_deref(),
                run: publish.run.as_deref(),
                parent: publish.parent,
                priority: publish.priority,
            },
        )?;
        let (outbox, id, thread) = (self.outbox.clone(), publish.id, Box::from(&*publish.thread));
        let reply = Box::new(move |verdict| outbox.push_answer(Answer::Publish { id, thread, verdict }));
        Ok(self.ctx.submit.prepare(&Draft { event, grant, traceparent: self.traceparent.clone() }, reply))
    }

    fn subscribe(&mut self, subscribe: Subscribe<'_>) -> Result<(), Error> {
        let who = self.who()?.clone();
        access::read(who.scopes)?;
        let recovered = subscribe.epoch.as_ref().is_none_or(|epoch| **epoch == *self.ctx.epoch);
        if subscribe.thread == "*" {
            let after = match subscribe.after {
                Some(After::Each(after)) => Some(after),
                _ => None,
            };
            return self.list_threads(&who, All { id: subscribe.id, after, last: subscribe.last, recovered });
        }
        if self.subs.contains(&subscribe.thread) {
            return Err(Error::new(Code::Conflict, "the session is subscribed to this thread already").at("thread"));
        }
        let row = self.ctx.store.thread(&who.tenant, &subscribe.thread)?.ok_or_else(Error::no_thread)?;
        may_read(&self.ctx, &who, &subscribe.thread)?;
        let after = match subscribe.after {
            Some(After::Seq(after)) => Some(after),
            _ => None,
        };
        let cursor = begin(row.head, after, subscribe.last, recovered).map_err(|error| error.at("after"))?;
        self.subs.add(&who, &subscribe.thread, cursor, true)?;
        self.answer(&ServerFrame::Subscribed {
            id: subscribe.id,
            thread: &subscribe.thread,
            epoch: &self.ctx.epoch.clone(),
            head: Seqs::One(row.head),
            after: Seqs::One(cursor),
            recovered,
        });
        Ok(())
    }

    /// Follows the user first and lists the threads then: a thread joined in between is in the list, or announced, or both.
    fn list_threads(&mut self, who: &Principal, all: All) -> Result<(), Error> {
        if self.subs.follows() {
            return Err(Error::new(Code::Conflict, "the session is subscribed to \"*\" already").at("thread"));
        }
        self.subs.follow(who);
        self.listing = Some(all);
        let (ctx, outbox, who) = (self.ctx.clone(), self.outbox.clone(), who.clone());
        tokio::task::spawn_blocking(move || outbox.push_answer(Answer::Threads(ctx.threads_with_heads(&who))));
        Ok(())
    }

    pub(super) fn subscribe_all(&mut self, threads: Result<Vec<(String, u64)>, Error>) {
        let (Some(all), Some(who)) = (self.listing.take(), self.who.clone()) else {
            return;
        };
        let begun = threads.and_then(|threads| all.begin(threads));
        let begun = match begun {
            Ok(begun) => begun,
            Err(error) => {
                self.subs.unfollow_all();
                self.refuse(Some(all.id), &error);
                return;
            }
        };
        self.answer(&ServerFrame::Subscribed {
            id: all.id,
            thread: "*",
            epoch: &self.ctx.epoch.clone(),
            head: Seqs::Each(begun.iter().map(|(thread, (head, _))| (thread.clone(), *head)).collect()),
            after: Seqs::Each(begun.iter().map(|(thread, (_, cursor))| (thread.clone(), *cursor)).collect()),
            recovered: all.recovered,
        });
        for thread in all.unknown(&begun) {
            self.answers.push_back(text(error_frame(
                None,
                Some(thread),
                &Error::no_thread().at(format!("after.{thread}")),
            )));
        }
        for (thread, (_, cursor)) in begun {
            if !self.subs.contains(&thread)
                && let Err(error) = self.subs.add(&who, &thread, cursor, false)
            {
                self.answers.push_back(text(error_frame(None, Some(&thread), &error)));
            }
        }
    }

    fn unsubscribe(&mut self, id: i64, thread: &str) -> Result<(), Error> {
        self.who()?;
        if thread == "*" && self.subs.follows() {
            self.subs.unfollow_all();
        } else if !self.subs.remove(thread) {
            return Err(Error::new(Code::NotFound, "the session is not subscribed to this thread").at("thread"));
        }
        self.answer(&ServerFrame::Unsubscribed { id });
        Ok(())
    }
}

/// The seq a subscription begins behind.
fn begin(head: u64, after: Option<u64>, last: Option<u64>, recovered: bool) -> Result<u64, Error> {
    match after {
        // Another log's cursor says nothing about this one.
        _ if !recovered => Ok(head),
        Some(after) if after > head => {
            Err(Error::new(Code::CursorInvalid, format!("after is behind the thread's head, {head}")))
        }
        Some(after) => Ok(after),
        None => Ok(head - last.unwrap_or(0).min(head)),
    }
}
