//! Who somebody is and what they may do.
//!
//! [`Authenticator`] turns a token into a [`Principal`]; [`scopes`] says, without looking anything up, what its
//! scopes allow; [`Rights`] looks up what depends on membership.

mod authenticator;
pub mod jwt;
mod rights;
pub mod scopes;

use std::sync::Arc;

pub use authenticator::Authenticator;
pub use rights::Rights;
pub use scopes::Scopes;

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
}

impl Principal {
    pub fn new(tenant: &str, user: &str, scopes: Scopes, expires_at: u64) -> Principal {
        let key = log_key(tenant, user).into();
        Principal { tenant: tenant.into(), user: user.into(), key, scopes, expires_at, issued_at: None }
    }
}
