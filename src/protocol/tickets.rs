//! What a ticket is: how a browser, which cannot set headers on a WebSocket, gets in without a token in a URL.
//!
//! A ticket is 48 bytes: whose it is, as a digest, and 32 random ones. The log and the store have its hash and never the
//! ticket, so that whoever reads them cannot get in. The digest is what all records about tickets of one user have as their
//! key: they are in one partition, and the node that gets a ticket needs nothing else to know which.

use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

/// How long a ticket is good.
pub const LIFETIME: Duration = Duration::from_secs(30);

/// Whose a ticket is: a digest of tenant and user.
pub type TicketOwner = [u8; 16];

const OWNER: usize = size_of::<TicketOwner>();
const BYTES: usize = OWNER + 32;
/// As base64url, without padding.
const TEXT: usize = BYTES / 3 * 4;

/// What the keys of records about tickets begin with. They have no `/`, so no event has such a key.
const KEY: &str = "ticket:";

pub struct Ticket([u8; BYTES]);

impl Ticket {
    pub fn new(owner: &TicketOwner, random: [[u8; 16]; 2]) -> Ticket {
        let mut bytes = [0; BYTES];
        for (part, from) in bytes.chunks_exact_mut(OWNER).zip([owner, &random[0], &random[1]]) {
            part.copy_from_slice(from);
        }
        Ticket(bytes)
    }

    /// A ticket as a client sends it, if it can be one.
    pub fn parse(text: &str) -> Option<Ticket> {
        let mut bytes = [0; BYTES];
        let decoded = (text.len() == TEXT).then(|| URL_SAFE_NO_PAD.decode_slice(text, &mut bytes))?;
        decoded.is_ok().then_some(Ticket(bytes))
    }

    pub fn text(&self) -> String {
        URL_SAFE_NO_PAD.encode(self.0)
    }

    pub fn owner(&self) -> TicketOwner {
        let mut owner = [0; OWNER];
        owner.copy_from_slice(&self.0[..OWNER]);
        owner
    }

    /// What the log and the store know it by.
    pub fn hash(&self) -> [u8; 32] {
        blake3::derive_key("weft 2026-11 ticket", &self.0)
    }
}

/// Whose the tickets of a user are.
pub fn owner(tenant: &str, user: &str) -> TicketOwner {
    let digest = blake3::Hasher::new_derive_key("weft 2026-11 owner of tickets")
        // No name has a NUL.
        .update(tenant.as_bytes())
        .update(&[0])
        .update(user.as_bytes())
        .finalize();
    let mut owner = [0; OWNER];
    owner.copy_from_slice(&digest.as_bytes()[..OWNER]);
    owner
}

/// The key of all records about tickets of one user: `ticket:` and the owner in lowercase hex.
pub fn log_key(owner: &TicketOwner) -> String {
    format!("{KEY}{}", uuid::Uuid::from_bytes(*owner).simple())
}

/// Whose tickets a record with this key is about, if it is about tickets.
pub fn owner_of_key(key: &str) -> Option<TicketOwner> {
    let owner = uuid::Uuid::try_parse(key.strip_prefix(KEY)?).ok()?.into_bytes();
    // In this form alone: an id can be written in several.
    (log_key(&owner) == key).then_some(owner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ticket_is_64_characters_that_a_url_takes_and_comes_back_from_them() {
        let ada = owner("acme", "ada");
        let ticket = Ticket::new(&ada, [[0xfb; 16], [0xff; 16]]);
        let text = ticket.text();
        assert!(text.len() == 64 && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b)), "{text}");
        let parsed = Ticket::parse(&text).expect("it is one");
        assert_eq!((parsed.owner(), parsed.hash(), parsed.text()), (ada, ticket.hash(), text.clone()));
        let other = Ticket::new(&ada, [[0xfb; 16], [0xfe; 16]]);
        assert_ne!(other.hash(), ticket.hash());
        for none in ["", "guessed", &text[1..], &format!("{text}A"), &text.replace('_', "/"), &text.replace('_', "ü")]
        {
            assert!(Ticket::parse(none).is_none(), "{none}");
        }
    }

    #[test]
    fn tickets_have_a_key_for_each_user_that_no_thread_has() {
        let ada = owner("acme", "ada");
        assert_eq!(owner_of_key(&log_key(&ada)), Some(ada));
        assert_ne!(owner("ac", "meada"), owner("acme", "ada"));
        let as_thread = format!("{}/t", log_key(&ada));
        for none in ["weft", "acme/ticket:t", &as_thread, &log_key(&ada).to_uppercase(), "ticket:", "ticket:1"] {
            assert_eq!(owner_of_key(none), None, "{none}");
        }
        let hyphenated = format!("ticket:{}", uuid::Uuid::from_bytes(ada).hyphenated());
        assert_eq!(owner_of_key(&hyphenated), None);
    }
}
