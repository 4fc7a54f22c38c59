//! The projector: reads the log in order and makes the rows of the store from it. It alone assigns seqs.
//!
//! Invariants:
//! - what depends on other events (membership, a duplicate key, the next seq) is decided here, once, from the record and
//!   the records before it in its partition: never from the clock, so that every node and every rebuild decides alike;
//! - a record is judged by the rules of its version ([`rules`]), so that a later version of Weft decides about it alike;
//! - nothing is decided from another partition, since partitions have no common order;
//! - where a batch ends changes no verdict and no row: [`judge::BatchState`] shows what the batch has decided so far;
//! - rows and the position they come from are committed together, and updates are published only after the commit;
//! - foreign records are skipped and reported as dead letters, and reading continues, and so are those that the projector
//!   panics at ([`poison`]); when the store fails, the same records are tried again.
//!
//! [`opening`] says which store goes on, [`pump`] is the thread that reads and [`projectors`] are those beside it, [`rebuild`]
//! makes the store anew, [`verify`] holds it against the log. Of one record, [`judge`] says what becomes of an event, with [`thread`], [`keys`] (by
//! [`log_time`]), [`runs`] and [`messages`] for the parts; [`tickets`] judges who gets in with a ticket, [`work`] who works
//! on what for a group, [`groups`] what a group is like, [`kinds`] which custom kinds have a schema; [`receipts`] and [`dead_letters`] apply the other topics,
//! [`plain`] judges what other programs write. [`checkpoints`] compares this node with others.

mod cached_threads;
mod checkpoints;
mod commit;
mod dead_letters;
mod deliveries;
mod driver;
mod groups;
mod judge;
mod keys;
mod kinds;
pub mod letter_acts;
pub mod level;
mod log_time;
mod messages;
pub mod opening;
mod plain;
mod poison;
mod projectors;
mod pump;
pub mod rebuild;
mod receipts;
pub mod rehearsal;
mod rules;
mod runs;
mod share;
mod status;
mod thread;
mod tickets;
mod transaction;
pub mod verify;
mod wanted;
mod work;
mod work_state;

use std::sync::Arc;

use uuid::Uuid;

use self::cached_threads::CachedThreads;
use self::checkpoints::{Checkpoints, Crossed, Disagreement};
pub use self::commit::{
    AccessChange, Commit, CommittedEvent, Published, RequeuedNotice, RunNotice, ThreadUpdate, Update, Verdict,
};
pub use self::driver::PublishCommit;
use self::judge::BatchState;
pub use self::keys::KEY_LIFETIME;
use self::keys::LastPurged;
use self::letter_acts::{Act, Turn, What};
pub use self::messages::MAX_MESSAGE_DATA;
use self::poison::Panicked;
pub use self::pump::Pump;
use self::share::Share;
pub use self::status::{Failing, Status};
use self::thread::Thread;
pub use self::tickets::MAX_OPEN_TICKETS;
use self::tickets::PurgedTickets;
use self::transaction::{EventRecord, read_event};
use self::wanted::SharedWanted;
use self::work::KeptWorks;
use crate::log::{Checkpoint, Entry, Foreign, Log, Positions, Record, Topic};
use crate::protocol::custom::tenant_of_key as tenant_of_kinds;
use crate::protocol::error::Error;
use crate::protocol::letters::Effect;
use crate::protocol::tickets::{TicketOwner, owner_of_key};
use crate::protocol::work::tenant_of_key as tenant_of_groups;
use crate::store::dead_letters::LetterState;
use crate::store::{Progress, Store, StoreError};
use crate::{panics, telemetry};

/// Records judged and committed at once: enough to spread the cost of a commit, few enough to stay quick.
const BATCH: usize = 1_024;
/// A batch is committed once its rows have this many bytes, whatever is left of its records. What it publishes is no larger
/// than its rows. One record adds one event, but for the end of a run: that closes up to 8 MiB of text, each message read
/// when it is its turn, so that memory holds the rows and the frames of one such record and no more.
const COMMIT_BYTES: usize = 8 << 20;

/// What the log calls its partitions.
#[derive(Clone)]
struct PartitionNames {
    /// For each partition its topic, and its number there.
    topics: Vec<(Topic, u32)>,
    /// What each topic is called.
    names: [String; 3],
}

impl PartitionNames {
    fn of(log: &dyn Log) -> PartitionNames {
        PartitionNames {
            topics: (0..log.partitions()).map(|partition| log.topic_of(partition)).collect(),
            names: Topic::ALL.map(|topic| log.topic_name(topic)),
        }
    }

    /// The name of a partition's topic, and its number there.
    fn get(&self, partition: u32) -> Option<(&str, u32)> {
        let (topic, number) = self.topics.get(partition as usize)?;
        Some((&self.names[*topic as usize], *number))
    }
}

/// Why a batch was not committed.
#[derive(Debug, thiserror::Error)]
pub enum ProjectError {
    #[error("the store failed: {0}")]
    Store(#[from] StoreError),
    /// Trying again changes nothing.
    #[error(transparent)]
    Disagrees(#[from] Disagreement),
}

/// Why a batch was not committed, which may not be the last word.
enum BatchError {
    Panicked(Panicked),
    /// Another projector has come to know of a group meanwhile.
    GroupsChanged,
    Project(ProjectError),
}

impl From<ProjectError> for BatchError {
    fn from(error: ProjectError) -> BatchError {
        BatchError::Project(error)
    }
}

/// Why a record was not applied.
enum RecordError {
    Foreign(Foreign),
    Batch(ProjectError),
}

impl From<Foreign> for RecordError {
    fn from(foreign: Foreign) -> RecordError {
        RecordError::Foreign(foreign)
    }
}

impl From<StoreError> for RecordError {
    fn from(error: StoreError) -> RecordError {
        RecordError::Batch(error.into())
    }
}

/// What the projector keeps of one partition. Partitions share none of it.
struct PartitionState {
    progress: Progress,
    /// The last row of `key_times` that was purged, while more are due.
    keys_purged: Option<LastPurged>,
    tickets_purged: Option<PurgedTickets>,
    /// It is one of [`Projector::touched`].
    touched: bool,
}

impl PartitionState {
    fn new(progress: Progress) -> PartitionState {
        PartitionState { progress, keys_purged: None, tickets_purged: None, touched: false }
    }
}

/// Judges records and turns them into rows.
pub struct Projector {
    store: Arc<Store>,
    names: PartitionNames,
    /// The partitions of all topics.
    partitions: Vec<PartitionState>,
    /// Those that this batch has changed, each with its progress before.
    touched: Vec<(u32, Progress)>,
    /// For each partition the offset to read next, as the store has it.
    committed: Positions,
    threads: CachedThreads,
    /// None after a batch that was undone.
    works: KeptWorks,
    /// What groups want, as far as any projector of the store knows.
    wanted: SharedWanted,
    /// On a log that other nodes read as well.
    checkpoints: Option<Checkpoints>,
    /// Where other projectors work on the same store.
    share: Option<Share>,
    /// The version of the rules that the log was made under.
    first_rules: u16,
}

impl Projector {
    pub fn new(store: Arc<Store>, log: &dyn Log, progress: Vec<Progress>) -> Projector {
        let each = log.partitions() as usize / Topic::ALL.len();
        let events = || progress.iter().take(each).map(|progress| progress.next);
        let checkpoints = log.is_shared().then(|| Checkpoints::new(log.epoch(), events()));
        Projector {
            store,
            checkpoints,
            names: PartitionNames::of(log),
            committed: progress.iter().map(|progress| progress.next).collect(),
            partitions: progress.into_iter().map(PartitionState::new).collect(),
            touched: Vec::new(),
            threads: CachedThreads::new(1),
            works: KeptWorks::default(),
            wanted: SharedWanted::default(),
            share: None,
            first_rules: log.first_rules(),
        }
    }

    /// One like this, for a part of the partitions.
    fn with_share(&self, share: Share) -> Projector {
        Projector {
            store: self.store.clone(),
            names: self.names.clone(),
            partitions: self.partitions.iter().map(|it| PartitionState::new(it.progress)).collect(),
            touched: Vec::new(),
            committed: self.committed.clone(),
            threads: CachedThreads::new(share.of),
            works: KeptWorks::default(),
            wanted: self.wanted.clone(),
            checkpoints: self.checkpoints.clone(),
            share: Some(share),
            first_rules: self.first_rules,
        }
    }

    /// The rules that a record which names none is judged by there.
    fn rules_in(&self, partition: u32) -> u16 {
        self.partitions[partition as usize].progress.rules.max(self.first_rules)
    }

    /// For each partition the offset to read next.
    pub fn positions(&self) -> Positions {
        self.committed.clone()
    }

    /// The newest time in the log so far, in milliseconds.
    pub fn log_time(&self) -> u64 {
        self.partitions.iter().map(|it| log_time::newest(&it.progress)).max().unwrap_or(0)
    }

    /// The newest time in the log that two records agree on, in milliseconds.
    pub fn confirmed_time(&self) -> u64 {
        self.partitions.iter().map(|it| it.progress.log_time).max().unwrap_or(0)
    }

    /// What it makes of the log from here on is compared with what other nodes do.
    pub fn go_live(&mut self) {
        if let Some(checkpoints) = &mut self.checkpoints {
            checkpoints.go_live();
        }
    }

    /// Where there are several, each says for itself where its partitions are.
    fn say_positions(&self, status: &Status) {
        if let Some(share) = &self.share {
            status.advance(&share.partitions, &self.committed);
        }
    }

    /// All partitions are projected up to these positions, by whichever projector has each.
    fn settle_at(&self, positions: &[u64]) -> Result<(), StoreError> {
        let known = self.store.progress()?.unwrap_or_default();
        let known: Positions = known.iter().map(|progress| progress.next).collect();
        let mut rows = self.store.batch();
        rows.put_positions(&known, positions);
        self.store.commit(rows)
    }

    /// After a commit: the boundaries that it crossed, and the partitions in which another node had made the same.
    fn checkpoints(&mut self) -> (Vec<Crossed>, Vec<u32>) {
        self.checkpoints.as_mut().map(Checkpoints::commit).unwrap_or_default()
    }

    /// Judges and commits the first entries, as many as one commit may hold, and returns how many that were; `positions` is where
    /// the log goes on after all of them. After an error nothing has happened, and the call can be repeated.
    pub fn project(&mut self, entries: &[Entry], positions: &[u64]) -> Result<(usize, Commit), ProjectError> {
        let (mut first, mut poison) = (entries.len(), None);
        loop {
            let result = self.project_batch(&entries[..first], entries.len(), positions, poison.as_ref());
            self.end_batch(result.is_err());
            let panicked = match result {
                Ok(done) => return Ok(done),
                Err(BatchError::Panicked(panicked)) => panicked,
                Err(BatchError::GroupsChanged) => continue,
                Err(BatchError::Project(error)) => return Err(error),
            };
            // Those before it by themselves; then it alone, and only if it panics again it is poison.
            let was_alone = first == 1 && panicked.index == 0;
            first = panicked.index.max(1);
            poison = was_alone.then_some(panicked);
        }
    }

    /// Of a batch that is not committed, forgets what was made of its records.
    fn end_batch(&mut self, is_undone: bool) {
        for (partition, before) in self.touched.drain(..) {
            let state = &mut self.partitions[partition as usize];
            state.touched = false;
            if is_undone {
                *state = PartitionState::new(before);
            }
        }
        if is_undone {
            self.threads.clear();
            if let Some(checkpoints) = &mut self.checkpoints {
                checkpoints.roll_back();
            }
        }
    }

    /// `all`: how many there are up to `positions`. `poison`: what the only entry is known to come to.
    fn project_batch(
        &mut self,
        entries: &[Entry],
        all: usize,
        positions: &[u64],
        poison: Option<&Panicked>,
    ) -> Result<(usize, Commit), BatchError> {
        let store = self.store.clone();
        let letters = self.share.as_ref().map(|share| share.letters.clone());
        let known = self.wanted.get(&store).map_err(ProjectError::from)?;
        let mut state = BatchState::with(&store, letters.as_deref(), known, std::mem::take(&mut self.works));

        let mut applied = 0;
        for entry in entries {
            match poison {
                Some(panicked) => self.bury(entry, &panicked.why, &mut state)?,
                None => {
                    let result = panics::caught(|| self.apply_entry(entry, &mut state));
                    result.map_err(|why| BatchError::Panicked(Panicked { index: applied, why }))??;
                }
            }
            applied += 1;
            if state.tx.rows.bytes() >= COMMIT_BYTES {
                break;
            }
        }

        // The rest of the state is dropped after the commit: until then nobody else reads the dead letters that it changes.
        let BatchState { tx, works, .. } = state;
        let (mut rows, wanted) = (tx.rows, tx.wanted);
        self.threads.write(&mut rows);
        for (partition, before) in &self.touched {
            rows.put_progress(*partition, before, &self.partitions[*partition as usize].progress);
        }
        let is_last = applied == all;
        let next = self.partitions.iter().zip(positions).map(|(it, end)| match is_last {
            true => it.progress.next.max(*end),
            false => it.progress.next,
        });
        let next: Positions = next.collect();
        match &mut self.share {
            None => rows.put_positions(&self.committed, &next),
            Some(share) => {
                share.put_positions(&mut rows, (&self.committed, &next), |it| self.partitions[it].touched);
            }
        }
        if !self.wanted.commit(&store, rows, wanted).map_err(ProjectError::from)? {
            return Err(BatchError::GroupsChanged);
        }

        for (state, next) in self.partitions.iter_mut().zip(&next) {
            state.progress.next = *next;
        }
        self.committed = next;
        self.threads.shrink();
        self.works = works.keep();
        Ok((applied, tx.commit))
    }

    /// From now on the batch changes this partition.
    fn touch(&mut self, partition: u32) {
        let state = &mut self.partitions[partition as usize];
        if !state.touched {
            state.touched = true;
            self.touched.push((partition, state.progress));
        }
    }

    /// Makes a dead letter of a record that the projector panics at.
    fn bury(&mut self, entry: &Entry, why: &str, state: &mut BatchState<'_>) -> Result<(), ProjectError> {
        tracing::error!(position = %entry.at, why, "the projector fails at a record, which becomes a dead letter");
        telemetry::poisoned_records().increment(1);
        self.touch(entry.at.partition);
        let progress = &mut self.partitions[entry.at.partition as usize].progress;
        if let Some(checkpoints) = &mut self.checkpoints {
            checkpoints.cross(entry.at.partition, entry.at.offset, &progress.hash);
            let what = blake3::hash(&[&b"poison"[..], &entry.at.offset.to_be_bytes()].concat());
            progress.hash = checkpoints::link(&progress.hash, what.as_bytes());
        }
        self.put_unreadable(entry, &poison::unreadable(entry, why), state)?;
        if let Some((id, error)) = poison::verdict(entry) {
            state.tx.commit.verdicts.push((id, Err(error)));
        }
        self.partitions[entry.at.partition as usize].progress.next = entry.at.offset + 1;
        Ok(())
    }

    fn put_unreadable(&self, entry: &Entry, foreign: &Foreign, state: &mut BatchState<'_>) -> Result<(), StoreError> {
        let newest = log_time::newest(&self.partitions[entry.at.partition as usize].progress);
        if let Some((topic, number)) = self.names.get(entry.at.partition) {
            let source = dead_letters::ForeignSource { topic, partition: number, offset: entry.at.offset };
            state.dead_letters.put_foreign(&mut state.tx, &source, foreign, newest)?;
        }
        Ok(())
    }

    /// Applies one entry, whatever it is, and moves its partition's position past it.
    fn apply_entry(&mut self, entry: &Entry, state: &mut BatchState<'_>) -> Result<(), ProjectError> {
        let partition = entry.at.partition;
        self.touch(partition);
        state.tx.offset = entry.at.offset;
        if let Some(checkpoints) = &mut self.checkpoints {
            checkpoints.cross(partition, entry.at.offset, &self.partitions[partition as usize].progress.hash);
        }
        let named = match &entry.record {
            Ok(record) => Some(record.rules),
            Err(foreign) => foreign.plain.as_ref().and_then(|plain| plain.rules),
        };
        let rules = &mut self.partitions[partition as usize].progress.rules;
        *rules = named.unwrap_or_default().max(*rules);
        match self.apply_record(entry, state) {
            Ok(()) => {}
            Err(RecordError::Batch(error)) => return Err(error),
            Err(RecordError::Foreign(foreign)) => {
                tracing::warn!(position = %entry.at, foreign.why, "a foreign record in the log is skipped");
                telemetry::foreign_records().increment(1);
                self.put_unreadable(entry, &foreign, state)?;
            }
        }
        self.partitions[partition as usize].progress.next = entry.at.offset + 1;
        Ok(())
    }

    fn apply_record(&mut self, entry: &Entry, state: &mut BatchState<'_>) -> Result<(), RecordError> {
        let partition = entry.at.partition;
        let record = match &entry.record {
            Ok(record) => record,
            Err(foreign) => return self.apply_plain(entry.at, foreign, state),
        };
        if let Some(checkpoints) = &mut self.checkpoints
            && let Some(theirs) = Checkpoint::of(record)
        {
            let compared = checkpoints.compare(partition, &theirs);
            return compared.map_err(|disagreement| RecordError::Batch(disagreement.into()));
        }
        if letter_acts::is_act(record) {
            return self.apply_act(partition, record, state);
        }
        let at = match record.topic {
            Topic::Events if work::is_work(record) => return self.apply_work(partition, record, state),
            Topic::Events => return self.apply_by_key(partition, record, state),
            Topic::Receipts => state.receipts.apply(&mut state.tx, record)?,
            Topic::DeadLetters => state.dead_letters.apply(&mut state.tx, record)?,
        };
        log_time::advance(&mut self.partitions[partition as usize].progress, at);
        Ok(())
    }

    /// A record that its key says what it is about: what has no such key is an event.
    fn apply_by_key(&mut self, partition: u32, record: &Record, state: &mut BatchState<'_>) -> Result<(), RecordError> {
        let (key, since) = (&record.key, |version| record.rules >= version);
        if let Some(owner) = owner_of_key(key).filter(|_| since(rules::TICKETS_IN_THE_LOG)) {
            return self.apply_ticket(partition, owner, record, state);
        }
        if let Some(tenant) = tenant_of_groups(key).filter(|_| since(rules::WORK_IN_THE_LOG)) {
            return self.apply_group(partition, tenant, record, state);
        }
        if let Some(tenant) = tenant_of_kinds(key).filter(|_| since(rules::KINDS_HAVE_SCHEMAS)) {
            return self.apply_kind(partition, tenant, record, state);
        }
        self.apply_event(partition, record, state)
    }

    /// Gives an event its seq, or refuses it.
    fn apply_event(&mut self, partition: u32, record: &Record, state: &mut BatchState<'_>) -> Result<(), RecordError> {
        let (event, at) = read_event(record)?;

        let PartitionState { progress, keys_purged, tickets_purged, .. } = &mut self.partitions[partition as usize];
        log_time::advance(progress, at);
        state.keys.purge(&mut state.tx, partition, progress, keys_purged)?;
        state.tickets.purge(&mut state.tx, partition, progress.log_time, tickets_purged)?;
        // The event's own time counts for its own key, confirmed or not.
        let key_time = at.max(progress.log_time);

        let read = || Ok(Thread::new(&record.key, self.store.thread(&event.tenant, &event.thread)?, at));
        let verdict = self.threads.with(&record.key, read, |thread| {
            let head = thread.row.head;
            let input = EventRecord { partition, record, event: &event, at, key_time };
            let verdict = state.judge(&input, thread)?;
            if self.checkpoints.is_some() && thread.row.head > head {
                progress.hash = checkpoints::link(&progress.hash, &thread.row.hash);
            }
            Ok(verdict)
        })?;
        if let Err(refused) = &verdict {
            telemetry::project_refused(refused.code.as_str()).increment(1);
        }
        state.tx.commit.verdicts.push((event.event, verdict));
        Ok(())
    }

    /// Does what somebody wants done about a dead letter, if nobody has before.
    fn apply_act(&mut self, partition: u32, record: &Record, state: &mut BatchState<'_>) -> Result<(), RecordError> {
        let act = letter_acts::read(record)?;
        log_time::advance(&mut self.partitions[partition as usize].progress, act.at);

        let verdict = match record.topic {
            Topic::Events => self.act_on_event(partition, record, &act, state)?,
            _ => state.act_on_delivery(&act)?,
        };
        if let Err(refused) = &verdict {
            telemetry::project_refused(refused.code.as_str()).increment(1);
        }
        state.tx.commit.verdicts.push((act.record.id, verdict));
        Ok(())
    }

    /// An act in the partition of events that its letter is from.
    fn act_on_event(
        &mut self,
        partition: u32,
        record: &Record,
        act: &Act,
        state: &mut BatchState<'_>,
    ) -> Result<Verdict, RecordError> {
        let PartitionState { progress, keys_purged, .. } = &mut self.partitions[partition as usize];
        state.keys.purge(&mut state.tx, partition, progress, keys_purged)?;
        let turn = Turn { partition, rules: record.rules, at: act.at, key_time: act.at.max(progress.log_time) };

        let row = match state.letter_for(act)? {
            Ok(row) => row,
            Err(refused) => return Ok(Err(refused)),
        };
        if self.checkpoints.is_some() {
            // Nodes that do not take the same act make different things of the log.
            progress.hash = checkpoints::link(&progress.hash, blake3::hash(&record.value).as_bytes());
        }
        if act.what == What::Discard {
            state.close(act, row, LetterState::Discarded)?;
            return Ok(act.done());
        }
        if record.rules >= rules::WORK_IN_THE_LOG && letter_acts::effect_of(&row) == Ok(Effect::Work) {
            return Ok(state.requeue_work(act, row)?);
        }
        let (Some(thread), Ok(Effect::Append)) = (&act.record.thread, letter_acts::effect_of(&row)) else {
            return Ok(Err(letter_acts::effect_of(&row).err().unwrap_or_else(Error::no_thread)));
        };

        let read = || Ok(Thread::new(&record.key, self.store.thread(&act.record.tenant, thread)?, act.at));
        Ok(self.threads.with(&record.key, read, |thread| {
            let head = thread.row.head;
            let verdict = state.requeue_event(act, row, turn, thread)?;
            if self.checkpoints.is_some() && thread.row.head > head {
                progress.hash = checkpoints::link(&progress.hash, &thread.row.hash);
            }
            Ok(verdict)
        })?)
    }

    /// Gives a user a ticket, or lets the first in who uses it.
    fn apply_ticket(
        &mut self,
        partition: u32,
        owner: TicketOwner,
        record: &Record,
        state: &mut BatchState<'_>,
    ) -> Result<(), RecordError> {
        let ticket = tickets::read(owner, record)?;
        let (id, hash) = (ticket.id, ticket.hash);

        let PartitionState { progress, tickets_purged, .. } = &mut self.partitions[partition as usize];
        log_time::advance(progress, ticket.at);
        state.tickets.purge(&mut state.tx, partition, progress.log_time, tickets_purged)?;

        let verdict = state.tickets.judge(&mut state.tx, partition, ticket, progress.log_time)?;
        let published = verdict.map(|()| Published { seq: 0, event: id, duplicate: false });
        self.conclude(partition, id, &hash, published, state);
        Ok(())
    }

    /// Makes, changes or deletes a group.
    fn apply_group(
        &mut self,
        partition: u32,
        tenant: &str,
        record: &Record,
        state: &mut BatchState<'_>,
    ) -> Result<(), RecordError> {
        let group = groups::read(tenant, record)?;
        let id = group.id;
        log_time::advance(&mut self.partitions[partition as usize].progress, group.at);
        let verdict = state.groups.judge(&mut state.tx, group)?;
        self.conclude(partition, id, &record_hash(id), verdict, state);
        Ok(())
    }

    /// Sets the schema of a custom kind, or deletes it.
    fn apply_kind(
        &mut self,
        partition: u32,
        tenant: &str,
        record: &Record,
        state: &mut BatchState<'_>,
    ) -> Result<(), RecordError> {
        let kind = kinds::read(tenant, record)?;
        let id = kind.id;
        log_time::advance(&mut self.partitions[partition as usize].progress, kind.at);
        let verdict = state.kinds.judge(&mut state.tx, kind)?;
        self.conclude(partition, id, &record_hash(id), verdict, state);
        Ok(())
    }

    /// Leases work, or settles a lease.
    fn apply_work(&mut self, partition: u32, record: &Record, state: &mut BatchState<'_>) -> Result<(), RecordError> {
        let act = work::read(record)?;
        let (id, at) = (act.id, act.at);
        let progress = &mut self.partitions[partition as usize].progress;
        log_time::advance(progress, at);
        let log_time = progress.log_time;

        let read = || Ok(Thread::new(&record.key, self.store.thread_by_key(&record.key)?, at));
        let head = self.threads.with(&record.key, read, |thread| Ok(thread.row.head))?;
        let verdict = state.judge_work(act, head, log_time)?;
        self.conclude(partition, id, &record_hash(id), verdict, state);
        Ok(())
    }

    /// The end of a record that is no event: its verdict, and what other nodes compare. Nodes that let in different users, or
    /// give work to different workers, make different things of the log.
    fn conclude(&mut self, partition: u32, id: Uuid, what: &[u8; 32], verdict: Verdict, state: &mut BatchState<'_>) {
        let progress = &mut self.partitions[partition as usize].progress;
        match &verdict {
            Ok(_) if self.checkpoints.is_some() => progress.hash = checkpoints::link(&progress.hash, what),
            Ok(_) => {}
            Err(refused) => telemetry::project_refused(refused.code.as_str()).increment(1),
        }
        state.tx.commit.verdicts.push((id, verdict));
    }
}

/// What stands for a record of this id in the hash that nodes compare.
fn record_hash(id: Uuid) -> [u8; 32] {
    blake3::derive_key("weft 2026-11 record that was accepted", id.as_bytes())
}
