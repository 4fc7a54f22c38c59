//! What is wrong with data, or with a schema, in the words of the protocol: the place, and what must be there. Of what was sent
//! no more is repeated than the names on the way to the place.

use std::borrow::Cow;

use jsonschema::error::{TypeKind, ValidationErrorKind};
use jsonschema::{JsonType, ValidationError};
use serde_json::Value;

use crate::protocol::error::Error;
use crate::protocol::strict;

/// How much of a place is repeated, in characters.
const MAX_PLACE: usize = 256;
/// How much of a value or a name.
const MAX_SHOWN: usize = 60;

/// A place in `of`: that, and the JSON Pointer from there; a long one is cut off.
pub fn place(of: &str, pointer: &str) -> String {
    let place = format!("{of}{pointer}");
    match place.char_indices().nth(MAX_PLACE) {
        Some((end, _)) => format!("{}…", &place[..end]),
        None => place,
    }
}

/// The refusal of what has this fault. The field at fault is one that is missing or unknown, if that is what is wrong.
pub fn refusal(of: &str, error: &ValidationError<'_>) -> Error {
    let at = error.instance_path().as_str();
    let inner = |name: &str| place(of, &format!("{at}/{}", strict::escaped(name)));
    let (place, what) = match error.kind() {
        ValidationErrorKind::Required { property } => {
            (inner(property.as_str().unwrap_or_default()), "is missing".to_owned())
        }
        ValidationErrorKind::AdditionalProperties { unexpected } => {
            (inner(unexpected.first().map_or("", String::as_str)), "is a field that may not be there".to_owned())
        }
        ValidationErrorKind::PropertyNames { error } => {
            let name = shown(error.instance());
            (place(of, at), format!("may not have a field of the name {name}: it {}", wanted(error)))
        }
        _ => (place(of, at), wanted(error).into_owned()),
    };
    Error::field(place.clone(), format!("{place} {what}"))
}

/// What the value at fault must be.
fn wanted(error: &ValidationError<'_>) -> Cow<'static, str> {
    let at_least =
        |n: &u64, one: &str, many: &str| format!("must have at least {n} {}", if *n == 1 { one } else { many });
    let at_most =
        |n: &u64, one: &str, many: &str| format!("must have at most {n} {}", if *n == 1 { one } else { many });
    use ValidationErrorKind as Kind;
    let said = match error.kind() {
        Kind::Type { kind } => format!("must be {}, not {}", types(kind), type_of(error.instance())),
        Kind::Constant { expected_value } => format!("must be {}", shown(expected_value)),
        Kind::Enum { options } => format!("must be one of {}", options_shown(options)),
        Kind::Minimum { limit } => format!("must be at least {}", shown(limit)),
        Kind::Maximum { limit } => format!("must be at most {}", shown(limit)),
        Kind::ExclusiveMinimum { limit } => format!("must be more than {}", shown(limit)),
        Kind::ExclusiveMaximum { limit } => format!("must be less than {}", shown(limit)),
        Kind::MultipleOf { multiple_of } => format!("must be a multiple of {}", number(*multiple_of)),
        Kind::MinLength { limit } => at_least(limit, "character", "characters"),
        Kind::MaxLength { limit } => at_most(limit, "character", "characters"),
        Kind::MinItems { limit } => at_least(limit, "item", "items"),
        Kind::MaxItems { limit } => at_most(limit, "item", "items"),
        Kind::MinProperties { limit } => at_least(limit, "field", "fields"),
        Kind::MaxProperties { limit } => at_most(limit, "field", "fields"),
        Kind::Pattern { pattern } => format!("must match the pattern {}", cut(pattern)),
        Kind::UniqueItems => return Cow::Borrowed("must not have the same item twice"),
        Kind::Contains => return Cow::Borrowed("has too few or too many of the items that it must have"),
        Kind::FalseSchema => return Cow::Borrowed(of_false(error.schema_path().as_str())),
        Kind::AdditionalItems { limit } => format!("must have at most {limit} items"),
        // In the place of `oneOf`; there is no other.
        Kind::Not { .. } => return Cow::Borrowed("must have exactly one of the shapes that it may have"),
        _ => return Cow::Borrowed("does not have one of the shapes that it may have"),
    };
    Cow::Owned(said)
}

/// What is wrong where nothing fits: a schema that is `false` itself, or a branch of an `if`, which most of the time stands for
/// another keyword.
fn of_false(schema_path: &str) -> &'static str {
    match schema_path.rsplit('/').next() {
        Some("else") => "does not have one of the shapes that it may have",
        Some("then") => "has a shape that it may not have",
        _ => "may not be there",
    }
}

fn types(kind: &TypeKind) -> String {
    match kind {
        TypeKind::Single(one) => type_name(*one).to_owned(),
        TypeKind::Multiple(several) => several.iter().map(type_name).collect::<Vec<_>>().join(" or "),
    }
}

fn type_name(it: JsonType) -> &'static str {
    match it {
        JsonType::Array => "a list",
        JsonType::Boolean => "true or false",
        JsonType::Integer => "a whole number",
        JsonType::Null => "null",
        JsonType::Number => "a number",
        JsonType::Object => "an object",
        JsonType::String => "a string",
    }
}

fn type_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(true) => "true",
        Value::Bool(false) => "false",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

fn options_shown(options: &Value) -> String {
    const MOST: usize = 10;
    let all = options.as_array().map_or(&[][..], Vec::as_slice);
    let first = all.iter().take(MOST).map(shown).collect::<Vec<_>>().join(", ");
    if all.len() > MOST { format!("{first} and {} more", all.len() - MOST) } else { first }
}

/// As people write it: a whole one without its point, a small one with an exponent.
fn number(it: f64) -> String {
    if it.fract() == 0.0 { cut(&it.to_string()) } else { shown(&it.into()) }
}

fn shown(value: &Value) -> String {
    cut(&value.to_string())
}

fn cut(text: &str) -> String {
    match text.char_indices().nth(MAX_SHOWN) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}
