//! Where a subscription begins: at a cursor of the client's, at the receipt of a durable subscription, or at the head.
//! Pure: what the store has comes in.

use std::collections::{BTreeMap, VecDeque};

use crate::auth::Principal;
use crate::delivery::subscriptions::{Following, MAX_SUBSCRIPTIONS, NewSubscription, Receipt, first_receipt};
use crate::edge::cursor::first_cursor;
use crate::protocol::command::After;
use crate::protocol::error::{Code, Error};
use crate::protocol::frame::Seqs;
use crate::protocol::ids::{self, ThreadAddress};
use crate::protocol::records::ReceiptRecord;
use crate::store::JoinedThread;

/// Threads that an `after` object may name although they are not there for the user (any more).
const MAX_UNKNOWN: usize = 100;
/// Bytes of threads and seqs in one record of what a durable subscription to all threads begins with. With 10,000
/// subscriptions of 128 characters at most, [`crate::store::MAX_PARTS`] of these suffice.
const PART_BYTES: usize = 512 << 10;
/// What a seq and its punctuation add to a thread in such a record, at most.
const SEQ_BYTES: usize = 24;
/// Also in the log: the receipt of a durable subscription to all of them.
pub const ALL: &str = ids::ALL_THREADS;

/// A `subscribe` that waits.
pub enum PendingSubscribe {
    /// For the list of the user's threads.
    Threads(SubscribeAll),
    /// For the receipts of a new durable subscription to be stored.
    Receipts(Box<SubscriptionPlan>),
    /// For others' turns on this worker: its subscriptions begin a few at a time.
    Turns(Box<Beginning>),
}

/// A `subscribe` that is ready to begin.
pub struct SubscriptionPlan {
    /// The command's id.
    pub id: i64,
    /// The thread as the client calls it; [`ALL`] for all.
    pub called: String,
    pub head: Seqs,
    pub after: Seqs,
    pub recovered: bool,
    pub subscriptions: VecDeque<NewSubscription>,
    /// The threads that were looked up for it.
    pub listed: usize,
    /// Threads that `after` names and that are not there for the user.
    pub unknown: Vec<String>,
    /// Written after all other receipts: it says that the durable subscription to all threads exists.
    pub marker: Option<ReceiptRecord>,
}

/// A `subscribe` whose subscriptions are being begun.
pub struct Beginning {
    pub plan: SubscriptionPlan,
    /// Threads whose subscription did not begin.
    pub failed: Vec<(String, Error)>,
}

/// A `subscribe` to all threads.
pub struct SubscribeAll {
    pub id: i64,
    pub after: Option<BTreeMap<String, u64>>,
    pub last: Option<u64>,
    pub recovered: bool,
    pub following: Following,
    /// The durable subscription does not exist yet.
    pub fresh: bool,
    /// The threads were listed when this node was level with the log.
    pub is_level: bool,
}

impl SubscribeAll {
    /// Where each thread's subscription begins, and the receipts to store before.
    pub fn plan(
        &self,
        who: &Principal,
        threads: Vec<JoinedThread>,
    ) -> Result<(SubscriptionPlan, Vec<ReceiptRecord>), Error> {
        let name = self.following.name.as_deref();
        let listed = threads.len();
        if self.following.all && listed > MAX_SUBSCRIPTIONS {
            let why = format!(
                "the tenant has more than {MAX_SUBSCRIPTIONS} threads, and a session as many subscriptions at most: read \
                 GET /v1/threads?all=true, and pages of events or streams of single threads"
            );
            return Err(Error::new(Code::TooLarge, why).at("all"));
        }
        let (mut heads, mut cursors) = (BTreeMap::new(), BTreeMap::new());
        let (mut subscriptions, mut receipts, mut begins) = (VecDeque::new(), Vec::new(), BTreeMap::new());
        for found in threads {
            let cursor = self.cursor(&found).map_err(|error| error.at(format!("after.{}", found.thread)))?;
            match name {
                Some(_) if found.receipt.is_some() => {}
                // A session has no more subscriptions than these.
                Some(_) if self.fresh && begins.len() >= MAX_SUBSCRIPTIONS => {}
                Some(_) if self.fresh => drop(begins.insert(found.thread.clone(), cursor)),
                // Joined later: it resumes where the user joined, unless the client says otherwise.
                Some(name) if cursor != begin_of_joined(&found) => {
                    receipts.push(first_receipt(who, &found.thread, name, cursor));
                }
                Some(_) | None => {}
            }
            heads.insert(found.thread.clone(), found.head);
            cursors.insert(found.thread.clone(), cursor);
            subscriptions.push_back(self.subscription(found, cursor));
        }

        let named = self.after.iter().flat_map(BTreeMap::keys);
        let unknown: Vec<String> = named.filter(|thread| !heads.contains_key(*thread)).cloned().collect();
        if unknown.len() > MAX_UNKNOWN {
            let why = format!(
                "`after` names {} threads that are not among those you subscribe to; at most {MAX_UNKNOWN} may be",
                unknown.len()
            );
            return Err(Error::new(Code::TooLarge, why).at("after"));
        }

        let marker = match name.filter(|_| self.fresh) {
            Some(name) => {
                let mut parts = parts(who, name, begins);
                let marker = parts.remove(0);
                receipts.extend(parts);
                Some(marker)
            }
            None => None,
        };
        let plan = SubscriptionPlan {
            id: self.id,
            called: ALL.to_owned(),
            listed,
            head: Seqs::Each(heads),
            after: Seqs::Each(cursors),
            recovered: self.recovered,
            subscriptions,
            unknown,
            marker,
        };
        Ok((plan, receipts))
    }

    fn cursor(&self, found: &JoinedThread) -> Result<u64, Error> {
        let stored = found.receipt.as_ref().map(|row| row.place.min(found.head));
        let after = match (&self.after, &self.following.name) {
            _ if self.last.is_some() => None,
            // A thread that is missing in the client's cursors is one that the client has nothing of.
            (Some(after), _) => Some(after.get(&found.thread).copied().or(stored).unwrap_or(0)),
            // Joined since the durable subscription was last connected: from the joining on.
            (None, Some(_)) if !self.fresh => Some(stored.unwrap_or(begin_of_joined(found))),
            (None, Some(_)) => stored,
            (None, None) => None,
        };
        first_cursor(found.head, after, self.last, self.recovered)
    }

    fn subscription(&self, found: JoinedThread, cursor: u64) -> NewSubscription {
        let Following { all: _, choice, name, confirm } = self.following.clone();
        let receipt = Receipt::wanted(name.as_deref(), found.receipt, cursor, confirm);
        NewSubscription {
            address: ThreadAddress::named(found.thread),
            cursor,
            named: false,
            choice,
            receipt,
            pace: None,
        }
    }
}

/// Where a durable subscription to all threads begins in one that was joined after it began.
fn begin_of_joined(found: &JoinedThread) -> u64 {
    found.since.saturating_sub(1)
}

/// The records of where a durable subscription to all threads begins: few, however many threads there are. The first one
/// is the subscription's marker, and is there without threads as well.
fn parts(who: &Principal, name: &str, begins: BTreeMap<String, u64>) -> Vec<ReceiptRecord> {
    let mut parts = vec![BTreeMap::new()];
    let mut bytes = 0;
    for (thread, seq) in begins {
        let size = thread.len() + SEQ_BYTES;
        if bytes + size > PART_BYTES {
            parts.push(BTreeMap::new());
            bytes = 0;
        }
        bytes += size;
        parts.last_mut().expect("it has a first part, and none is removed").insert(thread, seq);
    }

    let record = |(part, begins): (usize, BTreeMap<String, u64>)| {
        let thread = if part == 0 { ALL.to_owned() } else { format!("{ALL}{part}") };
        ReceiptRecord { begins: Some(begins), ..first_receipt(who, &thread, name, 0) }
    };
    parts.into_iter().enumerate().map(record).collect()
}

/// What a `subscribe` says of where it begins, for one thread.
pub fn seq_of(after: Option<&After>) -> Option<u64> {
    match after {
        Some(After::Seq(seq)) => Some(*seq),
        Some(After::Each(_)) | None => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::auth::Scopes;
    use crate::delivery::subscriptions::Choice;
    use crate::store::{MAX_PARTS, ReceiptRow};

    fn ada() -> Principal {
        Principal::new("acme", "ada", Scopes::default(), u64::MAX)
    }

    fn thread(name: &str, head: u64, since: u64, place: Option<u64>) -> JoinedThread {
        let receipt = place.map(|place| ReceiptRow { place, ..ReceiptRow::default() });
        JoinedThread { thread: name.into(), head, since, receipt }
    }

    fn all(name: Option<&str>, fresh: bool) -> SubscribeAll {
        let following = Following { all: false, choice: Choice::default(), name: name.map(Into::into), confirm: None };
        SubscribeAll { id: 1, after: None, last: None, recovered: true, following, fresh, is_level: true }
    }

    /// The cursors of a plan, and the threads whose receipts are stored first.
    fn planned(all: &SubscribeAll, threads: Vec<JoinedThread>) -> (Vec<u64>, Vec<String>) {
        let (plan, receipts) = all.plan(&ada(), threads).expect("a plan");
        let Seqs::Each(after) = plan.after else { panic!("one for each thread") };
        let cursors: Vec<u64> = plan.subscriptions.iter().map(|it| it.cursor).collect();
        assert_eq!(cursors, after.into_values().collect::<Vec<_>>());
        (cursors, receipts.into_iter().map(|it| it.thread).collect())
    }

    #[test]
    fn without_cursors_all_threads_begin_at_their_heads_or_so_many_events_before() {
        let threads = || vec![thread("a", 5, 1, None), thread("b", 9, 1, None)];
        assert_eq!(planned(&all(None, false), threads()), (vec![5, 9], vec![]));
        assert_eq!(planned(&SubscribeAll { last: Some(2), ..all(None, false) }, threads()).0, [3, 7]);
    }

    #[test]
    fn with_cursors_a_thread_that_is_missing_in_them_begins_at_its_first_event() {
        let after = Some(BTreeMap::from([("a".to_owned(), 3), ("gone".to_owned(), 7)]));
        let all = SubscribeAll { after, ..all(None, false) };
        let threads = vec![thread("a", 5, 1, None), thread("b", 9, 1, None)];
        assert_eq!(planned(&all, threads), (vec![3, 0], vec![]));
        assert_eq!(all.plan(&ada(), vec![thread("a", 5, 1, None)]).expect("a plan").0.unknown, ["gone"]);
        let refused = all.plan(&ada(), vec![thread("a", 2, 1, None)]).err().expect("beyond the head");
        assert_eq!(refused.field.as_deref(), Some("after.a"));
    }

    #[test]
    fn a_durable_subscription_goes_on_at_its_receipts_and_takes_in_threads_joined_since() {
        let threads = || vec![thread("a", 5, 1, Some(4)), thread("joined", 9, 7, None), thread("short", 2, 1, Some(8))];
        let known = all(Some("inbox"), false);
        assert_eq!(planned(&known, threads()), (vec![4, 6, 2], vec![]));
        assert!(known.plan(&ada(), threads()).expect("a plan").0.marker.is_none());

        let fresh = all(Some("inbox"), true);
        assert_eq!(planned(&fresh, vec![thread("a", 5, 1, None)]), (vec![5], vec![]));
        let marker = fresh.plan(&ada(), vec![]).expect("a plan").0.marker.expect("a new one is marked");
        assert_eq!((&*marker.thread, &*marker.name), (ALL, "inbox"));

        // Where the client itself says where to begin, that is kept for each thread.
        let last = SubscribeAll { last: Some(1), ..known };
        assert_eq!(planned(&last, threads()), (vec![4, 8, 1], vec!["joined".to_owned()]));
    }

    #[test]
    fn where_a_durable_subscription_begins_in_very_many_threads_is_few_records() {
        let name = |n: usize| format!("{n:0>128}");
        let threads = (0..MAX_SUBSCRIPTIONS + 5).map(|n| thread(&name(n), n as u64, 1, None)).collect();
        let (plan, receipts) = all(Some("inbox"), true).plan(&ada(), threads).expect("a plan");
        let marker = plan.marker.expect("a new one is marked");
        let records: Vec<_> = std::iter::once(&marker).chain(&receipts).collect();
        assert!(records.len() <= MAX_PARTS as usize, "{}", records.len());

        let parts: Vec<_> = records.iter().map(|record| record.part_of_all()).collect();
        assert_eq!(parts, (0..records.len() as u32).map(Some).collect::<Vec<_>>());
        let begins = records.iter().flat_map(|record| record.begins.clone().expect("each part has threads"));
        let expected = (0..MAX_SUBSCRIPTIONS).map(|n| (name(n), n as u64)).collect::<BTreeMap<_, _>>();
        assert_eq!(begins.collect::<BTreeMap<_, _>>(), expected);
        for record in records {
            assert!(crate::log::Record::from(record).value.len() < 1_000_000, "as large as Kafka's brokers allow");
        }
    }

    #[test]
    fn too_many_unknown_threads_are_refused() {
        let after = |n: usize| Some((0..n).map(|n| (format!("t{n}"), 0)).collect());
        assert!(SubscribeAll { after: after(100), ..all(None, false) }.plan(&ada(), vec![]).is_ok());
        let refused = SubscribeAll { after: after(101), ..all(None, false) }.plan(&ada(), vec![]).err();
        assert_eq!(refused.map(|error| error.code), Some(Code::TooLarge));
    }
}
