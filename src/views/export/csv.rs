//! Events as rows of CSV (RFC 4180): every row has every column, quoted where it has to be.

use std::borrow::Cow;

use serde::Deserialize;
use serde_json::value::RawValue;

use crate::protocol::event::Fields;
use crate::protocol::kinds::text_of;

/// `text` is that of a message, `data` JSON. Of a note there is `type` and, as `data`, the note as in the other formats.
pub const COLUMNS: [&str; 14] = [
    "type", "thread", "seq", "kind", "event", "from", "at", "key", "run", "parent", "priority", "text", "hash", "data",
];

pub fn put_header(out: &mut String) {
    out.push_str(&COLUMNS.join(","));
    out.push_str("\r\n");
}

#[derive(Deserialize)]
struct Row<'a> {
    #[serde(borrow)]
    thread: Cow<'a, str>,
    seq: u64,
    #[serde(borrow)]
    kind: Cow<'a, str>,
    #[serde(borrow)]
    event: Cow<'a, str>,
    #[serde(borrow)]
    from: Cow<'a, str>,
    #[serde(borrow)]
    at: Cow<'a, str>,
    #[serde(borrow)]
    data: &'a RawValue,
    #[serde(borrow, default)]
    key: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    run: Option<Cow<'a, str>>,
    #[serde(default)]
    parent: Option<u64>,
    #[serde(borrow, default)]
    priority: Option<Cow<'a, str>>,
}

/// An event as a row. The server's own frames are always such; of any other text nothing is written.
pub fn put_event(out: &mut String, frame: &str, link: &[u8; 32]) {
    let Ok(row) = serde_json::from_str::<Row>(frame) else { return };
    let text = Fields::parse(row.data).and_then(|fields| text_of(fields.raw("content")?)).unwrap_or_default();
    let parent = row.parent.map(|seq| seq.to_string()).unwrap_or_default();
    let hash = blake3::Hash::from_bytes(*link).to_hex();
    let fields = [
        "event",
        &row.thread,
        &row.seq.to_string(),
        &row.kind,
        &row.event,
        &row.from,
        &row.at,
        row.key.as_deref().unwrap_or_default(),
        row.run.as_deref().unwrap_or_default(),
        &parent,
        row.priority.as_deref().unwrap_or_default(),
        &text,
        &hash,
        row.data.get(),
    ];
    for (at, field) in fields.iter().enumerate() {
        if at > 0 {
            out.push(',');
        }
        put_field(out, field);
    }
    out.push_str("\r\n");
}

fn put_field(out: &mut String, field: &str) {
    if !field.bytes().any(|byte| matches!(byte, b',' | b'"' | b'\r' | b'\n')) {
        return out.push_str(field);
    }
    out.push('"');
    out.push_str(&field.replace('"', "\"\""));
    out.push('"');
}

/// The fields of a row; `None` if it is no row as RFC 4180 has it.
pub fn fields(row: &str) -> Option<Vec<String>> {
    let mut rest = row.strip_suffix("\r\n")?;
    let mut fields = Vec::new();
    loop {
        let (field, after) = match rest.strip_prefix('"') {
            Some(quoted) => quoted_field(quoted)?,
            None => {
                let end = rest.find(',').unwrap_or(rest.len());
                (rest[..end].to_owned(), &rest[end..])
            }
        };
        if field.contains('"') && !rest.starts_with('"') {
            return None;
        }
        fields.push(field);
        match after.strip_prefix(',') {
            Some(next) => rest = next,
            None if after.is_empty() => return Some(fields),
            None => return None,
        }
    }
}

/// A field after its first quote, and what follows its last.
fn quoted_field(text: &str) -> Option<(String, &str)> {
    let mut field = String::new();
    let mut rest = text;
    loop {
        let end = rest.find('"')?;
        field.push_str(&rest[..end]);
        rest = &rest[end + 1..];
        match rest.strip_prefix('"') {
            Some(more) => {
                field.push('"');
                rest = more;
            }
            None => return Some((field, rest)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_has_every_column_and_is_read_back_as_it_was() {
        let frame = r#"{"type":"event","thread":"t","seq":7,"kind":"user_message","event":"e","from":"a,\"b","at":"now",
            "data":{"content":"one\ntwo, \"three\""},"parent":3,"priority":"high"}"#;
        let mut out = String::new();
        put_event(&mut out, frame, &[0; 32]);
        let zeros = "0".repeat(64);
        let expected = [
            "event",
            "t",
            "7",
            "user_message",
            "e",
            "a,\"b",
            "now",
            "",
            "",
            "3",
            "high",
            "one\ntwo, \"three\"",
            &zeros,
            r#"{"content":"one\ntwo, \"three\""}"#,
        ];
        assert_eq!(fields(&out).expect("a row"), expected);
        for broken in ["a,\"b\r\n", "a,b\"c\r\n", "\"a\"b\r\n", "a,b", "a,b\n"] {
            assert_eq!(fields(broken), None, "{broken:?}");
        }
    }
}
