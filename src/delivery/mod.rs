//! Delivery: from a commit of the projector to what waits for one socket.
//!
//! - [`hub`]: who reads which thread live, and the fan-out to them;
//! - [`registry`]: who is connected to this node;
//! - [`outbox`]: what waits for one socket; [`fair_queue`] says what of it goes first;
//! - [`subscriptions`]: the cursors of one session, brought from the store to the live feed;
//! - [`feed`]: the one order in which replayed and live events leave.

pub mod fair_queue;
pub mod feed;
pub mod hub;
pub mod outbox;
pub mod registry;
pub mod subscriptions;

use std::sync::Arc;

use crate::auth::Rights;
use crate::ingest::submit::Submit;
use crate::store::Store;
use feed::Feed;
use hub::Hub;

/// What every feed is made of.
pub struct Delivery {
    store: Arc<Store>,
    rights: Rights,
    hub: Arc<Hub>,
    submit: Arc<Submit>,
}

impl Delivery {
    pub fn new(store: Arc<Store>, rights: Rights, hub: Arc<Hub>, submit: Arc<Submit>) -> Delivery {
        Delivery { store, rights, hub, submit }
    }

    /// What one session or stream is fed from.
    pub fn feed(self: &Arc<Delivery>) -> Feed {
        Feed::new(self)
    }
}
