//! What must hold of leases and settlements that counted, whoever wrote them: read off the log's records and the verdicts on
//! them, and nothing else.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use uuid::Uuid;
use weft::log::{Entry, Record};
use weft::protocol::work::{Outcome, Settlement, WorkLeasedRecord, WorkSettledRecord};

/// Tenant, thread and group.
pub type Place = (String, String, String);

/// An attempt that is over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attempt {
    pub group_id: Uuid,
    pub seq: u64,
    pub attempt: u32,
    pub end: Settlement,
    /// The event is not tried again.
    pub is_last: bool,
}

struct Open {
    lease: Uuid,
    seq: u64,
    attempt: u32,
    attempts: u32,
    holder: String,
}

/// A group's work in a thread.
#[derive(Default)]
pub struct Work {
    group_id: Uuid,
    open: Option<Open>,
    pub attempts: Vec<Attempt>,
}

#[derive(Default)]
pub struct Ledger {
    pub places: BTreeMap<Place, Work>,
    /// The leases that counted.
    pub leases: HashSet<Uuid>,
    /// Of each settlement of a worker's that counted: its lease, and what it said.
    pub settled: HashMap<Uuid, Vec<Settlement>>,
}

pub enum Act {
    Leased(WorkLeasedRecord),
    Settled(WorkSettledRecord),
}

impl Act {
    /// What a record says about work, and the record's id.
    pub fn of(record: &Record) -> Option<(Uuid, Act)> {
        match &*record.kind {
            "work_leased" => {
                let it: WorkLeasedRecord = serde_json::from_slice(&record.value).unwrap();
                Some((it.id, Act::Leased(it)))
            }
            "work_settled" => {
                let it: WorkSettledRecord = serde_json::from_slice(&record.value).unwrap();
                Some((it.id, Act::Settled(it)))
            }
            _ => None,
        }
    }
}

impl Ledger {
    /// Goes through a log; `counts` says whether the record with an id was accepted.
    pub fn of(entries: &[Entry], counts: impl Fn(Uuid) -> bool) -> Ledger {
        let mut ledger = Ledger::default();
        for entry in entries {
            if let Some((id, act)) = entry.record.as_ref().ok().and_then(Act::of)
                && counts(id)
            {
                ledger.count(act);
            }
        }
        ledger
    }

    pub fn count(&mut self, act: Act) {
        match act {
            Act::Leased(it) => {
                let place = (it.tenant.clone(), it.thread.clone(), it.group.clone());
                self.leases.insert(it.id);
                self.places.entry(place).or_default().lease(&it);
            }
            Act::Settled(it) => {
                let place = (it.tenant.clone(), it.thread.clone(), it.group.clone());
                if !matches!(it.outcome, Settlement::Lost | Settlement::Expired) {
                    self.settled.entry(it.lease).or_default().push(it.outcome);
                }
                self.places.entry(place).or_default().settle(&it);
            }
        }
    }

    /// Of a place the events that its group, as it is now, is through with, in the order in which it was.
    pub fn finished(&self, place: &Place) -> Vec<u64> {
        let Some(work) = self.places.get(place) else { return Vec::new() };
        let of_now = work.attempts.iter().filter(|it| it.group_id == work.group_id && it.is_last);
        of_now.map(|it| it.seq).collect()
    }

    pub fn is_anything_open(&self) -> bool {
        self.places.values().any(|work| work.open.is_some())
    }
}

impl Work {
    fn lease(&mut self, it: &WorkLeasedRecord) {
        assert!(it.group_id >= self.group_id, "a lease of a group that was deleted and made again: {it:?}");
        if it.group_id > self.group_id {
            // It begins anew, whatever the one before it has left.
            (self.group_id, self.open) = (it.group_id, None);
        }
        assert!(self.open.is_none(), "two leases at once: {it:?}");
        let last = self.attempts.last().filter(|last| last.group_id == it.group_id);
        match last {
            Some(last) if !last.is_last => {
                assert_eq!((it.seq, it.attempt), (last.seq, last.attempt + 1), "what failed comes next: {it:?}");
            }
            _ => {
                assert_eq!(it.attempt, 1, "{it:?}");
                assert!(last.is_none_or(|last| it.seq > last.seq), "out of order, after {last:?}: {it:?}");
            }
        }
        let (lease, holder) = (it.id, it.holder.clone());
        self.open = Some(Open { lease, seq: it.seq, attempt: it.attempt, attempts: it.attempts, holder });
    }

    fn settle(&mut self, it: &WorkSettledRecord) {
        let open = self.open.as_ref().filter(|open| open.lease == it.lease);
        let Some(Open { seq, attempt, attempts, holder, .. }) = open else {
            panic!("a settlement counts whose lease is over: {it:?}")
        };
        let by_server = matches!(it.outcome, Settlement::Lost | Settlement::Expired);
        assert_eq!(it.by, if by_server { "weft" } else { holder }, "{it:?}");
        let is_last = match it.outcome {
            Settlement::Extend => return,
            Settlement::Done | Settlement::Reject => true,
            Settlement::Retry | Settlement::Lost | Settlement::Expired => attempt == attempts,
        };
        let (seq, attempt, end) = (*seq, *attempt, it.outcome);
        self.attempts.push(Attempt { group_id: self.group_id, seq, attempt, end, is_last });
        self.open = None;
    }
}

/// What the workers were told.
#[derive(Default)]
pub struct Told {
    /// Leases that were given to a worker.
    given: BTreeSet<Uuid>,
    /// For each settlement: its lease, what it said, and whether it was accepted, if there was an answer.
    answers: Vec<(Uuid, Outcome, Option<bool>)>,
}

impl Told {
    pub fn give(&mut self, lease: Uuid) {
        assert!(self.given.insert(lease), "a lease is given once");
    }

    pub fn answer(&mut self, lease: Uuid, outcome: Outcome, accepted: Option<bool>) {
        self.answers.push((lease, outcome, accepted));
    }

    /// What they were told is what the log says.
    pub fn check(&self, ledger: &Ledger) {
        for lease in &self.given {
            assert!(ledger.leases.contains(lease), "{lease} was given and does not count");
        }
        let mut answers: HashMap<(Uuid, &str), [usize; 3]> = HashMap::new();
        for (lease, outcome, accepted) in &self.answers {
            let outcome = Settlement::from(*outcome).as_str();
            answers.entry((*lease, outcome)).or_default()[accepted.map_or(2, usize::from)] += 1;
        }
        for ((lease, outcome), [_, accepted, unknown]) in answers {
            let counted =
                ledger.settled.get(&lease).map_or(0, |all| all.iter().filter(|it| it.as_str() == outcome).count());
            let may = accepted..=accepted + unknown;
            assert!(may.contains(&counted), "{lease} {outcome}: {counted} counted, of {accepted} or {unknown} more");
        }
    }
}
