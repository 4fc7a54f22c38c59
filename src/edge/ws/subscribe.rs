//! What `subscribe` does: it looks up where the subscription begins, waits for what must be stored before, and begins.
//!
//! While it waits, no other command takes effect and no live event is sent.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use super::plan::{ALL, Beginning, PendingSubscribe, SubscribeAll, SubscriptionPlan, seq_of};
use super::state::{SessionState, connected};
use crate::auth::Principal;
use crate::auth::scopes;
use crate::delivery::feed::Pause;
use crate::delivery::outbox::{Answer, Outbox};
use crate::delivery::subscriptions::{
    Choice, ConfirmPolicy, Following, MAX_SUBSCRIPTIONS, NewPace, NewSubscription, Receipt, first_receipt,
};
use crate::edge::blocking;
use crate::edge::cursor::{beyond_head, first_cursor, recovers};
use crate::ingest::pending::OnVerdict;
use crate::protocol::command::{After, Replay, Subscribe, Until};
use crate::protocol::error::{Code, Error};
use crate::protocol::frame::{Seqs, ServerFrame};
use crate::protocol::ids::{self, ThreadAddress};
use crate::protocol::records::ReceiptRecord;
use crate::store::JoinedThread;
use crate::{clock, telemetry};

/// Names of durable subscriptions that a user may have.
const MAX_NAMES: usize = 256;
/// Subscriptions that are begun in one go: each is a few lookups, some 10 µs.
const BEGIN_AT_ONCE: usize = 100;
/// So many threads that are looked up for a `subscribe` to all count as one command.
const LISTED_AS_ONE: usize = 100;

impl SessionState {
    pub fn subscribe(&mut self, subscribe: Subscribe<'_>) -> Result<(), Error> {
        let who = connected(self.who.as_ref())?.clone();
        scopes::read(who.scopes)?;
        let recovered = recovers(subscribe.epoch.as_deref(), &self.sockets.epoch);
        if subscribe.thread == ALL {
            self.subscribe_all(&who, subscribe, recovered)
        } else {
            self.subscribe_one(&who, subscribe, recovered)
        }
    }

    fn subscribe_one(&mut self, who: &Principal, subscribe: Subscribe<'_>, recovered: bool) -> Result<(), Error> {
        let thread = ids::resolve(&who.user, &subscribe.thread);
        if self.outgoing.feed.subs.contains(&thread) {
            return Err(Error::new(Code::Conflict, "the session is subscribed to this thread already").at("thread"));
        }
        let choice = self.choice(&subscribe)?;
        let head = self.sockets.rights.readable(who, &thread)?;
        let name = subscribe.name.as_deref();
        let row = match name {
            Some(name) => self.sockets.store.receipt_or_begin(&who.tenant, &thread, &who.user, name)?,
            None => None,
        };

        if let (Some(name), None) = (name, &row) {
            self.check_room_for(who, name)?;
        }

        // The client's cursor goes before the stored one, and so does the wish for the last events.
        let stored = match (&row, subscribe.last) {
            (Some(row), None) => Some(row.place.min(head)),
            _ => None,
        };
        // A replay begins with the thread's first event unless it is said where.
        let first = (subscribe.replay.is_some() && subscribe.last.is_none()).then_some(0);
        let after = seq_of(subscribe.after.as_ref()).or(stored).or(first);
        let cursor = first_cursor(head, after, subscribe.last, recovered)?;
        let pace = subscribe.replay.as_ref().map(|replay| pace_of(replay, cursor, head)).transpose()?;

        let receipts = match (name, &row) {
            (Some(name), None) => vec![first_receipt(who, &thread, name, cursor)],
            _ => Vec::new(),
        };
        let policy = confirm_policy(&subscribe);
        let subscription = NewSubscription {
            address: ThreadAddress::resolve(&who.user, subscribe.thread.to_string()),
            cursor,
            named: true,
            choice,
            receipt: Receipt::wanted(name, row, cursor, policy),
            pace,
        };
        let plan = SubscriptionPlan {
            id: subscribe.id,
            called: subscribe.thread.into_owned(),
            head: Seqs::One(head),
            after: Seqs::One(cursor),
            recovered,
            listed: 1,
            subscriptions: VecDeque::from([subscription]),
            unknown: Vec::new(),
            marker: None,
        };
        self.store_receipts(who, plan, receipts)
    }

    /// What the client wants of each thread.
    fn choice(&self, subscribe: &Subscribe<'_>) -> Result<Choice, Error> {
        let watch = |q: &str| match &self.sockets.search {
            Some(search) => search.watch("search", q),
            None => Err(Error::field("search", "search is off on this server")),
        };
        let search = subscribe.search.as_deref().map(watch).transpose()?;
        Ok(Choice { kinds: subscribe.kinds.clone().map(Into::into), search })
    }

    /// A name costs rows for ever.
    fn check_room_for(&self, who: &Principal, name: &str) -> Result<(), Error> {
        if self.sockets.store.has_room_for_name(&who.tenant, &who.user, name, MAX_NAMES)? {
            return Ok(());
        }
        let why = format!("a user has at most {MAX_NAMES} names of durable subscriptions: use one of them again");
        Err(Error::new(Code::TooLarge, why).at("name"))
    }

    /// Follows the user or the tenant first and lists the threads then: a thread that is joined or made in between is in the
    /// list, or announced, or both.
    fn subscribe_all(&mut self, who: &Principal, subscribe: Subscribe<'_>, recovered: bool) -> Result<(), Error> {
        if self.outgoing.feed.subs.follows() {
            return Err(Error::new(Code::Conflict, "the session is subscribed to \"*\" already").at("thread"));
        }
        let all = subscribe.all == Some(true);
        if all {
            scopes::read_all(who.scopes).map_err(|error| error.at("all"))?;
        }
        let choice = self.choice(&subscribe)?;
        let confirm = confirm_policy(&subscribe);
        let name = subscribe.name.map(|name| Box::from(&*name));
        let fresh = match &name {
            Some(name) => self.sockets.store.receipt(&who.tenant, ALL, &who.user, name)?.is_none(),
            None => false,
        };
        if let (Some(name), true) = (&name, fresh) {
            self.check_room_for(who, name)?;
        }
        let following = Following { all, choice, name: name.clone(), confirm };
        self.outgoing.feed.subs.follow(who, following.clone());

        let after = match subscribe.after {
            Some(After::Each(after)) => Some(after),
            Some(After::Seq(_)) | None => None,
        };
        let (id, last) = (subscribe.id, subscribe.last);
        self.list_threads(who, SubscribeAll { id, after, last, recovered, following, fresh, is_level: false });
        Ok(())
    }

    /// The threads of the user or the tenant, for a `subscribe` that waits for them.
    fn list_threads(&mut self, who: &Principal, all: SubscribeAll) {
        let (store, outbox, who) = (self.sockets.store.clone(), self.outgoing.feed.outbox.clone(), who.clone());
        let level = all.is_level.then(|| self.sockets.level.clone());
        let (name, of_tenant) = (all.following.name.clone(), all.following.all);
        self.wait_for(PendingSubscribe::Threads(all));
        tokio::spawn(async move {
            let reached = match level {
                Some(level) => level.reach().await,
                None => Ok(()),
            };
            let list = move || {
                let (tenant, user, name) = (&*who.tenant, &*who.user, name.as_deref());
                Ok(match of_tenant {
                    // One more shows that there are too many.
                    true => store.tenant_threads(tenant, user, name, MAX_SUBSCRIPTIONS + 1)?,
                    false => store.joined_threads(tenant, user, name)?,
                })
            };
            let threads = match reached {
                Ok(()) => blocking(list).await,
                Err(error) => Err(error),
            };
            outbox.push_answer(Answer::Threads(threads));
        });
    }

    /// The list of threads is there.
    pub fn on_threads(&mut self, threads: Result<Vec<JoinedThread>, Error>) {
        let (Some(PendingSubscribe::Threads(all)), Some(who)) = (self.stop_waiting(), self.who.clone()) else {
            return;
        };
        let id = all.id;
        let planned = threads.and_then(|threads| all.plan(&who, threads));
        if !all.is_level && self.may_lack_threads(&planned) {
            return self.list_threads(&who, SubscribeAll { is_level: true, ..all });
        }
        let begun = planned.and_then(|(plan, receipts)| {
            self.count(&who, &plan, &receipts)?;
            self.store_receipts(&who, plan, receipts)
        });
        if let Err(error) = begun {
            self.outgoing.feed.subs.unfollow_all();
            self.refuse_subscribe(id, &error);
        }
    }

    /// Whether the client's cursors are ahead of what this node has projected: it names a thread or a seq that is not here.
    fn may_lack_threads<T>(&self, planned: &Result<(SubscriptionPlan, T), Error>) -> bool {
        match planned {
            Ok((plan, _)) => !plan.unknown.is_empty() && self.sockets.level.may_be_missing(&Error::no_thread()),
            Err(error) => self.sockets.level.may_be_missing(error),
        }
    }

    /// The receipts of a new durable subscription are stored, or one of them is not.
    pub fn on_receipts(&mut self, attempt: u32, stored: Result<(), Error>) {
        // After the first failure of an attempt the others do not matter.
        let awaited = matches!(self.incoming.subscribing, Some(PendingSubscribe::Receipts(_)));
        if attempt != self.incoming.attempts || !awaited {
            return;
        }
        let (Some(PendingSubscribe::Receipts(plan)), Some(who)) = (self.stop_waiting(), self.who.clone()) else {
            return;
        };
        let (id, all) = (plan.id, plan.called == ALL);
        let begun = stored.and_then(|()| self.store_receipts(&who, *plan, Vec::new()));
        if let Err(error) = begun {
            if all {
                self.outgoing.feed.subs.unfollow_all();
            }
            self.refuse_subscribe(id, &error);
        }
    }

    /// A command that reads and writes for many threads counts as many commands.
    fn count(&self, who: &Principal, plan: &SubscriptionPlan, receipts: &[ReceiptRecord]) -> Result<(), Error> {
        let listed = plan.listed / LISTED_AS_ONE;
        self.sockets.admission.count_more(who, listed + receipts.len())
    }

    fn wait_for(&mut self, subscribing: PendingSubscribe) {
        let is_beginning = matches!(subscribing, PendingSubscribe::Turns(_));
        self.outgoing.feed.pause = if is_beginning { Pause::Everything } else { Pause::Live };
        self.incoming.subscribing = Some(subscribing);
    }

    fn stop_waiting(&mut self) -> Option<PendingSubscribe> {
        self.outgoing.feed.pause = Pause::None;
        self.incoming.subscribing.take()
    }

    /// A `subscribe` that was accepted before fails after all.
    fn refuse_subscribe(&mut self, id: i64, error: &Error) {
        telemetry::commands("invalid", error.code.as_str()).increment(1);
        self.outgoing.refuse(Some(id), error);
    }

    /// Begins once the receipts of a new durable subscription are stored: otherwise a session after a crash would not know
    /// where it began, and miss what came before.
    fn store_receipts(
        &mut self,
        who: &Principal,
        mut plan: SubscriptionPlan,
        mut receipts: Vec<ReceiptRecord>,
    ) -> Result<(), Error> {
        if receipts.is_empty() {
            receipts.extend(plan.marker.take());
        }
        if receipts.is_empty() {
            return self.begin_subscription(who, plan);
        }

        self.wait_for(PendingSubscribe::Receipts(Box::new(plan)));
        self.incoming.attempts = self.incoming.attempts.wrapping_add(1);
        let left = Arc::new(AtomicUsize::new(receipts.len()));
        for receipt in receipts {
            let reply = reply_to_last(self.outgoing.feed.outbox.clone(), self.incoming.attempts, left.clone());
            self.incoming.batch.add_record(receipt.id, (&receipt).into(), reply);
        }
        Ok(())
    }

    fn begin_subscription(&mut self, who: &Principal, plan: SubscriptionPlan) -> Result<(), Error> {
        self.begin_some(who, Box::new(Beginning { plan, failed: Vec::new() }))
    }

    /// Begins a few subscriptions and has the rest begin after others had their turn on this worker: so many at once would
    /// hold it up.
    fn begin_some(&mut self, who: &Principal, mut beginning: Box<Beginning>) -> Result<(), Error> {
        let all = beginning.plan.called == ALL;
        for _ in 0..BEGIN_AT_ONCE {
            let Some(subscription) = beginning.plan.subscriptions.pop_front() else {
                self.answer_begun(*beginning);
                return Ok(());
            };
            let thread = subscription.address.called.clone();
            // A thread that was joined meanwhile may have been announced already.
            if all && self.outgoing.feed.subs.contains(&thread) {
                continue;
            }
            match self.outgoing.feed.subs.add(who, subscription) {
                Ok(()) => {}
                Err(error) if all => beginning.failed.push((thread, error)),
                Err(error) => return Err(error),
            }
        }

        self.wait_for(PendingSubscribe::Turns(beginning));
        let outbox = self.outgoing.feed.outbox.clone();
        tokio::spawn(async move { outbox.push_answer(Answer::GoOn) });
        Ok(())
    }

    /// Others had their turn.
    pub fn on_turn(&mut self) {
        if !matches!(self.incoming.subscribing, Some(PendingSubscribe::Turns(_))) {
            return;
        }
        let (Some(PendingSubscribe::Turns(beginning)), Some(who)) = (self.stop_waiting(), self.who.clone()) else {
            return;
        };
        let id = beginning.plan.id;
        if let Err(error) = self.begin_some(&who, beginning) {
            self.refuse_subscribe(id, &error);
        }
    }

    fn answer_begun(&mut self, Beginning { plan, failed }: Beginning) {
        let SubscriptionPlan { id, called, head, after, recovered, unknown, .. } = plan;
        let epoch = &self.sockets.epoch;
        self.outgoing.answer(&ServerFrame::Subscribed { id, thread: &called, epoch, head, after, recovered });
        for thread in unknown {
            let error = Error::no_thread().at(format!("after.{thread}"));
            self.outgoing.ended(&thread, &error);
        }
        for (thread, error) in failed {
            self.outgoing.ended(&thread, &error);
        }
    }
}

/// Says so when the last of several records is stored, or any is not.
fn reply_to_last(outbox: Arc<Outbox>, attempt: u32, left: Arc<AtomicUsize>) -> OnVerdict {
    Box::new(move |verdict| {
        let last = left.fetch_sub(1, Ordering::AcqRel) == 1;
        match verdict {
            Ok(_) if last => outbox.push_answer(Answer::FirstReceiptsStored { attempt, stored: Ok(()) }),
            Ok(_) => {}
            Err(error) => outbox.push_answer(Answer::FirstReceiptsStored { attempt, stored: Err(error) }),
        }
    })
}

/// How a thread is to be replayed, after `cursor`. The speed was checked when the command was parsed.
fn pace_of(replay: &Replay<'_>, cursor: u64, head: u64) -> Result<NewPace, Error> {
    let (mut last, mut until_ms) = (head, None);
    match &replay.until {
        Some(Until::Seq(seq)) if *seq > head => return Err(beyond_head("replay.until", *seq, head)),
        Some(Until::Seq(seq)) if *seq < cursor => {
            let why = format!("replay.until ({seq}) is before the event where the replay begins ({cursor})");
            return Err(Error::field("replay.until", why));
        }
        Some(Until::Seq(seq)) => last = *seq,
        Some(Until::Time(time)) => {
            let why = "replay.until must be a seq, or a time such as 2026-11-27T10:00:00Z (RFC 3339)";
            until_ms = Some(clock::parse_rfc3339(time).ok_or_else(|| Error::field("replay.until", why))?);
        }
        None => {}
    }
    Ok(NewPace { speed: replay.speed, last, until_ms, ends: replay.until.is_some() })
}

/// How deliveries are to be confirmed, if the client asks for that. The values were checked when the command was parsed.
fn confirm_policy(subscribe: &Subscribe<'_>) -> Option<ConfirmPolicy> {
    let default = ConfirmPolicy::default();
    (subscribe.confirm == Some(true)).then(|| ConfirmPolicy {
        ack_within: subscribe.ack_within_ms.map_or(default.ack_within, Duration::from_millis),
        attempts: subscribe.attempts.unwrap_or(default.attempts),
    })
}
