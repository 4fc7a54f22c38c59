//! Who somebody is and what they may do.
//!
//! [`Authenticator`] turns a token or a session into a [`Principal`]; [`scopes`] says, without looking anything up, what its
//! scopes allow; [`Rights`] looks up what depends on membership.
//!
//! Tokens are verified with the key that is configured, or with those of [`issuers`], which are fetched; of [`sessions`] the
//! auth service is asked.

mod authenticator;
mod claims;
pub mod issuers;
mod jwks;
pub mod jwt;
mod rights;
pub mod scopes;
pub mod sessions;

use std::sync::Arc;

pub use authenticator::{Authenticator, Credential, Keys};
pub use claims::LEEWAY;
pub use rights::Rights;
pub use scopes::Scopes;

use sessions::Session;

use crate::protocol::ids::log_key;

/// An authenticated user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Principal {
    pub tenant: Arc<str>,
    pub user: Arc<str>,
    /// `tenant/user`.
    pub key: Arc<str>,
    pub scopes: Scopes,
    /// Seconds since the Unix epoch.
    pub expires_at: u64,
    /// When its token was issued, if that says so; milliseconds since the Unix epoch.
    pub issued_at: Option<u64>,
    /// The session it came in with, if it was one.
    pub session: Option<Arc<Session>>,
}

impl Principal {
    pub fn new(tenant: &str, user: &str, scopes: Scopes, expires_at: u64) -> Principal {
        let key = log_key(tenant, user).into();
        Principal { tenant: tenant.into(), user: user.into(), key, scopes, expires_at, issued_at: None, session: None }
    }

    /// The second from which on its token is taken no more: clocks differ.
    pub fn ends_at(&self) -> u64 {
        self.expires_at.saturating_add(LEEWAY)
    }
}
