//! The edge: sockets in, frames and replies out. Nothing here decides; it parses, checks rights and asks the parts.

mod agui;
mod commands;
pub mod context;
mod cursor;
pub mod dead_letters;
mod feed;
mod frames;
pub mod http;
pub mod listener;
mod pieces;
pub mod reply;
pub mod runs;
pub mod session;
pub mod sessions;
pub mod socket;
mod stream;
mod subscribe;
pub mod subscriptions;
pub mod threads;
pub mod upgrade;

use std::sync::Arc;

use serde_json::value::RawValue;

use crate::access::{self, Standing};
use crate::error::{Code, Error};
use crate::event::{self, KindClass, LogEvent, Priority};
use crate::hub::Hub;
use crate::identity::Principal;
use crate::identity::jwt::Verifier;
use crate::identity::tickets::Tickets;
use crate::ids::{self, TENANT_THREAD};
use crate::limits::Limits;
use crate::log::Grant;
use crate::sessions::Sessions;
use crate::store::{Found, Store};
use crate::submit::{Submit, draft};
use crate::telemetry;

/// What sessions and requests work with.
pub struct Context {
    pub store: Arc<Store>,
    pub hub: Arc<Hub>,
    pub submit: Submit,
    pub verifier: Verifier,
    pub tickets: Tickets,
    /// The log's identity.
    pub epoch: String,
    pub sessions: Arc<Sessions>,
    pub limits: Arc<Limits>,
    /// Origins that browsers may come from, beside the server's own.
    pub origins: Vec<String>,
    pub health: crate::health::Health,
    pub metrics: metrics_exporter_prometheus::PrometheusHandle,
}

/// A publish as either interface has it, its values checked.
pub struct Asked<'a> {
    pub thread: &'a str,
    pub kind: &'a str,
    pub data: &'a RawValue,
    pub key: Option<&'a str>,
    pub run: Option<&'a str>,
    pub parent: Option<u64>,
    pub priority: Option<Priority>,
}

impl Context {
    /// The user of a token, whose tokens have not been revoked since.
    pub fn verify(&self, token: &str) -> Result<Principal, Error> {
        let who = self.verifier.verify(token)?;
        self.check_revoked(&who).map(|()| who)
    }

    /// Refuses who was authenticated by a token from before the user's sessions were revoked. A token that does not say when
    /// it was issued may be that old.
    pub fn check_revoked(&self, who: &Principal) -> Result<(), Error> {
        let Some(revoked) = self.store.revocation(&who.tenant, &who.user)? else { return Ok(()) };
        match who.issued_at {
            Some(at) if at > revoked.until => Ok(()),
            _ => Err(Error::new(Code::Unauthenticated, "the user's tokens were revoked after this one was issued")),
        }
    }

    /// Counts one command or request of the user's.
    pub fn count(&self, who: &Principal) -> Result<(), Error> {
        self.limits.command(who).inspect_err(|_| telemetry::rate_limited().increment(1))
    }

    /// The event that a publish becomes, and by which right; or why it is plainly wrong.
    pub fn admit<'a>(&self, who: &'a Principal, asked: Asked<'a>) -> Result<(LogEvent<'a>, Grant), Error> {
        let class = event::classify(asked.kind)?;
        event::check_data(class, asked.data)?;
        let grant = match ids::is_reserved(asked.thread) {
            true => access::publish_reserved(who.scopes, class, asked.thread, || self.may_write_to(who, asked.thread))?,
            false => access::publish(who.scopes, class, || self.standing(who, asked.thread))?,
        };
        event::check_place(class, asked.run, asked.parent)?;
        let limited = self.limits.append(&who.tenant, asked.data.get().len());
        limited.inspect_err(|_| telemetry::rate_limited().increment(1))?;
        let mut event = draft(&who.tenant, &who.user, asked.thread, asked.kind, asked.data);
        // Its place in the message is a piece's key.
        event.key = asked.key.filter(|_| class != KindClass::Token).map(Into::into);
        event.run = asked.run.map(Into::into);
        event.parent = asked.parent;
        event.priority = asked.priority;
        Ok((event, grant))
    }

    /// The user's place in a thread, now.
    pub fn standing(&self, who: &Principal, thread: &str) -> Result<Standing, Error> {
        let member = || self.store.is_member(&who.tenant, thread, &who.user);
        Ok(match member()? {
            true => Standing::Member,
            false if self.store.thread(&who.tenant, thread)?.is_none() => Standing::NoThread,
            // Asked again: the thread may have been made, with its first member, between the two lookups.
            false if member()? => Standing::Member,
            false => Standing::Stranger,
        })
    }

    /// Whether the user may write to an inbox without a scope for it: to the own one, and to those of people met in a
    /// thread.
    fn may_write_to(&self, who: &Principal, inbox: &str) -> Result<bool, Error> {
        match ids::inbox_of(inbox) {
            Some(user) if *user == *who.user => Ok(true),
            Some(user) => Ok(self.store.share_a_thread(&who.tenant, &who.user, user)?),
            None => Ok(false),
        }
    }

    /// Whether the user may signal in the thread: as one who may write there.
    pub fn may_signal(&self, who: &Principal, thread: &str) -> Result<(), Error> {
        let may_write = || self.may_write_to(who, thread);
        match ids::is_reserved(thread) {
            true => access::publish_reserved(who.scopes, event::KindClass::Custom, thread, may_write).map(drop),
            false if who.scopes.agent || who.scopes.admin => self.head(who, thread).map(drop),
            false => {
                access::may_publish(who.scopes)?;
                let member = self.store.is_member(&who.tenant, thread, &who.user)?;
                if member { Ok(()) } else { Err(Error::no_thread()) }
            }
        }
    }

    /// Whether the user may read the thread now.
    pub fn may_read(&self, who: &Principal, thread: &str) -> Result<(), Error> {
        let may = access::reads_by_scope(who.scopes)
            || match ids::is_reserved(thread) {
                true => thread == TENANT_THREAD || ids::inbox_of(thread) == Some(&*who.user),
                false => self.store.is_member(&who.tenant, thread, &who.user)?,
            };
        if may { Ok(()) } else { Err(Error::no_thread()) }
    }

    /// The newest seq of a thread that is there; those that exist by their name always are.
    pub fn head(&self, who: &Principal, thread: &str) -> Result<u64, Error> {
        match self.store.thread(&who.tenant, thread)? {
            Some(row) => Ok(row.head),
            None if ids::is_reserved(thread) => Ok(0),
            None => Err(Error::no_thread()),
        }
    }

    /// The head of a thread that the user may read now.
    pub fn readable(&self, who: &Principal, thread: &str) -> Result<u64, Error> {
        let head = self.head(who, thread)?;
        self.may_read(who, thread).map(|()| head)
    }

    /// The user's threads, as subscriptions to them begin; with the places of a durable one. Walks a range: for blocking
    /// threads.
    pub fn find_threads(&self, who: &Principal, name: Option<&str>) -> Result<Vec<Found>, Error> {
        let find = |thread: String| {
            let receipt = match name {
                Some(name) => self.store.receipt(&who.tenant, &thread, &who.user, name)?,
                None => None,
            };
            let since = self.store.member(&who.tenant, &thread, &who.user)?.map_or(1, |member| member.since);
            Ok(Found { head: self.store.head(&who.tenant, &thread)?, since, receipt, thread })
        };
        self.store.threads_of(&who.tenant, &who.user)?.into_iter().map(find).collect()
    }
}
