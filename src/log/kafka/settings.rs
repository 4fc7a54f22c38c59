//! Settings of librdkafka that whoever runs Weft passes on to it: TLS, SASL, and what else a network asks for.
//!
//! Some of them decide whether an answered event is durable, once, in its order and read by every node. Those are Weft's
//! own, and refused here by name.

use std::collections::BTreeMap;
use std::fmt;

use rdkafka::config::ClientConfig;
use rdkafka::error::KafkaError;
use rdkafka::types::RDKafkaConfRes;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;

/// By their names. What is shown of them are the names: some values are secrets.
#[derive(Clone, Default, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct ClientSettings(BTreeMap<String, String>);

/// Settings that are Weft's own, or whose names begin so (with `.` or `_` at the end), and why.
const OWN: &[(&str, &str)] = &[
    ("bootstrap.servers", "--brokers says where the brokers are"),
    ("metadata.broker.list", "--brokers says where the brokers are"),
    ("enable.idempotence", "with it an event is appended once and in its order"),
    ("enable.gapless.guarantee", "with idempotence a record that fails does not end the producer"),
    ("acks", "an answered event is on all in-sync replicas"),
    ("request.required.acks", "an answered event is on all in-sync replicas"),
    ("message.timeout.ms", "a publish is answered within 5 s"),
    ("delivery.timeout.ms", "a publish is answered within 5 s"),
    ("partitioner", "a thread's events are in one partition, by murmur2 of its key"),
    ("transactional.id", "an event is durable by itself, without a transaction"),
    ("transaction.timeout.ms", "an event is durable by itself, without a transaction"),
    ("group.", "a node reads every partition, and its group is named after --node"),
    ("partition.assignment.strategy", "a node reads every partition"),
    ("enable.auto.commit", "a node reads on from the positions in its own store"),
    ("auto.commit.", "a node reads on from the positions in its own store"),
    ("enable.auto.offset.store", "a node reads on from the positions in its own store"),
    ("offset.store.", "a node reads on from the positions in its own store"),
    ("auto.offset.reset", "a position that is gone is an error: anything else would skip events"),
    ("isolation.level", "what a transaction has not committed is no event"),
    ("check.crcs", "a damaged record must not become an event"),
    ("enable.partition.eof", "a reader finds the end of a partition by itself"),
    ("allow.auto.create.topics", "Weft makes its topics itself, so that they keep what they are given"),
    ("test.mock.", "a log in memory keeps nothing"),
    ("enabled_events", "Weft listens to librdkafka through them"),
    ("log.queue", "Weft listens to librdkafka through it"),
    ("log_level", "WEFT_LOG_LEVEL says what is logged"),
];

/// Other names of settings to which Weft gives a value of its own: (the name Weft uses, the other one).
const ALIASES: [(&str, &str); 2] = [("linger.ms", "queue.buffering.max.ms"), ("compression.type", "compression.codec")];

/// Parts of the names of settings whose values are secrets.
const SECRET: [&str; 5] = ["password", "secret", "pem", "oauthbearer", "jaas"];

impl ClientSettings {
    /// From texts of the form `key=value`. The error never repeats what was given: it may be a secret.
    pub fn parse<'a>(pairs: impl IntoIterator<Item = &'a str>) -> Result<ClientSettings, String> {
        let mut settings = BTreeMap::new();
        for pair in pairs {
            let (key, value) =
                pair.split_once('=').ok_or("must be a name, = and a value, such as security.protocol=SASL_SSL")?;
            if settings.insert(key.trim().to_owned(), value.trim().to_owned()).is_some() {
                return Err(format!("{}: it is given twice", key.trim()));
            }
        }
        Ok(ClientSettings(settings))
    }

    /// From one text: a setting in each line, or, within a single line, with commas between them.
    pub fn parse_list(text: &str) -> Result<ClientSettings, String> {
        let separator = if text.contains('\n') { '\n' } else { ',' };
        ClientSettings::parse(text.split(separator).map(str::trim).filter(|pair| !pair.is_empty()))
    }

    /// These, and those of `self` that they do not name.
    pub fn overlaid_with(mut self, others: ClientSettings) -> ClientSettings {
        self.0.extend(others.0);
        self
    }

    /// What is Weft's own, what librdkafka does not know, and what it does not take; the error names the setting.
    pub fn check(&self) -> Result<(), String> {
        for (key, value) in &self.0 {
            if let Some(why) = why_own(key) {
                return Err(format!("{key}: Weft sets this itself ({why})"));
            }
            let refused = ClientConfig::new().set(key, value).create_native_config().err();
            match refused {
                None => {}
                Some(KafkaError::ClientConfig(RDKafkaConfRes::RD_KAFKA_CONF_UNKNOWN, ..)) => {
                    return Err(format!("{key}: librdkafka has no setting of this name"));
                }
                Some(KafkaError::ClientConfig(_, why, ..)) if !is_secret(key) => return Err(format!("{key}: {why}")),
                Some(_) => return Err(format!("{key}: librdkafka does not take this value")),
            }
        }
        Ok(())
    }

    /// Sets them in place of Weft's defaults.
    pub(super) fn apply(&self, client: &mut ClientConfig) {
        for (key, value) in &self.0 {
            if let Some((ours, _)) = ALIASES.iter().find(|(_, other)| other == key) {
                client.remove(ours);
            }
            client.set(key, value);
        }
    }

    pub(super) fn names(&self, key: &str) -> bool {
        self.0.contains_key(key)
    }
}

fn why_own(key: &str) -> Option<&'static str> {
    let is = |own: &str| key == own || own.ends_with('.') && key.starts_with(own);
    OWN.iter().find(|(own, _)| is(own)).map(|(_, why)| *why)
}

fn is_secret(key: &str) -> bool {
    SECRET.iter().any(|part| key.contains(part))
}

impl fmt::Debug for ClientSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

/// A list of `key=value`, or a table. In TOML a name with dots that stands without quotes is a table in a table: its parts
/// are put together again.
impl<'de> Deserialize<'de> for ClientSettings {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<ClientSettings, D::Error> {
        match Value::deserialize(from)? {
            Value::Array(list) => {
                let pairs: Option<Vec<&str>> = list.iter().map(Value::as_str).collect();
                ClientSettings::parse(pairs.ok_or_else(|| D::Error::custom("must be texts"))?).map_err(D::Error::custom)
            }
            table @ Value::Object(_) => {
                let mut settings = BTreeMap::new();
                flatten("", &table, &mut settings).map_err(D::Error::custom)?;
                Ok(ClientSettings(settings))
            }
            _ => Err(D::Error::custom("must be a table, or a list of texts")),
        }
    }
}

fn flatten(name: &str, value: &Value, into: &mut BTreeMap<String, String>) -> Result<(), String> {
    let text = match value {
        Value::Object(table) => {
            let inner = |key: &String| if name.is_empty() { key.clone() } else { format!("{name}.{key}") };
            return table.iter().try_for_each(|(key, value)| flatten(&inner(key), value, into));
        }
        Value::String(text) => text.clone(),
        Value::Bool(_) | Value::Number(_) => value.to_string(),
        Value::Null | Value::Array(_) => return Err(format!("{name}: must be a text, a number, true or false")),
    };
    into.insert(name.to_owned(), text);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(pair: &str) -> String {
        ClientSettings::parse([pair]).and_then(|settings| settings.check()).expect_err(pair)
    }

    #[test]
    fn what_weft_promises_cannot_be_set_away_and_the_error_says_why() {
        for own in [
            "enable.idempotence=false",
            "acks=1",
            "request.required.acks=0",
            "partitioner=random",
            "group.id=mine",
            "group.instance.id=mine",
            "enable.auto.commit=true",
            "auto.commit.interval.ms=5",
            "auto.offset.reset=latest",
            "isolation.level=read_uncommitted",
            "bootstrap.servers=here:1",
            "message.timeout.ms=0",
            "allow.auto.create.topics=true",
            "test.mock.num.brokers=3",
        ] {
            let (key, _) = own.split_once('=').expect("a pair");
            let why = refusal(own);
            assert!(why.starts_with(&format!("{key}: Weft sets this itself (")), "{why}");
        }
    }

    #[test]
    fn every_setting_of_weft_s_own_exists() {
        for (own, _) in OWN.iter().filter(|(own, _)| !own.ends_with('.')) {
            let error = ClientConfig::new().set(*own, "no such value").create_native_config().err();
            let unknown = matches!(error, Some(KafkaError::ClientConfig(RDKafkaConfRes::RD_KAFKA_CONF_UNKNOWN, ..)));
            assert!(!unknown, "{own}");
        }
    }

    #[test]
    fn a_setting_that_does_not_exist_is_named_and_so_is_a_value_that_is_refused() {
        assert_eq!(refusal("sasl.usrname=weft"), "sasl.usrname: librdkafka has no setting of this name");
        let why = refusal("security.protocol=TELNET");
        assert!(why.starts_with("security.protocol: ") && why.contains("TELNET"), "{why}");
        let why = refusal("ssl.truststore.location=/etc/trust.jks");
        assert!(why.contains("ssl.ca.location"), "{why}");
        assert!(refusal("security.protocol").starts_with("must be a name, = and a value"));
    }

    #[test]
    fn tls_and_sasl_are_built_in() {
        for good in ["security.protocol=SASL_SSL", "sasl.mechanism=SCRAM-SHA-512", "ssl.ca.location=/ca.pem"] {
            ClientSettings::parse([good]).expect("a pair").check().expect(good);
        }
        let features = ClientConfig::new().create_native_config().expect("a configuration").get("builtin.features");
        let features = features.expect("librdkafka tells them");
        for feature in ["ssl", "sasl_plain", "sasl_scram", "sasl_oauthbearer"] {
            assert!(features.split(',').any(|it| it.trim() == feature), "{feature} in {features}");
        }
    }

    #[test]
    fn no_secret_is_shown() {
        let settings = ClientSettings::parse(["sasl.password=hunter2", "client.id=x"]).expect("pairs");
        assert_eq!(format!("{settings:?}"), r#"{"client.id", "sasl.password"}"#);
        for pair in ["sasl.password=a\0b", "hunter2", "=hunter2", "sasl.oauthbearer.method=hunter2"] {
            let why = refusal(pair);
            assert!(!why.contains("hunter2") && !why.contains("a\0b"), "{why}");
        }
    }

    #[test]
    fn a_list_has_a_setting_a_line_or_commas_between_them() {
        let both = ClientSettings::parse(["security.protocol=SASL_SSL", "sasl.password=a,b=c"]).expect("pairs");
        let lines = "security.protocol=SASL_SSL\n  sasl.password=a,b=c\n\n";
        assert_eq!(ClientSettings::parse_list(lines), Ok(both));
        let two = ClientSettings::parse(["client.id=x", "client.rack=y"]).expect("pairs");
        assert_eq!(ClientSettings::parse_list(" client.id=x, client.rack=y,"), Ok(two));
        assert_eq!(ClientSettings::parse_list(""), Ok(ClientSettings::default()));
        let twice = ClientSettings::parse_list("client.id=x,client.id=y").expect_err("which one?");
        assert!(twice.starts_with("client.id: "), "{twice}");
    }

    #[test]
    fn a_table_may_have_its_names_with_quotes_or_without() {
        let settings =
            ClientSettings::parse(["ssl.ca.location=/ca", "socket.timeout.ms=5", "enable.metrics.push=false"])
                .expect("pairs");
        for text in [
            r#"{"ssl": {"ca": {"location": "/ca"}}, "socket.timeout.ms": 5, "enable.metrics.push": false}"#,
            r#"["ssl.ca.location=/ca", "socket.timeout.ms=5", "enable.metrics.push=false"]"#,
        ] {
            assert_eq!(serde_json::from_str::<ClientSettings>(text).expect(text), settings);
        }
        for text in ["5", "[1]", r#"{"client.id": [1]}"#] {
            assert!(serde_json::from_str::<ClientSettings>(text).is_err(), "{text}");
        }
        assert_eq!(serde_json::to_value(&settings).expect("a table")["ssl.ca.location"], "/ca");
    }

    #[test]
    fn what_is_given_takes_the_place_of_weft_s_default_by_any_name() {
        let mut client = ClientConfig::new();
        client.set("linger.ms", "0").set("compression.type", "lz4");
        let given = ClientSettings::parse(["queue.buffering.max.ms=5", "compression.type=zstd"]).expect("pairs");
        given.apply(&mut client);
        let native = client.create_native_config().expect("a configuration");
        assert_eq!(
            (native.get("linger.ms").as_deref(), native.get("compression.type").as_deref()),
            (Ok("5"), Ok("zstd"))
        );
    }
}
