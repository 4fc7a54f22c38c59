//! Whether this server still keeps what a released contract promised (docs/decisions/0085).

use std::collections::BTreeSet;

use serde_json::Value;

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

/// Paths, methods, parameters and answers that are gone, and parameters that are needed now.
fn operations(old: &Value, new: &Value) -> Vec<String> {
    let mut found = Vec::new();
    let members = |value: &Value| value.as_object().cloned().unwrap_or_default();
    for (path, methods) in members(&old["paths"]) {
        for (method, old) in members(&methods) {
            let at = format!("openapi {} {path}", method.to_uppercase());
            let new = &new["paths"][&path][&method];
            if new.is_null() {
                found.push(format!("{at} is gone"));
                continue;
            }
            let names = |operation: &Value| -> BTreeSet<(String, String)> {
                let text = |parameter: &Value, field: &str| parameter[field].as_str().unwrap_or_default().to_owned();
                let all = operation["parameters"].as_array().into_iter().flatten();
                all.map(|parameter| (text(parameter, "in"), text(parameter, "name"))).collect()
            };
            for (place, name) in names(&old).difference(&names(new)) {
                found.push(format!("{at}: the parameter {name} ({place}) is gone"));
            }
            for status in members(&old["responses"]).keys().filter(|status| new["responses"].get(status).is_none()) {
                found.push(format!("{at}: the answer {status} is gone"));
            }
            if new["requestBody"]["required"] == true && old["requestBody"]["required"] != true {
                found.push(format!("{at}: a body is needed now"));
            }
        }
    }
    found
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
}
