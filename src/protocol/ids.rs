//! The names of things, checked once where they come in.
//!
//! None of them can hold a `/` or a NUL, so `tenant/thread` is unambiguous as a key of the log and NUL separates the parts
//! of a key in the store.

use std::borrow::Cow;

use super::error::Error;

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

/// The user that the server's own events are from. No token is for it.
pub const SERVER_USER: &str = "weft";

/// The thread that everyone in the tenant reads.
pub const TENANT_THREAD: &str = "@tenant";
/// What a `subscribe` to all threads names in the place of one. No thread is called so.
pub const ALL_THREADS: &str = "*";
/// The user's own inbox, as its user calls it.
pub const MY_INBOX: &str = "@me";
/// What the name of an inbox begins with, as everyone else calls it, and the log.
const INBOX: &str = "@user:";

/// Whether the thread is one of those that exist by their name: an inbox, or the tenant's.
pub fn is_reserved(thread: &str) -> bool {
    thread.starts_with('@')
}

/// The name of a user's inbox.
pub fn inbox(user: &str) -> String {
    format!("{INBOX}{user}")
}

/// Whose inbox the thread is, if it is one.
pub fn inbox_of(thread: &str) -> Option<&str> {
    thread.strip_prefix(INBOX)
}

/// A thread as clients may call it: by its name, or `@me`.
pub fn check_address(thread: &str) -> Result<(), Error> {
    if thread == MY_INBOX { Ok(()) } else { check_thread(thread) }
}

/// The thread's name, for what a client called it.
pub fn resolve<'a>(user: &str, thread: &'a str) -> Cow<'a, str> {
    if thread == MY_INBOX { Cow::Owned(inbox(user)) } else { Cow::Borrowed(thread) }
}

/// A thread as a client addressed it, resolved once, where the request comes in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ThreadAddress {
    /// As the client calls the thread, and as it is called in answers: its name, or `@me`.
    pub called: String,
    /// Its name in the store and the log.
    pub name: String,
}

impl ThreadAddress {
    /// Checks and resolves what a user calls a thread.
    pub fn parse(user: &str, called: String) -> Result<ThreadAddress, Error> {
        check_address(&called)?;
        Ok(ThreadAddress::resolve(user, called))
    }

    /// Resolves what a user calls a thread, where it is checked already.
    pub fn resolve(user: &str, called: String) -> ThreadAddress {
        let name = resolve(user, &called).into_owned();
        ThreadAddress { called, name }
    }

    /// A thread that is called by its name.
    pub fn named(name: String) -> ThreadAddress {
        ThreadAddress { called: name.clone(), name }
    }

    /// Whether the client calls the thread by another name than its own.
    pub fn is_alias(&self) -> bool {
        self.called != self.name
    }
}

/// A thread's name: an id, `@tenant`, or `@user:` and a user.
pub fn check_thread(thread: &str) -> Result<(), Error> {
    match inbox_of(thread) {
        Some(user) => check_name("thread", user),
        None if thread == TENANT_THREAD => Ok(()),
        None => check_thread_id(thread),
    }
}

/// A thread's id: `[A-Za-z0-9][A-Za-z0-9._:-]{0,127}`.
pub fn check_thread_id(thread: &str) -> Result<(), Error> {
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
        for good in ["a", "A9", "t.1_2:3-4", &"x".repeat(128), "@tenant", "@user:ada@example.org"] {
            assert!(check_thread(good).is_ok(), "{good}");
        }
        for bad in ["", ".a", "-a", "a/b", "a b", "@me", "@user:", "@user:a b", "@tenants", "é", &"x".repeat(129)] {
            assert!(check_thread(bad).is_err(), "{bad}");
        }
        assert!(check_address("@me").is_ok() && check_thread_id("@tenant").is_err());
        assert_eq!(resolve("ada", "@me"), "@user:ada");
    }

    #[test]
    fn an_address_keeps_what_the_client_calls_the_thread() {
        let mine = ThreadAddress::parse("ada", "@me".to_owned()).expect("everybody has an inbox");
        assert_eq!((&*mine.called, &*mine.name, mine.is_alias()), ("@me", "@user:ada", true));
        let thread = ThreadAddress::parse("ada", "t".to_owned()).expect("an id");
        assert_eq!(thread, ThreadAddress::named("t".to_owned()));
        assert!(!thread.is_alias());
        assert!(ThreadAddress::parse("ada", "@you".to_owned()).is_err());
    }

    #[test]
    fn names_hold_no_slash_space_or_control_character() {
        assert!(check_name("user", "ada@example.org").is_ok());
        for bad in ["", "a b", "a/b", "a\0b", "ä", &"x".repeat(129)] {
            assert!(check_name("user", bad).is_err(), "{bad}");
        }
    }
}
