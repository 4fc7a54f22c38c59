//! What of an event is searched: its texts, by field, and their words. Pure.

use serde_json::Value;
use serde_json::value::RawValue;

use super::words::{Stems, words};
use crate::protocol::event::StoredFrame;
use crate::protocol::kinds::{
    AGENT_CANCEL_REQUESTED, AGENT_CANCELLED, AGENT_COMPLETED, AGENT_FAILED, AGENT_MESSAGE, AGENT_RESUMED,
    AGENT_STARTED, AGENT_THINKING, AGENT_WAITING, SYSTEM_MESSAGE, THREAD_CREATED, THREAD_UPDATED, TOOL_COMPLETED,
    TOOL_EXECUTING, USER_MESSAGE,
};

/// A part of events that can be searched by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Field {
    Text,
    Tool,
    Arguments,
    Result,
    Title,
}

impl Field {
    pub const ALL: [Field; 5] = [Field::Text, Field::Tool, Field::Arguments, Field::Result, Field::Title];

    pub fn name(self) -> &'static str {
        match self {
            Field::Text => "text",
            Field::Tool => "tool",
            Field::Arguments => "arguments",
            Field::Result => "result",
            Field::Title => "title",
        }
    }

    pub fn named(name: &str) -> Option<Field> {
        Field::ALL.into_iter().find(|field| field.name() == name)
    }
}

/// One text of an event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    pub field: Field,
    pub text: String,
}

/// A word of an event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Token {
    pub field: Field,
    /// Counts on from piece to piece, with a gap between two.
    pub position: u32,
    pub exact: Box<str>,
    /// If it is another one than the word itself.
    stem: Option<Box<str>>,
}

impl Token {
    pub fn stem(&self) -> &str {
        self.stem.as_deref().unwrap_or(&self.exact)
    }
}

/// The texts of an event by its kind and data. Pieces of a message that is still being written are no events; the one that
/// closes it has all of its text.
pub fn pieces(kind: &str, data: &RawValue) -> Vec<Piece> {
    let mut pieces = Vec::new();
    let Ok(data) = serde_json::from_str::<Value>(data.get()) else { return pieces };
    let mut add = |field, name: &str| {
        if let Some(value) = data.get(name) {
            leaves(value, &mut |text| pieces.push(Piece { field, text }));
        }
    };
    match kind {
        USER_MESSAGE | SYSTEM_MESSAGE | AGENT_MESSAGE => content(&data["content"], &mut pieces),
        TOOL_EXECUTING => {
            add(Field::Tool, "tool");
            add(Field::Arguments, "arguments");
        }
        TOOL_COMPLETED => {
            add(Field::Result, "result");
            add(Field::Result, "error");
        }
        THREAD_CREATED | THREAD_UPDATED => add(Field::Title, "title"),
        AGENT_STARTED => add(Field::Text, "input"),
        AGENT_THINKING => add(Field::Text, "content"),
        AGENT_WAITING => {
            add(Field::Text, "prompt");
            add(Field::Text, "reason");
        }
        AGENT_RESUMED => add(Field::Text, "answer"),
        AGENT_CANCEL_REQUESTED | AGENT_CANCELLED => add(Field::Text, "reason"),
        AGENT_COMPLETED => add(Field::Text, "output"),
        AGENT_FAILED => {
            add(Field::Text, "code");
            add(Field::Text, "message");
        }
        _ if kind.starts_with("x.") => leaves(&data, &mut |text| pieces.push(Piece { field: Field::Text, text })),
        _ => {}
    }
    pieces
}

/// A message's content: a text, or parts of which some are texts.
fn content(content: &Value, pieces: &mut Vec<Piece>) {
    let mut add = |text: &Value| {
        if let Value::String(text) = text {
            pieces.push(Piece { field: Field::Text, text: text.clone() });
        }
    };
    match content {
        Value::Array(parts) => parts.iter().for_each(|part| add(&part["text"])),
        text => add(text),
    }
}

/// The texts and numbers in a value, wherever they stand.
fn leaves(value: &Value, add: &mut impl FnMut(String)) {
    match value {
        Value::String(text) => add(text.clone()),
        Value::Number(number) => add(number.to_string()),
        Value::Array(values) => values.iter().for_each(|value| leaves(value, add)),
        Value::Object(fields) => fields.values().for_each(|value| leaves(value, add)),
        Value::Null | Value::Bool(_) => {}
    }
}

/// The words of these texts.
pub fn tokens<'p>(pieces: impl IntoIterator<Item = &'p Piece>, stems: &Stems) -> Vec<Token> {
    let (mut tokens, mut position) = (Vec::new(), 0);
    for piece in pieces {
        for word in words(&piece.text) {
            let stem = stems.stem(&word.folded);
            let stem = (stem != word.folded).then(|| stem.into_boxed_str());
            tokens.push(Token { field: piece.field, position, exact: word.folded.into_boxed_str(), stem });
            position += 1;
        }
        // No phrase goes from one text into the next.
        position += 1;
    }
    tokens
}

/// An event as it is searched.
#[derive(Debug)]
pub struct Document {
    pub tenant: String,
    pub thread: String,
    /// Milliseconds.
    pub at: u64,
    pub kind: String,
    pub from: String,
    pub run: Option<String>,
    pub tokens: Vec<Token>,
}

impl Document {
    /// From the event's frame; without words if it is none.
    pub fn new(tenant: &str, thread: &str, at: u64, frame: &str, stems: &Stems) -> Document {
        let mut document = Document::empty(tenant, thread, at);
        if let Some(frame) = StoredFrame::parse(frame) {
            document.tokens = tokens(&pieces(&frame.kind, frame.data), stems);
            document.kind = frame.kind.into_owned();
            document.from = frame.from.into_owned();
            document.run = frame.run.map(|run| run.into_owned());
        }
        document
    }

    /// One that is not found by any word.
    pub fn empty(tenant: &str, thread: &str, at: u64) -> Document {
        Document {
            tenant: tenant.to_owned(),
            thread: thread.to_owned(),
            at,
            kind: String::new(),
            from: String::new(),
            run: None,
            tokens: Vec::new(),
        }
    }

    /// Whether all of its words are text: then it need not say of each which field it is of.
    pub fn is_text(&self) -> bool {
        self.tokens.iter().all(|token| token.field == Field::Text)
    }

    /// About what it takes in memory.
    pub fn bytes(&self) -> usize {
        let of_token = |token: &Token| {
            size_of::<Token>() + 32 + token.exact.len() + token.stem.as_ref().map_or(0, |stem| 16 + stem.len())
        };
        let names = self.tenant.len() + self.thread.len() + self.kind.len() + self.from.len();
        size_of::<Document>() + names + 128 + self.tokens.iter().map(of_token).sum::<usize>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(kind: &str, data: &str) -> Vec<(&'static str, String)> {
        let data: &RawValue = serde_json::from_str(data).expect("test data is JSON");
        pieces(kind, data).into_iter().map(|piece| (piece.field.name(), piece.text)).collect()
    }

    fn texts(field: &'static str, all: &[&str]) -> Vec<(&'static str, String)> {
        all.iter().map(|text| (field, (*text).to_owned())).collect()
    }

    #[test]
    fn each_kind_has_its_texts_in_their_fields() {
        assert_eq!(read("user_message", r#"{"content":"hello"}"#), texts("text", &["hello"]));
        let parts = r#"{"content":[{"type":"text","text":"a"},{"type":"image","url":"b"},{"type":"text","text":"c"}]}"#;
        assert_eq!(read("agent_message", parts), texts("text", &["a", "c"]));
        let call = r#"{"tool":"web_search","call":"c1","arguments":{"q":"rust","deep":[{"n":7}],"yes":true}}"#;
        let mut called = read("tool_executing", call);
        called.sort();
        assert_eq!(called, [texts("arguments", &["7", "rust"]), texts("tool", &["web_search"])].concat());
        assert_eq!(read("tool_completed", r#"{"call":"c1","result":"ok"}"#), texts("result", &["ok"]));
        assert_eq!(read("tool_completed", r#"{"call":"c1","error":{"why":"late"}}"#), texts("result", &["late"]));
        assert_eq!(read("thread_updated", r#"{"title":"Plans"}"#), texts("title", &["Plans"]));
        assert_eq!(read("agent_failed", r#"{"code":"e","message":"m"}"#), texts("text", &["e", "m"]));
        assert_eq!(read("x.note", r#"["a",{"b":"c"},null]"#), texts("text", &["a", "c"]));
        assert_eq!(read("member_added", r#"{"user":"bob"}"#), []);
        assert_eq!(read("user_message", r#"{"content":7}"#), []);
    }

    #[test]
    fn words_of_two_texts_are_not_side_by_side() {
        let pieces = ["one two", "three"].map(|text| Piece { field: Field::Text, text: text.into() });
        let tokens = tokens(&pieces, &Stems::PLAIN);
        assert_eq!(
            tokens.iter().map(|it| (it.position, &*it.exact)).collect::<Vec<_>>(),
            [(0, "one"), (1, "two"), (3, "three")]
        );
    }
}
