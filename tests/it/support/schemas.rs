//! Every frame and every body that a test gets is checked against `schemas/`, so that the whole suite is their test.
//!
//! A client may meet fields that it does not know, and the schemas allow them. Here a field that no schema names is a
//! failure: it would be one that nobody wrote down.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use jsonschema::Validator;
use serde_json::{Map, Value, json};
use weft::edge::contract::{self, Content};
use weft::protocol::error::Code;

/// Each schema by its name, and each frame of the server as `frame.<type>`.
static VALIDATORS: LazyLock<BTreeMap<String, Validator>> = LazyLock::new(|| {
    let mut schemas = BTreeMap::new();
    for (name, schema) in weft::protocol::schemas::all() {
        let mut schema = serde_json::to_value(schema).unwrap();
        // Publishers may add to the data of most kinds.
        if !name.starts_with("data.") {
            name_all_fields(&mut schema, false);
        }
        schemas.insert(name.to_owned(), schema);
    }
    // One for each type, so that a failure says what is wrong with the frame and not with all the types that it is not.
    let frames = schemas.remove("frame.server").unwrap();
    for mut frame in frames["oneOf"].as_array().unwrap().clone() {
        let name = format!("frame.{}", frame["properties"]["type"]["const"].as_str().unwrap());
        frame["$schema"] = frames["$schema"].clone();
        frame["$defs"] = frames["$defs"].clone();
        assert!(schemas.insert(name.clone(), frame).is_none(), "{name} is there twice");
    }
    schemas.into_iter().map(|(name, schema)| (name, validator(&schema))).collect()
});

fn validator(schema: &Value) -> Validator {
    jsonschema::draft202012::options().should_validate_formats(true).build(schema).unwrap()
}

/// Lets no object have a field that its schema does not name. `part`: the schema describes only some of an object's fields.
fn name_all_fields(schema: &mut Value, part: bool) {
    let Value::Object(fields) = schema else { return };
    let has_fields = fields.contains_key("properties");
    let has_parts = ["allOf", "anyOf", "oneOf", "$ref"].iter().any(|name| fields.contains_key(*name));
    for (name, inner) in fields.iter_mut() {
        match name.as_str() {
            "properties" | "$defs" => {
                inner.as_object_mut().unwrap().values_mut().for_each(|it| name_all_fields(it, false));
            }
            "allOf" | "anyOf" | "oneOf" => {
                inner.as_array_mut().unwrap().iter_mut().for_each(|it| name_all_fields(it, part || has_fields));
            }
            "items" | "additionalProperties" => name_all_fields(inner, false),
            _ => {}
        }
    }
    if has_fields && !part {
        let rest = if has_parts { "unevaluatedProperties" } else { "additionalProperties" };
        fields.entry(rest).or_insert(json!(false));
    }
}

/// Fails unless the value is what the schema of this name says.
pub fn check(name: &str, value: &Value) {
    let validator = VALIDATORS.get(name).unwrap_or_else(|| panic!("no schema {name} for {value}"));
    let errors: Vec<String> =
        validator.iter_errors(value).map(|error| format!("{}: {error}", error.instance_path())).collect();
    assert!(errors.is_empty(), "not what schema {name} says:\n{}\n{value}", errors.join("\n"));
}

/// Checks a frame of the server.
pub fn check_frame(frame: &Value) {
    let frame_type = frame["type"].as_str().unwrap_or_else(|| panic!("no type in {frame}"));
    check(&format!("frame.{frame_type}"), frame);
    if frame_type == "event" {
        check_data(frame);
    }
}

/// Checks an event as HTTP has it.
pub fn check_event(event: &Value) {
    check("http.event", event);
    check_data(event);
}

/// Checks an event's `data`; that of kinds `x.<name>` is whatever was published.
fn check_data(event: &Value) {
    let kind = event["kind"].as_str().unwrap_or_default();
    if !kind.starts_with("x.") {
        check(&format!("data.{kind}"), &event["data"]);
    }
}

/// Checks a command that the server has carried out.
pub fn check_command(command: &Value) {
    check(&format!("command.{}", command["type"].as_str().unwrap_or_default()), command);
}

/// Checks the body of a request that the server has carried out.
pub fn check_request(method: &str, path: &str, body: &Value) {
    let path = path.split('?').next().unwrap_or_default();
    let operation = contract::find(method, path).unwrap_or_else(|| panic!("no operation {method} {path}"));
    let name = operation.request().unwrap_or_else(|| panic!("no schema for the body of {method} {path}: {body}"));
    check(name, body);
}

/// The schema of an answer to a request that was no refusal, as the OpenAPI document has it.
fn schema_of_answer(method: &str, path: &str, status: u16, body: &Value) -> &'static str {
    let operation = contract::find(method, path);
    let answer = operation.and_then(|it| it.answers.iter().find(|answer| answer.status == status));
    match answer.map(|answer| answer.content) {
        Some(Content::Json(name)) => name,
        Some(Content::OneOf(names)) => names.iter().find(|name| VALIDATORS[**name].is_valid(body)).unwrap_or(&names[0]),
        _ => panic!("no schema for the answer {status} to {method} {path}: {body}"),
    }
}

/// Checks the body of an answer to a request.
pub fn check_body(method: &str, path: &str, status: u16, body: &Value) {
    let path = path.split('?').next().unwrap_or_default();
    let is_problem = status >= 400 && !(path == "/readyz" && status == 503);
    let name = if is_problem { "http.problem" } else { schema_of_answer(method, path, status, body) };
    check(name, body);
    if name == "http.problem" {
        assert_eq!(body["status"], json!(status), "{body}");
    }
    // A wrong method and an encoded body have statuses of their own and the code of a bad request.
    if name == "http.problem" && !matches!(status, 405 | 415) {
        let code: Code = serde_json::from_value(body["code"].clone()).unwrap();
        assert_eq!(code.status(), status, "{body}");
    }
    for event in events_of(body) {
        check_data(event);
    }
}

/// The events that a body of HTTP carries.
fn events_of(body: &Value) -> Vec<&Value> {
    let list = |name: &str| body[name].as_array().into_iter().flatten();
    let last = list("threads").map(|thread| &thread["last"]);
    let hits = list("hits").map(|hit| &hit["event"]);
    let around = list("hits").flat_map(|hit| hit["around"].as_array().into_iter().flatten());
    let others = last.chain(hits).chain(around).chain(list("work").map(|work| &work["event"]));
    list("events").chain(others).filter(|it| it.is_object()).collect()
}

#[test]
fn a_frame_with_a_field_that_nobody_wrote_down_is_found() {
    let mut pong = Map::new();
    pong.extend([("type".to_owned(), json!("pong")), ("id".to_owned(), json!(1)), ("at".to_owned(), json!("now"))]);
    check_frame(&Value::Object(pong.clone()));
    pong.insert("colour".into(), json!("red"));
    assert!(!VALIDATORS["frame.pong"].is_valid(&Value::Object(pong)));
}

#[test]
fn every_frame_of_the_protocol_has_a_schema() {
    // As docs/PROTOCOL.md lists them.
    for frame_type in [
        "welcome",
        "refreshed",
        "expiring",
        "subscribed",
        "event",
        "caught_up",
        "published",
        "position",
        "lagged",
        "signal",
        "unsubscribed",
        "pong",
        "error",
        "consuming",
        "work",
        "settled",
    ] {
        assert!(VALIDATORS.contains_key(&format!("frame.{frame_type}")), "{frame_type}");
    }
    assert_eq!(VALIDATORS.keys().filter(|name| name.starts_with("frame.")).count(), 16);
}

#[test]
fn the_schemas_of_data_refuse_what_the_server_refuses() {
    use serde_json::value::RawValue;
    use weft::protocol::kinds::{check_data, classify};
    let names = VALIDATORS.keys().filter_map(|name| name.strip_prefix("data."));
    let client_kinds: Vec<&str> = names.filter(|kind| classify(kind).is_ok()).collect();
    assert_eq!(client_kinds.len(), 14, "{client_kinds:?}");
    let texts = ["agent", "tool", "call", "reason", "code", "message"];
    for kind in client_kinds {
        let schema = &VALIDATORS[&format!("data.{kind}")];
        let mut cases = vec![json!({}), json!([]), json!("text"), json!(null)];
        for content in [json!("text"), json!([]), json!([{"type": "text", "text": "x"}]), json!([{}]), json!(1)] {
            cases.push(json!({"content": content}));
        }
        for left_out in texts {
            let all = texts.iter().filter(|name| **name != left_out).map(|name| ((*name).to_owned(), json!("x")));
            let mut data: Map<String, Value> = all.collect();
            cases.push(Value::Object(data.clone()));
            data.insert(left_out.to_owned(), json!(1));
            cases.push(Value::Object(data));
        }
        cases.push(json!({"message": "m", "from_char": 0, "text": "x"}));
        for data in cases {
            let raw: &RawValue = &RawValue::from_string(data.to_string()).unwrap();
            let accepted = check_data(classify(kind).unwrap(), raw).is_ok();
            assert_eq!(schema.is_valid(&data), accepted, "{kind}: {data}");
        }
    }
}
