//! The instances of a service, and whose turn it is. Each has a circuit breaker of its own: one that keeps failing is left out
//! for a while, and the others are called. Pure, but for the clients that hold connections.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use reqwest::{Client, Url};

use super::breaker::{Breaker, Permit, State};
use super::discovery::Place;

struct Instance {
    place: Place,
    /// The service's URL, with this instance's host and port.
    url: Url,
    /// Connects to this address and no other.
    client: Client,
    breaker: Breaker,
    last_error: Option<String>,
    /// Which of the service's calls was its newest.
    called: u64,
}

/// One that may be called now.
pub struct Chosen {
    pub address: SocketAddr,
    pub url: Url,
    pub client: Client,
    pub permit: Permit,
}

/// How an instance is doing.
#[derive(Debug, Clone)]
pub struct InstanceStatus {
    pub address: SocketAddr,
    pub breaker: &'static str,
    pub last_error: Option<String>,
}

#[derive(Default)]
pub struct Instances {
    all: Vec<Instance>,
    /// Until when it is known where they are.
    known_until: Option<Instant>,
    /// Calls so far.
    calls: u64,
}

impl Instances {
    pub fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    pub fn is_known(&self, now: Instant) -> bool {
        self.known_until.is_some_and(|until| now < until)
    }

    /// They could not be looked up: those that are known stay.
    pub fn keep(&mut self, until: Instant) {
        self.known_until = Some(until);
    }

    /// They are at these places now. What is known of one that was there before stays. An error if none of them can be called.
    pub fn replace(
        &mut self,
        places: Vec<Place>,
        until: Instant,
        connect: impl Fn(&Place) -> Result<(Url, Client), String>,
    ) -> Result<(), String> {
        let (mut new, mut wrong) = (Vec::with_capacity(places.len()), None);
        for place in places {
            let is_same = |old: &Instance| (old.place.address, &old.place.host) == (place.address, &place.host);
            if let Some(at) = self.all.iter().position(is_same) {
                new.push(Instance { place, ..self.all.swap_remove(at) });
                continue;
            }
            match connect(&place) {
                Ok((url, client)) => {
                    let breaker = Breaker::default();
                    new.push(Instance { place, url, client, breaker, last_error: None, called: 0 });
                }
                Err(why) => wrong = Some(why),
            }
        }
        match wrong {
            Some(why) if new.is_empty() => Err(why),
            _ => {
                (self.all, self.known_until) = (new, Some(until));
                Ok(())
            }
        }
    }

    /// The one whose turn it is among those that may be called: one that was not tried yet, of the lowest priority, called least
    /// recently. If none may be, when to ask again.
    pub fn choose(&mut self, tried: &[SocketAddr], now: Instant) -> Result<Chosen, Duration> {
        let pause = self.shortest_pause(now);
        let may_be_called = self.all.iter_mut().filter(|instance| instance.breaker.pause(now).is_none());
        let next = may_be_called.min_by_key(|instance| {
            let place = &instance.place;
            (tried.contains(&place.address), place.priority, instance.called)
        });
        let Some(next) = next else { return Err(pause) };
        let permit = next.breaker.admit(now)?;
        self.calls += 1;
        next.called = self.calls;
        Ok(Chosen { address: next.place.address, url: next.url.clone(), client: next.client.clone(), permit })
    }

    /// Whether one may be called that was not tried.
    pub fn has_others(&self, tried: &[SocketAddr], now: Instant) -> bool {
        let is_other = |it: &Instance| !tried.contains(&it.place.address) && it.breaker.pause(now).is_none();
        self.all.iter().any(is_other)
    }

    /// When to ask again, if none may be called now. Where it is to be looked up, there may be others.
    pub fn pause(&self, now: Instant) -> Option<Duration> {
        let may = self.is_empty() || !self.is_known(now) || self.has_others(&[], now);
        (!may).then(|| self.shortest_pause(now))
    }

    fn shortest_pause(&self, now: Instant) -> Duration {
        let pauses = self.all.iter().filter_map(|instance| instance.breaker.pause(now));
        pauses.min().unwrap_or(Duration::from_secs(1))
    }

    fn at(&mut self, address: SocketAddr) -> Option<&mut Instance> {
        self.all.iter_mut().find(|instance| instance.place.address == address)
    }

    pub fn succeeded(&mut self, address: SocketAddr, permit: Permit) {
        if let Some(instance) = self.at(address) {
            instance.breaker.succeeded(permit);
        }
    }

    pub fn failed(&mut self, address: SocketAddr, permit: Permit, why: &str, now: Instant) {
        if let Some(instance) = self.at(address) {
            instance.breaker.failed(permit, now);
            instance.last_error = Some(why.to_owned());
        }
    }

    pub fn abandoned(&mut self, address: SocketAddr, permit: Permit) {
        if let Some(instance) = self.at(address) {
            instance.breaker.abandoned(permit);
        }
    }

    /// How one of them is, unless it is gone.
    pub fn state_of(&mut self, address: SocketAddr, now: Instant) -> Option<State> {
        self.at(address).map(|instance| instance.breaker.state(now))
    }

    /// How the service is as a whole: as the best of them.
    pub fn state(&self, now: Instant) -> State {
        let is = |state| self.all.iter().any(|instance| instance.breaker.state(now) == state);
        if self.is_empty() || is(State::Closed) {
            State::Closed
        } else if is(State::HalfOpen) {
            State::HalfOpen
        } else {
            State::Open
        }
    }

    pub fn status(&self, now: Instant) -> Vec<InstanceStatus> {
        let status = |instance: &Instance| InstanceStatus {
            address: instance.place.address,
            breaker: instance.breaker.state(now).as_str(),
            last_error: instance.last_error.clone(),
        };
        self.all.iter().map(status).collect()
    }

    /// How many there are, and how many of them are left out for now.
    pub fn counts(&self, now: Instant) -> (usize, usize) {
        let out = self.all.iter().filter(|instance| instance.breaker.state(now) != State::Closed).count();
        (self.all.len(), out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: Duration = Duration::from_secs(1);

    fn place(n: u8, priority: u16) -> Place {
        Place { address: ([10, 0, 0, n], 80).into(), host: "auth".to_owned(), priority }
    }

    fn with(places: &[Place], now: Instant) -> Instances {
        let mut instances = Instances::default();
        replace(&mut instances, places, now);
        instances
    }

    fn replace(instances: &mut Instances, places: &[Place], now: Instant) {
        let connect = |_: &Place| Ok(("http://auth/".parse().expect("a URL"), Client::new()));
        instances.replace(places.to_vec(), now + S, connect).expect("clients are made");
    }

    /// Calls one, which works unless it is among those; gives the end of its address.
    fn call(instances: &mut Instances, now: Instant, fail: &[u8]) -> u8 {
        let Ok(chosen) = instances.choose(&[], now) else { panic!("none may be called") };
        let SocketAddr::V4(address) = chosen.address else { panic!("IPv4") };
        let called = address.ip().octets()[3];
        match fail.contains(&called) {
            false => instances.succeeded(chosen.address, chosen.permit),
            true => instances.failed(chosen.address, chosen.permit, "it failed", now),
        }
        called
    }

    #[test]
    fn those_that_work_have_turns_and_one_that_fails_is_left_out_until_it_works_again() {
        let now = Instant::now();
        let mut instances = with(&[place(1, 0), place(2, 0), place(3, 7)], now);
        let called: Vec<u8> = (0..6).map(|_| call(&mut instances, now, &[])).collect();
        assert_eq!(called, [1, 2, 1, 2, 1, 2]);

        assert!((0..100).all(|_| call(&mut instances, now, &[1]) < 3), "the third is for when they are gone");
        assert_eq!((instances.counts(now), instances.state(now)), ((3, 1), State::Closed));
        assert!((0..10).all(|_| call(&mut instances, now, &[]) == 2), "the first is left out");
        let later: Vec<u8> = (0..6).map(|_| call(&mut instances, now + S, &[])).collect();
        assert_eq!(later, [1, 2, 1, 2, 1, 2], "its trial worked");
    }

    #[test]
    fn others_come_when_those_before_them_were_tried_or_are_left_out() {
        let now = Instant::now();
        let mut instances = with(&[place(1, 10), place(2, 20)], now);
        assert!((0..5).all(|_| call(&mut instances, now, &[]) == 1), "the lowest priority");
        let tried = [place(1, 10).address];
        assert!(instances.has_others(&tried, now));
        assert!(instances.choose(&tried, now).is_ok_and(|chosen| chosen.address == place(2, 20).address));

        while call(&mut instances, now, &[1]) == 1 {}
        assert_eq!(instances.state(now), State::Closed);
        while instances.choose(&[], now).is_ok() {
            call(&mut instances, now, &[1, 2]);
        }
        assert!(!instances.has_others(&[], now));
        assert_eq!((instances.state(now), instances.pause(now)), (State::Open, Some(S)));
        assert_eq!((instances.state(now + S), instances.pause(now + S)), (State::HalfOpen, None));
    }

    #[test]
    fn what_is_known_of_one_stays_while_it_is_there() {
        let now = Instant::now();
        let mut instances = with(&[place(1, 0)], now);
        assert!((0..5).all(|_| call(&mut instances, now, &[1]) == 1));
        assert!(instances.is_known(now) && !instances.is_known(now + S));
        replace(&mut instances, &[place(2, 0), place(1, 5)], now);
        assert_eq!(instances.counts(now), (2, 1));
        replace(&mut instances, &[place(2, 0)], now);
        assert_eq!(instances.counts(now), (1, 0));
        assert_eq!(instances.status(now)[0].address, place(2, 0).address);
    }

    #[test]
    fn a_place_that_cannot_be_called_is_passed_over_and_nothing_is_lost_if_all_are_such() {
        let now = Instant::now();
        let mut instances = with(&[place(1, 0)], now);
        let connect = |place: &Place| match place.address == self::place(2, 0).address {
            true => Err("no host".to_owned()),
            false => Ok(("http://auth/".parse().expect("a URL"), Client::new())),
        };
        assert_eq!(instances.replace(vec![place(2, 0)], now, connect), Err("no host".to_owned()));
        assert_eq!(instances.status(now)[0].address, place(1, 0).address);
        assert_eq!(instances.replace(vec![place(2, 0), place(3, 0)], now, connect), Ok(()));
        assert_eq!((instances.counts(now), instances.status(now)[0].address), ((1, 0), place(3, 0).address));
    }
}
