//! A thread while the projector works on it: who is a member, and what an event changes.

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::Arc;

use serde::Deserialize;
use uuid::Uuid;

use super::AccessChange;
use super::{Published, Verdict};
use crate::protocol::error::{Code, Error};
use crate::protocol::event;
use crate::protocol::event::{LogEvent, Priority};
use crate::protocol::ids;
use crate::protocol::kinds::{MEMBER_ADDED, MEMBER_REMOVED, SESSIONS_REVOKED, THREAD_CREATED, THREAD_UPDATED};
use crate::store::{Batch, KeyRow, MemberRow, RevocationRow, Store, StoreError, ThreadRow};

/// A thread's state while the projector works on it. What it holds is true at the record in hand, committed or not.
pub(super) struct Thread {
    pub(super) key: Arc<str>,
    pub(super) row: ThreadRow,
    pub(super) changed: bool,
    /// Of an inbox: until when its user's tokens are revoked, as far as that was changed here.
    revoked_until: u64,
    /// Memberships looked up or changed so far.
    members: HashMap<String, bool>,
}

/// The answer to a key that is already taken.
pub(super) fn repeated(event: &LogEvent<'_>, taken: &KeyRow) -> Verdict {
    if taken.content != event.content_digest() {
        return Err(
            Error::new(Code::Conflict, format!("this key was used for another content, seq {}", taken.seq)).at("key")
        );
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

    /// What the event changes about who may read; or the verdict, if there is nothing to append.
    pub(super) fn change(
        &mut self,
        store: &Store,
        event: &LogEvent<'_>,
    ) -> Result<Result<Option<AccessChange>, Verdict>, StoreError> {
        let exists = self.row.head > 0;
        let unchanged = Err(Ok(Published { seq: self.row.head, event: event.event, duplicate: true }));
        Ok(match &*event.kind {
            THREAD_CREATED | THREAD_UPDATED | MEMBER_ADDED | MEMBER_REMOVED if ids::is_reserved(&event.thread) => {
                Err(Err(Error::field("thread", "this thread has no members and no title")))
            }
            SESSIONS_REVOKED => match ids::inbox_of(&event.thread) {
                Some(user) => {
                    // A clock that is behind takes nothing back.
                    let before = store.revocation(&event.tenant, user)?.map_or(0, |row| row.until);
                    self.revoked_until = self.revoked_until.max(before);
                    Ok(Some(AccessChange::Revoked(user.to_owned())))
                }
                None => Err(Err(Error::field("thread", "sessions are revoked in their user's inbox"))),
            },
            THREAD_CREATED if exists => Err(Err(Error::new(Code::Conflict, "the thread exists already").at("thread"))),
            THREAD_CREATED => match data::<Created>(event).and_then(|created| created.members_with(&event.from)) {
                Ok(members) => Ok(Some(AccessChange::Joined(members))),
                Err(error) => Err(Err(error)),
            },
            THREAD_UPDATED | MEMBER_ADDED | MEMBER_REMOVED if !exists => Err(Err(Error::no_thread())),
            THREAD_UPDATED => match data::<Updated>(event) {
                Ok(updated) if self.row.title.as_deref() == Some(&*updated.title) => unchanged,
                Ok(_) => Ok(None),
                Err(error) => Err(Err(error)),
            },
            MEMBER_ADDED | MEMBER_REMOVED => match data::<Member>(event).and_then(Member::checked) {
                Ok(member) => {
                    let adding = event.kind == MEMBER_ADDED;
                    match (adding, self.is_member(store, event, &member.user)?) {
                        (true, false) => Ok(Some(AccessChange::Joined(vec![member.user.into_owned()]))),
                        (false, true) => Ok(Some(AccessChange::Left(member.user.into_owned()))),
                        _ => unchanged,
                    }
                }
                Err(error) => Err(Err(error)),
            },
            _ if event.parent.is_some_and(|parent| parent > self.row.head) => {
                Err(Err(Error::field("parent", format!("parent is behind the thread's head, {}", self.row.head))))
            }
            _ if !exists && !ids::is_reserved(&event.thread) => {
                Ok(Some(AccessChange::Joined(vec![event.from.to_string()])))
            }
            _ => Ok(None),
        })
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

    pub(super) fn apply(
        &mut self,
        change: &Option<AccessChange>,
        event: &LogEvent<'_>,
        seq: u64,
        at: u64,
        batch: &mut Batch<'_>,
    ) {
        match change {
            Some(AccessChange::Joined(users)) => {
                for user in users {
                    batch.put_member(&event.tenant, &event.thread, user, &MemberRow { since: seq });
                    self.members.insert(user.clone(), true);
                }
            }
            Some(AccessChange::Left(user)) => {
                batch.delete_member(&event.tenant, &event.thread, user);
                self.members.insert(user.clone(), false);
            }
            Some(AccessChange::Revoked(user)) => {
                self.revoked_until = self.revoked_until.max(at);
                batch.put_revocation(&event.tenant, user, &RevocationRow { until: self.revoked_until });
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
    serde_json::from_str(event.data.get())
        .map_err(|error| Error::field("data", format!("data of {}: {error}", event.kind)))
}
