//! A thread while the projector works on it: who is a member, what an event changes, and how it is appended.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use serde::Deserialize;
use serde_json::value::RawValue;
use uuid::Uuid;

use super::runs::Rejected;
use super::transaction::{EventRecord, Transaction};
use super::{AccessChange, CommittedEvent, Published, RunNotice, ThreadUpdate, Update};
use crate::log::Grant;
use crate::protocol::error::{Code, Error};
use crate::protocol::event;
use crate::protocol::event::{EventFrame, LogEvent, Priority};
use crate::protocol::kinds::{
    AGENT_CANCEL_REQUESTED, MEMBER_ADDED, MEMBER_REMOVED, SESSIONS_REVOKED, THREAD_CREATED, THREAD_UPDATED,
};
use crate::protocol::{ids, json};
use crate::store::messages::MessageKey;
use crate::store::runs::EventRef;
use crate::store::{EventRow, KeyRow, MemberRow, RevocationRow, Store, StoreError, ThreadRow};

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
    /// The messages that are being written, by their numbers, once somebody has asked for one by another part of its key.
    open_messages: Option<OpenMessages>,
}

/// Messages that are being written, by their numbers in the thread.
pub(super) type OpenMessages = BTreeMap<u64, MessageKey>;

/// What becomes of an event as far as its thread decides.
pub(super) enum ThreadChange {
    /// It is appended, with what it changes of the thread.
    Append(ThreadEffect),
    /// Nothing had to change, and nothing is appended.
    Unchanged,
    Refused(Error),
}

/// What an event changes of its thread beside the head.
#[derive(Default)]
pub(super) struct ThreadEffect {
    access: Option<AccessChange>,
    /// The thread's title from now on, if the event sets it or takes it away.
    title: Option<Option<String>>,
}

impl From<AccessChange> for ThreadEffect {
    fn from(access: AccessChange) -> ThreadEffect {
        ThreadEffect { access: Some(access), title: None }
    }
}

/// An event that is accepted.
pub(super) struct AcceptedEvent<'a> {
    pub(super) event: &'a LogEvent<'a>,
    /// As its readers get it.
    pub(super) data: &'a RawValue,
    /// What the thread's hash covers.
    pub(super) value: &'a [u8],
    pub(super) at: u64,
    /// By a right beyond membership.
    pub(super) privileged: bool,
    pub(super) effect: ThreadEffect,
    /// The message that it closes.
    pub(super) closes: Option<Arc<str>>,
    /// What it means to the agent whose run it is about.
    pub(super) run: Option<RunNotice>,
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
        Thread { key: key.into(), row, changed: false, revoked_until: 0, members: HashMap::new(), open_messages: None }
    }

    /// What it takes in memory: one, and one for each membership and each message.
    pub(super) fn size(&self) -> usize {
        1 + self.members.len() + self.open_messages.as_ref().map_or(0, BTreeMap::len)
    }

    /// The messages that are being written, in the order in which they were begun. `read` gives them.
    pub(super) fn open_messages(
        &mut self,
        read: impl FnOnce() -> Result<OpenMessages, StoreError>,
    ) -> Result<&OpenMessages, StoreError> {
        Ok(match &mut self.open_messages {
            Some(open) => open,
            none if self.row.writing == 0 => none.insert(OpenMessages::new()),
            none => none.insert(read()?),
        })
    }

    /// A message has grown by so many bytes, of which so many are in the place of others.
    pub(super) fn message_grows(&mut self, key: &MessageKey, begins: bool, bytes: u64, dropped: u64) {
        self.row.writing_bytes = self.row.writing_bytes.saturating_sub(dropped) + bytes;
        self.changed = true;
        if begins {
            if let Some(open) = &mut self.open_messages {
                open.insert(self.row.messages, key.clone());
            }
            self.row.writing += 1;
            self.row.messages += 1;
        }
    }

    /// The message with this number is closed, and had so many bytes. `read` gives the messages that were being written.
    pub(super) fn message_closes(
        &mut self,
        number: u64,
        bytes: u64,
        read: impl FnOnce() -> Result<OpenMessages, StoreError>,
    ) -> Result<(), StoreError> {
        if number == self.row.oldest_open {
            // Who comes next is looked for once: from then on the list is kept.
            let next = self.row.messages;
            self.row.oldest_open = match self.row.writing {
                0 | 1 => next,
                _ => self.open_messages(read)?.range(number + 1..).next().map_or(next, |(number, _)| *number),
            };
        }
        if let Some(open) = &mut self.open_messages {
            open.remove(&number);
        }
        self.row.writing = self.row.writing.saturating_sub(1);
        self.row.writing_bytes = self.row.writing_bytes.saturating_sub(bytes);
        Ok(())
    }

    /// Refuses a writer who is no member, if the record's right to be here is membership. Who may write to reserved threads,
    /// which have no members, was decided before the record was appended; a thread that is not there yet has none either.
    pub(super) fn check_writer(&mut self, store: &Store, input: &EventRecord<'_>) -> Result<(), Rejected> {
        let EventRecord { record, event, .. } = *input;
        let by_membership = record.grant == Grant::Member && !ids::is_reserved(&event.thread);
        let exists = self.row.head > 0;
        if exists && by_membership && !self.is_member(store, event, &event.from)? {
            return Err(Error::no_thread().into());
        }
        Ok(())
    }

    fn is_member(&mut self, store: &Store, event: &LogEvent<'_>, user: &str) -> Result<bool, StoreError> {
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
        Ok(ThreadChange::Append(AccessChange::Revoked(user.to_owned()).into()))
    }

    fn create(&self, event: &LogEvent<'_>) -> ThreadChange {
        if self.row.head > 0 {
            return ThreadChange::Refused(Error::new(Code::Conflict, "the thread exists already").at("thread"));
        }
        let created = match json::decode_data::<CreatedData>(event.data) {
            Ok(created) => created,
            Err(error) => return ThreadChange::Refused(error),
        };
        match created.members_with(&event.from) {
            Ok(members) => ThreadChange::Append(ThreadEffect {
                access: Some(AccessChange::Joined(members)),
                title: Some(created.title.map(Cow::into_owned)),
            }),
            Err(error) => ThreadChange::Refused(error),
        }
    }

    fn retitle(&self, event: &LogEvent<'_>) -> ThreadChange {
        match json::decode_data::<TitleData>(event.data) {
            Ok(TitleData { title }) if self.row.title.as_deref() == Some(&*title) => ThreadChange::Unchanged,
            Ok(TitleData { title }) => {
                ThreadChange::Append(ThreadEffect { access: None, title: Some(Some(title.into_owned())) })
            }
            Err(error) => ThreadChange::Refused(error),
        }
    }

    fn change_member(&mut self, store: &Store, event: &LogEvent<'_>) -> Result<ThreadChange, StoreError> {
        let user = match json::decode_data::<MemberData>(event.data).and_then(MemberData::checked) {
            Ok(member) => member.user,
            Err(error) => return Ok(ThreadChange::Refused(error)),
        };
        let adding = event.kind == MEMBER_ADDED;
        Ok(match (adding, self.is_member(store, event, &user)?) {
            (true, false) => ThreadChange::Append(AccessChange::Joined(vec![user.into_owned()]).into()),
            (false, true) => ThreadChange::Append(AccessChange::Left(user.into_owned()).into()),
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
                ThreadChange::Append(AccessChange::Joined(vec![event.from.to_string()]).into())
            }
            _ => ThreadChange::Append(ThreadEffect::default()),
        }
    }

    /// Appends an event: gives it the next seq, writes its rows, and publishes it.
    pub(super) fn append(&mut self, new: AcceptedEvent<'_>, tx: &mut Transaction<'_>) -> EventRef {
        let AcceptedEvent { event, data, value, at, privileged, effect, closes, run } = new;
        // An agent must learn at once that it shall stop.
        let priority = if event.kind == AGENT_CANCEL_REQUESTED { Some(Priority::High) } else { event.priority };

        let seq = self.advance(value, priority, at);
        let frame = EventFrame { data, ..event.frame(seq) }.encode();
        let class = Priority::class(priority) as u8;
        let (offset, hash) = (tx.offset, self.row.hash);
        let row = EventRow { offset, kind: &event.kind, class, privileged, hash, frame: &frame };
        tx.rows.put_event(&event.tenant, &event.thread, seq, &row, at);
        tx.wanted.index(&mut tx.rows, event, seq, class);
        let access = self.apply(effect, event, EventRef { seq, at }, tx);

        let committed = CommittedEvent { seq, kind: (*event.kind).into(), priority, frame: frame.into(), closes, run };
        let update = Update::Event(Arc::new(committed), access);
        tx.commit.events.push(ThreadUpdate { key: self.key.clone(), update });
        EventRef { seq, at }
    }

    /// The next seq, and its link of the chain.
    fn advance(&mut self, value: &[u8], priority: Option<Priority>, at: u64) -> u64 {
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

    /// Writes what the event changes beside the thread's head; gives what that means for its readers.
    fn apply(
        &mut self,
        effect: ThreadEffect,
        event: &LogEvent<'_>,
        EventRef { seq, at }: EventRef,
        tx: &mut Transaction<'_>,
    ) -> Option<AccessChange> {
        match &effect.access {
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

        if let Some(title) = effect.title {
            self.row.title = title;
        }
        effect.access
    }
}

/// `data` of `thread_created`.
#[derive(Deserialize)]
struct CreatedData<'a> {
    #[serde(borrow, default)]
    title: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    members: Vec<Cow<'a, str>>,
}

impl CreatedData<'_> {
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
struct TitleData<'a> {
    #[serde(borrow)]
    title: Cow<'a, str>,
}

/// `data` of `member_added` and `member_removed`.
#[derive(Deserialize)]
struct MemberData<'a> {
    #[serde(borrow)]
    user: Cow<'a, str>,
}

impl MemberData<'_> {
    fn checked(self) -> Result<Self, Error> {
        ids::check_name("user", &self.user).map(|()| self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::runs::RunKey;

    fn message(run: &str, message: &str) -> MessageKey {
        MessageKey { run: RunKey::new("acme", "t", run), message: message.to_owned() }
    }

    fn never() -> Result<OpenMessages, StoreError> {
        unreachable!("nothing is being written, or it was asked before")
    }

    /// The numbers of what is being written.
    fn open(thread: &mut Thread) -> Vec<u64> {
        thread.open_messages(never).expect("nothing is read").keys().copied().collect()
    }

    #[test]
    fn messages_that_are_being_written_are_known_and_the_store_is_asked_for_them_once() {
        let mut thread = Thread::new("acme/t", None, 1);
        let keys = [message("r", "m"), message("q", "m"), message("q", "mm")];
        for key in &keys {
            thread.message_grows(key, true, 1, 0);
        }
        let size = thread.size();
        let read = || Ok((0..).zip(keys.clone()).collect());
        assert_eq!(thread.open_messages(read).expect("it is read").len(), 3);
        assert_eq!(thread.size(), size + 3);

        thread.message_closes(1, 1, never).expect("nothing is read");
        thread.message_grows(&message("s", "m"), true, 1, 0);
        thread.message_grows(&message("s", "m"), false, 1, 0);
        assert_eq!(open(&mut thread), [0, 2, 3]);
        assert_eq!((thread.row.writing, thread.row.writing_bytes, thread.size()), (3, 4, size + 3));
        assert_eq!(open(&mut Thread::new("acme/t", None, 1)), [0; 0]);
    }

    #[test]
    fn a_thread_knows_its_oldest_message_that_is_being_written() {
        let mut thread = Thread::new("acme/t", None, 1);
        let keys = [message("r", "a"), message("r", "b"), message("r", "c")];
        for key in &keys {
            thread.message_grows(key, true, 1, 0);
        }
        thread.message_closes(1, 1, never).expect("it is not the oldest");
        assert_eq!((thread.row.oldest_open, thread.row.messages), (0, 3));
        let read = || Ok([(0, keys[0].clone()), (2, keys[2].clone())].into());
        thread.message_closes(0, 1, read).expect("it is read");
        assert_eq!(thread.row.oldest_open, 2);
        thread.message_closes(2, 1, never).expect("nothing is left");
        assert_eq!((thread.row.oldest_open, thread.row.writing), (3, 0), "that of the next one");
        thread.message_grows(&message("r", "d"), true, 1, 0);
        assert_eq!((thread.row.oldest_open, thread.row.messages), (3, 4));
    }
}
