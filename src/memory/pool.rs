//! Memory that comes and goes: what is held is charged to a pool, and given back when the [`Charge`] is dropped.
//!
//! Invariants:
//! - what is charged never exceeds the pool's limit;
//! - one user holds at most a quarter of a pool (or [`LARGEST`], so that anything can be served at all), one tenant at most
//!   three quarters: whoever holds much, or gives nothing back, leaves room for others;
//! - the last eighth is for small charges ([`SMALL`]), so that they are served beside large ones;
//! - who does not fit waits in the order of coming, but nobody waits for those who wait for their own user's or tenant's
//!   memory; and nobody waits for ever.
//!
//! A holder that waits for a second charge could wait for another one that does the same. So whoever must have the second
//! one to give back the first asks for all at once, or takes no for an answer ([`Pool::try_charge`], [`Charge::grow_to`]).

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::oneshot;

/// A user may have charged so much, however small the pool; nothing asks for more at once.
pub const LARGEST: usize = 24 << 20;
/// What is no larger than this may use the last eighth of a pool.
const SMALL: usize = 256 << 10;
/// Charges of one user that may wait.
const WAITING_OF_USER: usize = 256;
/// Charges that may wait.
const WAITING: usize = 100_000;
/// How many waiting ones are looked at when something is given back; the others are when something is the next time.
const LOOKED_AT: usize = 256;

/// Why something was not charged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// There is no room now.
    Full,
    /// There never will be.
    TooLarge,
}

/// What a pool holds now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    pub used: usize,
    pub limit: usize,
    pub waiting: usize,
    /// Refused since the start.
    pub refused: u64,
}

#[derive(Clone)]
pub struct Pool(Arc<Shared>);

/// Memory that is charged to a pool until this is dropped.
pub struct Charge {
    pool: Arc<Shared>,
    /// `tenant/user`.
    user: Arc<str>,
    bytes: usize,
}

/// Bytes that hold what is charged for them: it is given back when the last of them has left, however slowly they are taken.
pub fn charged(bytes: Bytes, charge: impl Send + 'static) -> Bytes {
    struct Held<C>(Bytes, C);
    impl<C> AsRef<[u8]> for Held<C> {
        fn as_ref(&self) -> &[u8] {
            &self.0
        }
    }
    Bytes::from_owner(Held(bytes, charge))
}

struct Shared {
    limit: usize,
    of_user: usize,
    of_tenant: usize,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    used: usize,
    users: HashMap<Arc<str>, User>,
    tenants: HashMap<Box<str>, usize>,
    waiting: VecDeque<WaitingCharge>,
    next: u64,
    refused: u64,
}

#[derive(Default)]
struct User {
    bytes: usize,
    waiting: usize,
}

struct WaitingCharge {
    number: u64,
    user: Arc<str>,
    bytes: usize,
    granted: oneshot::Sender<Charge>,
}

/// Charges that were granted, to be passed on once the lock is released: one whose asker is gone is given back at once.
type Granted = Vec<(oneshot::Sender<Charge>, Charge)>;

impl Pool {
    pub fn new(limit: usize) -> Pool {
        Pool::shared(limit, (limit / 4).max(LARGEST))
    }

    /// One in which a user has another share than a quarter.
    pub fn shared(limit: usize, of_user: usize) -> Pool {
        let of_tenant = limit - limit / 4;
        Pool(Arc::new(Shared { limit, of_user: of_user.min(of_tenant), of_tenant, state: Mutex::default() }))
    }

    /// Charges if there is room now, and nobody waits who could have it. A no does not count as refused: the caller may wait.
    pub fn try_charge(&self, user: &Arc<str>, bytes: usize) -> Result<Charge, Refused> {
        let mut state = self.0.lock();
        self.0.try_charge(&mut state, user, bytes)
    }

    /// Charges as soon as there is room, within this time.
    pub async fn charge(&self, user: &Arc<str>, bytes: usize, within: Duration) -> Result<Charge, Refused> {
        let (place, granted) = match self.0.charge_or_wait(user, bytes)? {
            Asked::Charged(charge) => return Ok(charge),
            Asked::Waits(place, granted) => (place, granted),
        };
        let charge = tokio::time::timeout(within, granted).await;
        // Granted in the last moment, it is in the channel, and goes back with that.
        drop(place);
        match charge {
            Ok(Ok(charge)) => Ok(charge),
            Ok(Err(_)) | Err(_) => {
                self.0.lock().refused += 1;
                Err(Refused::Full)
            }
        }
    }

    pub fn usage(&self) -> Usage {
        let state = self.0.lock();
        Usage { used: state.used, limit: self.0.limit, waiting: state.waiting.len(), refused: state.refused }
    }
}

enum Asked {
    Charged(Charge),
    Waits(PlaceInLine, oneshot::Receiver<Charge>),
}

/// A place among those who wait, left when this is dropped.
struct PlaceInLine {
    pool: Arc<Shared>,
    number: u64,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing below can panic half way through a change.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn try_charge(self: &Arc<Shared>, state: &mut State, user: &Arc<str>, bytes: usize) -> Result<Charge, Refused> {
        if bytes > self.of_user || self.room_for(bytes) < bytes {
            return Err(Refused::TooLarge);
        }
        // A small one may pass large ones, which wait for room that it may use and they may not.
        let is_first = |it: &WaitingCharge| (bytes > SMALL || it.bytes <= SMALL) && self.fits_owner(state, it);
        let overtakes = state.waiting.iter().take(LOOKED_AT).any(is_first);
        if overtakes || !self.fits_owner_of(state, user, bytes) || state.used + bytes > self.room_for(bytes) {
            return Err(Refused::Full);
        }
        Ok(self.take(state, user, bytes))
    }

    fn charge_or_wait(self: &Arc<Shared>, user: &Arc<str>, bytes: usize) -> Result<Asked, Refused> {
        let state = &mut *self.lock();
        match self.try_charge(state, user, bytes) {
            Ok(charge) => return Ok(Asked::Charged(charge)),
            Err(Refused::TooLarge) => {
                state.refused += 1;
                return Err(Refused::TooLarge);
            }
            Err(Refused::Full) => {}
        }
        let waiting = state.users.get(user).map_or(0, |it| it.waiting);
        if waiting >= WAITING_OF_USER || state.waiting.len() >= WAITING {
            state.refused += 1;
            return Err(Refused::Full);
        }

        let (granted, receiver) = oneshot::channel();
        let number = state.next;
        state.next += 1;
        state.users.entry(user.clone()).or_default().waiting += 1;
        state.waiting.push_back(WaitingCharge { number, user: user.clone(), bytes, granted });
        Ok(Asked::Waits(PlaceInLine { pool: self.clone(), number }, receiver))
    }

    /// How full the pool may be with a charge of this size.
    fn room_for(&self, bytes: usize) -> usize {
        if bytes <= SMALL { self.limit } else { self.limit - self.limit / 8 }
    }

    fn fits_owner(&self, state: &State, waiting: &WaitingCharge) -> bool {
        self.fits_owner_of(state, &waiting.user, waiting.bytes)
    }

    /// Whether the user and its tenant may have so much more.
    fn fits_owner_of(&self, state: &State, user: &str, bytes: usize) -> bool {
        let of_user = state.users.get(user).map_or(0, |it| it.bytes);
        let of_tenant = state.tenants.get(tenant_of(user)).copied().unwrap_or(0);
        of_user + bytes <= self.of_user && of_tenant + bytes <= self.of_tenant
    }

    fn take(self: &Arc<Shared>, state: &mut State, user: &Arc<str>, bytes: usize) -> Charge {
        state.add(user, bytes);
        Charge { pool: self.clone(), user: user.clone(), bytes }
    }

    /// Something was given back: whoever waits and fits now has it. Nothing goes before one that waits for room, but small
    /// ones before large ones.
    fn grant(self: &Arc<Shared>, state: &mut State) -> Granted {
        let mut granted = Vec::new();
        let (mut at, mut large_wait) = (0, false);
        for _ in 0..LOOKED_AT {
            let Some(next) = state.waiting.get(at) else { break };
            if !self.fits_owner(state, next) {
                at += 1;
                continue;
            }
            let is_small = next.bytes <= SMALL;
            let has_room = state.used + next.bytes <= self.room_for(next.bytes);
            if is_small && !has_room {
                break;
            }
            if !is_small && (large_wait || !has_room) {
                large_wait = true;
                at += 1;
                continue;
            }
            let Some(next) = state.remove(at) else { break };
            let charge = self.take(state, &next.user, next.bytes);
            granted.push((next.granted, charge));
        }
        granted
    }

    fn give_back(self: &Arc<Shared>, user: &Arc<str>, bytes: usize) {
        let mut state = self.lock();
        state.subtract(user, bytes);
        let granted = if state.waiting.is_empty() { Vec::new() } else { self.grant(&mut state) };
        drop(state);
        for (sender, charge) in granted {
            // Whoever is gone gives it back by not taking it.
            drop(sender.send(charge));
        }
    }
}

impl State {
    fn add(&mut self, user: &Arc<str>, bytes: usize) {
        self.used += bytes;
        self.users.entry(user.clone()).or_default().bytes += bytes;
        match self.tenants.get_mut(tenant_of(user)) {
            Some(of_tenant) => *of_tenant += bytes,
            None => drop(self.tenants.insert(tenant_of(user).into(), bytes)),
        }
    }

    fn subtract(&mut self, user: &str, bytes: usize) {
        self.used -= bytes;
        if let Some(of_user) = self.users.get_mut(user) {
            of_user.bytes -= bytes;
        }
        self.forget(user);
        let tenant = tenant_of(user);
        if let Some(of_tenant) = self.tenants.get_mut(tenant) {
            *of_tenant -= bytes;
            if *of_tenant == 0 {
                self.tenants.remove(tenant);
            }
        }
    }

    fn remove(&mut self, at: usize) -> Option<WaitingCharge> {
        let removed = self.waiting.remove(at)?;
        if let Some(user) = self.users.get_mut(&removed.user) {
            user.waiting -= 1;
        }
        self.forget(&removed.user);
        Some(removed)
    }

    fn forget(&mut self, user: &str) {
        if self.users.get(user).is_some_and(|it| it.bytes == 0 && it.waiting == 0) {
            self.users.remove(user);
        }
    }
}

/// A user is `tenant/user`.
fn tenant_of(user: &str) -> &str {
    user.split_once('/').map_or(user, |(tenant, _)| tenant)
}

impl Charge {
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Gives back what is beyond so many bytes.
    pub fn shrink_to(&mut self, bytes: usize) {
        let surplus = self.bytes.saturating_sub(bytes);
        if surplus > 0 {
            self.bytes = bytes;
            self.pool.give_back(&self.user, surplus);
        }
    }

    /// Charges more, if there is room now.
    pub fn grow_to(&mut self, bytes: usize) -> Result<(), Refused> {
        let more = bytes.saturating_sub(self.bytes);
        if more == 0 {
            return Ok(());
        }
        if bytes > self.pool.of_user {
            return Err(Refused::TooLarge);
        }
        let mut state = self.pool.lock();
        if !self.pool.fits_owner_of(&state, &self.user, more) || state.used + more > self.pool.room_for(bytes) {
            state.refused += 1;
            return Err(Refused::Full);
        }
        state.add(&self.user, more);
        self.bytes = bytes;
        Ok(())
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        if self.bytes > 0 {
            self.pool.give_back(&self.user, self.bytes);
        }
    }
}

impl Drop for PlaceInLine {
    fn drop(&mut self) {
        let mut state = self.pool.lock();
        // Numbers only grow along the queue.
        if let Ok(at) = state.waiting.binary_search_by_key(&self.number, |it| it.number) {
            drop(state.remove(at));
            // Whoever waited for this one may have room now.
            let granted = self.pool.grant(&mut state);
            drop(state);
            for (sender, charge) in granted {
                drop(sender.send(charge));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::task::{Context, Waker};

    use proptest::prelude::*;

    use super::*;

    const MIB: usize = 1 << 20;
    const SOON: Duration = Duration::from_secs(3_600);

    fn user(name: &str) -> Arc<str> {
        name.into()
    }

    #[test]
    fn what_is_charged_comes_back_when_it_is_dropped() {
        let pool = Pool::new(100 * MIB);
        let mut charge = pool.try_charge(&user("t/a"), 10 * MIB).expect("there is room");
        assert_eq!(pool.usage().used, 10 * MIB);
        charge.shrink_to(MIB);
        assert_eq!((charge.bytes(), pool.usage().used), (MIB, MIB));
        assert_eq!(charge.grow_to(2 * MIB), Ok(()));
        assert_eq!(pool.usage().used, 2 * MIB);
        drop(charge);
        assert_eq!(pool.usage().used, 0);
    }

    #[test]
    fn a_user_has_a_quarter_and_a_tenant_three_quarters() {
        let pool = Pool::new(400 * MIB);
        let hold = |name: &str, bytes| pool.try_charge(&user(name), bytes);
        let all = [hold("t/a", 100 * MIB), hold("t/b", 100 * MIB), hold("t/c", 100 * MIB)];
        assert!(all.iter().all(Result::is_ok));
        assert_eq!(hold("t/a", 1).err(), Some(Refused::Full));
        assert_eq!(hold("t/d", 1).err(), Some(Refused::Full));
        assert!(hold("u/a", 40 * MIB).is_ok());
        assert_eq!(hold("u/a", 101 * MIB).err(), Some(Refused::TooLarge), "it would never fit");
    }

    #[test]
    fn the_last_eighth_is_for_small_charges() {
        let pool = Pool::new(96 * MIB);
        let names = ["t/a", "t/b", "u/c", "u/d"].map(user);
        let _large: Vec<_> = names.iter().map(|name| pool.try_charge(name, 21 * MIB).expect("room")).collect();
        assert_eq!(pool.try_charge(&user("v/e"), MIB).err(), Some(Refused::Full));
        assert!(pool.try_charge(&user("v/e"), SMALL).is_ok());
    }

    #[test]
    fn even_the_smallest_pool_serves_the_largest_charge() {
        let smallest = super::super::Plan::of(super::super::MINIMUM);
        for limit in [smallest.requests, smallest.readers] {
            assert!(Pool::new(limit).try_charge(&user("t/a"), LARGEST).is_ok(), "{limit}");
        }
    }

    /// Asks, and polls once: the future of one that waits.
    macro_rules! ask {
        ($pool:expr, $user:expr, $bytes:expr) => {{
            let (pool, user) = ($pool.clone(), user($user));
            let mut asked = Box::pin(async move { pool.charge(&user, $bytes, SOON).await });
            assert!(asked.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
            asked
        }};
    }

    #[tokio::test]
    async fn who_waits_is_served_in_order_when_something_is_given_back() {
        let pool = Pool::new(96 * MIB);
        let held: Vec<_> = ["t/a", "u/b", "v/c", "w/d"].map(|it| pool.try_charge(&user(it), 20 * MIB)).into();
        let (first, mut second) = (ask!(pool, "x/e", 10 * MIB), ask!(pool, "y/f", MIB));
        assert_eq!(pool.usage().waiting, 2);
        assert_eq!(pool.try_charge(&user("z/g"), MIB).err(), Some(Refused::Full), "nobody overtakes");
        drop(held);
        assert_eq!(first.await.map(|charge| charge.bytes()), Ok(10 * MIB));
        let second = second.as_mut().await.expect("granted");
        assert_eq!((pool.usage().used, pool.usage().waiting), (second.bytes(), 0));
    }

    #[tokio::test]
    async fn nobody_waits_for_a_user_who_waits_for_its_own_memory() {
        let pool = Pool::new(400 * MIB);
        let held = pool.try_charge(&user("t/a"), 100 * MIB).expect("room");
        let own = ask!(pool, "t/a", MIB);
        let other = pool.charge(&user("t/b"), 50 * MIB, SOON).await.expect("at once");
        drop(held);
        assert_eq!((own.await.map(|it| it.bytes()), other.bytes()), (Ok(MIB), 50 * MIB));
    }

    #[tokio::test]
    async fn who_goes_away_while_it_waits_leaves_nothing_and_lets_others_pass() {
        let pool = Pool::new(96 * MIB);
        let _held: Vec<_> = ["t/a", "u/b", "v/c"].map(|it| pool.try_charge(&user(it), 24 * MIB)).into();
        let (gone, next) = (ask!(pool, "x/e", 20 * MIB), ask!(pool, "y/f", 5 * MIB));
        drop(gone);
        assert_eq!(next.await.map(|charge| charge.bytes()), Ok(5 * MIB));
        assert_eq!((pool.usage().waiting, pool.usage().used), (0, 72 * MIB));
    }

    #[tokio::test]
    async fn nobody_waits_for_ever() {
        let pool = Pool::new(96 * MIB);
        let _held = pool.try_charge(&user("t/a"), 24 * MIB).expect("room");
        let refused = pool.charge(&user("t/a"), MIB, Duration::from_millis(1)).await.err();
        assert_eq!(refused, Some(Refused::Full));
        assert_eq!((pool.usage().waiting, pool.usage().refused), (0, 1));
    }

    #[derive(Debug, Clone)]
    enum Act {
        Charge(usize, usize),
        Ask(usize, usize),
        Drop(usize),
        Leave(usize),
        Shrink(usize, usize),
        Grow(usize, usize),
    }

    fn acts() -> impl Strategy<Value = Vec<Act>> {
        let bytes = prop_oneof![1..SMALL, SMALL..LARGEST];
        let pick = 0..64_usize;
        let act = prop_oneof![
            (pick.clone(), bytes.clone()).prop_map(|(who, bytes)| Act::Charge(who, bytes)),
            (pick.clone(), bytes.clone()).prop_map(|(who, bytes)| Act::Ask(who, bytes)),
            pick.clone().prop_map(Act::Drop),
            pick.clone().prop_map(Act::Leave),
            (pick.clone(), bytes.clone()).prop_map(|(at, bytes)| Act::Shrink(at, bytes)),
            (pick, bytes).prop_map(|(at, bytes)| Act::Grow(at, bytes)),
        ];
        proptest::collection::vec(act, 1..80)
    }

    proptest! {
        #[test]
        fn whatever_is_asked_for_the_limits_hold_and_in_the_end_all_is_given_back(acts in acts()) {
            let pool = Pool::new(96 * MIB);
            let users: Vec<Arc<str>> = (0..12).map(|i| user(&format!("t{}/u{i}", i % 3))).collect();
            let (mut held, mut asked): (Vec<Charge>, Vec<_>) = Default::default();
            let mut cx = Context::from_waker(Waker::noop());
            let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
            let _entered = runtime.enter();
            for act in acts {
                match act {
                    Act::Charge(who, bytes) => held.extend(pool.try_charge(&users[who % 12], bytes)),
                    Act::Ask(who, bytes) => {
                        let (pool, user) = (pool.clone(), users[who % 12].clone());
                        asked.push(Box::pin(async move { pool.charge(&user, bytes, SOON).await }));
                    }
                    Act::Drop(at) if at < held.len() => drop(held.swap_remove(at)),
                    Act::Leave(at) if at < asked.len() => drop(asked.swap_remove(at)),
                    Act::Shrink(at, bytes) if at < held.len() => held[at].shrink_to(bytes),
                    Act::Grow(at, bytes) if at < held.len() => drop(held[at].grow_to(bytes)),
                    _ => {}
                }
                let mut still = Vec::new();
                for mut it in asked {
                    match it.as_mut().poll(&mut cx) {
                        std::task::Poll::Ready(charge) => held.extend(charge),
                        std::task::Poll::Pending => still.push(it),
                    }
                }
                asked = still;

                let usage = pool.usage();
                prop_assert_eq!(usage.used, held.iter().map(Charge::bytes).sum::<usize>());
                prop_assert!(usage.used <= usage.limit);
                prop_assert_eq!(usage.waiting, asked.len());
                for user in &users {
                    let of_user = held.iter().filter(|it| it.user == *user).map(Charge::bytes).sum::<usize>();
                    prop_assert!(of_user <= LARGEST);
                }
            }
            // With everything given back whoever waits is served, in the end.
            drop(held);
            while !asked.is_empty() {
                let before = asked.len();
                asked.retain_mut(|it| it.as_mut().poll(&mut cx).is_pending());
                prop_assert!(asked.len() < before);
            }
            let usage = pool.usage();
            prop_assert_eq!((usage.used, usage.waiting), (0, 0));
        }
    }
}
