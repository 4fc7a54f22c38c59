//! Reads `weft.toml` key by key, so that an error names the file, the line, the key and what its value must be.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value};
use toml::Spanned;

use super::{Config, ConfigError, fields};

/// How alike two keys are, from 0 to 1, for one to be suggested for the other.
const ALIKE: f64 = 0.8;
/// Characters of a value that are repeated in an error.
const SHOWN: usize = 40;

/// The settings of a file by their keys, each of them one that [`Config`] accepts.
pub(super) fn read(path: &Path) -> Result<Map<String, Value>, ConfigError> {
    let text =
        std::fs::read_to_string(path).map_err(|error| ConfigError::new(format!("{}: {error}", path.display())))?;
    parse(&text).map_err(|(at, why)| {
        let line = text[..at.min(text.len())].matches('\n').count() + 1;
        ConfigError::new(format!("{}, line {line}: {why}", path.display()))
    })
}

/// As [`read`], from the text; an error has the byte it is about.
fn parse(text: &str) -> Result<Map<String, Value>, (usize, String)> {
    let entries: BTreeMap<Spanned<String>, Spanned<toml::Value>> = toml::from_str(text).map_err(|error| {
        let at = error.span().map_or(0, |span| span.start);
        (at, error.message().replace('\n', ", "))
    })?;
    // In the file's order, so that the first mistake is the one that is reported.
    let mut entries: Vec<_> = entries.into_iter().collect();
    entries.sort_by_key(|(key, _)| key.span().start);

    let defaults = fields(&Config::default()).map_err(|error| (0, error.to_string()))?;
    let mut settings = Map::new();
    for (key, value) in entries {
        let at = key.span().start;
        let source = &text[value.span()];
        let (key, value) = (key.into_inner(), value.into_inner());
        let value = check(&defaults, &key, value, source).map_err(|why| (at, why))?;
        settings.insert(key, value);
    }
    Ok(settings)
}

/// The value of one key, if the settings would be good with this one changed.
fn check(defaults: &Map<String, Value>, key: &str, value: toml::Value, source: &str) -> Result<Value, String> {
    if !defaults.contains_key(key) {
        return Err(unknown(defaults, key));
    }
    let wrong_type = || format!("`{key}` must be {}{}", must_be(key), shown(key, &value, source));
    let value = serde_json::to_value(&value).map_err(|_| wrong_type())?;

    let mut settings = defaults.clone();
    settings.insert(key.to_owned(), value.clone());
    let config = Config::deserialize(Value::Object(settings)).map_err(|_| wrong_type())?;
    match config.check_each() {
        Ok(()) => Ok(value),
        Err((_, why)) => Err(format!("`{key}` {why}")),
    }
}

fn unknown(known: &Map<String, Value>, key: &str) -> String {
    let alike = |other: &str| strsim::jaro_winkler(key, other);
    let nearest = known.keys().max_by(|a, b| alike(a).total_cmp(&alike(b))).filter(|nearest| alike(nearest) >= ALIKE);
    match nearest {
        Some(nearest) => format!("unknown key `{key}`; did you mean `{nearest}`?"),
        None => format!("unknown key `{key}`"),
    }
}

/// What the value of a key must be, in words.
fn must_be(key: &str) -> &'static str {
    match key {
        "listen" | "admin_listen" | "dns_server" => r#"an address such as "127.0.0.1:8080""#,
        "log" => r#""embedded" or "kafka""#,
        "jwks_url" => r#"a list such as ["https://auth.example/keys"]"#,
        "webhook_kinds" => r#"a list such as ["user_message"]"#,
        "webhook_secret" => r#"a list such as ["whsec_..."]"#,
        "private_hosts" => r#"a list such as ["auth", "*.svc.cluster.local"]"#,
        "allow_origin" => r#"a list such as ["https://app.example"]"#,
        "memory" => r#"a size such as "2GiB""#,
        "run_stalled_after" => r#"a time such as "10m" or "90s""#,
        "kafka_config" => {
            r#"a table such as { "security.protocol" = "SASL_SSL" }, or a list such as ["security.protocol=SASL_SSL"]"#
        }
        "dev" => "true or false",
        "partitions" | "max_connections" | "max_user_connections" | "max_agent_connections" => {
            "a whole number, at least 1"
        }
        "rate_user" | "rate_agent" | "rate_tenant" | "rate_tenant_commands" => "a whole number, 0 for no limit",
        _ => "a string in quotes",
    }
}

/// What the file has instead, if it is short and no secret.
fn shown(key: &str, value: &toml::Value, source: &str) -> String {
    match value {
        _ if matches!(key, "jwt_secret" | "introspect_client_secret" | "webhook_secret" | "kafka_config") => {
            String::new()
        }
        toml::Value::Table(_) => ", not a table".to_owned(),
        _ if source.len() > SHOWN || source.contains('\n') => format!(", not this {}", value.type_str()),
        _ => format!(", not {source}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(text: &str) -> String {
        let (at, why) = parse(text).expect_err("a mistake");
        format!("{}: {why}", text[..at].matches('\n').count() + 1)
    }

    #[test]
    fn an_unknown_key_is_named_with_its_line_and_the_nearest_one() {
        let text = "# of this machine\nlog = \"kafka\"\npartitoins = 4\n";
        assert_eq!(refusal(text), "3: unknown key `partitoins`; did you mean `partitions`?");
        assert_eq!(refusal("max-connections = 1"), "1: unknown key `max-connections`; did you mean `max_connections`?");
        assert_eq!(refusal("colour = 1"), "1: unknown key `colour`");
    }

    #[test]
    fn a_value_of_the_wrong_type_says_what_it_must_be() {
        for (text, why) in [
            ("partitions = \"many\"", "`partitions` must be a whole number, at least 1, not \"many\""),
            ("partitions = -1", "`partitions` must be a whole number, at least 1, not -1"),
            ("rate_user = 1.5", "`rate_user` must be a whole number, 0 for no limit, not 1.5"),
            ("listen = \"here\"", "`listen` must be an address such as \"127.0.0.1:8080\", not \"here\""),
            ("log = \"redis\"", "`log` must be \"embedded\" or \"kafka\", not \"redis\""),
            ("dev = \"yes\"", "`dev` must be true or false, not \"yes\""),
            ("brokers = 9092", "`brokers` must be a string in quotes, not 9092"),
            ("allow_origin = \"*\"", "`allow_origin` must be a list such as [\"https://app.example\"], not \"*\""),
            ("[log]\nkind = 1", "`log` must be \"embedded\" or \"kafka\", not a table"),
            ("jwt_secret = 12345", "`jwt_secret` must be a string in quotes"),
            (
                "kafka_config = \"secret\"",
                "`kafka_config` must be a table such as { \"security.protocol\" = \"SASL_SSL\" }, or a list such as [\"security.protocol=SASL_SSL\"]",
            ),
            (
                "kafka_config = { acks = [1] }",
                "`kafka_config` must be a table such as { \"security.protocol\" = \"SASL_SSL\" }, or a list such as [\"security.protocol=SASL_SSL\"]",
            ),
            ("data = 1979-05-27", "`data` must be a string in quotes, not 1979-05-27"),
        ] {
            assert_eq!(refusal(text), format!("1: {why}"), "{text}");
        }
        let long = format!("partitions = \"{}\"", "x".repeat(100));
        assert_eq!(refusal(&long), "1: `partitions` must be a whole number, at least 1, not this string");
    }

    #[test]
    fn a_value_out_of_range_has_its_line_too() {
        assert_eq!(refusal("dev = true\npartitions = 0"), "2: `partitions` must be 1 to 10000, not 0");
        assert_eq!(
            refusal("\n\nrun_stalled_after = \"soon\""),
            "3: `run_stalled_after` must be a time such as 10m or 90s, not soon"
        );
        assert_eq!(
            refusal("dev = true\n[kafka_config]\nsasl.usrname = \"weft\""),
            "2: `kafka_config` sasl.usrname: librdkafka has no setting of this name"
        );
        assert_eq!(refusal("jwt_secret = \"short\""), "1: `jwt_secret` must be at least 32 bytes long, and has 5");
    }

    #[test]
    fn what_is_not_toml_has_its_line() {
        assert!(refusal("log = \"kafka\"\npartitions = = 3").starts_with("2: "));
        assert!(refusal("dev = true\ndev = false").starts_with("2: duplicate key"));
    }

    #[test]
    fn every_key_can_be_set() {
        let text = r#"
            listen = "127.0.0.1:1"
            admin_listen = "127.0.0.1:2"
            data = "d"
            log = "kafka"
            brokers = "b:1"
            partitions = 3
            topic_prefix = "p."
            kafka_config = { "security.protocol" = "SASL_SSL", "socket.timeout.ms" = 5000 }
            node = "n"
            memory = "2GiB"
            jwt_secret = "a secret that is long enough for it"
            jwt_key = "k.pem"
            jwt_issuer = "i"
            jwt_audience = "a"
            jwks_url = ["https://auth.example/keys"]
            introspect_url = "https://auth.example/introspect"
            introspect_client_id = "weft"
            introspect_client_secret = "s"
            webhook_url = "https://app.example/weft"
            webhook_kinds = ["agent_completed"]
            webhook_secret = ["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"]
            private_hosts = ["auth"]
            service_hosts = "services"
            dns_server = "127.0.0.1:53"
            allow_origin = ["https://app.example"]
            max_connections = 1
            max_user_connections = 2
            max_agent_connections = 3
            rate_user = 3
            rate_agent = 4
            rate_tenant = 8_000_000_000
            rate_tenant_commands = 6
            run_stalled_after = "90s"
            search = "german"
            dev = true
        "#;
        let read = parse(text).expect("good settings");
        let known = fields(&Config::default()).expect("settings are JSON");
        assert_eq!(read.keys().collect::<Vec<_>>(), known.keys().collect::<Vec<_>>());
        assert_eq!((&read["partitions"], &read["rate_tenant"]), (&Value::from(3), &Value::from(8_000_000_000u64)));
    }
}
