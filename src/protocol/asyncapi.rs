//! The AsyncAPI document: what goes over the WebSocket, and the log's topics, made of the schemas.

use serde_json::{Map, Value, json};

use super::components::Components;
use super::{kinds, schemas};

/// What a command is answered with, beside `error`.
const ANSWERS: &[(&str, &str)] = &[
    ("connect", "welcome"),
    ("refresh", "refreshed"),
    ("subscribe", "subscribed"),
    ("unsubscribe", "unsubscribed"),
    ("publish", "published"),
    ("ping", "pong"),
    ("consume", "consuming"),
    ("settle", "settled"),
];

/// The log's topics, and the records in each.
const TOPICS: &[(&str, &[&str])] = &[
    (
        "weft.events",
        &[
            "log.event",
            "log.ticket-issued",
            "log.ticket-used",
            "log.letter-act",
            "log.group",
            "log.kind",
            "log.work-leased",
            "log.work-settled",
            "log.work-overflowed",
            "log.work-paused",
            "log.created",
            "log.generation",
            "log.checkpoint",
        ],
    ),
    ("weft.receipts", &["log.receipt"]),
    ("weft.dead-letters", &["log.dead-letter", "log.letter-act"]),
];

/// AsyncAPI 3.0.
pub fn document() -> Value {
    let mut components = Components::default();
    let mut messages = Map::new();
    let commands = commands();
    for command in &commands {
        let name = format!("command.{command}");
        let mut payload = components.of(&name);
        if command == "publish" {
            let kinds = by_kind(&mut components, |kind| kinds::classify(kind).is_ok());
            payload = json!({"allOf": [payload, kinds]});
        }
        messages.insert(name, message(command, payload));
    }
    for (frame, schema) in frames() {
        let name = format!("frame.{frame}");
        let mut payload = components.add(&name, schema);
        if frame == "event" {
            payload = json!({"allOf": [payload, by_kind(&mut components, |_| true)]});
        }
        messages.insert(name, message(&frame, payload));
    }
    let socket: Map<String, Value> = messages.keys().map(|name| (name.clone(), to_message(name))).collect();
    for name in TOPICS.iter().flat_map(|(_, records)| *records) {
        let payload = components.of(name);
        messages.insert((*name).to_owned(), message(name, payload));
    }

    json!({
        "asyncapi": "3.0.0",
        "info": {
            "title": "Weft",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "What goes over Weft's WebSocket and into its log. What holds beyond these shapes is in \
                docs/PROTOCOL.md. Clients pass over fields and frames that they do not know.",
            "license": {"name": env!("CARGO_PKG_LICENSE")},
        },
        "defaultContentType": "application/json",
        "servers": {
            "weft": {"host": "localhost:8080", "protocol": "ws", "security": [{"type": "http", "scheme": "bearer"}]},
            "kafka": {"host": "localhost:9092", "protocol": "kafka"},
        },
        "channels": channels(socket),
        "operations": operations(&commands),
        "components": {"messages": messages, "schemas": components.into_schemas()},
    })
}

/// What `type` a command may have.
fn commands() -> Vec<String> {
    let names = schemas::all().into_iter().filter_map(|(name, _)| name.strip_prefix("command.").map(str::to_owned));
    names.collect()
}

/// The server's frames by their `type`, each a schema of its own.
fn frames() -> Vec<(String, Value)> {
    let mut all = Vec::new();
    for (name, schema) in schemas::all() {
        let schema = schema.to_value();
        match name {
            "frame.event" => all.push(("event".to_owned(), schema)),
            "frame.server" => {
                for mut frame in schema["oneOf"].as_array().cloned().unwrap_or_default() {
                    frame["$defs"] = schema["$defs"].clone();
                    let frame_type = frame["properties"]["type"]["const"].as_str().unwrap_or_default().to_owned();
                    all.push((frame_type, frame));
                }
            }
            _ => {}
        }
    }
    all
}

/// What `data` is for each kind.
fn by_kind(components: &mut Components, is_wanted: impl Fn(&str) -> bool) -> Value {
    let kinds = schemas::all().into_iter().filter_map(|(name, _)| name.strip_prefix("data."));
    let mut all: Vec<Value> = kinds
        .filter(|kind| is_wanted(kind))
        .map(|kind| json!({"properties": {"kind": {"const": kind}, "data": components.of(&format!("data.{kind}"))}}))
        .collect();
    all.push(json!({"properties": {"kind": {"type": "string", "pattern": "^x\\..", "maxLength": 128}}}));
    json!({"oneOf": all})
}

fn message(name: &str, payload: Value) -> Value {
    json!({"name": name, "payload": payload})
}

fn to_message(name: &str) -> Value {
    json!({"$ref": format!("#/components/messages/{name}")})
}

fn in_channel(channel: &str, message: &str) -> Value {
    json!({"$ref": format!("#/channels/{channel}/messages/{message}")})
}

fn channels(socket: Map<String, Value>) -> Value {
    let mut channels = json!({
        "socket": {
            "address": "/v1/ws",
            "servers": [{"$ref": "#/servers/weft"}],
            "description": "One JSON object a frame; a client's frame may also be an array of 1 to 1,000 commands.",
            "messages": socket,
        },
    });
    for (topic, records) in TOPICS {
        let messages: Map<String, Value> = records.iter().map(|name| ((*name).to_owned(), to_message(name))).collect();
        channels[*topic] = json!({
            "address": topic,
            "servers": [{"$ref": "#/servers/kafka"}],
            "description": "A topic of the log, with another prefix if `--topic-prefix` says so.",
            "messages": messages,
        });
    }
    channels
}

/// What the server takes and sends, as the server's own.
fn operations(commands: &[String]) -> Value {
    let mut operations = Map::new();
    for command in commands {
        let mut operation = json!({
            "action": "receive",
            "channel": {"$ref": "#/channels/socket"},
            "messages": [in_channel("socket", &format!("command.{command}"))],
        });
        if let Some((_, answer)) = ANSWERS.iter().find(|(asked, _)| asked == command) {
            let answers = [format!("frame.{answer}"), "frame.error".to_owned()];
            operation["reply"] = json!({
                "channel": {"$ref": "#/channels/socket"},
                "messages": answers.map(|name| in_channel("socket", &name)),
            });
        }
        operations.insert(command.clone(), operation);
    }
    let frames: Vec<Value> =
        frames().iter().map(|(frame, _)| in_channel("socket", &format!("frame.{frame}"))).collect();
    operations.insert(
        "send".to_owned(),
        json!({"action": "send", "channel": {"$ref": "#/channels/socket"}, "messages": frames}),
    );
    for (topic, records) in TOPICS {
        let messages: Vec<Value> = records.iter().map(|name| in_channel(topic, name)).collect();
        operations.insert(
            format!("append.{topic}"),
            json!({"action": "send", "channel": {"$ref": format!("#/channels/{topic}")}, "messages": messages}),
        );
    }
    // Other programs may write events, and nothing else.
    operations.insert(
        "read.weft.events".to_owned(),
        json!({
            "action": "receive",
            "channel": {"$ref": "#/channels/weft.events"},
            "messages": [in_channel("weft.events", "log.event")],
        }),
    );
    Value::Object(operations)
}
