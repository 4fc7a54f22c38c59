//! Work of groups: `consume` and `settle`.

use super::state::{SessionState, connected};
use crate::auth::{Principal, scopes};
use crate::delivery::outbox::Answer;
use crate::dispatch::{Settling, Wants};
use crate::projector::Verdict;
use crate::protocol::command::{Consume, Settle};
use crate::protocol::error::Error;
use crate::protocol::frame::ServerFrame;
use crate::protocol::work::{Outcome, Settlement, Work};
use crate::telemetry;

fn worker(who: Option<&Principal>) -> Result<&Principal, Error> {
    let who = connected(who)?;
    scopes::work(who.scopes)?;
    Ok(who)
}

impl SessionState {
    /// `consuming` is the answer, once the group is there.
    pub fn consume(&mut self, consume: &Consume<'_>) -> Result<(), Error> {
        let who = worker(self.who.as_ref())?;
        let wants = Wants { credit: consume.credit, kinds: consume.kinds.clone(), lease_ms: consume.lease_ms };
        wants.check()?;
        let work = self.outgoing.work();
        work.check(&consume.group, wants.credit)?;
        if let Some((credit, consumer)) = work.consumed.get_mut(&*consume.group) {
            *credit = wants.credit;
            consumer.set(wants);
            self.outgoing.answer(&ServerFrame::Consuming { id: consume.id, group: &consume.group });
            return Ok(());
        }

        let (id, group, kinds) = (consume.id, consume.group.to_string(), wants.kinds.clone());
        work.asked.insert(id, (group.clone(), wants));
        let (dispatcher, who) = (self.sockets.dispatcher.clone(), who.clone());
        let outbox = self.outgoing.feed.outbox.clone();
        tokio::spawn(async move {
            let made = dispatcher.ensure(&who, &group, kinds).await;
            outbox.push_answer(Answer::Consuming { id, made });
        });
        Ok(())
    }

    /// Whether the group is there that a `consume` wants.
    pub fn on_group(&mut self, id: i64, made: Result<(), Error>) {
        let Some((group, wants)) = self.outgoing.work().asked.remove(&id) else { return };
        let Some(who) = &self.who else { return };
        if let Err(error) = made {
            self.outgoing.refuse(Some(id), &error);
            return;
        }
        let outbox = self.outgoing.feed.outbox.clone();
        let sink = move |work| {
            outbox.push_answer(Answer::Work(Box::new(work)));
            true
        };
        match self.outgoing.work().consumed.get_mut(&group) {
            Some((credit, consumer)) => {
                *credit = wants.credit;
                consumer.set(wants);
            }
            None => {
                let credit = wants.credit;
                let consumer = self.sockets.dispatcher.consume(who, &group, wants, Box::new(sink));
                self.outgoing.work().consumed.insert(group.clone(), (credit, consumer));
            }
        }
        self.outgoing.answer(&ServerFrame::Consuming { id, group: &group });
    }

    pub fn on_work(&mut self, work: Work) {
        self.outgoing.work().waiting.push_back(work);
    }

    /// A settlement is a record behind those of what was published before it.
    pub fn settle(&mut self, settle: &Settle<'_>) -> Result<(), Error> {
        let who = worker(self.who.as_ref())?;
        let how = Settling { outcome: settle.outcome, reason: settle.reason.as_deref(), delay_ms: settle.delay_ms };
        let (record_id, record) = self.sockets.dispatcher.settlement(who, &settle.delivery, how)?;
        self.incoming.publish_begins(None);
        let (outbox, id, outcome) = (self.outgoing.feed.outbox.clone(), settle.id, settle.outcome);
        let reply = move |verdict| outbox.push_answer(Answer::Settled { id, outcome, verdict });
        self.incoming.batch.add_record(record_id, record, Box::new(reply));
        Ok(())
    }

    pub fn on_settled(&mut self, id: Option<i64>, outcome: Outcome, verdict: Verdict) {
        self.incoming.queue.publish_ends();
        match (verdict, id) {
            (Ok(_), id) => {
                telemetry::work_settled(Settlement::from(outcome).as_str()).increment(1);
                if let Some(id) = id {
                    self.outgoing.answer(&ServerFrame::Settled { id });
                }
            }
            (Err(error), id) => self.outgoing.refuse(id, &error),
        }
    }
}
