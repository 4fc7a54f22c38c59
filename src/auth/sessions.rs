//! Sessions of an auth service: opaque to Weft, and good for as long as that service says so (RFC 7662, introspection).
//!
//! - What the service has said of a session is kept for up to 30 s, a refusal or a failure for 1 s; of a bounded number of them.
//! - Those who ask for the same session at the same time wait for one answer. Those who are new have half of the calls, and
//!   those who are in the other half: however many come, an open connection's session is asked for in time.
//! - Nobody gets in whose session cannot be checked. Who is in stays: connections and streams are asked for again before 30 s
//!   are over, and end only if the service says that their session is over, or with its `exp`.
//!
//! A session itself is never logged and never written anywhere; what is kept is looked up by its hash.

use std::collections::HashMap;
use std::fmt;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use futures_util::StreamExt;
use lru::LruCache;
use serde_json::Value;
use tokio::sync::{Mutex as AsyncMutex, Semaphore, mpsc};
use tokio::time::Instant;

use super::Principal;
use super::claims::{Named, WhoseClaims};
use crate::clock;
use crate::outbound::address::Target;
use crate::outbound::{CallError, Outbound, Request, Service, ServiceConfig};
use crate::protocol::error::{Code, Error};

/// For one attempt, for all of them, and what a new session waits for at most.
const TIMEOUT: Duration = Duration::from_millis(1_500);
const DEADLINE: Duration = Duration::from_millis(1_900);
const WAIT: Duration = Duration::from_secs(2);
const ATTEMPTS: u32 = 3;
const MAX_CALLS: usize = 32;
const MAX_BYTES: usize = 64 << 10;
/// The longest session that is asked for.
const MAX_SESSION: usize = 4_096;

/// How long an answer is good for.
const GOOD_FOR: Duration = Duration::from_secs(30);
/// How long a refusal or a failure is.
const REFUSED_FOR: Duration = Duration::from_secs(1);
/// After that long an open connection's session is asked for again, so that the answer is there before 30 s are over; and
/// after a failure.
const ASK_AGAIN: Duration = Duration::from_secs(20);
const ASK_AGAIN_AFTER_FAILURE: Duration = Duration::from_secs(5);
/// Sessions that are asked for again at a time, and those who are new: neither takes the others' turns.
const CHECKS: usize = MAX_CALLS / 2;
const NEWCOMERS: usize = MAX_CALLS - CHECKS;
/// How long one who is new waits for a turn: as long as a whole attempt still fits, since a call that is cut short helps nobody.
const PATIENCE: Duration = DEADLINE.saturating_sub(TIMEOUT);
/// How long a session lasts that does not say it, in seconds.
const UNLESS_SAID: u64 = 3_600;

/// Answers that are kept.
const KEPT: NonZeroUsize = NonZeroUsize::new(10_000).expect("not zero");
const KEPT_REFUSALS: NonZeroUsize = NonZeroUsize::new(1_000).expect("not zero");
/// Users who wait to be told that a session is over.
const ENDED: usize = 1_024;

type Hash = [u8; 32];

/// The session that somebody came in with, for as long as they are there.
pub struct Session {
    text: Box<str>,
    hash: Hash,
    /// `tenant/user`.
    user: Arc<str>,
    ended: AtomicBool,
    /// When it is to be asked for again.
    due: Mutex<Instant>,
}

impl Session {
    pub fn is_over(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }

    fn due(&self) -> MutexGuard<'_, Instant> {
        self.due.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PartialEq for Session {
    fn eq(&self, other: &Session) -> bool {
        self.hash == other.hash
    }
}

impl Eq for Session {}

/// Never its text.
impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session").field("user", &self.user).finish_non_exhaustive()
    }
}

/// How the auth service is asked.
#[derive(Clone)]
pub struct SessionsConfig {
    pub target: Target,
    /// Weft's own name and secret there.
    pub client: Option<(String, String)>,
    /// A session that names audiences must name this one.
    pub audience: Option<String>,
}

pub struct Sessions {
    service: Arc<Service>,
    client: Option<(String, String)>,
    audience: Option<String>,
    state: Mutex<State>,
    /// Turns of those who are new.
    newcomers: Semaphore,
    ended: mpsc::Sender<Arc<str>>,
}

struct State {
    good: LruCache<Hash, Good>,
    refused: LruCache<Hash, (Instant, Error)>,
    /// Those that are being asked for: whoever wants the same waits for the lock.
    asking: HashMap<Hash, Arc<AsyncMutex<()>>>,
    /// Those that somebody came in with.
    open: HashMap<Hash, Weak<Session>>,
}

/// What the service has said of a session that is good.
#[derive(Clone)]
struct Good {
    who: Principal,
    /// When it was asked.
    asked: Instant,
}

/// Somebody who waits for what the service says of a session. The last one takes its lock away, even if it is dropped while
/// it waits: whoever hangs up leaves nothing behind.
struct Asking<'a> {
    lock: Arc<AsyncMutex<()>>,
    sessions: &'a Sessions,
    hash: Hash,
}

impl Drop for Asking<'_> {
    fn drop(&mut self) {
        let mut state = self.sessions.lock();
        // Two: the map's own, and this one.
        if Arc::strong_count(&self.lock) <= 2 {
            state.asking.remove(&self.hash);
        }
    }
}

impl Sessions {
    /// Also gives the users of sessions that are over, as `tenant/user`.
    pub fn new(
        config: SessionsConfig,
        outbound: Arc<Outbound>,
    ) -> Result<(Arc<Sessions>, mpsc::Receiver<Arc<str>>), String> {
        let service = ServiceConfig {
            name: "introspection",
            label: config.target.label(),
            target: config.target,
            timeout: TIMEOUT,
            deadline: DEADLINE,
            attempts: ATTEMPTS,
            max_calls: MAX_CALLS,
            max_bytes: MAX_BYTES,
        };
        let service = Service::new(service, outbound)?;
        let state = State {
            good: LruCache::new(KEPT),
            refused: LruCache::new(KEPT_REFUSALS),
            asking: HashMap::new(),
            open: HashMap::new(),
        };
        let (ended, over) = mpsc::channel(ENDED);
        // As RFC 6749 has it (section 2.3.1), each is encoded as in a form before it goes into the header.
        let encoded = |text: &str| form_urlencoded::byte_serialize(text.as_bytes()).collect();
        let client = config.client.map(|(name, secret)| (encoded(&name), encoded(&secret)));
        let (state, newcomers) = (Mutex::new(state), Semaphore::new(NEWCOMERS));
        let sessions = Sessions { service, client, audience: config.audience, state, newcomers, ended };
        Ok((Arc::new(sessions), over))
    }

    pub fn service(&self) -> &Arc<Service> {
        &self.service
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whose session it is, if that is known.
    pub fn verify_now(&self, session: &str) -> Option<Result<Principal, Error>> {
        if session.is_empty() || session.len() > MAX_SESSION || !session.bytes().all(|it| it.is_ascii_graphic()) {
            let why = format!("a session is 1 to {MAX_SESSION} printable ASCII characters without space");
            return Some(Err(Error::new(Code::Unauthenticated, why).at("session")));
        }
        let hash = *blake3::hash(session.as_bytes()).as_bytes();
        let now = Instant::now();
        let mut state = self.lock();
        if let Some(good) = state.good.get(&hash).filter(|good| now < good.asked + GOOD_FOR) {
            let good = good.clone();
            let expired = good.who.ends_at() < clock::now_s();
            return (!expired).then(|| Ok(state.enter(session, hash, good)));
        }
        let (until, error) = state.refused.get(&hash)?;
        (now < *until).then(|| Err(error.clone()))
    }

    /// Whose session it is; asks the service if that is not known, and does not wait for long.
    pub async fn verify(&self, session: &str) -> Result<Principal, Error> {
        if let Some(known) = self.verify_now(session) {
            return known;
        }
        let hash = *blake3::hash(session.as_bytes()).as_bytes();
        let asking = Asking { lock: self.lock().asking.entry(hash).or_default().clone(), sessions: self, hash };
        let verified = tokio::time::timeout(WAIT, async {
            let _first = asking.lock.lock().await;
            if let Some(known) = self.verify_now(session) {
                return known;
            }
            let turn = tokio::time::timeout(PATIENCE, self.newcomers.acquire()).await;
            let Ok(Ok(_turn)) = turn else { return Err(unavailable("too many others are new", REFUSED_FOR)) };
            self.ask(session, hash).await?;
            self.verify_now(session).unwrap_or_else(|| Err(unavailable("its answer was too old", REFUSED_FOR)))
        });
        verified.await.unwrap_or_else(|_| Err(unavailable("no answer came in time", REFUSED_FOR)))
    }

    /// Asks the service, and keeps what it says.
    async fn ask(&self, session: &str, hash: Hash) -> Result<(), Error> {
        let asked = Instant::now();
        let said = self.introspect(session).await;
        let mut state = self.lock();
        let error = match said {
            Ok(Ok(who)) => {
                state.refused.pop(&hash);
                state.good.put(hash, Good { who, asked });
                return Ok(());
            }
            Ok(Err(why)) => Error::new(Code::Unauthenticated, why).at("session"),
            Err(error) => unavailable(&error.to_string(), error.retry_after()),
        };
        if error.code == Code::Unauthenticated {
            state.good.pop(&hash);
        }
        state.refused.put(hash, (Instant::now() + REFUSED_FOR, error.clone()));
        Err(error)
    }

    /// Who it is, or why the session is refused.
    async fn introspect(&self, session: &str) -> Result<Result<Principal, String>, CallError> {
        let form = [("token", session), ("token_type_hint", "access_token")];
        let basic = self.client.as_ref().map(|(name, secret)| (&**name, &**secret));
        self.service.call(Request::Ask { form: &form, basic }, |answer| self.read(&answer.body)).await
    }

    /// An error is that of an answer which is none.
    fn read(&self, body: &[u8]) -> Result<Result<Principal, String>, String> {
        let claims: Named = serde_json::from_slice(body).map_err(|_| "it is no JSON object".to_owned())?;
        let claims = WhoseClaims::session(claims);
        match claims.get("active") {
            Some(Value::Bool(true)) => Ok(self.principal(&claims)),
            Some(Value::Bool(false)) => Ok(Err("the session is over, or there never was one".to_owned())),
            _ => Err("it does not say whether the session is `active` (RFC 7662)".to_owned()),
        }
    }

    fn principal(&self, claims: &WhoseClaims) -> Result<Principal, String> {
        let now = clock::now_s();
        let expires_at = claims.check_times(now)?.unwrap_or((now + UNLESS_SAID) as f64);
        if let Some(audience) = &self.audience
            && claims.get("aud").is_some()
        {
            claims.check_contains("aud", audience)?;
        }
        claims.principal(expires_at)
    }

    /// Asks for the sessions of open connections again, for as long as the server lasts.
    pub async fn keep_checking(self: Arc<Sessions>) {
        let mut every = tokio::time::interval(Duration::from_secs(1));
        every.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            every.tick().await;
            let due = self.due(Instant::now());
            // While the service is left alone nothing is asked, and who is in stays.
            if self.service.is_open() {
                continue;
            }
            futures_util::stream::iter(due).for_each_concurrent(CHECKS, |session| self.check(session)).await;
        }
    }

    /// Open connections' sessions that are to be asked for again. A round may last: whoever leaves meanwhile is not asked for.
    fn due(&self, now: Instant) -> Vec<Weak<Session>> {
        let mut state = self.lock();
        state.open.retain(|_, session| session.strong_count() > 0);
        let is_due = |session: &Session| !session.is_over() && *session.due() <= now;
        let open = state.open.values().filter(|session| session.upgrade().is_some_and(|session| is_due(&session)));
        open.cloned().collect()
    }

    async fn check(&self, session: Weak<Session>) {
        let Some(session) = session.upgrade() else { return };
        let asked = Instant::now();
        let said = self.ask(&session.text, session.hash).await;
        let user = self.lock().good.peek(&session.hash).map(|good| good.who.key.clone());
        match said {
            Ok(()) if user.is_none_or(|user| user == session.user) => *session.due() = asked + ASK_AGAIN,
            Err(error) if error.code == Code::Unavailable => *session.due() = asked + ASK_AGAIN_AFTER_FAILURE,
            Ok(()) | Err(_) => {
                session.ended.store(true, Ordering::Release);
                // Fails only when the server stops.
                drop(self.ended.send(session.user.clone()).await);
            }
        }
    }
}

impl State {
    /// The user, with the session that they come in with.
    fn enter(&mut self, text: &str, hash: Hash, good: Good) -> Principal {
        let Good { mut who, asked } = good;
        let open = self.open.get(&hash).and_then(Weak::upgrade);
        // One that was over and is good again is another one to those who come in now.
        let session = open.filter(|session| !session.is_over()).unwrap_or_else(|| {
            let session = Arc::new(Session {
                text: text.into(),
                hash,
                user: who.key.clone(),
                ended: AtomicBool::new(false),
                due: Mutex::new(asked + ASK_AGAIN),
            });
            self.open.insert(hash, Arc::downgrade(&session));
            session
        });
        who.session = Some(session);
        who
    }
}

fn unavailable(why: &str, retry_after: Duration) -> Error {
    let why = format!("the session cannot be checked now: {why}");
    Error::new(Code::Unavailable, why).retry_after(retry_after.as_millis() as u64)
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt;
    use tokio::net::TcpListener;

    use super::*;
    use crate::auth::Scopes;

    fn asked_at(listener: &TcpListener) -> Arc<Sessions> {
        let url = format!("http://{}/", listener.local_addr().expect("its address"));
        let target = Target::configured(&url, &[]).expect("an address");
        let outbound = Outbound::new(None, None).expect("nothing to look up");
        Sessions::new(SessionsConfig { target, client: None, audience: None }, outbound).expect("the sessions").0
    }

    /// The session that the next call asks for, and the connection, which stays open without an answer.
    async fn next_asked(listener: &TcpListener) -> (String, impl Sized) {
        let (mut stream, _) = listener.accept().await.expect("a connection");
        let mut read = Vec::new();
        loop {
            let mut buffer = [0; 4096];
            let n = stream.read(&mut buffer).await.expect("a request");
            read.extend_from_slice(&buffer[..n]);
            let text = String::from_utf8_lossy(&read);
            let form = text.split_once("\r\n\r\n").map_or("", |(_, form)| form);
            if let Some((token, _)) = form.strip_prefix("token=").and_then(|form| form.split_once('&')) {
                return (token.to_owned(), stream);
            }
            assert!(n > 0, "it ended with {text}");
        }
    }

    #[tokio::test]
    async fn who_gets_no_turn_in_time_for_a_whole_call_is_told_so_and_the_service_is_not_asked() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let sessions = asked_at(&listener);
        let turns = sessions.newcomers.acquire_many(NEWCOMERS as u32).await.expect("all turns");
        let refused = sessions.verify("new").await.expect_err("no turn");
        assert!(refused.code == Code::Unavailable && refused.message.contains("too many"), "{refused:?}");

        drop(turns);
        let again = tokio::spawn(async move { sessions.verify("again").await });
        assert_eq!(next_asked(&listener).await.0, "again", "the first call of all");
        again.abort();
    }

    #[tokio::test]
    async fn however_many_are_new_who_is_in_is_asked_for_again() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let sessions = asked_at(&listener);
        let ada = Good { who: Principal::new("acme", "ada", Scopes::default(), u64::MAX), asked: Instant::now() };
        let is_in = sessions.lock().enter("is-in", [0; 32], ada).session.expect("a session");

        let mut tasks = tokio::task::JoinSet::new();
        for n in 0..4 * MAX_CALLS {
            let sessions = sessions.clone();
            tasks.spawn(async move { drop(sessions.verify(&format!("new-{n}")).await) });
        }
        let mut unanswered = Vec::new();
        for _ in 0..NEWCOMERS {
            unanswered.push(next_asked(&listener).await);
        }
        let again = sessions.clone();
        tasks.spawn(async move { again.check(Arc::downgrade(&is_in)).await });
        loop {
            let asked = next_asked(&listener).await;
            if asked.0 == "is-in" {
                break;
            }
            unanswered.push(asked);
            assert!(unanswered.len() < MAX_CALLS, "they have all the turns");
        }
    }
}
