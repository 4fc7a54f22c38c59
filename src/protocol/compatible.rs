//! Whether a schema still keeps what one of before it promised (docs/decisions/0085).
//!
//! Two directions. Of what the server *reads*, all that was taken has to be taken still. Of what it *writes*, all that is
//! sent now has to be something that a client of before could get, and nothing that it could rely on may be gone. Fields
//! that a client does not know are passed over, so new ones break nothing.
//!
//! What cannot be compared counts as a break: better one too many than one that nobody sees.

use std::collections::BTreeSet;

use serde_json::{Map, Value};

/// Who reads what the schema describes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// The server.
    Reads,
    /// Clients.
    Writes,
}

/// What says nothing of which values are valid.
const ANNOTATIONS: &[&str] =
    &["$schema", "$defs", "title", "description", "default", "examples", "format", "deprecated"];
const COMPARED: &[&str] = &[
    "$ref",
    "type",
    "const",
    "enum",
    "anyOf",
    "oneOf",
    "required",
    "properties",
    "additionalProperties",
    "unevaluatedProperties",
    "items",
    "pattern",
];
/// Bounds, and whether a larger one lets more through.
const BOUNDS: &[(&str, bool)] = &[
    ("minimum", false),
    ("minLength", false),
    ("minItems", false),
    ("maximum", true),
    ("maxLength", true),
    ("maxItems", true),
];
/// No schema of Weft's is as deep: one that refers to itself.
const MAX_DEPTH: usize = 24;

/// What the new schema breaks of the old one; each entry begins with the place.
pub fn breaks(old: &Value, new: &Value, direction: Direction) -> Vec<String> {
    let mut found = BTreeSet::new();
    let (wide, narrow) = match direction {
        Direction::Reads => (new, old),
        Direction::Writes => (old, new),
    };
    Comparison { wide, narrow, direction, found: &mut found }.compare(wide, narrow, "", 0);
    found.into_iter().collect()
}

/// Everything that `narrow` lets through has to be let through by `wide`.
struct Comparison<'a, 'f> {
    /// The roots, where definitions stand.
    wide: &'a Value,
    narrow: &'a Value,
    direction: Direction,
    found: &'f mut BTreeSet<String>,
}

impl<'a> Comparison<'a, '_> {
    fn say(&mut self, at: &str, what: impl AsRef<str>) {
        let at = if at.is_empty() { "/" } else { at };
        self.found.insert(format!("{at}: {}", what.as_ref()));
    }

    /// What the two are called in a message: before and now.
    fn words(&self) -> (&'static str, &'static str) {
        match self.direction {
            Direction::Reads => ("was taken", "is refused now"),
            Direction::Writes => ("is sent now", "was never sent before"),
        }
    }

    fn compare(&mut self, wide: &'a Value, narrow: &'a Value, at: &str, depth: usize) {
        let (wide, narrow) = (resolve(self.wide, wide), resolve(self.narrow, narrow));
        if depth > MAX_DEPTH {
            return self.say(at, "is nested too deeply to be compared");
        }
        let (wide_fields, narrow_fields) = match (wide, narrow) {
            (Value::Bool(true), _) | (_, Value::Bool(false)) => return,
            (Value::Object(wide), _) if !wide.keys().any(|name| !ANNOTATIONS.contains(&&**name)) => return,
            (Value::Object(wide), Value::Object(narrow)) => (wide, narrow),
            _ => {
                let (was, now) = self.words();
                return self.say(at, format!("any value {was}, and most {now}"));
            }
        };
        for fields in [wide_fields, narrow_fields] {
            let known = |name: &str| {
                ANNOTATIONS.contains(&name)
                    || COMPARED.contains(&name)
                    || BOUNDS.iter().any(|(bound, _)| *bound == name)
            };
            if let Some(name) = fields.keys().find(|name| !known(name)) {
                return self.say(at, format!("{name} cannot be compared"));
            }
        }

        match (alternatives(wide_fields).is_some(), alternatives(narrow_fields).is_some()) {
            (false, false) => {}
            // What stands beside them holds for each of them.
            (true, true) => self.compare_alternatives(wide, narrow, at, depth),
            (true, false) if wide_fields.contains_key("properties") => {
                return self.say(at, "fields beside alternatives cannot be compared");
            }
            (true, false) | (false, true) => return self.compare_alternatives(wide, narrow, at, depth),
        }
        self.compare_types(wide_fields, narrow_fields, at);
        self.compare_values(wide_fields, narrow_fields, at);
        self.compare_bounds(wide_fields, narrow_fields, at);
        self.compare_objects(wide_fields, narrow_fields, at, depth);
        self.compare_items(wide_fields, narrow_fields, at, depth);
    }

    /// Each alternative of the narrow one has to be within one of the wide one's.
    fn compare_alternatives(&mut self, wide: &'a Value, narrow: &'a Value, at: &str, depth: usize) {
        let (wides, narrows) = (each(wide), each(narrow));
        for one in &narrows {
            let own_tag = tag(self.narrow, one);
            let tagged = wides.iter().find(|wide| own_tag.is_some() && tag(self.wide, wide) == own_tag);
            let candidates = tagged.map_or(&wides[..], std::slice::from_ref);
            let tries: Vec<_> = candidates.iter().map(|wide| self.attempt(wide, one, at, depth)).collect();
            if tries.iter().any(BTreeSet::is_empty) {
                continue;
            }
            let (was, now) = self.words();
            match own_tag {
                Some(_) if tagged.is_some() => self.found.extend(tries.into_iter().flatten()),
                // A client passes over what it does not know by its tag.
                Some(_) if self.direction == Direction::Writes => {}
                Some(tag) => self.say(at, format!("{tag} {was}, and {now}")),
                None => self.say(at, format!("{} {was}, and {now}", name_of(one))),
            }
        }
        if self.direction == Direction::Writes {
            let sent: BTreeSet<_> = narrows.iter().filter_map(|one| tag(self.narrow, one)).collect();
            for gone in wides.iter().filter_map(|wide| tag(self.wide, wide)).filter(|tag| !sent.contains(tag)) {
                self.say(at, format!("{gone} is no longer sent"));
            }
        }
    }

    /// What is broken if these two are compared, by itself.
    fn attempt(&self, wide: &Value, narrow: &Value, at: &str, depth: usize) -> BTreeSet<String> {
        let mut found = BTreeSet::new();
        let (wide_root, narrow_root) = (self.wide, self.narrow);
        Comparison { wide: wide_root, narrow: narrow_root, direction: self.direction, found: &mut found }.compare(
            wide,
            narrow,
            at,
            depth + 1,
        );
        found
    }

    fn compare_types(&mut self, wide: &Map<String, Value>, narrow: &Map<String, Value>, at: &str) {
        let Some(may_be) = types(wide) else { return };
        let is = types(narrow).or_else(|| {
            let values = values(narrow)?;
            Some(values.iter().map(|value| type_of(value)).collect())
        });
        let (was, now) = self.words();
        let Some(is) = is else {
            return self.say(at, format!("any type {was}, and only {} are not {now}", list(&may_be)));
        };
        let fits = |kind: &&str| may_be.contains(*kind) || *kind == "integer" && may_be.contains("number");
        for kind in is.iter().filter(|kind| !fits(kind)) {
            self.say(at, format!("{kind} {was}, and {now}"));
        }
    }

    fn compare_values(&mut self, wide: &Map<String, Value>, narrow: &Map<String, Value>, at: &str) {
        let Some(may_be) = values(wide) else { return };
        let (was, now) = self.words();
        match values(narrow) {
            None => self.say(at, format!("any value {was}, and most {now}")),
            Some(is) => {
                for value in is.into_iter().filter(|value| !may_be.contains(value)) {
                    self.say(at, format!("{value} {was}, and {now}"));
                }
            }
        }
    }

    fn compare_bounds(&mut self, wide: &Map<String, Value>, narrow: &Map<String, Value>, at: &str) {
        for (name, larger_is_wider) in BOUNDS {
            let Some(limit) = wide.get(*name).and_then(Value::as_f64) else { continue };
            let within = narrow
                .get(*name)
                .and_then(Value::as_f64)
                .is_some_and(|own| if *larger_is_wider { own <= limit } else { own >= limit });
            if !within {
                self.say(at, format!("{name} is narrower: {limit}"));
            }
        }
        if let Some(pattern) = wide.get("pattern")
            && narrow.get("pattern") != Some(pattern)
        {
            self.say(at, "has another pattern");
        }
    }

    fn compare_objects(
        &mut self,
        wide: &'a Map<String, Value>,
        narrow: &'a Map<String, Value>,
        at: &str,
        depth: usize,
    ) {
        let (needed, there) = (required(wide), required(narrow));
        let what = match self.direction {
            Direction::Reads => "is needed now",
            Direction::Writes => "is no longer always there",
        };
        for name in needed.difference(&there) {
            self.say(&format!("{at}/{name}"), what);
        }

        let none = Map::new();
        let of = |fields: &'a Map<String, Value>| fields.get("properties").and_then(Value::as_object);
        let (wides, narrows) = (of(wide), of(narrow));
        for (name, inner) in narrows.into_iter().flatten() {
            let at = format!("{at}/{name}");
            match (wides.and_then(|all| all.get(name)), rest(wide)) {
                (Some(wide), _) => self.compare(wide, inner, &at, depth + 1),
                (None, Some(Value::Bool(false))) if self.direction == Direction::Reads => {
                    self.say(&at, "is no longer taken")
                }
                // Of what is sent it is new; of what is taken it has lost its meaning.
                (None, _) if self.direction == Direction::Writes => {}
                (None, _) => self.say(&at, "is no longer named"),
            }
        }
        for (name, inner) in wides.into_iter().flatten() {
            if narrows.unwrap_or(&none).contains_key(name) {
                continue;
            }
            let at = format!("{at}/{name}");
            match self.direction {
                Direction::Writes => self.say(&at, "is gone"),
                // An object that may have any further fields may have had this one, with any value.
                Direction::Reads if may_have_more(narrow) => self.compare(inner, &Value::Bool(true), &at, depth + 1),
                Direction::Reads => {}
            }
        }
        match (rest(wide), rest(narrow)) {
            (Some(Value::Bool(false)), Some(Value::Bool(false))) | (None | Some(Value::Bool(true)), _) => {}
            (Some(Value::Bool(false)), _) if self.direction == Direction::Writes || !is_object(narrow) => {}
            (Some(Value::Bool(false)), _) => self.say(at, "further fields are no longer taken"),
            (Some(wide), Some(narrow)) => self.compare(wide, narrow, &format!("{at}/*"), depth + 1),
            (Some(_), None) if !is_object(narrow) => {}
            (Some(wide), None) => self.compare(wide, &Value::Bool(true), &format!("{at}/*"), depth + 1),
        }
    }

    fn compare_items(&mut self, wide: &'a Map<String, Value>, narrow: &'a Map<String, Value>, at: &str, depth: usize) {
        let Some(items) = wide.get("items") else { return };
        let is_array = types(narrow).is_none_or(|types| types.contains("array"));
        if is_array {
            let own = narrow.get("items").unwrap_or(&Value::Bool(true));
            self.compare(items, own, &format!("{at}/[]"), depth + 1);
        }
    }
}

fn resolve<'a>(root: &'a Value, schema: &'a Value) -> &'a Value {
    let named = schema.get("$ref").and_then(Value::as_str).and_then(|reference| reference.strip_prefix("#/$defs/"));
    named.and_then(|name| root.get("$defs")?.get(name)).unwrap_or(schema)
}

fn alternatives(fields: &Map<String, Value>) -> Option<&Vec<Value>> {
    fields.get("oneOf").or_else(|| fields.get("anyOf"))?.as_array()
}

/// The alternatives of a schema, or itself.
fn each(schema: &Value) -> Vec<&Value> {
    schema.as_object().and_then(alternatives).map_or_else(|| vec![schema], |all| all.iter().collect())
}

/// What tells an alternative from the others: the one value that its `type` or `role` has.
fn tag<'a>(root: &'a Value, alternative: &'a Value) -> Option<&'a str> {
    let properties = resolve(root, alternative).get("properties")?;
    ["type", "role"].iter().find_map(|name| properties.get(name)?.get("const")?.as_str())
}

/// What an alternative without a tag is called.
fn name_of(alternative: &Value) -> String {
    let reference = alternative.get("$ref").and_then(Value::as_str).and_then(|it| it.rsplit('/').next());
    let of_types = || alternative.as_object().and_then(types).map(|types| list(&types));
    reference.map(str::to_owned).or_else(of_types).unwrap_or_else(|| "an alternative".to_owned())
}

fn types(fields: &Map<String, Value>) -> Option<BTreeSet<&str>> {
    match fields.get("type")? {
        Value::String(one) => Some(BTreeSet::from([&**one])),
        Value::Array(all) => Some(all.iter().filter_map(Value::as_str).collect()),
        _ => None,
    }
}

fn type_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(number) if number.is_f64() => "number",
        Value::Number(_) => "integer",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

fn values(fields: &Map<String, Value>) -> Option<Vec<&Value>> {
    match (fields.get("const"), fields.get("enum")) {
        (Some(one), _) => Some(vec![one]),
        (None, Some(all)) => Some(all.as_array()?.iter().collect()),
        (None, None) => None,
    }
}

fn required(fields: &Map<String, Value>) -> BTreeSet<&str> {
    fields.get("required").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str).collect()
}

/// What fields that are not named have to be.
fn rest(fields: &Map<String, Value>) -> Option<&Value> {
    fields.get("additionalProperties").or_else(|| fields.get("unevaluatedProperties"))
}

fn is_object(fields: &Map<String, Value>) -> bool {
    types(fields).is_none_or(|types| types.contains("object"))
}

fn may_have_more(fields: &Map<String, Value>) -> bool {
    is_object(fields) && rest(fields) != Some(&Value::Bool(false))
}

fn list(names: &BTreeSet<&str>) -> String {
    names.iter().copied().collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn object(properties: Value, required: Value, closed: bool) -> Value {
        json!({"type": "object", "properties": properties, "required": required, "additionalProperties": !closed})
    }

    /// What is broken of what is read, and of what is written.
    fn both(old: &Value, new: &Value) -> (Vec<String>, Vec<String>) {
        (breaks(old, new, Direction::Reads), breaks(old, new, Direction::Writes))
    }

    fn reads(old: Value, new: Value) -> Vec<String> {
        breaks(&old, &new, Direction::Reads)
    }

    fn writes(old: Value, new: Value) -> Vec<String> {
        breaks(&old, &new, Direction::Writes)
    }

    #[test]
    fn a_new_field_breaks_nothing_unless_it_is_needed() {
        let text = json!({"type": "string"});
        let old = object(json!({"a": text}), json!(["a"]), true);
        let optional = object(json!({"a": text, "b": text}), json!(["a"]), true);
        let needed = object(json!({"a": text, "b": text}), json!(["a", "b"]), true);
        assert_eq!(both(&old, &old), (vec![], vec![]));
        assert_eq!(both(&old, &optional), (vec![], vec![]));
        assert_eq!(both(&old, &needed), (vec!["/b: is needed now".to_owned()], vec![]));
        assert_eq!(both(&optional, &old), (vec!["/b: is no longer taken".to_owned()], vec!["/b: is gone".to_owned()]));
        assert_eq!(writes(needed, optional), ["/b: is no longer always there"]);
    }

    #[test]
    fn what_is_taken_may_widen_and_what_is_sent_may_narrow() {
        let (one, two) = (json!({"type": "string"}), json!({"type": ["string", "null"]}));
        assert_eq!(both(&one, &two), (vec![], vec!["/: null is sent now, and was never sent before".to_owned()]));
        assert_eq!(both(&two, &one), (vec!["/: null was taken, and is refused now".to_owned()], vec![]));
        let (few, many) = (json!({"enum": ["a"]}), json!({"enum": ["a", "b"]}));
        assert_eq!(both(&few, &many), (vec![], vec!["/: \"b\" is sent now, and was never sent before".to_owned()]));
        assert_eq!(reads(many, few), ["/: \"b\" was taken, and is refused now"]);
        let (small, large) = (json!({"type": "integer", "maximum": 1}), json!({"type": "integer", "maximum": 2}));
        assert_eq!(reads(large.clone(), small.clone()), ["/: maximum is narrower: 1"]);
        assert_eq!(reads(small.clone(), large.clone()), Vec::<String>::new());
        assert_eq!(writes(small, large), ["/: maximum is narrower: 1"]);
        assert_eq!(
            reads(json!({"type": "string"}), json!({"type": "string", "pattern": "^a"})),
            ["/: has another pattern"]
        );
        assert_eq!(reads(json!(true), json!({"type": "string"})), ["/: any value was taken, and most is refused now"]);
    }

    #[test]
    fn a_frame_of_a_new_type_is_passed_over_and_one_that_is_gone_is_missed() {
        let frame = |name: &str, field: &str| {
            object(json!({"type": {"const": name}, "f": {"type": field}}), json!(["type", "f"]), false)
        };
        let old = json!({"oneOf": [frame("a", "string")]});
        let more = json!({"oneOf": [frame("a", "string"), frame("b", "string")]});
        let other = json!({"oneOf": [frame("a", "integer"), frame("b", "string")]});
        assert_eq!(writes(old.clone(), more.clone()), Vec::<String>::new());
        assert_eq!(writes(more.clone(), old.clone()), ["/: b is no longer sent"]);
        assert_eq!(writes(old.clone(), other), ["/f: integer is sent now, and was never sent before"]);
        assert_eq!(reads(more, old), ["/: b was taken, and is refused now"]);
    }

    #[test]
    fn references_and_lists_are_followed_and_named_by_their_place() {
        let schema = |kind: &str| {
            json!({
                "$defs": {"A": object(json!({"x": {"type": kind}}), json!([]), true)},
                "type": "object",
                "properties": {"list": {"type": "array", "items": {"anyOf": [{"$ref": "#/$defs/A"}, {"type": "null"}]}}},
            })
        };
        assert_eq!(reads(schema("string"), schema("string")), Vec::<String>::new());
        assert_eq!(reads(schema("string"), schema("integer")), ["/list/[]: A was taken, and is refused now"]);
    }

    #[test]
    fn an_object_that_took_any_field_may_not_choose_what_a_new_one_is() {
        let old = object(json!({}), json!([]), false);
        let typed = object(json!({"a": {"type": "string"}}), json!([]), false);
        let any = object(json!({"a": true}), json!([]), false);
        assert_eq!(reads(old.clone(), typed), ["/a: any value was taken, and most is refused now"]);
        assert_eq!(reads(old.clone(), any), Vec::<String>::new());
        assert_eq!(reads(old, object(json!({}), json!([]), true)), ["/: further fields are no longer taken"]);
    }

    #[test]
    fn what_is_not_understood_counts_as_a_break() {
        let old = json!({"type": "string"});
        assert_eq!(reads(old, json!({"type": "string", "not": {"const": "a"}})), ["/: not cannot be compared"]);
    }
}
