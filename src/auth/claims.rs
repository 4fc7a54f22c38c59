//! What a token or a session says of its user, checked field by field.

use serde::Deserialize;
use serde_json::{Map, Value};

use super::{Principal, Scopes};
use crate::clock;
use crate::protocol::ids;

/// Seconds by which clocks may differ (`exp`, `nbf`).
pub const LEEWAY: u64 = 30;

/// Claims by their names, as they came.
#[derive(Debug, Deserialize)]
pub struct Named(Map<String, Value>);

/// The claims of a token or a session: which of them Weft looks at, and what they must be, the methods say. Others may have
/// any shape.
pub struct WhoseClaims {
    /// `token` or `session`.
    of: &'static str,
    claims: Named,
}

impl WhoseClaims {
    pub fn token(claims: Named) -> WhoseClaims {
        WhoseClaims { of: "token", claims }
    }

    pub fn session(claims: Named) -> WhoseClaims {
        WhoseClaims { of: "session", claims }
    }

    /// A claim, if it is there and not `null`.
    pub fn get(&self, name: &str) -> Option<&Value> {
        self.claims.0.get(name).filter(|value| !value.is_null())
    }

    fn must_be(&self, name: &str, what: &str) -> String {
        format!("the {}'s claim `{name}` must be {what}", self.of)
    }

    fn text(&self, name: &str) -> Result<Option<&str>, String> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(self.must_be(name, "a string")),
        }
    }

    /// A time in seconds, which may have a fraction (RFC 7519, section 2).
    fn seconds(&self, name: &str) -> Result<Option<f64>, String> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::Number(number)) => Ok(number.as_f64()),
            Some(_) => Err(self.must_be(name, "a number")),
        }
    }

    fn required<T>(&self, name: &str, claim: Option<T>) -> Result<T, String> {
        claim.ok_or_else(|| format!("the {}'s claim `{name}` is missing", self.of))
    }

    /// The name of a user or a tenant.
    fn name(&self, claim: &'static str) -> Result<&str, String> {
        let name = self.required(claim, self.text(claim)?)?;
        ids::check_name(claim, name).map_err(|error| format!("the {}'s claim {}", self.of, error.message))?;
        Ok(name)
    }

    /// Refuses claims whose `name` is neither the wanted one nor a list with it.
    pub fn check_contains(&self, name: &str, wanted: &str) -> Result<(), String> {
        let found = match self.required(name, self.get(name))? {
            Value::Array(list) => list.iter().any(|it| it == wanted),
            one => one == wanted,
        };
        if found { Ok(()) } else { Err(format!("the {}'s claim `{name}` is not `{wanted}`", self.of)) }
    }

    /// Refuses what has expired, or is not valid yet, at the time `now`; gives when it expires, in seconds.
    pub fn check_times(&self, now: u64) -> Result<Option<f64>, String> {
        let (now, leeway) = (now as f64, LEEWAY as f64);
        // A cast of what is before 1970 gives 1970.
        let time = |seconds: f64| clock::rfc3339((seconds * 1_000.0) as u64);

        let expires_at = self.seconds("exp")?;
        if let Some(expires_at) = expires_at
            && expires_at + leeway < now
        {
            return Err(format!("the {} expired at {}", self.of, time(expires_at)));
        }
        match self.seconds("nbf")? {
            Some(begin) if begin > now + leeway => Err(format!("the {} is not valid before {}", self.of, time(begin))),
            _ => Ok(expires_at),
        }
    }

    /// The user, whose rights end at this time in seconds.
    pub fn principal(&self, expires_at: f64) -> Result<Principal, String> {
        let (user, tenant) = (self.name("sub")?, self.name("tenant")?);
        if user == ids::SERVER_USER {
            return Err(format!("the {}'s claim `sub` is `{user}`, the name of the server's own user", self.of));
        }
        let scopes = Scopes::parse(self.text("scope")?);
        // A cast of what is too large gives the largest number.
        let mut who = Principal::new(tenant, user, scopes, expires_at as u64);
        who.issued_at = self.seconds("iat")?.map(|iat| (iat * 1_000.0) as u64);
        Ok(who)
    }
}
