//! Rate limits: token buckets for users and tenants, of this node alone and in memory only.

use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use governor::clock::{Clock, MonotonicClock};
use governor::middleware::NoOpMiddleware;
use governor::state::keyed::DashMapStateStore;
use governor::{Quota, RateLimiter};

use crate::auth::Principal;
use crate::protocol::command::MAX_FRAME;
use crate::protocol::error::{Code, Error};

/// A full bucket holds what the rate brings in so many seconds.
const BURST_SECONDS: u32 = 5;
/// What a tenant's bucket of bytes holds at least: the largest publish with what an event adds to it, so that a small rate
/// delays such a publish but never makes it impossible.
const LEAST_BURST_BYTES: u64 = MAX_FRAME as u64 + (16 << 10);
/// The limiter counts whole nanoseconds for each unit: with at most this many units a second the rate is exact to 1%. For
/// higher rates one unit stands for several bytes.
const MOST_UNITS: u64 = 10_000_000;
/// How often full buckets are forgotten.
const FORGET_EVERY: Duration = Duration::from_secs(60);

/// What is allowed each second; 0 is no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Rates {
    /// Commands of one user.
    pub user_commands: u32,
    /// Commands of one user who is an agent: has that scope.
    pub agent_commands: u32,
    /// Commands of all users of one tenant.
    pub tenant_commands: u32,
    /// Bytes that one tenant appends.
    pub tenant_bytes: u64,
}

/// The buckets of all users and tenants that were active lately. A limit that is off has no buckets and costs nothing.
pub struct RateLimits<C: Clock = MonotonicClock> {
    users: Option<Buckets<C>>,
    agents: Option<Buckets<C>>,
    tenants: Option<Buckets<C>>,
    bytes: Option<Buckets<C>>,
}

type Limiter<C> = RateLimiter<Arc<str>, DashMapStateStore<Arc<str>>, C, NoOpMiddleware<<C as Clock>::Instant>>;

/// One limit, with a bucket for each key.
struct Buckets<C: Clock> {
    limiter: Limiter<C>,
    burst: NonZeroU32,
    /// How many bytes or commands one unit of the buckets stands for.
    unit: u64,
    /// The text of a refusal.
    limit: String,
}

impl RateLimits {
    pub fn new(rates: Rates) -> RateLimits {
        RateLimits::with_clock(rates, &MonotonicClock)
    }

    /// Forgets users and tenants whose bucket is full again; runs for as long as the server does.
    pub async fn upkeep(self: Arc<RateLimits>) {
        let mut every = tokio::time::interval(FORGET_EVERY);
        loop {
            every.tick().await;
            self.forget();
        }
    }
}

impl<C: Clock + Clone> RateLimits<C> {
    fn with_clock(rates: Rates, clock: &C) -> RateLimits<C> {
        let Rates { user_commands, agent_commands, tenant_commands, tenant_bytes } = rates;
        let of = |rate: u64, least, what: &str| Buckets::new(rate, least, what, clock);
        RateLimits {
            users: of(user_commands.into(), 1, "the user's limit is {} commands a second"),
            agents: of(agent_commands.into(), 1, "the agent's limit is {} commands a second"),
            tenants: of(tenant_commands.into(), 1, "the tenant's limit is {} commands a second"),
            bytes: of(tenant_bytes, LEAST_BURST_BYTES, "the tenant's limit is {} bytes appended a second"),
        }
    }
}

impl<C: Clock> RateLimits<C> {
    /// Counts one command of the user's, and of its tenant's.
    pub fn command(&self, who: &Principal) -> Result<(), Error> {
        self.take_commands(who, |_| 1)
    }

    /// Counts what a command costs beyond one. With the command itself it is no more than a full bucket holds, so that it
    /// passes sometime.
    pub fn more_commands(&self, who: &Principal, commands: usize) -> Result<(), Error> {
        self.take_commands(who, |buckets| commands.min(buckets.burst.get() as usize - 1))
    }

    fn take_commands(&self, who: &Principal, commands: impl Fn(&Buckets<C>) -> usize) -> Result<(), Error> {
        // The user first: a user over the own limit uses up nothing of the tenant's.
        let users = if who.scopes.agent { &self.agents } else { &self.users };
        if let Some(users) = users {
            users.take(&who.key, commands(users) as u64)?;
        }
        if let Some(tenants) = &self.tenants {
            tenants.take(&who.tenant, commands(tenants) as u64)?;
        }
        Ok(())
    }

    /// Counts bytes that the tenant is about to append.
    pub fn append(&self, tenant: &Arc<str>, bytes: usize) -> Result<(), Error> {
        match &self.bytes {
            Some(tenants) => tenants.take(tenant, bytes as u64),
            None => Ok(()),
        }
    }

    /// Drops full buckets: a new one is full as well.
    fn forget(&self) {
        for buckets in [&self.users, &self.agents, &self.tenants, &self.bytes].into_iter().flatten() {
            buckets.limiter.retain_recent();
            buckets.limiter.shrink_to_fit();
        }
    }
}

impl<C: Clock + Clone> Buckets<C> {
    /// `rate` a second, with `least` as the smallest burst; `limit` is the text of a refusal, with `{}` for the rate. None
    /// if there is no limit.
    fn new(rate: u64, least: u64, limit: &str, clock: &C) -> Option<Buckets<C>> {
        let unit = rate.div_ceil(MOST_UNITS);
        let units = |amount: u64| NonZeroU32::new(u32::try_from(amount.checked_div(unit)?).unwrap_or(u32::MAX));
        let burst = units(rate.saturating_mul(BURST_SECONDS.into()).max(least))?;
        let quota = Quota::per_second(units(rate)?).allow_burst(burst);
        let limiter = Limiter::dashmap_with_clock(quota, clock.clone());
        Some(Buckets { limiter, burst, unit, limit: limit.replace("{}", &rate.to_string()) })
    }
}

impl<C: Clock> Buckets<C> {
    fn take(&self, key: &Arc<str>, amount: u64) -> Result<(), Error> {
        let units = u32::try_from(amount.div_ceil(self.unit)).unwrap_or(u32::MAX);
        let Some(units) = NonZeroU32::new(units) else {
            return Ok(());
        };
        // What is larger than the bucket costs a full bucket: it waits longest, but not for ever.
        match self.limiter.check_key_n(key, units.min(self.burst)) {
            // The outer error would say that it is larger than the bucket, which `min` rules out.
            Ok(Ok(())) | Err(_) => Ok(()),
            Ok(Err(refused)) => {
                let wait = refused.wait_time_from(self.limiter.clock().now());
                Err(self.refusal(wait))
            }
        }
    }

    #[cold]
    fn refusal(&self, wait: Duration) -> Error {
        // Rounded up: a client that comes back after this time must be let through.
        let ms = u64::try_from(wait.as_nanos().div_ceil(1_000_000)).unwrap_or(u64::MAX);
        Error::new(Code::RateLimited, self.limit.clone()).retry_after(ms.max(1))
    }
}

#[cfg(test)]
mod tests {
    use governor::clock::FakeRelativeClock;

    use super::*;
    use crate::auth::Scopes;

    fn limits(rates: Rates) -> (RateLimits<FakeRelativeClock>, FakeRelativeClock) {
        let clock = FakeRelativeClock::default();
        (RateLimits::with_clock(rates, &clock), clock)
    }

    fn user(tenant: &str, user: &str) -> Principal {
        Principal::new(tenant, user, Scopes::default(), u64::MAX)
    }

    fn per_user(user_commands: u32) -> Rates {
        Rates { user_commands, ..Rates::default() }
    }

    fn bytes(tenant_bytes: u64) -> Rates {
        Rates { tenant_bytes, ..Rates::default() }
    }

    /// How many commands pass in a row, and the refusal of the next.
    fn drain(limits: &RateLimits<FakeRelativeClock>, who: &Principal) -> (u32, Error) {
        let mut passed = 0;
        loop {
            match limits.command(who) {
                Ok(()) => passed += 1,
                Err(refused) => return (passed, refused),
            }
        }
    }

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn five_seconds_worth_at_once_then_a_refusal_that_says_when_to_come_back() {
        let (limits, clock) = limits(per_user(100));
        let ada = user("acme", "ada");
        let (passed, refused) = drain(&limits, &ada);
        assert_eq!((passed, refused.code, refused.retry_after_ms), (500, Code::RateLimited, Some(10)));
        assert!(refused.message.contains("the user's limit is 100 commands"), "{refused}");
        clock.advance(9 * MS);
        assert_eq!(limits.command(&ada).unwrap_err().retry_after_ms, Some(1), "a refusal does not cost anything");
        clock.advance(MS);
        assert_eq!(drain(&limits, &ada).0, 1);
        clock.advance(Duration::from_secs(1));
        assert_eq!(drain(&limits, &ada).0, 100);
        clock.advance(Duration::from_secs(3600));
        assert_eq!(drain(&limits, &ada).0, 500, "a bucket does not hold more");
    }

    #[test]
    fn a_wait_is_never_rounded_down_to_nothing() {
        let (limits, _clock) = limits(per_user(20_000));
        let ada = user("acme", "ada");
        assert_eq!(drain(&limits, &ada).1.retry_after_ms, Some(1));
    }

    #[test]
    fn an_agent_has_a_limit_of_its_own() {
        let (limits, _clock) = limits(Rates { user_commands: 1, agent_commands: 100, ..Rates::default() });
        let scout = Principal::new("acme", "scout", Scopes::parse(Some("agent")), u64::MAX);
        let (passed, refused) = drain(&limits, &scout);
        assert_eq!((passed, refused.message.contains("the agent's limit is 100")), (500, true), "{refused}");
        assert_eq!(drain(&limits, &user("acme", "scout")).0, 5, "with another token the same user is none");
    }

    #[test]
    fn users_do_not_share_a_bucket_not_even_of_one_name_in_two_tenants() {
        let (limits, _clock) = limits(per_user(10));
        for who in [user("acme", "ada"), user("acme", "ben"), user("other", "ada")] {
            assert_eq!(drain(&limits, &who).0, 50, "{}", who.key);
        }
        assert!(limits.command(&user("acme", "ada")).is_err(), "a new session does not bring a new bucket");
    }

    #[test]
    fn a_tenant_s_users_share_its_bucket_and_other_tenants_do_not() {
        let (limits, _clock) = limits(Rates { tenant_commands: 10, ..Rates::default() });
        let (ada, ben) = (user("acme", "ada"), user("acme", "ben"));
        for _ in 0..25 {
            limits.command(&ada).unwrap();
            limits.command(&ben).unwrap();
        }
        let refused = limits.command(&ben).unwrap_err();
        assert!(refused.message.contains("the tenant's limit is 10 commands"), "{refused}");
        assert_eq!(drain(&limits, &user("other", "ada")).0, 50);
    }

    #[test]
    fn a_user_over_the_own_limit_uses_up_nothing_of_the_tenant_s() {
        let (limits, _clock) = limits(Rates { user_commands: 10, tenant_commands: 20, ..Rates::default() });
        let (ada, ben) = (user("acme", "ada"), user("acme", "ben"));
        assert_eq!(drain(&limits, &ada).0, 50);
        for _ in 0..1_000 {
            limits.command(&ada).unwrap_err();
        }
        assert_eq!(drain(&limits, &ben).0, 50, "the other half is still there");
    }

    #[test]
    fn bytes_are_counted_for_each_tenant() {
        let (limits, clock) = limits(bytes(1_000_000));
        let (acme, other) = (Arc::from("acme"), Arc::from("other"));
        for _ in 0..50 {
            limits.append(&acme, 100_000).unwrap();
        }
        let refused = limits.append(&acme, 100_000).unwrap_err();
        assert_eq!((refused.code, refused.retry_after_ms), (Code::RateLimited, Some(100)));
        assert!(refused.message.contains("the tenant's limit is 1000000 bytes"), "{refused}");
        limits.append(&other, 100_000).unwrap();
        clock.advance(50 * MS);
        assert_eq!(limits.append(&acme, 100_000).unwrap_err().retry_after_ms, Some(50));
        limits.append(&acme, 50_000).unwrap();
    }

    #[test]
    fn the_largest_publish_fits_a_small_rate_and_what_is_larger_than_a_bucket_waits_for_a_full_one() {
        let (limits, clock) = limits(bytes(1_000));
        let acme = Arc::from("acme");
        limits.append(&acme, MAX_FRAME).unwrap();
        clock.advance(Duration::from_secs(24 * 3600));
        limits.append(&acme, usize::MAX).unwrap();
        let wait = limits.append(&acme, usize::MAX).unwrap_err().retry_after_ms.unwrap();
        assert_eq!(wait, LEAST_BURST_BYTES, "a byte a millisecond");
        clock.advance(Duration::from_millis(wait - 1));
        limits.append(&acme, usize::MAX).unwrap_err();
        clock.advance(MS);
        limits.append(&acme, usize::MAX).unwrap();
    }

    #[test]
    fn rates_beyond_what_a_bucket_counts_singly_hold_to_one_in_a_hundred() {
        for rate in [700_000_000, 5_000_000_000, 123_456_789_012u64] {
            let (limits, clock) = limits(bytes(rate));
            let acme = Arc::from("acme");
            let seconds = |seconds: u64| {
                clock.advance(Duration::from_secs(seconds));
                let mut passed = 0u64;
                while limits.append(&acme, 1_000_000).is_ok() {
                    passed += 1_000_000;
                }
                passed as f64 / rate as f64
            };
            assert!((seconds(0) - 5.0).abs() < 0.05, "{rate}");
            assert!((seconds(1) - 1.0).abs() < 0.01, "{rate}");
        }
    }

    #[test]
    fn nothing_is_counted_without_a_limit_and_the_greatest_is_one() {
        let (none, _clock) = limits(Rates::default());
        let ada = user("acme", "ada");
        for _ in 0..100_000 {
            none.command(&ada).unwrap();
            none.append(&ada.tenant, usize::MAX).unwrap();
        }
        assert!(none.users.is_none() && none.tenants.is_none() && none.bytes.is_none());
        let most = Rates {
            user_commands: u32::MAX,
            agent_commands: u32::MAX,
            tenant_commands: u32::MAX,
            tenant_bytes: u64::MAX,
        };
        let (most, _clock) = limits(most);
        most.command(&ada).unwrap();
        most.append(&ada.tenant, usize::MAX).unwrap();
        most.append(&ada.tenant, 0).unwrap();
    }

    #[test]
    fn full_buckets_are_forgotten_and_others_stay() {
        let (limits, clock) = limits(Rates { user_commands: 1, tenant_commands: 1_000, ..Rates::default() });
        let (ada, ben) = (user("acme", "ada"), user("acme", "ben"));
        drain(&limits, &ada);
        clock.advance(Duration::from_secs(4));
        limits.command(&ben).unwrap();
        clock.advance(Duration::from_secs(2));
        limits.forget();
        let held = |buckets: &Option<Buckets<FakeRelativeClock>>| buckets.as_ref().unwrap().limiter.len();
        assert_eq!((held(&limits.users), held(&limits.tenants)), (0, 0));
        drain(&limits, &ada);
        clock.advance(Duration::from_secs(1));
        limits.forget();
        assert_eq!(held(&limits.users), 1, "what was used is not given back");
        assert_eq!(drain(&limits, &ada).0, 1);
    }
}
