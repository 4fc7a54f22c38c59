//! What each command does.

use std::borrow::Cow;

use serde_json::value::RawValue;
use tokio::time::Instant;

use super::close::{self, End};
use super::incoming::{LevelWait, Verification, WaitsFor};
use super::state::{SessionState, connected};
use crate::auth::{Credential, Principal};
use crate::delivery::outbox::Answer;
use crate::ingest::admit::{Admitted, PublishRequest};
use crate::ingest::coalesce::PendingDelta;
use crate::protocol::command;
use crate::protocol::command::{Ack, BadCommand, Command, Connect, Publish, Refresh, Signal, Unsubscribe};
use crate::protocol::error::{Code, Error};
use crate::protocol::frame::ServerFrame;
use crate::protocol::ids;
use crate::protocol::ids::log_key;
use crate::{clock, telemetry};

/// What became of a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum CommandState {
    /// It has taken effect, or was refused.
    Done,
    /// It has to wait until those before it have taken effect.
    Waits,
}

/// What a command's effect depends on. Acknowledgements and signals are about threads, which a command that waits may
/// subscribe to; credit and pings are about the session alone. What the log says of a publish changes none of them.
fn waits_for(command: &Command<'_>) -> WaitsFor {
    match command {
        Command::Ping(_) | Command::Credit(_) => WaitsFor::Nothing,
        Command::Publish(_) | Command::Ack(_) | Command::Signal(_) => WaitsFor::Commands,
        Command::Consume(_) | Command::Settle(_) => WaitsFor::Commands,
        Command::Connect(_) | Command::Refresh(_) | Command::Subscribe(_) | Command::Unsubscribe(_) => {
            WaitsFor::Answers
        }
    }
}

/// What a `connect` or `refresh` shows; it has one of the two.
fn credential<'a>(token: &'a Option<Cow<'_, str>>, session: &'a Option<Cow<'_, str>>) -> Credential<'a> {
    match session {
        Some(session) => Credential::session(session),
        None => Credential::token(token.as_deref().unwrap_or_default()),
    }
}

/// Whether what the command did not find may be in the log. What a session does not have, such as a subscription, is in no
/// log.
fn looks_in_log(command: &Command<'_>) -> fn(&Error) -> bool {
    match command {
        Command::Publish(_) | Command::Subscribe(_) | Command::Signal(_) => |_| true,
        Command::Ack(_) => |error| error.code == Code::CursorInvalid,
        _ => |_| false,
    }
}

impl SessionState {
    /// A text frame: its commands take effect now, or wait for those before them.
    pub fn on_text(&mut self, text: &str) -> Result<(), End> {
        // Some clients send empty frames to stay connected; too many of them are a flood.
        if text.is_empty() {
            return Ok(());
        }
        let commands = match command::split(text) {
            None => {
                return Err(End::close(close::MALFORMED, "the frame is neither a JSON object nor an array of them"));
            }
            Some(Err(error)) => {
                self.refuse(None, &error);
                return Ok(());
            }
            Some(Ok(commands)) => commands,
        };

        self.incoming.level_times.heard(Instant::now());
        for &command in commands.as_slice() {
            if self.within_rate(command)? && self.on_command(command, true)? == CommandState::Waits {
                self.incoming.queue.push(command.to_owned(), command.get().len());
            }
        }
        Ok(())
    }

    /// Carries out commands that waited, as far as they need not wait any longer.
    pub fn on_backlog(&mut self) -> Result<(), End> {
        while let Some((command, bytes)) = self.incoming.queue.pop() {
            if self.incoming.uncounted > 0 {
                self.incoming.uncounted -= 1;
                if !self.within_rate(&command)? {
                    continue;
                }
            }
            if self.on_command(&command, false)? == CommandState::Waits {
                self.incoming.queue.put_back(command, bytes);
                break;
            }
        }
        Ok(())
    }

    /// Counts a command. One over the limit is refused, and a client that keeps sending such ones is disconnected.
    fn within_rate(&mut self, command: &RawValue) -> Result<bool, End> {
        let Some(who) = &self.who else { return Ok(true) };
        let Err(error) = self.sockets.admission.count(who) else { return Ok(true) };

        if self.incoming.refusals.refuse(Instant::now()) {
            return Err(End::close(close::RATE_LIMITED, "over the rate limit for too long"));
        }
        self.refuse(command::id_of(command.get()), &error);
        Ok(false)
    }

    /// Carries out a command, unless it has to wait; `is_new` if it has just come, and is not the first of those that wait.
    fn on_command(&mut self, raw: &RawValue, is_new: bool) -> Result<CommandState, End> {
        let command = match command::parse(raw.get()) {
            Ok(command) => command,
            Err(BadCommand { id, error }) => {
                self.refuse(id, &error);
                return Ok(CommandState::Done);
            }
        };
        if self.must_wait(waits_for(&command), is_new) {
            return Ok(CommandState::Waits);
        }
        // Once for each try: two lists that are too long to be kept together would be looked up for ever.
        let looked_up = !is_new && std::mem::take(&mut self.incoming.looked_up);
        if !looked_up && self.looks_up(&command) {
            return Ok(CommandState::Waits);
        }
        let is_level = match if is_new { LevelWait::None } else { std::mem::take(&mut self.incoming.level) } {
            LevelWait::None | LevelWait::Waiting => self.incoming.level_times.cover_all(),
            LevelWait::Over(Ok(())) => true,
            LevelWait::Over(Err(error)) => {
                telemetry::commands(command.name(), error.code.as_str()).increment(1);
                self.outgoing.refuse(command::id_of(raw.get()), &error);
                return Ok(CommandState::Done);
            }
        };

        let (name, looks_in_log) = (command.name(), looks_in_log(&command));
        let (id, result) = match command {
            Command::Publish(publish) => match self.admit(&publish) {
                // Its verdict is its answer.
                Ok(()) => return Ok(CommandState::Done),
                Err(error) => (Some(publish.id), Err(error)),
            },
            Command::Connect(connect) => return self.connect(&connect),
            Command::Refresh(refresh) => return self.refresh(&refresh, is_level),
            Command::Subscribe(subscribe) => (Some(subscribe.id), self.subscribe(subscribe)),
            Command::Unsubscribe(unsubscribe) => (Some(unsubscribe.id), self.unsubscribe(&unsubscribe)),
            Command::Ping(ping) => {
                self.outgoing.answer(&ServerFrame::Pong { id: ping.id, at: &clock::rfc3339(clock::now_ms()) });
                (Some(ping.id), Ok(()))
            }
            Command::Ack(ack) => (None, self.ack(&ack)),
            Command::Credit(credit) => (None, self.credit(credit.events)),
            Command::Signal(signal) => (None, self.signal(&signal)),
            Command::Consume(consume) => (Some(consume.id), self.consume(&consume)),
            Command::Settle(settle) => (settle.id, self.settle(&settle)),
        };
        if let Err(error) = &result
            && !is_level
            && looks_in_log(error)
            && self.sockets.level.may_be_missing(error)
        {
            self.reach_level();
            return Ok(CommandState::Waits);
        }
        let outcome = result.as_ref().map_or_else(|error| error.code.as_str(), |()| "ok");
        telemetry::commands(name, outcome).increment(1);
        if let Err(error) = result {
            self.outgoing.refuse(id, &error);
        }
        Ok(CommandState::Done)
    }

    fn must_wait(&mut self, waits_for: WaitsFor, is_new: bool) -> bool {
        if waits_for == WaitsFor::Nothing {
            return false;
        }
        let queue = &self.incoming.queue;
        let busy = self.incoming.subscribing.is_some()
            || self.incoming.looking_up
            || self.incoming.level == LevelWait::Waiting;
        if busy || is_new && !queue.may_pass(waits_for) {
            return true;
        }
        let held = queue.holds(waits_for);
        if held {
            // The publishes before it include deltas that are still gathered.
            self.incoming.flush_deltas(|_| true);
        }
        held
    }

    /// Whether the command has to wait until its user's right to write to an inbox is looked up, which begins here.
    fn looks_up(&mut self, command: &Command<'_>) -> bool {
        let (Some(who), Command::Publish(Publish { thread, .. }) | Command::Signal(Signal { thread, .. })) =
            (&self.who, command)
        else {
            return false;
        };
        let rights = &self.sockets.rights;
        // An error is the command's own, when it is carried out.
        if !rights.must_look_up(who, thread).unwrap_or(false) {
            return false;
        }

        self.incoming.looking_up = true;
        let (rights, who, thread) = (rights.clone(), who.clone(), thread.to_string());
        let outbox = self.outgoing.feed.outbox.clone();
        tokio::spawn(async move {
            rights.look_up(&who, &thread).await;
            outbox.push_answer(Answer::LookedUp);
        });
        true
    }

    /// The command that found nothing is carried out once more when this node is level with the log.
    fn reach_level(&mut self) {
        self.incoming.level = LevelWait::Waiting;
        self.incoming.level_times.asked(Instant::now());
        let (level, outbox) = (self.sockets.level.clone(), self.outgoing.feed.outbox.clone());
        tokio::spawn(async move { outbox.push_answer(Answer::Level(level.reach().await)) });
    }

    /// Refuses what is no valid command.
    fn refuse(&mut self, id: Option<i64>, error: &Error) {
        telemetry::commands("invalid", error.code.as_str()).increment(1);
        self.outgoing.refuse(id, error);
    }

    fn connect(&mut self, connect: &Connect<'_>) -> Result<CommandState, End> {
        let id = Some(connect.id);
        if self.who.is_some() {
            self.refuse(id, &Error::new(Code::Conflict, "the session is connected already; use refresh"));
            return Ok(CommandState::Done);
        }
        let Some(who) = self.verify(&credential(&connect.token, &connect.session))? else {
            return Ok(CommandState::Waits);
        };
        self.who = Some(who);
        // What waits behind it came when it was not known whose it is.
        self.incoming.uncounted = self.incoming.queue.waiting();
        telemetry::commands("connect", "ok").increment(1);
        self.begin(id)?;
        Ok(CommandState::Done)
    }

    /// Whose credential it is. `None`: another service is asked, and the command waits for that.
    fn verify(&mut self, credential: &Credential<'_>) -> Result<Option<Principal>, End> {
        let auth = &self.sockets.auth;
        let verified = self.incoming.verified.take().map(|verified| *verified);
        let known = verified.or_else(|| auth.verify_now(credential));
        if let Some(verified) = known {
            return verified.map(Some).map_err(|error| End::refused_token(&error));
        }

        self.incoming.looking_up = true;
        let (auth, credential) = (auth.clone(), credential.clone().into_owned());
        let outbox = self.outgoing.feed.outbox.clone();
        let asking = tokio::spawn(async move {
            let verified = auth.verify(&credential).await;
            outbox.push_answer(Answer::Verified(Box::new(verified)));
        });
        self.incoming.verification = Some(Verification(asking.abort_handle()));
        Ok(None)
    }

    /// `is_level` if this node was level with the log after the command came.
    fn refresh(&mut self, refresh: &Refresh<'_>, is_level: bool) -> Result<CommandState, End> {
        let old = match connected(self.who.as_ref()) {
            Ok(old) => old,
            Err(error) => {
                self.refuse(Some(refresh.id), &error);
                return Ok(CommandState::Done);
            }
        };
        let old = old.key.clone();
        let Some(new) = self.verify(&credential(&refresh.token, &refresh.session))? else {
            return Ok(CommandState::Waits);
        };
        if new.key != old {
            return Err(End::close(close::UNAUTHENTICATED, "the token is another user's"));
        }

        // The new token's rights hold also for what is subscribed already.
        let lost = self.outgoing.feed.subs.regrant(&new);
        if !is_level && lost.iter().any(|(_, error)| self.sockets.level.may_be_missing(error)) {
            self.reach_level();
            return Ok(CommandState::Waits);
        }
        for (thread, error) in self.outgoing.feed.subs.end_lost(&new, lost) {
            self.outgoing.ended(&thread, &error);
        }
        self.heartbeat.token(new.expires_at, Instant::now(), clock::now_s());
        let expires_at = clock::rfc3339(new.expires_at.saturating_mul(1000));
        self.who = Some(new);
        // Looked up once more, as for a `connect`: when it ended while this waited, the one before it was looked at.
        self.check_revoked()?;
        telemetry::commands("refresh", "ok").increment(1);
        self.outgoing.answer(&ServerFrame::Refreshed { id: refresh.id, expires_at: &expires_at });
        Ok(CommandState::Done)
    }

    /// A publish that is admitted is answered by the verdict on its record.
    fn admit(&mut self, publish: &Publish<'_>) -> Result<(), Error> {
        let who = connected(self.who.as_ref())?;
        let thread = ids::resolve(&who.user, &publish.thread);
        let traceparent = self.incoming.traceparent();
        let request = PublishRequest {
            thread: &thread,
            kind: &publish.kind,
            data: publish.data,
            key: publish.key.as_deref(),
            run: publish.run.as_deref(),
            parent: publish.parent,
            priority: publish.priority,
            traceparent: traceparent.as_deref(),
        };

        let Admitted { draft, delta } = self.sockets.admission.admit(who, request)?;
        match delta {
            None => {
                self.incoming.publish_begins(draft.event.run.as_deref());
                let (outbox, id) = (self.outgoing.feed.outbox.clone(), publish.id);
                let thread = Box::from(&*publish.thread);
                let reply = move |verdict| outbox.push_answer(Answer::Publish { id, thread, delta: None, verdict });
                self.incoming.batch.add(&draft, Box::new(reply));
            }
            Some(data) => {
                let tenant = who.tenant.clone();
                let delta = PendingDelta::new(tenant, &draft.event, data, draft.grant, publish.id, &publish.thread);
                self.incoming.publish_delta(delta);
            }
        }
        Ok(())
    }

    fn unsubscribe(&mut self, unsubscribe: &Unsubscribe<'_>) -> Result<(), Error> {
        let user = &connected(self.who.as_ref())?.user;
        let subs = &mut self.outgoing.feed.subs;
        if unsubscribe.thread == ids::ALL_THREADS && subs.follows() {
            subs.unfollow_all();
        } else if !subs.remove(&ids::resolve(user, &unsubscribe.thread)) {
            return Err(Error::new(Code::NotFound, "the session is not subscribed to this thread").at("thread"));
        }
        self.outgoing.answer(&ServerFrame::Unsubscribed { id: unsubscribe.id });
        Ok(())
    }

    fn ack(&mut self, ack: &Ack<'_>) -> Result<(), Error> {
        let who = connected(self.who.as_ref())?;
        let thread = ids::resolve(&who.user, &ack.thread);
        self.outgoing.feed.subs.ack(who, &thread, ack.seq, ack.name.as_deref())
    }

    fn credit(&mut self, events: u64) -> Result<(), Error> {
        connected(self.who.as_ref())?;
        self.outgoing.feed.allow(events);
        Ok(())
    }

    /// Sends a signal to all who read the thread live.
    fn signal(&mut self, signal: &Signal<'_>) -> Result<(), Error> {
        let who = connected(self.who.as_ref())?;
        let thread = ids::resolve(&who.user, &signal.thread);
        self.sockets.rights.may_signal(who, &thread)?;
        self.signal_rate.take(Instant::now()).inspect_err(|_| telemetry::rate_limited().increment(1))?;
        let frame =
            ServerFrame::Signal { thread: &thread, kind: &signal.kind, from: &who.user, data: signal.data }.encode();
        self.sockets.hub.signal(&log_key(&who.tenant, &thread), &self.outgoing.feed.outbox, frame.into());
        Ok(())
    }
}
