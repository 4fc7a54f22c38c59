//! The memory of a node: how much it may use, which part may hold how much of that, and who holds it now.
//!
//! - [`plan`] divides the budget (`--memory`) among the parts. The fixed ones (caches, write buffers, queues) are made
//!   of their size at the start, smaller where the budget is small;
//! - [`pool`] is for what comes and goes: what a request or a reader may hold is charged to one before it is read, and
//!   given back when the last byte of it has left. What does not fit waits for a while and is refused then;
//! - [`machine`] knows how much memory there is: of the machine, or of the cgroup that the process is in.

mod machine;
mod plan;
mod pool;

pub use machine::available;
pub use plan::{CONNECTION, LogPlan, MINIMUM, Plan, SearchPlan};
pub use pool::{Charge, LARGEST, Pool, Refused, Usage, charged};

/// The budget of a running node.
pub struct Budget {
    pub plan: Plan,
    /// What requests read and answer.
    pub requests: Pool,
    /// Large WebSocket frames while they are read.
    pub frames: Pool,
    /// What sessions and streams have read from the store for their clients.
    pub readers: Pool,
}

impl Budget {
    pub fn new(plan: Plan) -> Budget {
        // A frame is small beside what is read and answered, and many users send some at the same time.
        let frames = Pool::shared(plan.frames, plan.frames / 8);
        Budget { plan, requests: Pool::new(plan.requests), frames, readers: Pool::new(plan.readers) }
    }
}
