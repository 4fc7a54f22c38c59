//! A reader that outlives its connections.
//!
//! Invariant: in each thread the seqs of the [`ClientItem::Event`]s that [`Resuming::next`] gives go up by one, without a gap
//! or a repeat, however often the connection is lost between two of them. A gap is an error.

use std::collections::HashMap;

use serde_json::json;

use super::reconnect::{Reconnect, advised, random};
use super::{
    Client, ClientError, ClientEvent, ClientFrame, Http, PublishAnswer, PublishDraft, SubscribeAnswer, SubscribeDraft,
};
use crate::protocol::ids::ALL_THREADS;

/// Where reading begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// With the next event.
    Now,
    After(u64),
    /// With so many of the newest events.
    Last(u64),
}

#[derive(Debug)]
pub enum ClientItem {
    Event(Box<ClientEvent>),
    CaughtUp {
        thread: String,
        seq: u64,
    },
    /// The connection is gone; the next call makes a new one.
    Lost(ClientError),
    /// Connected again; reading goes on after the last event seen.
    Resumed,
}

pub struct Resuming {
    url: String,
    token: String,
    /// A thread, or `"*"`.
    thread: String,
    /// With `"*"`: the threads of the whole tenant.
    all: bool,
    start: Start,
    client: Option<Client>,
    epoch: Option<String>,
    /// The last seq seen of each thread.
    seen: HashMap<String, u64>,
    reconnect: Reconnect,
    next_key: u64,
}

impl Resuming {
    /// Connects for the first time. Failures are returned, since they are most likely a wrong address or token; but for one that
    /// the server calls temporary: that is tried again, a few times.
    pub async fn connect(url: &str, token: &str, thread: &str, start: Start) -> Result<Resuming, ClientError> {
        Resuming::begin(url, token, (thread, false), start).await
    }

    /// The same for all threads of the tenant.
    pub async fn connect_to_tenant(url: &str, token: &str, start: Start) -> Result<Resuming, ClientError> {
        Resuming::begin(url, token, (ALL_THREADS, true), start).await
    }

    async fn begin(url: &str, token: &str, (thread, all): (&str, bool), start: Start) -> Result<Resuming, ClientError> {
        let mut resuming = Resuming {
            url: url.to_owned(),
            token: token.to_owned(),
            thread: thread.to_owned(),
            all,
            start,
            client: None,
            epoch: None,
            seen: HashMap::new(),
            reconnect: Reconnect::default(),
            next_key: 1,
        };
        for tries in 1.. {
            match resuming.open().await {
                Ok(()) => break,
                Err(error) => Reconnect::first_failed(tries, error).await?,
            }
        }
        Ok(resuming)
    }

    /// The last seq seen of `thread`.
    pub fn seen(&self, thread: &str) -> Option<u64> {
        self.seen.get(thread).copied()
    }

    /// The threads that are read.
    pub fn threads(&self) -> impl Iterator<Item = &str> {
        self.seen.keys().map(String::as_str)
    }

    /// Drops the socket without a close frame, as a failing network does.
    pub fn cut(&mut self) {
        self.client = None;
    }

    pub async fn close(self) -> Result<(), ClientError> {
        match self.client {
            Some(client) => client.close().await,
            None => Ok(()),
        }
    }

    /// The next item. Cancel-safe: nothing is lost when the future is dropped.
    pub async fn next(&mut self) -> Result<ClientItem, ClientError> {
        let Some(client) = &mut self.client else {
            return self.reopen().await;
        };
        loop {
            let frame = match client.recv().await {
                Ok(frame) => frame,
                Err(error) => return self.lost(error),
            };
            self.reconnect.heard();
            match frame {
                ClientFrame::Event(event) if advance(&mut self.seen, &event)? => {
                    return Ok(ClientItem::Event(Box::new(event)));
                }
                ClientFrame::CaughtUp { thread, seq } => return Ok(ClientItem::CaughtUp { thread, seq }),
                // A subscription that ended for a while is begun anew.
                ClientFrame::Error(error) => return self.lost(ClientError::Command(Box::new(error))),
                _ => {}
            }
        }
    }

    /// Publishes with an idempotency key, and again with the same key when a connection is lost before the answer, so that
    /// it becomes exactly one event.
    pub async fn publish(&mut self, mut draft: PublishDraft) -> Result<PublishAnswer, ClientError> {
        if draft.key.is_none() {
            draft.key = Some(format!("{}-{}", random(), self.next_key));
            self.next_key += 1;
        }
        loop {
            let Some(client) = &mut self.client else {
                if let ClientItem::Lost(error) = self.reopen().await? {
                    tracing::debug!(%error, "publishing waits for a connection");
                }
                continue;
            };
            match client.publish(&draft).await {
                Ok(published) => return Ok(published),
                Err(ClientError::Command(refusal)) if refusal.temporary => {
                    tokio::time::sleep(advised(refusal.retry_after_ms, 1)).await;
                }
                // Frames that were received and not read are lost with the connection; their events come again after `seen`.
                Err(error) => drop(self.lost(error)?),
            }
        }
    }

    fn lost(&mut self, error: ClientError) -> Result<ClientItem, ClientError> {
        self.client = None;
        self.reconnect.lost(error).map(ClientItem::Lost)
    }

    async fn reopen(&mut self) -> Result<ClientItem, ClientError> {
        self.reconnect.pause().await;
        match self.open().await {
            Ok(()) => Ok(ClientItem::Resumed),
            Err(error) => self.lost(error),
        }
    }

    async fn open(&mut self) -> Result<(), ClientError> {
        let mut client = Client::connect(&self.url, &self.token).await?;
        if self.thread == ALL_THREADS {
            self.learn_threads().await?;
        }
        let subscribed = client.subscribe(&self.subscription()).await?;
        let same_log = self.epoch.as_ref().is_none_or(|known| *known == subscribed.epoch);
        if !subscribed.recovered || !same_log {
            return Err(ClientError::OtherLog(subscribed.epoch));
        }
        self.remember(subscribed);
        self.client = Some(client);
        Ok(())
    }

    /// Keeps where the subscription begins, for threads of which nothing has been seen yet.
    fn remember(&mut self, subscribed: SubscribeAnswer) {
        if let Some(after) = subscribed.after.as_u64() {
            self.seen.entry(self.thread.clone()).or_insert(after);
        }
        for (thread, after) in subscribed.after.as_object().into_iter().flatten() {
            if let Some(after) = after.as_u64() {
                self.seen.entry(thread.clone()).or_insert(after);
            }
        }
        self.epoch = Some(subscribed.epoch);
    }

    fn subscription(&self) -> SubscribeDraft {
        let (thread, epoch) = (self.thread.clone(), self.epoch.clone());
        let mut subscription = SubscribeDraft { thread, all: self.all, epoch, ..SubscribeDraft::default() };
        let all = self.thread == ALL_THREADS;
        match (self.seen.get(&self.thread), self.start) {
            _ if all => subscription.after = Some(json!(self.seen)),
            (Some(seen), _) => subscription.after = Some(json!(seen)),
            (None, Start::After(seq)) => subscription.after = Some(json!(seq)),
            (None, Start::Last(count)) => subscription.last = Some(count),
            (None, Start::Now) => {}
        }
        subscription
    }

    /// For `"*"`: a cursor in every thread, so that none loses events while there is no connection. A thread that was made
    /// since the first connection is read from its start.
    async fn learn_threads(&mut self) -> Result<(), ClientError> {
        let first_time = self.epoch.is_none();
        let mut http = Http::connect(&self.url, &self.token).await?;
        let list = format!("/v1/threads?limit=1000&all={}", self.all);
        for row in http.all_pages(&list, "threads").await? {
            let (Some(thread), Some(head)) = (row["thread"].as_str(), row["head"].as_u64()) else {
                return Err(ClientError::Malformed(format!("{row} in the list of threads")));
            };
            let begin = if first_time { self.start.cursor(head) } else { 0 };
            self.seen.entry(thread.to_owned()).or_insert(begin);
        }
        Ok(())
    }
}

impl Start {
    /// The seq after which reading begins in a thread with this head.
    fn cursor(self, head: u64) -> u64 {
        match self {
            Start::Now => head,
            Start::After(seq) => seq.min(head),
            Start::Last(count) => head.saturating_sub(count),
        }
    }
}

/// Whether the event is new. Deltas have no seq and always are.
fn advance(seen: &mut HashMap<String, u64>, event: &ClientEvent) -> Result<bool, ClientError> {
    let Some(seq) = event.seq else {
        return Ok(true);
    };
    let Some(last) = seen.get_mut(&event.thread) else {
        seen.insert(event.thread.clone(), seq);
        return Ok(true);
    };
    if seq <= *last {
        return Ok(false);
    }
    if seq != *last + 1 {
        return Err(ClientError::Hole { thread: event.thread.clone(), after: *last, seq });
    }
    *last = seq;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(seq: u64) -> ClientEvent {
        let text = json!({"thread": "t", "seq": seq, "kind": "user_message"}).to_string();
        serde_json::from_str(&text).unwrap()
    }

    #[test]
    fn each_event_passes_once_and_a_hole_is_an_error() {
        let mut seen = HashMap::from([("t".to_owned(), 4)]);
        assert!(!advance(&mut seen, &event(4)).unwrap());
        assert!(advance(&mut seen, &event(5)).unwrap());
        assert!(!advance(&mut seen, &event(5)).unwrap());
        assert!(matches!(advance(&mut seen, &event(7)), Err(ClientError::Hole { after: 5, seq: 7, .. })));
    }
}
