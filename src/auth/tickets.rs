//! Tickets: how a browser, which cannot set headers on a WebSocket, gets in without a token in a URL. Good once, for 30 s.
//!
//! Kept in memory: a ticket is good on the node that gave it.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::Principal;
use crate::clock;
use crate::protocol::error::{Code, Error};

/// How long a ticket is good.
pub const LIFETIME: Duration = Duration::from_secs(30);
/// Tickets that may be open at once.
const MAX_OPEN: usize = 100_000;

#[derive(Default)]
pub struct Tickets {
    open: Mutex<HashMap<String, Open>>,
}

struct Open {
    who: Principal,
    until: Instant,
}

impl Tickets {
    /// A new ticket for a user.
    pub fn issue(&self, who: &Principal, now: Instant) -> Result<String, Error> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        // Only when it is full, so that giving one out costs the same however many there are.
        if open.len() >= MAX_OPEN {
            open.retain(|_, ticket| ticket.until > now);
        }
        if open.len() >= MAX_OPEN {
            return Err(Error::new(Code::QueueFull, "too many tickets are open").retry_after(1_000));
        }
        let ticket = format!("{}{}", clock::random_id().simple(), clock::random_id().simple());
        open.insert(ticket.clone(), Open { who: who.clone(), until: now + LIFETIME });
        Ok(ticket)
    }

    /// The user whose ticket this is; it is used up by that, whether it was still good or not.
    pub fn redeem(&self, ticket: &str, now: Instant) -> Result<Principal, Error> {
        let found = self.open.lock().unwrap_or_else(PoisonError::into_inner).remove(ticket);
        let good = found.filter(|ticket| ticket.until > now).map(|ticket| ticket.who);
        good.ok_or_else(|| {
            Error::new(Code::Unauthenticated, "the ticket is used, expired or none of ours").at("ticket")
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::auth::Scopes;

    #[test]
    fn a_ticket_is_good_once_and_for_30_seconds() {
        let (tickets, now) = (Tickets::default(), Instant::now());
        let ada = Principal::new("acme", "ada", Scopes::default(), 1);
        let ticket = tickets.issue(&ada, now).expect("there is room");
        assert_eq!(tickets.redeem(&ticket, now + LIFETIME - Duration::from_millis(1)), Ok(ada.clone()));
        assert!(tickets.redeem(&ticket, now).is_err(), "used");
        let ticket = tickets.issue(&ada, now).expect("there is room");
        assert!(tickets.redeem(&ticket, now + LIFETIME).is_err(), "expired");
        assert!(tickets.redeem(&ticket, now).is_err(), "and gone");
    }

    #[test]
    fn tickets_are_bounded_and_expired_ones_make_room() {
        let (tickets, now) = (Tickets::default(), Instant::now());
        let ada = Principal::new("acme", "ada", Scopes::default(), 1);
        for _ in 0..MAX_OPEN {
            tickets.issue(&ada, now).expect("there is room");
        }
        assert_eq!(tickets.issue(&ada, now).expect_err("full").code, Code::QueueFull);
        assert!(tickets.issue(&ada, now + LIFETIME).is_ok());
    }
}
