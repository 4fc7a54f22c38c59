//! Whether a publish is admitted: what can be judged before it is in the log. The rest is the projector's.

use std::sync::Arc;

use serde_json::value::RawValue;

use super::kinds::Kinds;
use super::limits::RateLimits;
use super::submit::Draft;
use crate::auth::{Principal, Rights};
use crate::protocol::error::{Code, Error};
use crate::protocol::event::{LogEvent, Priority};
use crate::protocol::kinds::{self, DeltaData, KindClass};
use crate::protocol::work::Overflow;
use crate::store::Store;
use crate::{clock, telemetry};

/// When to try again what a group had no room for.
const FULL_MS: u64 = 1_000;

/// A publish as either interface has it, its values checked.
#[derive(Clone, Copy)]
pub struct PublishRequest<'a> {
    pub thread: &'a str,
    pub kind: &'a str,
    pub data: &'a RawValue,
    pub key: Option<&'a str>,
    pub run: Option<&'a str>,
    pub parent: Option<u64>,
    pub priority: Option<Priority>,
    /// W3C trace context, passed on as it came.
    pub traceparent: Option<&'a str>,
}

/// A publish that was admitted.
pub struct Admitted<'a> {
    pub draft: Draft<'a>,
    /// The parsed `data`, if it is a delta.
    pub delta: Option<DeltaData<'a>>,
}

pub struct Admission {
    rights: Rights,
    limits: Arc<RateLimits>,
    store: Arc<Store>,
    custom: Kinds,
}

impl Admission {
    pub fn new(rights: Rights, limits: Arc<RateLimits>, store: Arc<Store>) -> Admission {
        let custom = Kinds::new(store.clone());
        Admission { rights, limits, store, custom }
    }

    /// Counts one command or request of the user's.
    pub fn count(&self, who: &Principal) -> Result<(), Error> {
        self.limits.command(who).inspect_err(|_| telemetry::rate_limited().increment(1))
    }

    /// Counts what a command does beyond the work of one, as so many commands more.
    pub fn count_more(&self, who: &Principal, commands: usize) -> Result<(), Error> {
        self.limits.more_commands(who, commands).inspect_err(|_| telemetry::rate_limited().increment(1))
    }

    /// Counts bytes that the user's tenant is about to append.
    pub fn count_bytes(&self, who: &Principal, bytes: usize) -> Result<(), Error> {
        self.limits.append(&who.tenant, bytes).inspect_err(|_| telemetry::rate_limited().increment(1))
    }

    /// Refuses what is work of a group that takes no more. What others publish at this moment is not counted yet.
    fn check_room(&self, who: &Principal, kind: &str) -> Result<(), Error> {
        let Some(group) = self.store.group_without_room(&who.tenant, kind) else { return Ok(()) };
        telemetry::work_overflowed(Overflow::Reject).increment(1);
        let why = format!("as many events of this kind wait for the group {group} as may");
        Err(Error::new(Code::QueueFull, why).retry_after(FULL_MS).at("kind"))
    }

    /// The event that a publish becomes, and by which right, its bytes counted; or why it is refused.
    pub fn admit<'a>(&self, who: &'a Principal, request: PublishRequest<'a>) -> Result<Admitted<'a>, Error> {
        let admitted = self.judge(who, request)?;
        self.count_bytes(who, request.data.get().len())?;
        Ok(admitted)
    }

    /// The same before its bytes are counted.
    pub fn judge<'a>(&self, who: &'a Principal, request: PublishRequest<'a>) -> Result<Admitted<'a>, Error> {
        let class = kinds::classify(request.kind)?;
        let delta = match class {
            KindClass::Token => Some(DeltaData::parse(request.data)?),
            _ => {
                kinds::check_data(class, request.data)?;
                None
            }
        };
        let grant = self.rights.to_publish(who, request.thread, class)?;
        kinds::check_place(class, request.run, request.parent)?;
        kinds::check_answer(request.kind, request.parent)?;
        if class == KindClass::Custom {
            // After the rights: whoever may not publish learns nothing of the schema, and costs nothing.
            self.custom.check(&who.tenant, request.kind, request.data)?;
        }
        self.check_room(who, request.kind)?;

        let event = LogEvent {
            // A delta needs no key: a duplicate is known by its characters of the message.
            key: request.key.filter(|_| class != KindClass::Token).map(Into::into),
            run: request.run.map(Into::into),
            parent: request.parent,
            priority: request.priority,
            ..new_event(&who.tenant, &who.user, request.thread, request.kind, request.data)
        };
        Ok(Admitted { draft: Draft { event, grant, traceparent: request.traceparent }, delta })
    }
}

/// An event that is published now.
pub fn new_event<'a>(
    tenant: &'a str,
    from: &'a str,
    thread: &'a str,
    kind: &'a str,
    data: &'a RawValue,
) -> LogEvent<'a> {
    LogEvent {
        tenant: tenant.into(),
        thread: thread.into(),
        kind: kind.into(),
        event: clock::event_id(),
        from: from.into(),
        at: clock::rfc3339(clock::now_ms()).into(),
        data,
        key: None,
        run: None,
        parent: None,
        priority: None,
    }
}
