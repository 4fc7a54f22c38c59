//! The contract as machines read it: the documents that the server serves, what stands in them, and samples of it that the
//! schemas and the server's own types read alike.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use jsonschema::Validator;
use serde_json::value::RawValue;
use serde_json::{Map, Value, json};
use weft::edge::contract;
use weft::edge::routes::ROUTES;
use weft::protocol::batch::{BatchBody, BatchPublish};
use weft::protocol::custom::KindRecord;
use weft::protocol::event::LogEvent;
use weft::protocol::groups::{LeaseBody, SettleBody};
use weft::protocol::http::{PublishBody, ThreadBody};
use weft::protocol::kinds;
use weft::protocol::letters::{ActBody, NoteBody};
use weft::protocol::records::{
    DeadLetterRecord, LetterActRecord, LogCheckpointRecord, LogCreatedRecord, LogGenerationRecord, ReceiptRecord,
    TicketIssuedRecord, TicketUsedRecord,
};
use weft::protocol::work::{GroupRecord, GroupSettings, WorkLeasedRecord, WorkSettledRecord};
use weft::protocol::{command, error::Error, json as strict, schemas};

use super::run;
use crate::support::{LogKind, Server};

fn folder(inside: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("schemas").join(inside)
}

fn read(file: &str) -> Value {
    serde_json::from_str(&std::fs::read_to_string(folder(file)).unwrap()).unwrap()
}

fn members(value: &Value) -> BTreeSet<String> {
    value.as_object().unwrap().keys().cloned().collect()
}

#[tokio::test]
async fn the_server_serves_the_documents_that_are_kept_and_asks_for_no_token() {
    let server = Server::start(LogKind::embedded());
    let get = async |path: &str| {
        let reply = reqwest::get(format!("{}{path}", server.url)).await.unwrap();
        let kind = reply.headers()["content-type"].to_str().unwrap().to_owned();
        (reply.status().as_u16(), kind, reply.text().await.unwrap())
    };
    for (path, file, kind) in [
        ("/v1/openapi.json", "openapi.json", "application/json"),
        ("/v1/asyncapi.json", "asyncapi.json", "application/json"),
        ("/v1/schemas/http.publish", "http.publish.json", "application/schema+json"),
        ("/v1/schemas/frame.event.json", "frame.event.json", "application/schema+json"),
    ] {
        let (status, served_as, text) = get(path).await;
        assert_eq!((status, &*served_as), (200, kind), "{path}");
        assert!(text == std::fs::read_to_string(folder(file)).unwrap(), "{path}");
    }
    let (status, _, problem) = get("/v1/schemas/nothing").await;
    let problem: Value = serde_json::from_str(&problem).unwrap();
    assert_eq!((status, &problem["code"], &problem["field"]), (404, &json!("not_found"), &json!("name")));
    assert_eq!(get("/v1/openapi.json?pretty=true").await.0, 400);
}

#[test]
fn the_openapi_document_has_every_route_and_nothing_else() {
    let document = read("openapi.json");
    let mut operations = BTreeSet::new();
    for (path, methods) in document["paths"].as_object().unwrap() {
        for method in members(methods) {
            operations.insert((method.to_uppercase(), path.clone()));
        }
    }
    let routes = ROUTES.iter().map(|route| (route.method.to_string(), route.path.to_owned())).collect();
    assert_eq!(operations, routes);
}

#[test]
fn the_parameters_of_the_openapi_document_are_those_that_the_routes_read() {
    let mut documented = BTreeSet::new();
    for operation in contract::OPERATIONS {
        documented.extend(operation.parameters.iter().map(|name| (*name).to_owned()));
    }
    // Event streams take a ticket, which is a way to say who one is.
    documented.insert("ticket".to_owned());
    let mut read = BTreeSet::new();
    let edge = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/edge");
    for folder in ["export", "http", "http/runs", "sse", "ws"] {
        for file in std::fs::read_dir(edge.join(folder)).unwrap() {
            let file = file.unwrap().path();
            let Ok(text) = std::fs::read_to_string(&file) else { continue };
            let code = text.split("#[cfg(test)]").next().unwrap();
            let lists = code.match_indices(".query(&[").map(|(at, found)| at + found.len());
            let named = code.match_indices("const PARAMETERS: ").map(|(at, _)| at + code[at..].find('=').unwrap());
            for at in lists.chain(named) {
                let list = code[at..].trim_start_matches(|c: char| c != '"' && c != ']').split(']').next().unwrap();
                read.extend(list.split('"').skip(1).step_by(2).map(str::to_owned));
            }
        }
    }
    let headers = ["Idempotency-Key", "Last-Event-ID", "traceparent"];
    read.extend(headers.map(str::to_owned));
    assert_eq!(documented, read);
}

/// Names in the first column of the tables of a section of PROTOCOL.md.
fn documented(section: &str) -> BTreeSet<String> {
    let text = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/PROTOCOL.md")).unwrap();
    let section = text.split(&format!("\n{section}\n")).nth(1).unwrap().split("\n#").next().unwrap();
    let rows = section.lines().filter_map(|line| line.strip_prefix("| `")?.split('`').next());
    rows.map(str::to_owned).collect()
}

#[test]
fn the_asyncapi_document_has_every_command_and_frame_and_nothing_else() {
    let document = read("asyncapi.json");
    let messages = members(&document["components"]["messages"]);
    let of = |prefix: &str| -> BTreeSet<String> {
        messages.iter().filter_map(|name| name.strip_prefix(prefix).map(str::to_owned)).collect()
    };
    assert_eq!(of("command."), documented("### Client → server").into_iter().filter(|it| is_command(it)).collect());
    assert_eq!(of("frame."), documented("### Server → client"));
    let records = schemas::all().into_iter().filter(|(name, _)| name.starts_with("log.")).count();
    assert_eq!(of("log.").len(), records);
    let operations = members(&document["operations"]);
    assert!(of("command.").is_subset(&operations) && operations.contains("send"), "{operations:?}");
    assert_eq!(members(&document["channels"]["socket"]["messages"]).len(), of("command.").len() + of("frame.").len());
}

/// Tables of fields stand in the same section.
fn is_command(name: &str) -> bool {
    let refused = command::parse(&json!({"type": name}).to_string()).unwrap_err();
    refused.error.field.as_deref() != Some("type")
}

#[test]
fn the_documents_have_every_error_code_and_every_kind_and_nothing_else() {
    let text = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/PROTOCOL.md")).unwrap();
    let section = text.split("### Error codes, the same on every interface\n").nth(1).unwrap();
    let codes: BTreeSet<&str> =
        section.trim_start().split("\n\n").next().unwrap().split('`').skip(1).step_by(2).collect();
    for file in ["openapi.json", "asyncapi.json"] {
        let document = read(file);
        let listed = document["components"]["schemas"]["Code"]["enum"].as_array().unwrap();
        assert_eq!(listed.iter().map(|code| code.as_str().unwrap()).collect::<BTreeSet<_>>(), codes, "{file}");
    }

    // Each constant of a kind is that of an event, with a schema of its data, or of a record in the log.
    let source = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/protocol/kinds.rs")).unwrap();
    let constants = source.lines().filter_map(|line| line.strip_prefix("pub const ")?.split('"').nth(1));
    let records = ["ticket_", "letter_", "group_", "work_", "kind_"];
    let events: BTreeSet<String> =
        constants.filter(|kind| !records.iter().any(|of| kind.starts_with(of))).map(str::to_owned).collect();
    let document = read("asyncapi.json");
    let kinds_of = |message: &str| -> BTreeSet<String> {
        let parts = &document["components"]["messages"][message]["payload"]["allOf"][1]["oneOf"];
        parts
            .as_array()
            .unwrap()
            .iter()
            .filter_map(|it| it["properties"]["kind"]["const"].as_str())
            .map(str::to_owned)
            .collect()
    };
    assert_eq!(kinds_of("frame.event"), events);
    let published: BTreeSet<String> = events.into_iter().filter(|kind| kinds::classify(kind).is_ok()).collect();
    assert_eq!(kinds_of("command.publish"), published);
}

#[test]
fn all_references_in_the_documents_lead_somewhere() {
    for file in ["openapi.json", "asyncapi.json"] {
        let document = read(file);
        let text = document.to_string();
        let references: BTreeSet<&str> =
            text.split("\"$ref\":\"#").skip(1).map(|rest| rest.split('"').next().unwrap()).collect();
        assert!(references.len() > 50, "{file}");
        for reference in references {
            assert!(document.pointer(reference).is_some(), "{file}: {reference}");
        }
    }
}

#[test]
fn nothing_that_was_released_is_broken() {
    let mut released = Vec::new();
    for file in std::fs::read_dir(folder("released")).unwrap() {
        let path = file.unwrap().path();
        let Some(name) = path.file_name().unwrap().to_str().unwrap().strip_suffix(".json") else { continue };
        let schema = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        released.push((name.to_owned(), schema));
    }
    assert!(released.len() > 80, "the released contract is there");
    let breaks = contract::breaks(&released);
    assert!(breaks.is_empty(), "breaks what was released (docs/decisions/0085):\n{}", breaks.join("\n"));
}

#[test]
fn the_command_names_what_breaks_a_released_contract() {
    let released = folder("released");
    let (code, out, _) = run(&["schemas", "--check", released.to_str().unwrap()]);
    assert_eq!((code, &*out), (0, ""));

    let other = tempfile::tempdir().unwrap();
    let mut old = read("released/command.ping.json");
    old["properties"]["colour"] = json!({"type": "string"});
    std::fs::write(other.path().join("command.ping.json"), old.to_string()).unwrap();
    let (code, out, errors) = run(&["schemas", "--check", other.path().to_str().unwrap()]);
    assert_eq!((code, &*out), (1, "command.ping /colour: is no longer taken\n"));
    assert!(errors.contains("one thing breaks"), "{errors}");
}

/// Whether the server reads a text as what the schema of this name describes; `None` for what it only writes.
fn server_reads(name: &str, text: &str) -> Option<bool> {
    fn record<'a, T: serde::Deserialize<'a>>(text: &'a str) -> bool {
        strict::decode_bytes::<T>(text.as_bytes()).is_ok() && text.starts_with('{')
    }
    let body = |read: Result<(), Error>| read.is_ok();
    let batch = |text: &str| {
        let events = strict::decode::<BatchBody>(text)?.checked()?;
        events.iter().try_for_each(|event| BatchPublish::read(event.get()).map(drop))
    };
    let published = |text: &str| {
        let PublishBody { data, run, parent, .. } = strict::decode(text)?;
        command::check_content(data, None, run.as_deref(), parent)
    };
    Some(match name {
        _ if name.starts_with("command.") => {
            command::parse(text).is_ok_and(|command| command.name() == name.trim_start_matches("command."))
        }
        "http.publish" => body(published(text)),
        "http.publish-batch" => body(batch(text)),
        "http.thread" => body(strict::decode::<ThreadBody>(text).map(drop)),
        "http.group-settings" => body(strict::decode::<GroupSettings>(text).and_then(|it| it.check())),
        "http.lease" => body(strict::decode::<LeaseBody>(text).and_then(|it| it.checked().map(drop))),
        "http.settle" => body(strict::decode::<SettleBody>(text).map(drop)),
        "http.dead-letter-act" => body(strict::decode::<NoteBody>(text).map(drop)),
        "http.dead-letter-acts" => body(strict::decode::<ActBody>(text).map(drop)),
        "log.event" => record::<LogEvent>(text),
        "log.receipt" => record::<ReceiptRecord>(text),
        "log.dead-letter" => record::<DeadLetterRecord>(text),
        "log.letter-act" => record::<LetterActRecord>(text),
        "log.created" => record::<LogCreatedRecord>(text),
        "log.generation" => record::<LogGenerationRecord>(text),
        "log.checkpoint" => record::<LogCheckpointRecord>(text),
        "log.ticket-issued" => record::<TicketIssuedRecord>(text),
        "log.ticket-used" => record::<TicketUsedRecord>(text),
        "log.group" => record::<GroupRecord>(text),
        "log.kind" => record::<KindRecord>(text),
        "log.work-leased" => record::<WorkLeasedRecord>(text),
        "log.work-settled" => record::<WorkSettledRecord>(text),
        _ => return None,
    })
}

/// The sample with one thing changed: each field left out, and each with values of other types; and with a field more.
fn changed(sample: &Value) -> Vec<Value> {
    let fields = sample.as_object().unwrap();
    let with = |name: &str, value: Option<Value>| {
        let mut fields: Map<String, Value> = fields.clone();
        fields.remove(name);
        fields.extend(value.map(|value| (name.to_owned(), value)));
        Value::Object(fields)
    };
    let mut all = vec![with("no_such_field", Some(json!(1))), json!([sample]), json!("text"), json!(null)];
    for name in fields.keys() {
        all.push(with(name, None));
        for value in
            [json!([1]), json!({"no_such_field": 1}), json!(true), json!("x"), json!(-1), json!(2.5), json!(null)]
        {
            all.push(with(name, Some(value)));
        }
    }
    all
}

/// Which field the two may judge differently: what it may be is not said by its type alone.
fn is_looser(name: &str, field: &str) -> bool {
    matches!(
        (name, field),
        // What holds between fields, or has a grammar of its own, is in PROTOCOL.md.
        ("command.subscribe", "after" | "last" | "all" | "thread" | "confirm")
            | ("command.connect" | "command.refresh", "token")
            | ("http.settle", _)
            | ("log.kind", "schema")
    )
}

#[test]
fn samples_of_what_the_server_reads_are_read_alike_by_its_types_and_by_the_schemas() {
    let samples = read("samples/samples.json");
    let mut looked_at = 0;
    for (name, samples) in samples.as_object().unwrap() {
        let schema: Validator = jsonschema::draft202012::options()
            .should_validate_formats(true)
            .build(&read(&format!("{name}.json")))
            .unwrap();
        for sample in samples.as_array().unwrap() {
            assert!(schema.is_valid(sample), "{name}: {sample}");
            if server_reads(name, &sample.to_string()).is_none() {
                continue;
            }
            assert_eq!(server_reads(name, &sample.to_string()), Some(true), "{name}: {sample}");
            for other in changed(sample) {
                let differs = |field: &&String| sample.get(*field) != other.get(*field);
                let field = sample.as_object().unwrap().keys().find(differs);
                if field.is_some_and(|field| is_looser(name, field)) && other.is_object() {
                    continue;
                }
                let (by_schema, by_type) = (schema.is_valid(&other), server_reads(name, &other.to_string()));
                assert_eq!(Some(by_schema), by_type, "{name}: {other}");
                looked_at += 1;
            }
        }
    }
    assert!(looked_at > 1_000, "{looked_at}");
}

#[test]
fn samples_of_what_the_server_writes_are_all_there_and_lack_nothing() {
    let samples = read("samples/samples.json");
    for (name, _) in schemas::all() {
        let is_read = ["command.", "log."].iter().any(|prefix| name.starts_with(prefix));
        let is_body = contract::OPERATIONS.iter().any(|it| it.request() == Some(name));
        assert!(!(is_read || is_body) || samples.get(name).is_some(), "no sample of {name}");
    }
    let frames = samples["frame.server"].as_array().unwrap().iter().chain(samples["frame.event"].as_array().unwrap());
    let types: BTreeSet<String> = frames.map(|frame| frame["type"].as_str().unwrap().to_owned()).collect();
    assert_eq!(types, documented("### Server → client"));

    // Without a field that is always there, it is none.
    for (name, samples) in samples.as_object().unwrap() {
        let schema = jsonschema::validator_for(&read(&format!("{name}.json"))).unwrap();
        for sample in samples.as_array().unwrap() {
            let mut needed = 0;
            for field in members(sample) {
                let mut less = sample.clone();
                less.as_object_mut().unwrap().remove(&field);
                needed += usize::from(!schema.is_valid(&less));
            }
            let optional = [
                "http.thread",
                "http.group-settings",
                "http.group-pause",
                "http.lease",
                "http.settle",
                "http.dead-letter-act",
                "http.kind-schema",
            ];
            assert!(needed > 0 || optional.contains(&&**name), "{name}: {sample}");
        }
    }
    let raw = RawValue::from_string(samples["http.event"][0]["data"].to_string()).unwrap();
    assert!(kinds::check_data(kinds::classify("user_message").unwrap(), &raw).is_ok());
}
