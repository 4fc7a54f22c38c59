//! HTTP: what a [`request`] says, what a [`reply`] is, a [`page`] of a list, and a file for each resource.

pub mod batch;
pub mod context;
pub mod dead_letters;
pub mod documents;
pub mod events;
pub mod groups;
pub mod kinds;
pub mod letter_acts;
pub mod members;
pub mod meter;
pub mod page;
pub mod probes;
pub mod readers;
pub mod reply;
pub mod request;
pub mod runs;
pub mod search;
pub mod sessions;
pub mod threads;
pub mod tickets;

use std::sync::Arc;

use meter::Meter;
use request::Request;
use serde::Serialize;

use crate::auth::{Principal, Rights};
use crate::delivery::hub::Hub;
use crate::delivery::registry::Registry;
use crate::dispatch::Dispatcher;
use crate::ingest::admit::{Admission, new_event};
use crate::ingest::submit::{Draft, Submit};
use crate::ingest::tickets::Tickets;
use crate::log::Grant;
use crate::memory::Budget;
use crate::projector::Published;
use crate::projector::level::Level;
use crate::protocol::command::MAX_FRAME;
use crate::protocol::error::{Code, Error};
use crate::protocol::json;
use crate::search::Search;
use crate::store::Store;

/// How often a body is in memory: as it came, and as what is made of it.
const BODY_COPIES: usize = 2;

/// The body of a request.
pub struct Body {
    pub text: String,
    /// Held for as long as the body is.
    pub charge: Meter,
}

/// What the resources work with.
pub struct Api {
    pub store: Arc<Store>,
    pub rights: Rights,
    pub level: Arc<Level>,
    pub tickets: Arc<Tickets>,
    pub admission: Arc<Admission>,
    pub submit: Arc<Submit>,
    pub hub: Arc<Hub>,
    pub dispatcher: Arc<Dispatcher>,
    /// Nothing if it is off.
    pub search: Option<Arc<Search>>,
    pub registry: Arc<Registry>,
    pub memory: Arc<Budget>,
    /// The log's identity.
    pub epoch: String,
}

impl Api {
    /// Charges what a request of this user may hold in memory.
    pub async fn meter(&self, who: &Principal, bytes: usize) -> Result<Meter, Error> {
        Meter::begin(&self.memory.requests, &who.key, bytes).await
    }

    /// A request's whole body, as text, with what is charged for it.
    pub async fn body(&self, it: &mut Request) -> Result<Body, Error> {
        self.body_up_to(it, MAX_FRAME).await
    }

    /// The same, on routes whose bodies may be larger.
    pub async fn body_up_to(&self, it: &mut Request, most: usize) -> Result<Body, Error> {
        let bytes = it.body_bytes().unwrap_or(most).min(most);
        let charge = self.meter(&it.who, bytes * BODY_COPIES).await?;
        Ok(Body { text: it.body(most).await?, charge })
    }

    /// Appends an event of one of the server's own kinds, on a user's behalf.
    pub async fn append(
        &self,
        who: &Principal,
        thread: &str,
        kind: &str,
        data: &(impl Serialize + Sync),
        grant: Grant,
        traceparent: Option<&str>,
    ) -> Result<Published, Error> {
        let data = json::encode_raw(data);
        self.admission.count_bytes(who, data.get().len())?;
        let event = new_event(&who.tenant, &who.user, thread, kind, &data);
        self.submit.publish(&Draft { event, grant, traceparent }).await
    }
}

/// What was read for a list, without what the user may no longer read.
fn if_readable<T>(read: Result<T, Error>) -> Result<Option<T>, Error> {
    match read {
        Ok(found) => Ok(Some(found)),
        Err(error) if error.code == Code::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}
