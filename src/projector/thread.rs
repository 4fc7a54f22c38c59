//! A thread while the projector works on it: who is a member, and what an event changes.

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::Arc;

use serde::Deserialize;
use uuid::Uuid;

use super::transaction::Transaction;
use super::{AccessChange, Published};
use crate::protocol::error::{Code, Error};
use crate::protocol::event;
use crate::protocol::event::{LogEvent, Priority};
use crate::protocol::ids;
use crate::protocol::kinds::{MEMBER_ADDED, MEMBER_REMOVED, SESSIONS_REVOKED, THREAD_CREATED, THREAD_UPDATED};
use crate::store::{KeyRow, MemberRow, RevocationRow, Store, StoreError, ThreadRow};

/// A thread's state while the projector works on it. It shows what the batch has decided, before
/// the store does.
pub(super) struct Thread {
    pub(super) key: Arc<str>,
    pub(super) row: ThreadRow,
    pub(super) changed: bool,
    /// Of an inbox: until when its user's tokens are revoked, as far as that was changed here.
    revoked_until: u64,
    /// Memberships looked up or changed so far.
    members: HashMap<String, bool>,
}

/// What becomes of an event as far as its thread decides.
pub(super) enum ThreadChange {
    /// It is appended, with what it changes about who may read.
    Append(Option<AccessChange>),
    /// Nothing had to change, and nothing is appended.
    Unchanged,
    Refused(Error),
}

/// The answer to a key that is already taken.
pub(super) fn repeated(event: &LogEvent<'_>, taken: &KeyRow) -> Result<Published, Error> {
    if taken.content != event.content_digest() {
        let why = format!("this key was used before with different content, seq {}", taken.seq);
        return Err(Error::new(Code::Conflict, why).at("key"));
    }
    Ok(Published { seq: taken.seq, event: Uuid::from_bytes(taken.event), duplicate: true })
}

impl Thread {
    pub(super) fn new(key: &str, row: Option<ThreadRow>, at: u64) -> Thread {
        let row = row.unwrap_or(ThreadRow { created_at: at, last_at: at, ..ThreadRow::default() });
        Thread { key: key.into(), row, changed: false, revoked_until: 0, members: HashMap::new() }
    }

    pub(super) fn is_member(&mut self, store: &Store, event: &LogEvent<'_>, user: &str) -> Result<bool, StoreError> {
        if let Some(known) = self.members.get(user) {
            return Ok(*known);
        }
        let member = store.is_member(&event.tenant, &event.thread, user)?;
        self.members.insert(user.to_owned(), member);
        Ok(member)
    }

    /// What becomes of the event as far as the thread decides: its existence, its title, its members.
    pub(super) fn change(&mut self, store: &Store, event: &LogEvent<'_>) -> Result<ThreadChange, StoreError> {
        match &*event.kind {
            THREAD_CREATED | THREAD_UPDATED | MEMBER_ADDED | MEMBER_REMOVED if ids::is_reserved(&event.thread) => {
                let error = Error::field("thread", "this thread has no members and no title");
                Ok(ThreadChange::Refused(error))
            }
            SESSIONS_REVOKED => self.revoke(store, event),
            THREAD_CREATED => Ok(self.create(event)),
            THREAD_UPDATED | MEMBER_ADDED | MEMBER_REMOVED if self.row.head == 0 => {
                Ok(ThreadChange::Refused(Error::no_thread()))
            }
            THREAD_UPDATED => Ok(self.retitle(event)),
            MEMBER_ADDED | MEMBER_REMOVED => self.change_member(store, event),
            _ => Ok(self.publish(event)),
        }
    }

    fn revoke(&mut self, store: &Store, event: &LogEvent<'_>) -> Result<ThreadChange, StoreError> {
        let Some(user) = ids::inbox_of(&event.thread) else {
            let error = Error::field("thread", "sessions are revoked in their user's inbox");
            return Ok(ThreadChange::Refused(error));
        };
        // A revocation with an earlier time, from a clock that is slow, takes nothing back.
        let before = store.revocation(&event.tenant, user)?.map_or(0, |row| row.until);
        self.revoked_until = self.revoked_until.max(before);
        Ok(ThreadChange::Append(Some(AccessChange::Revoked(user.to_owned()))))
    }

    fn create(&self, event: &LogEvent<'_>) -> ThreadChange {
        if self.row.head > 0 {
            return ThreadChange::Refused(Error::new(Code::Conflict, "the thread exists already").at("thread"));
        }
        match data::<Created>(event).and_then(|created| created.members_with(&event.from)) {
            Ok(members) => ThreadChange::Append(Some(AccessChange::Joined(members))),
            Err(error) => ThreadChange::Refused(error),
        }
    }

    fn retitle(&self, event: &LogEvent<'_>) -> ThreadChange {
        match data::<Updated>(event) {
            Ok(updated) if self.row.title.as_deref() == Some(&*updated.title) => ThreadChange::Unchanged,
            Ok(_) => ThreadChange::Append(None),
            Err(error) => ThreadChange::Refused(error),
        }
    }

    fn change_member(&mut self, store: &Store, event: &LogEvent<'_>) -> Result<ThreadChange, StoreError> {
        let user = match data::<Member>(event).and_then(Member::checked) {
            Ok(member) => member.user,
            Err(error) => return Ok(ThreadChange::Refused(error)),
        };
        let adding = event.kind == MEMBER_ADDED;
        Ok(match (adding, self.is_member(store, event, &user)?) {
            (true, false) => ThreadChange::Append(Some(AccessChange::Joined(vec![user.into_owned()]))),
            (false, true) => ThreadChange::Append(Some(AccessChange::Left(user.into_owned()))),
            (true, true) | (false, false) => ThreadChange::Unchanged,
        })
    }

    /// Any other event. The first one of a thread creates it.
    fn publish(&self, event: &LogEvent<'_>) -> ThreadChange {
        let head = self.row.head;
        match event.parent {
            Some(parent) if parent > head => {
                let why = format!("`parent` ({parent}) is beyond the thread's head ({head})");
                ThreadChange::Refused(Error::field("parent", why))
            }
            _ if head == 0 && !ids::is_reserved(&event.thread) => {
                ThreadChange::Append(Some(AccessChange::Joined(vec![event.from.to_string()])))
            }
            _ => ThreadChange::Append(None),
        }
    }

    /// The next seq, and its link of the chain.
    pub(super) fn append(&mut self, value: &[u8], priority: Option<Priority>, at: u64) -> u64 {
        let seq = self.row.head + 1;
        self.row.hash = event::chain(&self.row.hash, seq, value);
        if seq == 1 {
            self.row.created_at = at;
        }
        self.row.head = seq;
        self.row.newest[Priority::class(priority)] = seq;
        self.row.last_at = at;
        self.changed = true;
        seq
    }

    /// Writes what the event changes beside the thread's head.
    pub(super) fn apply(
        &mut self,
        change: &Option<AccessChange>,
        event: &LogEvent<'_>,
        seq: u64,
        at: u64,
        tx: &mut Transaction<'_>,
    ) {
        match change {
            Some(AccessChange::Joined(users)) => {
                for user in users {
                    tx.rows.put_member(&event.tenant, &event.thread, user, &MemberRow { since: seq });
                    self.members.insert(user.clone(), true);
                }
            }
            Some(AccessChange::Left(user)) => {
                tx.rows.delete_member(&event.tenant, &event.thread, user);
                self.members.insert(user.clone(), false);
            }
            Some(AccessChange::Revoked(user)) => {
                self.revoked_until = self.revoked_until.max(at);
                tx.rows.put_revocation(&event.tenant, user, &RevocationRow { until: self.revoked_until });
            }
            None => {}
        }
        if matches!(&*event.kind, THREAD_CREATED | THREAD_UPDATED) {
            // Checked when the change was decided.
            self.row.title = data::<Created>(event).ok().and_then(|created| created.title).map(Cow::into_owned);
        }
    }
}

/// `data` of `thread_created`.
#[derive(Deserialize)]
struct Created<'a> {
    #[serde(borrow, default)]
    title: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    members: Vec<Cow<'a, str>>,
}

impl Created<'_> {
    /// The members, the creator among them, each once.
    fn members_with(&self, creator: &str) -> Result<Vec<String>, Error> {
        self.members.iter().try_for_each(|member| ids::check_name("members", member))?;
        let mut members: Vec<String> =
            self.members.iter().map(|member| member.to_string()).chain([creator.to_owned()]).collect();
        members.sort();
        members.dedup();
        Ok(members)
    }
}

/// `data` of `thread_updated`.
#[derive(Deserialize)]
struct Updated<'a> {
    #[serde(borrow)]
    title: Cow<'a, str>,
}

/// `data` of `member_added` and `member_removed`.
#[derive(Deserialize)]
struct Member<'a> {
    #[serde(borrow)]
    user: Cow<'a, str>,
}

impl Member<'_> {
    fn checked(self) -> Result<Self, Error> {
        ids::check_name("user", &self.user).map(|()| self)
    }
}

/// What `data` of an event says.
pub(super) fn data<'a, T: Deserialize<'a>>(event: &LogEvent<'a>) -> Result<T, Error> {
    serde_json::from_str(event.data.get()).map_err(|_| {
        Error::field("data", format!("data of {} does not have one of the shapes that it may have", event.kind))
    })
}
