//! Who somebody is: from a token to a [`Principal`].

pub mod jwt;
pub mod tickets;

use std::sync::Arc;

use crate::ids::log_key;

/// What a token allows, beyond being who it says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Scopes {
    pub publish: bool,
    pub subscribe: bool,
    pub agent: bool,
    pub broadcast: bool,
    pub analyst: bool,
    pub admin: bool,
}

impl Scopes {
    /// From a space-separated list; absent means `publish subscribe`. Scopes of others are passed over.
    pub fn parse(scope: Option<&str>) -> Scopes {
        let mut scopes = Scopes::default();
        for name in scope.unwrap_or("publish subscribe").split_ascii_whitespace() {
            match name {
                "publish" => scopes.publish = true,
                "subscribe" => scopes.subscribe = true,
                "agent" => scopes.agent = true,
                "broadcast" => scopes.broadcast = true,
                "analyst" => scopes.analyst = true,
                "admin" => scopes.admin = true,
                _ => {}
            }
        }
        scopes
    }
}

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
