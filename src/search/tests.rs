//! Search against a scan that knows nothing of indexes: the same events in the same order, whenever it is asked.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use futures_util::FutureExt;

use super::index::Progress;
use super::*;
use crate::memory;
use crate::partitioning::{KeyHash, Partitioning};
use crate::store::EventRow;

const PARTITIONS: u32 = 4;
const THREADS: usize = 12;
const TENANTS: [&str; 2] = ["acme", "acme2"];
/// Nothing scores differently for its age.
const BEGIN: u64 = 1_000_000;

/// Numbers by chance, the same for the same seed (xorshift64*).
struct Chance(u64);

impl Chance {
    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % end
    }

    /// A word: few are frequent, most are rare.
    fn word(&mut self) -> String {
        let (a, b) = (self.below(60), self.below(60));
        let n = a * b / 60;
        let letters = ["ka", "lo", "mi", "nu", "re", "sta"];
        format!("{}{}{}", letters[n % 6], letters[n / 6 % 6], n / 36)
    }

    fn text(&mut self) -> String {
        let words: Vec<String> = (0..1 + self.below(30)).map(|_| self.word()).collect();
        words.join(" ")
    }
}

/// An event as the scan has it.
#[derive(Clone)]
struct Event {
    tenant: &'static str,
    thread: String,
    seq: u64,
    at: u64,
    from: &'static str,
    words: Vec<String>,
}

/// A store that is written to, and a search over it.
struct World {
    chance: Chance,
    store: Arc<Store>,
    events: Vec<Event>,
    offset: u64,
    heads: BTreeMap<(usize, usize), u64>,
    folder: tempfile::TempDir,
    search: Option<(Arc<Search>, std::thread::JoinHandle<()>)>,
}

impl World {
    fn new(seed: u64) -> World {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let (chance, store) = (Chance(seed | 1), Arc::new(new_store(folder.path())));
        let mut world =
            World { chance, store, events: Vec::new(), offset: 0, heads: BTreeMap::new(), folder, search: None };
        world.start();
        world
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("search")
    }

    fn start(&mut self) {
        let memory = memory::Plan::of(1 << 30).search;
        self.search = Some(Search::start(self.store.clone(), self.path(), "plain", memory).expect("it starts"));
        while self.search().shared.tail().view.is_none() {
            std::thread::yield_now();
        }
    }

    fn stop(&mut self) {
        let (search, thread) = self.search.take().expect("it runs");
        search.stop();
        thread.join().expect("it ends");
    }

    fn search(&self) -> &Search {
        &self.search.as_ref().expect("it runs").0
    }

    /// Returns once everything is found: a search takes what has come, but not for ever.
    fn level(&self) {
        let is_level = || {
            let shared = &self.search().shared;
            shared.tail.take(64) && shared.tail().missing_from().is_none()
        };
        while !is_level() {
            std::thread::yield_now();
        }
    }

    /// Appends so many events in one commit.
    fn append(&mut self, events: usize) {
        let store = self.store.clone();
        let mut batch = store.batch();
        for _ in 0..events {
            let (tenant, thread) = (self.chance.below(2), self.chance.below(THREADS));
            let seq = self.heads.entry((tenant, thread)).or_default();
            *seq += 1;
            self.offset += 1 + self.chance.below(3) as u64;
            let text = self.chance.text();
            let event = Event {
                tenant: TENANTS[tenant],
                thread: format!("t{thread}"),
                seq: *seq,
                // No two at one time, and not in the order in which they come.
                at: BEGIN + self.offset * 64 + self.chance.below(60) as u64,
                from: ["ada", "ben"][self.chance.below(2)],
                words: text.split(' ').map(str::to_owned).collect(),
            };
            let frame = format!(
                r#"{{"type":"event","thread":"{}","seq":{},"kind":"user_message","event":"e","from":"{}","at":"now","data":{{"content":"{text}"}}}}"#,
                event.thread, event.seq, event.from
            );
            let (offset, hash) = (self.offset, [0; 32]);
            let row = EventRow { offset, kind: "user_message", class: 1, privileged: false, hash, frame: &frame };
            batch.put_event(event.tenant, &event.thread, event.seq, &row, event.at);
            self.events.push(event);
        }
        store.commit(batch).expect("it commits");
    }

    /// A query by chance, as it is written and as the scan has it.
    fn query(&mut self) -> (String, Vec<(bool, Vec<Wanted>)>) {
        let (mut text, mut clauses) = (String::new(), Vec::new());
        for n in 0..1 + self.chance.below(3) {
            let negated = n > 0 && self.chance.below(5) == 0;
            let mut any = vec![self.wanted()];
            if !negated && self.chance.below(4) == 0 {
                any.push(self.wanted());
            }
            let written: Vec<String> = any.iter().map(Wanted::written).collect();
            text += &format!("{}{} ", if negated { "-" } else { "" }, written.join(" OR "));
            clauses.push((negated, any));
        }
        (text, clauses)
    }

    fn wanted(&mut self) -> Wanted {
        match self.chance.below(6) {
            0 => Wanted::Prefix(self.chance.word().chars().take(3).collect()),
            1 => {
                // Some that are there.
                let at = self.chance.below(self.events.len());
                let words = &self.events[at].words;
                Wanted::Phrase(words.iter().take(2).cloned().collect())
            }
            _ => Wanted::Word(self.chance.word()),
        }
    }
}

fn projections(folder: &Path) -> PathBuf {
    folder.join("projections")
}

fn new_store(folder: &Path) -> Store {
    let mut store = Store::open(&projections(folder)).expect("it opens");
    let positions = [0; 3 * PARTITIONS as usize];
    store.begin("e", Partitioning::new(KeyHash::Murmur2, PARTITIONS), &[], &positions).expect("it begins");
    store
}

enum Wanted {
    Word(String),
    Prefix(String),
    Phrase(Vec<String>),
}

impl Wanted {
    fn written(&self) -> String {
        match self {
            Wanted::Word(word) => word.clone(),
            Wanted::Prefix(prefix) => format!("{prefix}*"),
            Wanted::Phrase(words) => format!("\"{}\"", words.join(" ")),
        }
    }

    fn count(&self, words: &[String]) -> usize {
        match self {
            Wanted::Word(word) => words.iter().filter(|it| *it == word).count(),
            Wanted::Prefix(prefix) => words.iter().filter(|it| it.starts_with(&**prefix)).count(),
            Wanted::Phrase(phrase) => words.windows(phrase.len()).filter(|window| *window == phrase).count(),
        }
    }
}

/// The score as the documentation has it.
fn naive_score(events: &[&Event], event: &Event, clauses: &[(bool, Vec<Wanted>)], now: u64) -> f64 {
    let n = events.len() as f64;
    let idf = |word: &str| {
        let with = events.iter().filter(|it| it.words.iter().any(|it| it == word)).count() as f64;
        (1.0 + (n - with + 0.5) / (with + 0.5)).ln()
    };
    let mut score = 0.0;
    for (_, any) in clauses.iter().filter(|(negated, _)| !negated) {
        for wanted in any {
            let count = wanted.count(&event.words) as f64;
            if count == 0.0 {
                continue;
            }
            score += match wanted {
                Wanted::Prefix(_) => 0.1,
                Wanted::Word(_) | Wanted::Phrase(_) => {
                    let words = match wanted {
                        Wanted::Phrase(words) => words.clone(),
                        Wanted::Word(word) | Wanted::Prefix(word) => vec![word.clone()],
                    };
                    let length = event.words.len() as f64;
                    let idf: f64 = words.iter().map(|word| idf(word)).sum();
                    idf * 2.2 * count / (count + 1.2 * (1.0 - 0.75 + 0.75 * length / 32.0))
                }
            };
        }
    }
    let age = now.saturating_sub(event.at) as f64 / (30.0 * 86_400_000.0);
    score * (1.0 + (-age).exp2())
}

fn ask(tenant: &str, q: &str, order: Order, limit: usize) -> Ask {
    let (tenant, q) = (tenant.to_owned(), q.to_owned());
    Ask { tenant, q, filters: Filters::default(), order, limit, after: None }
}

/// All pages of so many hits.
fn pages(search: &Search, mut ask: Ask, threads: &Threads) -> Vec<Hit> {
    let mut hits = Vec::new();
    loop {
        // A busy machine may take long for little work: what counts here is all of it.
        let mut found = search.find_within(&ask, threads.clone(), PATIENCE).expect("it is found");
        assert!(!found.partial);
        let more = found.hits.len() > ask.limit;
        found.hits.truncate(ask.limit);
        if let Some(last) = found.hits.last() {
            ask.after = Some(After { key: last.key, ranked: found.ranked, corrected: found.corrected });
        }
        hits.extend(found.hits);
        if !more {
            return hits;
        }
    }
}

const PATIENCE: Duration = Duration::from_secs(600);

/// Compares search with the scan for some queries of this moment.
fn compare(world: &mut World, queries: usize) {
    world.level();
    for _ in 0..queries {
        let (q, clauses) = world.query();
        let (tenant, limit) = (TENANTS[world.chance.below(2)], 1 + world.chance.below(40));
        let threads = match world.chance.below(3) {
            0 => None,
            _ => Some(
                (0..THREADS).filter(|_| world.chance.below(2) == 0).map(|n| format!("t{n}")).collect::<BTreeSet<_>>(),
            ),
        };
        let from = (world.chance.below(4) == 0).then_some("ada");
        let since = (world.chance.below(4) == 0).then(|| BEGIN + world.offset * 32);

        let of_tenant: Vec<&Event> = world.events.iter().filter(|event| event.tenant == tenant).collect();
        let matches = |event: &&Event| {
            clauses.iter().all(|(negated, any)| any.iter().any(|it| it.count(&event.words) > 0) != *negated)
                && threads.as_ref().is_none_or(|threads| threads.contains(&event.thread))
                && from.is_none_or(|from| from == event.from)
                && since.is_none_or(|since| event.at >= since)
        };
        let mut expected: Vec<&Event> = of_tenant.iter().copied().filter(matches).collect();
        expected.sort_by_key(|event| std::cmp::Reverse(event.at));

        let may = threads.clone().map_or(Threads::All, |threads| Threads::These(threads.into_iter().collect()));
        let search = world.search();
        let mut wanted = ask(tenant, &q, Order::Newest, limit);
        wanted.filters = Filters { from: from.map(str::to_owned), since, ..Filters::default() };
        let found = pages(search, wanted.clone(), &may);
        let named = |hits: &[Hit]| hits.iter().map(|hit| (hit.thread.clone(), hit.seq)).collect::<Vec<_>>();
        let names: Vec<(String, u64)> = expected.iter().map(|event| (event.thread.clone(), event.seq)).collect();
        // Nothing is found: then something else may have been meant.
        if names.is_empty() {
            continue;
        }
        assert_eq!(named(&found), names, "{q} of {tenant}, {} events", world.events.len());

        let ranked = pages(search, Ask { order: Order::Relevance, ..wanted }, &may);
        assert_eq!(named(&ranked).into_iter().collect::<BTreeSet<_>>(), names.into_iter().collect(), "{q}");
        assert!(ranked.is_sorted_by_key(|hit| std::cmp::Reverse(hit.key)), "{q}");
        let now = clock::now_ms();
        for hit in ranked.iter().take(20) {
            let event = expected.iter().find(|event| (&event.thread, event.seq) == (&hit.thread, hit.seq));
            let score = naive_score(&of_tenant, event.expect("it is one of them"), &clauses, now);
            let shown = hit.key.shown_score();
            assert!((score - shown).abs() <= 0.002 + score * 1e-4, "{q}: {shown} is {score} by the scan");
        }
    }
}

#[test]
fn what_is_found_is_what_a_scan_finds_in_the_same_order_between_commits_merges_and_starts() {
    let mut world = World::new(7);
    world.append(50);
    for round in 0..40 {
        let events = [1, 3, 20, 300][world.chance.below(4)];
        world.append(events);
        compare(&mut world, 6);
        if round % 10 == 9 {
            world.stop();
            world.append(30);
            world.start();
            compare(&mut world, 6);
        }
    }
    let many = world.search().shared.tail().view.as_ref().map_or(0, |view| view.segments.len());
    assert!(many > 0, "something was committed");
}

#[test]
fn an_index_that_was_deleted_or_damaged_is_made_anew_and_finds_the_same() {
    let mut world = World::new(11);
    world.append(3_000);
    compare(&mut world, 10);
    for damage in 0..3 {
        world.stop();
        match damage {
            0 => std::fs::remove_dir_all(world.path()).expect("it is there"),
            1 => std::fs::write(world.path().join("meta.json"), "{").expect("it is written"),
            _ => {
                let files = std::fs::read_dir(world.path()).expect("it is there");
                let files = files.map(|file| file.expect("it is read").path());
                for file in files.filter(|file| file.extension().is_some_and(|it| it == "fast" || it == "term")) {
                    std::fs::write(file, "not what was there").expect("it is written");
                }
            }
        }
        world.start();
        compare(&mut world, 10);
    }
}

#[test]
fn a_tenant_s_statistics_and_corrections_are_its_own() {
    let mut world = World::new(13);
    world.append(2_000);
    let score_of = |world: &World, tenant: &str| {
        world.level();
        let found =
            world.search().find(&ask(tenant, "kaka0 ", Order::Relevance, 5), Threads::All).expect("it is found");
        found.ranked.expect("it is ranked").statistics
    };
    let before = score_of(&world, "acme");
    let many = world.events.iter().filter(|event| event.tenant == "acme").count() as u64;
    assert_eq!(before.events, many);

    // Another tenant writes what this one looks for, and what is one letter away from it.
    let store = world.store.clone();
    let mut batch = store.batch();
    for seq in 1..=500 {
        let frame = r#"{"type":"event","thread":"c","seq":1,"kind":"user_message","event":"e","from":"eve","at":"now","data":{"content":"kaka0 canary canaries"}}"#;
        let (offset, hash) = (1_000_000 + seq, [0; 32]);
        let row = EventRow { offset, kind: "user_message", class: 1, privileged: false, hash, frame };
        batch.put_event("acme3", "c", seq, &row, BEGIN + seq);
    }
    store.commit(batch).expect("it commits");
    assert_eq!(score_of(&world, "acme"), before, "another's words count for nothing");
    for q in ["canary ", "canar", "canaru ", "\"canary canaries\"", "ca*"] {
        let found = world.search().find(&ask("acme", q, Order::Newest, 5), Threads::All).expect("it is found");
        assert_eq!((found.hits, found.corrected), (Vec::new(), None), "{q}");
    }
    let found = world.search().find(&ask("acme3", "canaru ", Order::Newest, 5), Threads::All).expect("it is found");
    assert_eq!((found.hits.len(), found.corrected.as_deref()), (6, Some("canary ")));
    // Words of threads that the caller may not read are no corrections either.
    let elsewhere = Threads::These(vec!["d".to_owned()]);
    let found = world.search().find(&ask("acme3", "canaru ", Order::Newest, 5), elsewhere).expect("it is found");
    assert_eq!((found.hits.len(), found.corrected), (0, None));
}

#[test]
fn work_is_broken_off_when_its_budget_is_spent_and_the_answer_says_so() {
    let mut world = World::new(17);
    world.append(20);
    // All of it in the index.
    world.stop();
    world.start();
    world.level();
    let ask = ask("acme", "kaka0 OR ka* ", Order::Newest, 5);
    let found = world.search().find_within(&ask, Threads::All, PATIENCE).expect("it is found");
    assert!(!found.partial && !found.hits.is_empty());
    let found = world.search().find_within(&ask, Threads::All, Duration::ZERO).expect("it is found");
    assert!(found.partial && found.hits.is_empty());
}

#[test]
fn who_takes_events_at_one_time_takes_each_of_them_once_in_the_order_of_its_partition() {
    let mut world = World::new(19);
    world.stop();
    let files = index::open(&world.path(), &Progress::new("e", "plain", &[]), 16 << 20).expect("it opens");
    let view = files.view().expect("it is read");
    let tail = Tail::new(world.store.clone(), Stems::PLAIN, 64 << 20);
    let begin = || {
        let mut state = tail.lock();
        drop(state.begin(&[None; PARTITIONS as usize], view.clone()));
        state.number()
    };
    begin();

    let is_over = AtomicBool::new(false);
    let mut begun = 0;
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                loop {
                    // Asked first: what came before the end is taken after this.
                    let is_last = is_over.load(Ordering::Acquire);
                    if tail.take(7) && is_last {
                        break;
                    }
                }
            });
        }
        for round in 0..40 {
            world.append(50);
            // As when the index is opened again.
            if round == 20 {
                begun = begin();
            }
        }
        is_over.store(true, Ordering::Release);
    });
    let state = tail.lock();
    let taken = state.after(begun, usize::MAX);
    assert_eq!((taken.len(), state.missing_from()), (2_000, None));
    for partition in 0..PARTITIONS {
        let places: Vec<Place> = taken.iter().filter(|it| it.partition == partition).map(|it| it.place).collect();
        assert!(places.is_sorted_by_key(|place| (place.offset, place.seq)), "{partition}");
        let mut after = None;
        for place in places {
            assert_ne!(Some(place), after, "once");
            after = Some(place);
        }
    }
}

/// Cuts off the first row of a family that is of this thread.
fn damage(folder: &Path, family: &str, thread: &str) {
    let (path, options) = (projections(folder), rocksdb::Options::default());
    let families = rocksdb::DB::list_cf(&options, &path).expect("it is a store");
    let db = rocksdb::DB::open_cf(&options, &path, families).expect("it opens");
    let family = db.cf_handle(family).expect("it is there");
    let mut rows = db.iterator_cf(&family, rocksdb::IteratorMode::Start).map(|row| row.expect("it is read"));
    let is_of = |bytes: &[u8]| bytes.windows(thread.len()).any(|window| window == thread.as_bytes());
    let (key, value) = rows.find(|(key, value)| is_of(key) || is_of(value)).expect("one is of the thread");
    db.put_cf(&family, key, &value[..value.len() / 2]).expect("it is written");
}

#[test]
fn what_cannot_be_read_is_not_found_and_everything_else_is() {
    // What comes after a place that cannot be read is nowhere to be read, and the answer says that it is not complete.
    for (family, expected) in [("events", (vec![2], true)), ("arrivals", (vec![], false))] {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let store = new_store(folder.path());
        let ruined = "ruined";
        let is_elsewhere = |it: &String| store.partition("acme", it) != store.partition("acme", ruined);
        let other = (0..).map(|n| format!("other{n}")).find(is_elsewhere).expect("there are more partitions");
        let mut batch = store.batch();
        for (seq, thread) in [(1, ruined), (1, &other), (2, ruined), (2, &other)] {
            let frame = format!(
                r#"{{"type":"event","thread":"{thread}","seq":{seq},"kind":"user_message","event":"e","from":"ada","at":"now","data":{{"content":"word"}}}}"#
            );
            let row = EventRow {
                offset: seq,
                kind: "user_message",
                class: 1,
                privileged: false,
                hash: [0; 32],
                frame: &frame,
            };
            batch.put_event("acme", thread, seq, &row, BEGIN + seq);
        }
        store.commit(batch).expect("it commits");
        drop(store);
        damage(folder.path(), family, ruined);

        let store = Arc::new(Store::open(&projections(folder.path())).expect("it opens"));
        let memory = memory::Plan::of(1 << 30).search;
        let (search, thread) = Search::start(store, folder.path().join("search"), "plain", memory).expect("it starts");
        while !search.shared.tail.take(64) {
            std::thread::yield_now();
        }
        let found =
            search.find_within(&ask("acme", "word ", Order::Newest, 9), Threads::All, PATIENCE).expect("it is found");
        let seqs = |of: &str| found.hits.iter().filter(|hit| hit.thread == of).map(|hit| hit.seq).collect::<Vec<_>>();
        assert_eq!(seqs(&other), [2, 1], "{family}");
        assert_eq!((seqs(ruined), found.complete_to > 0), expected, "{family}");
        search.stop();
        thread.join().expect("it ends");
    }
}

/// Turns over bytes in the middle of all files of the index that end so, while it is open.
fn flip(index: &Path, ending: &str) {
    use std::os::unix::fs::FileExt;
    let files = std::fs::read_dir(index).expect("it is there").map(|file| file.expect("it is read").path());
    for file in files.filter(|file| file.extension().is_some_and(|it| it == ending)) {
        let file = std::fs::File::options().read(true).write(true).open(file).expect("it opens");
        let mut byte = [0];
        let middle = file.metadata().expect("it is there").len() / 4;
        file.read_exact_at(&mut byte, middle).expect("it is read");
        file.write_all_at(&[!byte[0]], middle).expect("it is written");
    }
}

#[test]
fn an_index_that_may_be_damaged_is_made_anew_only_if_it_is() {
    for is_damaged in [false, true] {
        let mut world = World::new(23);
        world.append(500);
        // All of it in the index.
        world.stop();
        let before = std::fs::read(world.path().join("meta.json")).expect("it is there");
        let files = index::open(&world.path(), &Progress::new("e", "plain", &[]), 16 << 20).expect("it opens");
        assert!(!files.is_damaged().expect("it is read"));
        drop(files);
        world.start();
        world.level();
        if is_damaged {
            flip(&world.path(), "idx");
        }
        let shared = world.search().shared.clone();
        let opened = shared.tail().begun;
        shared.suspect("a test says so");
        // It is looked at, and then, if it is damaged, opened again.
        while shared.suspected.load(Ordering::Acquire) || (is_damaged && shared.tail().begun == opened) {
            std::thread::yield_now();
        }
        compare(&mut world, 20);
        world.stop();
        let after = std::fs::read(world.path().join("meta.json")).expect("it is there");
        assert_eq!(before != after, is_damaged);
    }
}

#[tokio::test]
async fn one_user_does_not_have_all_turns_however_many_it_waits_for() {
    let world = World::new(29);
    let (ada, ben) = ("acme/ada".into(), "acme/ben".into());
    let mut turns = Vec::new();
    while let Some(turn) = world.search().turn(&ada).now_or_never() {
        turns.push(turn.expect("it is granted"));
    }
    let mut waiting = Box::pin(world.search().turn(&ada));
    assert!(waiting.as_mut().now_or_never().is_none());
    let of_ben = world.search().turn(&ben).now_or_never().expect("there is one left for another user");
    drop(of_ben.expect("it is granted"));
    assert!(waiting.as_mut().now_or_never().is_none());
    turns.pop();
    waiting.await.expect("it has its turn once one of its own is over");
}

#[test]
fn a_beginning_of_too_many_words_finds_less_and_excludes_more() {
    let mut world = World::new(31);
    let store = world.store.clone();
    let mut batch = store.batch();
    for seq in 1..=2_000 {
        let frame = format!(
            r#"{{"type":"event","thread":"t","seq":{seq},"kind":"user_message","event":"e","from":"ada","at":"now","data":{{"content":"word{seq}"}}}}"#
        );
        let row =
            EventRow { offset: seq, kind: "user_message", class: 1, privileged: false, hash: [0; 32], frame: &frame };
        batch.put_event("acme", "t", seq, &row, BEGIN + seq);
    }
    store.commit(batch).expect("it commits");
    // All of it in the index.
    world.stop();
    world.start();
    world.level();
    let view = world.search().shared.tail().view.clone().expect("it is open");
    let count = |work, is_excluded| -> usize {
        let prefix = index::term("acme", "word");
        let query = prefix::PrefixQuery { column: view.columns.exact, prefix, budget: Budget::new(work), is_excluded };
        let scoring = tantivy::query::EnableScoring::disabled_from_searcher(&view.searcher);
        let weight = tantivy::query::Query::weight(&query, scoring).expect("it is one");
        let segments = view.searcher.segment_readers();
        segments.iter().map(|segment| weight.count(segment).expect("it is read") as usize).sum()
    };
    assert_eq!((count(PATIENCE, false), count(PATIENCE, true)), (2_000, 2_000));
    assert!((1..2_000).contains(&count(Duration::ZERO, false)));
    assert_eq!(count(Duration::ZERO, true), 2_000);
}
