//! Which part of a node may hold how much of its memory.
//!
//! The fixed parts have the size that serves them best, as long as that is no more than half of the budget; where it
//! would be more, all are made smaller by the same factor. What is left is for what comes and goes with clients.

/// The smallest budget with which every request can be served.
pub const MINIMUM: u64 = 256 << 20;

const MIB: usize = 1 << 20;

/// The sizes that serve best. More brings little; less costs reads from the disk, or more flushes.
const CACHE: usize = 64 * MIB;
const MEMTABLES: usize = 64 * MIB;
/// What is known of idempotency keys: enough for 8 million.
const KEY_FILTER: usize = 8 * MIB;
const LOG_QUEUE: usize = 64 * MIB;
const LOG_TAIL: usize = 16 * MIB;
const LOG_MEMTABLE: usize = 32 * MIB;
const LOG_CACHE: usize = 16 * MIB;
/// Write buffers of the embedded log: one that is written to, and those that are on their way to the disk.
const LOG_MEMTABLES: usize = 4;
/// What the dispatcher holds of what waits for groups: the next event of 30,000 to 50,000 threads.
const WORK: usize = 32 * MIB;
const FIXED: usize =
    CACHE + MEMTABLES + KEY_FILTER + LOG_QUEUE + LOG_TAIL + LOG_MEMTABLES * LOG_MEMTABLE + LOG_CACHE + WORK;

/// What commits of the projector may hold on their way to the readers: one that is made, one that waits to be queued, two in
/// the queue and one being taken in, 4 MiB each, what one record may add to the first (16 MiB), and what waits to be handed
/// out (8 MiB).
const COMMITS: usize = 44 * MIB;
/// What one more thread of the projector adds to that: what one record may add to the commit that it makes. The records that
/// all of them work on are bounded in sum.
const COMMITS_MORE: usize = 16 * MIB;
/// What search holds: the index until it writes a segment, what has come and is not in the index yet, and some room for what is on
/// its way from one to the other, and for merges.
const SEARCH_WRITER: usize = 16 * MIB;
const SEARCH_TAIL: usize = 12 * MIB;
const SEARCH: usize = SEARCH_WRITER + SEARCH_TAIL + 4 * MIB;
/// The budget has so much for each thread of the projector.
const PER_PROJECTOR: u64 = 512 << 20;
/// What an open connection takes that does nothing.
pub const CONNECTION: usize = 16 << 10;

/// The budget and its parts, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Plan {
    pub total: usize,
    /// The projections' cache of blocks.
    pub cache: usize,
    /// Rows of the projections that are not flushed yet.
    pub memtables: usize,
    /// The filter of the projections' idempotency keys.
    pub keys: usize,
    pub log: LogPlan,
    /// What is held of the work that waits.
    pub work: usize,
    pub commits: usize,
    pub search: SearchPlan,
    /// Threads of the projector.
    pub projectors: usize,
    pub connections: usize,
    /// What requests read and answer.
    pub requests: usize,
    /// Large WebSocket frames while they are read.
    pub frames: usize,
    /// What sessions and streams have read from the store for their clients.
    pub readers: usize,
}

/// The parts of search.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SearchPlan {
    /// The index, until it writes a segment.
    pub writer: usize,
    /// What has come and is not in the index yet.
    pub tail: usize,
    /// Both, and what merges take.
    pub total: usize,
}

/// The parts of the embedded log; with Kafka its client has their memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogPlan {
    /// Records that wait for the writer.
    pub queue: usize,
    /// The newest records, for the reader at the tail.
    pub tail: usize,
    /// One write buffer of [`LogPlan::memtables`].
    pub memtable: usize,
    pub memtables: usize,
    pub cache: usize,
}

/// The sizes that serve best.
impl Default for LogPlan {
    fn default() -> LogPlan {
        LogPlan { queue: LOG_QUEUE, tail: LOG_TAIL, memtable: LOG_MEMTABLE, memtables: LOG_MEMTABLES, cache: LOG_CACHE }
    }
}

impl LogPlan {
    /// What may wait in Kafka's client to be sent.
    pub fn producer(&self) -> usize {
        self.memtable * self.memtables
    }

    /// What Kafka's client may have received ahead of its reader.
    pub fn consumer(&self) -> usize {
        self.tail + self.cache
    }

    pub fn total(&self) -> usize {
        self.queue + self.tail + self.memtable * self.memtables + self.cache
    }
}

impl Plan {
    /// Divides a budget of at least [`MINIMUM`] where one thread projects.
    pub fn of(total: u64) -> Plan {
        Plan::for_projectors(total, 1)
    }

    /// Divides a budget of at least [`MINIMUM`] where so many threads are to project, or fewer if it is small.
    pub fn for_projectors(total: u64, wanted: usize) -> Plan {
        let room_for = usize::try_from(total / PER_PROJECTOR).unwrap_or(usize::MAX);
        let projectors = wanted.min(room_for).max(1);
        let commits = COMMITS + (projectors - 1) * COMMITS_MORE;

        let total = usize::try_from(total).unwrap_or(usize::MAX);
        let room = (total / 2).saturating_sub(commits + SEARCH).min(FIXED);
        // In 128 bits, as the product may be beyond 64.
        let scaled = |size: usize| (size as u128 * room as u128 / FIXED as u128) as usize;
        let log = LogPlan {
            queue: scaled(LOG_QUEUE),
            tail: scaled(LOG_TAIL),
            memtable: scaled(LOG_MEMTABLE),
            memtables: LOG_MEMTABLES,
            cache: scaled(LOG_CACHE),
        };
        let (cache, memtables, keys, work) = (scaled(CACHE), scaled(MEMTABLES), scaled(KEY_FILTER), scaled(WORK));

        let search = SearchPlan { writer: SEARCH_WRITER, tail: SEARCH_TAIL, total: SEARCH };
        let left = total - cache - memtables - keys - log.total() - work - (commits + SEARCH).min(total / 2);
        let (connections, requests, frames) = (left / 32 * 9, left / 16 * 5, left / 16);
        let readers = left - connections - requests - frames;
        Plan {
            total,
            cache,
            memtables,
            keys,
            log,
            work,
            commits,
            search,
            projectors,
            connections,
            requests,
            frames,
            readers,
        }
    }

    /// The same where nothing is indexed: what that would take is for requests.
    pub fn without_search(self) -> Plan {
        let search = SearchPlan { writer: 0, tail: 0, total: 0 };
        Plan { search, requests: self.requests + self.search.total, ..self }
    }

    /// How many connections there is memory for.
    pub fn max_connections(&self) -> usize {
        self.connections / CONNECTION
    }

    /// Every part by its name.
    pub fn parts(&self) -> [(&'static str, usize); 11] {
        [
            ("cache", self.cache),
            ("memtables", self.memtables),
            ("keys", self.keys),
            ("log", self.log.total()),
            ("work", self.work),
            ("commits", self.commits),
            ("search", self.search.total),
            ("connections", self.connections),
            ("requests", self.requests),
            ("frames", self.frames),
            ("readers", self.readers),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn with_a_gibibyte_the_fixed_parts_have_their_best_size() {
        let plan = Plan::of(1 << 30);
        assert_eq!((plan.cache, plan.memtables, plan.log.queue), (64 * MIB, 64 * MIB, 64 * MIB));
        assert_eq!((plan.search.writer, plan.search.tail), (16 * MIB, 12 * MIB));
        assert_eq!((plan.log.tail, plan.log.memtable, plan.log.memtables), (16 * MIB, 32 * MIB, 4));
        assert_eq!(Plan::of(64 << 30).cache, plan.cache, "more memory is for clients");
    }

    #[test]
    fn the_parts_are_the_whole_and_the_fixed_ones_no_more_than_half() {
        let budgets = [MINIMUM, 300 << 20, 512 << 20, 1 << 30, 7_777_777_777, 1 << 40];
        for (total, projectors) in budgets.into_iter().flat_map(|total| [(total, 1), (total, 8)]) {
            let plan = Plan::for_projectors(total, projectors);
            let sum: usize = plan.parts().iter().map(|(_, bytes)| bytes).sum();
            assert_eq!(sum as u64, total);
            let fixed = plan.cache + plan.memtables + plan.keys + plan.log.total() + plan.work;
            let fixed = fixed + plan.commits + plan.search.total;
            assert!(fixed as u64 <= total / 2, "{plan:?}");
            let sum: usize = plan.without_search().parts().iter().map(|(_, bytes)| bytes).sum();
            assert_eq!(sum as u64, total);
            assert!(plan.log.memtable >= 4 * MIB && plan.log.queue >= 8 * MIB, "{plan:?}");
        }
    }

    #[test]
    fn a_small_budget_has_few_threads_that_project() {
        let threads = |total, wanted| Plan::for_projectors(total, wanted).projectors;
        assert_eq!((threads(MINIMUM, 8), threads(1 << 30, 8), threads(1 << 30, 1), threads(8 << 30, 8)), (1, 2, 1, 8));
        assert_eq!(Plan::for_projectors(4 << 30, 4).commits, Plan::of(4 << 30).commits + 3 * 16 * MIB);
    }

    #[test]
    fn ten_thousand_connections_fit_into_a_gibibyte() {
        assert!(Plan::of(1 << 30).max_connections() >= 9_900);
        assert!(Plan::of(8 << 30).max_connections() >= 100_000);
    }
}
