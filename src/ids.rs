//! The names of things, checked once where they come in.
//!
//! None of them can hold a `/` or a NUL, so `tenant/thread` is unambiguous as a key of the log and NUL separates the parts
//! of a key in the store.

use crate::error::Error;

const MAX: usize = 128;

/// A user's or tenant's name: 1–128 printable ASCII characters, no space, no `/`.
pub fn check_name(field: &'static str, name: &str) -> Result<(), Error> {
    let fits = (1..=MAX).contains(&name.len()) && name.bytes().all(|b| b.is_ascii_graphic() && b != b'/');
    if fits {
        Ok(())
    } else {
        Err(Error::field(field, format!("{field} must be 1–128 printable ASCII characters without space or /")))
    }
}

/// A thread's id: `[A-Za-z0-9][A-Za-z0-9._:-]{0,127}`.
pub fn check_thread(thread: &str) -> Result<(), Error> {
    let mut bytes = thread.bytes();
    let fits = thread.len() <= MAX
        && bytes.next().is_some_and(|b| b.is_ascii_alphanumeric())
        && bytes.all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b':' | b'-'));
    if fits { Ok(()) } else { Err(Error::field("thread", "thread must match [A-Za-z0-9][A-Za-z0-9._:-]{0,127}")) }
}

/// A free text with a bound in characters: idempotency keys and runs.
pub fn check_text(field: &'static str, text: &str) -> Result<(), Error> {
    // Bytes bound characters from above, so most texts are never counted.
    let fits = !text.is_empty() && (text.len() <= MAX || text.chars().count() <= MAX);
    if fits { Ok(()) } else { Err(Error::field(field, format!("{field} must be 1–128 characters"))) }
}

/// The log's key for a thread.
pub fn log_key(tenant: &str, thread: &str) -> String {
    let mut key = String::with_capacity(tenant.len() + 1 + thread.len());
    key.push_str(tenant);
    key.push('/');
    key.push_str(thread);
    key
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thread_ids_are_what_the_contract_says() {
        for good in ["a", "A9", "t.1_2:3-4", &"x".repeat(128)] {
            assert!(check_thread(good).is_ok(), "{good}");
        }
        for bad in ["", ".a", "-a", "a/b", "a b", "@me", "é", &"x".repeat(129)] {
            assert!(check_thread(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn names_hold_no_slash_space_or_control_character() {
        assert!(check_name("user", "ada@example.org").is_ok());
        for bad in ["", "a b", "a/b", "a\0b", "ä", &"x".repeat(129)] {
            assert!(check_name("user", bad).is_err(), "{bad}");
        }
    }
}
