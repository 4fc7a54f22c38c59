//! Dead letters: why something became one, and which of them are alike.

use std::fmt;
use std::str::FromStr;

use uuid::Uuid;

/// An event that a subscription with `confirm` was sent again and again.
pub const UNACKNOWLEDGED: &str = "unacknowledged";
/// Work that was tried as often as its group allows.
pub const ATTEMPTS: &str = "attempts";
/// Work that a worker rejected.
pub const REJECTED: &str = "rejected";
/// Work of the group [`super::work::WEBHOOK_GROUP`] that the webhook did not take.
pub const WEBHOOK: &str = "webhook";
/// Work that a full group had no room for.
pub const OVERFLOW: &str = "overflow";
/// An event that broke the order of its run.
pub const RUN_ORDER: &str = "run_order";
/// A foreign record, or one that the projector failed at.
pub const UNREADABLE: &str = "unreadable";
/// An event of another program's that is not what its kind has to be.
pub const SCHEMA: &str = "schema";

/// Whether a letter of this reason is work of a group, which is its name.
pub fn is_work(reason: &str) -> bool {
    matches!(reason, ATTEMPTS | REJECTED | WEBHOOK | OVERFLOW)
}

pub const REASONS: [&str; 8] = [UNACKNOWLEDGED, ATTEMPTS, REJECTED, WEBHOOK, OVERFLOW, RUN_ORDER, UNREADABLE, SCHEMA];

/// Of an error's text this much tells it from others.
const COMPARED_CHARS: usize = 200;

/// The id of a dead letter about these facts.
pub fn letter_of(facts: &[&[u8]]) -> Uuid {
    let mut hasher = blake3::Hasher::new_derive_key("weft 2026-11 dead letter");
    for fact in facts {
        hasher.update(&(fact.len() as u64).to_be_bytes()).update(fact);
    }
    let mut id = [0; 16];
    id.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
    uuid::Builder::from_custom_bytes(id).into_uuid()
}

/// What groups dead letters that are alike: the same reason, kind and error, whatever numbers and ids the error has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Fingerprint(pub [u8; 8]);

impl Fingerprint {
    pub fn of(reason: &str, kind: Option<&str>, error: &str) -> Fingerprint {
        let mut hasher = blake3::Hasher::new_derive_key("weft 2026-11 fingerprint of a dead letter");
        for part in [reason, kind.unwrap_or_default(), &normalised(error)] {
            hasher.update(&(part.len() as u64).to_be_bytes()).update(part.as_bytes());
        }
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
        Fingerprint(bytes)
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", u64::from_be_bytes(self.0))
    }
}

impl FromStr for Fingerprint {
    type Err = ();

    /// 16 lowercase hex digits.
    fn from_str(text: &str) -> Result<Fingerprint, ()> {
        let is_ours = text.len() == 16 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        let number = u64::from_str_radix(text, 16).map_err(|_| ())?;
        if is_ours { Ok(Fingerprint(number.to_be_bytes())) } else { Err(()) }
    }
}

/// An error's text without what differs from one case to the next: `#` in the place of each word that has a digit, which is
/// what numbers, times and ids have.
pub fn normalised(error: &str) -> String {
    let mut text = String::new();
    let mut rest = error;
    for _ in 0..COMPARED_CHARS {
        let Some(first) = rest.chars().next() else { break };
        let in_word = |c: char| c.is_alphanumeric() || c == '-' || c == '_';
        if !in_word(first) {
            text.push(first);
            rest = &rest[first.len_utf8()..];
            continue;
        }
        let end = rest.find(|c| !in_word(c)).unwrap_or(rest.len());
        let word = &rest[..end];
        if word.bytes().any(|byte| byte.is_ascii_digit()) {
            text.push('#');
        } else {
            text.extend(word.chars().take(COMPARED_CHARS));
        }
        rest = &rest[end..];
    }
    text.chars().take(COMPARED_CHARS).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_ids_make_no_difference_and_words_do() {
        let fingerprint = |error| Fingerprint::of(RUN_ORDER, Some("agent_token"), error);
        let one = fingerprint("the message has 7 characters: run 0190f-aa of 2026-11-26T20:00:01.5Z");
        assert_eq!(one, fingerprint("the message has 12345 characters: run b33f of 2025-01-01T00:00:59.123Z"));
        assert_ne!(one, fingerprint("the message has 7 letters: run 0190f-aa of 2026-11-26T20:00:01.5Z"));
        assert_ne!(Fingerprint::of(RUN_ORDER, None, "e"), Fingerprint::of(SCHEMA, None, "e"));
        assert_ne!(Fingerprint::of(RUN_ORDER, None, "e"), Fingerprint::of(RUN_ORDER, Some("e"), "e"));
    }

    #[test]
    fn what_is_compared_is_short_however_long_the_error_is() {
        for error in ["x".repeat(100_000), "é ".repeat(100_000), "a1 ".repeat(100_000)] {
            assert!(normalised(&error).chars().count() <= COMPARED_CHARS);
        }
        assert_eq!(normalised(""), "");
        assert_eq!(normalised("seq 17, `run-4`: é"), "seq #, `#`: é");
    }

    #[test]
    fn a_fingerprint_is_written_and_read_as_16_hex_digits() {
        let fingerprint = Fingerprint([0, 1, 2, 3, 0xab, 5, 6, 7]);
        assert_eq!(fingerprint.to_string(), "00010203ab050607");
        assert_eq!("00010203ab050607".parse(), Ok(fingerprint));
        for other in ["", "00010203AB050607", "+0010203ab050607", "00010203ab05060", "00010203ab0506070"] {
            assert_eq!(other.parse::<Fingerprint>(), Err(()), "{other}");
        }
    }
}
