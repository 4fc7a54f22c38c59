//! A worker that outlives its connections.
//!
//! What it holds when a connection is lost is lost with it: the server gives that to another, or to this one again, with the
//! attempt counted. So [`WorkerItem::Lost`] ends all work that was given before it.

use super::reconnect::{Reconnect, advised};
use super::{
    Client, ClientError, ClientFrame, ClientWork, ConsumeDraft, ErrorFrame, PublishAnswer, PublishDraft, SettleDraft,
};

/// How often a publish is sent while the server calls its refusal temporary.
const TRIES: u32 = 5;

#[derive(Debug)]
pub enum WorkerItem {
    Work(Box<ClientWork>),
    /// The connection is gone, and all work with it; the next call makes a new one.
    Lost(ClientError),
    /// Connected again.
    Resumed,
}

/// Why the server did not do what it was asked.
#[derive(Debug)]
pub enum NotDone {
    Refused(Box<ErrorFrame>),
    /// The connection is gone: [`Worker::next`] says why.
    Lost,
}

pub struct Worker {
    url: String,
    token: String,
    wants: ConsumeDraft,
    client: Option<Client>,
    /// Why the connection is gone, until it is told.
    failure: Option<ClientError>,
    reconnect: Reconnect,
}

impl Worker {
    /// Connects for the first time. Failures are returned, but for one that the server calls temporary.
    pub async fn connect(url: &str, token: &str, wants: ConsumeDraft) -> Result<Worker, ClientError> {
        let (url, token, reconnect) = (url.to_owned(), token.to_owned(), Reconnect::default());
        let mut worker = Worker { url, token, wants, client: None, failure: None, reconnect };
        for tries in 1.. {
            match worker.open().await {
                Ok(()) => break,
                Err(error) => Reconnect::first_failed(tries, error).await?,
            }
        }
        Ok(worker)
    }

    pub fn group(&self) -> &str {
        &self.wants.group
    }

    /// The next item. Cancel-safe: nothing is lost when the future is dropped.
    pub async fn next(&mut self) -> Result<WorkerItem, ClientError> {
        if let Some(error) = self.failure.take() {
            return self.lost(error);
        }
        let Some(client) = &mut self.client else {
            self.reconnect.pause().await;
            return match self.open().await {
                Ok(()) => Ok(WorkerItem::Resumed),
                Err(error) => self.lost(error),
            };
        };
        loop {
            let frame = match client.recv().await {
                Ok(frame) => frame,
                Err(error) => return self.lost(error),
            };
            self.reconnect.heard();
            match frame {
                ClientFrame::Work(work) => return Ok(WorkerItem::Work(work)),
                // That it takes work has ended.
                ClientFrame::Error(error) => return self.lost(ClientError::Command(Box::new(error))),
                _ => {}
            }
        }
    }

    /// How much it takes at once, from now on.
    pub async fn take(&mut self, credit: u32) -> Result<(), NotDone> {
        self.wants.credit = credit;
        let Some(client) = &mut self.client else { return Err(NotDone::Lost) };
        let taken = client.consume(&self.wants).await;
        self.answered(taken)
    }

    /// Publishes an event that has a key: it may be sent more than once.
    pub async fn publish(&mut self, draft: &PublishDraft) -> Result<PublishAnswer, NotDone> {
        let mut tries = 1;
        loop {
            let Some(client) = &mut self.client else { return Err(NotDone::Lost) };
            match client.publish(draft).await {
                Err(ClientError::Command(refusal)) if refusal.temporary && tries < TRIES => {
                    tokio::time::sleep(advised(refusal.retry_after_ms, tries)).await;
                    tries += 1;
                }
                published => return self.answered(published),
            }
        }
    }

    pub async fn settle(&mut self, draft: &SettleDraft) -> Result<(), NotDone> {
        let Some(client) = &mut self.client else { return Err(NotDone::Lost) };
        let settled = client.settle(draft).await;
        self.answered(settled)
    }

    pub async fn close(self) -> Result<(), ClientError> {
        match self.client {
            Some(client) => client.close().await,
            None => Ok(()),
        }
    }

    async fn open(&mut self) -> Result<(), ClientError> {
        let mut client = Client::connect(&self.url, &self.token).await?;
        client.consume(&self.wants).await?;
        self.client = Some(client);
        Ok(())
    }

    fn answered<T>(&mut self, answer: Result<T, ClientError>) -> Result<T, NotDone> {
        answer.map_err(|error| match error {
            ClientError::Command(refusal) => NotDone::Refused(refusal),
            error => {
                self.client = None;
                self.failure = Some(error);
                NotDone::Lost
            }
        })
    }

    fn lost(&mut self, error: ClientError) -> Result<WorkerItem, ClientError> {
        self.client = None;
        self.reconnect.lost(error).map(WorkerItem::Lost)
    }
}
