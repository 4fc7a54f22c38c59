//! Tickets: good once, on every node. Whose turn it is, the projector judges by the log; here is who asks it.

use std::sync::Arc;

use super::admit::Admission;
use super::submit::Submit;
use crate::auth::{Authenticator, Principal, Scopes};
use crate::clock;
use crate::log::Record;
use crate::projector::level::Level;
use crate::protocol::error::{Code, Error};
use crate::protocol::kinds::{TICKET_ISSUED, TICKET_USED};
use crate::protocol::records::{TicketIssuedRecord, TicketUsedRecord};
use crate::protocol::tickets::{LIFETIME, Ticket, owner};
use crate::store::Store;

pub struct Tickets {
    pub store: Arc<Store>,
    pub level: Arc<Level>,
    pub submit: Arc<Submit>,
    pub admission: Arc<Admission>,
    pub auth: Arc<Authenticator>,
}

impl Tickets {
    /// A new ticket for a user, and when it expires.
    pub async fn issue(&self, who: &Principal) -> Result<(String, String), Error> {
        if who.session.is_some() {
            // The connection that it is for would outlive the session's end.
            let why = "a ticket is asked for with a token; a session is shown itself, by header, cookie or connect";
            return Err(Error::new(Code::Forbidden, why).at("Authorization"));
        }
        let random = [(); 2].map(|()| clock::random_id().into_bytes());
        let ticket = Ticket::new(&owner(&who.tenant, &who.user), random);
        let now = clock::now_ms();
        let issued = TicketIssuedRecord {
            kind: TICKET_ISSUED.to_owned(),
            id: clock::event_id(),
            tenant: who.tenant.to_string(),
            user: who.user.to_string(),
            hash: hex(&ticket),
            scopes: who.scopes.to_string(),
            iat_ms: who.issued_at,
            exp: who.expires_at,
            at: clock::rfc3339(now),
            expires_at: clock::rfc3339(now + LIFETIME.as_millis() as u64),
        };

        let record = Record::from(&issued);
        self.admission.count_bytes(who, record.value.len())?;
        self.submit.write(issued.id, record).await.map_err(|error| if_unanswered(error, "ask again"))?;
        Ok((ticket.text(), issued.expires_at))
    }

    /// The user of a ticket, which is used up by this. It counts as a command of the user's.
    pub async fn redeem(&self, ticket: &str) -> Result<Principal, Error> {
        let ticket = Ticket::parse(ticket).ok_or_else(Error::no_ticket)?;
        // What nobody was given costs no record: whoever has no token must not make the log grow.
        let who = match self.find(&ticket)? {
            Some(who) => who,
            None => {
                self.level.reach().await?;
                self.find(&ticket)?.ok_or_else(Error::no_ticket)?
            }
        };

        // Many at once, before the first has its verdict, would all be found.
        self.admission.count(&who)?;
        let used = TicketUsedRecord {
            kind: TICKET_USED.to_owned(),
            id: clock::event_id(),
            hash: hex(&ticket),
            at: clock::rfc3339(clock::now_ms()),
        };
        let record = Record::ticket_used(&ticket.owner(), &used);
        self.submit.write(used.id, record).await.map_err(|error| if_unanswered(error, "get another ticket"))?;
        self.auth.check_revoked(&who)?;
        Ok(who)
    }

    /// Whose ticket it is, if it is open as far as this node has read the log.
    fn find(&self, ticket: &Ticket) -> Result<Option<Principal>, Error> {
        let hash = ticket.hash();
        let Some(row) = self.store.tickets(&ticket.owner())? else { return Ok(None) };
        let Some(open) = row.open.into_iter().find(|open| open.hash == hash) else { return Ok(None) };

        let mut who = Principal::new(&row.tenant, &row.user, Scopes::parse(Some(&open.scopes)), open.exp);
        who.issued_at = open.iat_ms;
        Ok(Some(who))
    }
}

fn hex(ticket: &Ticket) -> String {
    blake3::Hash::from_bytes(ticket.hash()).to_hex().to_string()
}

/// Nobody waits for what became of the record: whoever asks again does so with another one.
fn if_unanswered(error: Error, instead: &str) -> Error {
    match error.code {
        Code::Timeout => {
            Error::new(Code::Unavailable, format!("the log did not answer in time; {instead}")).retry_after(1_000)
        }
        _ => error,
    }
}
