//! Calling other services: the one client for all of them, so that none of them can take Weft down with it.
//!
//! - Every call has a deadline that covers connecting, the whole answer and all attempts. An answer has a largest size.
//! - Calls at a time are bounded. Those beyond wait for their turn, as long as a whole attempt still fits before their deadline:
//!   one that is cut short would look like a failure of the service.
//! - A call that failed is made again only if it is safe to repeat, after a pause, and while the budget of [`retries`] allows.
//! - A service that keeps failing is left alone for a while ([`breaker`]): then a call fails at once.
//! - Redirects are not followed, proxies of the environment are not used, and a name leads only to the addresses that
//!   [`address`] allows.
//!
//! How each service is doing is shown by `/readyz`, metrics and the log. Secrets are in none of them, and neither is anything
//! of an answer.

pub mod address;
mod breaker;
mod retries;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use reqwest::header::{ACCEPT, CONTENT_TYPE, HeaderMap};
use reqwest::{Client, StatusCode};
use tokio::sync::Semaphore;

use self::address::{CheckedResolver, NotAllowed, Target};
use self::breaker::{Breaker, Permit, State};
use self::retries::RetryBudget;
use crate::{clock, telemetry};

/// Connections that are kept open for the next calls.
const IDLE_CONNECTIONS: usize = 4;
const IDLE_FOR: Duration = Duration::from_secs(30);
/// When to try again what has no better time of its own.
const RETRY_AFTER: Duration = Duration::from_secs(1);

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
    #[error("it cannot be reached: {0}")]
    Unreachable(String),
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
            CallError::Unreachable(_) => "unreachable",
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
            CallError::TimedOut | CallError::Unreachable(_) => true,
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
    /// Whether the last call brought something, and the breaker is closed.
    pub ok: bool,
    pub breaker: &'static str,
    /// Since when `ok` is what it is, in milliseconds since the Unix epoch.
    pub since: u64,
    /// Why a call failed last, and when.
    pub last_error: Option<(String, u64)>,
}

pub struct Service {
    config: ServiceConfig,
    client: Client,
    calls: Semaphore,
    state: Mutex<ServiceState>,
}

struct ServiceState {
    breaker: Breaker,
    budget: RetryBudget,
    shown: State,
    ok: bool,
    since: u64,
    last_error: Option<(String, u64)>,
}

/// A call under way. One that is dropped before it has an outcome gives its place back.
struct Call<'a> {
    service: &'a Service,
    permit: Option<Permit>,
}

impl Drop for Call<'_> {
    fn drop(&mut self) {
        if let Some(permit) = self.permit.take() {
            self.service.lock().breaker.abandoned(permit);
        }
    }
}

impl Service {
    pub fn new(config: ServiceConfig) -> Result<Arc<Service>, String> {
        let client = Client::builder()
            .redirect(reqwest::redirect::Policy::none())
            .no_proxy()
            .retry(reqwest::retry::never())
            .referer(false)
            .user_agent(concat!("weft/", env!("CARGO_PKG_VERSION")))
            .dns_resolver(CheckedResolver::new(config.target.reach))
            .connect_timeout(config.timeout)
            .pool_max_idle_per_host(IDLE_CONNECTIONS)
            .pool_idle_timeout(IDLE_FOR)
            .build()
            .map_err(|error| format!("no client for {}: {error}", config.name))?;
        let calls = Semaphore::new(config.max_calls);
        let state = ServiceState {
            breaker: Breaker::default(),
            budget: RetryBudget::default(),
            shown: State::Closed,
            ok: true,
            since: clock::now_ms(),
            last_error: None,
        };
        let service = Service { config, client, calls, state: Mutex::new(state) };
        service.set_gauge(State::Closed);
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
        let breaker = state.breaker.state(Instant::now());
        ServiceStatus {
            name: self.config.name,
            label: self.config.label.clone(),
            ok: state.ok,
            breaker: breaker.as_str(),
            since: state.since,
            last_error: state.last_error.clone(),
        }
    }

    /// Whether a call would fail at once.
    pub fn is_open(&self) -> bool {
        self.lock().breaker.state(Instant::now()) == State::Open
    }

    /// Calls the service, and reads its answer with `read`: an answer that cannot be used is a failure as any other.
    pub async fn call<T>(
        &self,
        request: Request<'_>,
        read: impl Fn(&Answer) -> Result<T, String>,
    ) -> Result<T, CallError> {
        let begin = Instant::now();
        let called = self.call_in_time(request, &read).await;
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
        if let Some(pause) = self.lock().breaker.pause(Instant::now()) {
            return Err(CallError::Open(pause));
        }
        let patience = self.config.deadline.saturating_sub(self.config.timeout);
        let turn = tokio::time::timeout(patience, self.calls.acquire()).await;
        let Ok(Ok(_turn)) = turn else { return Err(CallError::Busy) };
        self.lock().budget.earn();

        let mut failed = 0;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            // An attempt that takes all that is left ends just before the call does, so that its outcome counts.
            let within = self.config.timeout.min(left.mul_f64(0.98));
            let error = match self.attempt(request, read, within).await {
                Ok(read) => return Ok(read),
                Err(error) => error,
            };
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

    async fn attempt<T>(
        &self,
        request: Request<'_>,
        read: &impl Fn(&Answer) -> Result<T, String>,
        within: Duration,
    ) -> Result<T, CallError> {
        let permit = self.lock().breaker.admit(Instant::now()).map_err(CallError::Open)?;
        let mut call = Call { service: self, permit: Some(permit) };
        self.show();

        let answered = tokio::time::timeout(within, self.send(request)).await;
        let answered = answered.unwrap_or(Err(CallError::TimedOut));
        let result = answered.and_then(|answer| read(&answer).map_err(CallError::Unusable));
        if let Some(permit) = call.permit.take() {
            self.finish(permit, result.as_ref().err());
        }
        result
    }

    async fn send(&self, request: Request<'_>) -> Result<Answer, CallError> {
        let url = self.config.target.url.clone();
        let request = match request {
            Request::Get => self.client.get(url),
            Request::Ask { form, basic } => {
                let body = form_urlencoded::Serializer::new(String::new()).extend_pairs(form).finish();
                let post = self.client.post(url).header(CONTENT_TYPE, "application/x-www-form-urlencoded").body(body);
                match basic {
                    Some((name, password)) => post.basic_auth(name, Some(password)),
                    None => post,
                }
            }
        };
        let mut reply = request.header(ACCEPT, "application/json").send().await.map_err(unreachable)?;
        let status = reply.status();
        if status.is_redirection() {
            return Err(CallError::Redirected(status.as_u16()));
        }
        if !status.is_success() || status == StatusCode::NO_CONTENT {
            return Err(CallError::Status(status.as_u16()));
        }

        let most = self.config.max_bytes;
        let mut body = BytesMut::new();
        while let Some(chunk) = reply.chunk().await.map_err(unreachable)? {
            if body.len() + chunk.len() > most {
                return Err(CallError::TooLarge(most));
            }
            body.extend_from_slice(&chunk);
        }
        Ok(Answer { headers: std::mem::take(reply.headers_mut()), body: body.freeze() })
    }

    /// What became of a call changes how the service is seen.
    fn finish(&self, permit: Permit, error: Option<&CallError>) {
        {
            let mut state = self.lock();
            let now = Instant::now();
            match error {
                Some(error) if error.is_failure() => state.breaker.failed(permit, now),
                _ => state.breaker.succeeded(permit),
            }
            let ok = error.is_none();
            if ok != state.ok {
                (state.ok, state.since) = (ok, clock::now_ms());
            }
            if let Some(error) = error {
                state.last_error = Some((error.to_string(), clock::now_ms()));
            }
        }
        self.show();
    }

    /// Brings the metric up to date: a breaker becomes half-open by time alone.
    pub fn measure(&self) {
        let state = self.lock();
        self.set_gauge(state.breaker.state(Instant::now()));
    }

    fn set_gauge(&self, breaker: State) {
        let value = match breaker {
            State::Closed => 0.0,
            State::HalfOpen => 1.0,
            State::Open => 2.0,
        };
        telemetry::outbound_breaker(self.config.name, &self.config.label).set(value);
    }

    /// Says in the log and the metrics when the breaker has changed.
    fn show(&self) {
        let mut state = self.lock();
        let now = state.breaker.state(Instant::now());
        if now == state.shown {
            return;
        }
        state.shown = now;
        self.set_gauge(now);
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

/// Why nothing came, without the URL: that is configured, and may be long.
fn unreachable(error: reqwest::Error) -> CallError {
    let mut source: Option<&(dyn std::error::Error + 'static)> = Some(&error);
    let mut last = error.to_string();
    while let Some(error) = source {
        if let Some(refused) = error.downcast_ref::<NotAllowed>() {
            return CallError::NotAllowed(refused.to_string());
        }
        last = error.to_string();
        source = error.source();
    }
    CallError::Unreachable(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn whoever_gets_no_turn_in_time_for_a_whole_attempt_is_told_so_and_it_is_no_failure() {
        let long = Duration::from_secs(60);
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let url = format!("http://{}/", listener.local_addr().expect("its address"));
        let service = Service::new(ServiceConfig {
            name: "test",
            label: String::new(),
            target: Target::configured(&url, &[]).expect("an address"),
            timeout: long,
            deadline: long,
            attempts: 1,
            max_calls: 1,
            max_bytes: 1,
        })
        .expect("a service");
        let turn = service.calls.acquire().await.expect("the only turn");
        let call = service.call(Request::Get, |_| Ok(()));
        let called = tokio::time::timeout(long / 4, call).await.expect("it does not wait until its deadline");
        assert!(matches!(called, Err(CallError::Busy)), "{called:?}");
        assert!(service.status().ok && service.status().last_error.is_none());

        drop(turn);
        let (called, _) = tokio::join!(service.call(Request::Get, |_| Ok(())), async { drop(listener.accept().await) });
        assert!(matches!(called, Err(CallError::Unreachable(_))), "called, and not answered: {called:?}");
    }
}
