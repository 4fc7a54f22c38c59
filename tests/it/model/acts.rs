//! The steps: each does something and checks its answer.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::world::{Asked, Left, Place, Sent, Sub, World, resolve};
use super::{Begin, CALLED, DEVICES, END, KINDS, LARGE, PRIORITIES, Step, THREADS, USERS};
use crate::support::{Socket, eventually, has};

/// A command whose answer comes after those of all before it, which a ping's need not.
fn after_all() -> Value {
    json!({"type": "unsubscribe", "thread": "no-such-thread"})
}

impl World<'_> {
    /// Whether the device is there and reads.
    fn awake(&self, device: usize) -> bool {
        self.sessions[device].socket.is_some() && self.sessions[device].asleep_until <= self.now
    }

    pub async fn step(&mut self, step: &Step) {
        self.now += 1;
        match *step {
            Step::Resume { device } => self.resume(device).await,
            Step::Member { user, thread, add } => self.change_member(USERS[user], THREADS[thread].0, add).await,
            Step::Publish { device, .. }
            | Step::Burst { device, .. }
            | Step::Subscribe { device, .. }
            | Step::Ack { device, .. }
            | Step::Unsubscribe { device, .. }
            | Step::Drop { device }
            | Step::Credit { device, .. }
            | Step::Sleep { device, .. }
            | Step::Signal { device, .. }
                if !self.awake(device) => {}
            Step::Publish { device, to, kind, priority, key } => {
                self.publish(device, to, kind, priority, key, false).await;
            }
            Step::Burst { device, to, priority, count, large } => {
                for n in 0..count {
                    self.publish(device, to, n % KINDS.len(), priority, None, large).await;
                }
            }
            Step::Subscribe { device, to, ref begin, kinds, name, confirm } => {
                let kinds = kinds.map(|kind| vec![KINDS[kind].to_owned(), END.to_owned()]);
                // Durable subscriptions to all threads have tests of their own.
                let name = name.filter(|_| CALLED[to] != "*").map(|name| format!("n{name}"));
                let (after, last) = self.cursors(self.sessions[device].user, CALLED[to], begin);
                self.subscribe(device, Asked { called: CALLED[to].into(), after, last, kinds, name, confirm }).await;
            }
            Step::Ack { device, which, percent } => self.ack(device, which, percent).await,
            Step::Unsubscribe { device, to } => self.unsubscribe(device, CALLED[to]).await,
            Step::Drop { device } => self.leave(device),
            Step::Credit { device, events } => self.credit(device, events).await,
            Step::Sleep { device, steps } => self.sessions[device].asleep_until = self.now + steps,
            Step::Signal { device, to } => self.signal(device, CALLED[to]).await,
            Step::Await { device } => self.await_position(device).await,
        }
        let refused = self.sessions.iter().position(|session| session.refusals > 0);
        assert_eq!(refused, None, "nothing was refused but acknowledgements and signals");
    }

    fn cursors(&self, user: &str, called: &str, begin: &Begin) -> (Option<Value>, Option<u64>) {
        let part = |thread: &str, percent: u64| (self.head(thread) * percent).div_ceil(100);
        match *begin {
            Begin::Default => (None, None),
            Begin::Last(n) => (None, Some(n)),
            Begin::After(percent) if called == "*" => {
                // A thread that the list leaves out is replayed from its start.
                let of = |thread: &str| (thread.to_owned(), part(thread, percent.min(100)));
                (Some(json!(THREADS[..2].iter().map(|(thread, _)| of(thread)).collect::<BTreeMap<_, _>>())), None)
            }
            Begin::After(percent) => (Some(json!(part(&resolve(user, called), percent))), None),
        }
    }

    async fn publish(&mut self, device: usize, to: usize, kind: usize, priority: usize, key: Option<u8>, large: bool) {
        let user = self.sessions[device].user;
        let thread = resolve(user, CALLED[to]);
        let data = match key {
            Some(key) => json!({"key": key}),
            None => json!({"n": self.next_id, "pad": "x".repeat(if large { LARGE } else { 3 })}),
        };
        let mut fields = json!({"kind": KINDS[kind], "data": data});
        if let Some(priority) = PRIORITIES[priority] {
            fields["priority"] = json!(priority);
        }
        if let Some(key) = key {
            fields["key"] = json!(format!("k{key}"));
        }
        let mut command = fields.clone();
        (command["type"], command["thread"]) = (json!("publish"), json!(CALLED[to]));
        let key = key.map(|key| (user.to_owned(), thread.clone(), key));
        let used = key.as_ref().and_then(|key| self.keys.get(key).copied());
        let new = (self.may_write(user, &thread) && used.is_none()).then(|| {
            // Recorded before it is asked for: the event may come before the answer.
            fields["from"] = json!(user);
            self.append(&thread, KINDS[kind], fields)
        });
        let answer = self.ask(device, vec![command]).await;
        let answered = |name: &str| answer[name].clone();
        match (new, used) {
            (Some(seq), _) => {
                assert_eq!((answered("seq"), answered("duplicate")), (json!(seq), json!(false)), "{answer}")
            }
            (None, _) if !self.may_write(user, &thread) => assert_eq!(answer["code"], "not_found", "{answer}"),
            (None, Some((of_kind, of_priority, seq))) if (of_kind, of_priority) == (kind, priority) => {
                assert_eq!((answered("seq"), answered("duplicate")), (json!(seq), json!(true)), "{answer}");
            }
            _ => assert_eq!((answered("code"), answered("field")), (json!("conflict"), json!("key")), "{answer}"),
        }
        if let (Some(key), Some(seq)) = (key, new) {
            self.keys.insert(key, (kind, priority, seq));
        }
    }

    async fn subscribe(&mut self, device: usize, asked: Asked) {
        let mut command = json!({"type": "subscribe", "thread": asked.called});
        let fields = [
            ("after", asked.after.clone()),
            ("last", asked.last.map(Value::from)),
            ("kinds", asked.kinds.as_ref().map(|kinds| json!(kinds))),
            ("name", asked.name.as_ref().map(|name| json!(name))),
            ("confirm", asked.confirm.then_some(json!(true))),
        ];
        fields.into_iter().for_each(|(name, value)| value.into_iter().for_each(|value| command[name] = value));
        let answer = self.ask(device, vec![command]).await;
        // Checked against what came before the answer: frames come in the order in which things happened.
        if asked.called == "*" {
            self.begin_all(device, asked, &answer)
        } else {
            self.begin_one(device, asked, &answer)
        }
    }

    fn begin_one(&mut self, device: usize, asked: Asked, answer: &Value) {
        let session = &self.sessions[device];
        let (user, thread) = (session.user, resolve(session.user, &asked.called));
        let (there, joining) = (session.subs.contains_key(&thread), session.joined.contains_key(&thread));
        if there || (joining && answer["code"] == "conflict") {
            assert_eq!(answer["code"], "conflict", "{answer}");
            return;
        }
        if !self.may_read(user, &thread) {
            has(answer, json!({"code": "not_found", "field": "thread"}));
            return;
        }
        let head = self.head(&thread);
        let asked_after = asked.after.as_ref().and_then(Value::as_u64);
        if asked_after.is_some_and(|after| after > head) {
            has(answer, json!({"code": "cursor_invalid", "field": "after"}));
            return;
        }
        has(answer, json!({"type": "subscribed", "thread": asked.called}));
        has(answer, json!({"head": head, "recovered": true}));
        let after = answer["after"].as_u64().unwrap();
        let asked_for = asked_after.unwrap_or(head - asked.last.unwrap_or(0).min(head));
        let place = asked.name.as_ref().map(|name| (user.to_owned(), thread.clone(), name.clone()));
        let mut sent_before = 0;
        match place.as_ref().and_then(|place| self.places.get_mut(place)) {
            Some(place) => {
                // An earlier session may have been sent all there is, whether its client has read it or not.
                sent_before = head;
                if asked_after.is_none() && asked.last.is_none() {
                    assert!((place.known..=place.most).contains(&after), "{}..={}: {answer}", place.known, place.most);
                    place.known = after;
                } else {
                    assert_eq!(after, asked_for, "{answer}");
                }
            }
            None => assert_eq!(after, asked_for, "{answer}"),
        }
        if let Some(place) = place {
            self.places.entry(place).or_insert(Place { known: after, most: after });
        }
        let sub = Sub { sent_before, ..self.begin(&asked, &thread, after, false) };
        let session = &mut self.sessions[device];
        session.joined.remove(&thread);
        session.subs.insert(thread, sub);
    }

    fn begin_all(&mut self, device: usize, asked: Asked, answer: &Value) {
        let user = self.sessions[device].user;
        if self.sessions[device].star.is_some() {
            assert_eq!(answer["code"], "conflict", "{answer}");
            return;
        }
        let mine = THREADS.iter().map(|(thread, _)| *thread).filter(|thread| self.standing(user, thread).member);
        let (mut heads, mut cursors) = (BTreeMap::new(), BTreeMap::new());
        for thread in mine {
            let head = self.head(thread);
            let cursor = match &asked.after {
                Some(after) => after[thread].as_u64().unwrap_or(0),
                None => head - asked.last.unwrap_or(0).min(head),
            };
            heads.insert(thread, head);
            cursors.insert(thread, cursor);
        }
        has(answer, json!({"head": heads, "after": cursors}));
        let named = asked.after.iter().filter_map(Value::as_object).flat_map(|after| after.keys().cloned());
        let unknown = named.filter(|thread| !heads.contains_key(&**thread)).collect();
        for (thread, cursor) in cursors {
            let sub = self.begin(&asked, thread, cursor, true);
            self.sessions[device].subs.entry(thread.to_owned()).or_insert(sub);
        }
        let session = &mut self.sessions[device];
        (session.star, session.unknown) = (Some(asked), unknown);
    }

    async fn unsubscribe(&mut self, device: usize, called: &str) {
        let answer = self.ask(device, vec![json!({"type": "unsubscribe", "thread": called})]).await;
        let session = &mut self.sessions[device];
        let thread = resolve(session.user, called);
        let joining = session.joined.contains_key(&thread);
        let done = if called == "*" {
            session.joined.clear();
            session.subs.retain(|_, sub| !sub.starred);
            session.star.take().is_some()
        } else if session.subs.remove(&thread).is_some() {
            // If the thread was joined anew, its next subscription may come yet.
            joining.then(|| session.unsure.insert(thread));
            true
        } else {
            let begun = joining && answer["type"] == "unsubscribed";
            begun.then(|| session.joined.remove(&thread));
            begun
        };
        let wanted = if done { ("unsubscribed", None) } else { ("error", Some("not_found")) };
        assert_eq!((answer["type"].as_str().unwrap(), answer["code"].as_str()), wanted, "{answer}");
    }

    async fn ack(&mut self, device: usize, which: usize, percent: u64) {
        let session = &self.sessions[device];
        let Some((thread, sub)) = session.subs.iter().cycle().nth(which) else { return };
        let (user, thread, sub) = (session.user, thread.clone(), sub.clone());
        let seq = (sub.cursor * percent).div_ceil(100);
        if seq == 0 {
            return;
        }
        let mut ack = json!({"type": "ack", "thread": sub.called, "seq": seq});
        if let Some(name) = &sub.name {
            ack["name"] = json!(name);
        }
        self.ask(device, vec![ack, after_all()]).await;
        if std::mem::take(&mut self.sessions[device].refusals) > 0 {
            assert_ne!(sub.left, Left::No, "an acknowledgement for {thread} was refused");
            return;
        }
        if let Some(sub) = self.sessions[device].subs.get_mut(&thread) {
            sub.acked = sub.acked.max(seq);
        }
        if let Some(name) = &sub.name {
            let place = self.places.get_mut(&(user.to_owned(), thread.clone(), name.clone())).unwrap();
            place.most = place.most.max(seq);
        }
        let acked = self.acked.entry((user.to_owned(), thread, sub.name)).or_default();
        *acked = seq.max(*acked);
    }

    async fn credit(&mut self, device: usize, events: u64) {
        let ping = json!({"type": "ping"});
        self.ask(device, vec![json!({"type": "credit", "events": events}), ping]).await;
        // In one frame, so that what comes after the answer is sent by this credit.
        let allowed = &mut self.sessions[device].allowed;
        *allowed = Some(allowed.unwrap_or(0) + events);
    }

    async fn signal(&mut self, device: usize, called: &str) {
        let user = self.sessions[device].user;
        let thread = resolve(user, called);
        let readers = USERS.into_iter().filter(|user| self.may_read(user, &thread)).collect();
        self.signals.push(Sent { device, thread: thread.clone(), readers });
        let signal = json!({"type": "signal", "thread": called, "kind": "typing", "data": self.signals.len() - 1});
        self.ask(device, vec![signal, after_all()]).await;
        let refused = std::mem::take(&mut self.sessions[device].refusals) > 0;
        assert_eq!(refused, !self.may_write(user, &thread), "{user} signals in {thread}");
    }

    async fn change_member(&mut self, user: &'static str, thread: &str, add: bool) {
        let (method, kind) = if add { ("PUT", "member_added") } else { ("DELETE", "member_removed") };
        let (path, root) = (format!("/v1/threads/{thread}/members/{user}"), self.token("root", "admin"));
        let (status, answer) = self.server.http_with(method, &path, &root, None, &[]).await;
        let changes = self.standing(user, thread).member != add;
        assert_eq!((status < 300, &answer["changed"]), (true, &json!(changes)), "{answer}");
        if !changes {
            return;
        }
        let seq = self.append(thread, kind, json!({"kind": kind, "from": "root", "data": {"user": user}}));
        assert_eq!(answer["seq"], seq, "{answer}");
        self.set_member(user, thread, add, seq);
        for session in self.sessions.iter_mut().filter(|session| session.user == user && session.socket.is_some()) {
            if let Some(sub) = session.subs.get_mut(thread) {
                sub.left = if add { Left::Back } else { Left::Yes };
            }
            if add && session.star.is_some() {
                session.joined.entry(thread.to_owned()).or_default().push(seq);
            }
        }
    }

    /// Whether there is nothing new for one of the subscriptions but what its kinds leave out.
    fn waits_for_position(&self, device: usize) -> bool {
        let session = &self.sessions[device];
        let mut subs = session.subs.iter().filter(|(_, sub)| sub.left == Left::No && !sub.confirm && !sub.announce);
        let left_out = |thread: &str, sub: &Sub| {
            sub.cursor < self.head(thread) && self.next_wanted(thread, &sub.kinds, sub.cursor).is_none()
        };
        session.allowed.is_none() && subs.any(|(thread, sub)| left_out(thread, sub))
    }

    /// Reads until such a subscription, of this device or the next that has one, has all of its thread all the same.
    async fn await_position(&mut self, device: usize) {
        let waits = |it: &Self, device: usize| it.awake(device) && it.waits_for_position(device);
        let Some(device) = (device..device + DEVICES).map(|it| it % DEVICES).find(|it| waits(self, *it)) else {
            return;
        };
        while self.waits_for_position(device) {
            let frame = self.frame(device).await;
            self.on_frame(device, &frame);
        }
    }

    /// The connection is gone; its client remembers how far it was.
    fn leave(&mut self, device: usize) {
        let session = &mut self.sessions[device];
        let star = session.star.take();
        let (starred, named): (Vec<_>, Vec<_>) =
            std::mem::take(&mut session.subs).into_iter().partition(|(_, sub)| sub.starred);
        let one = |(_, sub): (String, Sub)| Asked {
            called: sub.called,
            after: sub.name.is_none().then(|| json!(sub.cursor)),
            last: None,
            kinds: sub.kinds,
            name: sub.name,
            confirm: sub.confirm,
        };
        let cursors: BTreeMap<_, _> = starred.into_iter().map(|(thread, sub)| (thread, sub.cursor)).collect();
        session.memory = named.into_iter().map(one).collect();
        session.memory.extend(star.map(|star| Asked { after: Some(json!(cursors)), last: None, ..star }));
        (session.socket, session.allowed, session.refusals, session.asleep_until) = (None, None, 0, 0);
        (session.joined, session.unsure, session.unknown) = Default::default();
    }

    pub async fn resume(&mut self, device: usize) {
        if self.sessions[device].socket.is_none() {
            let token = self.token(self.sessions[device].user, "");
            self.sessions[device].socket = Some(Socket::open(&self.server.url, &token).await);
            for asked in std::mem::take(&mut self.sessions[device].memory) {
                self.subscribe(device, asked).await;
            }
        }
    }

    // The end.

    /// Whether the session has all that it must get.
    fn has_all(&self, device: usize) -> bool {
        let session = &self.sessions[device];
        let there = |(thread, sub): (&String, &Sub)| sub.left != Left::Yes && sub.cursor == self.head(thread);
        let missing = |thread: &String| {
            let member = self.standing(session.user, thread).member;
            member && !session.subs.contains_key(thread) && !session.unsure.contains(thread)
        };
        session.subs.iter().all(there) && !session.joined.keys().any(missing) && session.unknown.is_empty()
    }

    pub async fn end(&mut self) {
        let root = self.token("root", "admin");
        let threads: Vec<String> = self.threads.keys().cloned().collect();
        for thread in &threads {
            let body = json!({"kind": END, "data": null});
            let path = format!("/v1/threads/{thread}/events");
            let (_, answer) = self.server.http_with("POST", &path, &root, Some(body), &[]).await;
            let seq = self.append(thread, END, json!({"kind": END, "from": "root", "data": null}));
            assert_eq!(answer["seq"], seq, "{answer}");
        }
        for device in 0..DEVICES {
            self.resume(device).await;
            if self.sessions[device].allowed.is_some() {
                self.credit(device, 1_000_000).await;
            }
            while !self.has_all(device) {
                let frame = self.frame(device).await;
                self.on_frame(device, &frame);
            }
        }
        for thread in &threads {
            let path = format!("/v1/threads/{thread}/events?limit=1000");
            let (_, page) = self.server.http_with("GET", &path, &root, None, &[]).await;
            let events = page["events"].as_array().unwrap();
            let seqs: Vec<u64> = events.iter().map(|event| self.check_content(thread, event)).collect();
            assert_eq!(seqs, (1..=self.head(thread)).collect::<Vec<_>>());
        }
        for ((user, thread, name), acked) in &self.acked {
            if thread.starts_with('@') || self.standing(user, thread).member {
                let path = format!("/v1/threads/{thread}/receipts");
                let kept = |it: &Value| {
                    (it["user"].as_str(), it["name"].as_str()) == (Some(user), name.as_deref()) && it["seq"] == *acked
                };
                eventually("each acknowledgement is kept", async || {
                    let (_, receipts) = self.server.http_with("GET", &path, &root, None, &[]).await;
                    receipts["receipts"].as_array().unwrap().iter().any(kept)
                })
                .await;
            }
        }
    }
}
