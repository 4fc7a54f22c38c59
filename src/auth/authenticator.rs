//! From credentials to a user whose tokens have not been revoked.

use std::sync::Arc;

use super::Principal;
use super::jwt::Verifier;
use crate::protocol::error::{Code, Error};
use crate::store::Store;

pub struct Authenticator {
    verifier: Verifier,
    store: Arc<Store>,
}

impl Authenticator {
    pub fn new(verifier: Verifier, store: Arc<Store>) -> Authenticator {
        Authenticator { verifier, store }
    }

    /// The user of a token.
    pub fn verify(&self, token: &str) -> Result<Principal, Error> {
        let who = self.verifier.verify(token)?;
        self.check_revoked(&who)?;
        Ok(who)
    }

    /// Refuses a user whose token was issued before the user's tokens were revoked. A token that does not say when it was
    /// issued may be that old.
    pub fn check_revoked(&self, who: &Principal) -> Result<(), Error> {
        let Some(revoked) = self.store.revocation(&who.tenant, &who.user)? else { return Ok(()) };

        match who.issued_at {
            Some(at) if at > revoked.until => Ok(()),
            _ => Err(Error::new(Code::Unauthenticated, "the user's tokens were revoked after this one was issued")),
        }
    }
}
