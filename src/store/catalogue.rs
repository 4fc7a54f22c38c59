//! Every column family of the projections, in one list, tuned for how it is read and written.

use rocksdb::{
    BlockBasedIndexType, BlockBasedOptions, Cache, ColumnFamilyDescriptor, DBCompressionType, Env, Options,
    WriteBufferManager,
};

/// How a family is used.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Access {
    /// Small rows, looked up by their whole key with every event; most lookups find nothing.
    Lookup,
    /// The same, but looked up with few events. Without a filter in memory: each filter takes a tenth of a memtable,
    /// whether the family is written or not, and many filters would leave too little room for rows.
    RareLookup,
    /// Written once in key order, read in ranges.
    Range,
    /// The same, and single rows of it are looked up by their whole key.
    RangeAndLookup,
}

pub const META: &str = "default";
pub const THREADS: &str = "threads";
pub const MEMBERS: &str = "members";
pub const MEMBERSHIPS: &str = "memberships";
pub const EVENTS: &str = "events";
pub const ARRIVALS: &str = "arrivals";
pub const KEYS: &str = "keys";
pub const KEY_TIMES: &str = "key_times";
pub const RECEIPTS: &str = "receipts";
pub const SUBSCRIPTION_NAMES: &str = "subscription_names";
pub const SUBSCRIPTION_BEGINS: &str = "subscription_begins";
pub const REVOCATIONS: &str = "revocations";
pub const TICKETS: &str = "tickets";
pub const TICKET_TIMES: &str = "ticket_times";
pub const GROUPS: &str = "groups";
pub const KINDS: &str = "kinds";
pub const KIND_SCHEMAS: &str = "kind_schemas";
pub const WORK: &str = "work";
pub const WORKERS: &str = "workers";
pub const PAUSED_THREADS: &str = "paused_threads";
pub const WAITING: &str = "waiting";
pub const RUNS: &str = "runs";
pub const RUN_CALLS: &str = "run_calls";
pub const RUN_ANSWERS: &str = "run_answers";
pub const RUN_EVENTS: &str = "run_events";
pub const RUN_STARTS: &str = "run_starts";
pub const RUN_THREADS: &str = "run_threads";
pub const OPEN_RUNS: &str = "open_runs";
pub const OPEN_RUN_TIMES: &str = "open_run_times";
pub const USER_RUNS: &str = "user_runs";
pub const MESSAGES: &str = "messages";
pub const RUN_MESSAGES: &str = "run_messages";
pub const OPEN_MESSAGES: &str = "open_messages";
pub const MESSAGE_TEXTS: &str = "message_texts";
pub const DEAD_LETTERS: &str = "dead_letters";
pub const DEAD_LETTER_TIMES: &str = "dead_letter_times";
pub const DEAD_LETTER_COUNTS: &str = "dead_letter_counts";
pub const REQUEUED_DELIVERIES: &str = "requeued_deliveries";

const FAMILIES: &[(&str, Access)] = &[
    // Each key but those of the first family begins with the partition (u16).
    //
    // "log" → LogRow; "partitioning" → PartitioningRow; "position" · partition (u32, over all topics) → the offset to read next;
    // "passed" → one to which all partitions were read; "progress" · partition → ProgressRow
    (META, Access::RareLookup),
    // tenant 0 thread → ThreadRow
    (THREADS, Access::Lookup),
    // tenant 0 thread 0 user → MemberRow
    (MEMBERS, Access::Lookup),
    // tenant 0 user 0 thread → empty
    (MEMBERSHIPS, Access::Range),
    // tenant 0 thread 0 seq → EventRow
    (EVENTS, Access::RangeAndLookup),
    // offset · seq → ArrivalRow: the same events in the order of their records
    (ARRIVALS, Access::Range),
    // tenant 0 thread 0 user 0 key → KeyRow
    (KEYS, Access::Lookup),
    // at · the rest of the row's key in `keys` → empty; the order in which keys are purged
    (KEY_TIMES, Access::Range),
    // tenant 0 thread 0 user 0 name → ReceiptRow
    (RECEIPTS, Access::RareLookup),
    // tenant 0 user 0 name → empty; of durable subscriptions
    (SUBSCRIPTION_NAMES, Access::Range),
    // tenant 0 user 0 name 0 part · first thread → BeginsRow; of durable subscriptions to all threads
    (SUBSCRIPTION_BEGINS, Access::Range),
    // tenant 0 user → RevocationRow
    (REVOCATIONS, Access::RareLookup),
    // owner → TicketsRow; the user's tickets that are open
    (TICKETS, Access::RareLookup),
    // when all of them have expired · owner → empty; the order in which they are purged
    (TICKET_TIMES, Access::Range),
    // tenant 0 group → GroupRow
    (GROUPS, Access::RareLookup),
    // tenant 0 kind → KindRow, of custom kinds that have a schema
    (KINDS, Access::RareLookup),
    // tenant 0 kind → KindSchemaRow, of the same kinds
    (KIND_SCHEMAS, Access::RareLookup),
    // tenant 0 thread 0 group → WorkRow
    (WORK, Access::RareLookup),
    // tenant 0 thread 0 user 0 group → until when the last of the user's leases there lasts (u64), of those that are not settled
    (WORKERS, Access::RareLookup),
    // tenant 0 group 0 id of the group · thread → since when (ms): the threads of which the group gives out no work
    (PAUSED_THREADS, Access::Range),
    // tenant 0 group 0 thread 0 seq → WaitingRow, of events that are a group's work or were; tenant 0 group → up to which
    // revision of the group's settings nothing is missing. What it holds depends on when this node came to know of a group.
    (WAITING, Access::Range),
    // tenant 0 thread 0 run → RunRow
    (RUNS, Access::RareLookup),
    // tenant 0 thread 0 length of run · run · call → CallRow
    (RUN_CALLS, Access::RareLookup),
    // tenant 0 thread 0 length of run · run · seq of the question → AnswerRow
    (RUN_ANSWERS, Access::RareLookup),
    // tenant 0 thread 0 length of run · run · seq → StepRow
    (RUN_EVENTS, Access::Range),
    // tenant 0 thread 0 seq of the run's first event → run; the list of a thread's runs
    (RUN_STARTS, Access::Range),
    // tenant 0 length of run · run · thread → empty
    (RUN_THREADS, Access::Range),
    // tenant 0 thread 0 run → empty, for those that have not ended
    (OPEN_RUNS, Access::Range),
    // tenant 0 state · at · thread 0 run → empty, for those that have not ended and for those of them that wait; the lists of
    // open runs, oldest first
    (OPEN_RUN_TIMES, Access::Range),
    // tenant 0 user 0 thread → OpenRunsRow: how many runs the user has started there that have not ended, if any
    (USER_RUNS, Access::RareLookup),
    // tenant 0 thread 0 length of run · run · message → MessageRow
    (MESSAGES, Access::RareLookup),
    // tenant 0 thread 0 length of run · run · deltas of the run before it · message → empty; a run's messages, oldest first
    (RUN_MESSAGES, Access::Range),
    // tenant 0 thread 0 number of the message in its thread → OpenMessageRow, for those that are not closed
    (OPEN_MESSAGES, Access::Range),
    // tenant 0 thread 0 length of run · run · length of message · message · restarts (u32) · from_char (u32) → TextRow, for those that are not closed
    (MESSAGE_TEXTS, Access::Range),
    // tenant (empty if not known) 0 id → DeadLetterRow
    (DEAD_LETTERS, Access::RareLookup),
    // tenant 0 list 0 at · order · id → empty; those that are open, oldest first: all (the list's name is empty), and of each reason
    // (r), fingerprint (f), kind (k), thread (t) and group (g), and of each fingerprint of a group (G)
    (DEAD_LETTER_TIMES, Access::Range),
    // tenant 0 list → CountRow; of reasons and fingerprints, and of those of a group (G)
    (DEAD_LETTER_COUNTS, Access::RareLookup),
    // tenant 0 thread 0 user 0 name → DeliveriesRow: what was requeued for the durable subscription, if anything
    (REQUEUED_DELIVERIES, Access::RareLookup),
];

/// How many blocks a write buffer is allocated in.
const ARENA_BLOCKS: usize = 64;

/// The families' names.
pub fn names() -> impl Iterator<Item = &'static str> {
    FAMILIES.iter().map(|(name, _)| *name)
}

/// What all families together may hold in memory, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StoreMemory {
    /// Blocks that were read.
    pub cache: usize,
    /// Rows that are not flushed yet.
    pub memtables: usize,
    /// What is known of idempotency keys.
    pub key_filter: usize,
}

impl Default for StoreMemory {
    fn default() -> StoreMemory {
        StoreMemory { cache: 64 << 20, memtables: 64 << 20, key_filter: 8 << 20 }
    }
}

/// What holds to these sizes: one cache for the blocks of all families, one manager for their rows that are not flushed.
pub struct Buffers {
    pub cache: Cache,
    pub memtables: WriteBufferManager,
}

impl Buffers {
    pub fn new(memory: StoreMemory) -> Buffers {
        let cache = Cache::new_lru_cache(memory.cache);
        Buffers { cache, memtables: WriteBufferManager::new_write_buffer_manager(memory.memtables, false) }
    }
}

pub fn descriptors(buffers: &Buffers) -> Vec<ColumnFamilyDescriptor> {
    let tuned = |access| tuning(access, buffers);
    FAMILIES.iter().map(|(name, access)| ColumnFamilyDescriptor::new(*name, tuned(*access))).collect()
}

fn tuning(access: Access, buffers: &Buffers) -> Options {
    let mut blocks = BlockBasedOptions::default();
    blocks.set_block_cache(&buffers.cache);
    blocks.set_cache_index_and_filter_blocks(true);
    blocks.set_format_version(6);
    // Indexes and filters of files are cut into blocks as well. Otherwise a lookup in a large store, whose indexes have no room in
    // the cache, reads and unpacks some hundred KiB to find one row.
    blocks.set_index_type(BlockBasedIndexType::TwoLevelIndexSearch);
    blocks.set_partition_filters(true);
    blocks.set_metadata_block_size(4 << 10);
    blocks.set_pin_top_level_index_and_filter(true);
    let mut options = Options::default();
    options.set_compression_type(DBCompressionType::Lz4);
    match access {
        Access::Lookup => {
            blocks.set_bloom_filter(10.0, false);
            // The filter over what is not flushed yet spares most lookups of new keys the memtable's skip list.
            options.set_memtable_prefix_bloom_ratio(0.1);
            options.set_memtable_whole_key_filtering(true);
        }
        Access::RareLookup => blocks.set_bloom_filter(10.0, false),
        Access::Range | Access::RangeAndLookup => {
            blocks.set_block_size(16 << 10);
            options.set_level_zero_file_num_compaction_trigger(8);
            if access == Access::RangeAndLookup {
                blocks.set_bloom_filter(10.0, false);
            }
        }
    }
    options.set_block_based_table_factory(&blocks);
    let memtables = buffers.memtables.get_buffer_size();
    options.set_write_buffer_size(memtables);
    // Each family that is written has a block of its own, however little it holds.
    options.set_arena_block_size(memtables / ARENA_BLOCKS);
    options
}

/// Options of the whole database.
pub fn database(direct_io: bool, buffers: &Buffers) -> Options {
    let mut options = Options::default();
    options.create_if_missing(true);
    options.create_missing_column_families(true);
    // Without a write-ahead log, rows and position may only reach the disk together.
    options.set_atomic_flush(true);
    // What is not flushed is read again from the log after a crash: this bounds the time that takes.
    options.set_write_buffer_manager(&buffers.memtables);
    // Files written beside the page cache leave no dirty pages for the log's syncs to wait for.
    options.set_use_direct_io_for_flush_and_compaction(direct_io);
    options.set_keep_log_file_num(4);
    options.set_max_log_file_size(4 << 20);
    options.increase_parallelism(2);
    // Compaction gets the processor time that events leave: at a lower priority it is no slower when there is enough.
    if let Ok(mut env) = Env::new() {
        env.lower_thread_pool_cpu_priority();
        options.set_env(&env);
    }
    options
}
