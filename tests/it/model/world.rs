//! What the model knows, and how it checks every frame.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};
use weft::auth::jwt::{Claims, mint};

use super::{DEVICES, SOON, THREADS, USERS};
use crate::support::{SECRET, Server, Socket, claims};

/// An event as the model knows it: what was published, and what the first frame with it said beside that.
pub struct Event {
    pub kind: String,
    pub fields: Value,
    pub seen: Option<(Value, Value)>,
}

/// What a user is in a thread.
#[derive(Default, Clone, Copy)]
pub struct Standing {
    pub member: bool,
    /// The seq with which that began.
    pub changed: u64,
}

/// Whether a subscription's user has been removed since it began.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Left {
    No,
    /// It ends, and its client gets the error that says so.
    Yes,
    /// And added again: a subscription that read from the store at that time goes on, and one that was live ends.
    Back,
}

#[derive(Clone, Debug)]
pub struct Sub {
    pub called: String,
    pub cursor: u64,
    pub kinds: Option<Vec<String>>,
    pub name: Option<String>,
    pub confirm: bool,
    pub starred: bool,
    pub announce: bool,
    pub left: Left,
    pub acked: u64,
    /// The newest seq that came, and up to which one events may have been sent to earlier sessions of that name.
    pub sent: u64,
    pub sent_before: u64,
}

/// A `subscribe`.
#[derive(Clone)]
pub struct Asked {
    pub called: String,
    pub after: Option<Value>,
    pub last: Option<u64>,
    pub kinds: Option<Vec<String>>,
    pub name: Option<String>,
    pub confirm: bool,
}

/// How far a durable subscription is: the log has it at least here, and at most there.
#[derive(Default)]
pub struct Place {
    pub known: u64,
    pub most: u64,
}

pub struct Session {
    pub user: &'static str,
    pub socket: Option<Socket>,
    /// By the thread's name.
    pub subs: BTreeMap<String, Sub>,
    pub star: Option<Asked>,
    /// Threads joined while `"*"` was in force, and the seqs of joining: a subscription begins with one of them.
    pub joined: BTreeMap<String, Vec<u64>>,
    /// Of these, those that the client has unsubscribed from while that was under way.
    pub unsure: BTreeSet<String>,
    /// Threads in a list of cursors that the user is not in: an error comes for each.
    pub unknown: BTreeSet<String>,
    pub allowed: Option<u64>,
    pub refusals: usize,
    pub signals: BTreeSet<usize>,
    pub asleep_until: usize,
    /// What to ask for when it comes back.
    pub memory: Vec<Asked>,
}

pub struct Sent {
    pub device: usize,
    pub thread: String,
    pub readers: Vec<&'static str>,
}

pub struct World<'a> {
    pub server: &'a Server,
    pub tenant: String,
    pub threads: BTreeMap<String, Vec<Event>>,
    pub members: BTreeMap<(String, String), Standing>,
    pub sessions: Vec<Session>,
    /// By user, thread and key: kind, priority and seq.
    pub keys: BTreeMap<(String, String, u8), (usize, usize, u64)>,
    pub places: BTreeMap<(String, String, String), Place>,
    /// By user, thread and name (or none): the newest seq acknowledged.
    pub acked: BTreeMap<(String, String, Option<String>), u64>,
    pub signals: Vec<Sent>,
    pub now: usize,
    pub next_id: i64,
}

pub fn resolve(user: &str, called: &str) -> String {
    if called == "@me" { format!("@user:{user}") } else { called.to_owned() }
}

pub fn wants(kinds: &Option<Vec<String>>, kind: &str) -> bool {
    kinds.as_ref().is_none_or(|kinds| kinds.iter().any(|wanted| wanted == kind))
}

impl Session {
    fn new(user: &'static str) -> Session {
        Session {
            user,
            socket: None,
            subs: BTreeMap::new(),
            star: None,
            joined: BTreeMap::new(),
            unsure: BTreeSet::new(),
            unknown: BTreeSet::new(),
            allowed: None,
            refusals: 0,
            signals: BTreeSet::new(),
            asleep_until: 0,
            memory: Vec::new(),
        }
    }
}

impl World<'_> {
    /// An empty tenant. Its first users have two devices.
    pub fn new(server: &Server, tenant: String) -> World<'_> {
        World {
            server,
            tenant,
            threads: BTreeMap::new(),
            members: BTreeMap::new(),
            sessions: (0..DEVICES).map(|device| Session::new(USERS[device % USERS.len()])).collect(),
            keys: BTreeMap::new(),
            places: BTreeMap::new(),
            acked: BTreeMap::new(),
            signals: Vec::new(),
            now: 0,
            next_id: 1,
        }
    }

    pub fn set_member(&mut self, user: &str, thread: &str, member: bool, changed: u64) {
        self.members.insert((user.to_owned(), thread.to_owned()), Standing { member, changed });
    }

    pub fn token(&self, user: &str, scope: &str) -> String {
        mint(SECRET, &Claims { tenant: self.tenant.clone(), ..claims(user, scope) }).unwrap()
    }

    pub fn head(&self, thread: &str) -> u64 {
        self.threads.get(thread).map_or(0, |events| events.len() as u64)
    }

    pub fn standing(&self, user: &str, thread: &str) -> Standing {
        self.members.get(&(user.to_owned(), thread.to_owned())).copied().unwrap_or_default()
    }

    pub fn may_read(&self, user: &str, thread: &str) -> bool {
        self.standing(user, thread).member || *thread == resolve(user, "@me")
    }

    pub fn may_write(&self, user: &str, thread: &str) -> bool {
        let Some(owner) = thread.strip_prefix("@user:") else { return self.standing(user, thread).member };
        let both = |thread: &str| self.standing(user, thread).member && self.standing(owner, thread).member;
        owner == user || THREADS.iter().any(|(thread, _)| both(thread))
    }

    /// The first event after `cursor` of these kinds.
    pub fn next_wanted(&self, thread: &str, kinds: &Option<Vec<String>>, cursor: u64) -> Option<u64> {
        let mut later = (cursor + 1..).zip(self.threads.get(thread)?.iter().skip(cursor as usize));
        later.find(|(_, event)| wants(kinds, &event.kind)).map(|(seq, _)| seq)
    }

    pub fn append(&mut self, thread: &str, kind: &str, fields: Value) -> u64 {
        let events = self.threads.entry(thread.to_owned()).or_default();
        events.push(Event { kind: kind.to_owned(), fields, seen: None });
        events.len() as u64
    }

    /// Checks an event's content against what was published, and against the first frame with it.
    pub fn check_content(&mut self, thread: &str, frame: &Value) -> u64 {
        let mut frame = frame.clone();
        let fields = frame.as_object_mut().unwrap();
        let mut remove = |name: &str| fields.remove(name).unwrap_or(Value::Null);
        let (seq, rest) = (remove("seq").as_u64().unwrap(), (remove("event"), remove("at")));
        for name in ["type", "thread", "attempt"] {
            remove(name);
        }
        let events = self.threads.get_mut(thread).unwrap();
        let event = events.get_mut(seq as usize - 1).unwrap_or_else(|| panic!("{thread} has no {seq}: {frame}"));
        assert_eq!(frame, event.fields, "{thread} {seq}");
        assert_eq!(*event.seen.get_or_insert_with(|| rest.clone()), rest, "{thread} {seq}");
        seq
    }

    // Frames.

    pub async fn frame(&mut self, device: usize) -> Value {
        let session = &mut self.sessions[device];
        let socket = session.socket.as_mut().unwrap();
        match tokio::time::timeout(SOON, socket.next()).await {
            Ok(frame) => frame.unwrap_or_else(|code| panic!("device {device} was closed with {code}")),
            Err(_) => panic!("device {device} waits in vain: {:?}, joined {:?}", session.subs, session.joined),
        }
    }

    /// Sends commands in one frame, checks what comes, and gives the answer to the last.
    pub async fn ask(&mut self, device: usize, mut commands: Vec<Value>) -> Value {
        let id = self.next_id;
        self.next_id += 1;
        commands.last_mut().unwrap()["id"] = json!(id);
        self.sessions[device].socket.as_mut().unwrap().send(&Value::Array(commands)).await;
        loop {
            let frame = self.frame(device).await;
            if frame["id"] == id {
                return frame;
            }
            self.on_frame(device, &frame);
        }
    }

    pub fn on_frame(&mut self, device: usize, frame: &Value) {
        match frame["type"].as_str().unwrap() {
            "event" => self.on_event(device, frame),
            "caught_up" | "position" | "lagged" => self.on_notice(device, frame),
            "signal" => self.on_signal(device, frame),
            "error" if frame["id"].is_null() => self.on_error(device, frame),
            other => panic!("{other} without having asked: {frame}"),
        }
    }

    /// The subscription that a frame is of. One that `"*"` brings shows itself by its first frame.
    pub fn sub(&mut self, device: usize, frame: &Value) -> (String, Sub) {
        let user = self.sessions[device].user;
        let called = frame["thread"].as_str().unwrap();
        let thread = resolve(user, called);
        if let Some(sub) = self.sessions[device].subs.get(&thread) {
            assert_eq!(sub.called, called, "{frame}");
            return (thread, sub.clone());
        }
        let joined = self.sessions[device].joined.remove(&thread).unwrap_or_else(|| panic!("not subscribed: {frame}"));
        self.sessions[device].unsure.remove(&thread);
        let star = self.sessions[device].star.clone().unwrap();
        let fits = |cursor: &&u64| {
            frame["type"] != "event" || self.next_wanted(&thread, &star.kinds, **cursor - 1) == frame["seq"].as_u64()
        };
        let cursor = joined.iter().rev().find(fits).unwrap_or_else(|| panic!("joined with {joined:?}: {frame}")) - 1;
        let mut sub = self.begin(&star, &thread, cursor, true);
        sub.left = match (self.standing(user, &thread).member, joined.len()) {
            (false, _) => Left::Yes,
            (true, 1) => Left::No,
            (true, _) => Left::Back,
        };
        (thread, sub)
    }

    pub fn begin(&self, asked: &Asked, thread: &str, cursor: u64, starred: bool) -> Sub {
        Sub {
            called: if starred { thread.to_owned() } else { asked.called.clone() },
            cursor,
            kinds: asked.kinds.clone(),
            name: asked.name.clone(),
            confirm: asked.confirm,
            starred,
            announce: true,
            left: Left::No,
            acked: cursor,
            sent: 0,
            sent_before: 0,
        }
    }

    pub fn on_event(&mut self, device: usize, frame: &Value) {
        let (thread, mut sub) = self.sub(device, frame);
        let seq = self.check_content(&thread, frame);
        let session = &mut self.sessions[device];
        let user = session.user;
        if let Some(allowed) = &mut session.allowed {
            *allowed = allowed.checked_sub(1).unwrap_or_else(|| panic!("no credit for {frame}"));
        }
        let standing = self.standing(user, &thread);
        let visible = self.may_read(user, &thread) || seq < standing.changed;
        assert!(visible, "{user} left {thread} with {}: {frame}", standing.changed);
        let next = self.next_wanted(&thread, &sub.kinds, sub.cursor);
        match frame["attempt"].as_u64() {
            None => assert!(Some(seq) == next && seq > sub.sent, "{next:?} is next, not {frame}"),
            Some(attempt) => {
                assert!(sub.confirm && attempt >= 2 && seq <= sub.sent.max(sub.sent_before), "{sub:?}: {frame}");
                // A round begins again after what is acknowledged, and goes on in order.
                let round = self.next_wanted(&thread, &sub.kinds, sub.acked);
                assert!(Some(seq) == next || Some(seq) == round, "{next:?} or {round:?} is next, not {frame}");
            }
        }
        sub.cursor = seq;
        sub.sent = sub.sent.max(seq);
        self.sessions[device].subs.insert(thread, sub);
    }

    pub fn on_notice(&mut self, device: usize, frame: &Value) {
        let (thread, mut sub) = self.sub(device, frame);
        let number = |name: &str| frame[name].as_u64().unwrap();
        let head = self.head(&thread);
        let up_to = match frame["type"].as_str().unwrap() {
            "caught_up" => {
                assert!(std::mem::replace(&mut sub.announce, false), "it was caught up already: {frame}");
                number("seq")
            }
            "position" => {
                assert!(sub.kinds.is_some(), "{frame}");
                number("seq")
            }
            _ => {
                sub.announce = true;
                assert!(number("from") <= number("to") && number("to") <= head, "head {head}: {frame}");
                number("from") - 1
            }
        };
        // Between rounds of redelivery the cursor goes back, and no frame says so.
        if !(sub.confirm && up_to < sub.cursor) {
            let next = self.next_wanted(&thread, &sub.kinds, sub.cursor);
            let good = up_to >= sub.cursor && up_to <= head && next.is_none_or(|next| next > up_to);
            assert!(good, "after {} comes {next:?}, head {head}: {frame}", sub.cursor);
            sub.cursor = up_to;
        }
        self.sessions[device].subs.insert(thread, sub);
    }

    pub fn on_signal(&mut self, device: usize, frame: &Value) {
        let session = &mut self.sessions[device];
        let thread = resolve(session.user, frame["thread"].as_str().unwrap());
        assert!(session.subs.contains_key(&thread) || session.joined.contains_key(&thread), "not subscribed: {frame}");
        if frame["kind"] == "presence" {
            assert!(frame["data"]["online"].is_boolean() && frame["from"] != session.user, "{frame}");
            return;
        }
        let number = frame["data"].as_u64().unwrap() as usize;
        let sent = &self.signals[number];
        let from = self.sessions[sent.device].user;
        assert_eq!((&sent.thread, frame["from"].as_str()), (&thread, Some(from)), "{frame}");
        let session = &mut self.sessions[device];
        assert!(sent.device != device && sent.readers.contains(&session.user), "{frame}");
        assert!(session.signals.insert(number), "it came twice: {frame}");
    }

    pub fn on_error(&mut self, device: usize, frame: &Value) {
        let Some(called) = frame["thread"].as_str() else {
            self.sessions[device].refusals += 1;
            return;
        };
        let user = self.sessions[device].user;
        let thread = resolve(user, called);
        assert_eq!(frame["code"], "not_found", "{frame}");
        let member = self.standing(user, &thread);
        let session = &mut self.sessions[device];
        if frame["field"] == format!("after.{called}") {
            assert!(session.unknown.remove(&thread), "{frame}");
            return;
        }
        match session.subs.remove(&thread) {
            Some(sub) => assert_ne!(sub.left, Left::No, "nobody removed {user}: {frame}"),
            // One that `"*"` brought and that ended before it had a frame.
            None => assert!(session.joined.remove(&thread).is_some(), "not subscribed: {frame}"),
        }
        if session.star.is_some() && member.member {
            session.joined.insert(thread, vec![member.changed]);
        }
    }
}
