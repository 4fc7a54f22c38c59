//! JSON in and out: reading that names the field at fault in plain words, and writing that cannot fail.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::error::Category;
use serde_json::value::{RawValue, to_raw_value};

use super::error::{Code, Error};

/// The text of a value.
///
/// A type fails to serialise only when a map's key is not a string, or when its own `Serialize` reports an error. No type
/// that Weft writes has either, so a failure is a mistake in the type, found by the first test that uses it. An empty text
/// in its place could become an empty durable record.
pub fn encode<T: Serialize + ?Sized>(value: &T) -> String {
    serde_json::to_string(value).expect("types of the protocol have string keys and no failing serialiser")
}

/// As [`encode_bytes`], into room for about so many bytes: a text that grows is copied again and again.
pub fn encode_into<T: Serialize + ?Sized>(bytes: usize, value: &T) -> Vec<u8> {
    let mut text = Vec::with_capacity(bytes);
    serde_json::to_writer(&mut text, value)
        .expect("types of the protocol have string keys and no failing serialiser, and a vector takes all it is given");
    text
}

/// As [`encode`], with white space for people.
pub fn encode_pretty<T: Serialize + ?Sized>(value: &T) -> String {
    serde_json::to_string_pretty(value).expect("types of the protocol have string keys and no failing serialiser")
}

/// As [`encode`], for where bytes are wanted.
pub fn encode_bytes<T: Serialize + ?Sized>(value: &T) -> Vec<u8> {
    serde_json::to_vec(value).expect("types of the protocol have string keys and no failing serialiser")
}

/// As [`encode`], for `data` that the server makes.
pub fn encode_raw<T: Serialize + ?Sized>(value: &T) -> Box<RawValue> {
    to_raw_value(value).expect("types of the protocol have string keys and no failing serialiser")
}

/// An object of one field whose value is passed on as it is. `json!` would read the value, and panic at what it cannot hold.
pub fn raw_object(name: &str, value: &RawValue) -> Box<RawValue> {
    encode_raw(&BTreeMap::from([(name, value)]))
}

/// An object with one field set. Where `object` is none (serde reads an array as a struct, too), only that field is kept.
pub fn with_field<T: Serialize + ?Sized>(object: &RawValue, name: &str, value: &T) -> Box<RawValue> {
    let mut fields: BTreeMap<String, Box<RawValue>> = serde_json::from_str(object.get()).unwrap_or_default();
    fields.insert(name.to_owned(), encode_raw(value));
    encode_raw(&fields)
}

/// Reads a JSON object strictly. An error names the field at fault and repeats what was sent where that is short.
pub fn decode<'a, T: Deserialize<'a>>(text: &'a str) -> Result<T, Error> {
    if !text.trim_ascii_start().starts_with('{') {
        return Err(Error::new(Code::BadRequest, "not a JSON object"));
    }
    serde_json::from_str(text).map_err(|error| explain::<T>(text, &error))
}

/// Reads `data` of an event that is in the log: whatever serde reads as this type, and an error as [`decode`] has it.
pub fn decode_data<'a, T: Deserialize<'a>>(data: &'a RawValue) -> Result<T, Error> {
    serde_json::from_str(data.get()).map_err(|error| in_data(explain::<T>(data.get(), &error)))
}

/// Reads a record's value, as bytes of the log: whatever serde reads as this type, and an error as [`decode`] has it.
pub fn decode_bytes<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T, Error> {
    serde_json::from_slice(bytes).map_err(|error| match std::str::from_utf8(bytes) {
        Ok(text) => explain::<T>(text, &error),
        Err(_) => Error::new(Code::BadRequest, "it is not UTF-8"),
    })
}

/// How deep arrays and objects of `data` may be nested.
pub const MAX_DEPTH: usize = 64;

/// Checks what the grammar of raw JSON leaves open and a reader may fail over: nesting, numbers that no 64-bit float
/// holds, and halves of surrogate pairs. `text` must be JSON already; one pass, without recursion.
pub fn check_contents(text: &str) -> Result<(), &'static str> {
    let bytes = text.as_bytes();
    let (mut at, mut depth) = (0, 0);
    while let Some(byte) = bytes.get(at) {
        match byte {
            b'"' => at = string_end(bytes, at + 1)?,
            b'{' | b'[' => {
                depth += 1;
                if depth > MAX_DEPTH {
                    return Err("is nested deeper than 64 levels");
                }
                at += 1;
            }
            b'}' | b']' => {
                depth -= 1;
                at += 1;
            }
            b'-' | b'0'..=b'9' => {
                let rest = &text[at..];
                let is_part = |c: char| c.is_ascii_digit() || matches!(c, '+' | '-' | '.' | 'e' | 'E');
                let number = &rest[..rest.find(|c| !is_part(c)).unwrap_or(rest.len())];
                if !number.parse::<f64>().is_ok_and(f64::is_finite) {
                    return Err("holds a number that is out of the range of a 64-bit float");
                }
                at += number.len();
            }
            _ => at += 1,
        }
    }
    Ok(())
}

/// The position after the quote that ends a string whose contents begin at `at`.
fn string_end(bytes: &[u8], mut at: usize) -> Result<usize, &'static str> {
    const BROKEN: &str = "holds a string that is not Unicode: half of a surrogate pair";
    let code_unit = |at: usize| {
        let digits = std::str::from_utf8(bytes.get(at..at + 4)?).ok()?;
        u16::from_str_radix(digits, 16).ok()
    };
    while let Some(byte) = bytes.get(at) {
        match (byte, bytes.get(at + 1)) {
            (b'"', _) => return Ok(at + 1),
            (b'\\', Some(b'u')) => match code_unit(at + 2) {
                Some(0xd800..=0xdbff) => {
                    let low = (bytes.get(at + 6..at + 8) == Some(b"\\u")).then(|| code_unit(at + 8)).flatten();
                    if !matches!(low, Some(0xdc00..=0xdfff)) {
                        return Err(BROKEN);
                    }
                    at += 12;
                }
                Some(0xdc00..=0xdfff) => return Err(BROKEN),
                _ => at += 6,
            },
            (b'\\', _) => at += 2,
            _ => at += 1,
        }
    }
    Ok(at)
}

/// An error about a field of `data`, by its path from the command's top.
pub fn in_data(error: Error) -> Error {
    let field = error.field.as_deref().map_or("data".to_owned(), |field| format!("data.{field}"));
    let message = match error.field.as_deref() {
        Some(inner) => error.message.replacen(inner, &field, 1),
        None => format!("data: {}", error.message),
    };
    Error { message: message.into(), ..error }.at(field)
}

/// What is wrong, in the words of the protocol and not in those of the library. Off the fast path: to learn which field
/// it is, the text is parsed once more.
fn explain<'a, T: Deserialize<'a>>(text: &'a str, error: &serde_json::Error) -> Error {
    if error.classify() != Category::Data {
        let why = format!("the JSON is not valid: line {}, column {}", error.line(), error.column());
        return Error::new(Code::BadRequest, why);
    }
    let said = error.to_string();
    // "… at line 1 column 20" says nothing about a text that a program wrote.
    let said = said.rsplit_once(" at line ").map_or(&*said, |(said, _)| said);
    for what in ["unknown field", "missing field", "duplicate field"] {
        let name = said.strip_prefix(what).and_then(|rest| rest.trim_start().strip_prefix('`')?.split('`').next());
        if let Some(name) = name {
            return Error::field(name.to_owned(), format!("{what} {name:.60}"));
        }
    }
    let mut deserializer = serde_json::Deserializer::from_str(text);
    let path = match serde_path_to_error::deserialize::<_, T>(&mut deserializer) {
        Err(error) => error.path().to_string(),
        Ok(_) => ".".to_owned(),
    };
    match path.as_str() {
        "." | "?" => Error::new(Code::BadRequest, in_plain_words("the value", said)),
        field => Error::field(field.to_owned(), in_plain_words(field, said)),
    }
}

/// serde's message about a value of the wrong type or out of range.
fn in_plain_words(field: &str, said: &str) -> String {
    if let Some(rest) = said.strip_prefix("unknown variant ") {
        let (sent, known) = rest.rsplit_once(", expected ").unwrap_or((rest, ""));
        let known = known.strip_prefix("one of ").unwrap_or(known).replace('`', "");
        return format!("{field} must be one of {known}, not {:.60}", sent.replace('`', ""));
    }
    let sent_and_wanted = said.strip_prefix("invalid type: ").or(said.strip_prefix("invalid value: "));
    let sent_and_wanted = sent_and_wanted.and_then(|rest| rest.rsplit_once(", expected "));
    match sent_and_wanted.and_then(|(sent, wanted)| Some((sent, wanted_words(wanted)?))) {
        Some((sent, wanted)) => format!("{field} must be {wanted}, not {}", sent_words(sent)),
        None => format!("{field} does not have one of the shapes that it may have"),
    }
}

/// `None` for what no type of the protocol wants: better no words than the library's.
fn wanted_words(wanted: &str) -> Option<&'static str> {
    Some(match wanted {
        "u64" | "u32" | "u16" | "u8" | "usize" => "a whole number, 0 or more",
        "i64" | "i32" => "a whole number",
        "f64" | "f32" => "a number",
        "a boolean" => "true or false",
        "a sequence" => "a list",
        "a string" | "a borrowed string" | "a character" => "a string",
        "a map" => "an object",
        _ if wanted.starts_with("struct ") || wanted.starts_with("internally tagged enum") => "an object",
        _ => return None,
    })
}

fn sent_words(sent: &str) -> String {
    match sent {
        "map" => "an object".to_owned(),
        "sequence" => "a list".to_owned(),
        "null" | "unit value" => "null".to_owned(),
        _ => {
            let value =
                ["boolean ", "integer ", "floating point ", "string "].iter().find_map(|it| sent.strip_prefix(*it));
            format!("{:.60}", value.unwrap_or(sent).replace('`', ""))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn a_field_is_set_or_replaced_and_the_others_stay_as_they_were() {
        let set = |object: &str| {
            let object: Box<RawValue> = serde_json::from_str(object).expect("JSON");
            with_field(&object, "content", "new").get().to_owned()
        };
        assert_eq!(set(r#"{"message":"m","n":1.50}"#), r#"{"content":"new","message":"m","n":1.50}"#);
        assert_eq!(set(r#"{"content":"old"}"#), r#"{"content":"new"}"#);
        assert_eq!(set(r#"["m"]"#), r#"{"content":"new"}"#);
    }

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Sample {
        #[expect(dead_code, reason = "only reading it matters")]
        number: Option<i64>,
        #[expect(dead_code, reason = "only reading it matters")]
        seq: Option<u64>,
        #[expect(dead_code, reason = "only reading it matters")]
        words: Option<Vec<String>>,
        #[expect(dead_code, reason = "only reading it matters")]
        level: Option<Level>,
        #[expect(dead_code, reason = "only reading it matters")]
        each: Option<BTreeMap<String, u64>>,
    }

    #[derive(Debug, Deserialize)]
    #[serde(rename_all = "snake_case")]
    enum Level {
        High,
        Low,
    }

    #[test]
    fn errors_name_the_field_in_plain_words_and_repeat_what_was_sent() {
        let cases = [
            (r#"{"number":"x"}"#, Some("number"), r#"number must be a whole number, not "x""#),
            (r#"{"number":1.5}"#, Some("number"), "number must be a whole number, not 1.5"),
            (r#"{"seq":-1}"#, Some("seq"), "seq must be a whole number, 0 or more, not -1"),
            (r#"{"seq":{}}"#, Some("seq"), "seq must be a whole number, 0 or more, not an object"),
            (r#"{"words":true}"#, Some("words"), "words must be a list, not true"),
            (r#"{"words":["a",5]}"#, Some("words[1]"), "words[1] must be a string, not 5"),
            (r#"{"level":"middle"}"#, Some("level"), "level must be one of high or low, not middle"),
            (r#"{"level":"a, expected b"}"#, Some("level"), "level must be one of high or low, not a, expected b"),
            (r#"{"seq":"on at line 5"}"#, Some("seq"), r#"seq must be a whole number, 0 or more, not "on at line 5""#),
            (r#"{"each":[]}"#, Some("each"), "each must be an object, not a list"),
            (r#"{"other":1}"#, Some("other"), "unknown field other"),
            (r#"{"seq":1,"seq":2}"#, Some("seq"), "duplicate field seq"),
            (r#"{"seq":1,}"#, None, "the JSON is not valid: line 1, column 10"),
            (r#"{seq:1}"#, None, "the JSON is not valid: line 1, column 2"),
            ("[1]", None, "not a JSON object"),
            ("", None, "not a JSON object"),
        ];
        for (text, field, message) in cases {
            let error = decode::<Sample>(text).expect_err(text);
            assert_eq!((error.field.as_deref(), &*error.message), (field, message), "{text}");
        }
    }

    #[test]
    fn contents_that_a_reader_could_fail_over_are_found() {
        let deep = |levels: usize| format!("{}1{}", "[".repeat(levels), "]".repeat(levels));
        let good = [
            r#"{"a":[1,-2.5e-3,"x\"]}[[",null,true],"b":{}}"#.to_owned(),
            r#""\u00e9 \ud83d\ude00 \\u""#.to_owned(),
            "1e308".to_owned(),
            "9".repeat(300),
            deep(64),
        ];
        for text in good {
            assert_eq!(check_contents(&text), Ok(()), "{text:.80}");
        }
        let bad = [
            ("1e400".to_owned(), "number"),
            ("[0,-1e999]".to_owned(), "number"),
            ("9".repeat(5_000), "number"),
            (deep(65), "nested"),
            (r#""\ud800""#.to_owned(), "surrogate"),
            (r#""\ud800\ud800""#.to_owned(), "surrogate"),
            (r#"{"\udc00":1}"#.to_owned(), "surrogate"),
        ];
        for (text, what) in bad {
            let why = check_contents(&text).expect_err(what);
            assert!(why.contains(what), "{why}: {text:.80}");
        }
    }

    #[test]
    fn a_value_that_nothing_can_read_is_passed_on_as_it_is() {
        let deep = format!("{}{}", "[".repeat(500), "]".repeat(500));
        for text in ["1e400", &deep] {
            let value = RawValue::from_string(text.to_owned()).expect("it is JSON");
            assert_eq!(raw_object("a", &value).get(), format!(r#"{{"a":{text}}}"#));
        }
    }

    #[test]
    fn a_record_of_the_log_is_refused_in_plain_words_too() {
        let why = |bytes: &[u8]| decode_bytes::<Sample>(bytes).expect_err("no sample").message.into_owned();
        assert_eq!(why(br#"{"seq":"x"}"#), r#"seq must be a whole number, 0 or more, not "x""#);
        assert_eq!(why(b"{"), "the JSON is not valid: line 1, column 1");
        assert_eq!(why(b"{\"\xff\":1}"), "it is not UTF-8");
    }

    #[test]
    fn an_error_in_data_is_named_from_the_top() {
        let error = in_data(decode::<Sample>(r#"{"seq":"x"}"#).expect_err("a string"));
        assert_eq!(error.field.as_deref(), Some("data.seq"));
        assert_eq!(error.message, r#"data.seq must be a whole number, 0 or more, not "x""#);
    }
}
