//! Several threads project one log: they make the same of it as one, also after a kill.
//!
//! The log is made by chance, from a seed: events of many threads with keys and members, runs with deltas and broken orders,
//! what is done about their dead letters, receipts, tickets, leases of work, and records that are none.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use serde_json::{Value, json};
use uuid::Uuid;
use weft::app::App;
use weft::clock;
use weft::config::{Config, LogChoice};
use weft::log::embedded::EmbeddedLog;
use weft::log::{Entry, Grant, Log, LogError, Positions, Reader, Record, Topic};
use weft::projector::rebuild::{self, compare};
use weft::projector::{Commit, Projector, Pump, Status, Update, Verdict};
use weft::protocol::dead_letters::{RUN_ORDER, UNREADABLE, letter_of};
use weft::protocol::event::LogEvent;
use weft::protocol::records::{DeadLetterRecord, LetterActRecord, ReceiptRecord, TicketIssuedRecord, TicketUsedRecord};
use weft::protocol::tickets::{Ticket, owner};
use weft::protocol::work::{GroupRecord, GroupSettings, Settlement, WorkLeasedRecord, WorkSettledRecord};
use weft::store::dead_letters::List;
use weft::store::{Progress, Store, ThreadRow};

use super::projector::{append, open_store, record};
use crate::on_both_logs;
use crate::support::{KAFKA_PARTITIONS, LogKind, PATIENCE, SECRET, Socket, TENANT, publish, token};

const PARTITIONS: u32 = 7;
const THREADS: usize = 40;
const RECORDS: usize = 6_000;
const USERS: [&str; 4] = ["ada", "ben", "cid", "dee"];
const BEGIN: u64 = 1_800_000_000_000;
const MANY: usize = 4;
/// The projector panics at this thread's events.
const POISONED: &str = "poisoned";

/// Numbers by chance, the same for the same seed (xorshift64*).
pub struct Chance(u64);

impl Chance {
    pub fn new(seed: u64) -> Chance {
        Chance(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % end
    }

    pub fn of<T: Clone>(&mut self, all: &[T]) -> T {
        all[self.below(all.len())].clone()
    }

    pub fn one_in(&mut self, times: usize) -> bool {
        self.below(times) == 0
    }
}

/// What was written so far, as far as later records are about it.
struct Writer {
    chance: Chance,
    now: u64,
    /// Events of runs, which may have broken their order: their ids and threads.
    runs: Vec<(Uuid, String)>,
    /// Letters of what cannot be read, and the threads that they name.
    unreadable: Vec<(Uuid, Option<String>)>,
    /// By thread and run: the text of its message so far.
    written: HashMap<(String, usize), usize>,
    leases: Vec<(Uuid, String)>,
}

impl Writer {
    fn next(&mut self) -> Record {
        self.now += [0, 1, 3, 200, 2_000][self.chance.below(5)];
        if self.chance.one_in(300) {
            // Idempotency keys expire.
            self.now += 13 * 60 * 60 * 1_000;
        }
        // Some threads are busier than others.
        let thread = self.chance.below(THREADS).min(self.chance.below(THREADS));
        let thread = format!("t{thread}");
        match self.chance.below(100) {
            0..35 => self.said(&thread),
            35..45 => self.member(&thread),
            45..68 => self.run(&thread),
            68..73 => self.act(),
            73..81 => self.receipt(&thread),
            81..87 => self.ticket(),
            87..90 => self.given_up(&thread),
            90..93 => self.stray(&thread),
            93..99 => self.work(&thread),
            _ if self.chance.one_in(8) => {
                Record { grant: Grant::Scope, ..record(self.now, POISONED, "ada", "x.poison", &json!(1), None) }
            }
            _ => self.said(&thread),
        }
    }

    fn at(&self) -> String {
        clock::rfc3339(self.now)
    }

    fn said(&mut self, thread: &str) -> Record {
        let key = self.chance.one_in(3).then(|| format!("key {}", self.chance.below(4)));
        let text = "x".repeat(self.chance.below(300));
        let content = json!({"n": self.chance.below(3), "text": if key.is_some() { "" } else { &text }});
        let from = self.chance.of(&USERS);
        record(self.now, thread, from, "x.said", &content, key.as_deref())
    }

    fn member(&mut self, thread: &str) -> Record {
        let (from, user) = (self.chance.of(&USERS), self.chance.of(&USERS));
        let (kind, data) = match self.chance.below(5) {
            0 => ("thread_created", json!({"title": "made", "members": [user]})),
            1 => ("thread_updated", json!({"title": format!("title {}", self.chance.below(3))})),
            2 => ("member_removed", json!({"user": user})),
            _ => ("member_added", json!({"user": user})),
        };
        record(self.now, thread, from, kind, &data, None)
    }

    /// An event of a run: often one that its run cannot have now.
    fn run(&mut self, thread: &str) -> Record {
        let run = self.chance.below(3);
        let written = self.written.entry((thread.to_owned(), run)).or_default();
        let (kind, data) = match self.chance.below(9) {
            0 | 1 => ("agent_started", json!({"agent": "scout"})),
            2 => ("agent_completed", json!({})),
            3 => ("agent_tool_call", json!({"call": "c", "tool": "look"})),
            4 => ("agent_tool_result", json!({"call": "c", "result": 1})),
            5 => {
                *written = 0;
                ("agent_message", json!({"message": "m"}))
            }
            _ => {
                let text = "piece ".repeat(1 + self.chance.below(20));
                let data = json!({"message": "m", "from_char": *written, "text": text});
                *written += text.len();
                ("agent_token", data)
            }
        };
        let mut made = record(self.now, thread, "scout", kind, &data, None);
        let mut event: LogEvent = serde_json::from_slice(&made.value).unwrap();
        event.run = Some(format!("run {run}").into());
        self.runs.push((event.event, thread.to_owned()));
        made.value = serde_json::to_vec(&event).unwrap().into();
        made.grant = Grant::Scope;
        made
    }

    /// Something is done about a letter, or about an event that is none. Where several threads project, what is done about an
    /// unreadable one may be read before it.
    fn act(&mut self) -> Record {
        let newest = self.unreadable.len().saturating_sub(10);
        let unreadable = self.chance.one_in(3) && !self.unreadable.is_empty();
        let (letter, reason, thread) = if unreadable {
            let (letter, thread) = self.chance.of(&self.unreadable[newest..]);
            (letter, UNREADABLE, thread)
        } else {
            let newest = self.runs.len().saturating_sub(60);
            let Some((event, thread)) = self.runs[newest..].get(self.chance.below(60)).cloned() else {
                return self.said("t0");
            };
            (letter_of(&[RUN_ORDER.as_bytes(), event.as_bytes()]), RUN_ORDER, Some(thread))
        };
        let discard = unreadable || self.chance.one_in(3);
        Record::from(&LetterActRecord {
            kind: if discard { "letter_discarded" } else { "letter_requeued" }.into(),
            id: clock::event_id(),
            letter,
            reason: reason.into(),
            tenant: TENANT.into(),
            thread,
            round: if unreadable { 0 } else { self.chance.below(2) as u32 },
            by: self.chance.of(&USERS).into(),
            note: None,
            attempt: None,
            at: self.at(),
        })
    }

    fn receipt(&mut self, thread: &str) -> Record {
        let name = self.chance.of(&["", "phone", "desk"]);
        let all = !name.is_empty() && self.chance.one_in(3);
        let begins = || (0..self.chance.below(5)).map(|n| (format!("t{n}"), n as u64)).collect::<BTreeMap<_, _>>();
        let begins = all.then(begins);
        let place = self.chance.below(50) as u64;
        Record::from(&ReceiptRecord {
            id: clock::event_id(),
            tenant: TENANT.into(),
            thread: if all { self.chance.of(&["*", "*1"]).into() } else { thread.into() },
            user: self.chance.of(&USERS).into(),
            name: name.into(),
            place,
            acked: place,
            sent: place + 3,
            attempts: self.chance.below(3) as u32,
            at: self.at(),
            begins,
        })
    }

    fn ticket(&mut self) -> Record {
        let (user, number) = (format!("user{}", self.chance.below(12)), self.chance.below(3) as u8);
        let owner = owner(TENANT, &user);
        let ticket = Ticket::new(&owner, [[number; 16], [0; 16]]);
        let hash = blake3::Hash::from_bytes(ticket.hash()).to_hex().to_string();
        let (id, at) = (clock::event_id(), self.at());
        if self.chance.one_in(2) {
            return Record::ticket_used(&owner, &TicketUsedRecord { kind: "ticket_used".into(), id, hash, at });
        }
        Record::from(&TicketIssuedRecord {
            kind: "ticket_issued".into(),
            id,
            tenant: TENANT.into(),
            user,
            hash,
            scopes: "publish".into(),
            iat_ms: None,
            exp: self.now / 1_000,
            at,
            expires_at: clock::rfc3339(self.now + 30_000),
        })
    }

    /// A session gives up an event.
    fn given_up(&mut self, thread: &str) -> Record {
        let seq = self.chance.below(5) as u64;
        Record::from(&DeadLetterRecord {
            id: clock::event_id(),
            letter: letter_of(&[thread.as_bytes(), &seq.to_be_bytes()]),
            reason: "unacknowledged".into(),
            tenant: TENANT.into(),
            thread: thread.into(),
            user: "ada".into(),
            name: Some("phone".into()),
            seq,
            attempts: 5,
            error: format!("not acknowledged {seq} times"),
            grant: None,
            at: self.at(),
            kind: Some("x.said".into()),
            round: 0,
            tries: Vec::new(),
        })
    }

    /// What is no record of its topic. One in three is in another partition than what is done about its letter.
    fn stray(&mut self, thread: &str) -> Record {
        let mut stray = record(self.now, thread, "ada", "x.stray", &json!(1), None);
        stray.topic = self.chance.of(&Topic::ALL);
        stray.value = json!({"tenant": TENANT, "stray": self.chance.below(1_000)}).to_string().into();
        if self.chance.one_in(3) {
            stray.key = format!("stray {}", self.chance.below(1_000));
        }
        stray
    }

    fn work(&mut self, thread: &str) -> Record {
        if self.chance.one_in(8) {
            return Record::from(&GroupRecord {
                kind: "group_set".into(),
                id: clock::event_id(),
                tenant: TENANT.into(),
                group: format!("g{}", self.chance.below(3)),
                settings: Some(GroupSettings::default()),
                if_absent: self.chance.one_in(2),
                by: "ada".into(),
                at: self.at(),
            });
        }
        let lease = self.leases.last().cloned().filter(|_| self.chance.one_in(2));
        if let Some((lease, thread)) = lease {
            return Record::from(&WorkSettledRecord {
                kind: "work_settled".into(),
                id: clock::event_id(),
                tenant: TENANT.into(),
                thread,
                group: "g0".into(),
                lease,
                outcome: self.chance.of(&[Settlement::Done, Settlement::Reject, Settlement::Retry]),
                reason: Some("it did not work".into()),
                until: Some(clock::rfc3339(self.now + 60_000)),
                by: "wim".into(),
                at: self.at(),
            });
        }
        let id = clock::event_id();
        self.leases.push((id, thread.to_owned()));
        let after = self.chance.below(2) as u64;
        Record::from(&WorkLeasedRecord {
            kind: "work_leased".into(),
            id,
            tenant: TENANT.into(),
            thread: thread.into(),
            group: "g0".into(),
            group_id: Uuid::from_bytes([1; 16]),
            seq: after + 1,
            event_kind: "x.said".into(),
            after,
            parallel: false,
            attempt: 1 + self.chance.below(2) as u32,
            attempts: 2,
            holder: "wim".into(),
            at: self.at(),
            until: clock::rfc3339(self.now + 30_000),
        })
    }
}

/// Writes a log from a seed.
fn write(log: &EmbeddedLog, seed: u64) {
    let mut writer = Writer {
        chance: Chance::new(seed),
        now: BEGIN,
        runs: Vec::new(),
        unreadable: Vec::new(),
        written: HashMap::new(),
        leases: Vec::new(),
    };
    let mut left = RECORDS;
    while left > 0 {
        let size = left.min(1 + writer.chance.below(200));
        let records: Vec<Record> = (0..size).map(|_| writer.next()).collect();
        let keys: Vec<Option<String>> =
            records.iter().map(|it| (it.kind == "x.stray").then(|| it.key.clone())).collect();
        for (place, key) in append(log, records).into_iter().zip(keys) {
            let Some(key) = key else { continue };
            let (topic, within) = log.topic_of(place.partition);
            let facts = [UNREADABLE.as_bytes(), topic.as_str().as_bytes()];
            let letter = letter_of(&[facts[0], facts[1], &within.to_be_bytes(), &place.offset.to_be_bytes()]);
            writer.unreadable.push((letter, key.split_once('/').map(|(_, thread)| thread.to_owned())));
        }
        if writer.chance.one_in(10) {
            log.append_foreign(writer.chance.below(3 * PARTITIONS as usize) as u32, b"\xffgarbage").unwrap();
        }
        left -= size;
    }
}

fn open_log(folder: &Path) -> Arc<EmbeddedLog> {
    Arc::new(EmbeddedLog::open(&folder.join("log"), PARTITIONS).unwrap())
}

/// A store of the log as far as it has come, with a thread that is poisoned from the beginning.
fn open(log: &EmbeddedLog, folder: &Path) -> (Arc<Store>, Vec<Progress>) {
    let (store, progress) = open_store(log, folder);
    if progress.iter().all(|it| it.next == 0) {
        let mut batch = store.batch();
        batch.put_thread(TENANT, POISONED, &ThreadRow { head: u64::MAX, ..ThreadRow::default() });
        store.commit(batch).unwrap();
    }
    (store, progress)
}

/// What the projector's threads have published.
#[derive(Default)]
struct Published {
    verdicts: BTreeMap<Uuid, Verdict>,
    /// By `tenant/thread`, in the order in which they came.
    seqs: BTreeMap<String, Vec<u64>>,
    /// The names of the threads that published.
    by: BTreeSet<String>,
}

impl Published {
    fn take(&mut self, commit: Commit) {
        self.verdicts.extend(commit.verdicts);
        for update in commit.events {
            if let Update::Event(event, _) = update.update {
                self.seqs.entry(update.key.to_string()).or_default().push(event.seq);
            }
        }
        self.by.insert(std::thread::current().name().unwrap_or_default().to_owned());
    }
}

/// Lets it run until it has projected all that the log has now.
fn to_the_end(pump: Pump) {
    let (ends, status, stop) = (pump.log.ends().unwrap(), pump.status.clone(), pump.stop.clone());
    let running = pump.start().unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let done = async { tokio::time::timeout(PATIENCE, status.until_past(&ends)).await };
    runtime.block_on(done).expect("it gets to the end");
    stop.store(true, Ordering::Release);
    running.join().unwrap();
}

/// Projects the log to its end, in so many threads.
fn project(log: &Arc<EmbeddedLog>, folder: &Path, threads: usize) -> (Arc<Store>, Published) {
    let published = Arc::new(Mutex::new(Published::default()));
    let to = published.clone();
    let (store, progress) = open(log, folder);
    let begin: Vec<u64> = progress.iter().map(|it| it.next).collect();
    let pump = Pump {
        projector: Projector::new(store.clone(), log.as_ref(), progress),
        reader: log.reader(&begin).unwrap(),
        log: log.clone(),
        threads,
        status: Arc::default(),
        stop: Arc::default(),
        publish: Box::new(move |commit| {
            to.lock().unwrap().take(commit);
            true
        }),
    };
    to_the_end(pump);
    let published = std::mem::take(&mut *published.lock().unwrap());
    (store, published)
}

fn assert_equal(one: &Store, other: &Store, what: &str) {
    compare(one, other).unwrap_or_else(|differs| panic!("{what}: {differs}"));
    assert_eq!(one.progress().unwrap(), other.progress().unwrap(), "{what}");
}

#[test]
fn one_and_four_threads_make_the_same_of_a_log() {
    for seed in 1..=5 {
        let folder = tempfile::tempdir().unwrap();
        let log = open_log(folder.path());
        write(&log, seed);
        let (one, by_one) = project(&log, &folder.path().join("one"), 1);
        let names: Vec<_> = by_one.by.iter().map(String::as_str).collect();
        assert_eq!(names, ["projector"]);
        // The log has what it is to have: letters that are open, some of which an act has closed, and poison.
        for reason in [RUN_ORDER, UNREADABLE, "unacknowledged", "rejected"] {
            assert!(one.dead_letter_count(TENANT, &List::Reason(reason)).unwrap().is_some(), "{reason}");
        }
        let refused = by_one.verdicts.values().filter_map(|it| it.as_ref().err()).map(|error| error.code.as_str());
        let refused: BTreeSet<&str> = refused.collect();
        assert!(refused.is_superset(&["conflict", "internal", "not_found", "run_order"].into()), "{refused:?}");

        for threads in [4, 3] {
            let (several, by_several) = project(&log, &folder.path().join(format!("{threads}")), threads);
            assert_equal(&one, &several, &format!("seed {seed}, {threads} threads"));
            assert_eq!(by_one.verdicts, by_several.verdicts, "seed {seed}");
            assert_eq!(by_one.seqs, by_several.seqs, "each thread's events come in its order: seed {seed}");
            let own = (1..=threads).map(|number| format!("projector-{number}"));
            assert!(by_several.by.is_superset(&own.collect()), "each of them has worked: {:?}", by_several.by);
        }
    }
}

#[test]
fn few_records_are_projected_by_the_thread_that_reads_them() {
    let folder = tempfile::tempdir().unwrap();
    let log = open_log(folder.path());
    append(&log, (0..20).map(|n| record(BEGIN, &format!("t{n}"), "ada", "x.said", &json!(n), None)).collect());
    let (one, _) = project(&log, &folder.path().join("one"), 1);
    let (several, published) = project(&log, &folder.path().join("several"), 4);
    assert_equal(&one, &several, "few records");
    assert_eq!(published.by.iter().collect::<Vec<_>>(), ["projector"]);
}

/// Reads the log, and holds what was read against what is done: more than that is in memory at no time.
struct Counted {
    reader: Box<dyn Reader>,
    counts: Arc<Counts>,
}

#[derive(Default)]
struct Counts {
    /// Records that were read, and those that are done.
    state: Mutex<(usize, usize)>,
    read_more: Condvar,
}

/// What may be given to the threads before the log is read again, and two reads: one more is dealt out, one waits to be.
const MOST: usize = MANY * 1_024 + 2 * 1_024;

impl Reader for Counted {
    fn next(&mut self, max: usize, wait: Duration) -> Result<Vec<Entry>, LogError> {
        let entries = self.reader.next(max, wait)?;
        let mut state = self.counts.state.lock().unwrap();
        state.0 += entries.len();
        let (read, done) = *state;
        assert!(read - done <= MOST, "{read} are read, {done} are done");
        self.counts.read_more.notify_all();
        Ok(entries)
    }

    fn positions(&self) -> &Positions {
        self.reader.positions()
    }
}

#[test]
fn the_log_is_not_read_while_so_much_is_dealt_out() {
    const ALL: usize = 20_000;
    let folder = tempfile::tempdir().unwrap();
    let log = open_log(folder.path());
    let said = |n: usize| record(BEGIN, &format!("t{}", n % THREADS), "ada", "x.said", &json!(n), None);
    append(&log, (0..ALL).map(said).collect());

    let (store, progress) = open(&log, &folder.path().join("several"));
    let counts = Arc::new(Counts::default());
    let done = counts.clone();
    let pump = Pump {
        projector: Projector::new(store.clone(), log.as_ref(), progress),
        reader: Box::new(Counted {
            reader: log.reader(&vec![0; log.partitions() as usize]).unwrap(),
            counts: counts.clone(),
        }),
        log: log.clone(),
        threads: MANY,
        status: Arc::default(),
        stop: Arc::default(),
        // Nothing gets done before the reader has read as much as it may.
        publish: Box::new(move |commit| {
            let state = done.state.lock().unwrap();
            let mut state = done.read_more.wait_while(state, |(read, _)| *read < MANY * 1_024).unwrap();
            state.1 += commit.verdicts.len();
            true
        }),
    };
    to_the_end(pump);
    assert_eq!(*counts.state.lock().unwrap(), (ALL, ALL));
}

/// Where a child works, and how many commits it lives.
const FOLDER: &str = "WEFT_TEST_FOLDER";
const COMMITS: &str = "WEFT_TEST_COMMITS";

#[test]
fn after_a_kill_amid_its_commits_the_projector_goes_on_to_the_same() {
    const SIGABRT: i32 = 6;
    for seed in 11..=13 {
        let folder = tempfile::tempdir().unwrap();
        let log = open_log(folder.path());
        write(&log, seed);
        let (one, _) = project(&log, &folder.path().join("one"), 1);
        let ends = log.ends().unwrap();
        log.close();
        drop(log);

        let mut before = vec![0; ends.len()];
        for commits in [3, 7, 5] {
            let child = Command::new(std::env::current_exe().unwrap())
                .args(["--ignored", "--exact", "--nocapture", "persistence::threads::child_projects_and_is_killed"])
                .env(FOLDER, folder.path())
                .env(COMMITS, commits.to_string())
                .output()
                .unwrap();
            assert_eq!(child.status.signal(), Some(SIGABRT), "{}", String::from_utf8_lossy(&child.stderr));
            let store = Store::open(&folder.path().join("killed")).unwrap();
            let positions: Vec<u64> = store.progress().unwrap().unwrap().iter().map(|it| it.next).collect();
            assert!(positions.iter().zip(&before).all(|(now, before)| now >= before), "nothing goes back");
            assert!(positions != before && positions != ends, "it was killed on its way: {positions:?}");
            before = positions;
        }

        let log = open_log(folder.path());
        // Another number of threads goes on.
        let threads = [4, 1, 3][seed as usize % 3];
        let (killed, _) = project(&log, &folder.path().join("killed"), threads);
        assert_equal(&one, &killed, &format!("seed {seed}"));
    }
}

#[test]
#[ignore = "kills its process; a test above starts it in one of its own"]
fn child_projects_and_is_killed() {
    let folder = PathBuf::from(std::env::var(FOLDER).expect("a test above starts this one, in a process of its own"));
    let most: usize = std::env::var(COMMITS).unwrap().parse().unwrap();
    let log = open_log(&folder);
    let (store, progress) = open(&log, &folder.join("killed"));
    let begin: Vec<u64> = progress.iter().map(|it| it.next).collect();
    let commits = Mutex::new(0);
    let flushed = store.clone();
    let pump = Pump {
        projector: Projector::new(store, log.as_ref(), progress),
        reader: log.reader(&begin).unwrap(),
        log,
        threads: MANY,
        status: Arc::new(Status::default()),
        stop: Arc::new(AtomicBool::new(false)),
        publish: Box::new(move |_| {
            let mut commits = commits.lock().unwrap();
            *commits += 1;
            // What is on the disk after the kill is what was committed by now, also by the others, which go on meanwhile.
            if *commits + 1 == most {
                flushed.flush().unwrap();
            }
            if *commits == most {
                std::process::abort();
            }
            true
        }),
    };
    pump.start().unwrap().join().unwrap();
}

/// A server in this process whose projector has several threads.
async fn serve(log: LogKind, data: &Path) -> (Config, App) {
    let (kind, brokers, prefix) = match log {
        LogKind::Embedded => (LogChoice::Embedded, None, None),
        LogKind::Kafka { brokers, prefix } => (LogChoice::Kafka, Some(brokers), Some(prefix)),
    };
    let default = Config::default();
    let config = Config {
        listen: ([127, 0, 0, 1], 0).into(),
        data: data.to_owned(),
        log: kind,
        brokers: brokers.unwrap_or(default.brokers.clone()),
        topic_prefix: prefix.unwrap_or(default.topic_prefix.clone()),
        partitions: Some(KAFKA_PARTITIONS),
        memory: Some("4GiB".into()),
        jwt_secret: Some(SECRET.into()),
        rate_user: 0,
        projectors: Some(MANY),
        ..default
    };
    assert_eq!(config.memory().projectors, MANY);
    let app = App::start(config.clone()).await.unwrap();
    app.ready().await.unwrap();
    (config, app)
}

on_both_logs!(
    with_four_threads_each_thread_keeps_its_order_and_who_was_answered_reads_what_it_wrote,
    |log| async move {
        const WRITERS: usize = 6;
        const EACH: usize = 5;
        const ROUNDS: usize = 30;
        const AT_ONCE: usize = 20;
        let folder = tempfile::tempdir().unwrap();
        let (config, app) = serve(log, &folder.path().join("data")).await;
        let url = format!("http://{}", app.address);
        let threads: Vec<String> = (0..WRITERS * EACH).map(|n| format!("t{n}")).collect();
        let mut reader = Socket::open(&url, &token("reader", "subscribe admin")).await;

        // Few at a time at first, and then many.
        for at_once in [1, AT_ONCE] {
            let writers = threads.chunks(EACH).map(|own| {
                let (url, own) = (url.clone(), own.to_vec());
                async move {
                    let mut writer = Socket::open(&url, &token("ada", "")).await;
                    let client = reqwest::Client::new();
                    for round in 0..ROUNDS {
                        let said = |n: usize| {
                            let mut command = publish(&own[n % EACH], "x.n", json!(n));
                            command["id"] = json!(n);
                            command
                        };
                        let commands: Vec<Value> = (0..at_once * EACH).map(said).collect();
                        writer.send(&json!(commands)).await;
                        let mut heads: BTreeMap<String, u64> = BTreeMap::new();
                        for _ in 0..commands.len() {
                            let answer = writer.recv_type("published").await;
                            let thread = &own[answer["id"].as_u64().unwrap() as usize % EACH];
                            let before = heads.insert(thread.clone(), answer["seq"].as_u64().unwrap());
                            assert!(before < heads.get(thread).copied(), "the order of the publishes: {answer}");
                        }
                        let (thread, seq) = heads.iter().nth(round % EACH).unwrap();
                        let path = format!("{url}/v1/threads/{thread}");
                        let reply = client.get(path).bearer_auth(token("ada", "")).send().await.unwrap();
                        let found: Value = serde_json::from_str(&reply.text().await.unwrap()).unwrap();
                        assert!(found["head"].as_u64() >= Some(*seq), "{found}");
                    }
                }
            });
            futures_util::future::join_all(writers).await;
            if at_once == 1 {
                for thread in &threads {
                    reader.subscribe(thread, None).await;
                }
            }
        }

        let expected: u64 = (ROUNDS * AT_ONCE) as u64;
        let mut heads: BTreeMap<String, u64> = threads.iter().map(|it| (it.clone(), ROUNDS as u64)).collect();
        while heads.values().any(|head| *head < ROUNDS as u64 + expected) {
            let event = reader.recv_type("event").await;
            let head = heads.get_mut(event["thread"].as_str().unwrap()).unwrap();
            *head += 1;
            assert_eq!(event["seq"].as_u64(), Some(*head), "{event}");
        }

        reader.leave().await;
        app.stop().await;
        let log = weft::app::open_log(&config).unwrap();
        rebuild::check(log.as_ref(), &config.projections_dir(), |_| {}).unwrap();
        log.close();
    }
);
