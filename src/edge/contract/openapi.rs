//! The OpenAPI document, made of the routes, their operations and the schemas.

use serde_json::{Map, Value, json};

use super::{Answer, Body, Content, OPERATIONS, Operation};
use crate::edge::http::search::{HITS, MAX_AROUND, MAX_HITS};
use crate::edge::routes::{Needs, ROUTES, Route};
use crate::protocol::command::MAX_SEARCH;
use crate::protocol::components::Components;

const DESCRIPTION: &str = "An event-sourced messaging backend for AI platforms. What holds beyond these shapes (rights, \
    sizes, the order of events) is in docs/PROTOCOL.md. Clients pass over fields that they do not know.";

/// What a backend is told.
pub(super) const WEBHOOK: &str = "http.webhook";

/// OpenAPI 3.1.
pub fn document() -> Value {
    let mut components = Components::default();
    let mut paths: Map<String, Value> = Map::new();
    for route in ROUTES {
        let found = OPERATIONS.iter().find(|it| it.method == route.method.as_str() && it.path == route.path);
        // A test finds one for each.
        let Some(operation) = found else { continue };
        let path = paths.entry(route.path).or_insert_with(|| json!({}));
        path[route.method.as_str().to_lowercase()] = describe(route, operation, &mut components);
    }
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Weft",
            "version": env!("CARGO_PKG_VERSION"),
            "description": DESCRIPTION,
            "license": {"name": env!("CARGO_PKG_LICENSE"), "identifier": env!("CARGO_PKG_LICENSE")},
        },
        "servers": [{"url": "/"}],
        "paths": paths,
        "webhooks": {"event": {"post": webhook(&mut components)}},
        "components": {
            "responses": {"problem": problem(&mut components)},
            "securitySchemes": {
                "token": {
                    "type": "http", "scheme": "bearer", "bearerFormat": "JWT",
                    "description": "Or a session of an auth service, where there is one: `Authorization: Session …`, or \
                        the cookie `weft_session`.",
                },
                "ticket": {
                    "type": "apiKey", "in": "query", "name": "ticket",
                    "description": "Good once, for 30 s, from `POST /v1/tickets`.",
                },
            },
            "schemas": components.into_schemas(),
        },
    })
}

/// What Weft asks of a backend (`--webhook-url`).
fn webhook(components: &mut Components) -> Value {
    let header = |name: &str, what: &str| json!({"name": name, "in": "header", "required": true, "description": what, "schema": {"type": "string"}});
    json!({
        "operationId": "tellOfEvent",
        "summary": "an event, told at least once, in the order of its thread",
        "parameters": [
            header("webhook-id", "The event's id: the same however often it is told."),
            header("webhook-timestamp", "When it was sent, in seconds since the Unix epoch."),
            header("webhook-signature", "As Standard Webhooks says: `v1,` and base64, of each secret, with spaces between."),
        ],
        "requestBody": {
            "required": true,
            "content": {"application/json": {"schema": components.of(WEBHOOK)}},
        },
        "responses": {
            "2XX": {"description": "The event is done."},
            "410": {"description": "The event is never wanted: it becomes a dead letter."},
            "default": {"description": "The event is told again."},
        },
    })
}

fn problem(components: &mut Components) -> Value {
    json!({
        "description": "A refusal. Its `code` says why, its `field` what is at fault.",
        "headers": {
            "Retry-After": {
                "description": "With `retry_after_ms`: the same in seconds.",
                "schema": {"type": "integer", "minimum": 0},
            },
        },
        "content": {"application/problem+json": {"schema": components.of("http.problem")}},
    })
}

fn describe(route: &Route, operation: &Operation, components: &mut Components) -> Value {
    let mut parameters: Vec<Value> =
        path_parameters(route.path).map(|name| parameter(route.path, "path", name)).collect();
    parameters.extend(operation.parameters.iter().map(|name| parameter(route.path, place_of(name), name)));
    let mut described = json!({
        "operationId": operation.id,
        "summary": operation.summary,
        "tags": [tag(route.path)],
        "parameters": parameters,
        "responses": responses(operation.answers, components),
        "security": security(route, operation),
    });
    if let Some(name) = operation.request() {
        described["requestBody"] = json!({
            "required": matches!(operation.body, Body::Required(_)),
            "content": {"application/json": {"schema": components.of(name)}},
        });
    }
    if let Some(scope) = scope(route.needs()) {
        described["description"] = format!("Needs scope `{scope}`.").into();
    }
    described
}

fn path_parameters(path: &'static str) -> impl Iterator<Item = &'static str> {
    path.split('/').filter_map(|part| part.strip_prefix('{')?.strip_suffix('}'))
}

/// What a route is about: the part of its path after the version.
fn tag(path: &str) -> &str {
    path.strip_prefix("/v1/").map_or("probes", |rest| rest.split('/').next().unwrap_or(rest))
}

fn scope(needs: Needs) -> Option<&'static str> {
    match needs {
        Needs::Nothing | Needs::Token => None,
        Needs::Read | Needs::Stream => Some("subscribe"),
        Needs::Agent => Some("agent"),
        Needs::Analyst => Some("analyst"),
        Needs::Admin => Some("admin"),
    }
}

fn security(route: &Route, operation: &Operation) -> Value {
    match route.needs() {
        // A socket may also say who it is in its first frame.
        Needs::Nothing if operation.parameters.contains(&"ticket") => json!([{"token": []}, {"ticket": []}, {}]),
        Needs::Nothing => json!([]),
        Needs::Stream => json!([{"token": []}, {"ticket": []}]),
        Needs::Token | Needs::Read | Needs::Agent | Needs::Analyst | Needs::Admin => json!([{"token": []}]),
    }
}

fn responses(answers: &[Answer], components: &mut Components) -> Value {
    let mut all = json!({"default": {"$ref": "#/components/responses/problem"}});
    for answer in answers {
        let schemas = |names: &[&'static str], components: &mut Components| {
            let schemas: Vec<Value> = names.iter().map(|name| components.of(name)).collect();
            json!({"anyOf": schemas})
        };
        let (kind, schema) = match answer.content {
            Content::Json(name) => ("application/json", components.of(name)),
            Content::OneOf(names) => ("application/json", schemas(names, components)),
            Content::Document(kind) => (kind, json!({"type": "object"})),
            Content::Text => ("text/plain", json!({"type": "string"})),
            // A stream as a whole is text; what the data of its events is stands beside it.
            Content::Events(_) => ("text/event-stream", json!({"type": "string"})),
            Content::File(kinds) => {
                let contents: Map<_, _> =
                    kinds.iter().map(|kind| ((*kind).to_owned(), json!({"schema": {"type": "string"}}))).collect();
                all[answer.status.to_string()] = json!({"description": words(answer.status), "content": contents});
                continue;
            }
            Content::Nothing => {
                all[answer.status.to_string()] = json!({"description": words(answer.status)});
                continue;
            }
        };
        let mut response = json!({"description": words(answer.status), "content": {kind: {"schema": schema}}});
        if let Content::Events(names) = answer.content {
            response["content"][kind]["x-event-data"] = schemas(names, components);
        }
        all[answer.status.to_string()] = response;
    }
    all
}

fn words(status: u16) -> &'static str {
    match status {
        101 => "The connection is a WebSocket from here on.",
        201 => "Made.",
        204 => "There is nothing more to come.",
        503 => "Not ready.",
        _ => "Done.",
    }
}

fn place_of(name: &str) -> &'static str {
    if matches!(name, "Idempotency-Key" | "Last-Event-ID" | "traceparent") { "header" } else { "query" }
}

fn parameter(path: &str, place: &str, name: &str) -> Value {
    let (schema, description) = match (place, path) {
        ("path", _) => in_path(name),
        (_, "/v1/search") => in_search(name),
        _ => in_request(name),
    };
    let required = place == "path" || name == "q";
    json!({"name": name, "in": place, "required": required, "schema": schema, "description": description})
}

const THREAD: &str = "^([A-Za-z0-9][A-Za-z0-9._:-]{0,127}|@me|@tenant|@user:[!-.0-~]{1,128})$";
const NAME: &str = "^[!-.0-~]{1,128}$";

fn in_path(name: &str) -> (Value, &'static str) {
    match name {
        "thread" => {
            (json!({"type": "string", "pattern": THREAD}), "A thread: its id, `@me`, `@tenant` or another's inbox.")
        }
        "user" => (json!({"type": "string", "pattern": NAME}), "A user."),
        "group" => (json!({"type": "string", "pattern": NAME}), "A group."),
        "kind" => (json!({"type": "string", "pattern": "^x\\..+$", "maxLength": 128}), "A custom kind, x.<name>."),
        "run" => (json!({"type": "string", "minLength": 1, "maxLength": 128}), "A run."),
        "id" => (json!({"type": "string", "format": "uuid"}), "A dead letter."),
        "name" => (json!({"type": "string", "minLength": 1}), "A schema's name, such as `http.publish`."),
        // A test finds words for each.
        _ => (json!({"type": "string"}), ""),
    }
}

/// Those of a search that other routes do not have, or have with other values.
fn in_search(name: &str) -> (Value, &'static str) {
    let number = |least: usize, most: usize, default: usize| json!({"type": "integer", "minimum": least, "maximum": most, "default": default});
    match name {
        "q" => (
            json!({"type": "string", "maxLength": MAX_SEARCH}),
            "All these words; `\"a phrase\"`, `pre*`, `-not`, `OR`, `field:word`.",
        ),
        "order" => (
            json!({"type": "string", "enum": ["newest", "relevance"], "default": "newest"}),
            "Newest first, or best first.",
        ),
        "around" => (number(0, MAX_AROUND, 0), "So many events before and after each, too."),
        "limit" => (number(1, MAX_HITS, HITS), "How many at most."),
        _ => in_request(name),
    }
}

fn in_request(name: &str) -> (Value, &'static str) {
    let text = || json!({"type": "string"});
    let number = |least: u64, most: u64, default: u64| json!({"type": "integer", "minimum": least, "maximum": most, "default": default});
    let seq = || json!({"type": "integer", "minimum": 0, "maximum": u64::MAX});
    let one_of = |words: [&str; 2]| json!({"type": "string", "enum": words, "default": words[0]});
    let time = || json!({"type": "string", "format": "date-time"});
    match name {
        "after" => (seq(), "Begin after this seq."),
        "before" => (seq(), "End before this seq."),
        "limit" => (number(1, 1_000, 100), "How many at most."),
        "cursor" => (text(), "`next` of the page before."),
        "kinds" => (text(), "Only these kinds, with commas between them."),
        "order" => (one_of(["asc", "desc"]), "Oldest or newest first."),
        "epoch" => (text(), "The log's epoch that the seqs are of."),
        "all" => (one_of(["false", "true"]), "Every thread of the tenant; needs scope `analyst`."),
        "state" => (one_of(["open", "waiting"]), "Those that are open, or those that wait for a person."),
        "for" => (json!({"type": "string", "enum": ["read", "write"]}), "Ready for one of the two alone."),
        "max_chars" => (number(1, 1_000_000, 1_000_000), "Characters at most."),
        "max_messages" => (number(1, 1_000, 100), "Messages at most."),
        "run" => (text(), "Only this run."),
        "user" => (json!({"type": "string", "pattern": NAME}), "Only this user's."),
        "reason" => (text(), "Only those with this reason."),
        "fingerprint" => {
            (json!({"type": "string", "pattern": "^[0-9a-f]{16}$"}), "Only those that are alike in this way.")
        }
        "thread" => (text(), "Only those of this thread."),
        "kind" => (text(), "Only those of this kind."),
        "group" => (text(), "Only those of this group."),
        "since" => (time(), "Only what is of then or later."),
        "until" => (time(), "Only what is from before."),
        "format" => (
            json!({"type": "string", "enum": ["jsonl", "csv", "otel", "chat"], "default": "jsonl"}),
            "What the file is made of.",
        ),
        "from" => (text(), "Only what this user published."),
        "mask" => (text(), "What is hidden: `email`, `phone`, `card`, and expressions, with commas between them."),
        "positions" => (text(), "Those of an export that is repeated, from its first line."),
        "note" => (json!({"type": "string", "maxLength": 1_000}), "Why, for those who read it later."),
        "ticket" => (text(), "Good once, in the place of a token."),
        "Idempotency-Key" => {
            (json!({"type": "string", "minLength": 1, "maxLength": 128}), "A publish with the same key is made once.")
        }
        "Last-Event-ID" => (text(), "As `after`, and goes before it: what a browser sends that comes back."),
        "traceparent" => (text(), "W3C trace context, kept with the event."),
        _ => (text(), ""),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_parameter_is_described() {
        let document = document();
        let methods = document["paths"].as_object().into_iter().flatten().flat_map(|(_, path)| path.as_object());
        let operations: Vec<_> = methods.flatten().collect();
        assert_eq!(operations.len(), ROUTES.len());
        for (_, operation) in operations {
            for parameter in operation["parameters"].as_array().into_iter().flatten() {
                assert!(!parameter["description"].as_str().unwrap_or_default().is_empty(), "{parameter}");
            }
        }
    }
}
