//! `weft token`: prints a token and nothing else.

use std::time::Duration;

use super::common::{Failure, Out, mint};

#[derive(Debug, clap::Args)]
pub struct TokenArgs {
    /// The secret that the server checks tokens with.
    #[arg(long, env = "WEFT_JWT_SECRET", hide_env_values = true)]
    pub jwt_secret: String,
    /// The user.
    #[arg(long)]
    pub sub: String,
    /// The tenant the user belongs to.
    #[arg(long)]
    pub tenant: String,
    /// What the user may do, space-separated; without it: publish subscribe.
    #[arg(long, default_value = "")]
    pub scope: String,
    /// How long the token is good for.
    #[arg(long, default_value = "1h", value_parser = humantime::parse_duration)]
    pub ttl: Duration,
}

pub async fn run(args: TokenArgs) -> Result<(), Failure> {
    let token = mint(&args.jwt_secret, &args.tenant, &args.sub, &args.scope, args.ttl.as_secs())?;
    Out::new().line(token)?;
    Ok(())
}
