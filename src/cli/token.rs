//! `weft token`: prints a token and nothing else.

use std::time::Duration;

use super::common::{Failure, Output, mint};
use crate::auth::jwt;
use crate::config::ConfigError;
use crate::protocol::ids;

/// The scopes that mean something to Weft.
const SCOPES: [&str; 6] = ["publish", "subscribe", "agent", "broadcast", "analyst", "admin"];

#[derive(Debug, clap::Args)]
pub struct Args {
    /// The secret that the server verifies tokens with, at least 32 bytes.
    #[arg(long, env = "WEFT_JWT_SECRET", hide_env_values = true)]
    pub jwt_secret: String,
    /// The user.
    #[arg(long, value_parser = parse_sub)]
    pub sub: String,
    /// The tenant the user belongs to.
    #[arg(long, value_parser = parse_tenant)]
    pub tenant: String,
    /// What the user may do, space-separated; without it: publish subscribe.
    #[arg(long, default_value = "", value_parser = parse_scope)]
    pub scope: String,
    /// How long the token is good for.
    #[arg(long, default_value = "1h", value_parser = humantime::parse_duration)]
    pub ttl: Duration,
}

pub fn run(args: &Args) -> Result<(), Failure> {
    // Not by clap, which would print the secret with its error.
    jwt::check_secret(&args.jwt_secret).map_err(|why| ConfigError::new(format!("--jwt-secret {why}")))?;
    let token = mint(&args.jwt_secret, &args.tenant, &args.sub, &args.scope, args.ttl.as_secs())?;
    Output::new().line(token)?;
    Ok(())
}

/// Refuses what every server would refuse in the token.
fn parse_sub(sub: &str) -> Result<String, String> {
    if sub == ids::SERVER_USER {
        return Err(format!("{sub} is the name of the server's own user"));
    }
    parse_name("sub", sub)
}

fn parse_tenant(tenant: &str) -> Result<String, String> {
    parse_name("tenant", tenant)
}

fn parse_name(field: &'static str, name: &str) -> Result<String, String> {
    ids::check_name(field, name).map_err(|error| error.message.into_owned())?;
    Ok(name.to_owned())
}

fn parse_scope(scope: &str) -> Result<String, String> {
    match scope.split_ascii_whitespace().find(|name| !SCOPES.contains(name)) {
        None => Ok(scope.to_owned()),
        Some(unknown) => Err(format!("there is no scope {unknown}; the scopes are {}", SCOPES.join(", "))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::auth::Scopes;

    #[test]
    fn every_scope_that_may_be_named_is_one_that_the_server_knows() {
        for scope in SCOPES {
            assert_ne!(Scopes::parse(Some(scope)), Scopes::default(), "{scope}");
        }
        let all = Scopes::parse(Some(&SCOPES.join(" ")));
        let every = Scopes { publish: true, subscribe: true, agent: true, broadcast: true, analyst: true, admin: true };
        assert_eq!(all, every, "no scope is left out");
    }

    #[test]
    fn a_scope_that_is_unknown_is_refused_with_those_that_are_known() {
        assert_eq!(parse_scope("publish  agent"), Ok("publish  agent".to_owned()));
        assert_eq!(parse_scope(""), Ok(String::new()));
        let why = parse_scope("publish,agent").expect_err("one word");
        assert_eq!(
            why,
            "there is no scope publish,agent; the scopes are publish, subscribe, agent, broadcast, analyst, admin"
        );
    }

    #[test]
    fn a_name_that_no_server_accepts_is_refused() {
        assert!(parse_sub("ada").is_ok() && parse_tenant("weft").is_ok());
        assert!(parse_sub("a b").expect_err("a space").starts_with("sub must be"));
        assert!(parse_tenant("").expect_err("empty").starts_with("tenant must be"));
        assert!(parse_sub("weft").is_err());
    }
}
