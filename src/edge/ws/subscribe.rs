//! How a subscription begins: at a cursor of the client's, at the place of a durable subscription, or at the head.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::session::{Session, text};
use crate::auth::Principal;
use crate::auth::scopes;
use crate::delivery::outbox::Answer;
use crate::delivery::subscriptions::{Following, NewSubscription, Receipt, first_receipt};
use crate::ingest::pending::OnVerdict;
use crate::protocol::command::{After, Subscribe};
use crate::protocol::error::{Code, Error};
use crate::protocol::frame::{Seqs, ServerFrame, error_frame};
use crate::protocol::ids;
use crate::protocol::ids::ThreadAddress;
use crate::protocol::records::ReceiptRecord;
use crate::store::JoinedThread;

/// Threads that an `after` object may name although the user is no member of them (any more).
const MAX_UNKNOWN: usize = 100;
/// Stands for all threads, also in the log: the receipt of a durable subscription to them.
const ALL: &str = "*";

/// A `subscribe` on its way.
pub(super) enum Waiting {
    /// The list of threads is read.
    Threads(All),
    /// The places of a new durable subscription are written.
    Places(Box<Begin>),
}

/// A `subscribe` to all threads.
pub(super) struct All {
    id: i64,
    after: Option<BTreeMap<String, u64>>,
    last: Option<u64>,
    recovered: bool,
    following: Following,
    /// The durable subscription is a new one.
    fresh: bool,
}

/// A `subscribe` that is ready to begin.
pub(super) struct Begin {
    id: i64,
    /// As the client calls it; `*` for all.
    called: String,
    head: Seqs,
    after: Seqs,
    recovered: bool,
    wanted: Vec<NewSubscription>,
    /// Threads that `after` names and the user does not have.
    unknown: Vec<String>,
    /// Written last: that the durable subscription to all threads is there.
    marker: Option<ReceiptRecord>,
}

impl Session {
    pub(super) fn subscribe(&mut self, subscribe: Subscribe<'_>) -> Result<(), Error> {
        let who = self.who()?.clone();
        scopes::read(who.scopes)?;
        let recovered = subscribe.epoch.as_ref().is_none_or(|epoch| **epoch == *self.ctx.epoch);
        if subscribe.thread == ALL {
            return self.list_threads(&who, subscribe, recovered);
        }
        let thread = ids::resolve(&who.user, &subscribe.thread);
        if self.feed.subs.contains(&thread) {
            return Err(Error::new(Code::Conflict, "the session is subscribed to this thread already").at("thread"));
        }
        let head = self.ctx.rights.readable(&who, &thread)?;
        let after = match subscribe.after {
            Some(After::Seq(after)) => Some(after),
            _ => None,
        };
        let name = subscribe.name.as_deref();
        let row = match name {
            Some(name) => self.ctx.store.receipt(&who.tenant, &thread, &who.user, name)?,
            None => None,
        };
        let place = row.as_ref().filter(|_| subscribe.last.is_none()).map(|row| row.place.min(head));
        let cursor = begin(head, after.or(place), subscribe.last, recovered).map_err(|error| error.at("after"))?;
        let fresh = name.filter(|_| row.is_none()).map(|name| first_receipt(&who, &thread, name, cursor));
        let receipt = Receipt::wanted(name, row, cursor, subscribe.confirm == Some(true));
        let wanted = NewSubscription {
            address: ThreadAddress::resolve(&who.user, subscribe.thread.to_string()),
            cursor,
            named: true,
            kinds: subscribe.kinds.map(Into::into),
            receipt,
        };
        let begin = Begin {
            id: subscribe.id,
            called: subscribe.thread.into_owned(),
            head: Seqs::One(head),
            after: Seqs::One(cursor),
            recovered,
            wanted: vec![wanted],
            unknown: Vec::new(),
            marker: None,
        };
        self.keep_places(&who, begin, fresh.into_iter().collect())
    }

    /// Follows the user first and lists the threads then: a thread joined in between is in the list, or announced, or both.
    fn list_threads(&mut self, who: &Principal, subscribe: Subscribe<'_>, recovered: bool) -> Result<(), Error> {
        if self.feed.subs.follows() {
            return Err(Error::new(Code::Conflict, "the session is subscribed to \"*\" already").at("thread"));
        }
        let name = subscribe.name.map(|name| Box::from(&*name));
        let fresh = match &name {
            Some(name) => self.ctx.store.receipt(&who.tenant, ALL, &who.user, name)?.is_none(),
            None => false,
        };
        let confirm = subscribe.confirm == Some(true);
        let following = Following { kinds: subscribe.kinds.map(Into::into), name: name.clone(), confirm };
        self.feed.subs.follow(who, following.clone());
        let after = match subscribe.after {
            Some(After::Each(after)) => Some(after),
            _ => None,
        };
        let all = All { id: subscribe.id, after, last: subscribe.last, recovered, following, fresh };
        self.wait_for(Waiting::Threads(all));
        let (ctx, outbox, who) = (self.ctx.clone(), self.feed.outbox.clone(), who.clone());
        tokio::task::spawn_blocking(move || {
            outbox.push_answer(Answer::Threads(
                ctx.store.joined_threads(&who.tenant, &who.user, name.as_deref()).map_err(Into::into),
            ));
        });
        Ok(())
    }

    fn wait_for(&mut self, waiting: Waiting) {
        self.feed.paused = true;
        self.waiting = Some(waiting);
    }

    pub(super) fn on_threads(&mut self, threads: Result<Vec<JoinedThread>, Error>) {
        let (Some(Waiting::Threads(all)), Some(who)) = (self.waiting.take(), self.who.clone()) else {
            return;
        };
        self.feed.paused = false;
        let id = all.id;
        let begun = threads.and_then(|threads| all.begin(&who, threads));
        let done = begun.and_then(|(begin, notes)| self.keep_places(&who, begin, notes));
        if let Err(error) = done {
            self.feed.subs.unfollow_all();
            self.refuse(Some(id), &error);
        }
    }

    /// A new durable subscription begins once its places are stored: otherwise what comes before a crash would be missed.
    fn keep_places(&mut self, who: &Principal, mut begin: Begin, mut notes: Vec<ReceiptRecord>) -> Result<(), Error> {
        if notes.is_empty() {
            notes.extend(begin.marker.take());
        }
        if notes.is_empty() {
            self.begin_subscription(who, begin);
            return Ok(());
        }
        self.wait_for(Waiting::Places(Box::new(begin)));
        self.placings = self.placings.wrapping_add(1);
        let (attempt, left) = (self.placings, Arc::new(AtomicUsize::new(notes.len())));
        for note in notes {
            let (outbox, left) = (self.feed.outbox.clone(), left.clone());
            let reply: OnVerdict = Box::new(move |verdict| {
                let last = left.fetch_sub(1, Ordering::AcqRel) == 1;
                match verdict {
                    Ok(_) if last => outbox.push_answer(Answer::PlacesStored { attempt, stored: Ok(()) }),
                    Ok(_) => {}
                    Err(error) => outbox.push_answer(Answer::PlacesStored { attempt, stored: Err(error) }),
                }
            });
            self.batch.push(self.ctx.submit.prepare_record(note.id, (&note).into(), reply));
        }
        Ok(())
    }

    pub(super) fn on_placed(&mut self, attempt: u32, stored: Result<(), Error>) {
        // After a first refusal nobody waits for the others.
        if attempt != self.placings || !matches!(self.waiting, Some(Waiting::Places(_))) {
            return;
        }
        let (Some(Waiting::Places(begin)), Some(who)) = (self.waiting.take(), self.who.clone()) else {
            return;
        };
        self.feed.paused = false;
        let (id, all) = (begin.id, begin.called == ALL);
        if let Err(error) = stored.and_then(|()| self.keep_places(&who, *begin, Vec::new())) {
            if all {
                self.feed.subs.unfollow_all();
            }
            self.refuse(Some(id), &error);
        }
    }

    fn begin_subscription(&mut self, who: &Principal, begin: Begin) {
        let at = self.answers.len();
        self.answer(&ServerFrame::Subscribed {
            id: begin.id,
            thread: &begin.called,
            epoch: &self.ctx.epoch.clone(),
            head: begin.head,
            after: begin.after,
            recovered: begin.recovered,
        });
        for thread in begin.unknown {
            let error = Error::no_thread().at(format!("after.{thread}"));
            self.answers.push_back(text(error_frame(None, Some(&thread), &error)));
        }
        for wanted in begin.wanted {
            let called = wanted.address.called.clone();
            if begin.called == ALL && self.feed.subs.contains(&called) {
                continue;
            }
            let Err(error) = self.feed.subs.add(who, wanted) else { continue };
            if begin.called == ALL {
                self.answers.push_back(text(error_frame(None, Some(&called), &error)));
            } else {
                // It did not begin after all.
                self.answers.truncate(at);
                self.refuse(Some(begin.id), &error);
            }
        }
    }
}

impl All {
    /// Where each thread's subscription begins, and the places to write before.
    fn begin(&self, who: &Principal, threads: Vec<JoinedThread>) -> Result<(Begin, Vec<ReceiptRecord>), Error> {
        let (mut heads, mut cursors) = (BTreeMap::new(), BTreeMap::new());
        let (mut wanted, mut notes) = (Vec::new(), Vec::new());
        let name = self.following.name.as_deref();
        let marker = name.filter(|_| self.fresh).map(|name| first_receipt(who, ALL, name, 0));
        for found in threads {
            let cursor = self.cursor(&found).map_err(|error| error.at(format!("after.{}", found.thread)))?;
            if let Some(name) = name.filter(|_| found.receipt.is_none()) {
                notes.push(first_receipt(who, &found.thread, name, cursor));
            }
            heads.insert(found.thread.clone(), found.head);
            cursors.insert(found.thread.clone(), cursor);
            wanted.push(self.wanted(found, cursor));
        }
        let unknown: Vec<String> =
            self.after.iter().flat_map(BTreeMap::keys).filter(|thread| !heads.contains_key(*thread)).cloned().collect();
        if unknown.len() > MAX_UNKNOWN {
            let why = format!("after names more than {MAX_UNKNOWN} threads that you are not a member of");
            return Err(Error::new(Code::TooLarge, why).at("after"));
        }
        let begin = Begin {
            id: self.id,
            called: ALL.to_owned(),
            head: Seqs::Each(heads),
            after: Seqs::Each(cursors),
            recovered: self.recovered,
            wanted,
            unknown,
            marker,
        };
        Ok((begin, notes))
    }

    fn cursor(&self, found: &JoinedThread) -> Result<u64, Error> {
        let place = found.receipt.as_ref().map(|row| row.place.min(found.head));
        let after = match (&self.after, &self.following.name) {
            // With a list of cursors, a thread that is not in it is one the client has nothing of.
            (Some(after), _) => Some(after.get(&found.thread).copied().or(place).unwrap_or(0)),
            // Joined since the durable subscription was last there: from the joining on.
            (None, Some(_)) if !self.fresh => Some(place.unwrap_or(found.since.saturating_sub(1))),
            (None, Some(_)) => place,
            (None, None) => None,
        };
        begin(found.head, after.filter(|_| self.last.is_none()), self.last, self.recovered)
    }

    fn wanted(&self, found: JoinedThread, cursor: u64) -> NewSubscription {
        let Following { kinds, name, confirm } = self.following.clone();
        let receipt = Receipt::wanted(name.as_deref(), found.receipt, cursor, confirm);
        NewSubscription { address: ThreadAddress::named(found.thread), cursor, named: false, kinds, receipt }
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
