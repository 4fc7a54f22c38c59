//! The webhook: tells the application's backend of events, over HTTP (`--webhook-url`).
//!
//! It is a worker of the group `webhook` that each tenant has, and no more than that: what waits, order within a thread,
//! attempts, backoff, pause and dead letters are the group's, and on several nodes each event is told by one. A group takes
//! all events of the kinds chosen, from the tenant's first on.
//!
//! - An event is told until the backend answers with a status of 200 to 299; then it is settled. So it is told at least once,
//!   and more than once when the answer, or the settlement, is lost. Its id tells repetitions.
//! - While the backend fails (`outbound`'s breaker is open) no more work is taken, and what was taken waits, its lease
//!   prolonged: an outage costs attempts only for the events with which it is tried whether the backend works again.
//! - In sum at most [`CALLS`] calls are under way, and some [`HELD`] events are held, shared among the tenants.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use aws_lc_rs::hmac;
use base64::prelude::{BASE64_STANDARD, Engine};
use serde::Deserialize;
use serde_json::value::RawValue;
use tokio::sync::{Semaphore, SemaphorePermit, mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::auth::{Principal, Scopes};
use crate::clock;
use crate::dispatch::{Consumer, Dispatcher, Settling, Wants};
use crate::outbound::address::Target;
use crate::outbound::{CallError, Outbound, Request, Service, ServiceConfig};
use crate::protocol::error::{Code, Error};
use crate::protocol::event::without_type;
use crate::protocol::groups::WebhookMessage;
use crate::protocol::ids::SERVER_USER;
use crate::protocol::json::encode;
use crate::protocol::work::{Backoff, GroupSettings, Outcome, StartFrom, WEBHOOK_GROUP, Work};
use crate::store::{GroupRow, Store};

/// With this status the backend says for good that it does not want an event.
const GONE: u16 = 410;
/// For one call.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Calls under way, and events held, in sum.
const CALLS: usize = 64;
const HELD: usize = 256;
/// Of these, those that were not taken up yet. With more tenants than this some may be given back.
const QUEUE: usize = 4_096;
/// How long an event is leased: longer than a call, and prolonged while it waits for one.
const LEASE: Duration = Duration::from_secs(30);
/// How long what is held waits before it is looked again whether the backend works.
const LOOK_AGAIN: Duration = Duration::from_millis(250);
/// When a group that could not be made is tried again.
const MAKE_AGAIN: Duration = Duration::from_secs(5);
/// How long calls under way may take when the server stops.
const FINISH_WITHIN: Duration = Duration::from_secs(3);
/// What the group begins with, as far as it differs from others: some 9 hours of attempts in all.
const ATTEMPTS: u32 = 20;
const BACKOFF: Backoff = Backoff { min_ms: 1_000, max_ms: 3_600_000 };
/// The prefix of a secret, and how many bytes it has.
const SECRET_PREFIX: &str = "whsec_";
const SECRET_BYTES: std::ops::RangeInclusive<usize> = 24..=64;
/// How much of an error's text becomes the reason of an attempt.
const REASON_CHARS: usize = 500;

/// Where events are told, and which.
#[derive(Clone)]
pub struct WebhookConfig {
    pub target: Target,
    pub kinds: Vec<String>,
    /// The first signs, and so does each that follows: a backend that knows one of them knows the call.
    pub secrets: Vec<Secret>,
}

/// A secret of Standard Webhooks: `whsec_`, and 24 to 64 bytes in base64.
#[derive(Clone)]
pub struct Secret(hmac::Key);

impl Secret {
    pub fn parse(text: &str) -> Result<Secret, String> {
        let bytes = text.strip_prefix(SECRET_PREFIX).and_then(|base64| BASE64_STANDARD.decode(base64).ok());
        match bytes {
            Some(bytes) if SECRET_BYTES.contains(&bytes.len()) => Ok(Secret(hmac::Key::new(hmac::HMAC_SHA256, &bytes))),
            _ => Err("must be whsec_ and the base64 of 24 to 64 random bytes, as from `echo whsec_$(openssl rand -base64 32)`"
                .to_owned()),
        }
    }

    /// As in `webhook-signature`.
    fn sign(&self, id: &str, timestamp: u64, body: &str) -> String {
        let signed = hmac::sign(&self.0, format!("{id}.{timestamp}.{body}").as_bytes());
        format!("v1,{}", BASE64_STANDARD.encode(signed))
    }
}

pub struct Webhook {
    service: Arc<Service>,
    kinds: Vec<String>,
    secrets: Vec<Secret>,
    store: Arc<Store>,
    dispatcher: Arc<Dispatcher>,
    calls: Semaphore,
    stop: watch::Sender<bool>,
}

/// Work of a tenant.
type Taken = (Arc<Principal>, Work);

impl Webhook {
    pub fn new(
        config: WebhookConfig,
        outbound: Arc<Outbound>,
        store: Arc<Store>,
        dispatcher: Arc<Dispatcher>,
    ) -> Result<Arc<Webhook>, String> {
        let WebhookConfig { target, kinds, secrets } = config;
        let service = ServiceConfig {
            name: "webhook",
            label: target.label(),
            target,
            timeout: TIMEOUT,
            deadline: TIMEOUT,
            // The group tries again.
            attempts: 1,
            max_calls: CALLS,
            max_bytes: 0,
        };
        let service = Service::new(service, outbound)?;
        let (calls, (stop, _)) = (Semaphore::new(CALLS), watch::channel(false));
        Ok(Arc::new(Webhook { service, kinds, secrets, store, dispatcher, calls, stop }))
    }

    pub fn service(&self) -> &Arc<Service> {
        &self.service
    }

    /// Takes no more work, and ends once the calls under way have an answer, or soon.
    pub fn stop(&self) {
        self.stop.send_replace(true);
    }

    /// Runs until it is stopped.
    pub async fn run(self: Arc<Webhook>) {
        let mut stopped = self.stop.subscribe();
        let mut telling = JoinSet::new();
        // Held until the end: what a consumer holds is lost with it.
        let mut consumers = HashMap::new();
        tokio::select! {
            _ = stopped.wait_for(|stopped| *stopped) => {}
            () = self.tell_all(&mut consumers, &mut telling) => {}
        }
        consumers.values().for_each(|consumer: &Consumer| consumer.set(wants(0)));
        let finished = async { while telling.join_next().await.is_some() {} };
        if tokio::time::timeout(FINISH_WITHIN, finished).await.is_err() {
            tracing::warn!("calls of the webhook are cut short: these events are told again");
        }
    }

    async fn tell_all(self: &Arc<Webhook>, consumers: &mut HashMap<Arc<str>, Consumer>, telling: &mut JoinSet<()>) {
        let store = self.store.clone();
        let tenants = loop {
            let store = store.clone();
            match tokio::task::spawn_blocking(move || store.tenants()).await {
                Ok(Ok(tenants)) => break tenants,
                Ok(Err(error)) => tracing::warn!(%error, "the webhook cannot read which tenants there are"),
                // The runtime is shutting down.
                Err(_) => return,
            }
            tokio::time::sleep(MAKE_AGAIN).await;
        };
        let (sender, mut taken) = mpsc::channel::<Taken>(QUEUE);
        let (mut each, mut due) = (0, Some(Instant::now()));
        let mut every = tokio::time::interval(LOOK_AGAIN);
        loop {
            tokio::select! {
                () = tenants.changed() => due = Some(Instant::now()),
                _ = every.tick() => {}
                Some((who, work)) = taken.recv() => {
                    telling.spawn(self.clone().tell(who, work));
                    continue;
                }
                Some(_) = telling.join_next() => continue,
            }
            if due.is_some_and(|due| due <= Instant::now()) {
                let all = self.join(&tenants.all(), each, consumers, &sender).await;
                due = (!all).then(|| Instant::now() + MAKE_AGAIN);
            }
            let share = if self.service.is_open() { 0 } else { (HELD / consumers.len().max(1)).max(1) as u32 };
            if share != each {
                each = share;
                consumers.values().for_each(|consumer| consumer.set(wants(each)));
            }
        }
    }

    /// Becomes a worker for tenants for which it is none yet. `false` if that is to be tried again.
    async fn join(
        &self,
        tenants: &[Arc<str>],
        credit: u32,
        consumers: &mut HashMap<Arc<str>, Consumer>,
        sender: &mpsc::Sender<Taken>,
    ) -> bool {
        let mut all = true;
        for tenant in tenants.iter().filter(|tenant| !consumers.contains_key(*tenant)).collect::<Vec<_>>() {
            let who = Arc::new(Principal::new(tenant, SERVER_USER, Scopes::default(), u64::MAX));
            if let Err(error) = self.make_group(&who).await {
                tracing::warn!(%tenant, %error, "the webhook's group cannot be made; trying again");
                all = false;
                continue;
            }
            let (sender, whose) = (sender.clone(), who.clone());
            let sink = Box::new(move |work| sender.try_send((whose.clone(), work)).is_ok());
            let consumer = self.dispatcher.consume(&who, WEBHOOK_GROUP, wants(credit), sink);
            consumers.insert(tenant.clone(), consumer);
        }
        all
    }

    /// Makes the tenant's group, or has it take the kinds that are configured; what else was set stays.
    async fn make_group(&self, who: &Principal) -> Result<(), Error> {
        let settings = match self.dispatcher.group(&who.tenant, WEBHOOK_GROUP).await {
            Ok(row) if same(&row.kinds, &self.kinds) => return Ok(()),
            Ok(row) => GroupSettings { kinds: self.kinds.clone(), ..settings_of(row) },
            Err(error) if error.code == Code::NotFound => GroupSettings {
                kinds: self.kinds.clone(),
                from: StartFrom::Start,
                attempts: ATTEMPTS,
                backoff: BACKOFF,
                ..GroupSettings::default()
            },
            Err(error) => return Err(error),
        };
        self.dispatcher.set(who, WEBHOOK_GROUP, settings, false).await
    }

    /// Tells of one event until that has an outcome, and settles it.
    async fn tell(self: Arc<Webhook>, who: Arc<Principal>, work: Work) {
        let mut stopped = self.stop.subscribe();
        let mut extend_at = Instant::now() + LEASE / 2;
        let told = loop {
            let turn = tokio::select! {
                turn = self.turn(&who, &work, &mut extend_at) => turn,
                // What was not begun is given back with the consumer.
                _ = stopped.wait_for(|stopped| *stopped) => None,
            };
            let Some(turn) = turn else { return };
            match self.call(&who, &work).await {
                // It was not called: another call shows whether it works again.
                Err(CallError::Open(_) | CallError::Busy) => {
                    drop(turn);
                    tokio::time::sleep(LOOK_AGAIN).await;
                }
                told => break told,
            }
        };
        let outcome = match told {
            Ok(()) => Outcome::Done,
            Err(CallError::Status(GONE)) => Outcome::Reject,
            Err(_) => Outcome::Retry,
        };
        let reason = told.err().map(|error| error.to_string().chars().take(REASON_CHARS).collect::<String>());
        self.settle(&who, &work, outcome, reason.as_deref()).await;
    }

    /// Waits until it may be called, and prolongs the lease meanwhile. `None`: the lease is over.
    async fn turn(&self, who: &Principal, work: &Work, extend_at: &mut Instant) -> Option<SemaphorePermit<'_>> {
        loop {
            let turn = tokio::time::timeout_at(*extend_at, self.calls.acquire()).await;
            if Instant::now() >= *extend_at {
                if !self.settle(who, work, Outcome::Extend, None).await {
                    return None;
                }
                *extend_at = Instant::now() + LEASE / 2;
            }
            let Ok(turn) = turn else { continue };
            if !self.service.is_open() {
                return turn.ok();
            }
            drop(turn);
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    async fn call(&self, who: &Principal, work: &Work) -> Result<(), CallError> {
        let (store, tenant, thread, seq) = (self.store.clone(), who.tenant.clone(), work.thread.clone(), work.seq);
        let read = tokio::task::spawn_blocking(move || store.event(&tenant, &thread, seq)).await;
        let event = match read {
            Ok(Ok(Some(event))) => event,
            Ok(Ok(None)) => return Err(CallError::Unusable("the event is not there".to_owned())),
            Ok(Err(error)) => return Err(CallError::Unusable(error.to_string())),
            Err(_) => return Err(CallError::Unusable("the server is stopping".to_owned())),
        };
        let (id, body) = message(&who.tenant, work.attempt, &event.frame)?;
        drop(event);
        let timestamp = clock::now_s();
        let signatures: Vec<String> = self.secrets.iter().map(|secret| secret.sign(&id, timestamp, &body)).collect();
        let headers = [
            ("webhook-id", id),
            ("webhook-timestamp", timestamp.to_string()),
            ("webhook-signature", signatures.join(" ")),
        ];
        self.service.call(Request::Tell { body: &body, headers: &headers }, |_| Ok(())).await
    }

    /// Whether that counted.
    async fn settle(&self, who: &Principal, work: &Work, outcome: Outcome, reason: Option<&str>) -> bool {
        let settled = self.dispatcher.settle(who, &work.delivery, Settling { outcome, reason, delay_ms: None }).await;
        if let Err(error) = &settled {
            let Work { thread, seq, .. } = work;
            tracing::warn!(tenant = %who.tenant, %thread, seq, %error, "an event of the webhook is not settled: it is told again");
        }
        settled.is_ok()
    }
}

fn wants(credit: u32) -> Wants {
    Wants { credit, kinds: None, lease_ms: Some(LEASE.as_millis() as u64) }
}

fn same(some: &[String], others: &[String]) -> bool {
    let sorted = |kinds: &[String]| kinds.iter().cloned().collect::<std::collections::BTreeSet<_>>();
    sorted(some) == sorted(others)
}

fn settings_of(row: GroupRow) -> GroupSettings {
    GroupSettings {
        kinds: row.kinds,
        from: if row.from == 0 { StartFrom::Start } else { StartFrom::Now },
        lease_ms: row.lease_ms,
        attempts: row.attempts,
        backoff: Backoff { min_ms: row.backoff_min_ms, max_ms: row.backoff_max_ms },
        limit: row.limit,
        overflow: row.overflow,
        order: row.order,
        boost: row.boost,
    }
}

/// The event's id, and what the backend is told.
fn message(tenant: &str, attempt: u32, frame: &str) -> Result<(String, String), CallError> {
    // A frame that this server made.
    let unusable = |_| CallError::Unusable("the event is no JSON".to_owned());
    let Named { event: id } = serde_json::from_str(frame).map_err(unusable)?;
    let event = RawValue::from_string(without_type(frame)).map_err(unusable)?;
    Ok((id, encode(&WebhookMessage { tenant, attempt, event: &event })))
}

/// Of a frame.
#[derive(Deserialize)]
struct Named {
    event: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_is_signed_as_standard_webhooks_says() {
        // The example of the specification's reference implementations.
        let secret = Secret::parse("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw").expect("a secret");
        let signed = secret.sign("msg_p5jXN8AQM9LWM0D4loKWxJek", 1_614_265_330, r#"{"test": 2432232314}"#);
        assert_eq!(signed, "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=");
    }

    #[test]
    fn a_secret_that_is_short_or_not_base64_is_refused() {
        for wrong in [
            "",
            "whsec_",
            "whsec_c2hvcnQ=",
            "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
            "whsec_no base64, but long enough for all",
        ] {
            let why = Secret::parse(wrong).err().expect("refused");
            assert!(why.contains("whsec_") && !why.contains("short"), "{why}");
        }
    }
}
