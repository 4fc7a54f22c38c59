//! A JSON Schema that a kind's data is checked against, and what may stand in one.
//!
//! What could make a check slow is refused when the schema is set: references that go in circles or out of the schema, keywords
//! whose check walks through all others again (`unevaluated…`), patterns that [`super::pattern`] refuses, and too much of
//! everything. What is left has a cost that is known before data is checked ([`super::cost`]).

use std::collections::HashMap;

use jsonschema::{PatternOptions, Validator};
use serde_json::value::RawValue;
use serde_json::{Map, Value, json};

use super::cost::{Amount, Applied, MAX_STEPS, Steps};
use super::{pattern, words};
use crate::protocol::custom::MAX_SCHEMA;
use crate::protocol::error::{Code, Error};
use crate::protocol::{json, strict};

/// How many schemas there may be in one, each counted as often as it is referred to.
const MAX_PARTS: u64 = 1_000;
/// How deep they may be nested, references included.
const MAX_DEPTH: usize = 32;
/// How many patterns a schema may have.
const MAX_PATTERNS: usize = 32;
/// What a match takes at least, and of each byte in sixteenths.
const MATCH: Steps = Steps { value: 12, byte: 8, object: 0, number: 0, hashed: 0 };
/// What it takes to see whether a number is a multiple: of one that is not whole, in fractions.
const WHOLE_MULTIPLE: u64 = 20;
const MULTIPLE: u64 = 400;

// What a schema that is ready takes in memory, in bytes: in any case, for each byte of its text, each schema in it, each pattern.
const LEAST: usize = 8 << 10;
const FOR_TEXT: usize = 32;
const FOR_PART: usize = 2 << 10;
const FOR_PATTERN: usize = 256 << 10;

const DRAFT: &str = "https://json-schema.org/draft/2020-12/schema";
const DEFINITIONS: &str = "#/$defs/";

/// What a keyword holds.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Holds {
    Schema,
    Schemas,
    /// Schemas by name.
    Named,
    /// A value that the check looks at.
    Value,
    /// What people read.
    Words,
}

#[rustfmt::skip]
const KEYWORDS: &[(&str, Holds)] = &[
    ("type", Holds::Value), ("enum", Holds::Value), ("const", Holds::Value), ("$ref", Holds::Value),
    ("properties", Holds::Named), ("patternProperties", Holds::Named), ("additionalProperties", Holds::Schema),
    ("propertyNames", Holds::Schema), ("required", Holds::Value), ("dependentRequired", Holds::Value),
    ("dependentSchemas", Holds::Named), ("minProperties", Holds::Value), ("maxProperties", Holds::Value),
    ("items", Holds::Schema), ("prefixItems", Holds::Schemas), ("contains", Holds::Schema),
    ("minContains", Holds::Value), ("maxContains", Holds::Value), ("uniqueItems", Holds::Value),
    ("minItems", Holds::Value), ("maxItems", Holds::Value),
    ("minLength", Holds::Value), ("maxLength", Holds::Value), ("pattern", Holds::Value),
    ("minimum", Holds::Value), ("maximum", Holds::Value), ("exclusiveMinimum", Holds::Value),
    ("exclusiveMaximum", Holds::Value), ("multipleOf", Holds::Value),
    ("allOf", Holds::Schemas), ("anyOf", Holds::Schemas), ("oneOf", Holds::Schemas), ("not", Holds::Schema),
    ("if", Holds::Schema), ("then", Holds::Schema), ("else", Holds::Schema), ("$defs", Holds::Named),
    ("$schema", Holds::Words), ("$comment", Holds::Words), ("title", Holds::Words), ("description", Holds::Words),
    ("default", Holds::Words), ("examples", Holds::Words), ("deprecated", Holds::Words), ("readOnly", Holds::Words),
    ("writeOnly", Holds::Words), ("format", Holds::Words),
];

fn holds(keyword: &str) -> Option<Holds> {
    KEYWORDS.iter().find(|(name, _)| *name == keyword).map(|(_, holds)| *holds)
}

/// A schema that is ready to check data.
pub struct Schema {
    validator: Validator,
    steps: Steps,
    bytes: usize,
}

impl Schema {
    /// Makes one ready that somebody wants to set, or says what is wrong with it and where. Takes up to some hundred
    /// milliseconds.
    pub fn compile(text: &str) -> Result<Schema, Error> {
        Schema::make(text, false)
    }

    /// Makes one ready that was set: its patterns were looked at then, which is most of the work. Takes milliseconds.
    pub fn of_log(text: &str) -> Result<Schema, Error> {
        Schema::make(text, true)
    }

    fn make(text: &str, trusts_patterns: bool) -> Result<Schema, Error> {
        if text.len() > MAX_SCHEMA {
            let why = format!("the schema has {} bytes, and may have {MAX_SCHEMA}", text.len());
            return Err(Error::new(Code::TooLarge, why).at("schema"));
        }
        json::check_contents(text).map_err(|why| Error::field("schema", format!("schema {why}")))?;
        let mut schema = strict::read(text).map_err(|at| fault("schema", &at, "stands twice"))?.value;
        if !schema.is_object() {
            return Err(Error::field("schema", "the schema must be an object"));
        }

        let walked = Walk { trusts_patterns, ..Walk::default() }.all(&schema)?;
        jsonschema::draft202012::meta::validate(&schema).map_err(|error| words::refusal("schema", &error))?;
        quieten(&mut schema);
        let patterns = PatternOptions::regex().size_limit(pattern::MAX_COMPILED).dfa_size_limit(pattern::CACHE);
        let built = jsonschema::draft202012::options()
            .should_validate_formats(false)
            .with_pattern_options(patterns)
            .build(&schema);
        let validator = built.map_err(|error| words::refusal("schema", &error))?;
        let Walked { applied, parts, patterns } = walked;
        let bytes = LEAST + FOR_TEXT * text.len() + FOR_PART * parts + FOR_PATTERN * patterns;
        Ok(Schema { validator, steps: applied.most(), bytes })
    }

    /// About what it takes in memory.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Refuses data that breaks it, by the first fault that is found.
    pub fn check(&self, data: &RawValue) -> Result<(), Error> {
        let read = strict::read(data.get()).map_err(|at| fault("data", &at, "stands twice"))?;
        let amount = Amount {
            values: read.values,
            objects: read.objects,
            numbers: read.numbers,
            bytes: data.get().len() as u64,
        };
        if self.steps.for_all(amount) > MAX_STEPS {
            let why = format!("data has {} values, too many to be checked against the schema of its kind", read.values);
            return Err(Error::new(Code::TooLarge, why).at("data"));
        }
        self.validator.validate(&read.value).map_err(|error| words::refusal("data", &error))
    }
}

/// Something is wrong at this place.
fn fault(of: &'static str, pointer: &str, what: &str) -> Error {
    let place = words::place(of, pointer);
    Error::field(place.clone(), format!("{place} {what}"))
}

/// What one schema comes to, with all that it refers to.
#[derive(Clone, Copy, Default)]
struct Size {
    parts: u64,
    depth: usize,
    applied: Applied,
}

/// What a whole schema comes to.
struct Walked {
    applied: Applied,
    parts: usize,
    patterns: usize,
}

enum Definition {
    /// It is being looked at: who refers to it now goes in a circle.
    Open,
    Known(Size),
}

/// A look at every schema in a schema.
#[derive(Default)]
struct Walk<'s> {
    definitions: Option<&'s Map<String, Value>>,
    known: HashMap<&'s str, Definition>,
    /// Where it is, as a JSON Pointer.
    at: String,
    /// In how many schemas it is, one inside the other.
    level: usize,
    patterns: usize,
    trusts_patterns: bool,
}

impl<'s> Walk<'s> {
    /// What there is in the schema, and what it takes, if it may be used.
    fn all(mut self, schema: &'s Value) -> Result<Walked, Error> {
        self.definitions = schema.get("$defs").and_then(Value::as_object);
        let size = self.schema(schema)?;
        // Those that nothing refers to are held to the same.
        for name in self.definitions.into_iter().flat_map(Map::keys) {
            self.definition(name)?;
        }
        Ok(Walked { applied: size.applied, parts: size.parts as usize, patterns: self.patterns })
    }

    fn fault(&self, what: &str) -> Error {
        fault("schema", &self.at, what)
    }

    /// The same one step further in.
    fn inside<T>(&mut self, part: &str, look: impl FnOnce(&mut Walk<'s>) -> Result<T, Error>) -> Result<T, Error> {
        let before = self.at.len();
        self.at.push('/');
        self.at.push_str(&strict::escaped(part));
        let found = look(self)?;
        self.at.truncate(before);
        Ok(found)
    }

    fn schema(&mut self, schema: &'s Value) -> Result<Size, Error> {
        if self.level == MAX_DEPTH {
            return Err(self.too_deep());
        }
        self.level += 1;
        let size = self.schema_here(schema)?;
        self.level -= 1;
        Ok(size)
    }

    fn too_deep(&self) -> Error {
        self.fault(&format!(
            "is nested too deep: a schema has up to {MAX_DEPTH} levels of schemas, references included"
        ))
    }

    fn schema_here(&mut self, schema: &'s Value) -> Result<Size, Error> {
        let here = Applied { here: Steps::per_value(1), ..Applied::default() };
        let mut size = Size { parts: 1, depth: 1, applied: here };
        let fields = match schema {
            Value::Bool(_) => return Ok(size),
            Value::Object(fields) => fields,
            _ => return Err(self.fault("must be a schema: an object, true or false")),
        };
        let (is_top, mut members) = (self.at.is_empty(), Members::default());
        for (keyword, value) in fields {
            let Keyword { own, schemas } = self.inside(keyword, |walk| walk.keyword(keyword, value, is_top))?;
            size.applied.here = size.applied.here.and(own);
            for it in &schemas {
                size.parts = size.parts.saturating_add(it.parts);
                size.depth = size.depth.max(it.depth + 1);
            }
            match keyword.as_str() {
                "$ref" | "allOf" | "anyOf" | "oneOf" | "not" | "if" | "then" | "else" | "dependentSchemas" => {
                    size.applied = schemas.iter().fold(size.applied, |all, it| all.and(it.applied));
                }
                _ => members.add(keyword, &schemas),
            }
        }
        size.applied.inside = size.applied.inside.and(members.most());
        if size.parts > MAX_PARTS {
            let what = format!("has more than {MAX_PARTS} schemas in it, each counted as often as it is referred to");
            return Err(self.fault(&what));
        }
        if size.depth > MAX_DEPTH {
            return Err(self.too_deep());
        }
        Ok(size)
    }

    fn keyword(&mut self, keyword: &'s str, value: &'s Value, is_top: bool) -> Result<Keyword, Error> {
        let Some(holds) = holds(keyword) else {
            if keyword.starts_with("x-") {
                return Ok(Keyword::default());
            }
            return Err(self.fault("is no keyword that is checked here; a note of your own begins with x-"));
        };
        let mut found = Keyword::default();
        match (keyword, holds) {
            ("$ref", _) => found.schemas.push(self.reference(value)?),
            // Each is looked at when it is referred to, or at the end.
            ("$defs", _) if is_top => {}
            ("$defs", _) => return Err(self.fault("may only stand at the top of the schema")),
            ("$schema", _) if value.as_str().map(|it| it.trim_end_matches('#')) != Some(DRAFT) => {
                return Err(self.fault(&format!("must be {DRAFT}")));
            }
            (_, Holds::Schema) => found.schemas.push(self.schema(value)?),
            (_, Holds::Schemas) => {
                found.schemas = self.list(value)?;
                // For what stands around it as well.
                found.own.value = 4;
            }
            (_, Holds::Named) => {
                found.schemas = self.named(keyword, value)?;
                found.own.object = 3 * found.schemas.len() as u64;
            }
            (_, Holds::Value) => found.own = self.own(keyword, value)?,
            (_, Holds::Words) => {}
        }
        Ok(found)
    }

    fn list(&mut self, value: &'s Value) -> Result<Vec<Size>, Error> {
        let Some(schemas) = value.as_array() else { return Err(self.fault("must be a list of schemas")) };
        let sizes = schemas.iter().enumerate();
        sizes.map(|(n, schema)| self.inside(&n.to_string(), |walk| walk.schema(schema))).collect()
    }

    fn named(&mut self, keyword: &str, value: &'s Value) -> Result<Vec<Size>, Error> {
        let Some(schemas) = value.as_object() else { return Err(self.fault("must be an object of schemas")) };
        let mut sizes = Vec::with_capacity(schemas.len());
        for (name, schema) in schemas {
            sizes.push(self.inside(name, |walk| {
                if keyword == "patternProperties" {
                    walk.pattern(name)?;
                }
                walk.schema(schema)
            })?);
        }
        Ok(sizes)
    }

    fn reference(&mut self, value: &'s Value) -> Result<Size, Error> {
        let name =
            value.as_str().and_then(|it| it.strip_prefix(DEFINITIONS)).filter(|it| !it.contains(['/', '%', '~']));
        let Some(name) = name else {
            return Err(self.fault("must be #/$defs/ and a name: a schema refers to nothing but its own definitions"));
        };
        self.definition(name)
    }

    /// What a definition comes to. It is looked at once, however often it is referred to.
    fn definition(&mut self, name: &'s str) -> Result<Size, Error> {
        match self.known.get(name) {
            Some(Definition::Known(size)) => return Ok(*size),
            Some(Definition::Open) => return Err(self.fault("goes in a circle: no schema may refer to itself")),
            None => {}
        }
        let Some(schema) = self.definitions.and_then(|all| all.get(name)) else {
            return Err(self.fault("refers to a definition that is not there"));
        };
        self.known.insert(name, Definition::Open);
        let from = std::mem::replace(&mut self.at, format!("/$defs/{}", strict::escaped(name)));
        let size = self.schema(schema)?;
        self.at = from;
        self.known.insert(name, Definition::Known(size));
        Ok(size)
    }

    fn pattern(&mut self, text: &str) -> Result<(), Error> {
        self.patterns += 1;
        if self.patterns > MAX_PATTERNS {
            return Err(self.fault(&format!("is one pattern too many: a schema has at most {MAX_PATTERNS}")));
        }
        if self.trusts_patterns {
            return Ok(());
        }
        pattern::check(text).map_err(|why| self.fault(&why))
    }

    /// What a keyword takes that looks at the value alone.
    fn own(&mut self, keyword: &str, value: &Value) -> Result<Steps, Error> {
        let length = value.as_array().map_or(0, Vec::len) as u64;
        Ok(match keyword {
            "pattern" => {
                self.pattern(value.as_str().unwrap_or_default())?;
                MATCH
            }
            "enum" | "const" => Steps { value: 1 + count(value) / 2, byte: 1 + length / 4, ..Steps::default() },
            "required" => Steps { object: 3 * length, ..Steps::default() },
            "dependentRequired" => Steps { object: 3 * count(value), ..Steps::default() },
            "uniqueItems" if *value == Value::Bool(true) => Steps { value: 1, hashed: 1, ..Steps::default() },
            "minLength" | "maxLength" => Steps { value: 1, byte: 1, ..Steps::default() },
            "multipleOf" => {
                Steps { number: if value.is_u64() { WHOLE_MULTIPLE } else { MULTIPLE }, ..Steps::default() }
            }
            _ => Steps::per_value(1),
        })
    }
}

/// What a keyword takes of the value itself, and the schemas that it holds.
#[derive(Default)]
struct Keyword {
    own: Steps,
    schemas: Vec<Size>,
}

/// What a schema takes of any one value inside, by the keyword that says so.
#[derive(Default)]
struct Members {
    /// A field has one name, and is either named or one of the others.
    named: Steps,
    others: Steps,
    patterns: Steps,
    names: Steps,
    /// An item has one place.
    first: Steps,
    rest: Steps,
    contains: Steps,
}

impl Members {
    fn add(&mut self, keyword: &str, schemas: &[Size]) {
        let each = schemas.iter().map(|it| it.applied.most());
        match keyword {
            "properties" => self.named = each.fold(self.named, Steps::or),
            "additionalProperties" => self.others = each.fold(self.others, Steps::and),
            "patternProperties" => {
                // Each name is matched once for its schema, and once more to see whether it is one of the others.
                self.patterns = each.fold(self.patterns, |all, it| all.and(it).and(MATCH).and(MATCH));
            }
            "propertyNames" => self.names = each.fold(Steps::per_value(10), Steps::and),
            "prefixItems" => self.first = each.fold(self.first, Steps::or),
            "items" => self.rest = each.fold(self.rest, Steps::and),
            "contains" => self.contains = each.fold(self.contains, Steps::and),
            _ => {}
        }
    }

    fn most(&self) -> Steps {
        let field = self.named.or(self.others).and(self.patterns).and(self.names);
        let item = self.first.or(self.rest).and(self.contains);
        field.or(item)
    }
}

/// How many values there are in one.
fn count(value: &Value) -> u64 {
    1 + match value {
        Value::Array(items) => items.iter().map(count).sum(),
        Value::Object(fields) => fields.values().map(count).sum(),
        _ => 0,
    }
}

/// Asks `anyOf`, `oneOf` and `not` by an `if`: the same comes of it, and the library neither collects all that is wrong with each
/// of the branches, which would take a multiple of the check itself and of the data, nor keeps a copy of what is in a `not`.
/// [`words`] knows by the refusal which of them it was.
fn quieten(schema: &mut Value) {
    let Value::Object(fields) = schema else { return };
    for (keyword, value) in fields.iter_mut() {
        match (holds(keyword), value) {
            (Some(Holds::Schema), value) => quieten(value),
            (Some(Holds::Schemas), Value::Array(schemas)) => schemas.iter_mut().for_each(quieten),
            (Some(Holds::Named), Value::Object(schemas)) => schemas.values_mut().for_each(quieten),
            _ => {}
        }
    }
    let mut take = |keyword: &str, instead: fn(Value) -> Value| fields.remove(keyword).map(instead);
    let quiet = [
        take("anyOf", |any| json!({"if": {"anyOf": any}, "else": false})),
        take("oneOf", |one| json!({"if": {"oneOf": one}, "else": {"not": {}}})),
        take("not", |not| json!({"if": not, "then": false})),
    ];
    let quiet: Vec<Value> = quiet.into_iter().flatten().collect();
    match fields.get_mut("allOf") {
        _ if quiet.is_empty() => {}
        Some(Value::Array(all)) => all.extend(quiet),
        _ => drop(fields.insert("allOf".to_owned(), Value::Array(quiet))),
    }
}

#[cfg(test)]
mod tests;
