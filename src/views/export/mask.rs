//! Masks: what of an event's texts is hidden in an export. The shape stays: fields, their types and their number.
//!
//! Masked are the strings and numbers in `data`, and `from` and `key`. Names of fields, ids and times stay as they are. A
//! string is looked at as it reads, whatever its escapes, and the texts of a message's parts as the one text that they make:
//! what begins in one part and ends in the next is found. What is not masked keeps its bytes.

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::{Duration, Instant};

use regex::{Regex, RegexBuilder};

use crate::protocol::json;

/// Masks of one export, and characters of a regex.
const MAX_MASKS: usize = 16;
const MAX_REGEX: usize = 256;
/// What a regex may take when it is compiled, and what it may keep of each text for the next one, forwards and backwards.
const REGEX_BYTES: usize = 256 << 10;
const REGEX_CACHE: usize = 512 << 10;
/// Time for the texts of one event. A search is linear in its text, but a regex whose matches are short and that looks far
/// ahead makes as many searches as there are characters.
pub const WITHIN: Duration = Duration::from_secs(1);

const EMAIL: &str = r"[\p{L}\p{N}._%+'-]+@[\p{L}\p{N}-]+(?:\.[\p{L}\p{N}-]+)+";
const CARD: &str = r"[0-9](?:[ -]?[0-9]){12,18}";
const PHONE: &str = r"[+(]?[0-9](?:[ ()./-]{0,2}[0-9]){6,14}";

pub struct Masks(Vec<Mask>);

/// The masks take too long for an event.
#[derive(Debug, PartialEq, Eq)]
pub struct TooSlow;

struct Mask {
    regex: Regex,
    /// What stands in the place of what it finds.
    label: &'static str,
    /// Whether that is what it seems to be: the text, and what it stands in.
    counts: fn(&str, Range<usize>) -> bool,
}

impl Masks {
    /// From a list with commas: `email`, `phone`, `card`, and regexes between slashes. An error says what is wrong.
    pub fn parse(list: &str) -> Result<Masks, String> {
        let mut masks = Vec::new();
        let mut rest = list;
        while !rest.is_empty() {
            let (item, after) = split_item(rest)?;
            masks.push(Mask::parse(item)?);
            rest = after;
        }
        match masks.len() {
            0 => Err("mask must be a list of email, phone, card and /regex/".to_owned()),
            1..=MAX_MASKS => Ok(Masks(masks)),
            _ => Err(format!("there are at most {MAX_MASKS} masks")),
        }
    }

    /// The event frame with its texts masked, within about this time: no match is looked for after it.
    pub fn frame(&self, frame: &str, within: Duration) -> Result<String, TooSlow> {
        let begun = Instant::now();
        let go_on = move || if begun.elapsed() < within { Ok(()) } else { Err(TooSlow) };
        let tokens = tokens(frame);
        let mut replaced: Vec<(Range<usize>, String)> = Vec::new();
        let mut lists: BTreeMap<usize, Vec<&Token>> = BTreeMap::new();
        for token in &tokens {
            match token.list {
                // The texts of a message's parts are one text.
                Some(list) => lists.entry(list).or_default().push(token),
                None => self.mask_run(&[token], &go_on, &mut replaced)?,
            }
        }
        lists.values().try_for_each(|run| self.mask_run(run, &go_on, &mut replaced))?;
        replaced.sort_by_key(|(range, _)| range.start);
        if replaced.is_empty() {
            return Ok(frame.to_owned());
        }
        let (mut out, mut from) = (String::with_capacity(frame.len()), 0);
        for (range, text) in replaced {
            out.push_str(&frame[from..range.start]);
            out.push_str(&text);
            from = range.end;
        }
        out.push_str(&frame[from..]);
        Ok(out)
    }

    /// Masks tokens that are one text together.
    fn mask_run(
        &self,
        tokens: &[&Token],
        go_on: &impl Fn() -> Result<(), TooSlow>,
        replaced: &mut Vec<(Range<usize>, String)>,
    ) -> Result<(), TooSlow> {
        let joined: String = tokens.iter().map(|token| &*token.text).collect();
        let found = self.find(&joined, go_on)?;
        if found.is_empty() {
            return Ok(());
        }
        let mut begin = 0;
        for token in tokens {
            let end = begin + token.text.len();
            // They are in order and do not overlap.
            let first = found.partition_point(|(range, _)| range.end <= begin);
            let mine = found[first..].iter().take_while(|(range, _)| range.start < end);
            let (mut text, mut from, mut hit) = (String::new(), begin, false);
            for (range, label) in mine {
                hit = true;
                text.push_str(&joined[from..range.start.max(begin)]);
                // What goes on in another part is named where it begins.
                if range.start >= begin {
                    text.push_str(label);
                }
                from = range.end.min(end);
            }
            text.push_str(&joined[from..end]);
            if hit {
                let value = if token.is_number { "0".to_owned() } else { json::encode(&text) };
                replaced.push((token.range.clone(), value));
            }
            begin = end;
        }
        Ok(())
    }

    /// What is masked in a text, in order and without overlaps.
    fn find(
        &self,
        text: &str,
        go_on: &impl Fn() -> Result<(), TooSlow>,
    ) -> Result<Vec<(Range<usize>, &'static str)>, TooSlow> {
        let mut found: Vec<(Range<usize>, &'static str)> = Vec::new();
        for mask in &self.0 {
            go_on()?;
            for range in mask.regex.find_iter(text).map(|it| it.range()) {
                go_on()?;
                if !range.is_empty() && (mask.counts)(text, range.clone()) {
                    found.push((range, mask.label));
                }
            }
        }
        found.sort_by_key(|(range, _)| (range.start, std::cmp::Reverse(range.end)));
        let mut merged: Vec<(Range<usize>, &'static str)> = Vec::new();
        for (range, label) in found {
            match merged.last_mut() {
                Some((last, _)) if range.start < last.end => last.end = last.end.max(range.end),
                _ => merged.push((range, label)),
            }
        }
        Ok(merged)
    }
}

/// The first item of a list with commas, and what follows. A regex may have commas; a slash in it has a backslash before it.
fn split_item(list: &str) -> Result<(&str, &str), String> {
    let end = match list.strip_prefix('/') {
        None => list.find(',').unwrap_or(list.len()),
        Some(regex) => {
            let mut escaped = false;
            let end = regex.char_indices().find(|(_, c)| {
                let ends = *c == '/' && !escaped;
                escaped = *c == '\\' && !escaped;
                ends
            });
            end.map(|(at, _)| at + 2).ok_or("a regex of mask must end with a slash")?
        }
    };
    match list[end..].strip_prefix(',') {
        Some("") => Err("mask must not end with a comma".to_owned()),
        Some(after) => Ok((&list[..end], after)),
        None if end == list.len() => Ok((&list[..end], "")),
        None => Err("after a regex of mask comes a comma".to_owned()),
    }
}

impl Mask {
    fn parse(item: &str) -> Result<Mask, String> {
        let build = |regex: &str| RegexBuilder::new(regex).size_limit(REGEX_BYTES).dfa_size_limit(REGEX_CACHE).build();
        let (regex, label, counts): (_, _, fn(&str, Range<usize>) -> bool) = match item {
            "email" => (EMAIL, "[email]", |_, _| true),
            "phone" => (PHONE, "[phone]", is_phone),
            "card" => (CARD, "[card]", is_card),
            _ => match item.strip_prefix('/').and_then(|regex| regex.strip_suffix('/')) {
                Some("") => return Err("a regex of mask is empty".to_owned()),
                Some(regex) if regex.chars().count() > MAX_REGEX => {
                    return Err(format!("a regex of mask has at most {MAX_REGEX} characters"));
                }
                Some(regex) => (regex, "[masked]", |_, _| true),
                None => return Err(format!("mask must be email, phone, card or /regex/, not {item:.60}")),
            },
        };
        let regex = build(regex).map_err(|_| format!("{item:.60} is no regex, or one that is too large"))?;
        Ok(Mask { regex, label, counts })
    }
}

fn digits(text: &str) -> Vec<u32> {
    text.chars().filter_map(|c| c.to_digit(10)).collect()
}

/// Not within a word or a longer number.
fn stands_alone(text: &str, range: &Range<usize>) -> bool {
    let joins = |c: Option<char>| c.is_some_and(|c| c.is_alphanumeric() || c == '_');
    !joins(text[..range.start].chars().next_back()) && !joins(text[range.end..].chars().next())
}

/// Thirteen to nineteen digits with the check digit that cards have (Luhn's), and a first one that cards have.
fn is_card(text: &str, range: Range<usize>) -> bool {
    let digits = digits(&text[range.clone()]);
    let doubled = |d: u32| if d > 4 { 2 * d - 9 } else { 2 * d };
    let sum: u32 = digits.iter().rev().enumerate().map(|(at, d)| if at % 2 == 1 { doubled(*d) } else { *d }).sum();
    stands_alone(text, &range) && sum.is_multiple_of(10) && matches!(digits.first(), Some(2..=6))
}

/// A number that is written as telephone numbers are: from `+` or 0 on, or in groups. A date, or a plain number, is none.
fn is_phone(text: &str, range: Range<usize>) -> bool {
    let found = &text[range.clone()];
    let is_written_so = found.starts_with(['+', '0', '(']) || found.contains([' ', '-', '/', '.', ')']);
    let bytes = found.as_bytes();
    let is_date =
        bytes.len() >= 10 && bytes[4] == b'-' && bytes[7] == b'-' && bytes[..4].iter().all(u8::is_ascii_digit);
    let groups = found.split(|c: char| !c.is_ascii_digit()).filter(|group| !group.is_empty()).count();
    let is_fraction = groups == 2 && found.contains('.') && !found.starts_with(['+', '0']);
    stands_alone(text, &range) && is_written_so && !is_date && !is_fraction
}

/// A value that may be masked.
struct Token {
    /// Where it stands, with its quotes.
    range: Range<usize>,
    /// As it reads.
    text: String,
    is_number: bool,
    /// The list of parts whose text it is one of.
    list: Option<usize>,
}

/// What the walk over a frame is in.
enum Within {
    /// A list, by where it begins.
    List(usize),
    Object {
        key: String,
    },
}

/// The strings and numbers of a frame that may be masked. The frame is JSON: the server's own.
fn tokens(frame: &str) -> Vec<Token> {
    let bytes = frame.as_bytes();
    let (mut tokens, mut stack, mut at) = (Vec::new(), Vec::<Within>::new(), 0);
    let mut top = String::new();
    while at < bytes.len() {
        let begin = at;
        match bytes[at] {
            b'{' => stack.push(Within::Object { key: String::new() }),
            b'[' => stack.push(Within::List(at)),
            b'}' | b']' => drop(stack.pop()),
            b'"' => {
                at = end_of_string(bytes, at);
                let text = serde_json::from_str::<String>(&frame[begin..at]).unwrap_or_default();
                let is_name = bytes[at..].iter().find(|byte| !byte.is_ascii_whitespace()) == Some(&b':');
                let depth = stack.len();
                match stack.last_mut() {
                    Some(Within::Object { key }) if is_name => {
                        if depth == 1 {
                            top.clone_from(&text);
                        }
                        *key = text;
                    }
                    _ if may_be_masked(&top) => {
                        tokens.push(Token { range: begin..at, text, is_number: false, list: list_of(&stack) });
                    }
                    _ => {}
                }
                continue;
            }
            b'-' | b'0'..=b'9' => {
                let in_number = |byte: &u8| matches!(byte, b'0'..=b'9' | b'+' | b'-' | b'.' | b'e' | b'E');
                at += bytes[at..].iter().take_while(|byte| in_number(byte)).count();
                if may_be_masked(&top) {
                    let text = frame[begin..at].to_owned();
                    tokens.push(Token { range: begin..at, text, is_number: true, list: None });
                }
                continue;
            }
            _ => {}
        }
        at += 1;
    }
    tokens
}

fn may_be_masked(top: &str) -> bool {
    matches!(top, "data" | "from" | "key")
}

/// The end of the string that begins at a quote.
fn end_of_string(bytes: &[u8], quote: usize) -> usize {
    let mut at = quote + 1;
    while at < bytes.len() {
        match bytes[at] {
            b'\\' => at += 2,
            b'"' => return at + 1,
            _ => at += 1,
        }
    }
    bytes.len()
}

/// The list whose objects have this as their `text`.
fn list_of(stack: &[Within]) -> Option<usize> {
    match stack {
        [.., Within::List(list), Within::Object { key }] if key == "text" => Some(*list),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AMPLE: Duration = Duration::from_secs(3_600);

    fn masked(masks: &str, data: &str) -> String {
        let frame = format!(
            r#"{{"type":"event","thread":"t","seq":12345678901,"kind":"x.y","event":"e","from":"ada","at":"2026-11-27","data":{data}}}"#
        );
        let masked = Masks::parse(masks).expect("masks").frame(&frame, AMPLE).expect("in time");
        serde_json::from_str::<serde_json::Value>(&masked).expect("JSON as before");
        let (before, after) = masked.split_once(r#""data":"#).expect("data");
        assert_eq!(before, frame.split_once(r#""data":"#).expect("data").0, "nothing else has changed");
        after[..after.len() - 1].to_owned()
    }

    #[test]
    fn what_is_named_is_hidden_and_the_shape_stays() {
        for (masks, data, expected) in [
            ("email", r#"{"content": "to ada.l+x@example.co.uk, and"}"#, r#"{"content": "to [email], and"}"#),
            ("email", r#"{"a":"ada\u0040example.org"}"#, r#"{"a":"[email]"}"#),
            ("email", r#"{"ada@example.org":"a\/b"}"#, r#"{"ada@example.org":"a\/b"}"#),
            ("card", r#"["4111 1111-1111 1111", 4111111111111111]"#, r#"["[card]", 0]"#),
            ("card", r#"["4111 1111 1111 1112", 1732700000000]"#, r#"["4111 1111 1111 1112", 1732700000000]"#),
            ("phone", r#"["+49 (30) 123456-7", "call 030/1234567."]"#, r#"["[phone]", "call [phone]."]"#),
            ("phone", r#"["2026-11-27", "in 12345678 s", 1.2345678]"#, r#"["2026-11-27", "in 12345678 s", 1.2345678]"#),
            (r"/se[ck],?ret\/x/,email", r#""sec,ret/x of a@b.org""#, r#""[masked] of [email]""#),
            ("email,/org.*/", r#""a@b.org and more""#, r#""[email]""#),
        ] {
            assert_eq!(masked(masks, data), expected);
        }
    }

    #[test]
    fn what_begins_in_one_part_of_a_message_and_ends_in_another_is_found() {
        let data = r#"{"content":[{"type":"text","text":"to ada@exa"},{"type":"image","url":"u"},{"type":"text","text":"mple.org, b"}]}"#;
        let expected = r#"{"content":[{"type":"text","text":"to [email]"},{"type":"image","url":"u"},{"type":"text","text":", b"}]}"#;
        assert_eq!(masked("email", data), expected);
    }

    #[test]
    fn who_published_and_the_key_are_masked_and_ids_are_not() {
        let frame = r#"{"type":"event","thread":"t","seq":1,"from":"ada@example.org","data":{},"key":"k@b.org","run":"r@b.org"}"#;
        let expected =
            r#"{"type":"event","thread":"t","seq":1,"from":"[email]","data":{},"key":"[email]","run":"r@b.org"}"#;
        assert_eq!(Masks::parse("email").expect("a mask").frame(frame, AMPLE), Ok(expected.to_owned()));
    }

    #[test]
    fn a_search_ends_when_its_time_is_over_however_many_matches_there_are() {
        // Each match is one character, and is known to be no longer at the end of the text alone.
        let masks = Masks::parse("/.*[^A-Z]|[A-Z]/").expect("a mask");
        let frame = format!(r#"{{"type":"event","data":"{}"}}"#, "A".repeat(1 << 20));
        assert_eq!(masks.frame(&frame, Duration::from_millis(1)), Err(TooSlow));
        assert_eq!(
            masks.frame(r#"{"type":"event","data":true}"#, Duration::ZERO),
            Ok(r#"{"type":"event","data":true}"#.into())
        );
    }

    #[test]
    fn masks_that_are_none_are_refused_in_words() {
        for (list, why) in [
            ("", "a list of"),
            ("mail", "not mail"),
            ("email,", "comma"),
            ("/a", "end with a slash"),
            ("//", "empty"),
            ("/(/", "no regex"),
            ("/a/b", "comes a comma"),
            (&format!("/{}/", "a".repeat(257)), "256 characters"),
            (&["email"; 17].join(","), "at most 16"),
            (r"/\w{1000}{1000}/", "too large"),
        ] {
            let refused = Masks::parse(list).err().expect(list);
            assert!(refused.contains(why), "{list}: {refused}");
        }
    }
}
