//! Every setting, in one list: a flag, an environment variable and a key of `weft.toml`, in that order of precedence.

mod file;
mod identity;
mod webhook;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytesize::ByteSize;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::auth::jwt;
use crate::delivery::registry::ConnectionLimits;
use crate::ingest::limits::Rates;
use crate::log::kafka::ClientSettings;
use crate::memory::{self, Plan};
use crate::partitioning::MAX_PARTITIONS;
use crate::protocol::kinds::USER_MESSAGE;
use crate::search::Stems;
use crate::webhook::Secret;

/// The budget of memory where the system does not say how much it has.
const DEFAULT_MEMORY: u64 = 1 << 30;

/// Threads that project, at most: by then the log's reader and the disk have enough to do.
const MAX_PROJECTORS: usize = 8;

/// Settings of librdkafka, from the environment; clap would split the flag as it splits the variable.
const KAFKA_CONFIG: &str = "WEFT_KAFKA_CONFIG";
/// The key under which they stand in the file.
const KAFKA_CONFIG_KEY: &str = "kafka_config";

/// In place of a language: nothing is indexed.
const SEARCH_OFF: &str = "off";

/// Which log to use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LogChoice {
    Embedded,
    Kafka,
}

/// Where the log and the projections are. `None` is what was not given.
#[derive(Debug, Clone, Default, Serialize, clap::Args)]
pub struct StorageArgs {
    /// A file of settings, if it is not ./weft.toml
    #[arg(long, env = "WEFT_CONFIG", value_name = "FILE")]
    #[serde(skip)]
    pub config: Option<PathBuf>,
    /// The data folder: log/ (the embedded log, the truth), projections/ and search/ (may be deleted while stopped) [default: ./data]
    #[arg(long, env = "WEFT_DATA", value_name = "DIR")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data: Option<PathBuf>,
    /// Which log to use [default: embedded]
    #[arg(long, env = "WEFT_LOG")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub log: Option<LogChoice>,
    /// Kafka's brokers, with commas between them [default: 127.0.0.1:9092]
    #[arg(long, env = "WEFT_BROKERS", value_name = "HOST:PORT")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub brokers: Option<String>,
    /// Partitions of the log, fixed when it is created [default: what the log has; 64 for a new one]
    #[arg(long, env = "WEFT_PARTITIONS", value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub partitions: Option<u32>,
    /// What the topics' names begin with; another prefix is another log on the same brokers [default: weft.]
    #[arg(long, env = "WEFT_TOPIC_PREFIX", value_name = "PREFIX")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub topic_prefix: Option<String>,
    /// A setting of librdkafka, such as security.protocol=SASL_SSL; may be given several times [env: WEFT_KAFKA_CONFIG: one a
    /// line, or in one line with commas between them]
    #[arg(long, value_name = "KEY=VALUE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kafka_config: Option<Vec<String>>,
    /// This node's name, in that of its consumer group [default: the host's name and a digest of the path of --data]
    #[arg(long, env = "WEFT_NODE", value_name = "NAME")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// The memory that the server may use, such as 2GiB [default: half of what the machine or its cgroup has]
    #[arg(long, env = "WEFT_MEMORY", value_name = "SIZE", value_parser = parse_memory)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<String>,
}

/// The settings of `weft serve`.
#[derive(Debug, Clone, Default, Serialize, clap::Args)]
pub struct ServeArgs {
    #[command(flatten)]
    #[serde(flatten)]
    pub storage: StorageArgs,
    /// The address to listen on [default: 127.0.0.1:8080]
    #[arg(long, env = "WEFT_LISTEN", value_name = "IP:PORT")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub listen: Option<SocketAddr>,
    /// An address of its own for /metrics, which the other one then lacks; /healthz and /readyz are at both
    #[arg(long, env = "WEFT_ADMIN_LISTEN", value_name = "IP:PORT")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub admin_listen: Option<SocketAddr>,
    /// The secret of the tokens' HMAC (HS256, HS384, HS512)
    #[arg(long, env = "WEFT_JWT_SECRET", hide_env_values = true, value_name = "SECRET")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub jwt_secret: Option<String>,
    /// A file with the PEM public key of the tokens' signature (RSA, EC or Ed25519)
    #[arg(long, env = "WEFT_JWT_KEY", value_name = "FILE", conflicts_with = "jwt_secret")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub jwt_key: Option<PathBuf>,
    /// Tokens must have this `iss`
    #[arg(long, env = "WEFT_JWT_ISSUER", value_name = "ISS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub jwt_issuer: Option<String>,
    /// Tokens must have this `aud`
    #[arg(long, env = "WEFT_JWT_AUDIENCE", value_name = "AUD")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub jwt_audience: Option<String>,
    /// Where the keys of tokens are fetched: of a JWKS, ISSUER=URL for one of several, or of an issuer's
    /// /.well-known/openid-configuration; with commas between them
    #[arg(long, env = "WEFT_JWKS_URL", value_delimiter = ',', value_name = "URL")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub jwks_url: Option<Vec<String>>,
    /// Where sessions of an auth service are checked (RFC 7662, introspection)
    #[arg(long, env = "WEFT_INTROSPECT_URL", value_name = "URL")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub introspect_url: Option<String>,
    /// Weft's own name at --introspect-url
    #[arg(long, env = "WEFT_INTROSPECT_CLIENT_ID", value_name = "ID")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub introspect_client_id: Option<String>,
    /// The secret that goes with it
    #[arg(long, env = "WEFT_INTROSPECT_CLIENT_SECRET", hide_env_values = true, value_name = "SECRET")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub introspect_client_secret: Option<String>,
    /// The application's backend that is told of events
    #[arg(long, env = "WEFT_WEBHOOK_URL", value_name = "URL")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub webhook_url: Option<String>,
    /// The kinds of events that it is told of, with commas between them [default: user_message]
    #[arg(long, env = "WEFT_WEBHOOK_KINDS", value_delimiter = ',', value_name = "KIND")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub webhook_kinds: Option<Vec<String>>,
    /// What its calls are signed with: whsec_ and base64; several with commas between them, to change it
    #[arg(long, env = "WEFT_WEBHOOK_SECRET", hide_env_values = true, value_delimiter = ',', value_name = "SECRET")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub webhook_secret: Option<Vec<String>>,
    /// Hosts of services that may have private addresses, such as auth or *.svc.cluster.local, with commas between them
    #[arg(long, env = "WEFT_PRIVATE_HOSTS", value_delimiter = ',', value_name = "HOST")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub private_hosts: Option<Vec<String>>,
    /// A file of where services are: HOST ADDRESS[:PORT]… a line, in place of DNS; read again each second
    #[arg(long, env = "WEFT_SERVICE_HOSTS", value_name = "FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub service_hosts: Option<PathBuf>,
    /// The DNS server that is asked for other services [default: the system's]
    #[arg(long, env = "WEFT_DNS_SERVER", value_name = "IP:PORT")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dns_server: Option<SocketAddr>,
    /// Origins that browsers may connect from beside the server's own, such as https://app.example, with commas between them; * for all
    #[arg(long, env = "WEFT_ALLOW_ORIGIN", value_delimiter = ',', value_name = "ORIGIN")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub allow_origin: Option<Vec<String>>,
    /// Connections in all [default: 100000]
    #[arg(long, env = "WEFT_MAX_CONNECTIONS", value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_connections: Option<usize>,
    /// WebSockets and streams of one user at a time [default: 250]
    #[arg(long, env = "WEFT_MAX_USER_CONNECTIONS", value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_user_connections: Option<usize>,
    /// The same of one user with scope agent [default: 1000]
    #[arg(long, env = "WEFT_MAX_AGENT_CONNECTIONS", value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_agent_connections: Option<usize>,
    /// Commands a second of one user, five times as many at once; 0: no limit [default: 2000]
    #[arg(long, env = "WEFT_RATE_USER", value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate_user: Option<u32>,
    /// Commands a second of one user with scope agent, five times as many at once; 0: no limit [default: 20000]
    #[arg(long, env = "WEFT_RATE_AGENT", value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate_agent: Option<u32>,
    /// Bytes that one tenant may append a second, five times as many at once; 0: no limit [default: 0]
    #[arg(long, env = "WEFT_RATE_TENANT", value_name = "BYTES")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate_tenant: Option<u64>,
    /// Commands a second of all users of one tenant, five times as many at once; 0: no limit [default: 0]
    #[arg(long, env = "WEFT_RATE_TENANT_COMMANDS", value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate_tenant_commands: Option<u32>,
    /// A run with no event for so long is ended by the server [default: 10m]
    #[arg(long, env = "WEFT_RUN_STALLED_AFTER", value_name = "TIME", value_parser = parse_time)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub run_stalled_after: Option<String>,
    /// Search: the language whose rules words are found by (english, german, french ...), plain for words as they are written, or off [default: english]
    #[arg(long, env = "WEFT_SEARCH", value_name = "LANGUAGE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub search: Option<String>,
    /// Development: makes a secret, prints a token, and listens on loopback only
    #[arg(long, env = "WEFT_DEV", num_args = 0..=1, default_missing_value = "true", value_parser = clap::builder::BoolishValueParser::new())]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dev: Option<bool>,
}

/// The settings, complete.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    pub listen: SocketAddr,
    #[serde(default)]
    pub admin_listen: Option<SocketAddr>,
    pub data: PathBuf,
    pub log: LogChoice,
    pub brokers: String,
    /// Without it, those of the log that is there.
    #[serde(default)]
    pub partitions: Option<u32>,
    pub topic_prefix: String,
    /// As `2GiB`; without it, half of what there is.
    #[serde(default)]
    pub memory: Option<String>,
    #[serde(default)]
    pub kafka_config: ClientSettings,
    #[serde(default)]
    pub node: Option<String>,
    #[serde(default)]
    pub jwt_secret: Option<String>,
    #[serde(default)]
    pub jwt_key: Option<PathBuf>,
    #[serde(default)]
    pub jwt_issuer: Option<String>,
    #[serde(default)]
    pub jwt_audience: Option<String>,
    pub jwks_url: Vec<String>,
    #[serde(default)]
    pub introspect_url: Option<String>,
    #[serde(default)]
    pub introspect_client_id: Option<String>,
    #[serde(default)]
    pub introspect_client_secret: Option<String>,
    #[serde(default)]
    pub webhook_url: Option<String>,
    pub webhook_kinds: Vec<String>,
    pub webhook_secret: Vec<String>,
    pub private_hosts: Vec<String>,
    #[serde(default)]
    pub service_hosts: Option<PathBuf>,
    #[serde(default)]
    pub dns_server: Option<SocketAddr>,
    pub allow_origin: Vec<String>,
    pub max_connections: usize,
    pub max_user_connections: usize,
    pub max_agent_connections: usize,
    pub rate_user: u32,
    pub rate_agent: u32,
    pub rate_tenant: u64,
    pub rate_tenant_commands: u32,
    /// As `10m`, `90s`.
    pub run_stalled_after: String,
    /// A language, `plain` or `off`.
    pub search: String,
    pub dev: bool,
    /// How many threads project, if it is not for the machine to say. Nobody can set it: it is for tests.
    #[serde(skip)]
    pub projectors: Option<usize>,
}

/// As many threads as the machine can spare for the projector: half of its cores, and one where it has two. One that has
/// nothing to do costs nothing.
fn projectors() -> usize {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    (cores / 2).clamp(1, MAX_PROJECTORS)
}

/// Checks a duration's text, and leaves it as it is.
fn parse_time(text: &str) -> Result<String, humantime::DurationError> {
    humantime::parse_duration(text).map(|_| text.to_owned())
}

/// Checks a size's text, and leaves it as it is.
fn parse_memory(text: &str) -> Result<String, String> {
    memory_bytes(text).map(|_| text.to_owned())
}

/// The bytes of a size such as `2GiB` or `512 MB`.
fn memory_bytes(text: &str) -> Result<u64, String> {
    let least = ByteSize(memory::MINIMUM);
    match text.parse::<ByteSize>() {
        Ok(size) if size >= least => Ok(size.as_u64()),
        Ok(_) => Err(format!("must be at least {least}, not {text}")),
        Err(_) => Err(format!("must be a size such as 2GiB or 512MiB, not {text:.40}")),
    }
}

/// A name that stands in that of a consumer group, and in what an operator types.
fn check_node(node: &str) -> Result<(), String> {
    let good = (1..=100).contains(&node.len()) && node.bytes().all(is_of_node);
    let why = || format!("must be 1 to 100 letters, digits, dots, dashes and underscores, not {node}");
    if good { Ok(()) } else { Err(why()) }
}

fn is_of_node(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_')
}

/// An origin as browsers send it, or `*`. One without a scheme or with a path would never match.
fn check_origin(origin: &str) -> Result<(), String> {
    let host = origin.split_once("://").filter(|(scheme, _)| !scheme.is_empty()).map(|(_, host)| host);
    match host {
        _ if origin == "*" => Ok(()),
        Some(host) if !host.is_empty() && !host.contains(['/', '?', '#', ' ']) => Ok(()),
        _ => Err(format!("must be a scheme and a host, as in https://app.example, or *, not {origin}")),
    }
}

impl Default for Config {
    fn default() -> Config {
        Config {
            listen: SocketAddr::from(([127, 0, 0, 1], 8080)),
            admin_listen: None,
            data: "./data".into(),
            log: LogChoice::Embedded,
            brokers: "127.0.0.1:9092".into(),
            partitions: None,
            topic_prefix: "weft.".into(),
            kafka_config: ClientSettings::default(),
            node: None,
            memory: None,
            jwt_secret: None,
            jwt_key: None,
            jwt_issuer: None,
            jwt_audience: None,
            jwks_url: Vec::new(),
            introspect_url: None,
            introspect_client_id: None,
            introspect_client_secret: None,
            webhook_url: None,
            webhook_kinds: vec![USER_MESSAGE.into()],
            webhook_secret: Vec::new(),
            private_hosts: Vec::new(),
            service_hosts: None,
            dns_server: None,
            allow_origin: Vec::new(),
            max_connections: 100_000,
            max_user_connections: 250,
            max_agent_connections: 1_000,
            rate_user: 2_000,
            rate_agent: 20_000,
            rate_tenant: 0,
            rate_tenant_commands: 0,
            run_stalled_after: "10m".into(),
            search: "english".into(),
            dev: false,
            projectors: None,
        }
    }
}

/// A setting that cannot be used; the message names it.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct ConfigError(String);

impl ConfigError {
    pub fn new(why: impl Into<String>) -> ConfigError {
        ConfigError(why.into())
    }
}

/// The fields of a struct by name.
fn fields(settings: &impl Serialize) -> Result<Map<String, Value>, ConfigError> {
    match serde_json::to_value(settings) {
        Ok(Value::Object(fields)) => Ok(fields),
        Ok(other) => Err(ConfigError(format!("{other} in place of settings"))),
        // A path that is not UTF-8.
        Err(error) => Err(ConfigError(error.to_string())),
    }
}

/// librdkafka's settings from the file, overlaid one by one with those of the variable and of the flag, so that a password
/// can be kept out of the file that has the rest.
fn overlay_kafka_config(in_file: Value, by_flag: Option<Value>) -> Result<Value, ConfigError> {
    let from = |value| ClientSettings::deserialize(value);
    let in_file = from(in_file).map_err(|error| ConfigError(format!("`{KAFKA_CONFIG_KEY}` {error}")))?;
    let by_variable = ClientSettings::parse_list(&std::env::var(KAFKA_CONFIG).unwrap_or_default())
        .map_err(|why| ConfigError(format!("{KAFKA_CONFIG}: {why}")))?;
    let by_flag = by_flag.map(from).transpose().map_err(|error| ConfigError(format!("--kafka-config {error}")))?;
    let all = in_file.overlaid_with(by_variable).overlaid_with(by_flag.unwrap_or_default());
    serde_json::to_value(all).map_err(|error| ConfigError(error.to_string()))
}

impl Config {
    /// The settings from a file, overlaid with what was given by flag or variable.
    pub fn load(file: Option<&Path>, given: &impl Serialize) -> Result<Config, ConfigError> {
        if let Some(file) = file
            && !file.is_file()
        {
            return Err(ConfigError(format!("--config: there is no file {}", file.display())));
        }
        let file = file.unwrap_or(Path::new("weft.toml"));

        let mut settings = fields(&Config::default())?;
        if file.is_file() {
            settings.extend(file::read(file)?);
        }
        let mut given = fields(given)?;
        let in_file = settings.remove(KAFKA_CONFIG_KEY).unwrap_or_default();
        let kafka_config = overlay_kafka_config(in_file, given.remove(KAFKA_CONFIG_KEY))?;
        settings.extend(given);
        settings.insert(KAFKA_CONFIG_KEY.to_owned(), kafka_config);

        let config = Config::deserialize(Value::Object(settings)).map_err(|error| ConfigError(error.to_string()))?;
        config.check_each().map_err(|(key, why)| ConfigError(format!("--{} {why}", key.replace('_', "-"))))?;
        config.check_together()?;
        Ok(config)
    }

    /// What is wrong with a setting by itself: its key, and why.
    fn check_each(&self) -> Result<(), (&'static str, String)> {
        if let Some(partitions) = self.partitions
            && !(1..=MAX_PARTITIONS).contains(&partitions)
        {
            return Err(("partitions", format!("must be 1 to {MAX_PARTITIONS}, not {partitions}")));
        }
        for (key, value) in [
            ("max_connections", self.max_connections),
            ("max_user_connections", self.max_user_connections),
            ("max_agent_connections", self.max_agent_connections),
        ] {
            if value == 0 {
                return Err((key, "must be at least 1".to_owned()));
            }
        }
        if humantime::parse_duration(&self.run_stalled_after).is_err() {
            let why = format!("must be a time such as 10m or 90s, not {}", self.run_stalled_after);
            return Err(("run_stalled_after", why));
        }
        if self.search != SEARCH_OFF && Stems::of(&self.search).is_none() {
            let why = format!("must be a language such as english, or plain, or off, not {:.40}", self.search);
            return Err(("search", why));
        }
        if let Some(memory) = &self.memory {
            memory_bytes(memory).map_err(|why| ("memory", why))?;
        }
        self.kafka_config.check().map_err(|why| (KAFKA_CONFIG_KEY, why))?;
        if let Some(node) = &self.node {
            check_node(node).map_err(|why| ("node", why))?;
        }
        if let Some(secret) = &self.jwt_secret {
            jwt::check_secret(secret).map_err(|why| ("jwt_secret", why))?;
        }
        for secret in &self.webhook_secret {
            Secret::parse(secret).map_err(|why| ("webhook_secret", why))?;
        }
        for origin in &self.allow_origin {
            check_origin(origin).map_err(|why| ("allow_origin", why))?;
        }
        Ok(())
    }

    /// What is wrong with settings that do not go together.
    fn check_together(&self) -> Result<(), ConfigError> {
        for (flag, address) in [("--listen", Some(self.listen)), ("--admin-listen", self.admin_listen)] {
            if self.dev && address.is_some_and(|address| !address.ip().is_loopback()) {
                let why = format!("--dev listens on loopback only: change {flag}, or leave --dev out");
                return Err(ConfigError::new(why));
            }
        }
        self.check_identity()?;
        self.webhook().map(drop)
    }

    pub fn rates(&self) -> Rates {
        Rates {
            user_commands: self.rate_user,
            agent_commands: self.rate_agent,
            tenant_commands: self.rate_tenant_commands,
            tenant_bytes: self.rate_tenant,
        }
    }

    pub fn connection_limits(&self) -> ConnectionLimits {
        ConnectionLimits { user: self.max_user_connections, agent: self.max_agent_connections }
    }

    /// How long a run may be without an event.
    pub fn run_stalled_after(&self) -> Duration {
        // Checked when it was loaded.
        humantime::parse_duration(&self.run_stalled_after).unwrap_or(Duration::from_secs(600))
    }

    /// The memory that the server may use, divided among its parts.
    pub fn memory(&self) -> Plan {
        // Checked when it was loaded.
        let given = self.memory.as_deref().and_then(|text| memory_bytes(text).ok());
        let half = || memory::available().map_or(DEFAULT_MEMORY, |bytes| bytes / 2).max(memory::MINIMUM);
        let plan = Plan::for_projectors(given.unwrap_or_else(half), self.projectors.unwrap_or_else(projectors));
        if self.search_language().is_some() { plan } else { plan.without_search() }
    }

    /// The language of search, unless that is off.
    pub fn search_language(&self) -> Option<&str> {
        (self.search != SEARCH_OFF).then_some(&*self.search)
    }

    /// What this node is called: the same after every start, and another one on another host or with other data.
    pub fn node(&self) -> String {
        if let Some(node) = &self.node {
            return node.clone();
        }
        let system = rustix::system::uname();
        let host: Vec<u8> = system.nodename().to_bytes().iter().copied().filter(|byte| is_of_node(*byte)).collect();
        let path = std::path::absolute(&self.data).unwrap_or_else(|_| self.data.clone());
        let digest = blake3::hash(path.as_os_str().as_encoded_bytes()).to_hex();
        format!("{}-{}", String::from_utf8_lossy(&host), &digest[..8])
    }

    pub fn log_dir(&self) -> PathBuf {
        self.data.join("log")
    }

    pub fn search_dir(&self) -> PathBuf {
        self.data.join("search")
    }

    pub fn projections_dir(&self) -> PathBuf {
        self.data.join("projections")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flag_beats_the_file_and_the_file_beats_the_default() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let file = dir.path().join("weft.toml");
        std::fs::write(&file, "partitions = 4\nbrokers = \"file:1\"").expect("the file is written");
        let given = StorageArgs { brokers: Some("said:2".into()), ..StorageArgs::default() };
        let config = Config::load(Some(&file), &given).expect("good settings");
        assert_eq!((config.partitions, &*config.brokers, config.max_connections), (Some(4), "said:2", 100_000));
    }

    #[test]
    fn a_mistake_in_the_file_has_its_line() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let file = dir.path().join("weft.toml");
        std::fs::write(&file, "dev = true\npartitoins = 4").expect("the file is written");
        let refused = Config::load(Some(&file), &StorageArgs::default()).expect_err("a misspelt key");
        let expected = format!("{}, line 2: unknown key `partitoins`; did you mean `partitions`?", file.display());
        assert_eq!(refused.to_string(), expected);
    }

    #[test]
    fn settings_of_librdkafka_are_overlaid_one_by_one() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let file = dir.path().join("weft.toml");
        let text =
            "log = \"kafka\"\n[kafka_config]\nsecurity.protocol = \"SASL_SSL\"\n\"sasl.password\" = \"of the file\"";
        std::fs::write(&file, text).expect("the file is written");
        let flag = Some(vec!["sasl.password=a=b,c".to_owned()]);
        let given = StorageArgs { kafka_config: flag, ..StorageArgs::default() };
        let config = Config::load(Some(&file), &given).expect("good settings");
        let both = ["security.protocol=SASL_SSL", "sasl.password=a=b,c"];
        assert_eq!(Ok(config.kafka_config), ClientSettings::parse(both));
    }

    #[test]
    fn a_wrong_setting_of_librdkafka_is_named_and_no_secret_is_repeated() {
        let load = |pair: &str| {
            let given = StorageArgs { kafka_config: Some(vec![pair.to_owned()]), ..StorageArgs::default() };
            Config::load(None, &given).expect_err(pair).to_string()
        };
        assert_eq!(load("sasl.usrname=x"), "--kafka-config sasl.usrname: librdkafka has no setting of this name");
        assert!(load("acks=1").starts_with("--kafka-config acks: Weft sets this itself"), "{}", load("acks=1"));
        assert!(!load("hunter2").contains("hunter2"));
        let config = Config {
            kafka_config: ClientSettings::parse(["sasl.password=hunter2"]).expect("a pair"),
            ..Config::default()
        };
        assert!(!format!("{config:?}").contains("hunter2"));
    }

    #[test]
    fn a_node_is_named_after_its_host_and_its_data_unless_it_is_given_a_name() {
        let named = |data: &str, node: Option<&str>| {
            Config { data: data.into(), node: node.map(str::to_owned), ..Config::default() }.node()
        };
        assert_eq!(named("/a", None), named("/a", None));
        assert_ne!(named("/a", None), named("/b", None));
        assert!(check_node(&named("/a", None)).is_ok(), "{}", named("/a", None));
        assert_eq!(named("/a", Some("weft-0")), "weft-0");
        let given = StorageArgs { node: Some("a b".to_owned()), ..StorageArgs::default() };
        let why = Config::load(None, &given).expect_err("a space").to_string();
        assert!(why.starts_with("--node must be 1 to 100 letters") && why.ends_with("not a b"), "{why}");
    }

    #[test]
    fn an_origin_has_a_scheme_and_no_path() {
        let load = |origin: &str| {
            let given = ServeArgs { allow_origin: Some(vec![origin.to_owned()]), ..ServeArgs::default() };
            Config::load(None, &given).map(drop).map_err(|error| error.to_string())
        };
        for good in ["*", "https://app.example", "http://localhost:3000", "capacitor://localhost"] {
            assert_eq!(load(good), Ok(()));
        }
        for bad in ["app.example", "", "null", "https://", "://app.example", "https://app.example/", "https://a b"] {
            let why = load(bad).expect_err(bad);
            assert!(why.starts_with("--allow-origin must be a scheme and a host"), "{why}");
        }
    }

    #[test]
    fn a_secret_has_32_bytes_at_least() {
        let given = ServeArgs { jwt_secret: Some("short".to_owned()), ..ServeArgs::default() };
        let why = Config::load(None, &given).expect_err("a short secret").to_string();
        assert_eq!(why, "--jwt-secret must be at least 32 bytes long, and has 5");
    }

    #[test]
    fn memory_is_a_size_and_enough() {
        let load = |memory: &str| {
            let given = StorageArgs { memory: Some(memory.to_owned()), ..StorageArgs::default() };
            Config::load(None, &given).map(|config| config.memory().total).map_err(|error| error.to_string())
        };
        assert_eq!((load("2GiB"), load("512 MB"), load("300000000")), (Ok(2 << 30), Ok(512_000_000), Ok(300_000_000)));
        assert_eq!(load("1MiB"), Err("--memory must be at least 256.0 MiB, not 1MiB".into()));
        assert_eq!(load("much"), Err("--memory must be a size such as 2GiB or 512MiB, not much".into()));
    }

    #[test]
    fn without_a_size_it_is_half_of_what_there_is() {
        let half = memory::available().map_or(DEFAULT_MEMORY, |bytes| bytes / 2).max(memory::MINIMUM);
        assert_eq!(Config::default().memory().total as u64, half);
    }

    #[test]
    fn development_mode_stays_on_loopback() {
        let given =
            ServeArgs { dev: Some(true), listen: Some(SocketAddr::from(([0, 0, 0, 0], 1))), ..ServeArgs::default() };
        assert!(Config::load(None, &given).expect_err("an open address").to_string().contains("--listen"));
        let admin_listen = Some(SocketAddr::from(([0, 0, 0, 0], 1)));
        let given = ServeArgs { dev: Some(true), admin_listen, ..ServeArgs::default() };
        assert!(Config::load(None, &given).expect_err("an open address").to_string().contains("--admin-listen"));
    }

    #[test]
    fn rates_come_from_the_settings_and_0_is_one_of_them() {
        let default = Config::load(None, &ServeArgs::default()).expect("the defaults are good");
        let rates = Rates { user_commands: 2_000, agent_commands: 20_000, tenant_commands: 0, tenant_bytes: 0 };
        assert_eq!((default.rates(), default.max_user_connections), (rates, 250));
        let given = ServeArgs {
            rate_user: Some(0),
            rate_agent: Some(9),
            rate_tenant: Some(8_000_000_000),
            rate_tenant_commands: Some(7),
            ..ServeArgs::default()
        };
        let rates = Rates { user_commands: 0, agent_commands: 9, tenant_commands: 7, tenant_bytes: 8_000_000_000 };
        assert_eq!(Config::load(None, &given).expect("good settings").rates(), rates);
    }

    #[test]
    fn a_user_may_connect_at_least_once() {
        let given = ServeArgs { max_user_connections: Some(0), ..ServeArgs::default() };
        let refused = Config::load(None, &given).expect_err("no user could connect");
        assert!(refused.to_string().contains("--max-user-connections"), "{refused}");
    }
}
