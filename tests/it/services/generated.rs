//! What the documents allow is made at random and sent to a real server: requests from the OpenAPI document by schemathesis,
//! commands from the AsyncAPI document by proptest.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use jsonschema::Validator;
use proptest::prelude::*;
use proptest::sample::select;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;
use serde_json::{Map, Value, json};

use crate::support::{LogKind, Server, Socket, claims};

/// How many commands of each type are made.
const COMMANDS: usize = 40;

/// Where `scripts/setup.sh test` installs schemathesis.
fn schemathesis() -> PathBuf {
    let or_home = || std::env::var("XDG_CACHE_HOME").or_else(|_| std::env::var("HOME").map(|home| home + "/.cache"));
    let cache = std::env::var("WEFT_CACHE").or_else(|_| or_home().map(|cache| cache + "/weft")).unwrap();
    PathBuf::from(cache).join("tools/schemathesis/bin/schemathesis")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_made_from_the_openapi_document_find_no_failure() {
    let server = Server::start_unlimited(LogKind::embedded());
    let all = "publish subscribe agent broadcast analyst admin";
    let token = weft::auth::jwt::mint(crate::support::SECRET, &claims("contract-tester", all)).unwrap();
    let mut command = Command::new(schemathesis());
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/schemathesis");
    command.arg("--config-file").arg(tests.join("schemathesis.toml"));
    command.args(["run", &format!("{}/v1/openapi.json", server.url)]);
    command.args(["--header", &format!("Authorization: Bearer {token}")]);
    // The same at each run. Streams never end, a lease waits for as long as it is asked to, and a socket is no request.
    command.args(["--phases", "coverage,fuzzing", "--max-examples", "5", "--generation-deterministic"]);
    command.args([
        "--exclude-path-regex",
        "(/stream|/agui|/lease|/v1/ws)$",
        "--suppress-health-check",
        "all",
        "--warnings",
        "off",
    ]);
    let scratch = tempfile::tempdir().unwrap();
    command.current_dir(scratch.path());
    let ran = tokio::task::spawn_blocking(move || command.output());
    let output = ran.await.unwrap().expect("`scripts/setup.sh test` installs schemathesis");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.contains("No issues found"), "{text}");
    assert!(server.metric("weft_http_requests_total").await > 500.0, "they were asked");
    assert_eq!(server.metric("weft_panics_total").await, 0.0);
}

/// The AsyncAPI document.
struct Document(Value);

impl Document {
    fn served() -> Document {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("schemas/asyncapi.json");
        Document(serde_json::from_str(&std::fs::read_to_string(file).unwrap()).unwrap())
    }

    /// A validator for each message of the socket.
    fn validators(&self) -> BTreeMap<String, Validator> {
        let messages = self.0["channels"]["socket"]["messages"].as_object().unwrap();
        let validator = |name: &String| {
            let payload = json!({
                "$ref": format!("#/components/messages/{name}/payload"),
                "components": self.0["components"],
            });
            jsonschema::draft202012::options().build(&payload).unwrap()
        };
        messages.keys().map(|name| (name.clone(), validator(name))).collect()
    }

    /// The types of frames that answer a command.
    fn answers(&self, command: &str) -> Vec<String> {
        let messages = self.0["operations"][command]["reply"]["messages"].as_array();
        let name = |message: &Value| message["$ref"].as_str()?.rsplit("frame.").next().map(str::to_owned);
        messages.into_iter().flatten().filter_map(name).collect()
    }

    fn payload(&self, message: &str) -> BoxedStrategy<Value> {
        self.values(&self.0["components"]["messages"][message]["payload"])
    }

    /// Values that a schema allows.
    fn values(&self, schema: &Value) -> BoxedStrategy<Value> {
        let Value::Object(fields) = schema else { return any_json() };
        if let Some(reference) = fields.get("$ref") {
            return self.values(self.0.pointer(reference.as_str().unwrap().trim_start_matches('#')).unwrap());
        }
        if let Some(one) = fields.get("const") {
            return Just(one.clone()).boxed();
        }
        if let Some(all) = fields.get("enum") {
            return select(all.as_array().unwrap().clone()).boxed();
        }
        if let Some(parts) = fields.get("allOf") {
            let parts: Vec<_> = parts.as_array().unwrap().iter().map(|part| self.values(part)).collect();
            return parts.prop_map(merged).boxed();
        }
        if let Some(all) = fields.get("oneOf").or(fields.get("anyOf")) {
            return union(all.as_array().unwrap().iter().map(|one| self.values(one)));
        }
        match fields.get("type") {
            Some(Value::String(kind)) => self.of_type(kind, fields),
            Some(Value::Array(kinds)) => union(kinds.iter().map(|kind| self.of_type(kind.as_str().unwrap(), fields))),
            // A part of an object, of which another part says the type.
            _ if fields.contains_key("properties") => self.of_type("object", fields),
            _ => any_json(),
        }
    }

    fn of_type(&self, kind: &str, fields: &Map<String, Value>) -> BoxedStrategy<Value> {
        let bound = |name: &str| fields.get(name).and_then(Value::as_u64);
        match kind {
            "null" => Just(Value::Null).boxed(),
            "boolean" => any::<bool>().prop_map(Value::from).boxed(),
            "integer" => {
                let least = bound("minimum").unwrap_or(0);
                let most = bound("maximum").unwrap_or(least + 1_000);
                (least..=most).prop_map(Value::from).boxed()
            }
            "number" => {
                let bound = |name: &str, other| fields.get(name).and_then(Value::as_f64).unwrap_or(other);
                (bound("minimum", 0.0)..=bound("maximum", 1_000.0)).prop_map(Value::from).boxed()
            }
            "string" if fields.contains_key("pattern") => "x\\.[a-z]{1,8}".prop_map(Value::from).boxed(),
            "string" => {
                let (least, most) = (bound("minLength").unwrap_or(0), bound("maxLength").unwrap_or(12).min(12));
                proptest::string::string_regex(&format!("\\PC{{{least},{most}}}"))
                    .unwrap()
                    .prop_map(Value::from)
                    .boxed()
            }
            "array" => {
                let items = self.values(fields.get("items").unwrap_or(&Value::Bool(true)));
                let (least, most) =
                    (bound("minItems").unwrap_or(0) as usize, bound("maxItems").unwrap_or(3).min(3) as usize);
                proptest::collection::vec(items, least..=most).prop_map(Value::from).boxed()
            }
            "object" => self.objects(fields),
            other => panic!("say how a value of type {other} is made"),
        }
    }

    fn objects(&self, fields: &Map<String, Value>) -> BoxedStrategy<Value> {
        let none = Map::new();
        let properties = fields.get("properties").and_then(Value::as_object).unwrap_or(&none);
        let required: Vec<&str> =
            fields.get("required").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str).collect();
        let members: Vec<_> = properties
            .iter()
            .map(|(name, schema)| {
                let (name, values) = (name.clone(), self.values(schema));
                let is_needed = required.contains(&&*name) || fields.get("type").is_none();
                match is_needed {
                    true => values.prop_map(move |value| Some((name.clone(), value))).boxed(),
                    false => proptest::option::weighted(0.3, values)
                        .prop_map(move |value| Some((name.clone(), value?)))
                        .boxed(),
                }
            })
            .collect();
        members.prop_map(|members| Value::Object(members.into_iter().flatten().collect())).boxed()
    }
}

fn union(all: impl Iterator<Item = BoxedStrategy<Value>>) -> BoxedStrategy<Value> {
    proptest::strategy::Union::new(all).boxed()
}

/// The fields of all parts; the last one that has a field says what it is.
fn merged(parts: Vec<Value>) -> Value {
    let fields = parts.into_iter().filter_map(|part| part.as_object().cloned()).flatten();
    Value::Object(fields.collect())
}

fn any_json() -> BoxedStrategy<Value> {
    let text = "\\PC{0,8}".prop_map(Value::from);
    prop_oneof![Just(json!(null)), any::<i32>().prop_map(Value::from), text, Just(json!([])), Just(json!({"a": [1.5]}))]
        .boxed()
}

/// Reads frames, each of which is what the document says, up to the answer with this id.
async fn answer(socket: &mut Socket, id: i64, validators: &BTreeMap<String, Validator>) -> Value {
    loop {
        let frame = socket.recv_any().await;
        let name = format!("frame.{}", frame["type"].as_str().unwrap());
        assert!(validators[&name].is_valid(&frame), "{frame}");
        if frame["id"] == id {
            return frame;
        }
    }
}

#[tokio::test]
async fn commands_made_from_the_asyncapi_document_are_answered_as_it_says() {
    let (document, server) = (Document::served(), Server::start_unlimited(LogKind::embedded()));
    let validators = document.validators();
    let mut socket = server.connect_as("ada", "publish subscribe agent").await;
    assert_eq!(socket.say("t", "hello").await, 1);
    let (mut runner, mut id, mut carried_out) = (TestRunner::deterministic(), 1_000, 0);
    // Those that change who is connected end the session when the token is none.
    let names: Vec<&String> =
        validators.keys().filter(|name| !["command.connect", "command.refresh"].contains(&&***name)).collect();
    for name in names {
        let Some(command_type) = name.strip_prefix("command.") else { continue };
        let (commands, answers) = (document.payload(name), document.answers(command_type));
        for n in 0..COMMANDS {
            let mut command = commands.new_tree(&mut runner).unwrap().current();
            assert!(validators[name].is_valid(&command), "{command}");
            // Most names are of no thread, which is not what the rest of the command is about.
            if n % 4 > 0 && command.get("thread").is_some() {
                command["thread"] = json!("t");
            }
            id += 2;
            let with_id = !answers.is_empty();
            if with_id {
                command["id"] = json!(id);
                socket.send(&command).await;
                let answered = answer(&mut socket, id, &validators).await;
                let answered_as = answered["type"].as_str().unwrap().to_owned();
                assert!(answers.contains(&answered_as), "{command}: {answered}");
                carried_out += usize::from(answered_as != "error");
            } else {
                socket.send(&command).await;
            }

            // With one field that the document does not have it is refused, by that name.
            command["no_such_field"] = json!(n);
            assert!(!validators[name].is_valid(&command), "{command}");
            if with_id {
                command["id"] = json!(id + 1);
                socket.send(&command).await;
                let refused = answer(&mut socket, id + 1, &validators).await;
                assert_eq!((&refused["code"], &refused["field"]), (&json!("bad_request"), &json!("no_such_field")));
            }
        }
        // Those that are not answered did not end the session either.
        id += 2;
        socket.send(&json!({"type": "ping", "id": id})).await;
        assert_eq!(answer(&mut socket, id, &validators).await["type"], "pong");
    }
    assert!(carried_out > 40, "{carried_out}: pings are, and more than these");
    assert_eq!(server.metric("weft_panics_total").await, 0.0);
}
