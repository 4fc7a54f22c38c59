//! The server under load, and its users: as many as a bench needs, with tokens made from the server's secret.

use std::io::IsTerminal;
use std::time::Duration;

use futures_util::future::try_join_all;
use serde_json::json;

use crate::socket::Socket;
use weft::cli::common::{Failure, mint};
use weft::client::{Address, Http};
use weft::clock;

/// Connections made at the same time: few enough for any accept queue.
const AT_ONCE: usize = 64;
/// Members that one `PUT` may name.
const MEMBERS_AT_ONCE: usize = 1_000;
/// How often a metric is read while a bench waits for it to fall.
const LOOK_EVERY: Duration = Duration::from_millis(20);
const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Debug, Clone, clap::Args)]
pub struct TargetArgs {
    /// Where the server is.
    #[arg(long, env = "WEFT_URL", default_value = "http://127.0.0.1:8080")]
    pub url: String,
    /// The secret that the server verifies tokens with.
    #[arg(long, env = "WEFT_JWT_SECRET", hide_env_values = true)]
    pub jwt_secret: String,
    /// The tenant of the bench's users.
    #[arg(long, default_value = "bench")]
    pub tenant: String,
}

impl TargetArgs {
    pub fn of(url: &str, secret: &str) -> TargetArgs {
        TargetArgs { url: url.to_owned(), jwt_secret: secret.to_owned(), tenant: "bench".to_owned() }
    }
}

#[derive(Clone)]
pub struct Target {
    args: TargetArgs,
    authority: String,
    /// Keeps the threads and users of one run apart from those of another.
    run: String,
}

impl Target {
    pub fn new(args: &TargetArgs) -> Result<Target, Failure> {
        let authority = args.url.parse::<Address>()?.authority().to_owned();
        let run = clock::random_id().simple().to_string()[..8].to_owned();
        Ok(Target { args: args.clone(), authority, run })
    }

    /// The same server, for users of another tenant.
    pub fn of_tenant(&self, name: &str) -> Target {
        let mut other = self.clone();
        other.args.tenant = format!("{}-{name}", self.args.tenant);
        other
    }

    /// The name of a user or a thread in this run.
    pub fn name(&self, what: &str, number: usize) -> String {
        format!("{what}-{}-{number}", self.run)
    }

    /// The server's host and port.
    pub fn authority(&self) -> &str {
        &self.authority
    }

    pub fn token(&self, user: &str) -> Result<String, Failure> {
        mint(&self.args.jwt_secret, &self.args.tenant, user, "publish subscribe", 24 * 3600)
    }

    pub async fn socket(&self, user: &str) -> Result<Socket, Failure> {
        self.socket_with(&self.token(user)?).await
    }

    /// A connection with an agent's rights.
    pub async fn agent(&self, user: &str) -> Result<Socket, Failure> {
        let scope = "publish subscribe agent";
        self.socket_with(&mint(&self.args.jwt_secret, &self.args.tenant, user, scope, 24 * 3600)?).await
    }

    pub async fn socket_with(&self, token: &str) -> Result<Socket, Failure> {
        Socket::connect(&self.authority, token).await
    }

    /// A connection that buffers very little for a user who does not read.
    pub async fn narrow_socket(&self, user: &str) -> Result<Socket, Failure> {
        Socket::connect_narrow(&self.authority, &self.token(user)?).await
    }

    /// The results of `each` for the numbers 0…count-1, some at a time.
    pub async fn many<T>(
        &self,
        count: usize,
        each: impl AsyncFn(usize) -> Result<T, Failure>,
    ) -> Result<Vec<T>, Failure> {
        let mut made = Vec::with_capacity(count);
        while made.len() < count {
            let first = made.len();
            let batch = first..count.min(first + AT_ONCE);
            made.extend(try_join_all(batch.map(|number| each(number))).await?);
        }
        Ok(made)
    }

    /// Makes a thread of `owner`'s with these members.
    pub async fn thread(&self, thread: &str, owner: &str, members: &[String]) -> Result<(), Failure> {
        let mut http = self.http(owner).await?;
        let path = format!("/v1/threads/{thread}");
        let mut parts = members.chunks(MEMBERS_AT_ONCE);
        // The first makes the thread, with or without members; the others add theirs.
        http.put(&path, &json!({ "members": parts.next().unwrap_or_default() })).await?;
        for part in parts {
            http.put(&path, &json!({ "members": part })).await?;
        }
        Ok(())
    }

    /// Requests with an analyst's rights.
    pub async fn analyst(&self) -> Result<Http, Failure> {
        let token = mint(&self.args.jwt_secret, &self.args.tenant, "analyst", "analyst", 24 * 3600)?;
        Ok(Http::connect(&self.args.url, &token).await?)
    }

    pub async fn http(&self, user: &str) -> Result<Http, Failure> {
        Ok(Http::connect(&self.args.url, &self.token(user)?).await?)
    }

    /// One of the server's metrics.
    pub async fn metric(&self, name: &str) -> Result<f64, Failure> {
        let [value] = self.metrics([name]).await?;
        Ok(value)
    }

    /// Several metrics of the same moment.
    pub async fn metrics<const N: usize>(&self, names: [&str; N]) -> Result<[f64; N], Failure> {
        let text = self.http("observer").await?.get_text("/metrics").await?;
        let mut values = [0.0; N];
        for (value, name) in values.iter_mut().zip(names) {
            let found = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
            *value = found.ok_or_else(|| format!("the server's /metrics has no {name}"))?.trim().parse()?;
        }
        Ok(values)
    }

    /// Waits until a metric is at most `most`.
    pub async fn down_to(&self, name: &str, most: f64) -> Result<(), Failure> {
        self.metric_when(name, PATIENCE, |now| now <= most).await
    }

    /// Waits for so long at most until a metric is as it `is_wanted`.
    pub async fn metric_when(
        &self,
        name: &str,
        within: Duration,
        is_wanted: impl Fn(f64) -> bool,
    ) -> Result<(), Failure> {
        let wanted = async {
            while !is_wanted(self.metric(name).await?) {
                tokio::time::sleep(LOOK_EVERY).await;
            }
            Ok(())
        };
        let waited = tokio::time::timeout(within, wanted).await;
        waited.map_err(|_| format!("{name} is not as wanted after {} s", within.as_secs()))?
    }
}

/// Shows what is being measured, on a terminal.
pub fn progress(what: &str) {
    if std::io::stderr().is_terminal() {
        eprintln!("{what} …");
    }
}

/// Lets this process open `needed` files, or as many as are allowed; gives how many.
pub fn open_files(needed: usize) -> Result<usize, Failure> {
    let allowed = rlimit::increase_nofile_limit(needed as u64)?;
    Ok(usize::try_from(allowed).unwrap_or(usize::MAX))
}

/// Lets this process open `needed` files.
pub fn raise_open_files(needed: usize) -> Result<(), Failure> {
    let allowed = open_files(needed)?;
    if allowed < needed {
        return Err(format!("{needed} open files are needed, and {allowed} are allowed (ulimit -Hn)").into());
    }
    Ok(())
}
