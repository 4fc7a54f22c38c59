//! HTTP: what a [`request`] says, what a [`reply`] is, a [`page`] of a list, and a file for each resource.

pub mod context;
pub mod dead_letters;
pub mod events;
pub mod members;
pub mod page;
pub mod probes;
pub mod readers;
pub mod reply;
pub mod request;
pub mod runs;
pub mod sessions;
pub mod threads;
pub mod tickets;

use std::sync::Arc;

use serde::Serialize;

use crate::auth::{Authenticator, Principal, Rights};
use crate::delivery::hub::Hub;
use crate::delivery::registry::Registry;
use crate::ingest::admit::{Admission, new_event};
use crate::ingest::submit::{Draft, Submit};
use crate::log::Grant;
use crate::projector::Published;
use crate::protocol::error::{Code, Error};
use crate::protocol::json;
use crate::store::Store;

/// What the resources work with.
pub struct Api {
    pub store: Arc<Store>,
    pub rights: Rights,
    pub auth: Arc<Authenticator>,
    pub admission: Arc<Admission>,
    pub submit: Arc<Submit>,
    pub hub: Arc<Hub>,
    pub registry: Arc<Registry>,
    /// The log's identity.
    pub epoch: String,
}

impl Api {
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
