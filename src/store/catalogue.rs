//! Every column family of the projections, in one list, with the tuning its work asks for.

use rocksdb::{BlockBasedOptions, Cache, ColumnFamilyDescriptor, DBCompressionType, Env, Options};

/// How a family is used.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Work {
    /// Small rows, looked up by their whole key; most lookups find nothing.
    Lookup,
    /// The same beside the way of an event. Without a filter in memory: each takes a tenth of a memtable, written or not,
    /// and together they would leave no room for what is.
    Seldom,
    /// Written once in key order, read in ranges.
    Sequence,
}

pub const META: &str = "default";
pub const THREADS: &str = "threads";
pub const MEMBERS: &str = "members";
pub const MEMBERSHIPS: &str = "memberships";
pub const EVENTS: &str = "events";
pub const KEYS: &str = "keys";
pub const KEY_TIMES: &str = "key_times";
pub const RECEIPTS: &str = "receipts";
pub const REVOCATIONS: &str = "revocations";
pub const RUNS: &str = "runs";
pub const RUN_CALLS: &str = "run_calls";
pub const RUN_EVENTS: &str = "run_events";
pub const RUN_THREADS: &str = "run_threads";
pub const OPEN_RUNS: &str = "open_runs";
pub const MESSAGES: &str = "messages";
pub const OPEN_MESSAGES: &str = "open_messages";
pub const MESSAGE_TEXTS: &str = "message_texts";
pub const DEAD_LETTERS: &str = "dead_letters";
pub const DEAD_LETTER_TIMES: &str = "dead_letter_times";

const FAMILIES: &[(&str, Work)] = &[
    // position → offsets of the log; epoch; format
    (META, Work::Seldom),
    // tenant 0 thread → ThreadRow
    (THREADS, Work::Lookup),
    // tenant 0 thread 0 user → MemberRow
    (MEMBERS, Work::Lookup),
    // tenant 0 user 0 thread → empty
    (MEMBERSHIPS, Work::Sequence),
    // tenant 0 thread 0 seq → EventRow
    (EVENTS, Work::Sequence),
    // tenant 0 thread 0 user 0 key → KeyRow
    (KEYS, Work::Lookup),
    // partition · at · the key's key → empty; what the purge of `keys` walks
    (KEY_TIMES, Work::Sequence),
    // tenant 0 thread 0 user 0 name → ReceiptRow
    (RECEIPTS, Work::Seldom),
    // tenant 0 user → RevocationRow
    (REVOCATIONS, Work::Seldom),
    // tenant 0 thread 0 run → RunRow
    (RUNS, Work::Seldom),
    // tenant 0 thread 0 length of run · run · call → CallRow
    (RUN_CALLS, Work::Seldom),
    // tenant 0 thread 0 length of run · run · seq → empty
    (RUN_EVENTS, Work::Sequence),
    // tenant 0 length of run · run · thread → empty
    (RUN_THREADS, Work::Sequence),
    // tenant 0 thread 0 run → empty, for those that have not ended
    (OPEN_RUNS, Work::Sequence),
    // tenant 0 thread 0 length of run · run · message → MessageRow
    (MESSAGES, Work::Seldom),
    // the same → empty, for those that are not closed
    (OPEN_MESSAGES, Work::Sequence),
    // tenant 0 thread 0 length of run · run · length of message · message · from_char → TextRow, for those that are not closed
    (MESSAGE_TEXTS, Work::Sequence),
    // tenant (empty if not known) 0 id → DeadLetterRow
    (DEAD_LETTERS, Work::Seldom),
    // tenant 0 at · id → empty; the list, oldest first
    (DEAD_LETTER_TIMES, Work::Sequence),
];

/// The families' names.
pub fn names() -> impl Iterator<Item = &'static str> {
    FAMILIES.iter().map(|(name, _)| *name)
}

/// One cache for all families bounds what reads may hold in memory.
const BLOCK_CACHE: usize = 64 << 20;

pub fn descriptors() -> Vec<ColumnFamilyDescriptor> {
    let cache = Cache::new_lru_cache(BLOCK_CACHE);
    FAMILIES.iter().map(|(name, work)| ColumnFamilyDescriptor::new(*name, tuning(*work, &cache))).collect()
}

fn tuning(work: Work, cache: &Cache) -> Options {
    let mut blocks = BlockBasedOptions::default();
    blocks.set_block_cache(cache);
    blocks.set_cache_index_and_filter_blocks(true);
    blocks.set_format_version(6);
    let mut options = Options::default();
    options.set_compression_type(DBCompressionType::Lz4);
    match work {
        Work::Lookup => {
            blocks.set_bloom_filter(10.0, false);
            // The filter over what is not flushed yet spares most lookups of new keys the memtable's skip list.
            options.set_memtable_prefix_bloom_ratio(0.1);
            options.set_memtable_whole_key_filtering(true);
        }
        Work::Seldom => blocks.set_bloom_filter(10.0, false),
        Work::Sequence => {
            blocks.set_block_size(16 << 10);
            options.set_level_zero_file_num_compaction_trigger(8);
        }
    }
    options.set_block_based_table_factory(&blocks);
    options.set_write_buffer_size(64 << 20);
    options
}

/// Options of the whole database.
pub fn database(direct_io: bool) -> Options {
    let mut options = Options::default();
    options.create_if_missing(true);
    options.create_missing_column_families(true);
    // Without a write-ahead log, rows and position may only reach the disk together.
    options.set_atomic_flush(true);
    // What is not flushed is read again from the log after a crash: this bounds the time that takes.
    options.set_db_write_buffer_size(64 << 20);
    // Files written beside the page cache leave no dirty pages for the log's syncs to wait for.
    options.set_use_direct_io_for_flush_and_compaction(direct_io);
    options.set_keep_log_file_num(4);
    options.set_max_log_file_size(4 << 20);
    options.increase_parallelism(2);
    // Compaction takes what the way of an event leaves. Without a priority of its own it only works as fast as before.
    if let Ok(mut env) = Env::new() {
        env.lower_thread_pool_cpu_priority();
        options.set_env(&env);
    }
    options
}
