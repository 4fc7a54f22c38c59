//! The projector: reads the log in order and is the only one who gives a seq.
//!
//! Invariants:
//! - what depends on other events (membership, a duplicate key, the next seq) is decided here, once, from the record and
//!   what came before it in its partition: never from the clock, so that every node and every rebuild decides alike;
//! - rows and the position they come from are committed together, and only then does anybody hear of them;
//! - nothing stops it: what is not ours is counted and skipped, a store that fails is tried again with the same records.

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::Deserialize;
use tokio_tungstenite::tungstenite::Utf8Bytes;
use uuid::Uuid;

use crate::error::{Code, Error};
use crate::event::{self, LogEvent, MEMBER_ADDED, MEMBER_REMOVED, THREAD_CREATED, THREAD_UPDATED};
use crate::log::{Entry, Foreign, Grant, Log, Positions, Reader, Record};
use crate::store::{Batch, EventRow, KeyRow, MemberRow, Progress, Store, StoreError, ThreadRow, keys};
use crate::submit::{Published, Verdict};
use crate::{clock, ids, telemetry};

/// Records judged and committed at once: enough to spread the cost of a commit, few enough to stay quick.
const BATCH: usize = 1_024;
/// How long the loop goes on once it was told to stop.
const LAST_CALL: Duration = Duration::from_secs(1);
/// How often the log is asked where it ends, while it does not say.
const ASK_AGAIN: Duration = Duration::from_secs(10);
/// How long the loop waits for the log before it looks whether it shall stop.
const WAIT: Duration = Duration::from_millis(100);
/// How long an idempotency key is kept, in milliseconds of log time.
pub const KEY_LIFETIME: u64 = 24 * 60 * 60 * 1_000;
/// Expired keys are purged for whole seconds of log time: often, so that it is never much at once.
const PURGE_STEP: u64 = 1_000;
/// Threads whose state is kept at hand; beyond that it is read from the store again.
const THREADS_AT_HAND: usize = 50_000;

/// What became visible with one commit, in log order.
#[derive(Default)]
pub struct Committed {
    pub events: Vec<CommittedEvent>,
    pub verdicts: Vec<(Uuid, Verdict)>,
}

/// An event that has its seq.
pub struct CommittedEvent {
    /// `tenant/thread`.
    pub key: Arc<str>,
    pub seq: u64,
    pub frame: Utf8Bytes,
    pub change: Option<Change>,
}

/// Who may read the thread from this event on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    Joined(Vec<String>),
    Left(String),
}

/// A thread's state while the projector works on it. What it holds is true at the record in hand, committed or not.
struct Thread {
    key: Arc<str>,
    row: ThreadRow,
    changed: bool,
    /// Memberships looked up or changed so far.
    members: HashMap<String, bool>,
}

/// Judges records and turns them into rows.
pub struct Projector {
    store: Arc<Store>,
    epoch: String,
    progress: Vec<Progress>,
    threads: HashMap<String, Thread>,
    /// Keys taken by the batch in hand.
    keys: HashMap<Vec<u8>, KeyRow>,
    /// The log time of the oldest of them, those taken again since included.
    oldest_key: u64,
}

impl Projector {
    pub fn new(store: Arc<Store>, epoch: &str, progress: Vec<Progress>) -> Projector {
        Projector {
            store,
            epoch: epoch.to_owned(),
            progress,
            threads: HashMap::new(),
            keys: HashMap::new(),
            oldest_key: u64::MAX,
        }
    }

    /// For each partition the offset to read next.
    pub fn positions(&self) -> Positions {
        self.progress.iter().map(|progress| progress.next).collect()
    }

    /// The newest time in the log so far, in milliseconds.
    pub fn log_time(&self) -> u64 {
        self.progress.iter().map(|progress| progress.log_time).max().unwrap_or(0)
    }

    /// Judges and commits the first entries, as many as go together, and returns how many that were; `positions` is where
    /// the log goes on behind all of them. After an error nothing has happened, and the call can be repeated.
    pub fn project(&mut self, entries: &[Entry], positions: &[u64]) -> Result<(usize, Committed), StoreError> {
        let progress = self.progress.clone();
        let result = self.project_some(entries, positions);
        if result.is_err() {
            self.progress = progress;
            self.threads.clear();
            self.forget_keys();
        }
        result
    }

    /// Commits as many entries as go into one batch: all, unless expired keys must be purged in between, since the purge
    /// sees only what is committed.
    fn project_some(&mut self, entries: &[Entry], positions: &[u64]) -> Result<(usize, Committed), StoreError> {
        let store = self.store.clone();
        let mut batch = store.batch();
        let mut out = Committed::default();
        let mut taken = 0;
        for entry in entries {
            if !self.take(entry, &mut batch, &mut out, taken == 0)? {
                break;
            }
            taken += 1;
        }
        if taken == entries.len() {
            for (progress, next) in self.progress.iter_mut().zip(positions) {
                progress.next = progress.next.max(*next);
            }
        }
        for thread in self.threads.values_mut().filter(|thread| thread.changed) {
            thread.changed = false;
            if let Some((tenant, id)) = thread.key.split_once('/') {
                batch.put_thread(tenant, id, &thread.row);
            }
        }
        batch.put_progress(&self.epoch, &self.progress);
        store.commit(batch)?;
        self.forget_keys();
        if self.threads.len() > THREADS_AT_HAND {
            self.threads.clear();
        }
        Ok((taken, out))
    }

    fn forget_keys(&mut self) {
        self.keys.clear();
        self.oldest_key = u64::MAX;
    }

    /// Takes one entry into the batch; `false` if the batch must be committed before.
    fn take(
        &mut self,
        entry: &Entry,
        batch: &mut Batch<'_>,
        out: &mut Committed,
        first: bool,
    ) -> Result<bool, StoreError> {
        let partition = entry.at.partition;
        let read = entry.record.as_ref().map_err(Foreign::clone).and_then(|record| Ok((record, read_event(record)?)));
        if let Ok((_, (_, at))) = &read {
            let progress = &mut self.progress[partition as usize];
            let log_time = progress.log_time.max(*at);
            let purge_to = log_time.saturating_sub(KEY_LIFETIME) / PURGE_STEP * PURGE_STEP;
            if purge_to > progress.purged_to {
                // The purge sees what is committed. Keys of this batch are that old only when the log's time jumps.
                if !first && self.oldest_key < purge_to {
                    return Ok(false);
                }
                batch.purge_keys(partition, progress.purged_to, purge_to, |key| self.keys.contains_key(key))?;
                progress.purged_to = purge_to;
            }
            progress.log_time = log_time;
        }
        self.progress[partition as usize].next = entry.at.offset + 1;
        match read {
            Ok((record, (event, at))) => {
                let verdict = self.judge(partition, record, &event, at, batch, out)?;
                if let Err(refused) = &verdict {
                    telemetry::project_refused(refused.code.as_str()).increment(1);
                }
                out.verdicts.push((event.event, verdict));
            }
            Err(foreign) => {
                tracing::warn!(position = %entry.at, foreign.why, "a record in the log is not ours");
                telemetry::foreign_records().increment(1);
            }
        }
        Ok(true)
    }

    /// Gives the event its seq, or refuses it.
    fn judge(
        &mut self,
        partition: u32,
        record: &Record,
        event: &LogEvent<'_>,
        at: u64,
        batch: &mut Batch<'_>,
        out: &mut Committed,
    ) -> Result<Verdict, StoreError> {
        let log_time = self.progress[partition as usize].log_time;
        let store = self.store.clone();
        let thread = match self.threads.get_mut(&record.key) {
            Some(thread) => thread,
            None => {
                let row = store.thread(&event.tenant, &event.thread)?;
                self.threads.entry(record.key.clone()).or_insert_with(|| Thread::new(&record.key, row, at))
            }
        };
        if thread.row.head > 0 && record.grant == Grant::Member && !thread.is_member(&store, event, &event.from)? {
            return Ok(Err(Error::no_thread()));
        }
        let key = event.key.as_deref().map(|key| keys::joined(&[&event.tenant, &event.thread, &event.from, key]));
        if let Some(key) = &key {
            let taken = match self.keys.get(key) {
                Some(row) => Some(row.clone()),
                None => store.key(key)?,
            };
            if let Some(taken) = taken.filter(|row| log_time.saturating_sub(row.at) < KEY_LIFETIME) {
                return Ok(repeated(event, &taken));
            }
        }
        let change = match thread.change(&store, event)? {
            Ok(change) => change,
            Err(verdict) => return Ok(verdict),
        };
        let seq = thread.append(record, at);
        let frame = serde_json::to_string(&event.frame(seq)).unwrap_or_default();
        batch.put_event(
            &event.tenant,
            &event.thread,
            seq,
            &EventRow { kind: &event.kind, hash: thread.row.hash, frame: &frame },
        );
        thread.apply(&change, event, seq, batch);
        if let Some(key) = key {
            let row = KeyRow { seq, event: *event.event.as_bytes(), at: log_time, content: event.content_digest() };
            batch.put_key(partition, &key, &row);
            self.oldest_key = self.oldest_key.min(row.at);
            self.keys.insert(key, row);
        }
        out.events.push(CommittedEvent { key: thread.key.clone(), seq, frame: frame.into(), change });
        Ok(Ok(Published { seq, event: event.event, duplicate: false }))
    }
}

/// The event in a record, and its time in milliseconds; or why it is not ours.
fn read_event(record: &Record) -> Result<(LogEvent<'_>, u64), Foreign> {
    let foreign =
        |why: String| Foreign { why, key: Some(record.key.clone().into()), value: Some(record.value.clone()) };
    let event: LogEvent = serde_json::from_slice(&record.value)
        .map_err(|error| foreign(format!("the value is not an event: {error}")))?;
    let names = ids::check_name("tenant", &event.tenant)
        .and(ids::check_name("from", &event.from))
        .and(ids::check_thread(&event.thread));
    names.map_err(|error| foreign(error.to_string()))?;
    let key = record.key.split_once('/');
    if key != Some((&event.tenant, &event.thread)) {
        return Err(foreign("the key is not tenant/thread of the value".into()));
    }
    let at = clock::parse_rfc3339(&event.at).ok_or_else(|| foreign("at is not RFC 3339".into()))?;
    Ok((event, at))
}

/// The answer to a key that is already taken.
fn repeated(event: &LogEvent<'_>, taken: &KeyRow) -> Verdict {
    if taken.content != event.content_digest() {
        return Err(
            Error::new(Code::Conflict, format!("this key was used for another content, seq {}", taken.seq)).at("key")
        );
    }
    Ok(Published { seq: taken.seq, event: Uuid::from_bytes(taken.event), duplicate: true })
}

impl Thread {
    fn new(key: &str, row: Option<ThreadRow>, at: u64) -> Thread {
        let row = row.unwrap_or(ThreadRow { head: 0, hash: [0; 32], created_at: at, last_at: at, title: None });
        Thread { key: key.into(), row, changed: false, members: HashMap::new() }
    }

    fn is_member(&mut self, store: &Store, event: &LogEvent<'_>, user: &str) -> Result<bool, StoreError> {
        if let Some(known) = self.members.get(user) {
            return Ok(*known);
        }
        let member = store.is_member(&event.tenant, &event.thread, user)?;
        self.members.insert(user.to_owned(), member);
        Ok(member)
    }

    /// What the event changes about who may read; or the verdict, if there is nothing to append.
    fn change(&mut self, store: &Store, event: &LogEvent<'_>) -> Result<Result<Option<Change>, Verdict>, StoreError> {
        let exists = self.row.head > 0;
        let unchanged = Err(Ok(Published { seq: self.row.head, event: event.event, duplicate: true }));
        Ok(match &*event.kind {
            THREAD_CREATED if exists => Err(Err(Error::new(Code::Conflict, "the thread exists already").at("thread"))),
            THREAD_CREATED => match data::<Created>(event).and_then(|created| created.members_with(&event.from)) {
                Ok(members) => Ok(Some(Change::Joined(members))),
                Err(error) => Err(Err(error)),
            },
            THREAD_UPDATED | MEMBER_ADDED | MEMBER_REMOVED if !exists => Err(Err(Error::no_thread())),
            THREAD_UPDATED => match data::<Updated>(event) {
                Ok(updated) if self.row.title.as_deref() == Some(&*updated.title) => unchanged,
                Ok(_) => Ok(None),
                Err(error) => Err(Err(error)),
            },
            MEMBER_ADDED | MEMBER_REMOVED => match data::<Member>(event).and_then(Member::checked) {
                Ok(member) => {
                    let adding = event.kind == MEMBER_ADDED;
                    match (adding, self.is_member(store, event, &member.user)?) {
                        (true, false) => Ok(Some(Change::Joined(vec![member.user.into_owned()]))),
                        (false, true) => Ok(Some(Change::Left(member.user.into_owned()))),
                        _ => unchanged,
                    }
                }
                Err(error) => Err(Err(error)),
            },
            _ if event.parent.is_some_and(|parent| parent > self.row.head) => {
                Err(Err(Error::field("parent", format!("parent is behind the thread's head, {}", self.row.head))))
            }
            _ if !exists => Ok(Some(Change::Joined(vec![event.from.to_string()]))),
            _ => Ok(None),
        })
    }

    /// The next seq, and its link of the chain.
    fn append(&mut self, record: &Record, at: u64) -> u64 {
        let seq = self.row.head + 1;
        self.row.hash = event::chain(&self.row.hash, seq, &record.value);
        if seq == 1 {
            self.row.created_at = at;
        }
        self.row.head = seq;
        self.row.last_at = at;
        self.changed = true;
        seq
    }

    fn apply(&mut self, change: &Option<Change>, event: &LogEvent<'_>, seq: u64, batch: &mut Batch<'_>) {
        match change {
            Some(Change::Joined(users)) => {
                for user in users {
                    batch.put_member(&event.tenant, &event.thread, user, &MemberRow { since: seq });
                    self.members.insert(user.clone(), true);
                }
            }
            Some(Change::Left(user)) => {
                batch.delete_member(&event.tenant, &event.thread, user);
                self.members.insert(user.clone(), false);
            }
            None => {}
        }
        if matches!(&*event.kind, THREAD_CREATED | THREAD_UPDATED) {
            // Checked when the change was decided.
            self.row.title = data::<Created>(event).ok().and_then(|created| created.title).map(Cow::into_owned);
        }
    }
}

/// `data` of `thread_created`.
#[derive(Deserialize)]
struct Created<'a> {
    #[serde(borrow, default)]
    title: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    members: Vec<Cow<'a, str>>,
}

impl Created<'_> {
    /// The members, the creator among them, each once.
    fn members_with(&self, creator: &str) -> Result<Vec<String>, Error> {
        self.members.iter().try_for_each(|member| ids::check_name("members", member))?;
        let mut members: Vec<String> =
            self.members.iter().map(|member| member.to_string()).chain([creator.to_owned()]).collect();
        members.sort();
        members.dedup();
        Ok(members)
    }
}

/// `data` of `thread_updated`.
#[derive(Deserialize)]
struct Updated<'a> {
    #[serde(borrow)]
    title: Cow<'a, str>,
}

/// `data` of `member_added` and `member_removed`.
#[derive(Deserialize)]
struct Member<'a> {
    #[serde(borrow)]
    user: Cow<'a, str>,
}

impl Member<'_> {
    fn checked(self) -> Result<Self, Error> {
        ids::check_name("user", &self.user).map(|()| self)
    }
}

fn data<'a, T: Deserialize<'a>>(event: &LogEvent<'a>) -> Result<T, Error> {
    serde_json::from_str(event.data.get())
        .map_err(|error| Error::field("data", format!("data of {}: {error}", event.kind)))
}

/// How the projector is doing, for `/readyz` and metrics.
#[derive(Default)]
pub struct Status {
    positions: Mutex<Positions>,
    /// `at` of the newest record, in milliseconds.
    newest: AtomicU64,
    failing: Mutex<Option<String>>,
    caught_up: AtomicBool,
}

impl Status {
    pub fn positions(&self) -> Positions {
        self.positions.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub fn newest(&self) -> u64 {
        self.newest.load(Ordering::Relaxed)
    }

    /// Why it does not move on, if so.
    pub fn failing(&self) -> Option<String> {
        self.failing.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether all that was in the log at the start has been projected.
    pub fn caught_up(&self) -> bool {
        self.caught_up.load(Ordering::Acquire)
    }

    fn set_failing(&self, why: Option<String>) {
        *self.failing.lock().unwrap_or_else(PoisonError::into_inner) = why;
    }
}

/// The projector's thread: reads, projects and hands on, until `stop` is set and the log is read to its end.
pub struct Loop {
    pub log: Arc<dyn Log>,
    pub reader: Box<dyn Reader>,
    pub projector: Projector,
    pub status: Arc<Status>,
    pub stop: Arc<AtomicBool>,
    /// Takes what became visible; `false` when nobody is there any more.
    pub publish: Box<dyn FnMut(Committed) -> bool + Send>,
}

impl Loop {
    pub fn run(mut self) {
        let _stopped = Stopped(self.status.clone());
        let mut ends = self.ends();
        self.status.newest.store(self.projector.log_time(), Ordering::Relaxed);
        let (mut stopped, mut asked) = (None, Instant::now());
        let (seconds, records, events) =
            (telemetry::project_seconds(), telemetry::project_batch_records(), telemetry::project_events());
        loop {
            self.look_around(&mut ends, &mut asked);
            let stopping = self.stop.load(Ordering::Acquire);
            // Whoever had to be answered has been; others may go on writing for as long as they like.
            if stopping && stopped.get_or_insert_with(Instant::now).elapsed() > LAST_CALL {
                return;
            }
            let entries = match self.reader.next(BATCH, WAIT) {
                Ok(entries) => entries,
                Err(_) if stopping => return,
                Err(error) => {
                    self.pause(&format!("the log cannot be read: {error}"));
                    continue;
                }
            };
            self.status.set_failing(None);
            if entries.is_empty() {
                if stopping {
                    return;
                }
                continue;
            }
            records.record(entries.len() as f64);
            let mut done = 0;
            while done < entries.len() {
                let begin = Instant::now();
                let Some((taken, committed)) = self.project(&entries[done..]) else { return };
                seconds.record(begin.elapsed());
                events.increment(committed.events.len() as u64);
                done += taken;
                if !(self.publish)(committed) {
                    return;
                }
            }
            self.status.newest.store(self.projector.log_time(), Ordering::Relaxed);
            self.log.committed(self.reader.positions());
        }
    }

    /// Projects entries; a store that fails is asked again until it answers, or the loop shall stop.
    fn project(&mut self, entries: &[Entry]) -> Option<(usize, Committed)> {
        while !self.stop.load(Ordering::Acquire) || self.status.failing().is_none() {
            match self.projector.project(entries, self.reader.positions()) {
                Ok(done) => return Some(done),
                Err(error) => self.pause(&format!("the store failed: {error}")),
            }
        }
        None
    }

    fn pause(&self, why: &str) {
        tracing::error!(why, "the projector waits");
        self.status.set_failing(Some(why.to_owned()));
        std::thread::sleep(WAIT * 5);
    }

    /// Notes the position, and whether the end that the log had at the start has been reached.
    fn look_around(&self, ends: &mut Option<Positions>, asked: &mut Instant) {
        let positions = self.reader.positions();
        self.status.positions.lock().unwrap_or_else(PoisonError::into_inner).clone_from(positions);
        if self.status.caught_up() {
            return;
        }
        if ends.is_none() && asked.elapsed() > ASK_AGAIN {
            *ends = self.ends();
            *asked = Instant::now();
        }
        if ends.as_ref().is_some_and(|ends| positions.iter().zip(ends).all(|(next, end)| next >= end)) {
            self.status.caught_up.store(true, Ordering::Release);
        }
    }

    fn ends(&self) -> Option<Positions> {
        Some(self.log.bounds().ok()?.iter().map(|bounds| bounds.end).collect())
    }
}

/// Tells, however the loop ended, that it did.
struct Stopped(Arc<Status>);

impl Drop for Stopped {
    fn drop(&mut self) {
        self.0.set_failing(Some("the projector has stopped".into()));
    }
}
