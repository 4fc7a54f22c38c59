//! Patterns whose matching takes time that grows with the text alone, and little of it for each byte.

use regex_automata::dfa::{StartKind, dense};
use regex_automata::nfa::thompson;

/// How long a pattern may be, in bytes.
const MAX_BYTES: usize = 1_024;
/// How large the automaton of a pattern may be, in bytes. As long as all of it fits into the matcher's cache, each byte of a
/// text takes one step.
const MAX_AUTOMATON: usize = 128 << 10;
/// What making it may take.
const MAX_WORK: usize = 512 << 10;
/// What the matcher's cache holds: the automaton, and what it was made of.
pub const CACHE: usize = 2 << 20;
/// How large the compiled pattern may be.
pub const MAX_COMPILED: usize = 256 << 10;

const NONE: &str =
    "is no regular expression that is matched here: it may be too complex, have back references or look around";

/// Refuses a pattern that is none, or that could be slow.
pub fn check(pattern: &str) -> Result<(), String> {
    if pattern.len() > MAX_BYTES {
        return Err(format!("has {} bytes, and a pattern has at most {MAX_BYTES}", pattern.len()));
    }
    let translated = jsonschema_regex::to_rust_regex(pattern).map_err(|()| NONE)?;
    // The matcher reads forwards, or backwards from the end.
    for reverse in [false, true] {
        let config = dense::Config::new()
            .start_kind(StartKind::Both)
            .dfa_size_limit(Some(MAX_AUTOMATON))
            .determinize_size_limit(Some(MAX_WORK));
        let nfa = thompson::Config::new().reverse(reverse).nfa_size_limit(Some(MAX_COMPILED));
        dense::Builder::new().configure(config).thompson(nfa).build(&translated).map_err(|_| NONE)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_as_people_write_them_are_taken() {
        for pattern in [
            "^[A-Z]{2}-[0-9]{4,12}$",
            r"^\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}(\.\d+)?(Z|[+-]\d{2}:\d{2})$",
            r"^[\w.+-]+@[\w-]+(\.[\w-]+)+$",
            "^(red|green|blue)$",
            r"\S",
            "^.{1,16}$",
            "^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$",
            "^https?://[^/]+/",
            "",
        ] {
            assert_eq!(check(pattern), Ok(()), "{pattern}");
        }
    }

    #[test]
    fn patterns_that_are_none_or_could_be_slow_are_refused() {
        for (pattern, why) in [
            ("(", "no regular expression"),
            (r"(a)\1", "back references"),
            ("(?=a)", "look around"),
            ("[01]*1[01]{20}", "too complex"),
            ("[01]{14}1[01]*$", "too complex"),
            ("(a{1000}){1000}", "too complex"),
            (r"\p{L}{100}", "too complex"),
            (&"a".repeat(MAX_BYTES + 1), "at most"),
        ] {
            let said = check(pattern).expect_err(pattern);
            assert!(said.contains(why), "{pattern:.60}: {said}");
        }
    }
}
