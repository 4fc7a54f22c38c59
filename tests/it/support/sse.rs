//! Server-Sent Events as they are on the wire (HTML Living Standard, section 9.2.6): fields in, blocks out.

use serde_json::Value;

use super::{PATIENCE, Server, schemas, token};

/// What stands between two empty lines.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Block {
    pub id: Option<String>,
    pub event: Option<String>,
    pub data: String,
    pub retry: Option<u64>,
    pub comment: Option<String>,
}

impl Block {
    fn parse(text: &str) -> Block {
        let mut block = Block::default();
        for line in text.lines() {
            let (field, value) = line.split_once(':').unwrap_or((line, ""));
            let value = value.strip_prefix(' ').unwrap_or(value);
            match field {
                "" => block.comment = Some(value.to_owned()),
                "id" => block.id = Some(value.to_owned()),
                "event" => block.event = Some(value.to_owned()),
                "data" => block.data.push_str(value),
                "retry" => block.retry = Some(value.parse().unwrap()),
                other => panic!("no field of Server-Sent Events: {other}"),
            }
        }
        block
    }

    pub fn json(&self) -> Value {
        serde_json::from_str(&self.data).unwrap_or_else(|_| panic!("no JSON: {self:?}"))
    }
}

pub struct EventStream {
    pub reply: reqwest::Response,
    read: Vec<u8>,
}

impl EventStream {
    /// Opens `path`; a refusal comes back as its status and problem.
    pub async fn open(
        server: &Server,
        path: &str,
        token: &str,
        headers: &[(&str, &str)],
    ) -> Result<EventStream, (u16, Value)> {
        let mut request = reqwest::Client::new().get(format!("{}{path}", server.url)).bearer_auth(token);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let reply = request.send().await.unwrap();
        match reply.status().as_u16() {
            200 => Ok(EventStream { reply, read: Vec::new() }),
            status => {
                let problem = reply.json().await.unwrap();
                schemas::check_body("GET", path, status, &problem);
                Err((status, problem))
            }
        }
    }

    /// What a reply that has begun goes on with.
    pub fn over(reply: reqwest::Response) -> EventStream {
        assert_eq!(reply.status(), 200);
        EventStream { reply, read: Vec::new() }
    }

    /// A user's stream of a thread, with this query.
    pub async fn of(server: &Server, thread: &str, user: &str, query: &str) -> EventStream {
        let path = format!("/v1/threads/{thread}/stream{query}");
        EventStream::open(server, &path, &token(user, ""), &[]).await.unwrap_or_else(|refused| panic!("{refused:?}"))
    }

    /// The next block, comments included; `None` once the server has ended the stream.
    pub async fn block(&mut self) -> Option<Block> {
        loop {
            if let Some(end) = self.read.windows(2).position(|two| two == b"\n\n") {
                let text: Vec<u8> = self.read.drain(..end + 2).collect();
                let block = Block::parse(std::str::from_utf8(&text).unwrap());
                self.check(&block);
                return Some(block);
            }
            match tokio::time::timeout(PATIENCE, self.reply.chunk()).await.expect("a block, or the end").unwrap() {
                Some(bytes) => self.read.extend_from_slice(&bytes),
                None => {
                    assert!(self.read.is_empty(), "cut off in the middle of a block");
                    return None;
                }
            }
        }
    }

    /// What a block holds is what its schema says.
    fn check(&self, block: &Block) {
        if block.data.is_empty() {
            return;
        }
        let path = self.reply.url().path();
        match (path.rsplit('/').next(), block.event.as_deref()) {
            (Some("stream"), None) => schemas::check_event(&block.json()),
            (Some("stream"), Some("subscribed")) => schemas::check("http.stream-start", &block.json()),
            (Some("stream"), Some("error")) => schemas::check("http.problem", &block.json()),
            (Some("agui"), None) => schemas::check("agui.event", &block.json()),
            (_, event) => panic!("{path} has no event {event:?}: {block:?}"),
        }
    }

    /// The next one that is more than a comment.
    pub async fn next(&mut self) -> Option<Block> {
        let next = async {
            loop {
                let block = self.block().await?;
                if block.id.is_some() || block.event.is_some() || block.retry.is_some() || !block.data.is_empty() {
                    return Some(block);
                }
            }
        };
        // For all of it, and not for each of the server's comments in between.
        tokio::time::timeout(PATIENCE, next).await.expect("more than comments, or the end")
    }

    /// The next `n` events' seqs, which are their ids.
    pub async fn seqs(&mut self, n: usize) -> Vec<u64> {
        let mut seqs = Vec::with_capacity(n);
        while seqs.len() < n {
            let block = self.next().await.unwrap_or_else(|| panic!("the end, after {seqs:?}"));
            let seq = block.json()["seq"].as_u64().unwrap_or_else(|| panic!("{block:?}"));
            assert_eq!(block.id, Some(seq.to_string()), "the id is the seq");
            seqs.push(seq);
        }
        seqs
    }
}
