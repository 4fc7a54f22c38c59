//! Whether this server still keeps what a released contract promised (docs/decisions/0085).

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value};

use super::{Content, OPERATIONS, openapi};
use crate::protocol::compatible::{self, Direction};
use crate::protocol::schemas;

/// What breaks a released contract: its files by their names, without `.json`. Each entry names the schema and the place.
pub fn breaks(released: &[(String, Value)]) -> Vec<String> {
    let mut found = Vec::new();
    let own = schemas::all();
    for (name, old) in released {
        match (&**name, own.iter().find(|(own, _)| own == name)) {
            ("openapi", _) => found.extend(operations(old, &openapi::document())),
            // It says nothing that the schemas do not.
            ("asyncapi", _) => {}
            (_, None) => found.push(format!("{name}: the schema is gone")),
            (_, Some((_, new))) => {
                let new = new.clone().to_value();
                for direction in directions(name) {
                    let breaks = compatible::breaks(old, &new, direction);
                    found.extend(breaks.into_iter().map(|why| format!("{name} {why}")));
                }
            }
        }
    }
    found
}

/// Who reads what this schema describes.
fn directions(name: &str) -> Vec<Direction> {
    let written = OPERATIONS.iter().any(|it| it.request() == Some(name));
    let answered = OPERATIONS.iter().flat_map(|it| it.answers).any(|answer| match answer.content {
        Content::Json(schema) => schema == name,
        Content::OneOf(schemas) | Content::Events(schemas) => schemas.contains(&name),
        Content::Document(_) | Content::File(_) | Content::Text | Content::Nothing => false,
    });
    match name.split('.').next() {
        Some("command") => vec![Direction::Reads],
        // Records of before are read for ever, and by whoever else reads the log; data is published and delivered.
        Some("data" | "log") => vec![Direction::Reads, Direction::Writes],
        _ if written && answered => vec![Direction::Reads, Direction::Writes],
        _ if written => vec![Direction::Reads],
        _ => vec![Direction::Writes],
    }
}

/// Paths, methods, parameters and answers that are gone, parameters that are needed now, and bodies and answers that are other
/// schemas now.
fn operations(old: &Value, new: &Value) -> Vec<String> {
    let mut found = Vec::new();
    for (path, methods) in members(&old["paths"]) {
        for (method, old) in members(&methods) {
            let at = format!("openapi {} {path}", method.to_uppercase());
            let new = &new["paths"][&path][&method];
            if new.is_null() {
                found.push(format!("{at} is gone"));
                continue;
            }
            let (had, has) = (parameters(&old), parameters(new));
            for (place, name) in had.keys().filter(|it| !has.contains_key(it)) {
                found.push(format!("{at}: the parameter {name} ({place}) is gone"));
            }
            for ((place, name), _) in has.iter().filter(|(it, needed)| **needed && had.get(it) != Some(&true)) {
                found.push(format!("{at}: the parameter {name} ({place}) is needed now"));
            }
            for (status, old) in members(&old["responses"]) {
                let answer = format!("{at}: the answer {status}");
                match new["responses"].get(&status) {
                    Some(new) => found.extend(contents(&answer, (&old, new), Direction::Writes)),
                    None => found.push(format!("{answer} is gone")),
                }
            }
            let bodies = (&old["requestBody"], &new["requestBody"]);
            found.extend(contents(&format!("{at}: the body"), bodies, Direction::Reads));
            if new["requestBody"]["required"] == true && old["requestBody"]["required"] != true {
                found.push(format!("{at}: a body is needed now"));
            }
        }
    }
    found
}

/// Where an operation's parameters are, what they are called, and whether each is needed.
fn parameters(operation: &Value) -> BTreeMap<(String, String), bool> {
    let text = |parameter: &Value, field: &str| parameter[field].as_str().unwrap_or_default().to_owned();
    let all = operation["parameters"].as_array().into_iter().flatten();
    let place = |parameter: &Value| (text(parameter, "in"), text(parameter, "name"));
    all.map(|parameter| (place(parameter), parameter["required"] == true)).collect()
}

/// Which schemas a body or an answer was and is, by its content type. How each schema changes is compared by its name.
fn contents(what: &str, (old, new): (&Value, &Value), direction: Direction) -> Vec<String> {
    let mut found = Vec::new();
    for (content_type, old) in members(&old["content"]) {
        let Some(new) = new["content"].get(&content_type) else {
            found.push(format!("{what} ({content_type}) is gone"));
            continue;
        };
        let (had, has) = (names(&old["schema"]), names(&new["schema"]));
        match direction {
            Direction::Reads => {
                let gone = had.difference(&has);
                found.extend(gone.map(|name| format!("{what} ({content_type}) is no longer {name}")));
            }
            Direction::Writes => {
                let more = has.difference(&had);
                found.extend(more.map(|name| format!("{what} ({content_type}) is {name} now")));
            }
        }
    }
    found
}

/// The schemas that one refers to: itself, or as its alternatives.
fn names(schema: &Value) -> BTreeSet<&str> {
    let alternatives = schema["anyOf"].as_array().into_iter().flatten();
    let all = [schema].into_iter().chain(alternatives).filter_map(|it| it["$ref"].as_str());
    all.map(|name| name.rsplit('/').next().unwrap_or(name)).collect()
}

fn members(value: &Value) -> Map<String, Value> {
    value.as_object().cloned().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn own(name: &str) -> Value {
        let all = schemas::all();
        let (_, schema) = all.iter().find(|(own, _)| *own == name).expect("it is there");
        schema.clone().to_value()
    }

    fn broken(name: &str, old: Value) -> Vec<String> {
        breaks(&[(name.to_owned(), old)])
    }

    #[test]
    fn each_schema_keeps_what_it_says_itself_so_that_all_of_them_can_be_compared() {
        for (name, schema) in schemas::all() {
            assert_eq!(broken(name, schema.to_value()), Vec::<String>::new());
        }
        assert_eq!(broken("openapi", openapi::document()), Vec::<String>::new());
    }

    #[test]
    fn a_break_is_named_by_its_schema_and_its_place() {
        let mut old = own("command.publish");
        old["properties"]["colour"] = json!({"type": "string"});
        old["properties"]["kind"] = json!({"type": ["string", "integer"]});
        assert_eq!(
            broken("command.publish", old),
            [
                "command.publish /colour: is no longer taken",
                "command.publish /kind: integer was taken, and is refused now"
            ]
        );

        let mut old = own("frame.event");
        old["properties"]["colour"] = json!({"type": "string"});
        old["required"] = json!(["colour", "thread"]);
        assert_eq!(
            broken("frame.event", old),
            ["frame.event /colour: is gone", "frame.event /colour: is no longer always there"]
        );
        assert_eq!(broken("http.nothing", json!({})), ["http.nothing: the schema is gone"]);
    }

    #[test]
    fn a_path_a_parameter_or_an_answer_that_is_gone_is_a_break() {
        let mut old = openapi::document();
        old["paths"]["/v1/nothing"] = json!({"get": {}});
        let threads = &mut old["paths"]["/v1/threads"]["get"];
        threads["parameters"] = json!([{"in": "query", "name": "colour"}]);
        threads["responses"]["202"] = json!({});
        assert_eq!(
            broken("openapi", old),
            [
                "openapi GET /v1/nothing is gone",
                "openapi GET /v1/threads: the parameter colour (query) is gone",
                "openapi GET /v1/threads: the answer 202 is gone",
            ]
        );
    }

    #[test]
    fn a_parameter_that_is_needed_now_is_a_break_whether_it_was_there_before_or_not() {
        let (mut without, mut optional) = (openapi::document(), openapi::document());
        let needed = |document: &mut Value| document["paths"]["/v1/search"]["get"]["parameters"].take();
        let mut parameters = needed(&mut optional);
        for parameter in parameters.as_array_mut().into_iter().flatten() {
            parameter["required"] = json!(false);
        }
        optional["paths"]["/v1/search"]["get"]["parameters"] = parameters;
        needed(&mut without);
        for old in [without, optional] {
            assert_eq!(broken("openapi", old), ["openapi GET /v1/search: the parameter q (query) is needed now"]);
        }
    }

    #[test]
    fn another_schema_of_a_body_or_an_answer_is_a_break_even_if_each_schema_stays_as_it_is() {
        let mut old = openapi::document();
        let group = &mut old["paths"]["/v1/groups/{group}"];
        let other =
            json!({"application/json": {"schema": {"$ref": "#/components/schemas/http.thread-list"}}, "x/y": {}});
        group["put"]["requestBody"]["content"] = other.clone();
        group["get"]["responses"]["200"]["content"] = other;
        assert_eq!(
            broken("openapi", old),
            [
                "openapi GET /v1/groups/{group}: the answer 200 (application/json) is http.group-detail now",
                "openapi GET /v1/groups/{group}: the answer 200 (x/y) is gone",
                "openapi PUT /v1/groups/{group}: the body (application/json) is no longer http.thread-list",
                "openapi PUT /v1/groups/{group}: the body (x/y) is gone",
            ]
        );
    }
}
