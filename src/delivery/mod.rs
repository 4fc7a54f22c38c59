//! Delivery: from a commit of the projector to what waits for one socket.
//!
//! - [`registry`]: who is connected to this node;
//! - [`hub`]: who reads which thread live, and the fan-out to them;
//! - [`outbox`]: what waits for one socket; [`fair_queue`] says what of it goes next;
//! - [`subscriptions`]: where a session stands in each of its threads, and the way from the store to the live feed;
//! - [`feed`]: the one order in which replayed and live events leave.

pub mod fair_queue;
pub mod feed;
pub mod hub;
pub mod outbox;
pub mod registry;
mod sources;
pub mod subscriptions;

use std::sync::Arc;

use feed::Feed;
pub use sources::Sources;

/// Makes the feeds of sessions and streams.
pub struct Delivery {
    sources: Arc<Sources>,
}

impl Delivery {
    pub fn new(sources: Sources) -> Delivery {
        Delivery { sources: Arc::new(sources) }
    }

    /// A feed for one session or stream.
    pub fn feed(&self) -> Feed {
        Feed::new(self.sources.clone())
    }
}
