//! Calling other services: the one client for all of them, so that none of them can take Weft down with it.
//!
//! - Every call has a deadline that covers connecting, the whole answer and all attempts. An answer has a largest size.
//! - Calls at a time are bounded. Those beyond wait for their turn, as long as a whole attempt still fits before their deadline:
//!   one that is cut short would look like a failure of the service.
//! - A call that failed is made again only if it is safe to repeat, after a pause, and while the budget of [`retries`] allows.
//! - A service may have several [`instances`], which [`discovery`] finds. One that keeps failing is left alone for a while
//!   ([`breaker`]); if all are, a call fails at once.
//! - Redirects are not followed, proxies of the environment are not used, and a name leads only to the addresses that
//!   [`address`] allows.
//!
//! How each service is doing is shown by `/readyz`, metrics and the log. Secrets are in none of them, and neither is anything
//! of an answer.

pub mod address;
mod breaker;
mod connector;
mod discovery;
mod hosts;
mod instances;
mod retries;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use reqwest::StatusCode;
use reqwest::header::{ACCEPT, CONTENT_TYPE, HeaderMap};
use tokio::sync::{Mutex as AsyncMutex, Semaphore};

use self::address::Target;
use self::breaker::{Permit, State};
use self::connector::Connector;
use self::discovery::{Discovery, FindError, Place};
pub use self::instances::InstanceStatus;
use self::instances::{Chosen, Instances};
use self::retries::RetryBudget;
use crate::{clock, telemetry};

/// Instances that are tried one after another because no connection to them comes about: none of them was asked anything.
const CONNECTS: usize = 3;
/// How long a call waits for a lookup while it is known where the instances were.
const LOOKUP: Duration = Duration::from_millis(500);
/// When what could not be looked up is looked up again, and when if it is known where the instances were.
const LOOK_UP_AGAIN: Duration = Duration::from_secs(1);
const LOOK_UP_AGAIN_IF_KNOWN: Duration = Duration::from_secs(5);
/// When to try again what has no better time of its own.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// What all services have in common.
pub struct Outbound {
    discovery: Discovery,
    connector: Connector,
}

impl Outbound {
    /// Asks the system's DNS unless another server is named. `hosts` is the file of `--service-hosts`.
    pub fn new(dns_server: Option<SocketAddr>, hosts: Option<PathBuf>) -> Result<Arc<Outbound>, String> {
        let discovery = Discovery::new(dns_server, hosts)?;
        Ok(Arc::new(Outbound { discovery, connector: Connector::default() }))
    }
}

/// What a service is called with.
#[derive(Debug, Clone)]
pub struct ServiceConfig {
    /// As metrics, health and the log call it.
    pub name: &'static str,
    /// Which of several with this name.
    pub label: String,
    pub target: Target,
    /// For one attempt.
    pub timeout: Duration,
    /// For a call with all its attempts.
    pub deadline: Duration,
    /// How often a call is tried.
    pub attempts: u32,
    /// Calls at a time.
    pub max_calls: usize,
    /// The largest answer.
    pub max_bytes: usize,
}

/// What a call asks.
#[derive(Debug, Clone, Copy)]
pub enum Request<'a> {
    /// Safe to repeat.
    Get,
    /// A form that only asks, and is safe to repeat; with a name and a password (HTTP Basic) if the service wants them.
    Ask { form: &'a [(&'a str, &'a str)], basic: Option<(&'a str, &'a str)> },
    /// JSON that is told, with these headers. Nothing is read of the answer but its status.
    Tell { body: &'a str, headers: &'a [(&'a str, String)] },
}

/// An answer with a status of 200 to 299.
#[derive(Debug)]
pub struct Answer {
    pub headers: HeaderMap,
    pub body: Bytes,
}

/// Why a call brought nothing.
#[derive(Debug, Clone, thiserror::Error)]
pub enum CallError {
    #[error("it keeps failing, and is not called for {}", humantime::format_duration(round_up(*.0)))]
    Open(Duration),
    #[error("too many calls wait for it")]
    Busy,
    #[error("no whole answer came in time")]
    TimedOut,
    #[error("there is no connection to it: {0}")]
    NotConnected(String),
    #[error("the connection to it was lost: {0}")]
    Lost(String),
    #[error("{0}")]
    NotFound(String),
    #[error("{0}")]
    NotAllowed(String),
    #[error("it answered with a redirect ({0}), which is not followed")]
    Redirected(u16),
    #[error("it answered with status {0}")]
    Status(u16),
    #[error("its answer is larger than {0} bytes")]
    TooLarge(usize),
    #[error("its answer cannot be used: {0}")]
    Unusable(String),
}

impl CallError {
    /// What metrics call it.
    fn outcome(&self) -> &'static str {
        match self {
            CallError::Open(_) => "open",
            CallError::Busy => "busy",
            CallError::TimedOut => "timeout",
            CallError::NotConnected(_) | CallError::Lost(_) | CallError::NotFound(_) => "unreachable",
            CallError::NotAllowed(_) => "not_allowed",
            CallError::Redirected(_) | CallError::Status(_) => "status",
            CallError::TooLarge(_) => "too_large",
            CallError::Unusable(_) => "unusable",
        }
    }

    /// Whether the service failed: one that refuses what it is asked works.
    fn is_failure(&self) -> bool {
        match self {
            CallError::Status(status) => *status >= 500 || matches!(status, 408 | 429),
            CallError::Open(_) | CallError::Busy => false,
            _ => true,
        }
    }

    /// Whether the same call may bring something else in a moment.
    fn is_passing(&self) -> bool {
        match self {
            CallError::TimedOut | CallError::NotConnected(_) | CallError::Lost(_) => true,
            CallError::Status(status) => matches!(status, 500 | 502 | 503 | 504),
            _ => false,
        }
    }

    /// When it may be worth asking again.
    pub fn retry_after(&self) -> Duration {
        match self {
            CallError::Open(pause) => (*pause).max(RETRY_AFTER),
            _ => RETRY_AFTER,
        }
    }
}

fn round_up(duration: Duration) -> Duration {
    Duration::from_secs(duration.as_secs() + u64::from(duration.subsec_nanos() > 0))
}

/// How a service is doing.
#[derive(Debug, Clone)]
pub struct ServiceStatus {
    pub name: &'static str,
    pub label: String,
    /// Whether the last call brought something.
    pub ok: bool,
    pub breaker: &'static str,
    /// Since when `ok` is what it is, in milliseconds since the Unix epoch.
    pub since: u64,
    /// Why a call failed last, and when.
    pub last_error: Option<(String, u64)>,
    pub instances: Vec<InstanceStatus>,
}

pub struct Service {
    config: ServiceConfig,
    outbound: Arc<Outbound>,
    /// Held while it is looked up where the instances are.
    looking_up: AsyncMutex<()>,
    calls: Semaphore,
    state: Mutex<ServiceState>,
}

struct ServiceState {
    instances: Instances,
    /// Why they were not found when they were looked up last, and until when that holds if none are known.
    not_found: Option<(CallError, Instant)>,
    budget: RetryBudget,
    shown: State,
    ok: bool,
    since: u64,
    last_error: Option<(String, u64)>,
}

/// A call under way. One that is dropped before it has an outcome gives its place back.
struct Call<'a> {
    service: &'a Service,
    address: SocketAddr,
    permit: Option<Permit>,
}

impl Drop for Call<'_> {
    fn drop(&mut self) {
        if let Some(permit) = self.permit.take() {
            self.service.lock().instances.abandoned(self.address, permit);
        }
    }
}

impl Service {
    /// An error if no connection to it can ever come about.
    pub fn new(config: ServiceConfig, outbound: Arc<Outbound>) -> Result<Arc<Service>, String> {
        outbound.connector.check(&config.target.url)?;
        let calls = Semaphore::new(config.max_calls);
        let state = ServiceState {
            instances: Instances::default(),
            not_found: None,
            budget: RetryBudget::default(),
            shown: State::Closed,
            ok: true,
            since: clock::now_ms(),
            last_error: None,
        };
        let (looking_up, state) = (AsyncMutex::default(), Mutex::new(state));
        let service = Service { config, outbound, looking_up, calls, state };
        service.measure();
        Ok(Arc::new(service))
    }

    fn lock(&self) -> MutexGuard<'_, ServiceState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn target(&self) -> &Target {
        &self.config.target
    }

    pub fn status(&self) -> ServiceStatus {
        let state = self.lock();
        let now = Instant::now();
        ServiceStatus {
            name: self.config.name,
            label: self.config.label.clone(),
            ok: state.ok,
            breaker: state.instances.state(now).as_str(),
            since: state.since,
            last_error: state.last_error.clone(),
            instances: state.instances.status(now),
        }
    }

    /// Whether a call would fail at once.
    pub fn is_open(&self) -> bool {
        self.lock().instances.state(Instant::now()) == State::Open
    }

    /// Calls the service, and reads its answer with `read`: an answer that cannot be used is a failure as any other.
    pub async fn call<T>(
        &self,
        request: Request<'_>,
        read: impl Fn(&Answer) -> Result<T, String>,
    ) -> Result<T, CallError> {
        let begin = Instant::now();
        let called = self.call_in_time(request, &read).await;
        self.note(called.as_ref().err());
        let outcome = called.as_ref().map_or_else(CallError::outcome, |_| "ok");
        telemetry::outbound_calls(self.config.name, outcome).increment(1);
        telemetry::outbound_seconds(self.config.name).record(begin.elapsed());
        called
    }

    /// Each wait in it ends before the deadline.
    async fn call_in_time<T>(
        &self,
        request: Request<'_>,
        read: &impl Fn(&Answer) -> Result<T, String>,
    ) -> Result<T, CallError> {
        let until = Instant::now() + self.config.deadline;
        // Before it waits for a turn: nobody queues up for what is not called.
        let pause = self.lock().instances.pause(Instant::now());
        if let Some(pause) = pause {
            return Err(CallError::Open(pause));
        }
        let patience = self.config.deadline.saturating_sub(self.config.timeout);
        let turn = tokio::time::timeout(patience, self.calls.acquire()).await;
        let Ok(Ok(_turn)) = turn else { return Err(CallError::Busy) };
        self.lock().budget.earn();

        let (mut failed, mut tried) = (0, Vec::new());
        loop {
            let left = until.saturating_duration_since(Instant::now());
            // An attempt that takes all that is left ends just before the call does, so that its outcome counts.
            let within = self.config.timeout.min(left.mul_f64(0.98));
            let error = match self.attempt(request, read, within, &mut tried).await {
                Ok(read) => return Ok(read),
                Err(error) => error,
            };
            if matches!(error, CallError::NotConnected(_)) && self.has_others(&tried) {
                continue;
            }
            failed += 1;
            let pause = retries::pause(failed);
            let in_time = Instant::now() + pause < until;
            if failed >= self.config.attempts || !in_time || !error.is_passing() || !self.lock().budget.spend() {
                return Err(error);
            }
            telemetry::outbound_retries(self.config.name).increment(1);
            tokio::time::sleep(pause).await;
        }
    }

    /// Whether another instance can be called in place of those that were tried, which are not too many yet.
    fn has_others(&self, tried: &[SocketAddr]) -> bool {
        tried.len() < CONNECTS && self.lock().instances.has_others(tried, Instant::now())
    }

    /// Calls an instance, one that was not tried if there is one.
    async fn attempt<T>(
        &self,
        request: Request<'_>,
        read: &impl Fn(&Answer) -> Result<T, String>,
        within: Duration,
        tried: &mut Vec<SocketAddr>,
    ) -> Result<T, CallError> {
        let until = tokio::time::Instant::now() + within;
        let looked_up = tokio::time::timeout_at(until, self.look_up()).await;
        looked_up.unwrap_or_else(|_| Err(not_in_time()))?;
        let chosen = self.lock().instances.choose(tried, Instant::now()).map_err(CallError::Open)?;
        let (address, permit) = (chosen.address, chosen.permit);
        let mut call = Call { service: self, address, permit: Some(permit) };
        tried.push(address);
        self.show();

        let answered = tokio::time::timeout_at(until, self.send(chosen, request)).await;
        let answered = answered.unwrap_or(Err(CallError::TimedOut));
        let result = answered.and_then(|answer| read(&answer).map_err(CallError::Unusable));
        call.permit = None;
        self.finish(address, permit, result.as_ref().err());
        result
    }

    /// Finds out where the instances are, unless that is known. While it cannot be found out they are where they were.
    async fn look_up(&self) -> Result<(), CallError> {
        if let Some(known) = self.is_known() {
            return known;
        }
        // One looks it up. The others go on with what was known, or wait for that.
        let _looking_up = match self.looking_up.try_lock() {
            Ok(looking_up) => looking_up,
            Err(_) if !self.lock().instances.is_empty() => return Ok(()),
            Err(_) => self.looking_up.lock().await,
        };
        if let Some(known) = self.is_known() {
            return known;
        }
        let patience = if self.lock().instances.is_empty() { self.config.timeout } else { LOOKUP };
        let found = tokio::time::timeout(patience, self.outbound.discovery.find(&self.config.target)).await;
        let found = found.map_err(|_| not_in_time()).and_then(|found| found.map_err(CallError::from));
        let replaced = found.and_then(|(places, good_for)| self.replace(places, good_for));
        self.show();
        replaced.or_else(|error| self.not_found(error))
    }

    /// Whether it is known where the instances are, or why not. `None`: it is to be looked up.
    fn is_known(&self) -> Option<Result<(), CallError>> {
        let (state, now) = (self.lock(), Instant::now());
        match &state.not_found {
            Some((error, until)) if state.instances.is_empty() && now < *until => Some(Err(error.clone())),
            _ => state.instances.is_known(now).then_some(Ok(())),
        }
    }

    fn replace(&self, places: Vec<Place>, good_for: Duration) -> Result<(), CallError> {
        let mut state = self.lock();
        let ServiceConfig { target, timeout, .. } = &self.config;
        // Where there are others, some of the time is left for them.
        let patience = if places.len() > 1 { *timeout / 2 } else { *timeout };
        let connect = |place: &Place| self.outbound.connector.connect(&target.url, place, patience);
        state.instances.replace(places, Instant::now() + good_for, connect).map_err(CallError::NotFound)?;
        state.not_found = None;
        Ok(())
    }

    /// The instances were not found: an error if none are known.
    fn not_found(&self, error: CallError) -> Result<(), CallError> {
        let (mut state, now) = (self.lock(), Instant::now());
        let is_new = state.not_found.replace((error.clone(), now + LOOK_UP_AGAIN)).is_none();
        if state.instances.is_empty() {
            return Err(error);
        }
        state.instances.keep(now + LOOK_UP_AGAIN_IF_KNOWN);
        if is_new {
            let (service, label) = (self.config.name, &self.config.label);
            tracing::warn!(service, label, %error, "it is not found where a service is: it is called where it was");
        }
        Ok(())
    }

    async fn send(&self, to: Chosen, request: Request<'_>) -> Result<Answer, CallError> {
        let Chosen { url, client, .. } = to;
        let is_told = matches!(request, Request::Tell { .. });
        let request = match request {
            Request::Get => client.get(url),
            Request::Ask { form, basic } => {
                let body = form_urlencoded::Serializer::new(String::new()).extend_pairs(form).finish();
                let post = client.post(url).header(CONTENT_TYPE, "application/x-www-form-urlencoded").body(body);
                match basic {
                    Some((name, password)) => post.basic_auth(name, Some(password)),
                    None => post,
                }
            }
            Request::Tell { body, headers } => {
                let post = client.post(url).header(CONTENT_TYPE, "application/json").body(body.to_owned());
                headers.iter().fold(post, |post, (name, value)| post.header(*name, value))
            }
        };
        let mut reply = request.header(ACCEPT, "application/json").send().await.map_err(not_answered)?;
        let status = reply.status();
        if status.is_redirection() {
            return Err(CallError::Redirected(status.as_u16()));
        }
        if !status.is_success() || (status == StatusCode::NO_CONTENT && !is_told) {
            return Err(CallError::Status(status.as_u16()));
        }
        if is_told {
            return Ok(Answer { headers: HeaderMap::new(), body: Bytes::new() });
        }

        let most = self.config.max_bytes;
        let mut body = BytesMut::new();
        while let Some(chunk) = reply.chunk().await.map_err(not_answered)? {
            if body.len() + chunk.len() > most {
                return Err(CallError::TooLarge(most));
            }
            body.extend_from_slice(&chunk);
        }
        Ok(Answer { headers: std::mem::take(reply.headers_mut()), body: body.freeze() })
    }

    /// What became of an attempt changes how the instance is seen.
    fn finish(&self, address: SocketAddr, permit: Permit, error: Option<&CallError>) {
        {
            let (mut state, now) = (self.lock(), Instant::now());
            let before = state.instances.state_of(address, now);
            match error.filter(|error| error.is_failure()) {
                Some(error) => state.instances.failed(address, permit, &error.to_string(), now),
                None => state.instances.succeeded(address, permit),
            }
            if let Some(error) = error {
                state.last_error = Some((error.to_string(), clock::now_ms()));
            }
            let (after, (instances, _)) = (state.instances.state_of(address, now), state.instances.counts(now));
            // That of the only one is the service's.
            if instances > 1 && before != after {
                self.say(address, after, error);
            }
        }
        self.show();
    }

    /// What became of a call changes how the service is seen, unless it got no turn.
    fn note(&self, error: Option<&CallError>) {
        if matches!(error, Some(CallError::Busy)) {
            return;
        }
        let mut state = self.lock();
        let ok = error.is_none();
        if ok != state.ok {
            (state.ok, state.since) = (ok, clock::now_ms());
        }
        if let Some(error) = error.filter(|error| !matches!(error, CallError::Open(_))) {
            state.last_error = Some((error.to_string(), clock::now_ms()));
        }
    }

    /// Brings the metrics up to date: a breaker becomes half-open by time alone.
    pub fn measure(&self) {
        self.set_gauges(&self.lock().instances, Instant::now());
    }

    fn set_gauges(&self, instances: &Instances, now: Instant) {
        let value = match instances.state(now) {
            State::Closed => 0.0,
            State::HalfOpen => 1.0,
            State::Open => 2.0,
        };
        let (service, label) = (self.config.name, &self.config.label);
        telemetry::outbound_breaker(service, label).set(value);
        let (all, out) = instances.counts(now);
        telemetry::outbound_instances(service, label, "in").set((all - out) as f64);
        telemetry::outbound_instances(service, label, "out").set(out as f64);
    }

    /// Says in the log when the breaker of one of several instances has changed.
    fn say(&self, address: SocketAddr, state: Option<State>, error: Option<&CallError>) {
        let (service, label) = (self.config.name, &self.config.label);
        match (state, error) {
            (Some(State::Open), Some(why)) => {
                tracing::warn!(service, label, %address, %why, "an instance keeps failing, and is left out for a while");
            }
            (Some(State::Closed), _) => tracing::info!(service, label, %address, "an instance works again"),
            _ => {}
        }
    }

    /// Says in the log and the metrics when the breaker has changed.
    fn show(&self) {
        let mut state = self.lock();
        self.set_gauges(&state.instances, Instant::now());
        let now = state.instances.state(Instant::now());
        if now == state.shown {
            return;
        }
        state.shown = now;
        let (service, label) = (self.config.name, &self.config.label);
        let why = state.last_error.as_ref().map_or("", |(why, _)| why);
        match now {
            State::Open => {
                tracing::warn!(service, label, why, "a service keeps failing, and is left alone for a while")
            }
            State::HalfOpen => tracing::info!(service, label, "a service is tried again"),
            State::Closed => tracing::info!(service, label, "a service works again"),
        }
    }
}

impl From<FindError> for CallError {
    fn from(error: FindError) -> CallError {
        match error {
            FindError::NotAllowed(why) => CallError::NotAllowed(why),
            FindError::NotFound(why) => CallError::NotFound(why),
        }
    }
}

fn not_in_time() -> CallError {
    CallError::NotFound("its name was not looked up in time".to_owned())
}

/// Why nothing came, without the URL: that is configured, and may be long.
fn not_answered(error: reqwest::Error) -> CallError {
    let mut source: Option<&(dyn std::error::Error + 'static)> = Some(&error);
    let mut last = error.to_string();
    while let Some(inner) = source {
        last = inner.to_string();
        source = inner.source();
    }
    if error.is_connect() { CallError::NotConnected(last) } else { CallError::Lost(last) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn whoever_gets_no_turn_in_time_for_a_whole_attempt_is_told_so_and_it_is_no_failure() {
        let long = Duration::from_secs(60);
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let url = format!("http://{}/", listener.local_addr().expect("its address"));
        let service = ServiceConfig {
            name: "test",
            label: String::new(),
            target: Target::configured(&url, &[]).expect("an address"),
            timeout: long,
            deadline: long,
            attempts: 1,
            max_calls: 1,
            max_bytes: 1,
        };
        let service = Service::new(service, Outbound::new(None, None).expect("nothing to look up")).expect("a service");
        let turn = service.calls.acquire().await.expect("the only turn");
        let call = service.call(Request::Get, |_| Ok(()));
        let called = tokio::time::timeout(long / 4, call).await.expect("it does not wait until its deadline");
        assert!(matches!(called, Err(CallError::Busy)), "{called:?}");
        assert!(service.status().ok && service.status().last_error.is_none());

        drop(turn);
        let (called, _) = tokio::join!(service.call(Request::Get, |_| Ok(())), async { drop(listener.accept().await) });
        assert!(matches!(called, Err(CallError::Lost(_))), "called, and not answered: {called:?}");
    }
}
